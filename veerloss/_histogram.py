"""Method "histogram" of the Lovász losses: its steps put together, in one process or over the ranks of a process group.

    count          errors into the cells of _layout.py: of a sample of the pixels, or of all of them (the coarse pass)
    allocate_bins  to each cell the number of bins that its estimated error is worth: a look-up table
    count          errors of all pixels into these bins
    weigh          counts to the weights of the bins, the losses, and bounds on what binning changed
    sum            weight times error over the pixels, where the bins are too wide for the loss to follow from the counts
    backward       a pixel's bin gives its weight, by look-up

The steps are operators (ops.py), implemented by csrc/cpu/lovasz, csrc/cuda/lovasz and triton/lovasz_histogram.py;
csrc/kernels.h describes the tensors. Only counts travel between them, so the loss of a batch that is spread over ranks takes
two sums of integers, and its bits do not depend on the number of threads or ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import Errors, Reduction, bin_count, coarse_bin_count

#: Segments of this many pixels allocate their bins by a sample, 64 of every 1031 pixels; smaller ones by all pixels. 16 000
#: sampled pixels serve common classes as well as all pixels do; the bins of rare classes are then allocated again.
SAMPLED_FROM = 1 << 18
#: Only of images at least this large, so that the sample is not made of the first pixels of each image.
SAMPLED_IMAGE = 1 << 12


def forward(
    ops,
    *,
    logits,
    target,
    selected,
    present,
    per_image,
    class_weight,
    ignore_index,
    background_index,
    errors,
    reduction,
    valid_pixels,
    upcast_loss,
    ranks=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, table, weights, max_weight, bounds): see lovasz_histogram_weigh.

    `ops`: the operators of a backend. `ranks`: of the batches of all of them.
    """
    n, c, p = logits.shape
    rows, length = (n, p) if per_image else (1, n * p)
    if valid_pixels is not None:
        length = valid_pixels // max(rows, 1)
    if ranks is not None:
        p, length = ranks.image, ranks.pixels
    image = n if p == 1 and not per_image and ranks is None else p  # a cloud of points is one image
    sampled = errors != Errors.HINGE and length >= SAMPLED_FROM and image >= SAMPLED_IMAGE
    batch = {
        "logits": logits, "target": target, "errors": errors, "per_image": per_image, "ignore_index": ignore_index,
        "background_index": background_index,
    }  # fmt: skip

    def count(table, segment_mask, sampled=False):
        def local():
            return ops.lovasz_histogram_count(table=table, segment_mask=segment_mask, sampled=sampled, **batch)

        if ranks is None:
            return local()
        return ranks.sum(local, (rows, c, 2, coarse_bin_count(errors) if table is None else bin_count(errors)))

    segment_mask = None if selected is None else selected.expand(rows, c).contiguous()
    counts, _ = count(None, segment_mask, sampled)
    table = ops.lovasz_histogram_allocate_bins(counts=counts, counted_table=None, errors=errors)
    del counts  # before others are allocated
    counts, max_error = count(table, segment_mask)

    def weigh():
        return ops.lovasz_histogram_weigh(
            logits=logits, counts=counts, max_error=max_error, table=table, selected=selected, present=present,
            class_weight=class_weight, errors=errors, per_image=per_image, reduction=reduction, upcast_loss=upcast_loss,
        )  # fmt: skip

    *result, needs_rebin = weigh()
    # The host does not wait for a GPU to learn whether any segment needs it: the kernels end at once where none does.
    if sampled and (needs_rebin.is_cuda or needs_rebin.any()):
        better = ops.lovasz_histogram_allocate_bins(counts=counts, counted_table=table, errors=errors)
        table = torch.where(needs_rebin[..., None], better, table)
        again, _ = count(table, needs_rebin)
        counts = torch.where(needs_rebin[..., None, None], again, counts)
        *result, _ = weigh()
    loss, scale, weights, max_weight, bounds = result
    if errors != Errors.SOFTMAX:
        # The weights of a segment add up to 1 at most, so its loss is at most 2^61 units.
        units = torch.ldexp(torch.ones_like(bounds), 61 - torch.frexp(max_error[..., 0].nan_to_num(1.0)).exponent)
        sums = ops.lovasz_histogram_sum(table=table, weights=weights, max_weight=max_weight, units=units, **batch)
        if ranks is not None:
            sums = ranks.all_reduce(sums, "sum")
        of_segments = torch.where(max_error[..., 0].isnan(), torch.nan, sums / units).reshape(scale.shape) * scale.double()
        of_segments = torch.where(scale == 0, 0.0, of_segments)
        loss = (of_segments if reduction == Reduction.NONE else of_segments.sum()).to(loss.dtype)
    return loss, scale, table, weights, max_weight, bounds
