"""``kornia.losses``: focal_loss, binary_focal_loss_with_logits, lovasz_softmax_loss, lovasz_hinge_loss, dice_loss and
tversky_loss; their modules.

The Lovász losses have kornia's values: each image by itself, all classes, present or not. Different on purpose:

- the gradient keeps its digits on large images (and before kornia 0.9 the labels were sorted, not the class);
- volumes, [B, C, P] and labels of any integer type work; a binary label that is not 0 or 1 is an error, where kornia goes on,
  to a negative loss for -100; no image in the batch: 0, on which kornia fails.

One call of the kernel; a function or module compiled by ``torch.jit.script`` is plain PyTorch.

Most of these lines are kornia's signatures and what differs from them; one module, because kornia has one.

The focal losses have kornia's values: class 0 of the softmax has 1 - alpha and the others alpha; "mean" divides by every
element of [B, C, \\*], ignored ones included; a soft binary target t has t times the loss of a positive and 1 - t times that
of a negative. Errors are kornia's where kornia is imported. Different on purpose:

- a NaN or infinite logit of an ignored pixel is ignored too, in the binary loss as well;
- "mean" of no elements is 0, not NaN;
- alpha outside [0, 1], a negative gamma and a binary target outside [0, 1] are errors.

One call of the kernel: class indices, and binary targets of 0 and 1. Those of a float type are read to find out whether they
are, which waits for a GPU; torch.compile takes the plain formula for them, and fuses it. Slower, in plain PyTorch: soft binary
targets; a weight that requires a gradient; a function or module compiled by ``torch.jit.script``.

dice_loss and tversky_loss have kornia's values, of each image by itself: "micro" is one Dice coefficient of all classes,
"macro" the mean over the classes that the image's target has; an image without a valid pixel counts as a loss of 1. Different
on purpose:

- sums are exact; volumes, [B, C, P] and labels of any integer type work; no image in the batch: 0, not NaN;
- a NaN or infinite logit of an ignored pixel is ignored too;
- a negative eps, alpha or beta is an error.

One call of the kernel: "macro" and Tversky; "micro" without a weight, whose intersection comes from softmax_focal_loss with
gamma 0, and takes tensors of the size of the labels. "macro" with a weight reads the labels once more, for the classes that are
there. Slower, in plain PyTorch: "micro" with a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import REDUCTIONS, opmath_dtype
from ..focal import sigmoid_focal_loss as _sigmoid
from ..focal import softmax_focal_loss as _softmax
from ..lovasz import lovasz_hinge_loss as _hinge
from ..lovasz import lovasz_softmax_loss as _lovasz
from ._focal import index_error_as, is_hard, positive_and_negative, power, to_opmath
from ._kornia import check_per_class, check_pixels, keep, require
from ._kornia_region import DiceLoss, TverskyLoss, dice_loss, tversky_loss

PEER = "kornia"
DISTRIBUTION = "kornia"
VERSIONS = ">=0.9,<0.10"
REPLACES = {
    "kornia.losses.focal:focal_loss": "focal_loss",
    "kornia.losses.focal:FocalLoss": "FocalLoss",
    "kornia.losses.focal:binary_focal_loss_with_logits": "binary_focal_loss_with_logits",
    "kornia.losses.focal:BinaryFocalLossWithLogits": "BinaryFocalLossWithLogits",
    "kornia.losses.dice:dice_loss": "dice_loss",
    "kornia.losses.dice:DiceLoss": "DiceLoss",
    "kornia.losses.tversky:tversky_loss": "tversky_loss",
    "kornia.losses.tversky:TverskyLoss": "TverskyLoss",
    "kornia.losses.lovasz_softmax:lovasz_softmax_loss": "lovasz_softmax_loss",
    "kornia.losses.lovasz_softmax:LovaszSoftmaxLoss": "LovaszSoftmaxLoss",
    "kornia.losses.lovasz_hinge:lovasz_hinge_loss": "lovasz_hinge_loss",
    "kornia.losses.lovasz_hinge:LovaszHingeLoss": "LovaszHingeLoss",
}

__all__ = [
    "BinaryFocalLossWithLogits",
    "DiceLoss",
    "FocalLoss",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "TverskyLoss",
    "binary_focal_loss_with_logits",
    "dice_loss",
    "focal_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "tversky_loss",
]


def focal_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float | None,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Multiclass focal loss of each pixel.

    Args:
        pred: logits [B, C, \\*].
        target: class indices [B, \\*], int64.
        alpha: weight in [0, 1] of the classes from 1 on; class 0 has 1 - alpha. None: 1 for all.
        gamma: focusing exponent, >= 0.
        reduction: "none" ([B, C, \\*], the pixel's loss at its class, 0 at the others), "mean" (over all elements of that,
            ignored ones included) or "sum".
        weight: [C], factor of each class.
        ignore_index: target value whose loss is 0; None for none.

    Raises:
        kornia's BaseError (ValueError where kornia is not imported): a shape, type or device is not as above.
        NotImplementedError: unknown reduction.
        ValueError: alpha or gamma is out of range.
        RuntimeError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    if not torch.jit.is_scripting():
        _check(pred, target, reduction)
        expected = pred.shape[:1] + pred.shape[2:]
        require(target.shape == expected, f"target must have the shape {list(expected)}, got {list(target.shape)}")
        require(target.dtype == torch.int64, f"target must hold class indices as int64, got {target.dtype}")
        check_per_class("weight", weight, pred)
        if weight is None or not weight.requires_grad:
            return _focal_loss(pred, target, alpha, gamma, reduction, weight, ignore_index)
    return _plain_focal_loss(pred, target, alpha, gamma, reduction, weight, ignore_index)


def _focal_loss(pred, target, alpha, gamma, reduction, weight, ignore_index):
    classes = pred.size(1)
    factor = None
    if alpha is not None:
        alpha = float(alpha)  # of a tensor kornia takes the value, too
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        factor = pred.new_full((classes,), alpha, dtype=opmath_dtype(pred))
        factor[0] = 1 - alpha
    if weight is not None:
        factor = weight if factor is None else factor * weight
    with index_error_as(RuntimeError):
        loss = _softmax(
            pred, target, alpha=factor, gamma=gamma, ignore_index=ignore_index, reduction=reduction,
            normalizer=max(classes * target.numel(), 1) if reduction == "mean" else None,
        )  # fmt: skip
    if reduction != "none":
        return loss
    place = target if ignore_index is None else target.where(target != ignore_index, target.new_zeros(()))
    return torch.zeros_like(pred, dtype=loss.dtype).scatter_(1, place.unsqueeze(1), loss.unsqueeze(1))


def _plain_focal_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float | None,
    gamma: float,
    reduction: str,
    weight: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    labels = torch.where(valid, target, torch.zeros_like(target))
    log_p = F.log_softmax(to_opmath(pred), 1).gather(1, labels.unsqueeze(1))
    loss = -power(-torch.expm1(log_p), gamma) * log_p
    if alpha is not None:
        loss = loss * torch.where(labels == 0, loss.new_full([], 1 - alpha), loss.new_full([], alpha)).unsqueeze(1)
    if weight is not None:
        loss = loss * weight[labels].unsqueeze(1)
    loss = torch.where(valid.unsqueeze(1), loss, torch.zeros_like(loss))
    if reduction == "none":
        loss = torch.zeros_like(pred, dtype=loss.dtype).scatter(1, labels.unsqueeze(1), loss)
    elif reduction == "mean":
        loss = loss.sum() / max(pred.numel(), 1)
    elif reduction == "sum":
        loss = loss.sum()
    else:
        raise NotImplementedError(f"Invalid reduction mode: {reduction}")
    return loss.to(pred.dtype)


class FocalLoss(nn.Module):
    """Module of ``focal_loss``."""

    def __init__(
        self,
        alpha: float | None,
        gamma: float = 2.0,
        reduction: str = "none",
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.alpha: float | None = alpha
        self.gamma: float = gamma
        self.reduction: str = reduction
        keep(self, "weight", weight)
        self.ignore_index: int | None = ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return focal_loss(pred, target, self.alpha, self.gamma, self.reduction, self.weight, self.ignore_index)


def binary_focal_loss_with_logits(
    pred: Tensor,
    target: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    pos_weight: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
) -> Tensor:
    """Focal loss of each logit.

    Args:
        pred: logits [B, C, \\*].
        target: the shape of ``pred``, in [0, 1]. A value t in between has t times the loss of a positive and 1 - t times
            that of a negative.
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives. None: 1 for both.
        gamma: focusing exponent, >= 0.
        reduction: "none", "mean" (over all elements, ignored ones included) or "sum".
        pos_weight: [C], factor of the positives of each channel.
        weight: [C], factor of each channel.
        ignore_index: target value whose loss is 0; None for none.

    Raises:
        As ``focal_loss``.
    """
    if not torch.jit.is_scripting():
        _check(pred, target, reduction)
        require(target.shape == pred.shape, f"target must have the shape {list(pred.shape)}, got {list(target.shape)}")
        check_per_class("pos_weight", pos_weight, pred)
        check_per_class("weight", weight, pred)
        constant = not any(t is not None and t.requires_grad for t in (target, pos_weight, weight))
        constant = constant and not isinstance(alpha, Tensor)
        if constant and is_hard(target, ignore_index):
            return _binary_focal_loss(pred, target, alpha, gamma, reduction, pos_weight, weight, ignore_index)
    return _plain_binary_focal_loss(pred, target, alpha, gamma, reduction, pos_weight, weight, ignore_index)


def _binary_focal_loss(pred, target, alpha, gamma, reduction, pos_weight, weight, ignore_index):
    if pos_weight is not None:
        pos_weight = pos_weight.to(opmath_dtype(pred))
        positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
        alpha, factor = positive_and_negative(positive * pos_weight, torch.full_like(pos_weight, negative))
        weight = factor if weight is None else factor * weight
    with index_error_as(RuntimeError):
        return _sigmoid(
            pred, target, alpha=alpha, gamma=gamma, weight=weight, ignore_index=ignore_index, reduction=reduction,
            normalizer=max(pred.numel(), 1) if reduction == "mean" else None,
        )  # fmt: skip


def _plain_binary_focal_loss(
    pred: Tensor,
    target: Tensor,
    alpha: float | None,
    gamma: float,
    reduction: str,
    pos_weight: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    x = to_opmath(pred)
    x = torch.where(valid, x, torch.zeros_like(x))
    t = torch.where(valid, target, torch.zeros_like(target)).to(x.dtype)
    positive = -power(torch.sigmoid(-x), gamma) * F.logsigmoid(x) * t
    negative = -power(torch.sigmoid(x), gamma) * F.logsigmoid(-x) * (1 - t)
    if alpha is not None:
        positive = positive * alpha
        negative = negative * (1 - alpha)
    per_channel = [1, -1] + [1] * (pred.dim() - 2)
    if pos_weight is not None:
        positive = positive * pos_weight.reshape(per_channel)
    loss = positive + negative
    if weight is not None:
        loss = loss * weight.reshape(per_channel)
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    if reduction == "mean":
        loss = loss.sum() / max(pred.numel(), 1)
    elif reduction == "sum":
        loss = loss.sum()
    elif reduction != "none":
        raise NotImplementedError(f"Invalid reduction mode: {reduction}")
    return loss.to(pred.dtype)


class BinaryFocalLossWithLogits(nn.Module):
    """Module of ``binary_focal_loss_with_logits``; ``alpha`` has no default, as in kornia."""

    def __init__(
        self,
        alpha: float | None,
        gamma: float = 2.0,
        reduction: str = "none",
        pos_weight: Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        super().__init__()
        self.alpha: float | None = alpha
        self.gamma: float = gamma
        self.reduction: str = reduction
        keep(self, "pos_weight", pos_weight)
        keep(self, "weight", weight)
        self.ignore_index: int | None = ignore_index

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return binary_focal_loss_with_logits(
            pred, target, self.alpha, self.gamma, self.reduction, self.pos_weight, self.weight, self.ignore_index
        )


def lovasz_softmax_loss(pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Lovász-Softmax loss of each image, over all classes; the mean over images and classes.

    Args:
        pred: logits [B, C, \\*], C > 1; or [1, C, \\*], which is scored against every target.
        target: class indices [B, \\*].
        weight: [C], factor of each class. The mean divides by the number of classes.

    Raises:
        ValueError: the shapes or devices do not fit.
        kornia's BaseError (ValueError where kornia is not imported): weight is not as above.
        RuntimeError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    if not torch.jit.is_scripting():
        return _lovasz_softmax_loss(pred, target, weight)
    x = to_opmath(pred).flatten(2)
    classes = torch.arange(pred.size(1), device=pred.device).unsqueeze(-1)
    foreground = target.flatten(1).unsqueeze(1) == classes
    loss = _plain_lovasz((x.softmax(1) - foreground.to(x.dtype)).abs(), foreground).mean(0)
    if weight is None:
        return loss.mean().to(pred.dtype)
    return (loss * weight).mean().to(torch.promote_types(pred.dtype, weight.dtype))


def _lovasz_softmax_loss(pred, target, weight):
    require(pred.dim() >= 3, f"pred must have the shape [B, C, *], got {list(pred.shape)}", "ShapeError")
    require(target.dim() == pred.dim() - 1, f"target must have the shape [B, *], got {list(target.shape)}", "ShapeError")
    if pred.size(1) < 2:
        raise ValueError(f"Invalid pred shape: expected [B, C, *] with C > 1, got {list(pred.shape)}")
    check_pixels(pred, target, pred.size(0) == 1)
    check_per_class("weight", weight, pred)
    if pred.size(0) != target.size(0):
        pred = pred.expand(target.size(0), *pred.shape[1:])
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        target = target.long()
    options = {"classes": "all", "per_image": True}
    with index_error_as(RuntimeError):
        if weight is None or not weight.requires_grad:
            loss = _lovasz(pred, target, class_weight=weight, **options)
        else:
            loss = (_lovasz(pred, target, reduction="none", **options) * weight).mean()
    return loss if weight is None else loss.to(torch.promote_types(pred.dtype, weight.dtype))


def _plain_lovasz(errors: Tensor, foreground: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard loss, [...] of errors [..., P]."""
    errors, order = torch.sort(errors, dim=-1, descending=True)
    fg = foreground.gather(-1, order).long()
    total = fg.sum(-1, keepdim=True)
    jaccard = 1 - (total - fg.cumsum(-1)).double() / (total + (1 - fg).cumsum(-1)).double()
    steps = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)
    return (errors * steps.to(errors.dtype)).sum(-1)


class LovaszSoftmaxLoss(nn.Module):
    """Module of ``lovasz_softmax_loss``."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        keep(self, "weight", weight)

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return lovasz_softmax_loss(pred, target, self.weight)


def lovasz_hinge_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Binary Lovász hinge loss of each image; the mean over the images.

    Args:
        pred: logits [B, 1, \\*].
        target: [B, \\*], 0 or 1 in any type.

    Raises:
        ValueError: the shapes or devices do not fit.
        IndexError: target holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    pred = pred if pred.is_floating_point() else pred.float()
    if torch.jit.is_scripting():
        x, t = to_opmath(pred).flatten(1), target.flatten(1)
        errors = torch.relu(1 - x * (2 * t.to(x.dtype) - 1))
        return _plain_lovasz(errors, t != 0).mean().to(pred.dtype)
    return _lovasz_hinge_loss(pred, target)


def _lovasz_hinge_loss(pred, target):
    fits = pred.dim() >= 3 and pred.size(1) == 1
    require(fits, f"pred must have the shape [B, 1, *], got {list(pred.shape)}", "ShapeError")
    require(target.dim() == pred.dim() - 1, f"target must have the shape [B, *], got {list(target.shape)}", "ShapeError")
    check_pixels(pred, target, False)
    return _hinge(pred, target)


class LovaszHingeLoss(nn.Module):
    """Module of ``lovasz_hinge_loss``."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        return lovasz_hinge_loss(pred, target)


def _check(pred: Tensor, target: Tensor, reduction: str) -> None:
    require(pred.dim() >= 2, f"pred must have the shape [B, C, *], got {list(pred.shape)}", "ShapeError")
    require(
        pred.device == target.device, f"target must be on the device of pred, {str(pred.device)!r}, got {str(target.device)!r}"
    )
    if reduction not in REDUCTIONS:
        raise NotImplementedError(f"Invalid reduction mode: expected one of {REDUCTIONS}, got {reduction!r}")
