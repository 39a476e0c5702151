"""Method "histogram" of the Lovász losses: its steps put together, in one process or over the ranks of a process group.

    count     the pixels by their errors, in the coarse bins of _layout.py: of a sample, or all of them
    place     bins for each segment: a window of errors, and in it bins where they are worth most; a table finds them
    count     all pixels in these bins
    weigh     counts to the weights of the bins, the losses, and bounds on what binning changed; where that is too much, and
              where there is no foreground, to a better table: then these segments are counted and weighed again
    sum       weight times error over the pixels, where the loss does not follow from the counts
    backward  a pixel's bin gives its weight, by look-up

The steps are operators (ops.py), implemented by csrc/cpu/lovasz and csrc/cuda/lovasz; csrc/kernels.h describes the tensors.
Only counts travel between them, so the loss of a batch that is spread over ranks takes sums of integers, and its bits do not
depend on the number of threads or ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._layout import COARSE_BINS, PAST_ONE, Errors, Reduction, bin_count

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
    upsample=None,
    ranks=None,
    count_all=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, table, weights, bounds): see lovasz_histogram_weigh.

    `ops`: the operators of a backend. `ranks`: of the batches of all of them. `count_all`: an operator that counts all pixels,
    and sums for other terms of a compound loss.
    """
    n, c = logits.shape[:2]
    p = math.prod(target.shape[1:])
    rows, length = (n, p) if per_image else (1, n * p)
    if valid_pixels is not None:
        length = valid_pixels // max(rows, 1)
    if ranks is not None:
        p, length = ranks.image, ranks.pixels
    image = n if p == 1 and not per_image and ranks is None else p  # a cloud of points is one image
    bins = bin_count(c)
    batch = {"logits": logits, "target": target, "errors": errors, "per_image": per_image, "ignore_index": ignore_index}
    batch["upsample"] = upsample
    # Counts of the three passes and their largest errors: zeros, by one launch on a GPU.
    sizes = [rows * c * size for size in (2 * COARSE_BINS, 2 * bins, 2 * bins, 1, 1, 1)]
    *all_counts, largest, _largest_of_sample, _largest_again = logits.new_zeros(sum(sizes), dtype=torch.int32).split(sizes)
    coarse, counts, recounts = (
        part.view(rows, c, 2, size) for part, size in zip(all_counts, (COARSE_BINS, bins, bins), strict=True)
    )
    largest, _largest_of_sample, _largest_again = (part.view(rows, c) for part in (largest, _largest_of_sample, _largest_again))
    all_counted = counts

    def count(counts, largest, table, segment_mask, sampled=False):
        def local():
            arguments = {
                "counts": counts, "largest": largest, "table": table, "segment_mask": segment_mask,
                "find_largest": not present or errors != Errors.SOFTMAX,
            }  # fmt: skip
            if count_all is not None and counts is all_counted:
                count_all(**arguments, **batch)
            else:
                ops.lovasz_histogram_count(**arguments, **batch, background_index=background_index, sampled=sampled)
            return counts, largest

        return local() if ranks is None else ranks.sum(local, counts.shape)

    def weigh(**again):
        return ops.lovasz_histogram_weigh(
            logits=logits.flatten(2), counts=counts, largest=largest, table=table, selected=selected, present=present,
            class_weight=class_weight, errors=errors, per_image=per_image, reduction=reduction, upcast_loss=upcast_loss,
            **again,
        )  # fmt: skip

    segment_mask = None if selected is None else selected.expand(rows, c).contiguous()
    sampled = length >= SAMPLED_FROM and image >= SAMPLED_IMAGE
    coarse, _ = count(coarse, _largest_of_sample, None, segment_mask, sampled)
    table = ops.lovasz_histogram_place(counts=coarse, counted_table=None, errors=errors, sampled=sampled, bins=bins)
    counts, largest = count(counts, largest, table, segment_mask)
    loss, scale, weights, bounds, needs_rebin, better_table = weigh(
        recounted_mask=None, recounts=None, recounted_table=None, again=logits.is_cuda
    )
    # The host does not wait for a GPU to learn whether any segment needs it: the kernels end at once where none does.
    if needs_rebin.is_cuda or needs_rebin.any():
        recounts, _ = count(recounts, _largest_again, better_table, needs_rebin)
        again = {"recounted_mask": needs_rebin, "recounts": recounts, "recounted_table": better_table}
        loss, scale, weights, bounds, _, table = weigh(**again)
    if errors != Errors.SOFTMAX:
        most = largest_errors(largest, errors)
        # The weights of a segment add up to 1 at most, so its loss is at most 2^61 units.
        units = torch.ldexp(torch.ones_like(bounds), 61 - torch.frexp(most.nan_to_num(1.0)).exponent)
        sums = ops.lovasz_histogram_sum(table=table, weights=weights, units=units, background_index=background_index, **batch)
        if ranks is not None:
            sums = ranks.all_reduce(sums, "sum")
        of_segments = torch.where(most.isnan(), torch.nan, sums / units).reshape(scale.shape) * scale.double()
        of_segments = torch.where(scale == 0, 0.0, of_segments)
        loss = (of_segments if reduction == Reduction.NONE else of_segments.sum()).to(loss.dtype)
    return loss, scale, table, weights, bounds


def largest_errors(largest: Tensor, errors: int) -> Tensor:
    """float64 at least as large as the largest error, from its key (csrc/math/bins.h); NaN where an error is."""
    key = largest.long() & 0xFFFFFFFF
    bits = torch.where(key >= 1 << 31, key - (1 << 31), (~key & 0xFFFFFFFF) - (1 << 32))
    exponent = bits.int().view(torch.float32).double()
    if errors == Errors.PROBABILITIES:
        exponent = torch.where(exponent > PAST_ONE, exponent - PAST_ONE, 0.0)
    power = torch.exp2(exponent.clamp(max=128))  # errors are added up as float32
    return torch.where(key == 0, 0.0, torch.where(key == 0xFFFFFFFF, torch.nan, power * (1 + 1e-5)))
