"""What the region losses of several peers have in common: the fused call, and the plain formulas of rare arguments.

The plain formulas are written in the Python that TorchScript compiles, and use nothing but PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..region import tversky_loss
from ._focal import float32_loss

# ---- plain formulas


def region_sums(p: Tensor, t: Tensor, dims: list[int], squared: bool, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The intersection, what is predicted, what is expected, over ``dims``.

    Args:
        p, t: probabilities and targets.
        squared: of squares the last two.
        soft: the intersection is the sum of min(p, t), which is (|p| + |t| - |p - t|) / 2, instead of that of p t; of targets
            of 0 and 1 it is the same (Wang et al., NeurIPS 2023, arXiv 2302.05666). Not with ``squared``.
    """
    if squared:
        return (p * t).sum(dims), (p * p).sum(dims), (t * t).sum(dims)
    return (torch.minimum(p, t) if soft else p * t).sum(dims), p.sum(dims), t.sum(dims)


def region_loss(
    i: Tensor, s: Tensor, t: Tensor, alpha: float, beta: float, smooth_numerator: float, smooth_denominator: float
) -> Tensor:
    """1 - (i + smooth) / (i + alpha (s - i) + beta (t - i) + smooth), with its digits where it is small; of 0 / 0 it is 0."""
    missed = alpha * (s - i) + beta * (t - i)
    whole = i + missed + smooth_denominator
    rest = (missed + (smooth_denominator - smooth_numerator)) / torch.where(whole == 0, torch.ones_like(whole), whole)
    return torch.where(whole == 0, torch.zeros_like(rest), rest)


def mean_of(loss: Tensor) -> Tensor:
    """Of no elements 0, not NaN."""
    return loss.sum() / max(loss.numel(), 1)


# ---- the fused call


def are_probabilities(p: Tensor) -> bool:
    """Whether all of ``p`` is in [0, 1], outside of which the kernels give NaN.

    It is read for this, and a GPU waited for. Under torch.compile and while a CUDA graph is captured nobody can: then False.
    """
    if torch.compiler.is_compiling() or p.is_meta or (p.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    if p.numel() == 0:
        return True
    low, high = torch.aminmax(p.detach())
    return bool((low >= 0) & (high <= 1))


def region_losses(
    logits: Tensor, target: Tensor, *, activation: str, smooth: float | tuple[float, float], per_image: bool, **options
) -> Tensor:
    """Of each class [C], or [N, C] with ``per_image``; float32 of half-precision logits. Arguments: veerloss.tversky_loss."""
    with float32_loss(logits):
        return tversky_loss(
            logits, target, activation=activation, smooth=smooth, per_image=per_image, reduction="none", **options
        )  # fmt: skip
