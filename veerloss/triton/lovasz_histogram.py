"""Lovász losses as Triton kernels, method "histogram": the operators of its steps, which ../_histogram.py puts together.

count          a pass over the pixels (_histogram_pixels.py): errors into the bins of a table, or into cells
allocate_bins  bins (_histogram_bins.py): from the counts to the number of bins that each cell gets
weigh          bins: counts to the weights of their pixels, the losses, and the bounds
sum            a pass over the pixels: weight times error
backward       a pass over the pixels: a pixel's bin gives its weight, by look-up
"""

import torch
from torch import Tensor

from .. import _layout
from .._arguments import opmath_dtype
from .._layout import Errors, bin_count, cell_count, coarse_bin_count
from . import _tuning
from ._histogram_bins import lovasz_histogram_allocate_bins_kernel, lovasz_histogram_weigh_kernel
from ._histogram_pixels import (
    lovasz_histogram_backward_kernel,
    lovasz_histogram_count_kernel,
    lovasz_histogram_max_error_kernel,
    lovasz_histogram_sum_kernel,
)
from ._launch import as_bytes, check, check_data, check_logits, next_power_of_2, on_device, opmath_t
from ._lovasz import Tiles, reduce_segments


def lovasz_histogram_count(
    *, logits, target, table, segment_mask, errors, per_image, ignore_index, background_index, sampled
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(counts [rows, C, 2, bins] of background and foreground, max_error [rows, C, 2]: the largest error (-1: no pixel; NaN: an
    error that is none, or a bad target), and how many pixels have it)"""
    t = Tiles(logits, errors, per_image, sampled=sampled)
    target_arguments = t.target(target, ignore_index, background_index)
    shape = (t.rows, logits.shape[1])
    check_data("table", table, logits, (*shape, cell_count(errors)), torch.int32)
    check_data("segment_mask", segment_mask, logits, shape, torch.bool, torch.uint8)
    bins = coarse_bin_count(errors) if table is None else bin_count(errors)
    counts = logits.new_zeros((*shape, 2, bins), dtype=torch.int32)
    max_error = logits.new_empty((*shape, 2), dtype=torch.float64)
    if t.programs == 0:
        max_error[..., 0], max_error[..., 1] = -1, 0
        return counts, max_error
    max_error_bits, max_error_counts = logits.new_empty((2, shape[1], t.programs), dtype=torch.int32)
    segment_mask = as_bytes(segment_mask)
    with on_device(logits):
        lovasz_histogram_count_kernel[(t.programs,)](
            **t.arguments, **target_arguments, table=table, segment_mask=segment_mask, counts=counts,
            max_error_bits=max_error_bits, max_error_counts=max_error_counts, PER_IMAGE=per_image, SAMPLED=sampled,
            CELLS=cell_count(errors), BINS=bins, BLOCK_MASK=next_power_of_2(shape[1]),
        )  # fmt: skip
        per_row = t.programs // t.rows
        lovasz_histogram_max_error_kernel[(t.rows * shape[1],)](
            max_error_bits=max_error_bits, max_error_counts=max_error_counts, segment_mask=segment_mask, max_errors=max_error,
            programs=t.programs, per_row=per_row, classes=shape[1], BLOCK=min(next_power_of_2(per_row), _tuning.MAX_ERROR_STEP),
        )  # fmt: skip
    return counts, max_error


def lovasz_histogram_allocate_bins(*, counts, counted_table, errors) -> Tensor:
    """A table from the counts of the cells, or of the bins of another table."""
    cells, bins = cell_count(errors), bin_count(errors)
    counted = coarse_bin_count(errors) if counted_table is None else bins
    check(counts.dim() == 4 and counts.shape[2:] == (2, counted), "counts", counts, f"[rows, C, 2, {counted}]")
    check(counts.dtype in (torch.int32, torch.int64), "counts", counts, "int32 or int64")
    rows, classes = counts.shape[:2]
    check_data("counted_table", counted_table, counts, (rows, classes, cells), torch.int32)
    table = counts.new_empty((rows, classes, cells), dtype=torch.int32)
    if table.numel() == 0:
        return table
    with on_device(counts):
        if counted_table is not None:
            counts = counts_of_cells(counts, counted_table.view_as(table), bins)
        lovasz_histogram_allocate_bins_kernel[(rows * classes,)](
            counts=counts.contiguous(), table=table, BOUNDED=errors == Errors.SOFTMAX, CELLS=cells,
            BLOCK=next_power_of_2(cells), num_warps=_tuning.ALLOCATE_WARPS,
        )  # fmt: skip
    return table


def counts_of_cells(counts: Tensor, table: Tensor, bins: int) -> Tensor:
    """As a coarse pass has them, from the counts of the bins that a table gives to the cells."""
    up_to = counts.cumsum(-1, dtype=torch.int64)
    first = _layout.entry_first_bin(table).long()
    edges = (first, first + _layout.entry_bins(table))
    before, last = ((edge.clamp(1, bins) - 1)[:, :, None].expand(-1, -1, 2, -1) for edge in edges)
    return torch.cat([counts[..., :1].long(), up_to.gather(-1, last) - up_to.gather(-1, before)], -1)


def lovasz_histogram_weigh(
    *, logits, counts, max_error, table, selected, present, class_weight, errors, per_image, reduction, upcast_loss
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, weights [rows, C, 2, bins], max_weight [rows, C, 2], bounds [rows, C], needs_rebin [rows, C])

    A segment without foreground has its whole weight on its largest error: max_weight holds that error, and the weight of each
    pixel that has it; 0 of other segments.
    """
    check_logits(logits)
    shape = (logits.size(0) if per_image else 1, logits.size(1))
    cells, bins = cell_count(errors), bin_count(errors)
    check_data("counts", counts, logits, (*shape, 2, bins), torch.int32, torch.int64)
    check_data("max_error", max_error, logits, (*shape, 2), torch.float64)
    check_data("table", table, logits, (*shape, cells), torch.int32)
    check_data("selected", selected, logits, shape[1:], torch.bool, torch.uint8)
    dtype = opmath_dtype(logits)
    weights = logits.new_zeros((*shape, 2, bins), dtype=dtype)
    max_weight = logits.new_zeros((*shape, 2), dtype=dtype)
    losses, bounds = (logits.new_zeros(shape, dtype=torch.float64) for _ in range(2))
    deviations = logits.new_zeros((2, *shape), dtype=torch.float64)
    takes_part = logits.new_zeros(shape, dtype=torch.int8)
    if takes_part.numel() > 0:
        with on_device(logits):
            lovasz_histogram_weigh_kernel[(takes_part.numel(),)](
                counts=counts, max_errors=max_error, table=table, selected=as_bytes(selected), weights=weights,
                max_weights=max_weight, losses=losses, bounds=bounds, deviations=deviations, takes_part=takes_part,
                classes=shape[1], T=opmath_t(logits), BOUNDED=errors == Errors.SOFTMAX, PRESENT=present, CELLS=cells, BINS=bins,
                BLOCK=_tuning.WEIGH_STEP, num_warps=_tuning.WEIGH_WARPS,
            )  # fmt: skip
    # The losses of classes err independently: a mean of m has 1 / sqrt(m) of their error.
    loss_tolerance = _layout.LOSS_TOLERANCE * takes_part.sum(1, keepdim=True).double().sqrt()
    needs_rebin = (deviations[0] > _layout.GRADIENT_TOLERANCE) | (deviations[1] > loss_tolerance)
    loss, scale = reduce_segments(logits, losses, takes_part, class_weight, errors, per_image, reduction, upcast_loss)
    return loss, scale, weights, max_weight, bounds, needs_rebin


def look_up_arguments(t: Tiles, table: Tensor, weights: Tensor, max_weight: Tensor) -> dict:
    """Of a kernel that looks up the weights of pixels."""
    logits, cells, bins = t.logits, cell_count(t.errors), bin_count(t.errors)
    shape = (t.rows, logits.shape[1])
    check_data("table", table, logits, (*shape, cells), torch.int32)
    check_data("weights", weights, logits, (*shape, 2, bins), opmath_dtype(logits))
    check_data("max_weight", max_weight, logits, (*shape, 2), opmath_dtype(logits))
    return {"table": table, "weights": weights, "max_weights": max_weight, "CELLS": cells, "BINS": bins}


def lovasz_histogram_sum(
    *, logits, target, table, weights, max_weight, units, errors, per_image, ignore_index, background_index
) -> Tensor:  # fmt: skip
    """Sums of weight times error, [rows, C] int64 in whole numbers of 1 / units."""
    if errors == Errors.SOFTMAX:
        raise ValueError(f"veerloss: errors must be 1 (probabilities) or 2 (hinge): not softmax, got {errors}")
    t = Tiles(logits, errors, per_image)
    arguments = (
        t.arguments | t.target(target, ignore_index, background_index) | look_up_arguments(t, table, weights, max_weight)
    )
    shape = (t.rows, logits.shape[1])
    check_data("units", units, logits, shape, torch.float64)
    sums = logits.new_zeros(shape, dtype=torch.int64)
    if t.programs > 0:
        with on_device(logits):
            lovasz_histogram_sum_kernel[(t.programs,)](**arguments, units=units, sums=sums, PER_IMAGE=per_image)
    return sums


def lovasz_histogram_backward(
    *, grad, logits, target, table, weights, max_weight, scale, errors, per_image, ignore_index, background_index, reduction
) -> Tensor:
    t = Tiles(logits, errors, per_image)
    arguments = (
        t.arguments | t.target(target, ignore_index, background_index) | look_up_arguments(t, table, weights, max_weight)
    )
    grad_logits, gradient_arguments = t.gradient(grad, scale, reduction)
    if t.programs > 0:
        with on_device(logits):
            lovasz_histogram_backward_kernel[(t.programs,)](**arguments, **gradient_arguments, PER_IMAGE=per_image)
    return grad_logits
