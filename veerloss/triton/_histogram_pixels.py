"""Method "histogram": the kernels that go over pixels.

All that programs add up in memory are integers, so that results have the same bits in every run.
"""

import triton
import triton.language as tl

from ._constants import PROBABILITIES, SOFTMAX
from ._histogram_math import bin_of_error
from ._math import key_bits
from ._tiles import (
    BAD,
    IGNORED,
    accumulate_gradient,
    error_and_complement,
    is_foreground,
    load_labels,
    load_softmax,
    load_values,
    mean_gradient,
    pixels_of_tile,
    ptr_offset,
    segment_factor,
    sign_outside,
    softmax_gradient,
)

INFINITY_BITS = tl.constexpr(0x7F800000)
MAX_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_errors(
    logits, strides, n, c, p, inside, label, softmax, T: tl.constexpr, ERRORS: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """(values, foreground, errors) of a tile. Errors are in float32: a float64 that is too large becomes the largest one."""
    values = load_values(logits, strides, n, c, p, inside, softmax, T, ERRORS, CLASSES)
    foreground = is_foreground(label[None, :], c[:, None], ERRORS)
    error, _complement = error_and_complement(values, foreground, softmax, ERRORS)
    if error.dtype == tl.float64:
        max_float = tl.full((), MAX_FLOAT, tl.float64)
        error = tl.where((error > max_float) & (error < float("inf")), max_float, error)
    return values, foreground, error.to(tl.float32)


@triton.jit
def load_weights(
    error, label, foreground, used, segment, table, weights, max_weights, ERRORS: tl.constexpr, CELLS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The signed weights of a tile's pixels: of their bins, or of the largest error in a segment without foreground."""
    valid = used[:, None] & (label != IGNORED)[None, :]
    index = bin_of_error(error, table, segment * CELLS, valid, ERRORS == SOFTMAX, BINS)
    index = tl.where((label == BAD)[None, :], 0, index)
    bin_weights = weights + (segment * (2 * BINS))[:, None] + tl.where(foreground, BINS, 0) + index
    max_error = tl.load(max_weights + 2 * segment, mask=used, other=0.0).to(tl.float32)[:, None]
    max_error_weight = tl.load(max_weights + 2 * segment + 1, mask=used, other=0.0)[:, None]
    on_max = tl.where(valid & (error == max_error) & (error > 0.0), max_error_weight, 0.0)
    in_bins = tl.load(bin_weights, mask=valid & (max_error_weight == 0.0), other=0.0)
    return tl.where(max_error_weight > 0.0, on_max, in_bins)


@triton.jit(do_not_specialize=["image_tiles", "ignore_index", "background_index"])
def lovasz_histogram_count_kernel(
    logits, logits_strides, target, target_strides, ignore_index, background_index, table, segment_mask, counts,
    max_error_bits, max_error_counts,
    pixels, image_tiles, T: tl.constexpr, ERRORS: tl.constexpr, PER_IMAGE: tl.constexpr, SAMPLED: tl.constexpr,
    CELLS: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
):  # fmt: skip
    """Adds to counts [rows, C, 2, BINS] of background and foreground. Each program writes the bits of its largest error of each
    class (-1: no pixel; of infinity: an error that is none, or a bad target) and how many pixels have it, [C, programs].

    Each pixel is an atomic addition, but for the background of the first cell, where most pixels are once a network is
    trained: these a program adds up first.
    """
    program = tl.program_id(0)
    n, p, inside = pixels_of_tile(program, pixels, image_tiles, SAMPLED, BLOCK_P)
    row = n if PER_IMAGE else n * 0
    any_segment = 1
    if segment_mask is not None:
        every = tl.arange(0, BLOCK_MASK)
        any_segment = tl.max(tl.load(segment_mask + row * CLASSES + every, mask=every < CLASSES, other=0).to(tl.int32))
    if any_segment != 0:
        label = load_labels(target, target_strides, n, p, inside, ignore_index, background_index, ERRORS, CLASSES)
        softmax = load_softmax(logits, logits_strides, n, p, inside, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            if segment_mask is not None:
                used = used & (tl.load(segment_mask + row * CLASSES + c, mask=used, other=0) != 0)
            _values, foreground, error = load_errors(
                logits, logits_strides, n, c, p, inside, label, softmax, T, ERRORS, CLASSES
            )
            bad = (label == BAD)[None, :]
            counted = used[:, None] & (label != IGNORED)[None, :]

            bits = tl.where(bad, INFINITY_BITS, tl.minimum(key_bits(error), INFINITY_BITS))
            bits = tl.where(counted, bits, -1)
            max_bits = tl.max(bits, 1)
            result = c.to(tl.int64) * tl.num_programs(0) + program
            tl.store(max_error_bits + result, max_bits, mask=c < CLASSES)
            equal = counted & (bits == max_bits[:, None])
            tl.store(max_error_counts + result, tl.sum(equal.to(tl.int32), 1), mask=c < CLASSES)

            segment = row * CLASSES + c
            index = tl.where(bad, 0, bin_of_error(error, table, segment * CELLS, counted, ERRORS == SOFTMAX, BINS))
            in_first = (index == 1) & (foreground == 0)
            bins = counts + (segment * (2 * BINS))[:, None] + tl.where(foreground, BINS, 0) + index
            tl.atomic_add(bins, tl.full((BLOCK_C, BLOCK_P), 1, tl.int32), mask=counted & (in_first == 0), sem="relaxed")
            first_count = tl.sum((counted & in_first).to(tl.int32), 1)
            tl.atomic_add(counts + segment * (2 * BINS) + 1, first_count, mask=first_count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["programs", "per_row", "classes"])
def lovasz_histogram_max_error_kernel(
    max_error_bits, max_error_counts, segment_mask, max_errors, programs, per_row, classes, BLOCK: tl.constexpr
):  # fmt: skip
    """What the programs of the counting pass found, put together: [rows, C, 2] of the largest error and its pixels."""
    segment = tl.program_id(0).to(tl.int64)
    error = tl.full((), -1.0, tl.float64)
    total = tl.zeros((), tl.int64)
    is_counted = 1
    if segment_mask is not None:
        is_counted = tl.load(segment_mask + segment).to(tl.int32)
    if is_counted != 0:
        begin = segment % classes * programs + segment // classes * per_row
        bits = tl.full((BLOCK,), -1, tl.int32)
        at = tl.arange(0, BLOCK)
        while tl.min(at) < per_row:
            bits = tl.maximum(bits, tl.load(max_error_bits + begin + at, mask=at < per_row, other=-1))
            at += BLOCK
        max_bits = tl.max(bits)
        count = tl.zeros((BLOCK,), tl.int64)
        at = tl.arange(0, BLOCK)
        while tl.min(at) < per_row:
            equal = tl.load(max_error_bits + begin + at, mask=at < per_row, other=-1) == max_bits
            count += tl.load(max_error_counts + begin + at, mask=equal & (at < per_row), other=0)
            at += BLOCK
        error = tl.where(max_bits < 0, -1.0, max_bits.to(tl.float32, bitcast=True).to(tl.float64))
        error = tl.where(max_bits >= INFINITY_BITS, float("nan"), error)
        total = tl.sum(count)
    tl.store(max_errors + 2 * segment, error)
    tl.store(max_errors + 2 * segment + 1, total.to(tl.float64))


@triton.jit(do_not_specialize=["image_tiles", "ignore_index", "background_index"])
def lovasz_histogram_sum_kernel(
    logits, logits_strides, target, target_strides, ignore_index, background_index, table, weights, max_weights, units, sums,
    pixels, image_tiles,
    T: tl.constexpr, ERRORS: tl.constexpr, PER_IMAGE: tl.constexpr, CELLS: tl.constexpr, BINS: tl.constexpr,
    CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds up |weight| * error of each segment, in whole numbers of 1 / units: in any order they have the same sum."""
    n, p, inside = pixels_of_tile(tl.program_id(0), pixels, image_tiles, False, BLOCK_P)
    row = n if PER_IMAGE else n * 0
    label = load_labels(target, target_strides, n, p, inside, ignore_index, background_index, ERRORS, CLASSES)
    softmax = load_softmax(logits, logits_strides, n, p, inside, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        segment = row * CLASSES + c
        _values, foreground, error = load_errors(logits, logits_strides, n, c, p, inside, label, softmax, T, ERRORS, CLASSES)
        w = load_weights(error, label, foreground, used, segment, table, weights, max_weights, ERRORS, CELLS, BINS)
        product = tl.abs(w.to(tl.float64)) * error.to(tl.float64)
        product = tl.where((w == 0.0) | (product != product), 0.0, product)  # ignored pixels may hold NaN
        segment_units = tl.load(units + segment, mask=used, other=0.0)[:, None]
        total = tl.sum((product * segment_units + 0.5).to(tl.int64), 1)
        tl.atomic_add(sums + segment, total, mask=used & (total != 0), sem="relaxed")


@triton.jit(do_not_specialize=["image_tiles", "ignore_index", "background_index"])
def lovasz_histogram_backward_kernel(
    grad, logits, logits_strides, target, target_strides, ignore_index, background_index, table, weights, max_weights, scale,
    out, out_strides,
    pixels, image_tiles, T: tl.constexpr, ERRORS: tl.constexpr, PER_IMAGE: tl.constexpr, REDUCTION: tl.constexpr,
    CELLS: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits or probabilities, by look-up of the weights."""
    n, p, inside = pixels_of_tile(tl.program_id(0), pixels, image_tiles, False, BLOCK_P)
    row = n if PER_IMAGE else n * 0
    label = load_labels(target, target_strides, n, p, inside, ignore_index, background_index, ERRORS, CLASSES)
    softmax = load_softmax(logits, logits_strides, n, p, inside, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    pivot = tl.zeros((BLOCK_P,), T)
    others = tl.zeros((BLOCK_P,), tl.float64 if CLASSES > BLOCK_C else T)
    weighted = tl.zeros((BLOCK_P,), tl.int32)
    if ERRORS == SOFTMAX:
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            segment = row * CLASSES + c
            exp, foreground, error = load_errors(logits, logits_strides, n, c, p, inside, label, softmax, T, ERRORS, CLASSES)
            g = load_weights(error, label, foreground, used, segment, table, weights, max_weights, ERRORS, CELLS, BINS)
            g *= segment_factor(grad, scale, segment, used, T, REDUCTION)[:, None]
            pivot, others, weighted = accumulate_gradient(exp, g, c, pivot, others, weighted)
    mean = mean_gradient(softmax, pivot, others)
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        segment = row * CLASSES + c
        values, foreground, error = load_errors(logits, logits_strides, n, c, p, inside, label, softmax, T, ERRORS, CLASSES)
        g = load_weights(error, label, foreground, used, segment, table, weights, max_weights, ERRORS, CELLS, BINS)
        if ERRORS == PROBABILITIES:  # by the weight's sign: before the factor's
            g = sign_outside(values, g)
        g *= segment_factor(grad, scale, segment, used, T, REDUCTION)[:, None]
        if ERRORS == SOFTMAX:
            g = softmax_gradient(values, g, softmax, pivot, mean, weighted)
        mask = used[:, None] & inside[None, :]
        tl.store(out + ptr_offset(out_strides, n, c[:, None], p[None, :]), g, mask=mask)
