"""``mmdet3d.models.losses.LovaszLoss``: images, voxels [N, C, \\*] and points [P, C].

Values are mmdetection3d's, which are Berman's: ``veerloss.compat.lovasz_losses`` tells where ours differ. Besides:

- the defaults work: there, ``LovaszLoss()`` fails on its own reduction "mean", which without ``per_image`` has nothing to do;
- one valid pixel, nothing valid and no class present work; 3-D logits are [N, C, P].

FocalLoss is that of ``veerloss.compat.mmdet``, as there: its ``register()`` is for ``dict(type="mmdet.FocalLoss", ...)``.

Slower: ``per_image`` with reduction "none" takes one call of the kernel for each image.
"""

from __future__ import annotations

from torch import Tensor

from . import _mm
from ._mm import register as _register
from .mmdet import FocalLoss

PEER = "mmdet3d"
DISTRIBUTION = "mmdet3d"
VERSIONS = ">=1.0,<2"
REPLACES = {
    "mmdet3d.models.losses.lovasz_loss:LovaszLoss": "LovaszLoss",
    "mmdet3d.models.losses:FocalLoss": "FocalLoss",
}
REGISTRY = "mmdet3d.registry:MODELS"

__all__ = ["FocalLoss", "LovaszLoss", "register"]


class LovaszLoss(_mm.LovaszLoss):
    __doc__ = _mm.LovaszLoss.__doc__

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = 255,
    ) -> Tensor:
        """As of ``veerloss.compat.mmseg.LovaszLoss``, without its ``weight``."""
        return super().forward(cls_score, label, None, avg_factor, reduction_override, ignore_index)


def register() -> None:
    """Puts LovaszLoss into mmdetection3d's registry: ``dict(type="LovaszLoss", ...)`` in a config is then ours."""
    _register(REGISTRY, LovaszLoss)
