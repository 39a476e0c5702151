"""What Berman's file and its descendants have in common: they flatten, and compare no shapes before; the loss of half-precision
logits is float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..lovasz import lovasz_hinge_loss, lovasz_softmax_loss
from ._focal import float32_loss


def hinge(logits: Tensor, target: Tensor, per_image: bool, ignore_index: float | None) -> Tensor:
    """Lovász hinge of logits of any shape, all channels of an image one segment; points [P] are one image."""
    per_image = bool(per_image) and logits.dim() > 1
    target, ignore_index = integer_ignored(target, ignore_index)
    target = in_shape(target, logits.shape, per_image, ignore_index)
    with float32_loss(logits):
        return lovasz_hinge_loss(logits, target, per_image=per_image, ignore_index=ignore_index)


def softmax(logits: Tensor, target: Tensor, per_image: bool, ignore_index: float | None, **options) -> Tensor:
    """Lovász-Softmax of logits [N, C, *] and class indices of as many pixels, of any type; points [P, C] are one image."""
    one_class = logits.dim() < 2 or logits.size(1) == 1
    if one_class or (logits.dim() == 3 and target.shape == logits.shape):
        raise ValueError(
            f"multiclass logits must have the shape [N, C, *] with C > 1, got {list(logits.shape)} for a target "
            f"{list(target.shape)}; one logit per pixel is for the binary loss"
        )
    per_image = bool(per_image) and logits.dim() > 2
    target, ignore_index = integer_ignored(target, ignore_index)
    target = in_shape(target, logits.shape[:1] + logits.shape[2:], per_image, ignore_index)
    target = target if target.dtype in _INDEX_TYPES else target.long()
    with float32_loss(logits):
        return lovasz_softmax_loss(logits, target, per_image=per_image, ignore_index=ignore_index, **options)


_INDEX_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def in_shape(target: Tensor, shape: torch.Size, per_image: bool, ignore_index: int | None) -> Tensor:
    """A target of as many elements in another shape, which the peers take too; the error that they end in for any other."""
    if target.numel() != math.prod(shape) or (per_image and target.shape[:1] != shape[:1]):
        error = RuntimeError if ignore_index is None else IndexError  # of a subtraction there, and of a mask
        raise error(f"the target must have as many elements as the shape {list(shape)}, got {list(target.shape)}")
    return target.reshape(shape)


def integer_ignored(target: Tensor, ignore_index: float | None) -> tuple[Tensor, int | None]:
    """An ignore_index may be 255.0, and of a target of a float type 0.5."""
    if not isinstance(ignore_index, float):
        return target, ignore_index
    if ignore_index.is_integer():
        return target, int(ignore_index)
    return target.masked_fill(target == ignore_index, -1), -1
