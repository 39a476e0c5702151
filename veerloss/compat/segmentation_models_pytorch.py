"""``segmentation_models_pytorch.losses``: LovaszLoss, FocalLoss, DiceLoss, JaccardLoss and TverskyLoss in their three modes,
and the functions of ``losses._functional`` that FocalLoss calls.

LovaszLoss has SMP's values, which are Berman's: "multiclass" is the softmax over the classes present, "binary" and "multilabel"
the hinge, all channels of "multilabel" together. Different on purpose:

- the gradient keeps its digits on large images; float64, half precision in "multiclass", and [N, C, P] work;
- everything ignored, or an image of a batch with ``per_image``, and no image at all: 0 with a gradient of 0, where SMP returns
  a loss of shape [0, C], or the int 0;
- ``from_logits=False``, which SMP does not look at, means probabilities: as they are in "multiclass", as logits in the others;
- with ``per_image`` the points of [P, C] or [P] are one image, not P images;
- labels that are no class, which are background to SMP, and binary targets that are not 0 or 1 are an error.

FocalLoss has SMP's values: "multiclass" is one class against the rest; soft targets have p_t = exp(-bce). Different on purpose:

- everything ignored: 0, not NaN; 0 < gamma < 1: no NaN in the gradient of a confident pixel;
- reduction "none" of "multiclass" and "multilabel" is [N, C, \\*], where SMP returns the mean; its mean is the "mean";
- "multilabel" takes ignore_index, on which SMP fails; "batchwise_mean" takes class_weights, and is the same with ignore_index;
- a NaN or infinite logit of an ignored pixel is ignored too;
- an unknown reduction, which SMP takes for "none", labels that are no class, which are background to it, alpha outside [0, 1]
  and a negative gamma are errors.

DiceLoss, JaccardLoss and TverskyLoss have SMP's values: a class without a target pixel has a loss of 0 and counts in the mean;
the intersection of soft targets is the sum of min(p, t). Different on purpose:

- sums are exact, whatever the type of the logits; SMP adds half precision in half precision, and counts beyond 65504 are inf;
- gamma below 1: no NaN in the gradient of a loss of 0; ``from_logits=False``: the gradient of a probability that is its target;
- a NaN or infinite logit of an ignored pixel is ignored too, and class indices of any type work;
- a target of "binary" or "multilabel" outside [0, 1] is an error;
- ``compute_score``, which SMP's classes have for their subclasses, is not here: there are no probabilities to give it.

``veerloss.patch`` before the code that imports these three: an object of SMP's own class, held from before, cannot be made
while it is patched (its ``__init__`` finds itself by name, and finds ours: TypeError).

One call of the kernel: "multiclass", and targets of 0 and 1 in the other modes. Those of a float type are read to find out
whether they are, which waits for a GPU; torch.compile takes the plain formula for them, and fuses it. Slower, in plain PyTorch:
``normalized``, ``reduced_threshold``, soft targets, and those that require a gradient; ``from_logits=False`` makes a copy. Of
DiceLoss, JaccardLoss and TverskyLoss: soft targets and those that require a gradient; ``from_logits=False`` under torch.compile
or of numbers outside [0, 1], for which it reads the prediction once more; an eps that counts, which is above beta + smooth, or
below 1e-7 with log_loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .._arguments import check_label_range
from ..focal import sigmoid_focal_loss as _sigmoid
from ..focal import softmax_focal_loss as _softmax
from . import _lovasz
from ._focal import (
    check_same_shape,
    cross_entropy_elements,
    index_sigmoid,
    is_hard,
    one_hot,
    power,
    reduced,
    require,
    to_opmath,
)
from ._smp_region import MODES as _MODES
from ._smp_region import DiceLoss, JaccardLoss, TverskyLoss

PEER = "segmentation_models_pytorch"
DISTRIBUTION = "segmentation-models-pytorch"
VERSIONS = ">=0.6,<0.7"
REPLACES = {
    "segmentation_models_pytorch.losses.lovasz:LovaszLoss": "LovaszLoss",
    "segmentation_models_pytorch.losses.focal:FocalLoss": "FocalLoss",
    "segmentation_models_pytorch.losses.dice:DiceLoss": "DiceLoss",
    "segmentation_models_pytorch.losses.jaccard:JaccardLoss": "JaccardLoss",
    "segmentation_models_pytorch.losses.tversky:TverskyLoss": "TverskyLoss",
    "segmentation_models_pytorch.losses._functional:focal_loss_with_logits": "focal_loss_with_logits",
    "segmentation_models_pytorch.losses._functional:softmax_focal_loss_with_logits": "softmax_focal_loss_with_logits",
}

__all__ = [
    "DiceLoss",
    "FocalLoss",
    "JaccardLoss",
    "LovaszLoss",
    "TverskyLoss",
    "focal_loss_with_logits",
    "softmax_focal_loss_with_logits",
]

_REDUCTIONS = ("none", "mean", "sum", "batchwise_mean", None)


class LovaszLoss(_Loss):
    """Lovász loss.

    Args:
        mode: "binary" (logits [N, \\*] or [N, 1, \\*] and a target of 0 and 1), "multiclass" (logits [N, C, \\*], class indices
            [N, \\*]) or "multilabel" (both [N, C, \\*], all channels one segment).
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore_index: target value that takes no part.
        from_logits: False: the prediction holds probabilities.
    """

    def __init__(self, mode: str, per_image: bool = False, ignore_index: int | None = None, from_logits: bool = True) -> None:
        require(mode in _MODES, f"mode must be one of {_MODES}, got {mode!r}")
        super().__init__()
        self.mode = mode
        self.ignore_index = ignore_index
        self.per_image = per_image
        self.from_logits = from_logits

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Raises:
            ValueError: "multiclass" with one channel.
            RuntimeError: y_true has another number of elements; an IndexError with ignore_index.
            IndexError: y_true holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        options = {"per_image": self.per_image, "ignore_index": self.ignore_index}
        if self.mode == "multiclass":
            return _lovasz.softmax(y_pred, y_true, from_logits=self.from_logits, **options)
        if self.from_logits:
            return _lovasz.hinge(y_pred, y_true, **options)
        logits = to_opmath(y_pred).clamp(1e-7, 1 - 1e-7).logit()  # half precision has no number between 1 - 1e-7 and 1
        return _lovasz.hinge(logits, y_true, **options)


class FocalLoss(_Loss):
    """Focal loss of each logit, or of each class against the rest.

    Args:
        mode: "binary" (logits and target of as many elements), "multiclass" (logits [N, C, \\*], class indices [N, \\*]) or
            "multilabel" (both [N, C, \\*]).
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives; None for 1 and 1.
        gamma: focusing exponent, >= 0.
        ignore_index: target value that takes no part.
        from_logits: False: the prediction holds probabilities, which are taken back to logits; in "multiclass", to logarithms.
        eps: probabilities are clamped to [eps, 1 - eps] for that.
        reduction: of each class, and then the mean over classes: "mean" over the elements that count, "sum", or
            "batchwise_mean", the sum over the batch and the mean over places. "none" or None: [N, C, \\*], 0 where ignored; in
            "binary", one value for each element that is not ignored, [P].
        normalized: divide each class's loss by the sum of its modulating factors.
        reduced_threshold: the modulating factor is 1 where p_t is below it, elsewhere ((1 - p_t) / reduced_threshold)^gamma.
        class_weights: one per class: the mean over classes is weighted by them. Not for "binary".
    """

    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float | None = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        require(mode in _MODES, f"mode must be one of {_MODES}, got {mode!r}")
        _check_reduction(reduction)
        if class_weights is not None and mode == "binary":
            raise ValueError("class_weights are not supported with mode='binary'")
        super().__init__()
        self.mode = mode
        self.alpha = alpha
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.from_logits = from_logits
        self.eps = eps
        self.reduction = reduction
        self.normalized = normalized
        self.reduced_threshold = reduced_threshold
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Raises:
            ValueError: the shapes do not fit, or an option is out of range.
            IndexError: y_true holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        if not self.from_logits:
            y_pred = y_pred.clamp(self.eps, 1 - self.eps)
            y_pred = y_pred.log() if self.mode == "multiclass" else y_pred.logit()
        if self.mode == "multiclass":
            expected = y_pred.shape[:1] + y_pred.shape[2:]
            if y_true.shape != expected:
                raise ValueError(f"y_true must have the shape {list(expected)}, got {list(y_true.shape)}")
            y_true = y_true.long() if y_true.dtype.is_floating_point else y_true
        elif self.mode == "multilabel":
            check_same_shape(y_pred, y_true, "y_true y_pred")
        else:
            if y_pred.shape != y_true.shape or self.reduction in ("none", None):
                y_pred, y_true = y_pred.reshape(-1), y_true.reshape(-1)
                check_same_shape(y_pred, y_true, "y_true y_pred")
            if self.ignore_index is not None and self.reduction in ("none", None):
                kept = y_true != self.ignore_index
                y_pred, y_true = y_pred[kept], y_true[kept]

        fused = not self.normalized and self.reduced_threshold is None and not y_true.requires_grad
        fused = fused and (self.mode == "multiclass" or is_hard(y_true, self.ignore_index))
        return (self._fused if fused else self._plain)(y_pred, y_true)

    def _weights(self, y_pred: Tensor) -> Tensor | None:
        """One factor per class, 1 on average."""
        if self.class_weights is None:
            return None
        weights = self.class_weights.to(y_pred.device)
        return weights * (len(weights) / weights.sum())

    def _divisor(self, y_pred: Tensor) -> int | None:
        """What the sum is divided by; None for what depends on how many elements count."""
        if self.reduction not in ("sum", "batchwise_mean"):
            return None
        if self.mode == "binary":
            return 1
        return y_pred.size(1) * (1 if self.reduction == "sum" else max(math.prod(y_pred.shape[2:]), 1))

    def _fused(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        loss = index_sigmoid if self.mode == "multiclass" else _sigmoid
        return loss(
            y_pred, y_true, alpha=self.alpha, gamma=self.gamma, weight=self._weights(y_pred), ignore_index=self.ignore_index,
            reduction="none" if self.reduction in ("none", None) else "mean", normalizer=self._divisor(y_pred),
        )  # fmt: skip

    def _plain(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        valid = torch.ones_like(y_true, dtype=torch.bool) if self.ignore_index is None else y_true != self.ignore_index
        y_true = torch.where(valid, y_true, torch.zeros_like(y_true))
        if self.mode == "multiclass":
            if y_true.device.type == "cpu" and not torch.compiler.is_compiling():
                check_label_range(y_true, y_pred.size(1), None)
            y_true = one_hot(y_true, y_pred.size(1))
            valid = valid.unsqueeze(1).expand_as(y_pred)
        loss, factor = _elements(torch.where(valid, y_pred, torch.zeros_like(y_pred)), y_true, self.gamma, self.alpha,
                                 self.reduced_threshold)  # fmt: skip
        loss = torch.where(valid, loss, torch.zeros_like(loss))
        if self.normalized:
            others = [d for d in range(loss.dim()) if d != 1 or self.mode == "binary"]
            loss = loss / (factor * valid).sum(others, keepdim=True).clamp_min(1e-6)
        weights = self._weights(y_pred)
        if weights is not None:
            loss = loss * weights.reshape(-1, *[1] * (loss.dim() - 2))
        loss = loss.to(y_pred.dtype)
        if self.reduction in ("none", None):
            return loss
        return loss.sum() / (self._divisor(y_pred) or valid.sum().clamp(min=1))


def focal_loss_with_logits(
    output: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Focal loss of each logit; arguments as for ``FocalLoss``, but "batchwise_mean" is the sum over dimension 0."""
    _check_reduction(reduction)
    check_same_shape(output, target, "target output")
    if not normalized and reduced_threshold is None and not target.requires_grad and is_hard(target):
        by_kernel = "none" if reduction in (None, "batchwise_mean") else reduction
        loss = _sigmoid(output, target, alpha=alpha, gamma=gamma, reduction=by_kernel)
        return loss.sum(0) if reduction == "batchwise_mean" else loss
    loss, factor = _elements(output, target, gamma, alpha, reduced_threshold)
    return _reduced(loss / factor.sum().clamp_min(eps) if normalized else loss, reduction).to(output.dtype)


def softmax_focal_loss_with_logits(
    output: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Multiclass focal loss of each pixel: logits [N, C, \\*], class indices [N, \\*].

    A target of -100 has a loss of 0 and counts in "mean".
    """
    _check_reduction(reduction)
    if not normalized and reduced_threshold is None:
        by_kernel = "none" if reduction in (None, "batchwise_mean") else reduction
        pixels = max(target.numel(), 1) if reduction == "mean" else None
        loss = _softmax(output, target, gamma=gamma, reduction=by_kernel, normalizer=pixels)
        return loss.sum(0) if reduction == "batchwise_mean" else loss
    loss = F.cross_entropy(to_opmath(output), target, reduction="none")
    factor = _modulating(loss, gamma, reduced_threshold)
    loss = factor * loss
    return _reduced(loss / factor.sum().clamp_min(eps) if normalized else loss, reduction).to(output.dtype)


def _elements(
    x: Tensor, target: Tensor, gamma: float, alpha: float | None, reduced_threshold: float | None
) -> tuple[Tensor, Tensor]:
    """Of each logit the loss and its modulating factor, in which p_t is exp(-bce), for soft targets too."""
    x = to_opmath(x)
    t = target if target.dtype == torch.bool else target.to(x.dtype)
    loss = cross_entropy_elements(x, t)
    factor = _modulating(loss, gamma, reduced_threshold)
    loss = factor * loss
    t = t.to(x.dtype)
    return loss if alpha is None else loss * (alpha * t + (1 - alpha) * (1 - t)), factor


def _modulating(cross_entropy: Tensor, gamma: float, reduced_threshold: float | None) -> Tensor:
    q = -torch.expm1(-cross_entropy)
    if reduced_threshold is None:
        return power(q, gamma)
    factor = power(q / reduced_threshold, gamma)
    return torch.where(torch.exp(-cross_entropy) < reduced_threshold, torch.ones_like(factor), factor)


def _reduced(loss: Tensor, reduction: str | None) -> Tensor:
    return loss.sum(0) if reduction == "batchwise_mean" else reduced(loss, reduction or "none")


def _check_reduction(reduction: str | None) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
