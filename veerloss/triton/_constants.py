"""The constants of ../_layout.py that kernels need: Triton lets a kernel read only globals that are constexpr."""

import triton.language as tl

from .._layout import Errors, Reduction

SOFTMAX = tl.constexpr(Errors.SOFTMAX.value)
PROBABILITIES = tl.constexpr(Errors.PROBABILITIES.value)
HINGE = tl.constexpr(Errors.HINGE.value)

NONE = tl.constexpr(Reduction.NONE.value)
MEAN = tl.constexpr(Reduction.MEAN.value)
