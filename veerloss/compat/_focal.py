"""What the focal losses of several peers have in common: checks, the fused call, and the plain formulas of rare arguments.

The plain formulas are written in the Python that TorchScript compiles, and use nothing but PyTorch: a function that its peer's
users script has them behind ``torch.jit.is_scripting()``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import REDUCTIONS
from ..focal import sigmoid_focal_loss

# ---- plain formulas


def to_opmath(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, in which the kernels compute too."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def power(q: Tensor, gamma: float) -> Tensor:
    """q^gamma of q in [0, 1], with a finite derivative at 0, where q^(gamma - 1) has none for gamma < 1."""
    return q.clamp_min(1.2e-38).pow(gamma)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[N, C, *], bool, of class indices [N, *]; all False for those that are no class."""
    return labels.unsqueeze(1) == torch.arange(classes, device=labels.device).reshape([1, -1] + [1] * (labels.dim() - 1))


def cross_entropy_elements(x: Tensor, t: Tensor) -> Tensor:
    """Binary cross-entropy of each logit."""
    if t.dtype == torch.bool:
        return -F.logsigmoid(torch.where(t, x, -x))
    return -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x))


def sigmoid_elements(x: Tensor, t: Tensor, gamma: float) -> Tensor:
    """bce(x, t) (p (1 - t) + (1 - p) t)^gamma of each logit, p = sigmoid(x)."""
    return cross_entropy_elements(x, t) * power(torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t, gamma)


def weighted_by_alpha(loss: Tensor, t: Tensor, alpha: float) -> Tensor:
    """alpha for positives and 1 - alpha for negatives; as it is for alpha < 0."""
    return loss * (alpha * t + (1 - alpha) * (1 - t)) if alpha >= 0 else loss


def reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    return loss.sum() if reduction == "sum" else loss


# ---- arguments


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"Invalid reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def check_same_shape(logits: Tensor, target: Tensor, names: str) -> None:
    """The error of binary_cross_entropy_with_logits, on which most peers rely. ``names``: of the target and of the logits."""
    if target.shape != logits.shape:
        target_name, logits_name = names.split()
        raise ValueError(f"{target_name} must have the shape of {logits_name}, {list(logits.shape)}, got {list(target.shape)}")


#: Elements of a target that are looked at together. On a CPU they and their square stay in its cache: 10M values take 6 ms on
#: two threads, and 50 in one piece. On a GPU each look waits for it.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}


def is_hard(target: Tensor, ignore_index: int | None = None) -> bool:
    """Whether all of ``target`` is 0, 1 or ``ignore_index``: then every way to treat soft targets has the same value.

    A float tensor is read for this, chunk by chunk, and a GPU waited for. Under torch.compile and while a CUDA graph is
    captured nobody can read it: then False.
    """
    if not target.dtype.is_floating_point:
        return True
    if torch.compiler.is_compiling() or target.is_meta or (target.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    target = target.detach()
    dense = torch.ops.aten.is_non_overlapping_and_dense(target)  # then the order does not matter
    for chunk in (target.as_strided((target.numel(),), (1,)) if dense else target.flatten()).split(
        _CHUNK.get(target.device.type, 1 << 24)
    ):
        if torch.equal(chunk, chunk * chunk):  # only 0 and 1 are their own squares
            continue
        if ignore_index is None:
            return False
        chunk = chunk.masked_fill(chunk == ignore_index, 0)
        if not torch.equal(chunk, chunk * chunk):
            return False
    return True


def positive_and_negative(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The (alpha, weight) of sigmoid_focal_loss that give positives and negatives these factors, per class."""
    weight = positive + negative
    return torch.where(weight == 0, torch.zeros_like(weight), positive / weight), weight


def float32_loss(logits: Tensor) -> contextlib.AbstractContextManager:
    """Within it the loss of half-precision logits is float32, without a float32 copy of them: the rule of autocast."""
    half = logits.dtype in (torch.float16, torch.bfloat16) and not logits.is_meta  # which autocast does not know
    return torch.autocast(logits.device.type) if half else contextlib.nullcontext()


# ---- the fused call


def dense_sigmoid(
    logits: Tensor, target: Tensor, alpha: float, gamma: float, reduction: str, *, normalizer: float | None = None
) -> Tensor:
    """Sigmoid focal loss of each logit with its own target; alpha < 0 for none.

    One call of the kernel, but plain PyTorch where the target requires a gradient, which no kernel gives.
    """
    if target.requires_grad:
        x, t = to_opmath(logits), to_opmath(target)
        loss = reduced(weighted_by_alpha(sigmoid_elements(x, t, gamma), t, alpha), reduction)
        loss = loss if normalizer is None else loss * (loss.new_ones(()) * logits.numel() / normalizer)
        return loss.to(logits.dtype)
    return sigmoid_focal_loss(
        logits, target, alpha=None if alpha < 0 else alpha, gamma=gamma, reduction=reduction, normalizer=normalizer
    )


#: For one channel of class indices, where all are 0 or ignored: a background keeps them from being taken for a binary mask.
NO_LABEL = -(2**62)


def index_sigmoid(logits: Tensor, labels: Tensor, *, background: int | None = None, **options) -> Tensor:
    """Sigmoid focal loss of each class against the rest: logits [N, C, *], class indices [N, *], ``background`` no class.

    Indices for one channel, where all are 0 or ignored, are ambiguous to the public function unless it has a background.
    """
    if background is None and logits.size(1) == 1:
        background = NO_LABEL
    return sigmoid_focal_loss(logits, labels, background_index=background, **options)


@contextlib.contextmanager
def index_error_as(error: type[Exception]) -> Iterator[None]:
    """A target out of range as the error that the peer has for it."""
    try:
        yield
    except IndexError as raised:
        raise error(str(raised)) from None


def peer_error(module: str, name: str, otherwise: type[Exception]) -> type[Exception]:
    """The peer's own exception where the peer is imported: only then can anybody catch it."""
    return getattr(sys.modules.get(module), name, otherwise)


def require(condition: bool, message: str) -> None:
    """The AssertionError of peers that assert, under ``python -O`` too."""
    if not condition:
        raise AssertionError(message)
