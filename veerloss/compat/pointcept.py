"""``pointcept.models.losses.LovaszLoss``: logits of points [P, C], labels [P].

Values are Pointcept's, which are Berman's over the classes present: ``veerloss.compat.lovasz_losses`` tells where ours
differ. Besides:

- where none of ``class_seen`` is present the loss is a 0 that has a gradient, not the int 0; ``class_seen`` holds with
  ``per_image`` too, where Pointcept forgets it;
- logits [N, C, P] are that, not a sigmoid map [B, H, W]; with ``per_image`` the points of [P, C] or [P] are one image, not P.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.loss import _Loss

from . import _lovasz
from ._focal import require
from ._mm import register as _register

PEER = "pointcept"
DISTRIBUTION = None  # used from its repository
VERSIONS = None
REPLACES = {"pointcept.models.losses.lovasz:LovaszLoss": "LovaszLoss"}
REGISTRY = "pointcept.models.losses.builder:LOSSES"

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
        """The loss.

        Raises:
            ValueError: "multiclass" with one channel, or with no class of ``class_seen``.
            RuntimeError: y_true has another number of elements; an IndexError with ignore_index.
            IndexError: y_true holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        options = {"per_image": self.per_image, "ignore_index": self.ignore_index}
        if self.mode != "multiclass":
            return self.loss_weight * _lovasz.hinge(y_pred, y_true, **options)
        if self.class_seen is not None:
            seen = {int(c) for c in self.class_seen}.intersection(range(y_pred.shape[1]))
            if not seen:
                raise ValueError(f"class_seen must hold a class in [0, {y_pred.shape[1]}), got {self.class_seen!r}")
            options |= {"classes": sorted(seen), "present_only": True}
        return self.loss_weight * _lovasz.softmax(y_pred, y_true, **options)


def register() -> None:
    """Puts LovaszLoss into Pointcept's registry: ``dict(type="LovaszLoss", ...)`` in a config is then ours."""
    _register(REGISTRY, LovaszLoss)
