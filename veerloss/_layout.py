"""What Python and the compiled libraries agree on: enumerations, and the layout of cells and bins of method "histogram".

csrc/layout.h, which explains the cells, has the same values; operator ``layout_constants`` returns those, and
tests/test_layout.py compares the two.
"""

from __future__ import annotations

import enum


class Reduction(enum.IntEnum):
    NONE = 0
    MEAN = 1
    SUM = 2


class Errors(enum.IntEnum):
    """What the logits of a Lovász loss are, and so which errors they have. Those of a softmax are bounded by 1."""

    SOFTMAX = 0
    PROBABILITIES = 1
    HINGE = 2


class Activation(enum.IntEnum):
    """What makes probabilities of the logits of a region loss."""

    SOFTMAX = 0
    SIGMOID = 1
    NONE = 2


class Form(enum.IntEnum):
    """The function of the index of a segment that a region loss is."""

    LINEAR = 0
    LOG = 1
    LOG_COSH = 2


class Interpolation(enum.IntEnum):
    """How logits of low resolution become those of the target's: the modes of torch.nn.functional.interpolate."""

    NEAREST = 0
    LINEAR = 1
    LINEAR_ALIGNED = 2  # align_corners


#: Cells of a segment's window; its table has a (scale, offset) for the window and one for each cell, float32.
CELLS = 128
TABLE = 1 + CELLS
#: Bins of the coarse pass, over coordinates from -COARSE_REACH to COARSE_REACH.
COARSE_BINS, COARSE_REACH = 1024, 32.0
#: Where the coordinates of errors above 1 begin.
PAST_ONE = 24.0
#: 2^23, which puts an integer into the low bits of a float32.
MAGIC = 2.0**23

#: The coarse pass may sample every image: runs of 64 pixels, one every 1031.
SAMPLE_RUN, SAMPLE_STEP = 64, 1031

#: A segment whose estimated errors (of the gradient relative, of the loss absolute) exceed these gets its bins allocated again.
GRADIENT_TOLERANCE, LOSS_TOLERANCE = 5e-4, 1e-6


#: Of a segment's sums: see csrc/math/region.h.
REGION_WORDS = 8
#: The least index of a segment that form "log" takes the logarithm of; below it the gradient is 0. As in
#: segmentation-models-pytorch.
LEAST_INDEX = 1e-7

#: Bins of a segment, by the most classes that have so many; of more classes the last.
BINS = {4: 8192, 8: 6144, 12: 3072, 16: 2304}
LEAST_BINS, MAX_BINS = 1920, 8192


def bin_count(classes: int) -> int:
    """Bins of a segment."""
    return next((bins for most, bins in BINS.items() if classes <= most), LEAST_BINS)


#: In the order of operator ``layout_constants`` (csrc/ops/layout.cpp).
CONSTANTS = (
    *Errors, *Activation, *Form, *Reduction, CELLS, TABLE, COARSE_BINS, COARSE_REACH, PAST_ONE, MAGIC,
    *map(bin_count, range(1, 25)), SAMPLE_RUN, SAMPLE_STEP, GRADIENT_TOLERANCE, LOSS_TOLERANCE, REGION_WORDS, LEAST_INDEX,
)  # fmt: skip
