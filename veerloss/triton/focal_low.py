"""Focal losses of logits of low resolution as Triton kernels (_focal_low_kernels.py): their operators. As focal.py, but that no
tensor of full resolution is made beside the target."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import Interpolation, Reduction
from ..ops import loss_dtype_of
from . import _tuning
from ._focal_low_kernels import (
    sigmoid_focal_low_backward_kernel,
    sigmoid_focal_low_forward_kernel,
    softmax_focal_low_backward_kernel,
    softmax_focal_low_forward_kernel,
)
from ._launch import as_bytes, check, next_power_of_2, opmath_t
from .focal import backward, common_options, forward

#: Classes of a softmax, at most: a block has all of them, and of each the gradients of a tile.
MOST_CLASSES = 128


def axis(low: int, full: int, mode: int) -> tuple[int, int, int, int, int]:
    """As UpsampleAxis::linear in csrc/math/upsample.h."""
    if mode == Interpolation.LINEAR_ALIGNED:
        return low, full, low - 1 if full > 1 else 0, 0, max(full - 1, 1)
    return low, full, 2 * low, low - full, 2 * full


def image_strides(t: Tensor, channels: bool) -> tuple[int, int, int]:
    """Of image, channel and pixel, of a tensor whose pixels are in order."""
    return t.stride(0), t.stride(1) if channels else 0, t.stride(-1) if t.size(-1) > 1 else t.stride(-2)


def in_order(t: Tensor) -> bool:
    return t.size(-1) == 1 or t.size(-2) == 1 or t.stride(-2) == t.size(-1) * t.stride(-1)


def launch(*, logits: Tensor, target: Tensor, upsample: int, channels: bool, block_c: int, **tensors: Tensor | None) -> dict:
    """The arguments that all kernels share. `channels`: of the target; `tensors`: of full resolution, with 4 dimensions if they
    have channels."""
    check(logits.dim() == 4 and logits.numel() > 0, "logits", logits, "[N, C, h, w] with at least one pixel")
    check(upsample in (Interpolation.LINEAR, Interpolation.LINEAR_ALIGNED), "logits", logits, "interpolated linearly")
    classes = logits.shape[:1] + logits.shape[1:2] if channels else logits.shape[:1]
    check(
        target.shape[:-2] == classes and target.device == logits.device and in_order(target), "target", target,
        f"{[*classes, 'H', 'W']} on {logits.device}, its pixels in order",
    )  # fmt: skip
    full = {"target": as_bytes(target), **{name: as_bytes(t) for name, t in tensors.items()}}
    for name, t in tensors.items():
        fits = t is None or t.dim() == 0 or (t.shape[-2:] == target.shape[-2:] and t.size(0) == logits.size(0) and in_order(t))
        check(fits, name, t if t is not None else logits, f"of the pixels of target {list(target.shape)}, in order")
    strides = {
        f"{name}_strides": (0, 0, 0) if t is None or t.dim() == 0 else image_strides(t, t.dim() == 4)
        for name, t in full.items()
    }
    elements, warps = _tuning.LOW_TILE, _tuning.LOW_WARPS
    if opmath_t(logits) == tl.float64:
        elements, warps = elements // 2, 2 * warps
    return {
        "logits": logits, "logits_strides": logits.stride(), **full, **strides, "classes": logits.size(1),
        "x_axis": axis(logits.size(3), target.size(-1), upsample), "y_axis": axis(logits.size(2), target.size(-2), upsample),
        "T": opmath_t(logits), "BLOCK_C": block_c, "BLOCK_P": max(elements // block_c, 16), "num_warps": warps,
    }  # fmt: skip


def runs(arguments: dict) -> int:
    """Of a forward pass: how many there are in all rows."""
    target = arguments["target"]
    return arguments["logits"].size(0) * target.size(-2) * triton.cdiv(target.size(-1), arguments["BLOCK_P"])


def tiles(arguments: dict) -> tuple[int, dict]:
    """Of a backward pass: how many there are, and the arguments that tell of them and of the output."""
    logits = arguments["logits"]
    side = 8 if arguments["BLOCK_C"] <= _tuning.LOW_TILE // 64 else 4
    out = torch.empty_like(logits)
    count = logits.size(0) * triton.cdiv(logits.size(2), side) * triton.cdiv(logits.size(3), side)
    return count, arguments | {"LOW_Y": side, "LOW_X": side, "out": out, "out_strides": out.stride()}


def sigmoid_arguments(*, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index, upsample, **others):
    """(the arguments of a kernel, tiles of classes)"""
    one_hot = target.dim() == 3
    block_c = min(next_power_of_2(logits.size(1)), _tuning.SIGMOID_MAX_CLASSES)
    class_tiles = triton.cdiv(logits.size(1), block_c)
    arguments = launch(
        logits=logits, target=target, upsample=upsample, channels=not one_hot, block_c=block_c, weight=weight, **others
    )
    return arguments | common_options(logits, class_alpha, gamma, ignore_index) | {
        "alpha": alpha or 0.0, "background_index": background_index, "HAS_ALPHA": alpha is not None, "ONE_HOT": one_hot,
        "class_tiles": class_tiles,
    }, class_tiles  # fmt: skip


def softmax_arguments(*, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, upsample, **others):
    check(label_smoothing == 0 and target.dim() == 3, "target", target, "class indices [N, H, W], without label smoothing")
    check(0 < logits.size(1) <= MOST_CLASSES, "logits", logits, f"of 1 to {MOST_CLASSES} classes")
    block_c = next_power_of_2(logits.size(1))
    arguments = launch(logits=logits, target=target, upsample=upsample, channels=False, block_c=block_c, **others)
    return arguments | common_options(logits, class_alpha, gamma, ignore_index) | {"alpha": alpha}


def sigmoid_focal_forward(*, logits, target, reduction, factor, normalizer, upcast_loss, **inputs) -> tuple[Tensor, Tensor]:
    each, dtype = reduction == Reduction.NONE, loss_dtype_of(logits, upcast_loss)
    loss = logits.new_empty((*logits.shape[:2], *target.shape[-2:]) if each else (), dtype=dtype)
    arguments, class_tiles = sigmoid_arguments(logits=logits, target=target, out=loss if each else None, **inputs)
    count = runs(arguments) * class_tiles
    return forward(sigmoid_focal_low_forward_kernel, count, arguments, loss, factor, normalizer, reduction)


def softmax_focal_forward(*, logits, target, reduction, factor, normalizer, upcast_loss, **inputs) -> tuple[Tensor, Tensor]:
    each, dtype = reduction == Reduction.NONE, loss_dtype_of(logits, upcast_loss)
    loss = logits.new_empty(target.shape if each else (), dtype=dtype)
    arguments = softmax_arguments(logits=logits, target=target, out=loss if each else None, **inputs)
    return forward(softmax_focal_low_forward_kernel, runs(arguments), arguments, loss, factor, normalizer, reduction)


def sigmoid_focal_backward(*, grad, logits, reduction, scale, **inputs) -> Tensor:
    arguments, class_tiles = sigmoid_arguments(logits=logits, grad=grad.contiguous(), **inputs)
    count, arguments = tiles(arguments)
    return backward(sigmoid_focal_low_backward_kernel, count * class_tiles, arguments, scale, reduction)


def softmax_focal_backward(*, grad, logits, reduction, scale, **inputs) -> Tensor:
    arguments = softmax_arguments(logits=logits, grad=grad.contiguous(), **inputs)
    count, arguments = tiles(arguments)
    return backward(softmax_focal_low_backward_kernel, count, arguments, scale, reduction)
