"""Focal losses (Lin et al., ICCV 2017, arXiv 1708.02002): FL = -alpha_t (1 - p_t)^gamma log p_t."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import loss_dtype, opmath_dtype, widened


def sigmoid_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Binary focal loss of each logit; arguments as in ``veerloss.sigmoid_focal_loss``."""
    x = logits.to(opmath_dtype(logits))
    if target.dim() == logits.dim():
        target = widened(target)
        valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
        t = torch.where(valid, target, torch.zeros_like(target)).to(x.dtype)
    else:
        valid, labels = _valid_labels(target, ignore_index)
        t = _one_hot(labels, logits.size(1), 1).to(x.dtype)  # all 0 for background_index, which is no class
        valid = valid.unsqueeze(1).expand_as(logits)
    x = torch.where(valid, x, torch.zeros_like(x))

    bce = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x)) + (x - x).detach()  # an infinite logit: NaN
    q = torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t  # 1 - p_t, without the cancellation of 1 - p
    loss = bce * _power(q, gamma)
    if alpha is not None:
        alpha = _per_channel(alpha, x)
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    if weight is not None:
        loss = loss * _per_channel(weight, x)
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    return _reduce(loss, valid, reduction, normalizer).to(loss_dtype(logits))


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Multiclass focal loss of each pixel; arguments as in ``veerloss.softmax_focal_loss``."""
    class_dim = 1 if logits.dim() > 1 else 0
    x = logits.to(opmath_dtype(logits))
    probabilities = target.dim() == logits.dim()
    if probabilities:
        valid = torch.ones_like(target.select(class_dim, 0), dtype=torch.bool)
    else:
        valid, labels = _valid_labels(target, ignore_index)
    x = torch.where(valid.unsqueeze(class_dim), x, torch.zeros_like(x))
    log_p = F.log_softmax(x, class_dim)

    if label_smoothing == 0 and not probabilities:
        labels = labels.unsqueeze(class_dim)
        log_p_t = log_p.gather(class_dim, labels).squeeze(class_dim)
        others = log_p.exp().scatter(class_dim, labels, 0.0)
        loss = -_power(others.sum(class_dim), gamma) * log_p_t
        if alpha is not None:
            a = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
            loss = loss * (a[labels.squeeze(class_dim)] if a.dim() else a)
    else:
        classes = x.size(class_dim)
        t = (target if probabilities else _one_hot(labels, classes, class_dim)).to(x.dtype)
        t = t * (1 - label_smoothing) + label_smoothing / classes
        if alpha is not None:
            t = t * _per_channel(alpha, x, class_dim)
        q = -torch.expm1(log_p)
        absent = (t == 0) & (log_p == -torch.inf)  # masked out, and no part of the target
        loss = -(t * _power(q, gamma) * torch.where(absent, torch.zeros_like(log_p), log_p)).sum(class_dim)
    if weight is not None:
        loss = loss * weight.to(x.dtype)
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    return _reduce(loss, valid, reduction, normalizer).to(loss_dtype(logits))


def _valid_labels(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Which pixels count, and int64 class indices with 0 in place of the ignored ones."""
    labels = target.long()
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    return valid, torch.where(valid, labels, torch.zeros_like(labels))


def _one_hot(labels: Tensor, classes: int, class_dim: int) -> Tensor:
    """Bool. (F.one_hot looks at the values of the labels, which vmap of a gradient has none of.)"""
    return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).movedim(-1, class_dim)


def _power(q: Tensor, gamma: float) -> Tensor:
    """q^gamma for q in [0, 1], with finite derivatives at q = 0."""
    if gamma == 0:
        return torch.ones_like(q)
    return torch.exp(gamma * torch.log(q.clamp_min(torch.finfo(q.dtype).tiny)))


def _per_channel(value: float | Tensor, x: Tensor, class_dim: int = 1) -> Tensor:
    """A number, one value per channel, or a tensor that broadcasts as it is: in a shape that broadcasts to x."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    if value.dim() == 1 and x.dim() != 1:
        return value.reshape([-1 if d == class_dim else 1 for d in range(x.dim())])
    return value


def _reduce(loss: Tensor, valid: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if normalizer is None:
        return loss.sum() / valid.sum().clamp_min(1)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    return torch.where(valid.any(), loss.sum() / normalizer, loss.sum())
