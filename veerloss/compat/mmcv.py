"""``mmcv.ops``: sigmoid_focal_loss, softmax_focal_loss and their modules, on the CPU too.

Values are mmcv's: "mean" divides by N, the number of samples; a sigmoid target of C, the number of classes, is background; the
``alpha`` of the softmax is a plain factor. ``weight`` holds one factor per class, and that of a sample's class multiplies the
whole sample. Different on purpose:

- the tail: mmcv takes log(max(p, FLT_MIN)): the loss of a wrong logit beyond 88 stops growing, and its gradient is wrong there;
- a sigmoid sample of background has the weight 1, where mmcv reads behind the end of ``weight``;
- a softmax sample with a negative target is 0 and counts in the mean, as in mmcv, with ``weight`` too, where mmcv reads before
  its start;
- a sigmoid target that is neither a class nor C is an error, where mmcv takes it for background;
- no samples: 0, not NaN. Integer targets of any type are taken. Negative alpha or gamma, and sigmoid alpha > 1, are errors.

No argument takes a slower path.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import REDUCTIONS, opmath_dtype
from ..focal import softmax_focal_loss as _softmax_focal_loss
from ._focal import index_sigmoid, require

PEER = "mmcv"
DISTRIBUTION = "mmcv"
VERSIONS = ">=1.3,<3"
REPLACES = {
    "mmcv.ops.focal_loss:sigmoid_focal_loss": "sigmoid_focal_loss",
    "mmcv.ops.focal_loss:softmax_focal_loss": "softmax_focal_loss",
    "mmcv.ops.focal_loss:SigmoidFocalLoss": "SigmoidFocalLoss",
    "mmcv.ops.focal_loss:SoftmaxFocalLoss": "SoftmaxFocalLoss",
}

__all__ = ["SigmoidFocalLoss", "SoftmaxFocalLoss", "sigmoid_focal_loss", "softmax_focal_loss"]


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss of C classes against the rest.

    Args:
        input: logits [N, C].
        target: [N], integers: a class, or C for background.
        gamma: focusing exponent, >= 0.
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives.
        weight: [C], factor of the samples of each class.
        reduction: "none" ([N, C]), "mean" (the sum divided by N) or "sum".

    Raises:
        AssertionError: a shape or reduction is not as above.
        ValueError: alpha or gamma is out of range.
        IndexError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    _check(input, target, weight, reduction)
    if weight is not None:
        weight = F.pad(weight, (0, 1), value=1.0)[target.long()].unsqueeze(1)
    return index_sigmoid(
        input, target, background=input.size(1), alpha=alpha, gamma=gamma, weight=weight, reduction=reduction,
        normalizer=_samples(input, reduction),
    )  # fmt: skip


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Multiclass focal loss.

    Args:
        input: logits [N, C].
        target: [N], integers: a class, or a negative value for a sample whose loss is 0.
        gamma: focusing exponent, >= 0.
        alpha: factor of the loss, >= 0.
        weight: [C], factor of the samples of each class.
        reduction: "none" ([N]), "mean" (the sum divided by N) or "sum".

    Raises:
        As ``sigmoid_focal_loss``.
    """
    _check(input, target, weight, reduction)
    factor = alpha if weight is None else alpha * weight.to(opmath_dtype(input))
    return _softmax_focal_loss(
        input, target.long().clamp(min=-1), alpha=factor, gamma=gamma, ignore_index=-1, reduction=reduction,
        normalizer=_samples(input, reduction),
    )  # fmt: skip


class SigmoidFocalLoss(nn.Module):
    """Module of ``sigmoid_focal_loss``."""

    function = staticmethod(sigmoid_focal_loss)

    def __init__(self, gamma: float, alpha: float, weight: Tensor | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.register_buffer("weight", weight)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.function(input, target, self.gamma, self.alpha, self.weight, self.reduction)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, alpha={self.alpha}, reduction={self.reduction}"


class SoftmaxFocalLoss(SigmoidFocalLoss):
    """Module of ``softmax_focal_loss``."""

    function = staticmethod(softmax_focal_loss)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> None:
    require(input.dim() == 2, f"input must have the shape [N, C], got {list(input.shape)}")
    require(target.shape == input.shape[:1], f"target must have the shape [{input.size(0)}], got {list(target.shape)}")
    require(
        weight is None or weight.shape == input.shape[1:],
        f"weight must have the shape [{input.size(1)}], got {weight is not None and list(weight.shape)}",
    )
    require(reduction in REDUCTIONS, f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def _samples(input: Tensor, reduction: str) -> int | None:
    return max(input.size(0), 1) if reduction == "mean" else None
