"""Method "histogram": the kernels that go over bins, one program per segment."""

import triton
import triton.language as tl

from ._histogram_math import (
    bins_of_cell,
    cell_begin,
    cell_of_bin,
    entry_bins,
    entry_first_bin,
    jaccard_bin,
    jaccard_bin_bound,
    jaccard_bin_deviation,
    mean_error,
    pack_entry,
    relative_cube_root,
    slope_of_error,
)


@triton.jit
def lovasz_histogram_allocate_bins_kernel(counts, table, BOUNDED: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts [segments, 2, 1 + CELLS] of background and foreground, first of the errors of 0, to tables [segments, CELLS].
    `BLOCK` has all cells."""
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
    gradient = relative_cube_root(gradient, tl.max(gradient))
    loss = relative_cube_root(loss, tl.max(loss))
    bins = tl.where(inside, bins_of_cell(gradient, tl.sum(gradient), loss, tl.sum(loss)), 0)
    first_bin = (1 + tl.cumsum(bins, 0) - bins).to(tl.int32)
    tl.store(table + segment * CELLS + cell, pack_entry(first_bin, bins), mask=inside)


@triton.jit
def slope_of_counts(counts, index, first, last):
    """The difference of the counts from one bin to the next, at bin `index` of a cell's [first, last]; 0 outside the cell."""
    below, above = tl.maximum(index - 1, first), tl.minimum(index + 1, last)
    mask = (index >= first) & (index <= last)
    difference = tl.load(counts + above, mask=mask, other=0) - tl.load(counts + below, mask=mask, other=0)
    return difference.to(tl.float64) * tl.where(above - below == 2, 0.5, 1.0)


@triton.jit(do_not_specialize=["classes"])
def lovasz_histogram_weigh_kernel(
    counts, max_errors, table, selected, weights, max_weights, losses, bounds, deviations, takes_part, classes,
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
    max_error = tl.load(max_errors + 2 * segment)
    max_error_count = tl.load(max_errors + 2 * segment + 1)
    part = total + bg_left + zero_bg > 0
    if PRESENT:
        part = part & (total > 0)
    if selected is not None:
        part = part & (tl.load(selected + segment % classes) != 0)
    invalid = max_error != max_error
    no_fg = total == 0

    loss = tl.zeros((BLOCK,), tl.float64)
    bound = tl.zeros((BLOCK,), tl.float64)
    gradient_squares = tl.zeros((BLOCK,), tl.float64)
    loss_squares = tl.zeros((BLOCK,), tl.float64)
    weight_squares = tl.zeros((BLOCK,), tl.float64)
    if part & (invalid == 0) & (no_fg == 0):
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
            first, bins = entry_first_bin(entry), entry_bins(entry)
            last = tl.minimum(first + bins, BINS) - 1
            inside = (index >= first) & (index <= last)
            begin = cell_begin(cell, BOUNDED)
            step = (cell_begin(cell + 1, BOUNDED) - begin) / tl.maximum(bins, 1)
            low = begin + step * (index - first)
            high = tl.minimum(low + step, max_error)
            width = high - low
            middle = 0.5 * (low + high)
            fg_slope, bg_slope = slope_of_counts(fg_counts, index, first, last), slope_of_counts(bg_counts, index, first, last)
            # The first to hold pixels has the largest error, known exactly, on which a hinge may hang.
            is_first = (fg_before + bg_before == 0.0) & (fg + bg > 0.0)
            middle += tl.where(is_first, (max_error - middle) / tl.maximum(fg + bg, 1.0), 0.0)
            fg_slope = tl.where(is_first, 0.0, fg_slope)
            bg_slope = tl.where(is_first, 0.0, bg_slope)

            whole = total.to(tl.float64)
            fg_weight, bg_weight = jaccard_bin(whole, fg_before, bg_before, fg, bg)
            fg_bound, bg_bound = jaccard_bin_bound(whole, fg_before, bg_before, fg, bg)
            slope = slope_of_error(middle, BOUNDED)
            gradient_square, loss_square, weight_square = jaccard_bin_deviation(
                fg_weight, bg_weight, fg_bound, bg_bound, fg, bg, slope, width
            )
            fg_loss = fg_weight * fg * mean_error(middle, width, fg, fg_slope)
            bg_loss = bg_weight * bg * mean_error(middle, width, bg, bg_slope)
            loss += tl.where(inside, fg_loss + bg_loss, 0.0)
            bound += tl.where(inside, fg_bound + bg_bound, 0.0)
            weight_squares += tl.where(inside, weight_square, 0.0)
            gradient_squares += tl.where(inside, gradient_square, 0.0)
            loss_squares += tl.where(inside, loss_square, 0.0)
            tl.store(bg_weights + index, bg_weight.to(T), mask=inside)
            tl.store(fg_weights + index, (-fg_weight).to(T), mask=inside)

    # Without foreground the largest error has the whole weight.
    value, limit = tl.sum(loss), tl.sum(bound)
    sum_weights, sum_gradient, sum_loss = tl.sum(weight_squares), tl.sum(gradient_squares), tl.sum(loss_squares)
    value = tl.where(part & no_fg, max_error, value)
    limit = tl.where(part & no_fg, 2.0 * (1.0 - 1.0 / tl.maximum(max_error_count, 1.0)), limit)
    value = tl.where(part & invalid, float("nan"), value)
    limit = tl.where(part & invalid, float("nan"), limit)
    tl.store(losses + segment, value)
    tl.store(bounds + segment, limit)
    relative = tl.where(sum_weights > 0.0, sum_gradient / tl.where(sum_weights > 0.0, sum_weights, 1.0), 0.0)
    tl.store(deviations + segment, tl.sqrt(relative))
    tl.store(deviations + tl.num_programs(0) + segment, tl.sqrt(sum_loss))
    tl.store(takes_part + segment, part.to(tl.int8))
    on_max = part & no_fg & (invalid == 0)
    tl.store(max_weights + 2 * segment, tl.where(on_max, max_error, 0.0).to(T))
    tl.store(max_weights + 2 * segment + 1, tl.where(on_max, 1.0 / tl.maximum(max_error_count, 1.0), 0.0).to(T))
    if part & invalid:  # bin 0 of the background, which ignored pixels have, keeps its 0
        for start in range(1, 2 * BINS, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(bg_weights + index, tl.full((BLOCK,), float("nan"), T), mask=index < 2 * BINS)
