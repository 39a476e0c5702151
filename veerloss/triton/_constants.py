"""The constants of ../_layout.py that kernels need: Triton lets a kernel read only globals that are constexpr."""

import triton.language as tl

from .. import _layout
from .._layout import Errors, Reduction

SOFTMAX = tl.constexpr(Errors.SOFTMAX.value)
PROBABILITIES = tl.constexpr(Errors.PROBABILITIES.value)
HINGE = tl.constexpr(Errors.HINGE.value)

NONE = tl.constexpr(Reduction.NONE.value)
MEAN = tl.constexpr(Reduction.MEAN.value)

CELL_OFFSET = tl.constexpr(_layout.CELL_OFFSET)
CELL_ORIGIN = tl.constexpr(_layout.CELL_ORIGIN)
CELL_BITS = tl.constexpr(_layout.CELL_BITS)
POSITION_BITS = tl.constexpr(_layout.POSITION_BITS)
POSITION_SHIFT = tl.constexpr(_layout.POSITION_SHIFT)
POSITION_MASK = tl.constexpr((1 << _layout.POSITION_BITS) - 1)
NARROW_END = tl.constexpr(_layout.NARROW_END)
NARROW_CELLS = tl.constexpr(_layout.NARROW_CELLS)
WIDE_SHIFT = tl.constexpr(_layout.WIDE_SHIFT)
HALF_CELLS = tl.constexpr(_layout.HALF_CELLS)
BOUNDED_CELLS = tl.constexpr(_layout.BOUNDED_CELLS)
UNBOUNDED_CELLS = tl.constexpr(_layout.UNBOUNDED_CELLS)
BIN_BUDGET = tl.constexpr(_layout.BIN_BUDGET)

ENTRY_SHIFT = tl.constexpr(_layout.ENTRY_SHIFT)
ENTRY_MASK = tl.constexpr(_layout.ENTRY_MASK)

SAMPLE_RUN = tl.constexpr(_layout.SAMPLE_RUN)
SAMPLE_STEP = tl.constexpr(_layout.SAMPLE_STEP)
