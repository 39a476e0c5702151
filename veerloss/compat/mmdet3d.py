"""``mmdet3d.models.losses.LovaszLoss``: images, voxels [N, C, \\*] and points [P, C].

Values are mmdetection3d's, which are Berman's: :mod:`veerloss.compat.lovasz_losses` tells where ours differ. Besides:

- the defaults work: there, ``LovaszLoss()`` fails on its own reduction "mean", which without ``per_image`` has nothing to do;
- one valid pixel, nothing valid and no class present work; 3-D logits are [N, C, P].

FocalLoss is that of :mod:`veerloss.compat.mmdet`, as there: its ``register()`` is for ``dict(type="mmdet.FocalLoss", ...)``.

Slower: ``per_image`` with reduction "none" takes one call of the kernel for each image.
"""

from __future__ import annotations

from ._mm import LovaszLoss
from ._mm import register as _register
from .mmdet import FocalLoss

PEER = "mmdet3d"
DISTRIBUTION = "mmdet3d"
VERSIONS = ">=1.0,<2"
REPLACES = {
    "mmdet3d.models.losses.lovasz_loss:LovaszLoss": "LovaszLoss",
    "mmdet3d.models.losses:FocalLoss": "FocalLoss",
}

__all__ = ["FocalLoss", "LovaszLoss", "register"]


def register() -> None:
    """Puts LovaszLoss into mmdetection3d's registry: ``dict(type="LovaszLoss", ...)`` in a config is then ours."""
    _register("mmdet3d.registry", "MODELS", LovaszLoss)
