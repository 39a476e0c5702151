"""What Python and the compiled libraries agree on: enumerations, and the layout of cells and bins of method "histogram".

csrc/layout.h, which explains the cells, has the same values; operator ``layout_constants`` returns those, and
tests/test_layout.py compares the two.
"""

from __future__ import annotations

import enum

from torch import Tensor


class Reduction(enum.IntEnum):
    NONE = 0
    MEAN = 1
    SUM = 2


class Errors(enum.IntEnum):
    """What the logits of a Lovász loss are, and so which errors they have. Those of a softmax are bounded by 1."""

    SOFTMAX = 0
    PROBABILITIES = 1
    HINGE = 2


# Cells: the bits of a float32, error + CELL_OFFSET.
CELL_OFFSET = 2.0**-8
CELL_ORIGIN = 0x3B800000  # the bits of CELL_OFFSET
CELL_BITS = 16  # mantissa bits below those that select the cell
POSITION_BITS, POSITION_SHIFT = 15, 1  # of these, the bits of the position inside the cell
NARROW_END = 12 << 23  # 2^4: cells above are wide
NARROW_CELLS = NARROW_END >> CELL_BITS
WIDE_SHIFT = 5  # additional low bits of a wide cell
HALF_CELLS = (7 << (23 - CELL_BITS)) + 1  # up to an error of 1/2
BOUNDED_CELLS = 2 * HALF_CELLS
UNBOUNDED_CELLS = NARROW_CELLS + ((0x7F800000 - CELL_ORIGIN - NARROW_END) >> (CELL_BITS + WIDE_SHIFT))

#: Bins to distribute over the cells, besides the one that each cell has.
BIN_BUDGET = 6144

# The entry of a cell in the look-up table: its first bin in the low bits, its number of bins in the high ones. Bin 0 holds the
# errors that are exactly 0.
ENTRY_SHIFT = 16
ENTRY_MASK = (1 << ENTRY_SHIFT) - 1

#: The coarse pass may sample every image: runs of 64 pixels, one every 1031.
SAMPLE_RUN, SAMPLE_STEP = 64, 1031

#: A segment whose estimated errors (of the gradient relative, of the loss absolute) exceed these gets its bins allocated again.
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 5e-4, 3e-7


def cell_count(errors: int) -> int:
    """Cells of a table."""
    return BOUNDED_CELLS if errors == Errors.SOFTMAX else UNBOUNDED_CELLS


def coarse_bin_count(errors: int) -> int:
    """Bins of a count in cells: bin 1 + c is cell c."""
    return 1 + cell_count(errors)


def bin_count(errors: int) -> int:
    """Bins of a count by a table, the most that its entries can use."""
    return 1 + cell_count(errors) + BIN_BUDGET


def pack_entry(first_bin: Tensor, bins: Tensor) -> Tensor:
    return first_bin | bins << ENTRY_SHIFT


def entry_first_bin(entry: Tensor) -> Tensor:
    return entry & ENTRY_MASK


def entry_bins(entry: Tensor) -> Tensor:
    return entry >> ENTRY_SHIFT


#: In the order of operator ``layout_constants`` (csrc/ops/layout.cpp).
CONSTANTS = (
    *Errors, *Reduction, CELL_OFFSET, CELL_ORIGIN, CELL_BITS, POSITION_BITS, POSITION_SHIFT, NARROW_END, NARROW_CELLS,
    WIDE_SHIFT, HALF_CELLS, BOUNDED_CELLS, UNBOUNDED_CELLS, BIN_BUDGET, bin_count(Errors.SOFTMAX), bin_count(Errors.HINGE),
    ENTRY_SHIFT, ENTRY_MASK, SAMPLE_RUN, SAMPLE_STEP, GRADIENT_TOLERANCE, LOSS_TOLERANCE,
)  # fmt: skip
