"""dice_loss and tversky_loss of kornia, and their modules; kornia.py tells of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._arguments import as_number, loss_dtype
from ..focal import softmax_focal_loss
from ..region import tversky_loss as _tversky
from ._focal import float32_loss, index_error_as, to_opmath
from ._kornia import check_per_class, check_pixels, keep, require
from ._region import mean_of, region_losses


def dice_loss(
    pred: Tensor,
    target: Tensor,
    average: str = "micro",
    eps: float = 1e-8,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Dice loss of each image; the mean over the images.

    Args:
        pred: logits [B, C, \\*].
        target: class indices [B, \\*].
        average: "micro", 1 - 2 I / (S + T + eps) of sums over all classes, or "macro", the mean of that of each class over the
            classes that the image's target has.
        eps: added to the denominator.
        weight: [C], factor of each class: of its sums with "micro", in the mean over classes with "macro".
        ignore_index: target value that takes no part; None for none.

    Raises:
        ValueError: the shapes or devices do not fit, or eps is negative.
        kornia's BaseError (ValueError where kornia is not imported): average, weight or the type of target is not as above.
        RuntimeError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    eps = _checked(pred, target, eps)
    require(average in ("micro", "macro"), f"average must be 'micro' or 'macro', got {average!r}")
    check_per_class("weight", weight, pred)
    if average == "macro":
        loss = _macro(pred, target, 0.5, 0.5, eps / 2, weight, ignore_index)
    elif weight is None:
        loss = _micro(pred, target, eps, ignore_index)
    else:
        loss = _weighted_micro(pred, target, eps, weight, ignore_index)
    dtype = loss_dtype(pred)
    return loss.to(dtype if weight is None else torch.promote_types(dtype, weight.dtype))


def tversky_loss(
    pred: Tensor, target: Tensor, alpha: float, beta: float, eps: float = 1e-8, ignore_index: int | None = -100
) -> Tensor:
    """Tversky loss, 1 - I / (I + alpha (S - I) + beta (T - I) + eps), of each class of each image.

    The mean over the classes that the image's target has, and then over the images.

    Args:
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.

    The other arguments, and the errors, are those of ``dice_loss``.
    """
    eps = _checked(pred, target, eps)
    return _macro(pred, target, alpha, beta, eps, None, ignore_index).to(loss_dtype(pred))


def _checked(pred: Tensor, target: Tensor, eps: float) -> float:
    if not isinstance(pred, Tensor):
        raise TypeError(f"pred must be a Tensor, got {type(pred).__name__}")
    if pred.dim() < 3:
        raise ValueError(f"Invalid pred shape: expected [B, C, *], got {list(pred.shape)}")
    check_pixels(pred, target, False)
    integers = not target.dtype.is_floating_point and target.dtype != torch.bool
    require(integers, f"target must hold class indices of an integer type, got {target.dtype}")
    return as_number("eps", eps, 0)


def _valid(target: Tensor, ignore_index: int | None) -> Tensor:
    return torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index


def _macro(
    pred: Tensor, target: Tensor, alpha: float, beta: float, eps: float, weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    options = {"alpha": alpha, "beta": beta, "smooth": (0.0, eps), "classes": "present", "per_image": True}
    options["ignore_index"] = ignore_index
    valid = _valid(target, ignore_index).flatten(1)
    with index_error_as(RuntimeError):
        if weight is None:
            with float32_loss(pred):
                loss = _tversky(pred, target, **options)
            return loss + mean_of((~valid.any(1)).to(loss.dtype))  # where nothing is valid, the loss of an image is 0 there
        losses = region_losses(pred, target, activation="softmax", **options)
    classes = pred.size(1)
    labels = target.flatten(1).long().where(valid, classes)
    present = torch.zeros(len(pred), classes + 1, dtype=torch.bool, device=pred.device).scatter_(1, labels, True)[:, :classes]
    weights = weight * present
    total = weights.sum(1)
    none = total == 0
    return mean_of(torch.where(none, 1.0, (losses * weights).sum(1) / torch.where(none, 1.0, total)))


def _micro(pred: Tensor, target: Tensor, eps: float, ignore_index: int | None) -> Tensor:
    """1 - 2 I / (2 V + eps) for V valid pixels, whose probabilities add up to V; I is a sum of exp(-cross-entropy)."""
    with index_error_as(RuntimeError), float32_loss(pred):
        entropy = softmax_focal_loss(pred, target, gamma=0.0, ignore_index=ignore_index, reduction="none")
    missed = -torch.expm1(-entropy).flatten(1).sum(1)  # 1 - p, which ignored pixels have 0 of
    count = _valid(target, ignore_index).flatten(1).sum(1).to(missed.dtype)
    return mean_of(torch.where(count == 0, 1.0, (2 * missed + eps) / torch.where(count == 0, 1.0, 2 * count + eps)))


def _weighted_micro(pred: Tensor, target: Tensor, eps: float, weight: Tensor, ignore_index: int | None) -> Tensor:
    valid = _valid(target, ignore_index).flatten(1)
    x = to_opmath(pred).flatten(2)
    p = torch.where(valid.unsqueeze(1), x, 0.0).softmax(1)
    labels = target.flatten(1).long().where(valid, 0)
    weight = weight.to(p.dtype)
    of_label = torch.where(valid, weight[labels], 0.0)
    found = (p.gather(1, labels.unsqueeze(1)).squeeze(1) * of_label).sum(1)
    mass = (torch.matmul(weight, p) * valid).sum(1) + of_label.sum(1)
    none = mass == 0
    return mean_of(1 - torch.where(none, 0.0, 2 * found / torch.where(none, 1.0, mass + eps)))


class DiceLoss(nn.Module):
    """Module of ``dice_loss``."""

    def __init__(
        self, average: str = "micro", eps: float = 1e-8, weight: Tensor | None = None, ignore_index: int | None = -100
    ) -> None:
        super().__init__()
        self.average = average
        self.eps = eps
        keep(self, "weight", weight)
        self.ignore_index = ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return dice_loss(pred, target, self.average, self.eps, self.weight, self.ignore_index)


class TverskyLoss(nn.Module):
    """Module of ``tversky_loss``."""

    def __init__(self, alpha: float, beta: float, eps: float = 1e-8, ignore_index: int | None = -100) -> None:
        super().__init__()
        self.alpha: float = alpha
        self.beta: float = beta
        self.eps: float = eps
        self.ignore_index: int | None = ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return tversky_loss(pred, target, self.alpha, self.beta, self.eps, self.ignore_index)
