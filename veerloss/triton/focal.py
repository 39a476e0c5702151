"""Focal losses as Triton kernels (_focal_kernels.py): their operators.

Forward is two launches: tiles, of which each program adds its own into a float64 partial sum, and one program that adds the
partial sums in order. Backward is one launch. Nothing is kept but the inputs, nothing waits for the host, and no atomics: the
same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import opmath_dtype
from .._layout import Reduction
from ..ops import loss_dtype_of
from . import _tuning
from ._focal_kernels import (
    focal_loss_kernel,
    sigmoid_focal_backward_kernel,
    sigmoid_focal_forward_kernel,
    softmax_focal_backward_kernel,
    softmax_focal_forward_kernel,
)
from ._launch import as_bytes, check, check_data, check_like, check_logits, next_power_of_2, on_device, opmath_t, strides


def as_one_image(**tensors: Tensor | None) -> tuple[int, int, dict[str, tuple[int, int, int]]]:
    """(images, pixels, strides of each tensor). All pixels are one image where every tensor has them in one row: channels_last,
    one image, one pixel in each."""
    images, _, pixels = tensors["logits"].shape
    views = {f"{name}_strides": (0, 0, 0) if t is None or t.dim() == 0 else strides(t) for name, t in tensors.items()}
    if pixels == 1:
        return 1, images, {name: (0, c, n) for name, (n, c, _) in views.items()}
    if images == 1 or all(n == p * pixels for n, _, p in views.values()):
        return 1, images * pixels, {name: (0, c, p) for name, (_, c, p) in views.items()}
    return images, pixels, views


def tiled(elements: int, max_classes: int, min_pixels: int, **tensors: Tensor | None) -> tuple[int, dict]:
    """The tensors in tiles of about so many elements: all classes where these are contiguous; else at most `max_classes`, for
    runs of at least `min_pixels`. (tiles of pixels, the arguments of a kernel that tell of them)"""
    logits = tensors["logits"]
    classes = logits.shape[1]
    images, pixels, views = as_one_image(**tensors)
    _, class_stride, pixel_stride = views["logits_strides"]
    if class_stride == 1 and pixel_stride != 1:
        max_classes, min_pixels = elements, 1
    block_c = min(next_power_of_2(classes), max_classes)
    block_p = min(next_power_of_2(pixels), max(elements // block_c, min_pixels))
    return images * triton.cdiv(pixels, block_p), {
        **tensors, **views, "classes": classes, "pixels": pixels, "T": opmath_t(logits),
        "BLOCK_C": block_c, "BLOCK_P": block_p,
    }  # fmt: skip


def common_options(logits: Tensor, class_alpha: Tensor | None, gamma: float, ignore_index: int | None) -> dict:
    check_data("class_alpha", class_alpha, logits, logits.shape[1:2], opmath_dtype(logits))
    return {
        "class_alpha": class_alpha, "gamma": gamma, "ignore_index": ignore_index,
        "FOCUS": int(gamma) if gamma in (0.0, 2.0) else None,
    }  # fmt: skip


def sigmoid_launch(
    *, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index, **others: Tensor | None
) -> tuple[int, dict]:
    """(tiles, arguments of a kernel); `others` are the gradient and the output."""
    check_logits(logits)
    one_hot = target.dim() == 2
    check_like("target", target, logits, channels=not one_hot)
    if weight is not None:
        check_like("weight", weight, logits, channels=True)
    tiles, arguments = tiled(
        _tuning.SIGMOID_TILE if opmath_t(logits) == tl.float32 else _tuning.SIGMOID_TILE // 2, _tuning.SIGMOID_MAX_CLASSES, 1,
        logits=logits, target=as_bytes(target), weight=as_bytes(weight), **others,
    )  # fmt: skip
    class_tiles = triton.cdiv(logits.shape[1], arguments["BLOCK_C"])
    return tiles * class_tiles, {
        **arguments, **common_options(logits, class_alpha, gamma, ignore_index), "alpha": alpha or 0.0,
        "background_index": background_index, "HAS_ALPHA": alpha is not None, "ONE_HOT": one_hot, "class_tiles": class_tiles,
        "num_warps": _tuning.SIGMOID_WARPS,
    }  # fmt: skip


def softmax_launch(
    *, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, **others: Tensor | None
) -> tuple[int, dict]:
    """As sigmoid_launch."""
    check_logits(logits)
    check(logits.shape[1] > 0, "logits", logits, "[N, C, P] with at least one class")
    probabilities = target.dim() == 3
    check_like("target", target, logits, channels=probabilities)
    soft = probabilities or label_smoothing > 0
    elements, max_classes, narrower = _tuning.SOFTMAX_TILE, _tuning.SOFTMAX_MAX_CLASSES, 4 if soft else 1
    if opmath_t(logits) == tl.float64:
        elements, max_classes, narrower = elements // 2, _tuning.SOFTMAX_MAX_CLASSES_F64, 4 * narrower
    classes = logits.shape[1]
    tiles, arguments = tiled(
        elements, max_classes if classes <= max_classes else _tuning.SOFTMAX_BLOCK_CLASSES, _tuning.SOFTMAX_MIN_PIXELS,
        logits=logits, target=as_bytes(target), **others,
    )  # fmt: skip
    block_c, block_p = arguments["BLOCK_C"], arguments["BLOCK_P"]
    warps = max(block_c * block_p * narrower // _tuning.SOFTMAX_WARP, block_p * narrower // _tuning.SOFTMAX_WARP_PIXELS)
    return tiles, {
        **arguments, **common_options(logits, class_alpha, gamma, ignore_index), "alpha": alpha, "smoothing": label_smoothing,
        "SOFT": soft, "PROBABILITIES": probabilities,
        "BLOCKS": triton.cdiv(classes, block_c), "num_warps": min(max(warps, 1), 8),
    }  # fmt: skip


def forward(
    kernel, tiles: int, arguments: dict, loss: Tensor, factor: float, normalizer: Tensor | None, reduction: int
) -> tuple[Tensor, Tensor]:
    """(loss, scale); `loss` takes the sum, or without reduction it is the kernel's `out`."""
    logits = arguments["logits"]
    if normalizer is not None:
        check(normalizer.numel() == 1 and normalizer.device == logits.device, "normalizer", normalizer, "one element")
    with on_device(logits):
        if reduction == Reduction.NONE:
            if tiles > 0:
                kernel[(tiles,)](**arguments, tiles=tiles, partials=None)
            return loss, logits.new_full((), factor, dtype=opmath_dtype(logits))
        programs = min(tiles, _tuning.MAX_PROGRAMS)
        partials = logits.new_empty((2, programs), dtype=torch.float64)
        if programs > 0:
            kernel[(programs,)](**arguments, tiles=tiles, partials=partials)
        scale = logits.new_empty((), dtype=opmath_dtype(logits))
        focal_loss_kernel[(1,)](
            partials=partials, programs=programs, normalizer=as_bytes(normalizer), factor=factor, loss=loss, scale=scale,
            MEAN=reduction == Reduction.MEAN, BLOCK=_tuning.PARTIALS_STEP,
        )  # fmt: skip
    return loss, scale


def backward(kernel, tiles: int, arguments: dict, scale: Tensor, reduction: int) -> Tensor:
    logits = arguments["logits"]
    check(scale.numel() == 1 and scale.device == logits.device, "scale", scale, "the scale of the forward pass")
    if tiles > 0:
        with on_device(logits):
            kernel[(tiles,)](**arguments, scale=None if reduction == Reduction.NONE else scale)
    return arguments["out"]


def check_grad(grad: Tensor, logits: Tensor, reduction: int, *, channels: bool) -> None:
    if reduction == Reduction.NONE:
        check_like("grad", grad, logits, channels=channels)
    else:
        check(grad.dim() == 0 and grad.device == logits.device, "grad", grad, "[], as the loss")


def sigmoid_focal_forward(*, logits, reduction, factor, normalizer, upcast_loss, **inputs) -> tuple[Tensor, Tensor]:
    dtype = loss_dtype_of(logits, upcast_loss)
    if reduction != Reduction.NONE:
        loss = logits.new_empty((), dtype=dtype)
    else:
        loss = logits.new_empty(logits.shape, dtype=dtype) if upcast_loss else torch.empty_like(logits)
    launch = sigmoid_launch(logits=logits, out=loss if reduction == Reduction.NONE else None, **inputs)
    return forward(sigmoid_focal_forward_kernel, *launch, loss, factor, normalizer, reduction)


def sigmoid_focal_backward(*, grad, logits, reduction, scale, **inputs) -> Tensor:
    check_grad(grad, logits, reduction, channels=True)
    launch = sigmoid_launch(logits=logits, grad=grad, out=torch.empty_like(logits), **inputs)
    return backward(sigmoid_focal_backward_kernel, *launch, scale, reduction)


def softmax_focal_forward(*, logits, reduction, factor, normalizer, upcast_loss, **inputs) -> tuple[Tensor, Tensor]:
    shape = (logits.size(0), logits.size(-1)) if reduction == Reduction.NONE else ()
    loss = logits.new_empty(shape, dtype=loss_dtype_of(logits, upcast_loss))
    launch = softmax_launch(logits=logits, out=loss if reduction == Reduction.NONE else None, **inputs)
    return forward(softmax_focal_forward_kernel, *launch, loss, factor, normalizer, reduction)


def softmax_focal_backward(*, grad, logits, reduction, scale, **inputs) -> Tensor:
    check_grad(grad, logits, reduction, channels=False)
    launch = softmax_launch(logits=logits, grad=grad, out=torch.empty_like(logits), **inputs)
    return backward(softmax_focal_backward_kernel, *launch, scale, reduction)
