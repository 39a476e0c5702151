"""Lovász losses (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790) with weights in closed form from integer counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._arguments import loss_dtype, opmath_dtype, widened
from .._layout import Errors, bin_count
from . import histogram

AllReduce = Callable[[Tensor, str], Tensor]


def _alone(values: Tensor, op: str) -> Tensor:
    """The all-reduce of a single process."""
    return values


def lovasz_weights(errors: Tensor, foreground: Tensor, valid: Tensor) -> Tensor:
    """The weight of each pixel: the step that it makes in the Jaccard loss, in descending order of errors.

    Args:
        errors: [..., P] float, >= 0. Equal errors rank in the order of their pixels.
        foreground: [..., P] bool.
        valid: [..., P] bool; other pixels take no part.

    Returns:
        [..., P], the type of ``errors``; sums to 1 in every segment with a valid pixel. With F, B the foreground and
        background pixels before a pixel and G all foreground pixels, the Jaccard loss 1 - (G - F) / (G + B) steps by
        1 / (G + B) at a foreground pixel and by (G - F) / ((G + B)(G + B + 1)) at a background pixel. Where G = 0 the
        first pixel takes it from 0 to 1.
    """
    ranked = torch.where(valid, errors.detach(), errors.new_tensor(-1.0))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    fg = (foreground & valid).gather(-1, order).long()
    bg = (~foreground & valid).gather(-1, order).long()
    total = fg.sum(-1, keepdim=True)
    fg_before = fg.cumsum(-1) - fg
    union = (total + bg.cumsum(-1) - bg).double()
    at_fg = 1 / union
    at_bg = (total - fg_before) / (union * (union + 1))
    first = (torch.arange(errors.size(-1), device=errors.device) == 0).double()
    weights = torch.where(total > 0, torch.where(fg == 1, at_fg, at_bg), first)
    weights = torch.where((fg + bg) == 1, weights, torch.zeros_like(weights)).to(errors.dtype)
    return torch.zeros_like(errors).scatter(-1, order, weights)


def select_segments(has_valid: Tensor, has_target: Tensor, classes: str | Sequence[int], present_only: bool) -> Tensor:
    """[N or 1, C] bool: which classes take part, from whether they have valid pixels, and target pixels among them."""
    selected = has_valid
    if classes == "present" or (present_only and classes != "all"):
        selected = selected & has_target
    if not isinstance(classes, str):
        ids = torch.as_tensor(list(classes), device=selected.device)
        selected = selected & (torch.arange(selected.size(1), device=selected.device)[:, None] == ids).any(-1)
    return selected


def reduce_segments(values: Tensor, selected: Tensor, class_weight: Tensor | None, per_image: bool, reduction: str) -> Tensor:
    """From the losses of segments [N or 1, C] to that of the batch; "mean" over the classes that take part, then the images."""
    if class_weight is not None:
        values = values * class_weight.to(values)
    values = torch.where(selected, values, torch.zeros_like(values))
    if reduction == "none":
        return values if per_image else values[0]
    if reduction == "sum":
        return values.sum()
    per_row = values.sum(1) / selected.sum(1).clamp_min(1)
    return per_row.sum() / max(per_row.numel(), 1)


def lovasz_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    classes: str | Sequence[int] = "present",
    present_only: bool = False,
    per_image: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    from_logits: bool = True,
    reduction: str = "mean",
    method: str = "exact",
    all_reduce: AllReduce = _alone,
) -> tuple[Tensor, Tensor]:
    """Lovász-Softmax and its certificate; arguments as in ``veerloss.lovasz_softmax_loss``."""
    n, c = logits.shape[:2]
    x = logits.to(opmath_dtype(logits)).reshape(n, c, -1 if logits.numel() else 0)
    labels = target.long().reshape(n, 1, x.size(2))
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    foreground = (labels == torch.arange(c, device=x.device)[:, None]) & valid
    x = torch.where(valid, x, torch.zeros_like(x))
    if from_logits:
        p = x.softmax(1)
        others = torch.where(foreground, torch.zeros_like(p), p).sum(1, keepdim=True)
        errors = torch.where(foreground, others, p) + (p - p).detach()  # NaN also where there are no others
    else:
        errors = (foreground.to(x.dtype) - x).abs() + (x - x).detach()
    valid = valid.expand_as(errors)
    segments = _segments(errors, foreground, valid, per_image)
    has_foreground, has_valid = all_reduce(torch.stack([t.sum(-1) for t in segments[1:]]), "sum") > 0
    selected = select_segments(has_valid, has_foreground, classes, present_only)
    kind = Errors.SOFTMAX if from_logits else Errors.PROBABILITIES
    values, bounds = _values(*segments, method, kind, all_reduce)
    loss = reduce_segments(values, selected, class_weight, per_image, reduction)
    bounds = torch.where(selected, bounds, torch.zeros_like(bounds))
    return loss.to(loss_dtype(logits)), bounds if per_image else bounds[0]


def lovasz_hinge_loss(
    logits: Tensor,
    target: Tensor,
    *,
    per_image: bool = True,
    ignore_index: int | None = None,
    reduction: str = "mean",
    method: str = "exact",
    all_reduce: AllReduce = _alone,
) -> tuple[Tensor, Tensor]:
    """Binary Lovász hinge and its certificate; arguments as in ``veerloss.lovasz_hinge_loss``."""
    n = logits.size(0)
    x = logits.to(opmath_dtype(logits)).reshape(n, 1, -1 if logits.numel() else 0)
    labels = widened(target).reshape(n, 1, x.size(2))
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    foreground = (labels == 1) & valid
    x = torch.where(valid, x, torch.zeros_like(x))
    sign = torch.where(foreground, 1.0, -1.0).to(x.dtype)
    errors = torch.relu(1 - sign * x) + (x - x).detach()  # an infinite logit: NaN
    segments = _segments(errors, foreground, valid, per_image)
    values, bounds = _values(*segments, method, Errors.HINGE, all_reduce)
    values, bounds = values[:, 0], bounds[:, 0]
    if reduction == "none":
        loss = values if per_image else values[0]
    elif reduction == "sum":
        loss = values.sum()
    else:
        loss = values.sum() / max(values.numel(), 1)
    return loss.to(loss_dtype(logits)), bounds if per_image else bounds[0]


def _segments(errors: Tensor, foreground: Tensor, valid: Tensor, per_image: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C, P] as segments: the same, or [1, C, N * P]."""
    if per_image:
        return errors, foreground, valid
    errors, foreground, valid = (
        t.transpose(0, 1).reshape(1, t.size(1), -1) if t.numel() else t.reshape(1, t.size(1), 0)
        for t in (errors, foreground, valid)
    )
    return errors, foreground, valid


def _values(
    errors: Tensor, foreground: Tensor, valid: Tensor, method: str, kind: Errors, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """Of segments [N, C, P]: losses and certificates [N, C]."""
    used = torch.where(valid, errors, torch.zeros_like(errors))
    if method == "exact":
        values = (lovasz_weights(errors, foreground, valid) * used).sum(-1)
        return values, torch.zeros_like(values, dtype=torch.float64)
    values, bounds = used.sum(-1), torch.zeros(used.shape[:2], dtype=torch.float64, device=used.device)
    for n, c in torch.cartesian_prod(*(torch.arange(size) for size in bounds.shape)).tolist():
        e, inside = errors[n, c], valid[n, c]
        weights, loss, bounds[n, c] = histogram.segment(
            e[inside].detach(), foreground[n, c][inside], kind, bin_count(errors.size(1)), all_reduce
        )
        weighted = (weights.to(e.dtype) * e[inside]).sum()
        values[n, c] = weighted + (loss - weighted).detach()  # the loss by the counts, the gradient by the weights
    return values, bounds
