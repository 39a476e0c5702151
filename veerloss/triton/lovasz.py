"""Lovász losses as Triton kernels, for GPUs without the compiled library: method "exact", and what both methods share.

The operators are those of ops.py, under the same names; those of method "histogram" are in histogram.py. Formulas have the
names of csrc/jaccard.h, which explains them. Nothing here waits for the GPU, and results have the same bits in every run.

Exact: keys (logits to integers in the order of the errors), torch.sort, rank (how much foreground is in each tile of the sorted
pixels), weigh (ranks to weights, back to the pixels' places, and the sums of the loss). Backward: one pass over the logits.

A target that is neither a class nor ignored makes the loss NaN: its pixel counts as foreground of every class, so that the
segment takes part whatever the options are, with an error that is none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import arithmetic_dtype
from ._launch import arithmetic, as_bytes, next_power_of_2, on_device
from ._math import exp_neg

# As ``Errors`` in csrc/jaccard.h, and labels that are no class.
SOFTMAX, PROBABILITIES, HINGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
IGNORED, BAD = tl.constexpr(-1), tl.constexpr(-2)
#: As ``Reduction`` in csrc/tensor.h.
NONE, MEAN = tl.constexpr(0), tl.constexpr(1)
#: A sample of every image: runs of 64 pixels, 1031 from one to the next. As in csrc/bins.h.
SAMPLE_RUN, SAMPLE_STEP = tl.constexpr(64), tl.constexpr(1031)

# Sizes that no GPU has measured: a tile of pixels and classes has 1024 values, 8 of them to a thread of four warps. With twice
# as many the look-ups of method "histogram" take all registers that a thread can have, with four times as many they spill.
TILE, MOST_CLASSES, MOST_PIXELS = 1024, 32, 512
#: Sorted pixels to a program.
RANKS = 1024


# ---- scalar maths


@triton.jit
def reciprocal(x):
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.div_rn(1.0, x)  # "/" is not rounded correctly in float32


@triton.jit
def jaccard_fg_weight(total, bg):
    return 1.0 / (total + bg).to(tl.float64)


@triton.jit
def jaccard_bg_weight(total, fg, bg):
    unions = (total + bg).to(tl.float64)
    return (total - fg).to(tl.float64) / (unions * (unions + 1.0))


@triton.jit
def key_bits(x):
    """The bits of |x|: integers of the same order."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def key_of_probability(error, complement):
    """The key of an error in [0, 1] from it and its complement: above 1/2, 1 - error has the digits."""
    one = 2 * key_bits(tl.full((), 0.5, error.dtype))
    return tl.where(error > 0.5, one - key_bits(complement), key_bits(error))


@triton.jit
def error_of_key(key, T: tl.constexpr, PROBABILITY: tl.constexpr):
    """In float64; `PROBABILITY` for keys of key_of_probability."""
    if PROBABILITY:
        half = key_bits(tl.full((), 0.5, T))
        part = tl.where(key > half, 2 * half - key, key).to(T, bitcast=True).to(tl.float64)
        return tl.where(key > half, 1.0 - part, part)
    else:
        return key.to(T, bitcast=True).to(tl.float64)


# ---- tiles: what kernels that read the logits have in common
#
# A program has a tile of BLOCK_P pixels of one image and goes over its classes, BLOCK_C at a time. A tile of values is
# [BLOCK_C, BLOCK_P]. Where one block holds all classes the loops over them have one round of constant bounds, and the compiler
# finds what they read and compute in common. More classes are read again for each loop, from the cache; exponentials of a
# maximum known beforehand are the same whatever the blocks.


@triton.jit
def pixels_of_tile(tile, pixels, tiles, SAMPLED: tl.constexpr, BLOCK_P: tl.constexpr):
    """(image, its pixels in the tile, which of them there are); `tiles` to an image."""
    slot = (tile % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    pixel = slot
    if SAMPLED:
        pixel = slot // SAMPLE_RUN * SAMPLE_STEP + slot % SAMPLE_RUN
    return (tile // tiles).to(tl.int64), pixel, pixel < pixels


@triton.jit
def load_labels(target, offset, inside, ignore, classes, HAS_IGNORE: tl.constexpr):
    """Class indices, IGNORED or BAD, from targets of any type."""
    value = tl.load(target + offset, mask=inside, other=0)
    wide: tl.constexpr = tl.float64 if value.dtype.is_floating() else tl.int64
    value = value.to(wide)  # compared before it is narrowed
    label = tl.where((value >= 0) & (value < classes), value, 0).to(tl.int32)
    label = tl.where(label == value, label, BAD)  # also for NaN and what is out of range
    if HAS_IGNORE:
        label = tl.where(value == ignore, IGNORED, label)
    return tl.where(inside, label, IGNORED)


@triton.jit
def load_values(x, offset, inside, c, classes: tl.constexpr, stride_c, T: tl.constexpr):
    """The logits or probabilities of classes c, -inf past the last class."""
    there = (c < classes)[:, None]
    value = tl.load(x + offset[None, :] + c.to(tl.int64)[:, None] * stride_c, mask=there & inside[None, :], other=0.0)
    return tl.where(there, value.to(T), float("-inf"))


@triton.jit
def softmax_sums(
    x, offset, inside, stride_c, T: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """(maximum, rest, inverse_sum) of every pixel. rest is the sum of the exponentials without one of the largest, which is 1
    exactly: so 1 - p of a most probable class is rest / (1 + rest), where 1 - p would lose its digits.

    Added up in float64 and rounded once: the compiler lays out a tile, and so orders a sum, in each kernel as it likes, and all
    passes over a pixel have to come to the same error. (In float32 the p of 17% of the pixels of 19 classes differed.)
    """
    maximum = tl.full((BLOCK_P,), float("-inf"), T)
    for first in range(0, CLASSES, BLOCK_C):
        value = load_values(x, offset, inside, first + tl.arange(0, BLOCK_C), CLASSES, stride_c, T)
        maximum = tl.maximum(maximum, tl.max(value, 0))
    others = tl.zeros((BLOCK_P,), tl.float64)
    tops = tl.zeros((BLOCK_P,), tl.int32)
    for first in range(0, CLASSES, BLOCK_C):
        value = load_values(x, offset, inside, first + tl.arange(0, BLOCK_C), CLASSES, stride_c, T)
        e = exp_neg(value - maximum[None, :])
        others += tl.sum(tl.where(e == 1.0, 0.0, e).to(tl.float64), 0)
        tops += tl.sum((e == 1.0).to(tl.int32), 0)
    rest = (others + (tops - 1).to(tl.float64)).to(T)
    return maximum, rest, reciprocal(1.0 + rest)


@triton.jit
def load_pixels(
    x, offset, inside, stride_c, T: tl.constexpr, ERRORS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """softmax_sums, where there is a softmax."""
    if ERRORS == SOFTMAX:
        maximum, rest, inverse_sum = softmax_sums(x, offset, inside, stride_c, T, CLASSES, BLOCK_C, BLOCK_P)
    else:
        maximum = tl.zeros((BLOCK_P,), T)
        rest = maximum
        inverse_sum = maximum
    return maximum, rest, inverse_sum


@triton.jit
def load_tile(x, offset, inside, c, classes: tl.constexpr, stride_c, maximum, T: tl.constexpr, ERRORS: tl.constexpr):
    """Softmax's exponentials, or the values themselves."""
    value = load_values(x, offset, inside, c, classes, stride_c, T)
    if ERRORS == SOFTMAX:
        value = exp_neg(value - maximum[None, :])
    return value


@triton.jit
def is_foreground(label, c, ERRORS: tl.constexpr):
    """[BLOCK_C, BLOCK_P]; a hinge has the one channel 0, of label 1."""
    own = c + 1 if ERRORS == HINGE else c
    return (label[None, :] == own[:, None]) | (label == BAD)[None, :]


@triton.jit
def error_and_complement(x, foreground, rest, inverse_sum, ERRORS: tl.constexpr):
    """Errors of a tile, and of a softmax 1 - error: each of p and 1 - p is known to all its digits."""
    if ERRORS == SOFTMAX:
        p = x * inverse_sum[None, :]
        not_p = tl.where(x == 1.0, (rest * inverse_sum)[None, :], 1.0 - p)
        error = tl.where(foreground, not_p, p)
        complement = tl.where(foreground, p, not_p)
    elif ERRORS == PROBABILITIES:
        error = tl.abs(tl.where(foreground, 1.0 - x, x))
        complement = error
    else:
        margin = 1.0 - tl.where(foreground, x, -x)
        error = tl.where(margin <= 0.0, 0.0, margin) + (x - x)  # an infinite logit: NaN
        complement = error
    return error, complement


# ---- the gradient of a tile: see csrc/cpu/lovasz_tiles.h


@triton.jit
def segment_factor(grad, scale, segment, used, T: tl.constexpr, REDUCTION: tl.constexpr):
    """d loss / d (loss of the segment), from the gradient of the loss."""
    of_each: tl.constexpr = 1 if REDUCTION == NONE else 0
    incoming = tl.load(grad + segment * of_each, mask=used, other=0.0).to(T)
    return tl.load(scale + segment, mask=used, other=0.0) * incoming


@triton.jit
def sign_outside(p, weight):
    """Weights are signed as for probabilities inside (0, 1). The error |y - p| of one outside may slope the other way, and one
    that is right exactly has no slope."""
    outside = tl.where(p < 0.0, -tl.abs(weight), tl.where(p > 1.0, tl.abs(weight), weight))
    right = ((p == 0.0) & (weight > 0.0)) | ((p == 1.0) & (weight < 0.0))
    return tl.where(right, 0.0, outside)


@triton.jit
def accumulate_gradient(x, g, c, pivot, others, weighted):
    """The gradient of the logits is p_j (g_j - sum_c p_c g_c), g = dL/dp. The g of a most probable class is the pivot: taken
    relative to it, the sum has no large term that cancels; of confident pixels float32 would otherwise keep no digit. A pivot
    that a later class displaces joins the others; at first it is 0."""
    last = tl.max(tl.where(x == 1.0, c[:, None], -1), 0)
    is_pivot = c[:, None] == last[None, :]
    others += tl.sum(tl.where(is_pivot, 0.0, x * g), 0) + tl.where(last >= 0, pivot, 0.0)
    pivot = tl.where(last >= 0, tl.sum(tl.where(is_pivot, g, 0.0), 0), pivot)
    return pivot, others, weighted | tl.max((g != 0.0).to(tl.int32), 0)


@triton.jit
def softmax_gradient(x, g, inverse_sum, pivot, mean, weighted):
    """`mean` is (others - pivot * rest) * inverse_sum. Where all g are 0 so is the gradient: an ignored pixel may hold NaN."""
    slope = x * inverse_sum[None, :] * ((g - pivot[None, :]) - mean[None, :])
    return tl.where(weighted[None, :] != 0, slope, 0.0)


# ---- exact: kernels


@triton.jit(do_not_specialize=["tiles", "flat", "ignore"])
def lovasz_keys_kernel(
    x, target, keys, labels, pixels, tiles, flat, x_n, x_c, x_p, y_n, y_p, ignore,
    T: tl.constexpr, ERRORS: tl.constexpr, HAS_IGNORE: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Logits to keys [C, N, P], the larger the error the larger: 0 of ignored pixels, else 1 and more, infinity and one where
    the error is NaN or infinite. And labels [N, P], from which all classes find their foreground again."""
    image, pixel, inside = pixels_of_tile(tl.program_id(0), pixels, tiles, False, BLOCK_P)
    label = load_labels(target, image * y_n + pixel * y_p, inside, ignore, 2 if ERRORS == HINGE else CLASSES, HAS_IGNORE)
    out = image * pixels + pixel
    tl.store(labels + out, label, mask=inside)
    offset = image * x_n + pixel * x_p
    maximum, rest, inverse_sum = load_pixels(x, offset, inside, x_c, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    infinity = key_bits(tl.full((), float("inf"), T))
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
        error, complement = error_and_complement(value, is_foreground(label, c, ERRORS), rest, inverse_sum, ERRORS)
        key = key_of_probability(error, complement) if ERRORS == SOFTMAX else key_bits(error)
        key = tl.where((label == BAD)[None, :], infinity, tl.minimum(key, infinity)) + 1
        key = tl.where((label == IGNORED)[None, :], 0, key)
        there = (c < CLASSES)[:, None] & inside[None, :]
        tl.store(keys + c.to(tl.int64)[:, None] * flat + out[None, :], key, mask=there)


@triton.jit(do_not_specialize=["tiles", "rows"])
def lovasz_rank_kernel(
    sorted_keys, order, labels, counts, length, tiles, rows, ERRORS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Marks the foreground among sorted keys in their lowest bit, the others moving up by one; and counts it in each tile. The
    bit has no part in the sort: equal errors rank in the order of their pixels."""
    tile, segment = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    key = tl.load(sorted_keys + segment * length + at, mask=inside, other=0)
    pixel = tl.load(order + segment * length + at, mask=inside, other=0)
    label = tl.load(labels + segment % rows * length + pixel, mask=inside, other=IGNORED)
    own = segment // rows + (1 if ERRORS == HINGE else 0)
    foreground = ((label == own) | (label == BAD)).to(tl.int32)
    tl.store(sorted_keys + segment * length + at, (key << 1) | foreground, mask=inside)
    tl.store(counts + segment * tiles + tile, tl.sum(foreground.to(tl.int64)))


@triton.jit(do_not_specialize=["tiles", "rows", "classes"])
def lovasz_weigh_kernel(
    marked, order, counted, selected, weights, partial, takes_part, length, tiles, rows, classes,
    T: tl.constexpr, ERRORS: tl.constexpr, PRESENT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorted keys to weights at the places of their pixels, and to the sum of weight times error of each tile.

    `counted`: the foreground up to the end of each tile. Weights are zero on entry: a program that has none but these,
    behind the last foreground pixel as most are, ends at once.
    """
    tile, segment = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    c, row = segment // rows, segment % rows
    total = tl.load(counted + segment * tiles + tiles - 1)
    before = tl.load(counted + segment * tiles + tile - 1, mask=tile > 0, other=0)
    infinity = key_bits(tl.full((), float("inf"), T))
    first = tl.load(marked + segment * length)
    largest = key_bits_of_marked(first)
    part = largest >= 0  # a valid pixel
    if PRESENT:
        part = part & (total > 0)
    if selected is not None:
        part = part & (tl.load(selected + c) != 0)
    tl.store(takes_part + row * classes + c, part.to(tl.int8), mask=tile == 0)

    loss = tl.zeros((), tl.float64)
    wrong = largest >= infinity
    if part & ((before < total) | wrong | ((total == 0) & (tile == 0))):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        word = tl.load(marked + segment * length + at, mask=inside, other=0)
        key = key_bits_of_marked(word)
        foreground = (word & 1).to(tl.int64)
        fg = before + tl.cumsum(foreground, 0) - foreground
        bg = at - fg
        some = tl.maximum(total, 1)
        weight = tl.where(foreground == 1, jaccard_fg_weight(some, bg), jaccard_bg_weight(some, fg, bg))
        # Without foreground the first of the largest errors has it all.
        weight = tl.where(total == 0, tl.where(at == 0, 1.0, 0.0), weight)
        error = error_of_key(tl.maximum(key, 0), T, ERRORS == SOFTMAX)
        # Errors of 0 change no other weight, and their slope is 0 as that of relu is.
        weight = tl.where(key > 0, weight, 0.0)
        loss = tl.sum(tl.where(key > 0, weight * error, 0.0))
        if KEEP:
            weight = tl.where(wrong & (key >= 0), float("nan"), weight)
            pixel = tl.load(order + segment * length + at, mask=inside, other=0)
            signed = tl.where(foreground == 1, -weight, weight).to(T)
            tl.store(weights + segment * length + pixel, signed, mask=inside & (weight != 0.0))
    loss = tl.where(part & wrong, float("nan"), loss)
    tl.store(partial + (row * classes + c) * tiles + tile, loss)


@triton.jit
def key_bits_of_marked(word):
    """The error's key, -1 of an ignored pixel, from what lovasz_rank_kernel makes of it."""
    if word.dtype == tl.int64:
        return ((word >> 1) & 0x7FFFFFFFFFFFFFFF) - 1
    else:
        return ((word >> 1) & 0x7FFFFFFF) - 1


@triton.jit(do_not_specialize=["tiles", "flat"])
def lovasz_backward_kernel(
    grad, x, weights, scale, out, pixels, tiles, flat, x_n, x_c, x_p, out_n, out_c, out_p,
    T: tl.constexpr, ERRORS: tl.constexpr, PER_IMAGE: tl.constexpr, REDUCTION: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits or probabilities from the signed weights [C, N, P]."""
    image, pixel, inside = pixels_of_tile(tl.program_id(0), pixels, tiles, False, BLOCK_P)
    row = image if PER_IMAGE else image * 0
    offset, at = image * x_n + pixel * x_p, image * pixels + pixel
    maximum, rest, inverse_sum = load_pixels(x, offset, inside, x_c, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    pivot = tl.zeros((BLOCK_P,), T)
    others = tl.zeros((BLOCK_P,), T)
    weighted = tl.zeros((BLOCK_P,), tl.int32)
    if ERRORS == SOFTMAX:
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
            there = used[:, None] & inside[None, :]
            g = tl.load(weights + c.to(tl.int64)[:, None] * flat + at[None, :], mask=there, other=0.0)
            g *= segment_factor(grad, scale, row * CLASSES + c, used, T, REDUCTION)[:, None]
            pivot, others, weighted = accumulate_gradient(value, g, c, pivot, others, weighted)
    mean = (others - pivot * rest) * inverse_sum
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        there = used[:, None] & inside[None, :]
        g = tl.load(weights + c.to(tl.int64)[:, None] * flat + at[None, :], mask=there, other=0.0)
        if ERRORS == PROBABILITIES:  # by the weight's sign: before the factor's
            g = sign_outside(load_values(x, offset, inside, c, CLASSES, x_c, T), g)
        g *= segment_factor(grad, scale, row * CLASSES + c, used, T, REDUCTION)[:, None]
        if ERRORS == SOFTMAX:
            value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
            g = softmax_gradient(value, g, inverse_sum, pivot, mean, weighted)
        to = image * out_n + pixel * out_p
        tl.store(out + to[None, :] + c.to(tl.int64)[:, None] * out_c, g, mask=there)


# ---- both methods: the loss of a batch from those of its segments


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
    logits: Tensor, losses: Tensor, takes_part: Tensor, class_weight: Tensor | None, hinge: bool, per_image: bool,
    reduction: int, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, scale) from the losses of the segments [rows, classes], float64, and which take part."""
    rows, classes = losses.shape
    shape = losses.shape[0 if per_image else 1 : 1 if hinge else 2]
    dtype = arithmetic_dtype(logits)
    values = losses.new_zeros(losses.shape if reduction == NONE.value else (rows,))
    scale = logits.new_zeros(shape, dtype=dtype)
    if losses.numel() > 0:
        block = min(next_power_of_2(classes), 1024)
        reduce_segments_kernel[(rows,)](
            losses, takes_part, class_weight, scale, values, rows, classes, reduction, block, num_warps=1
        )
    loss = values.reshape(shape) if reduction == NONE.value else values.sum()
    return loss.to(dtype if wide else logits.dtype), scale


# ---- operators


class Tiles:
    """The logits and the target of a call, in tiles. Images of one pixel fold into one image of many, unless each is a segment
    of its own."""

    def __init__(self, logits: Tensor, target: Tensor | None, errors: int, per_image: bool, sampled: bool = False) -> None:
        n, c, p = logits.shape
        require(target is None or target.shape == (n, p), "a target [N, P] for logits [N, C, P]")
        require(errors != HINGE.value or c == 1, "logits [N, 1, P]")
        self.fold = p == 1 and not per_image
        self.x = self.folded(logits)
        self.images, self.classes, self.pixels = self.x.shape
        self.rows, self.length = (n, p) if per_image else (1, n * p)
        require(self.length < 2**31, "less than 2^31 pixels in a segment: in the batch, or an image with per_image")
        block_c = min(next_power_of_2(c), MOST_CLASSES)
        block_p = min(TILE // block_c, MOST_PIXELS, max(next_power_of_2(self.pixels), 16))
        slots = -(-self.pixels // SAMPLE_STEP.value) * SAMPLE_RUN.value if sampled else self.pixels
        self.tiles = -(-slots // block_p)
        self.programs = self.images * self.tiles if self.classes > 0 else 0
        self.empty = self.programs == 0
        if target is not None:
            self.y = self.folded(as_bytes(target))
        self.float = arithmetic(logits)
        self.constants = {
            "T": self.float, "ERRORS": errors, "CLASSES": c, "BLOCK_C": block_c, "BLOCK_P": block_p,
        }  # fmt: skip

    def folded(self, t: Tensor) -> Tensor:
        return t.transpose(0, -1) if self.fold else t


def require(condition: bool, expected: str) -> None:
    """The operators check what the public functions cannot get wrong: they can be called directly."""
    if not condition:
        raise ValueError(f"veerloss: expected {expected}")


def _forward(
    logits, target, errors, selected, present, per_image, class_weight, ignore_index, reduction, keep, wide
) -> tuple[Tensor, Tensor, Tensor]:
    t = Tiles(logits, target, errors, per_image)
    chosen = None if selected is None else as_bytes(selected)
    n, c, p = logits.shape
    dtype = arithmetic_dtype(logits)
    weights = logits.new_zeros((c, n, p) if keep and t.empty else (0,), dtype=dtype)
    losses = logits.new_zeros((t.rows, c), dtype=torch.float64)
    takes_part = logits.new_zeros((t.rows, c), dtype=torch.int8)
    if not t.empty:
        with on_device(logits):
            keys = logits.new_empty((c, t.rows, t.length), dtype=torch.int64 if dtype == torch.float64 else torch.int32)
            labels = logits.new_empty((n, p), dtype=torch.int32)
            lovasz_keys_kernel[(t.programs,)](
                t.x, t.y, keys, labels, t.pixels, t.tiles, n * p, *t.x.stride(), *t.y.stride(), ignore_index or 0,
                HAS_IGNORE=ignore_index is not None, **t.constants,
            )  # fmt: skip
            ordered, order = keys.sort(dim=-1, descending=True, stable=True)
            del keys  # before there are weights
            block = max(min(next_power_of_2(t.length), RANKS), 16)
            tiles = -(-t.length // block)
            counts = logits.new_empty((c * t.rows, tiles), dtype=torch.int64)
            grid = (c * t.rows * tiles,)
            lovasz_rank_kernel[grid](ordered, order, labels, counts, t.length, tiles, t.rows, errors, block)
            weights = logits.new_zeros((c, n, p) if keep else (0,), dtype=dtype)
            partial = logits.new_empty((t.rows, c, tiles), dtype=torch.float64)
            lovasz_weigh_kernel[grid](
                ordered, order, counts.cumsum(1), chosen, weights, partial, takes_part, t.length, tiles, t.rows, c,
                t.float, errors, present, keep, block,
            )  # fmt: skip
            losses = partial.sum(-1)
    with on_device(logits):
        options = (class_weight, errors == HINGE.value, per_image, reduction, wide)
        return *reduce_segments(logits, losses, takes_part, *options), weights


def _backward(grad, logits, weights, scale, errors, per_image, reduction) -> Tensor:
    t = Tiles(logits, None, errors, per_image)
    n, _, p = logits.shape
    require(weights.is_contiguous() and weights.numel() == logits.numel(), "the weights of a forward pass with keep=True")
    check_scale(grad, scale, t, reduction)
    grad_logits = torch.empty_like(logits)
    if not t.empty:
        out = t.folded(grad_logits)
        with on_device(logits):
            lovasz_backward_kernel[(t.programs,)](
                grad.contiguous(), t.x, weights, scale, out, t.pixels, t.tiles, n * p, *t.x.stride(), *out.stride(),
                PER_IMAGE=per_image, REDUCTION=reduction, **t.constants,
            )  # fmt: skip
    return grad_logits


def check_scale(grad: Tensor, scale: Tensor, t: Tiles, reduction: int) -> None:
    segments = t.rows * t.classes
    require(scale.is_contiguous() and scale.numel() == segments, "the scale of the forward pass")
    require(grad.numel() == (segments if reduction == NONE.value else 1), "a gradient of the shape of the loss")


def lovasz_softmax_forward(
    logits, target, selected, present, per_image, class_weight, ignore_index, from_logits, reduction, keep, wide
) -> tuple[Tensor, Tensor, Tensor]:
    errors = SOFTMAX.value if from_logits else PROBABILITIES.value
    options = (selected, present, per_image, class_weight, ignore_index, reduction, keep, wide)
    return _forward(logits, target, errors, *options)


def lovasz_softmax_backward(grad, logits, weights, scale, per_image, from_logits, reduction) -> Tensor:
    errors = SOFTMAX.value if from_logits else PROBABILITIES.value
    return _backward(grad, logits, weights, scale, errors, per_image, reduction)


def lovasz_hinge_forward(
    logits, target, per_image, ignore_index, reduction, keep, wide
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(logits, target, HINGE.value, None, False, per_image, None, ignore_index, reduction, keep, wide)


def lovasz_hinge_backward(grad, logits, weights, scale, per_image, reduction) -> Tensor:
    return _backward(grad, logits, weights, scale, HINGE.value, per_image, reduction)


def __getattr__(name: str):
    """The operators of method "histogram". (histogram.py imports this module.)"""
    if name.startswith("lovasz_histogram"):
        from . import histogram

        return getattr(histogram, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
