"""What kernels that read the logits share: addresses and loads; and of the Lovász losses the pixels of a tile, their errors and
their gradient.

A program of the Lovász losses has a tile of BLOCK_P pixels of one image and goes over its classes, BLOCK_C at a time: a tile of
values is [BLOCK_C, BLOCK_P]. Where one block holds all classes the loops over them have one round of constant bounds, and the
compiler finds what they read and compute in common. More classes are read again by each loop, from the cache.

n, c, p: indices of images, classes and pixels. Those of images and pixels have 64 bits, as offsets have.
"""

import triton
import triton.language as tl

from ._constants import HINGE, NONE, PROBABILITIES, SOFTMAX
from ._math import exp_neg, reciprocal


@triton.jit
def ptr_offset(strides, n, c, p):
    """In elements; `strides` of image, channel and pixel."""
    return n * strides[0] + tl.cast(c, tl.int64) * strides[1] + p * strides[2]


@triton.jit
def load_logits(logits, strides, n, c, p, inside, classes, T: tl.constexpr):
    """Logits or probabilities of classes c [BLOCK_C, 1] and pixels p [1, BLOCK_P]: 0 of pixels that are not `inside`, -inf
    beyond the last class."""
    value = tl.load(logits + ptr_offset(strides, n, c, p), mask=(c < classes) & inside, other=0.0).to(T)
    return tl.where(c < classes, value, float("-inf"))


# ---- Lovász losses: pixels and their labels

# Labels that are no class: of a pixel that does not count, of one whose target is nothing valid, and of one that is background
# to all classes.
IGNORED, BAD, BACKGROUND = tl.constexpr(-1), tl.constexpr(-2), tl.constexpr(0x7FFFFFFF)


@triton.jit
def pixels_of_tile(tile, pixels, image_tiles, BLOCK_P: tl.constexpr):
    """(image, pixels [BLOCK_P] of the tile, which of them the image has); an image has `pixels`, in `image_tiles`."""
    p = (tile % image_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (tile // image_tiles).to(tl.int64), p, p < pixels


@triton.jit
def load_labels(target, strides, n, p, inside, ignore_index, background_index, ERRORS: tl.constexpr, CLASSES: tl.constexpr):
    """Class indices, BACKGROUND, IGNORED or BAD, from targets of any type."""
    value = tl.load(target + ptr_offset(strides, n, 0, p), mask=inside, other=0)
    WIDE: tl.constexpr = tl.float64 if value.dtype.is_floating() else tl.int64
    value = value.to(WIDE)  # compared before it is narrowed
    classes: tl.constexpr = 2 if ERRORS == HINGE else CLASSES
    label = tl.where((value >= 0) & (value < classes), value, 0).to(tl.int32)
    label = tl.where(label == value, label, BAD)  # also for NaN and what is out of range
    if background_index is not None:
        label = tl.where(value == background_index, BACKGROUND, label)
    if ignore_index is not None:
        label = tl.where(value == ignore_index, IGNORED, label)
    return tl.where(inside, label, IGNORED)


# ---- Lovász losses: errors
#
# `values` of a tile are, of a softmax, exp(logit - max_logit); else the probabilities or logits themselves.


@triton.jit
def load_softmax(
    logits, strides, n, p, inside, T: tl.constexpr, ERRORS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`softmax` of every pixel: (max_logit, sumexp_excl_max, inv_sumexp), zeros where there is no softmax.

    sumexp_excl_max is the sum of the exponentials without one of the largest, which is 1 exactly: so 1 - p of a most probable
    class is sumexp_excl_max / (1 + sumexp_excl_max), where 1 - p would lose its digits. inv_sumexp = 1 / (1 + sumexp_excl_max).

    Added up in float64 and rounded once: the compiler lays out a tile, and so orders a sum, in each kernel as it likes, and all
    passes over a pixel have to come to the same error. (In float32 the p of 17% of the pixels of 19 classes differed.)
    """
    if ERRORS == SOFTMAX:
        max_logit = tl.full((BLOCK_P,), float("-inf"), T)
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            x = load_logits(logits, strides, n, c[:, None], p[None, :], inside[None, :], CLASSES, T)
            max_logit = tl.maximum(max_logit, tl.max(x, 0))
        others = tl.zeros((BLOCK_P,), tl.float64)
        ones = tl.zeros((BLOCK_P,), tl.int32)
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            x = load_logits(logits, strides, n, c[:, None], p[None, :], inside[None, :], CLASSES, T)
            exp = exp_neg(x - max_logit[None, :])
            others += tl.sum(tl.where(exp == 1.0, 0.0, exp).to(tl.float64), 0)
            ones += tl.sum((exp == 1.0).to(tl.int32), 0)
        sumexp_excl_max = (others + (ones - 1).to(tl.float64)).to(T)
        return max_logit, sumexp_excl_max, reciprocal(1.0 + sumexp_excl_max)
    else:
        zeros = tl.zeros((BLOCK_P,), T)
        return zeros, zeros, zeros


@triton.jit
def load_values(logits, strides, n, c, p, inside, softmax, T: tl.constexpr, ERRORS: tl.constexpr, CLASSES: tl.constexpr):
    """`values` of classes c [BLOCK_C] and pixels p [BLOCK_P]."""
    values = load_logits(logits, strides, n, c[:, None], p[None, :], inside[None, :], CLASSES, T)
    if ERRORS == SOFTMAX:
        max_logit, _sumexp_excl_max, _inv_sumexp = softmax
        values = exp_neg(values - max_logit[None, :])
    return values


@triton.jit
def is_foreground(label, c, ERRORS: tl.constexpr):
    """The one channel of a hinge, 0, is that of label 1. A bad label is foreground of every class: see _lovasz.py."""
    foreground_label = c + 1 if ERRORS == HINGE else c
    return (label == foreground_label) | (label == BAD)


@triton.jit
def error_and_complement(values, foreground, softmax, ERRORS: tl.constexpr):
    """Errors of a tile, and of a softmax 1 - error: each of p and 1 - p is known to all its digits."""
    if ERRORS == SOFTMAX:
        _max_logit, sumexp_excl_max, inv_sumexp = softmax
        p = values * inv_sumexp[None, :]
        not_p = tl.where(values == 1.0, (sumexp_excl_max * inv_sumexp)[None, :], 1.0 - p)
        error = tl.where(foreground, not_p, p)
        complement = tl.where(foreground, p, not_p)
    elif ERRORS == PROBABILITIES:
        error = tl.abs(tl.where(foreground, 1.0 - values, values))
        complement = error
    else:
        margin = 1.0 - tl.where(foreground, values, -values)
        error = tl.where(margin <= 0.0, 0.0, margin) + (values - values)  # an infinite logit: NaN
        complement = error
    return error, complement


# ---- Lovász losses: the gradient, as in csrc/cpu/lovasz; g = dL/dp, or of a hinge dL/d(logit)


@triton.jit
def segment_factor(grad, scale, segment, used, T: tl.constexpr, REDUCTION: tl.constexpr):
    """d loss / d (loss of the segment), from the gradient of the loss."""
    OF_EACH: tl.constexpr = 1 if REDUCTION == NONE else 0
    incoming = tl.load(grad + segment * OF_EACH, mask=used, other=0.0).to(T)
    return tl.load(scale + segment, mask=used, other=0.0) * incoming


@triton.jit
def sign_outside(p, weight):
    """Weights are signed as for probabilities inside (0, 1). The error |y - p| of one outside may slope the other way, and at
    y = p its slope counts as 0."""
    outside = tl.where(p < 0.0, -tl.abs(weight), tl.where(p > 1.0, tl.abs(weight), weight))
    exact = ((p == 0.0) & (weight > 0.0)) | ((p == 1.0) & (weight < 0.0))
    return tl.where(exact, 0.0, outside)


@triton.jit
def accumulate_gradient(exp, g, c, pivot, others, weighted):
    """The gradient of the logits is p_j (g_j - sum_c p_c g_c). The g of a most probable class is the pivot: taken relative to
    it, the sum has no large term that cancels; of confident pixels float32 would otherwise keep no digit. A pivot that a later
    class displaces joins the others; at first it is 0. The sum of a block needs no float64, `others` does if there are many."""
    last = tl.max(tl.where(exp == 1.0, c[:, None], -1), 0)
    is_pivot = c[:, None] == last[None, :]
    others += (tl.sum(tl.where(is_pivot, 0.0, exp * g), 0) + tl.where(last >= 0, pivot, 0.0)).to(others.dtype)
    pivot = tl.where(last >= 0, tl.sum(tl.where(is_pivot, g, 0.0), 0), pivot)
    return pivot, others, weighted | tl.max((g != 0.0).to(tl.int32), 0)


@triton.jit
def mean_gradient(softmax, pivot, others):
    """sum_c p_c (g_c - pivot), after accumulate_gradient of all classes."""
    _max_logit, sumexp_excl_max, inv_sumexp = softmax
    return (others.to(pivot.dtype) - pivot * sumexp_excl_max) * inv_sumexp


@triton.jit
def softmax_gradient(exp, g, softmax, pivot, mean, weighted):
    """Where all g are 0 so is the gradient: an ignored pixel may hold NaN."""
    _max_logit, _sumexp_excl_max, inv_sumexp = softmax
    slope = exp * inv_sumexp[None, :] * ((g - pivot[None, :]) - mean[None, :])
    return tl.where(weighted[None, :] != 0, slope, 0.0)
