"""Scalar maths of method "histogram". Formulas have the names of csrc/math/bins.h, which explains them; cells, bins and entries
of the look-up table are those of csrc/layout.h."""

import triton
import triton.language as tl

from ._constants import (
    BIN_BUDGET,
    BOUNDED_CELLS,
    CELL_BITS,
    CELL_OFFSET,
    CELL_ORIGIN,
    ENTRY_MASK,
    ENTRY_SHIFT,
    HALF_CELLS,
    NARROW_CELLS,
    NARROW_END,
    POSITION_BITS,
    POSITION_MASK,
    POSITION_SHIFT,
    UNBOUNDED_CELLS,
    WIDE_SHIFT,
)

# The steps of a binary search among the cells of a segment, and the width of the first.
CELL_SEARCH_STEPS = tl.constexpr(max(BOUNDED_CELLS.value, UNBOUNDED_CELLS.value).bit_length())
CELL_SEARCH_WIDTH = tl.constexpr(1 << (CELL_SEARCH_STEPS.value - 1))


# ---- entries of the look-up table


@triton.jit
def pack_entry(first_bin, bins):
    return first_bin | (bins << ENTRY_SHIFT)


@triton.jit
def entry_first_bin(entry):
    return entry & ENTRY_MASK


@triton.jit
def entry_bins(entry):
    return (entry >> ENTRY_SHIFT) & ENTRY_MASK  # entries are signed here


# ---- weights of the pixels in a bin


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
def mean_error(middle, width, count, slope):
    shift = slope / (12.0 * tl.maximum(count, 1.0))
    return middle + width * tl.maximum(tl.minimum(shift, 0.25), -0.25)


# ---- cells


@triton.jit
def cell_of_error(error, BOUNDED: tl.constexpr):
    """(cell, position in it) of float32 errors. NaN ends in the last cell."""
    if BOUNDED:
        mirrored = error > 0.5
        bits = (tl.where(mirrored, 1.0 - error, error) + CELL_OFFSET).to(tl.int32, bitcast=True) - CELL_ORIGIN
        cell = bits >> CELL_BITS
        position = (bits >> POSITION_SHIFT) & POSITION_MASK
        last = BOUNDED_CELLS - 1
        cell = tl.where(mirrored, -(cell - last), cell)
        position = tl.where(mirrored, position ^ POSITION_MASK, position)
    else:
        bits = (error + CELL_OFFSET).to(tl.int32, bitcast=True) - CELL_ORIGIN
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
        unmirrored = tl.where(mirrored, -(cell - BOUNDED_CELLS), cell)
        begin = ((unmirrored << CELL_BITS) + CELL_ORIGIN).to(tl.float32, bitcast=True).to(tl.float64) - CELL_OFFSET
        return tl.where(mirrored, 1.0 - begin, begin)
    else:
        wide = ((cell - NARROW_CELLS) << (CELL_BITS + WIDE_SHIFT)) + NARROW_END
        bits = tl.where(cell < NARROW_CELLS, cell << CELL_BITS, wide) + CELL_ORIGIN
        begin = tl.where(cell < UNBOUNDED_CELLS, bits, CELL_ORIGIN).to(tl.float32, bitcast=True).to(tl.float64)
        return tl.where(cell < UNBOUNDED_CELLS, begin, tl.full((), 2.0**128, tl.float64)) - CELL_OFFSET


@triton.jit
def bin_of_error(error, table, begin, mask, BOUNDED: tl.constexpr, BINS: tl.constexpr):
    """The bin of errors [BLOCK_C, BLOCK_P] where `mask`, by the tables that begin there; without one, bin 1 + c is cell c."""
    cell, position = cell_of_error(error, BOUNDED)
    if table is None:
        index = cell + 1
    else:
        entry = tl.load(table + begin[:, None] + cell, mask=mask, other=0)
        index = entry_first_bin(entry) + ((position * entry_bins(entry)) >> POSITION_BITS)
        index = tl.minimum(index, BINS - 1)  # whatever the table holds
    return tl.where(error == 0.0, 0, index)


@triton.jit
def cell_of_bin(index, table, CELLS: tl.constexpr):
    """(the last cell whose first bin is not above `index`, its entry)"""
    cell = index * 0
    for k in tl.static_range(CELL_SEARCH_STEPS):
        middle = cell + (CELL_SEARCH_WIDTH >> k)
        entry = tl.load(table + middle, mask=middle < CELLS, other=ENTRY_MASK)
        cell = tl.where(entry_first_bin(entry) <= index, middle, cell)
    return cell, tl.load(table + cell)


# ---- the allocation of bins to cells


@triton.jit
def relative_cube_root(square, max_square):
    """Of square / max_square, in float32."""
    ratio = (square / tl.where(max_square > 0.0, max_square, 1.0)).to(tl.float32)
    return tl.where(ratio > 0.0, tl.exp2(tl.log2(tl.where(ratio > 0.0, ratio, 1.0)) * (1.0 / 3.0)), 0.0).to(tl.float64)


@triton.jit
def bins_of_cell(gradient, sum_gradient, loss, sum_loss):
    """From a cell's cube roots and their sums over all cells."""
    share = gradient / tl.where(sum_gradient > 0.0, sum_gradient, 1.0) + loss / tl.where(sum_loss > 0.0, sum_loss, 1.0)
    return 1 + (0.5 * share * (BIN_BUDGET * (1 - 1e-12))).to(tl.int32)
