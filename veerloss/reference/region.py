"""Region losses: functions of the Tversky index of a segment (Salehi, Erdogmus, Gholipour, MLMI 2017, arXiv 1706.05721)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import loss_dtype, opmath_dtype, widened
from .._layout import LEAST_INDEX, Activation, Form
from .lovasz import AllReduce, _alone, reduce_segments, select_segments


def index_of(sums: Tensor, alpha: float, beta: float, smooth: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The Tversky index TI and 1 - TI, of segments.

    Args:
        sums: [3, ...] float64: I = sum p t, S = sum p (of squares with ``squared``), T = sum t (the same).
        alpha, beta: weights of false positives S - I and of false negatives T - I.
        smooth: added to numerator and denominator.

    Returns:
        TI = (I + smooth[0]) / D and, with its digits where TI is near 1, 1 - TI, for
        D = I + alpha (S - I) + beta (T - I) + smooth[1]. Where D is 0 there is nothing to be found, and nothing was: TI is 1.
    """
    i, s, t = sums
    missed = alpha * (s - i) + beta * (t - i)
    whole = i + missed + smooth[1]
    empty = whole == 0
    whole = torch.where(empty, 1.0, whole)
    index = torch.where(empty, 1.0, (i + smooth[0]) / whole)
    return index, torch.where(empty, 0.0, (missed + (smooth[1] - smooth[0])) / whole)


def loss_of(index: Tensor, rest: Tensor, form: Form, exponent: float) -> Tensor:
    """From the index and ``rest`` = 1 - index: the loss of a segment. Where the base of a power is 0, its gradient is 0."""
    if form == Form.LOG_COSH:
        return torch.log1p(2 * torch.sinh(rest / 2) ** 2)  # log cosh, with its digits where it is small
    base = rest if form == Form.LINEAR else -torch.log(index.clamp(min=LEAST_INDEX))
    if exponent == 1:
        return base
    above = base > 0
    return torch.where(above, torch.where(above, base, 1.0) ** exponent, 0.0 * base)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    smooth: Sequence[float],
    squared: bool,
    form: Form,
    exponent: float,
    activation: Activation,
    classes: str | Sequence[int] = "all",
    present_only: bool = False,
    per_image: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    reduction: str = "mean",
    all_reduce: AllReduce = _alone,
) -> Tensor:
    """Region losses; arguments as in ``veerloss.tversky_loss``, ``smooth`` beside I. Sums are float64."""
    n, c = logits.shape[:2]
    x = logits.to(opmath_dtype(logits)).reshape(n, c, -1 if logits.numel() else 0)
    dense = target.dim() == logits.dim()
    labels = widened(target).reshape(n, c if dense else 1, x.size(2))
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    if dense:
        t = torch.where(valid, labels, torch.zeros_like(labels)).double()
    else:
        first = int(c == 1 and activation != Activation.SOFTMAX and background_index is None)  # 1: the label of a mask
        t = ((labels == torch.arange(first, first + c, device=x.device)[:, None]) & valid).double()
    valid = valid.expand_as(t)
    x = torch.where(valid, x, torch.zeros_like(x))
    p = {Activation.SOFTMAX: lambda: x.softmax(1), Activation.SIGMOID: x.sigmoid, Activation.NONE: lambda: x}[activation]()
    p = torch.where(valid, p.double(), 0.0)
    sums = torch.stack([p * t, p * p if squared else p, t * t if squared else t])
    sums, counts = sums.sum(-1), torch.stack([valid.sum(-1), (t > 0).sum(-1)])
    if not per_image:
        sums, counts = sums.sum(1, keepdim=True), counts.sum(1, keepdim=True)
    sums = sums + (all_reduce(sums.detach(), "sum") - sums.detach())
    has_valid, has_target = all_reduce(counts, "sum") > 0
    values = loss_of(*index_of(sums, alpha, beta, smooth), form, exponent)
    selected = select_segments(has_valid, has_target, classes, present_only)
    loss = reduce_segments(values, selected, class_weight, per_image, reduction)
    return loss.to(loss_dtype(logits))
