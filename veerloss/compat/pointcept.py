"""``pointcept.models.losses.LovaszLoss``: logits of points [P, C], labels [P].

Values are Pointcept's, which are Berman's over the classes present: :mod:`veerloss.compat.lovasz_losses` tells where ours
differ. Besides: where none of ``class_seen`` is present the loss is a 0 that has a gradient, not the int 0; logits [N, C, P]
are that, not a sigmoid map [B, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..lovasz import lovasz_hinge_loss, lovasz_softmax_loss
from ._focal import require
from ._mm import register as _register

PEER = "pointcept"
DISTRIBUTION = None  # used from its repository
VERSIONS = None
REPLACES = {"pointcept.models.losses.lovasz:LovaszLoss": "LovaszLoss"}

__all__ = ["LovaszLoss", "register"]

_MODES = ("binary", "multiclass", "multilabel")


class LovaszLoss(_Loss):
    """Lovász loss.

    Args:
        mode: "multiclass" (logits [P, C] or [N, C, \\*], class indices), "binary" or "multilabel" (the hinge of logits and a
            target of 0 and 1; all channels of "multilabel" are one segment).
        class_seen: ids of the classes that take part, where they are present; None for all. Of "multiclass".
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore_index: label that takes no part.
        loss_weight: factor of the loss.
    """

    def __init__(
        self,
        mode: str,
        class_seen: Sequence[int] | None = None,
        per_image: bool = False,
        ignore_index: int | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        require(mode in _MODES, f"mode must be one of {_MODES}, got {mode!r}")
        super().__init__()
        self.mode = mode
        self.ignore_index = ignore_index
        self.per_image = per_image
        self.class_seen = class_seen
        self.loss_weight = loss_weight

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        options = {"per_image": self.per_image, "ignore_index": self.ignore_index}
        if self.mode != "multiclass":
            return self.loss_weight * lovasz_hinge_loss(y_pred, y_true, **options)
        if self.class_seen is not None:
            seen = [int(c) for c in self.class_seen]
            options |= {"classes": [c for c in dict.fromkeys(seen) if c < y_pred.size(1)], "present_only": True}
        return self.loss_weight * lovasz_softmax_loss(y_pred, y_true, **options)


def register() -> None:
    """Puts LovaszLoss into Pointcept's registry: ``dict(type="LovaszLoss", ...)`` in a config is then ours."""
    _register("pointcept.models.losses.builder", "LOSSES", LovaszLoss)
