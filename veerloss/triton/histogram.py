"""Method "histogram" of the Lovász losses as Triton kernels: the steps that _histogram.py puts together.

    count   a pass over the logits: errors into the bins of a table, or into the cells that a table divides
    place   bins: from the counts in the cells to the number of bins that each gets; one program per segment
    weigh   bins: counts to the weights of their pixels, the losses, and the bounds; one program per segment
    sum     a pass: weight times error over the pixels
    backward  a pass: a pixel's bin gives its weight, by look-up

Formulas have the names of csrc/bins.h, which explains them; the tables are those of csrc/cpu/lovasz_histogram.cpp. All that
programs add up in memory are integers, so that results have the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import arithmetic_dtype
from .._histogram import cells_and_bins
from ._launch import arithmetic, as_bytes, next_power_of_2, on_device
from .lovasz import (
    BAD,
    HINGE,
    IGNORED,
    PROBABILITIES,
    SOFTMAX,
    Tiles,
    accumulate_gradient,
    check_scale,
    error_and_complement,
    is_foreground,
    key_bits,
    load_labels,
    load_pixels,
    load_tile,
    pixels_of_tile,
    reduce_segments,
    require,
    segment_factor,
    sign_outside,
    softmax_gradient,
)

# ErrorCells in csrc/bins.h
OFFSET, ORIGIN = tl.constexpr(2.0**-8), tl.constexpr(0x3B800000)
CELL_BITS, POSITION_BITS, POSITION_SHIFT = tl.constexpr(16), tl.constexpr(15), tl.constexpr(1)
POSITION_MASK = tl.constexpr((1 << 15) - 1)
NARROW_END, WIDE_SHIFT = tl.constexpr(12 << 23), tl.constexpr(5)
NARROW_CELLS = tl.constexpr((12 << 23) >> 16)
HALF_CELLS = tl.constexpr((7 << 7) + 1)
BOUNDED_CELLS, UNBOUNDED_CELLS = tl.constexpr(1794), tl.constexpr(2032)
MOST_CELLS = 2048  # a power of two
BUDGET = tl.constexpr(6144)

INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)

#: As in csrc/bins.h: above these estimates of a segment's errors its bins are placed again.
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 5e-4, 3e-7

# Sizes that no GPU has measured: bins to a step of the loop over a segment's, partial results to a step of theirs.
BINS_STEP, LARGEST_STEP = 1024, 2048


# ---- bins


@triton.jit
def jaccard_bin(total, fg_before, bg_before, fg, bg):
    """(weight of a foreground pixel, of a background pixel)"""
    left = total - fg_before
    first = total + bg_before
    last = first + bg
    return 0.5 * (1.0 / first + 1.0 / last), (left - 0.5 * fg) / (first * last)


@triton.jit
def jaccard_bin_bound(total, fg_before, bg_before, fg, bg):
    """(of the foreground, of the background)"""
    left = total - fg_before
    first = total + bg_before
    last = first + bg
    weight = (left - 0.5 * fg) / (first * last)
    root = 0.5 * (tl.sqrt(1.0 + 4.0 * first * last) - 1.0)
    turn = (root - first + 1.0).to(tl.int64).to(tl.float64)
    below = turn * (left / (first * (first + turn)) - weight)
    return 0.5 * fg * bg / (first * last), below + (bg - turn) * (weight - (left - fg) / ((first + turn) * last))


@triton.jit
def jaccard_bin_deviation(fg_weight, bg_weight, fg_bound, bg_bound, fg, bg, slope, width):
    """Mean squares: (of the gradient, of the loss, of the weights)"""
    square = fg * fg_weight * fg_weight + bg * bg_weight * bg_weight
    gradient = fg_bound * fg_bound / tl.maximum(fg, 1.0) + bg_bound * bg_bound / tl.maximum(bg, 1.0)
    return slope * slope * gradient, square * width * width / 12.0, slope * slope * square


@triton.jit
def slope_of_error(error, BOUNDED: tl.constexpr):
    if BOUNDED:
        return error * (1.0 - error)
    else:
        return tl.full(error.shape, 1.0, error.dtype)


@triton.jit
def mean_error(middle, width, count, rise):
    shift = rise / (12.0 * tl.maximum(count, 1.0))
    return middle + width * tl.maximum(tl.minimum(shift, 0.25), -0.25)


@triton.jit
def cell_of_error(error, BOUNDED: tl.constexpr):
    """(cell, position in it) of float32 errors. NaN ends in the last cell."""
    if BOUNDED:
        mirrored = error > 0.5
        bits = (tl.where(mirrored, 1.0 - error, error) + OFFSET).to(tl.int32, bitcast=True) - ORIGIN
        cell = bits >> CELL_BITS
        position = (bits >> POSITION_SHIFT) & POSITION_MASK
        last = BOUNDED_CELLS - 1
        cell = tl.where(mirrored, -(cell - last), cell)
        position = tl.where(mirrored, position ^ POSITION_MASK, position)
    else:
        bits = (error + OFFSET).to(tl.int32, bitcast=True) - ORIGIN
        past = bits - NARROW_END
        wide = past >= 0
        cell = tl.where(wide, (past >> (CELL_BITS + WIDE_SHIFT)) + NARROW_CELLS, bits >> CELL_BITS)
        position = (tl.where(wide, past >> WIDE_SHIFT, bits) >> POSITION_SHIFT) & POSITION_MASK
        last = UNBOUNDED_CELLS - 1
    return tl.where((cell < 0) | (cell > last), last, cell), position


@triton.jit
def cell_begin(cell, BOUNDED: tl.constexpr):
    """Where a cell begins, in float64; cell + 1 where it ends."""
    if BOUNDED:
        mirrored = cell > HALF_CELLS
        own = tl.where(mirrored, -(cell - BOUNDED_CELLS), cell)
        begin = ((own << CELL_BITS) + ORIGIN).to(tl.float32, bitcast=True).to(tl.float64) - OFFSET
        return tl.where(mirrored, 1.0 - begin, begin)
    else:
        wide = ((cell - NARROW_CELLS) << (CELL_BITS + WIDE_SHIFT)) + NARROW_END
        bits = tl.where(cell < NARROW_CELLS, cell << CELL_BITS, wide) + ORIGIN
        begin = tl.where(cell < UNBOUNDED_CELLS, bits, ORIGIN).to(tl.float32, bitcast=True).to(tl.float64)
        return tl.where(cell < UNBOUNDED_CELLS, begin, tl.full((), 2.0**128, tl.float64)) - OFFSET


@triton.jit
def bin_of_error(error, table, begin, used, BOUNDED: tl.constexpr, BINS: tl.constexpr):
    """The bin of errors [BLOCK_C, BLOCK_P] where `used`, by the tables that begin there; without one, bin 1 + c is cell c."""
    cell, position = cell_of_error(error, BOUNDED)
    if table is None:
        index = cell + 1
    else:
        entry = tl.load(table + begin[:, None] + cell, mask=used, other=0)
        index = (entry & 0xFFFF) + ((position * ((entry >> 16) & 0x7FFF)) >> POSITION_BITS)
        index = tl.minimum(index, BINS - 1)  # whatever the table holds
    return tl.where(error == 0.0, 0, index)


# ---- passes over the pixels


@triton.jit
def find_errors(value, foreground, rest, inverse_sum, ERRORS: tl.constexpr):
    """Errors in float32; a float64 that is too large becomes the largest float32."""
    error, _ = error_and_complement(value, foreground, rest, inverse_sum, ERRORS)
    if error.dtype == tl.float64:
        most = tl.full((), LARGEST_FLOAT, tl.float64)
        error = tl.where((error > most) & (error < float("inf")), most, error)
    return error.to(tl.float32)


@triton.jit(do_not_specialize=["tiles", "ignore"])
def lovasz_count_kernel(
    x, target, table, wanted, counts, largest, largest_pixels, pixels, tiles, x_n, x_c, x_p, y_n, y_p, ignore,
    T: tl.constexpr, ERRORS: tl.constexpr, HAS_IGNORE: tl.constexpr, PER_IMAGE: tl.constexpr, SAMPLED: tl.constexpr,
    CELLS: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_WANTED: tl.constexpr,
):  # fmt: skip
    """Adds to counts [rows, C, 2, BINS] of background and foreground. Each program leaves the bits of its largest error of each
    class (-1: none; of infinity: an error that is none, or a bad target) and how many pixels have it, [C, programs].

    Each pixel is an atomic addition, but for the background of the least errors, where most pixels are once a network is
    trained: these a program adds up first.
    """
    program = tl.program_id(0)
    image, pixel, inside = pixels_of_tile(program, pixels, tiles, SAMPLED, BLOCK_P)
    row = image if PER_IMAGE else image * 0
    anything = 1
    if wanted is not None:
        every = tl.arange(0, BLOCK_WANTED)
        anything = tl.max(tl.load(wanted + row * CLASSES + every, mask=every < CLASSES, other=0).to(tl.int32))
    if anything != 0:
        label = load_labels(target, image * y_n + pixel * y_p, inside, ignore, 2 if ERRORS == HINGE else CLASSES, HAS_IGNORE)
        offset = image * x_n + pixel * x_p
        maximum, rest, inverse_sum = load_pixels(x, offset, inside, x_c, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            if wanted is not None:
                used = used & (tl.load(wanted + row * CLASSES + c, mask=used, other=0) != 0)
            value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
            foreground = is_foreground(label, c, ERRORS)
            bad = (label == BAD)[None, :]
            error = find_errors(value, foreground, rest, inverse_sum, ERRORS)
            counted = used[:, None] & (label != IGNORED)[None, :]

            bits = tl.where(bad, INFINITY_BITS, tl.minimum(key_bits(error), INFINITY_BITS))
            bits = tl.where(counted, bits, -1)
            most = tl.max(bits, 1)
            there = c.to(tl.int64) * tl.num_programs(0) + program
            tl.store(largest + there, most, mask=c < CLASSES)
            equal = counted & (bits == most[:, None])
            tl.store(largest_pixels + there, tl.sum(equal.to(tl.int32), 1), mask=c < CLASSES)

            segment = row * CLASSES + c
            index = tl.where(bad, 0, bin_of_error(error, table, segment * CELLS, counted, ERRORS == SOFTMAX, BINS))
            least = (index == 1) & (foreground == 0)
            at = counts + (segment * (2 * BINS))[:, None] + tl.where(foreground, BINS, 0) + index
            tl.atomic_add(at, tl.full((BLOCK_C, BLOCK_P), 1, tl.int32), mask=counted & (least == 0), sem="relaxed")
            many = tl.sum((counted & least).to(tl.int32), 1)
            tl.atomic_add(counts + segment * (2 * BINS) + 1, many, mask=many > 0, sem="relaxed")


@triton.jit(do_not_specialize=["programs", "per_row", "classes"])
def lovasz_largest_kernel(
    largest, largest_pixels, wanted, result, programs, per_row, classes, BLOCK: tl.constexpr
):  # fmt: skip
    """What the programs of lovasz_count_kernel found, put together: [rows, C, 2] of the largest error and its pixels."""
    segment = tl.program_id(0).to(tl.int64)
    error = tl.full((), -1.0, tl.float64)
    total = tl.zeros((), tl.int64)
    anything = 1
    if wanted is not None:
        anything = tl.load(wanted + segment).to(tl.int32)
    if anything != 0:
        begin = segment % classes * programs + segment // classes * per_row
        bits = tl.full((BLOCK,), -1, tl.int32)
        at = tl.arange(0, BLOCK)
        while tl.min(at) < per_row:
            bits = tl.maximum(bits, tl.load(largest + begin + at, mask=at < per_row, other=-1))
            at += BLOCK
        most = tl.max(bits)
        pixels = tl.zeros((BLOCK,), tl.int64)
        at = tl.arange(0, BLOCK)
        while tl.min(at) < per_row:
            here = tl.load(largest + begin + at, mask=at < per_row, other=-1) == most
            pixels += tl.load(largest_pixels + begin + at, mask=here & (at < per_row), other=0)
            at += BLOCK
        error = tl.where(most < 0, -1.0, most.to(tl.float32, bitcast=True).to(tl.float64))
        error = tl.where(most >= INFINITY_BITS, float("nan"), error)
        total = tl.sum(pixels)
    tl.store(result + 2 * segment, error)
    tl.store(result + 2 * segment + 1, total.to(tl.float64))


@triton.jit
def look_up(
    error, label, foreground, used, segment, table, weights, tops, ERRORS: tl.constexpr, CELLS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The signed weights of a tile's pixels: of their bins, or of the largest error in a segment without foreground."""
    valid = used[:, None] & (label != IGNORED)[None, :]
    index = bin_of_error(error, table, segment * CELLS, valid, ERRORS == SOFTMAX, BINS)
    index = tl.where((label == BAD)[None, :], 0, index)
    at = weights + (segment * (2 * BINS))[:, None] + tl.where(foreground, BINS, 0) + index
    top = tl.load(tops + 2 * segment, mask=used, other=0.0).to(tl.float32)[:, None]
    top_weight = tl.load(tops + 2 * segment + 1, mask=used, other=0.0)[:, None]
    at_top = tl.where(valid & (error == top) & (error > 0.0), top_weight, 0.0)
    return tl.where(top_weight > 0.0, at_top, tl.load(at, mask=valid & (top_weight == 0.0), other=0.0))


@triton.jit(do_not_specialize=["tiles", "ignore"])
def lovasz_sum_kernel(
    x, target, table, weights, tops, units, sums, pixels, tiles, x_n, x_c, x_p, y_n, y_p, ignore,
    T: tl.constexpr, ERRORS: tl.constexpr, HAS_IGNORE: tl.constexpr, PER_IMAGE: tl.constexpr, CELLS: tl.constexpr,
    BINS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds up |weight| * error of each segment, in whole numbers of 1 / units: in any order they have the same sum."""
    image, pixel, inside = pixels_of_tile(tl.program_id(0), pixels, tiles, False, BLOCK_P)
    row = image if PER_IMAGE else image * 0
    label = load_labels(target, image * y_n + pixel * y_p, inside, ignore, 2 if ERRORS == HINGE else CLASSES, HAS_IGNORE)
    offset = image * x_n + pixel * x_p
    maximum, rest, inverse_sum = load_pixels(x, offset, inside, x_c, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        segment = row * CLASSES + c
        value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
        foreground = is_foreground(label, c, ERRORS)
        error = find_errors(value, foreground, rest, inverse_sum, ERRORS)
        w = look_up(error, label, foreground, used, segment, table, weights, tops, ERRORS, CELLS, BINS)
        product = tl.abs(w.to(tl.float64)) * error.to(tl.float64)
        product = tl.where((w == 0.0) | (product != product), 0.0, product)  # ignored pixels may hold NaN
        units_here = tl.load(units + segment, mask=used, other=0.0)[:, None]
        total = tl.sum((product * units_here + 0.5).to(tl.int64), 1)
        tl.atomic_add(sums + segment, total, mask=used & (total != 0), sem="relaxed")


@triton.jit(do_not_specialize=["tiles", "ignore"])
def lovasz_histogram_backward_kernel(
    grad, x, target, table, weights, tops, scale, out, pixels, tiles, x_n, x_c, x_p, y_n, y_p, out_n, out_c, out_p, ignore,
    T: tl.constexpr, ERRORS: tl.constexpr, HAS_IGNORE: tl.constexpr, PER_IMAGE: tl.constexpr, REDUCTION: tl.constexpr,
    CELLS: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    image, pixel, inside = pixels_of_tile(tl.program_id(0), pixels, tiles, False, BLOCK_P)
    row = image if PER_IMAGE else image * 0
    label = load_labels(target, image * y_n + pixel * y_p, inside, ignore, 2 if ERRORS == HINGE else CLASSES, HAS_IGNORE)
    offset = image * x_n + pixel * x_p
    maximum, rest, inverse_sum = load_pixels(x, offset, inside, x_c, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    pivot = tl.zeros((BLOCK_P,), T)
    others = tl.zeros((BLOCK_P,), T)
    weighted = tl.zeros((BLOCK_P,), tl.int32)
    if ERRORS == SOFTMAX:
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            segment = row * CLASSES + c
            value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
            foreground = is_foreground(label, c, ERRORS)
            error = find_errors(value, foreground, rest, inverse_sum, ERRORS)
            g = look_up(error, label, foreground, used, segment, table, weights, tops, ERRORS, CELLS, BINS)
            g *= segment_factor(grad, scale, segment, used, T, REDUCTION)[:, None]
            pivot, others, weighted = accumulate_gradient(value, g, c, pivot, others, weighted)
    mean = (others - pivot * rest) * inverse_sum
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        segment = row * CLASSES + c
        value = load_tile(x, offset, inside, c, CLASSES, x_c, maximum, T, ERRORS)
        foreground = is_foreground(label, c, ERRORS)
        error = find_errors(value, foreground, rest, inverse_sum, ERRORS)
        g = look_up(error, label, foreground, used, segment, table, weights, tops, ERRORS, CELLS, BINS)
        if ERRORS == PROBABILITIES:  # by the weight's sign: before the factor's
            g = sign_outside(value, g)
        g *= segment_factor(grad, scale, segment, used, T, REDUCTION)[:, None]
        if ERRORS == SOFTMAX:
            g = softmax_gradient(value, g, inverse_sum, pivot, mean, weighted)
        to = (image * out_n + pixel * out_p)[None, :] + c.to(tl.int64)[:, None] * out_c
        tl.store(out + to, g, mask=used[:, None] & inside[None, :])


# ---- one program per segment


@triton.jit
def cube_root(square, most):
    """Of square / most, in float32."""
    ratio = (square / tl.where(most > 0.0, most, 1.0)).to(tl.float32)
    return tl.where(ratio > 0.0, tl.exp2(tl.log2(tl.where(ratio > 0.0, ratio, 1.0)) * (1.0 / 3.0)), 0.0).to(tl.float64)


@triton.jit
def lovasz_place_kernel(counts, table, BOUNDED: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts [segments, 2, 1 + CELLS] of background and foreground, first of the errors of 0, to tables [segments, CELLS]."""
    segment = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, BLOCK)
    inside = cell < CELLS
    start = counts + segment * (2 * (1 + CELLS))
    bg_count = tl.load(start + 1 + cell, mask=inside, other=0).to(tl.int64)
    fg_count = tl.load(start + 2 + CELLS + cell, mask=inside, other=0).to(tl.int64)
    fg_sum, bg_sum = tl.sum(fg_count), tl.sum(bg_count)
    fg_before = (fg_sum - tl.cumsum(fg_count, 0)).to(tl.float64)
    bg_before = (bg_sum - tl.cumsum(bg_count, 0)).to(tl.float64)
    fg, bg = fg_count.to(tl.float64), bg_count.to(tl.float64)
    # A sample may have missed what foreground there is.
    total = tl.maximum(fg_sum + tl.load(start + 1 + CELLS).to(tl.int64), 1).to(tl.float64)

    begin, end = cell_begin(tl.minimum(cell, CELLS - 1), BOUNDED), cell_begin(tl.minimum(cell + 1, CELLS), BOUNDED)
    fg_weight, bg_weight = jaccard_bin(total, fg_before, bg_before, fg, bg)
    fg_bound, bg_bound = jaccard_bin_bound(total, fg_before, bg_before, fg, bg)
    slope = slope_of_error(tl.minimum(0.5 * (begin + end), 1.0), BOUNDED)
    gradient, loss, _ = jaccard_bin_deviation(fg_weight, bg_weight, fg_bound, bg_bound, fg, bg, slope, end - begin)
    counted = inside & (fg + bg > 0.0)
    gradient = tl.where(counted, tl.maximum(gradient, 0.0), 0.0)
    loss = tl.where(counted, loss, 0.0)
    # Relative to the largest, so that float32 holds them.
    gradient = cube_root(gradient, tl.max(gradient))
    loss = cube_root(loss, tl.max(loss))
    all_gradient, all_loss = tl.sum(gradient), tl.sum(loss)
    share = gradient / tl.where(all_gradient > 0.0, all_gradient, 1.0) + loss / tl.where(all_loss > 0.0, all_loss, 1.0)
    own = 1 + (0.5 * share * (BUDGET * (1 - 1e-12))).to(tl.int32)
    own = tl.where(inside, own, 0)
    tl.store(table + segment * CELLS + cell, (1 + tl.cumsum(own, 0) - own).to(tl.int32) | (own << 16), mask=inside)


@triton.jit
def cell_of_bin(index, table, CELLS: tl.constexpr):
    """The last cell whose first bin is not above `index`, and its entry."""
    cell = index * 0
    for k in tl.static_range(11):  # MOST_CELLS is 2^11
        middle = cell + (1024 >> k)
        entry = tl.load(table + middle, mask=middle < CELLS, other=0xFFFF)
        cell = tl.where((entry & 0xFFFF) <= index, middle, cell)
    return cell, tl.load(table + cell)


@triton.jit
def rise(counts, index, first, last):
    """How the counts rise at a bin of a cell's, from one bin to the next; 0 outside the cells."""
    below, above = tl.maximum(index - 1, first), tl.minimum(index + 1, last)
    there = (index >= first) & (index <= last)
    difference = tl.load(counts + above, mask=there, other=0) - tl.load(counts + below, mask=there, other=0)
    return difference.to(tl.float64) * tl.where(above - below == 2, 0.5, 1.0)


@triton.jit(do_not_specialize=["classes"])
def lovasz_histogram_weigh_kernel(
    counts, largest, table, selected, weights, tops, losses, bounds, deviations, takes_part, classes,
    T: tl.constexpr, BOUNDED: tl.constexpr, PRESENT: tl.constexpr, CELLS: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts [segments, 2, BINS] to signed weights, and the rest that lovasz_histogram_weigh returns.

    deviations [2, segments]: root mean squares of the relative error of the gradient, and of the error of the loss.
    """
    segment = tl.program_id(0).to(tl.int64)
    bg_counts = counts + segment * (2 * BINS)
    fg_counts = bg_counts + BINS
    bg_weights = weights + segment * (2 * BINS)
    fg_weights = bg_weights + BINS
    cells = table + segment * CELLS
    zero_bg, zero_fg = tl.load(bg_counts).to(tl.int64), tl.load(fg_counts).to(tl.int64)
    bg_sum = tl.zeros((BLOCK,), tl.int64)
    fg_sum = tl.zeros((BLOCK,), tl.int64)
    for start in range(1, BINS, BLOCK):
        index = start + tl.arange(0, BLOCK)
        bg_sum += tl.load(bg_counts + index, mask=index < BINS, other=0)
        fg_sum += tl.load(fg_counts + index, mask=index < BINS, other=0)
    bg_left, fg_left = tl.sum(bg_sum), tl.sum(fg_sum)  # pixels in the bins not yet seen, and below: before them in rank
    total = fg_left + zero_fg
    top = tl.load(largest + 2 * segment)
    top_pixels = tl.load(largest + 2 * segment + 1)
    part = total + bg_left + zero_bg > 0
    if PRESENT:
        part = part & (total > 0)
    if selected is not None:
        part = part & (tl.load(selected + segment % classes) != 0)
    wrong = top != top
    alone = total == 0

    loss = tl.zeros((BLOCK,), tl.float64)
    bound = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    of_gradient = tl.zeros((BLOCK,), tl.float64)
    of_loss = tl.zeros((BLOCK,), tl.float64)
    if part & (wrong == 0) & (alone == 0):
        for start in range(1, BINS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            bg_count = tl.load(bg_counts + index, mask=index < BINS, other=0).to(tl.int64)
            fg_count = tl.load(fg_counts + index, mask=index < BINS, other=0).to(tl.int64)
            bg_before = (bg_left - tl.cumsum(bg_count, 0)).to(tl.float64)
            fg_before = (fg_left - tl.cumsum(fg_count, 0)).to(tl.float64)
            bg_left -= tl.sum(bg_count)
            fg_left -= tl.sum(fg_count)
            fg, bg = fg_count.to(tl.float64), bg_count.to(tl.float64)

            cell, entry = cell_of_bin(index, cells, CELLS)
            first, own = entry & 0xFFFF, entry >> 16
            last = tl.minimum(first + own, BINS) - 1
            inside = (index >= first) & (index <= last)
            begin = cell_begin(cell, BOUNDED)
            step = (cell_begin(cell + 1, BOUNDED) - begin) / tl.maximum(own, 1)
            low = begin + step * (index - first)
            high = tl.minimum(low + step, top)
            width = high - low
            middle = 0.5 * (low + high)
            fg_rise, bg_rise = rise(fg_counts, index, first, last), rise(bg_counts, index, first, last)
            # The first to hold pixels has the largest error, known exactly, on which a hinge may hang.
            is_first = (fg_before + bg_before == 0.0) & (fg + bg > 0.0)
            middle += tl.where(is_first, (top - middle) / tl.maximum(fg + bg, 1.0), 0.0)
            fg_rise = tl.where(is_first, 0.0, fg_rise)
            bg_rise = tl.where(is_first, 0.0, bg_rise)

            whole = total.to(tl.float64)
            fg_weight, bg_weight = jaccard_bin(whole, fg_before, bg_before, fg, bg)
            fg_bound, bg_bound = jaccard_bin_bound(whole, fg_before, bg_before, fg, bg)
            slope = slope_of_error(middle, BOUNDED)
            gradient_term, loss_term, square = jaccard_bin_deviation(
                fg_weight, bg_weight, fg_bound, bg_bound, fg, bg, slope, width
            )
            of_fg = fg_weight * fg * mean_error(middle, width, fg, fg_rise)
            of_bg = bg_weight * bg * mean_error(middle, width, bg, bg_rise)
            loss += tl.where(inside, of_fg + of_bg, 0.0)
            bound += tl.where(inside, fg_bound + bg_bound, 0.0)
            squares += tl.where(inside, square, 0.0)
            of_gradient += tl.where(inside, gradient_term, 0.0)
            of_loss += tl.where(inside, loss_term, 0.0)
            tl.store(bg_weights + index, bg_weight.to(T), mask=inside)
            tl.store(fg_weights + index, (-fg_weight).to(T), mask=inside)

    value, limit = tl.sum(loss), tl.sum(bound)
    every, gradient, spread = tl.sum(squares), tl.sum(of_gradient), tl.sum(of_loss)
    value = tl.where(part & alone, top, value)
    limit = tl.where(part & alone, 2.0 * (1.0 - 1.0 / tl.maximum(top_pixels, 1.0)), limit)
    value = tl.where(part & wrong, float("nan"), value)
    limit = tl.where(part & wrong, float("nan"), limit)
    tl.store(losses + segment, value)
    tl.store(bounds + segment, limit)
    relative = tl.where(every > 0.0, gradient / tl.where(every > 0.0, every, 1.0), 0.0)
    tl.store(deviations + segment, tl.sqrt(relative))
    tl.store(deviations + tl.num_programs(0) + segment, tl.sqrt(spread))
    tl.store(takes_part + segment, part.to(tl.int8))
    on_top = part & alone & (wrong == 0)
    tl.store(tops + 2 * segment, tl.where(on_top, top, 0.0).to(T))
    tl.store(tops + 2 * segment + 1, tl.where(on_top, 1.0 / tl.maximum(top_pixels, 1.0), 0.0).to(T))
    if part & wrong:  # bin 0 of the background, which ignored pixels have, keeps its 0
        for start in range(1, 2 * BINS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(bg_weights + index, tl.full((BLOCK,), float("nan"), T), mask=index < 2 * BINS)


# ---- operators


def lovasz_histogram_count(
    logits, target, table, wanted, errors, per_image, ignore_index, sampled
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(counts [rows, C, 2, bins] of background and foreground, largest [rows, C, 2]: the error, and how many have it)"""
    t = Tiles(logits, target, errors, per_image, sampled)
    cells, bins = cells_and_bins(errors)
    segments = t.rows * t.classes
    bins = 1 + cells if table is None else bins
    check_table(table, segments, cells)
    require(wanted is None or (wanted.is_contiguous() and wanted.numel() == segments), "wanted with one bool per segment")
    counts = logits.new_zeros((t.rows, t.classes, 2, bins), dtype=torch.int32)
    result = logits.new_empty((t.rows, t.classes, 2), dtype=torch.float64)
    if t.empty:
        result[..., 0], result[..., 1] = -1, 0
        return counts, result
    largest = logits.new_empty((2, t.classes, t.programs), dtype=torch.int32)
    wanted = None if wanted is None else as_bytes(wanted)
    with on_device(logits):
        lovasz_count_kernel[(t.programs,)](
            t.x, t.y, table, wanted, counts, largest[0], largest[1], t.pixels, t.tiles, *t.x.stride(), *t.y.stride(),
            ignore_index or 0, HAS_IGNORE=ignore_index is not None, PER_IMAGE=per_image, SAMPLED=sampled, CELLS=cells,
            BINS=bins, BLOCK_WANTED=next_power_of_2(t.classes), **t.constants,
        )  # fmt: skip
        per_row = t.programs // t.rows
        block = min(next_power_of_2(per_row), LARGEST_STEP)
        lovasz_largest_kernel[(segments,)](largest[0], largest[1], wanted, result, t.programs, per_row, t.classes, block)
    return counts, result


def check_table(table: Tensor | None, segments: int, cells: int) -> None:
    fits = table is None or (table.is_contiguous() and table.numel() == segments * cells and table.dtype == torch.int32)
    require(fits, "a table with the bins of every cell of every segment")


def lovasz_histogram_place(counts, table, errors) -> Tensor:
    """A table from the counts of the cells, or of the bins of another table."""
    cells, bins = cells_and_bins(errors)
    require(counts.dim() == 4 and counts.shape[2:] == (2, 1 + cells if table is None else bins), "counts of a counting pass")
    rows, classes = counts.shape[:2]
    check_table(table, rows * classes, cells)
    result = counts.new_empty((rows, classes, cells), dtype=torch.int32)
    if result.numel() == 0:
        return result
    with on_device(counts):
        if table is not None:
            upto = counts.cumsum(-1, dtype=torch.int64)
            first, own = table.bitwise_and(0xFFFF).long(), (table >> 16).long()
            last, first = ((end.clamp(1, bins) - 1)[:, :, None].expand(-1, -1, 2, -1) for end in (first + own, first))
            counts = torch.cat([counts[..., :1].long(), upto.gather(-1, last) - upto.gather(-1, first)], -1)
        lovasz_place_kernel[(rows * classes,)](
            counts.contiguous(), result, errors == SOFTMAX.value, cells, MOST_CELLS, num_warps=8
        )
    return result


def lovasz_histogram_weigh(
    logits, counts, largest, table, selected, present, class_weight, errors, per_image, reduction, wide
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, weights [rows, C, 2, bins], tops [rows, C, 2], bounds [rows, C], doubtful [rows, C])

    A segment without foreground has its whole weight on its largest error: tops says which, and what weight each pixel with it
    has; 0 elsewhere.
    """
    cells, bins = cells_and_bins(errors)
    shape = (logits.size(0) if per_image else 1, logits.size(1))
    segments = shape[0] * shape[1]
    require(counts.is_contiguous() and counts.numel() == 2 * bins * segments, "counts of the second counting pass")
    require(largest.is_contiguous() and largest.numel() == 2 * segments, "the largest errors of a counting pass")
    check_table(table, segments, cells)
    dtype = arithmetic_dtype(logits)
    weights = logits.new_zeros((*shape, 2, bins), dtype=dtype)
    tops = logits.new_zeros((*shape, 2), dtype=dtype)
    losses, bounds, *deviations = logits.new_zeros((4, *shape), dtype=torch.float64)
    takes_part = logits.new_zeros(shape, dtype=torch.int8)
    chosen = None if selected is None else as_bytes(selected)
    with on_device(logits):
        if segments > 0:
            lovasz_histogram_weigh_kernel[(segments,)](
                counts, largest, table, chosen, weights, tops, losses, bounds, deviations[0], takes_part, shape[1],
                arithmetic(logits), errors == SOFTMAX.value, present, cells, bins, BINS_STEP,
                num_warps=8,
            )  # fmt: skip
        # The losses of classes err independently: a mean of m has 1 / sqrt(m) of their error.
        loss_tolerance = LOSS_TOLERANCE * takes_part.sum(1, keepdim=True).double().sqrt()
        doubtful = (deviations[0] > GRADIENT_TOLERANCE) | (deviations[1] > loss_tolerance)
        options = (class_weight, errors == HINGE.value, per_image, reduction, wide)
        loss, scale = reduce_segments(logits, losses, takes_part, *options)
    return loss, scale, weights, tops, bounds.clone(), doubtful


def lovasz_histogram_sum(
    logits, target, table, weights, tops, units, errors, per_image, ignore_index
) -> Tensor:  # fmt: skip
    """Sums of weight times error, [rows, C] int64 in whole numbers of 1 / units."""
    t = Tiles(logits, target, errors, per_image)
    cells, bins = check_weights(t, table, weights, tops, errors)
    segments = t.rows * t.classes
    require(units.is_contiguous() and units.numel() == segments and units.dtype == torch.float64, "a unit for every segment")
    sums = logits.new_zeros((t.rows, t.classes), dtype=torch.int64)
    if not t.empty:
        with on_device(logits):
            lovasz_sum_kernel[(t.programs,)](
                t.x, t.y, table, weights, tops, units, sums, t.pixels, t.tiles, *t.x.stride(), *t.y.stride(), ignore_index or 0,
                HAS_IGNORE=ignore_index is not None, PER_IMAGE=per_image, CELLS=cells, BINS=bins, **t.constants,
            )  # fmt: skip
    return sums


def check_weights(t: Tiles, table: Tensor, weights: Tensor, tops: Tensor, errors: int) -> tuple[int, int]:
    cells, bins = cells_and_bins(errors)
    segments = t.rows * t.classes
    check_table(table, segments, cells)
    require(weights.is_contiguous() and weights.numel() == 2 * bins * segments, "the weights of the forward pass")
    require(tops.is_contiguous() and tops.numel() == 2 * segments, "the tops of the forward pass")
    return cells, bins


def lovasz_histogram_backward(
    grad, logits, target, table, weights, tops, scale, errors, per_image, ignore_index, reduction
) -> Tensor:  # fmt: skip
    t = Tiles(logits, target, errors, per_image)
    cells, bins = check_weights(t, table, weights, tops, errors)
    check_scale(grad, scale, t, reduction)
    grad_logits = torch.empty_like(logits)
    if not t.empty:
        out = t.folded(grad_logits)
        with on_device(logits):
            lovasz_histogram_backward_kernel[(t.programs,)](
                grad.contiguous(), t.x, t.y, table, weights, tops, scale, out, t.pixels, t.tiles, *t.x.stride(), *t.y.stride(),
                *out.stride(), ignore_index or 0, HAS_IGNORE=ignore_index is not None, PER_IMAGE=per_image, REDUCTION=reduction,
                CELLS=cells, BINS=bins, **t.constants,
            )  # fmt: skip
    return grad_logits
