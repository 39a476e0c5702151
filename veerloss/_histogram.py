"""Method "histogram" of the Lovász losses: its steps put together, in one process or many.

The steps are operators (ops.py); csrc/cpu/lovasz_histogram.cpp is the place to read what each does. Between them only counts
travel, so that the loss of a batch that is spread over ranks costs two sums of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: As ``Errors`` in csrc/jaccard.h.
SOFTMAX, PROBABILITIES, HINGE = 0, 1, 2

#: Segments of this many pixels place their bins by a sample, 64 of every 1031 pixels; below, by all pixels. 16 000 sampled
#: pixels place the bins of common classes as well as all do; those of rare ones are then placed again.
SAMPLED_FROM = 1 << 18
#: Of images at least this large, for a sample that has not the first pixels of each image only.
SAMPLED_IMAGE = 1 << 12


def cells_and_bins(errors: int) -> tuple[int, int]:
    """Cells of a table and the most bins that they hold, as in ``BinLayout`` in csrc/bins.h."""
    cells = 1794 if errors == SOFTMAX else 2032
    return cells, 1 + cells + 6144


def forward(
    ops, logits, target, selected, present, per_image, class_weight, ignore_index, errors, reduction, wide, ranks=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, table, weights, tops, bounds): see lovasz_histogram_weigh.

    `ops`: the operators of a backend. `ranks`: of the batches of all of them.
    """
    n, c, p = logits.shape
    rows, length = (n, p) if per_image else (1, n * p)
    if ranks is not None:
        p, length = ranks.image, ranks.pixels
    sampled = errors != HINGE and length >= SAMPLED_FROM and p >= SAMPLED_IMAGE
    selected_rows = None if selected is None else selected.expand(rows, c).contiguous()

    def count(table, wanted, sampled=False):
        def here():
            options = (errors, per_image, ignore_index, sampled)
            return ops.lovasz_histogram_count(logits, target, table, wanted, *options)

        if ranks is None:
            return here()
        cells, bins = cells_and_bins(errors)
        return ranks.sum(here, (rows, c, 2, 1 + cells if table is None else bins))

    counts, _ = count(None, selected_rows, sampled)
    table = ops.lovasz_histogram_place(counts, None, errors)
    del counts  # before there are others
    counts, largest = count(table, selected_rows)

    def weigh():
        options = (selected, present, class_weight, errors, per_image, reduction, wide)
        return ops.lovasz_histogram_weigh(logits, counts, largest, table, *options)

    *result, doubtful = weigh()
    # A GPU does not tell the host what it found: there no segment may be wanted, and the kernels end at once.
    if sampled and (doubtful.is_cuda or doubtful.any()):
        better = ops.lovasz_histogram_place(counts, table, errors)
        table = torch.where(doubtful[..., None], better, table)
        again, _ = count(table, doubtful)
        counts = torch.where(doubtful[..., None, None], again, counts)
        *result, _ = weigh()
    loss, scale, weights, tops, bounds = result
    if errors != SOFTMAX:
        # Weights add up to 1 at most, so that a loss has at most 2^61 units.
        units = torch.ldexp(torch.ones_like(bounds), 61 - torch.frexp(largest[..., 0].nan_to_num(1.0)).exponent)
        sums = ops.lovasz_histogram_sum(logits, target, table, weights, tops, units, errors, per_image, ignore_index)
        if ranks is not None:
            sums = ranks.all_reduce(sums, "sum")
        of_segments = torch.where(largest[..., 0].isnan(), torch.nan, sums / units).reshape(scale.shape) * scale.double()
        of_segments = torch.where(scale == 0, 0.0, of_segments)
        loss = (of_segments if reduction == 0 else of_segments.sum()).to(loss.dtype)
    return loss, scale, table, weights, tops, bounds
