"""``mmseg.models.losses``: LovaszLoss and FocalLoss.

LovaszLoss is that of ``veerloss.compat.mmdet3d``, which tells what differs.

FocalLoss has mmseg's values, of the CPU: "mean" divides by all elements, ignored ones included, or by ``avg_factor``. Different
on purpose:

- the same on a GPU, where mmseg takes the largest value of a target per logit for its class;
- a NaN or infinite logit of an ignored pixel is ignored too; 0 < gamma < 1: no NaN in the gradient of a confident pixel;
- ``weight`` may have the shape of the pixels too;
- alpha outside [0, 1] and a negative gamma are errors.

One call of the kernel, from class indices. Targets per logit with an ignore_index that is a class are read once more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._arguments import REDUCTIONS
from ..focal import sigmoid_focal_loss as _sigmoid
from ._focal import index_error_as, index_sigmoid, require
from ._mm import EPS, LovaszLoss
from ._mm import register as _register

PEER = "mmseg"
DISTRIBUTION = "mmsegmentation"
VERSIONS = ">=1.0,<2"
REPLACES = {
    "mmseg.models.losses.focal_loss:FocalLoss": "FocalLoss",
    "mmseg.models.losses.lovasz_loss:LovaszLoss": "LovaszLoss",
}
REGISTRY = "mmseg.registry:MODELS"

__all__ = ["FocalLoss", "LovaszLoss", "register"]


class FocalLoss(nn.Module):
    """Focal loss of each class against the rest.

    Args:
        use_sigmoid: True; mmseg has no other.
        gamma: focusing exponent, a float >= 0.
        alpha: weight of positives, a float in [0, 1], or a list of one per class; 1 - alpha is that of negatives.
        reduction: "mean", over all elements, ignored ones included; "sum", or "none" (the shape of the logits).
        class_weight: a list of one factor per class.
        loss_weight: a float, factor of the loss.
        loss_name: the name of the loss in mmseg's logs; "loss_" at its start makes it part of the sum.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float | list[float] = 0.5,
        reduction: str = "mean",
        class_weight: list[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_focal",
    ) -> None:
        super().__init__()
        require(use_sigmoid is True, f"use_sigmoid must be True: only the sigmoid focal loss is supported, got {use_sigmoid!r}")
        require(reduction in REDUCTIONS, f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        require(isinstance(alpha, (float, list)), f"alpha must be a float or a list, got {alpha!r}")
        require(isinstance(gamma, float), f"gamma must be a float, got {gamma!r}")
        require(isinstance(loss_weight, float), f"loss_weight must be a float, got {loss_weight!r}")
        require(isinstance(loss_name, str), f"loss_name must be a str, got {loss_name!r}")
        require(
            class_weight is None or isinstance(class_weight, list), f"class_weight must be a list or None, got {class_weight!r}"
        )
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = reduction
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self._loss_name = loss_name

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = 255,
        **kwargs,
    ) -> Tensor:
        """The loss.

        Args:
            pred: logits [N, C, \\*].
            target: class indices [N, \\*], or one value in [0, 1] for each logit.
            weight: factor of each pixel, [N, \\*] or flat, or of each of its classes, [pixels, C].
            avg_factor: divisor of "mean".
            reduction_override: "none", "mean" or "sum" instead of ``reduction``.
            ignore_index: class index whose pixels have a loss of 0. For a target per logit: those where it is the largest.

        Raises:
            AssertionError: an option or a shape is not as above.
            ValueError: avg_factor with reduction "sum"; an option out of range.
            RuntimeError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        require(isinstance(ignore_index, int), f"ignore_index must be an int, got {ignore_index!r}")
        require(
            reduction_override in (None, *REDUCTIONS),
            f"reduction_override must be None or one of {REDUCTIONS}, got {reduction_override!r}",
        )
        per_logit = pred.shape == target.shape
        require(
            per_logit or target.shape == pred.shape[:1] + pred.shape[2:],
            f"target must have the shape of pred, {list(pred.shape)}, or hold class indices "
            f"{list(pred.shape[:1] + pred.shape[2:])}, got {list(target.shape)}",
        )
        reduction = reduction_override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"avg_factor can not be used with reduction='sum', got {avg_factor!r}")
        weight = self._weight(pred, target, weight, ignore_index if per_logit else None)
        alpha = torch.tensor(self.alpha, device=pred.device) if isinstance(self.alpha, list) else self.alpha
        normalizer = None
        if reduction == "mean":
            normalizer = max(pred.numel(), 1) if avg_factor is None else avg_factor + EPS
        options = {"alpha": alpha, "gamma": self.gamma, "weight": weight, "reduction": reduction, "normalizer": normalizer}
        with index_error_as(RuntimeError):
            if per_logit:
                loss = _sigmoid(pred, target, **options)
            else:
                loss = index_sigmoid(pred, target, ignore_index=ignore_index, **options)
        return self.loss_weight * loss

    def _weight(self, pred: Tensor, target: Tensor, weight: Tensor | None, ignored_class: int | None) -> Tensor | None:
        """All factors in a shape that broadcasts to the logits."""
        factors = []
        ones = [1] * (pred.dim() - 2)
        if self.class_weight is not None:
            factors.append(torch.tensor(self.class_weight, device=pred.device).reshape(-1, *ones))
        if weight is not None:
            places = (pred.size(0), *pred.shape[2:])
            if weight.dim() == 2 and weight.shape == (math.prod(places), pred.size(1)):
                factors.append(weight.reshape(*places, pred.size(1)).movedim(-1, 1))
            else:
                require(
                    weight.numel() == math.prod(places),
                    f"weight must hold one factor for each of {math.prod(places)} pixels, got the shape {list(weight.shape)}",
                )
                factors.append(weight.reshape(places).unsqueeze(1))
        if ignored_class is not None and 0 <= ignored_class < pred.size(1):
            factors.append((target.argmax(1, keepdim=True) != ignored_class).to(torch.float32))
        if not factors:
            return None
        return math.prod(factors[1:], start=factors[0])

    @property
    def loss_name(self) -> str:
        return self._loss_name


def register() -> None:
    """Puts both into mmsegmentation's registry: ``dict(type="LovaszLoss", ...)`` in a config is then ours."""
    _register(REGISTRY, LovaszLoss, FocalLoss)
