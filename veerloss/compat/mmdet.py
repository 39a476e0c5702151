"""``mmdet.models.losses.FocalLoss``, which mmdetection3d has under its name too.

Values are mmdetection's: a target of C, the number of classes, is background; "mean" divides by all elements, or by
``avg_factor``. Different on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit; no elements: 0, not NaN;
- on a GPU no clamp of the probability, which mmcv's kernel has there;
- alpha outside [0, 1], a negative gamma and a target that is neither a class nor C are errors.

One call of the kernel, from class indices. ``activated=True`` takes probabilities back to logits first, which is a copy.
"""

from __future__ import annotations

from torch import Tensor, nn

from .._arguments import REDUCTIONS
from ..focal import sigmoid_focal_loss as _sigmoid
from ._focal import index_error_as, index_sigmoid, require
from ._mm import EPS
from ._mm import register as _register

PEER = "mmdet"
DISTRIBUTION = "mmdet"
VERSIONS = ">=3.0,<4"
REPLACES = {"mmdet.models.losses.focal_loss:FocalLoss": "FocalLoss"}
REGISTRY = "mmdet.registry:MODELS"

__all__ = ["FocalLoss", "register"]


class FocalLoss(nn.Module):
    """Focal loss of C classes against the rest.

    Args:
        use_sigmoid: True; mmdetection has no other.
        gamma: focusing exponent, >= 0.
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives.
        reduction: "mean", over all elements; "sum", or "none" ([N, C]).
        loss_weight: factor of the loss.
        activated: the prediction holds probabilities.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__()
        require(use_sigmoid is True, f"use_sigmoid must be True: only the sigmoid focal loss is supported, got {use_sigmoid!r}")
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.activated = activated

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            pred: logits [N, C].
            target: [N], a class, or C for background; or [N, C], one value in [0, 1] for each logit.
            weight: [N], or one factor for each logit, [N, C] or flat.
            avg_factor: divisor of "mean".
            reduction_override: "none", "mean" or "sum" instead of ``reduction``.

        Raises:
            AssertionError: reduction_override or a shape is not as above.
            ValueError: avg_factor with reduction "sum"; an option out of range.
            RuntimeError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        require(
            reduction_override in (None, *REDUCTIONS),
            f"reduction_override must be None or one of {REDUCTIONS}, got {reduction_override!r}",
        )
        reduction = reduction_override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"avg_factor can not be used with reduction='sum', got {avg_factor!r}")
        if weight is not None and weight.shape != pred.shape:
            if weight.shape == pred.shape[:1]:
                weight = weight.unsqueeze(1)
            else:
                require(
                    weight.numel() == pred.numel(),
                    f"weight must hold one factor for each of {pred.size(0)} rows or {pred.numel()} logits, "
                    f"got the shape {list(weight.shape)}",
                )
                weight = weight.reshape(pred.shape)
        normalizer = None
        if reduction == "mean":
            normalizer = max(pred.numel(), 1) if avg_factor is None else avg_factor + EPS
        logits = pred.logit() if self.activated else pred
        options = {
            "alpha": self.alpha, "gamma": self.gamma, "weight": weight, "reduction": reduction, "normalizer": normalizer
        }  # fmt: skip
        with index_error_as(RuntimeError):
            if pred.dim() == target.dim():
                return self.loss_weight * _sigmoid(logits, target, **options)
            return self.loss_weight * index_sigmoid(logits, target, background=pred.size(1), **options)


def register() -> None:
    """Puts FocalLoss into mmdetection's registry: ``dict(type="FocalLoss", ...)`` in a config is then ours."""
    _register(REGISTRY, FocalLoss)
