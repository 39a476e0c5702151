"""LovaszLoss of mmsegmentation and mmdetection3d, which have the same, and registries of the OpenMMLab kind."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .._arguments import REDUCTIONS
from . import _lovasz
from ._focal import require

EPS = 1.1920929e-07  # of float32: added to avg_factor, as there


class LovaszLoss(nn.Module):
    """Lovász loss: the hinge of binary logits, or the softmax of multiclass ones.

    Args:
        loss_type: "binary" or "multi_class".
        classes: "present", "all" or a list of class ids; of "multi_class".
        per_image: a loss for each image instead of one of the batch.
        reduction: of the images' losses, with per_image: "none" [N], "mean" or "sum". Without it the loss is one number.
        class_weight: a list of one factor per class, or a .npy or .json file of it; of "multi_class".
        loss_weight: factor of the loss.
        loss_name: the name of the loss in logs; "loss_" at its start makes it part of the sum.
    """

    def __init__(
        self,
        loss_type: str = "multi_class",
        classes: str | list[int] = "present",
        per_image: bool = False,
        reduction: str = "mean",
        class_weight: list[float] | str | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_lovasz",
    ) -> None:
        super().__init__()
        require(loss_type in ("binary", "multi_class"), f"loss_type must be 'binary' or 'multi_class', got {loss_type!r}")
        is_list = isinstance(classes, (list, tuple)) and all(isinstance(c, int) for c in classes)
        require(
            classes in ("all", "present") or is_list, f"classes must be 'all', 'present' or a list of ints, got {classes!r}"
        )
        require(reduction in REDUCTIONS, f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self.loss_type = loss_type
        self.classes = classes
        self.per_image = per_image
        self.reduction = reduction
        self.class_weight = _loaded(class_weight)
        self.loss_weight = loss_weight
        self._loss_name = loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = 255,
    ) -> Tensor:
        """The loss.

        Args:
            cls_score: logits [N, C, \\*] or [P, C]; of "binary" [N, \\*] or [N, 1, \\*].
            label: class indices [N, \\*] or [P].
            weight: not used, as there: a Lovász loss has no weights of pixels. A warning says so.
            avg_factor: divisor of the sum over images with reduction "mean" and per_image.
            reduction_override: instead of ``reduction``.
            ignore_index: label that takes no part.

        Raises:
            AssertionError: an option is not as above.
            ValueError: avg_factor with reduction "sum"; "multi_class" with one channel.
            RuntimeError: label has another number of elements; with ignore_index, as by default, an IndexError.
            IndexError: label holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        require(
            reduction_override in (None, *REDUCTIONS),
            f"reduction_override must be None or one of {REDUCTIONS}, got {reduction_override!r}",
        )
        if weight is not None:
            warnings.warn("LovaszLoss has no weights of pixels: weight is not used", stacklevel=2)
        reduction = reduction_override or self.reduction
        if not self.per_image:
            return self.loss_weight * self._loss(cls_score, label, False, ignore_index)
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"avg_factor can not be used with reduction='sum', got {avg_factor!r}")
        if reduction == "none":
            each = [self._loss(cls_score[i : i + 1], label[i : i + 1], False, ignore_index) for i in range(len(cls_score))]
            return self.loss_weight * (torch.stack(each) if each else cls_score.sum().reshape(1)[:0])
        images = len(cls_score)
        factor = images if reduction == "sum" else 1.0 if avg_factor is None else images / (avg_factor + EPS)
        return self.loss_weight * factor * self._loss(cls_score, label, True, ignore_index)

    def _loss(self, logits: Tensor, label: Tensor, per_image: bool, ignore_index: int | None) -> Tensor:
        options = {"per_image": per_image, "ignore_index": ignore_index}
        if self.loss_type == "binary":
            return _lovasz.hinge(logits, label, **options)
        weight = None if self.class_weight is None else torch.tensor(self.class_weight, device=logits.device)
        return _lovasz.softmax(logits, label, classes=self.classes, class_weight=weight, **options)

    @property
    def loss_name(self) -> str:
        return self._loss_name


def _loaded(class_weight: list[float] | str | None) -> list[float] | None:
    if not isinstance(class_weight, str):
        return class_weight
    if class_weight.endswith(".npy"):
        import numpy as np  # which veerloss does not need otherwise

        return np.load(class_weight).tolist()
    if class_weight.endswith(".json"):
        return json.loads(Path(class_weight).read_text())
    raise ValueError(f"class_weight must be a list of numbers, or a .npy or .json file of it, got {class_weight!r}")


def register(registry: str, *losses: type[nn.Module]) -> None:
    """Puts the losses into a registry, "module.path:name", in the place of those that have their names there."""
    module, _, name = registry.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f"register() needs {module}, which cannot be imported: {error}") from error
    for loss in losses:
        found.register_module(name=loss.__name__, force=True, module=loss)
