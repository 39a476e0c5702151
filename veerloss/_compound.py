"""Compound losses: their steps put together, in one process or over the ranks of a process group.

    sum       for a focal and a region loss, in the pass that counts (Lovász, "histogram"), makes keys ("exact"), or alone
    weigh     the sums and the counts to the terms, and to what a pixel needs of them: one factor of its focal slope, and for
              the region loss two numbers of its segment, which the weights that Lovász looks up have added to them
    backward  the weights to the gradient of the logits, as for Lovász alone; the focal slope joins on the way

Terms are absent where their weight is None.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _histogram
from ._arguments import opmath_dtype, per_segment_shape
from ._layout import REGION_WORDS, Errors, Reduction


def forward(
    ops,
    *,
    logits,
    target,
    focal,
    lovasz,
    region,
    alpha,
    class_alpha,
    gamma,
    label_smoothing,
    weighted_mean,
    selected,
    present,
    region_selected,
    region_present,
    region_alpha,
    region_beta,
    smooth_numerator,
    smooth_denominator,
    form,
    exponent,
    errors,
    histogram,
    per_image,
    ignore_index,
    valid_pixels,
    keep_weights,
    upcast_loss,
    upsample=None,
    ranks=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scale, focal_scale, region_weights, table, weights, parts): what compound_backward takes, and the terms that there
    are, focal, Lovász, region.

    `ops`: the operators of a backend. `ranks`: of the batches of all of them. Operations on numbers are few: each is a launch
    on a GPU.
    """
    n, c = logits.shape[:2]
    rows, dtype = n if per_image else 1, opmath_dtype(logits)
    focal_sums = None if focal is None else logits.new_zeros(3, dtype=torch.float64)
    region_sums = None if region is None else logits.new_zeros((rows, c, REGION_WORDS), dtype=torch.int64)
    sums = {"focal_sums": focal_sums, "region_sums": region_sums}
    options = {"alpha": alpha, "class_alpha": class_alpha, "gamma": gamma, "label_smoothing": label_smoothing}
    batch = {"logits": logits, "target": target, "errors": errors, "per_image": per_image, "ignore_index": ignore_index}
    batch["upsample"] = upsample
    table, weights = logits.new_empty((0,), dtype=torch.float32), logits.new_empty((0,), dtype=dtype)
    focal_scale, region_weights = torch.empty_like(weights), torch.empty_like(weights)  # where there is no such term
    parts = []

    if lovasz is None:

        def local() -> Tensor:
            ops.compound_sum(**sums, **options, **batch)
            return logits.new_zeros(1, dtype=torch.int64)

        local() if ranks is None else ranks.sum_of(local, (1,))
    elif histogram:
        value, of_segments, table, weights, _ = _histogram.forward(
            ops, **batch, selected=selected, present=present, class_weight=None, background_index=None,
            reduction=Reduction.MEAN, valid_pixels=valid_pixels, upcast_loss=True, ranks=ranks,
            count_all=functools.partial(ops.compound_count, **sums, **options),
        )  # fmt: skip
    else:
        value, of_segments, weights = ops.compound_exact(
            **sums, **options, **batch, selected=selected, present=present, valid_pixels=valid_pixels, keep_weights=keep_weights
        )
    if focal_sums is not None:
        totals = focal_sums if ranks is None else ranks.all_reduce(focal_sums, "sum")
        divisor = totals[2 if weighted_mean else 1]
        of_pixel = torch.where(divisor > 0, 1 / divisor, 0.0)
        parts.append(totals[0] * of_pixel)
        focal_scale = (of_pixel * focal).to(dtype)
    if lovasz is None:
        scale = logits.new_ones(per_segment_shape(logits, errors, per_image), dtype=dtype)
    else:
        parts.append(value)
        scale = of_segments * lovasz
    if region_sums is not None:
        found = region_sums if ranks is None else ranks.sum_of(lambda: region_sums, region_sums.shape)
        value, of_segments, coefficients = ops.region_weigh(
            logits=logits.flatten(2), sums=found, selected=region_selected, present=region_present, per_image=per_image,
            class_weight=None, alpha=region_alpha, beta=region_beta, smooth_numerator=smooth_numerator,
            smooth_denominator=smooth_denominator, form=form, exponent=exponent, reduction=Reduction.MEAN, upcast_loss=True,
        )  # fmt: skip
        parts.append(value)
        # dL/dp of foreground and background
        pairs = torch.stack([coefficients.sum(-1), coefficients[..., 1]], -1)
        region_weights = (pairs * (of_segments.double() * region).view(rows, c, 1)).to(dtype)
    if lovasz is not None and histogram and errors == Errors.SOFTMAX:
        weights *= scale.view(rows, c, 1, 1)
        if region is not None:
            weights += region_weights.flip(-1)[..., None]
        scale = torch.ones_like(scale)

    given = [weight for weight in (focal, lovasz, region) if weight is not None]
    loss = sum(weight * part.double() for weight, part in zip(given, parts, strict=True))
    of_terms = torch.stack([part.to(dtype) for part in parts])
    return loss.to(dtype if upcast_loss else logits.dtype), scale, focal_scale, region_weights, table, weights, of_terms
