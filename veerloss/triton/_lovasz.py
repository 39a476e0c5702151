"""What the kernels of the Lovász losses share: the logits and the target of a call in tiles, and the loss of a batch from
those of its segments.

A segment is one class over the pixels of the batch, or of an image with per_image; tensors of one value per segment are
[rows, C]. A target that is neither a class nor ignored makes the loss NaN: its pixel counts as foreground of every class, so
that the segment takes part whatever the options are, with an error that is none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import opmath_dtype, per_segment_shape
from .._layout import Errors, Reduction
from ..ops import loss_dtype_of
from . import _tuning
from ._constants import MEAN, NONE
from ._launch import as_bytes, check, check_data, check_like, check_logits, next_power_of_2, on_device, opmath_t, strides

#: A pixel's index takes 31 bits.
MAX_SEGMENT = 2**31


class Tiles:
    """The logits of a call in tiles, each for one of `programs`. Images of one pixel fold into one image of many, unless each
    is a segment of its own."""

    def __init__(self, logits: Tensor, errors: int, per_image: bool) -> None:
        check_logits(logits)
        n, c, p = logits.shape
        check(errors != Errors.HINGE or c == 1, "logits", logits, "[N, 1, P] for a hinge")
        self.rows, self.length = (n, p) if per_image else (1, n * p)
        expected = "of less than 2^31 pixels in a segment (the batch, or an image with per_image)"
        check(self.length < MAX_SEGMENT, "logits", logits, expected)
        self.logits, self.errors, self.per_image = logits, errors, per_image
        self.fold = p == 1 and not per_image
        x = self.folded(logits)
        images, _, pixels = x.shape
        block_c = min(next_power_of_2(c), _tuning.LOVASZ_MAX_CLASSES)
        max_pixels = min(_tuning.LOVASZ_TILE // block_c, _tuning.LOVASZ_MAX_PIXELS)
        block_p = min(max_pixels, max(next_power_of_2(pixels), _tuning.LOVASZ_MIN_PIXELS))
        image_tiles = triton.cdiv(pixels, block_p)
        self.programs = images * image_tiles if c > 0 else 0
        #: Of every kernel that reads the logits.
        self.arguments = {
            "logits": x, "logits_strides": strides(x), "pixels": pixels, "image_tiles": image_tiles, "T": opmath_t(logits),
            "ERRORS": errors, "CLASSES": c, "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": _tuning.LOVASZ_WARPS,
        }  # fmt: skip

    def folded(self, t: Tensor) -> Tensor:
        return t.transpose(0, -1) if self.fold else t

    def target(self, target: Tensor, ignore_index: int | None, background_index: int | None) -> dict:
        """Arguments of a kernel that reads the target."""
        check_like("target", target, self.logits, channels=False)
        y = self.folded(as_bytes(target))
        ignored = {"ignore_index": ignore_index, "background_index": background_index}
        return {"target": y, "target_strides": strides(y), **ignored}

    def gradient(self, grad: Tensor, scale: Tensor, reduction: int) -> tuple[Tensor, dict]:
        """The gradient of the logits, to be written, and arguments of the kernel that writes it."""
        shape = per_segment_shape(self.logits, self.errors, self.per_image)
        check_data("scale", scale, self.logits, shape, opmath_dtype(self.logits))
        grad_shape = shape if reduction == Reduction.NONE else ()
        fits = grad.numel() == math.prod(grad_shape) and grad.device == self.logits.device
        check(fits, "grad", grad, f"{list(grad_shape)}, as the loss")
        grad_logits = torch.empty_like(self.logits)
        out = self.folded(grad_logits)
        return grad_logits, {
            "grad": grad.contiguous(), "scale": scale, "out": out, "out_strides": strides(out), "REDUCTION": reduction,
        }  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def reduce_segments_kernel(
    losses, takes_part, class_weight, scale, values, rows, CLASSES: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of segments: scale = d loss / d (loss of the segment), and its values in the loss, in `values`: one for each
    class, or without `NONE` their sum."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, CLASSES, BLOCK):
        c = first + tl.arange(0, BLOCK)
        count += tl.load(takes_part + row * CLASSES + c, mask=c < CLASSES, other=0).to(tl.int32)
    in_mean = tl.sum(count).to(tl.float64) * rows
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, CLASSES, BLOCK):
        c = first + tl.arange(0, BLOCK)
        part = tl.load(takes_part + row * CLASSES + c, mask=c < CLASSES, other=0) != 0
        factor = tl.where(part, 1.0, 0.0).to(tl.float64)
        if class_weight is not None:
            factor *= tl.load(class_weight + c, mask=part, other=0.0).to(tl.float64)
        if REDUCTION == MEAN:
            factor /= tl.maximum(in_mean, 1.0)
        value = factor * tl.load(losses + row * CLASSES + c, mask=part, other=0.0)
        tl.store(scale + row * CLASSES + c, factor, mask=c < CLASSES)
        if REDUCTION == NONE:
            tl.store(values + row * CLASSES + c, value, mask=c < CLASSES)
        total += value
    if REDUCTION != NONE:
        tl.store(values + row, tl.sum(total))


def reduce_segments(
    logits: Tensor, losses: Tensor, takes_part: Tensor, class_weight: Tensor | None, errors: int, per_image: bool,
    reduction: int, upcast_loss: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, scale) from the losses of the segments [rows, C], float64, and which take part."""
    rows, classes = losses.shape
    dtype = opmath_dtype(logits)
    check_data("class_weight", class_weight, logits, (classes,), dtype)
    shape = per_segment_shape(logits, errors, per_image)
    values = losses.new_zeros(losses.shape if reduction == Reduction.NONE else (rows,))
    scale = logits.new_zeros(shape, dtype=dtype)
    if losses.numel() > 0:
        with on_device(logits):
            reduce_segments_kernel[(rows,)](
                losses=losses, takes_part=takes_part, class_weight=class_weight, scale=scale, values=values, rows=rows,
                CLASSES=classes, REDUCTION=reduction, BLOCK=min(next_power_of_2(classes), _tuning.REDUCE_STEP),
                num_warps=_tuning.REDUCE_WARPS,
            )  # fmt: skip
    loss = values.reshape(shape) if reduction == Reduction.NONE else values.sum()
    return loss.to(loss_dtype_of(logits, upcast_loss)), scale
