"""``monai.losses``: FocalLoss, with either activation; DiceLoss, TverskyLoss, GeneralizedDiceLoss, DiceCELoss, DiceFocalLoss.

FocalLoss has MONAI's values, and its type of loss, float32. The sigmoid with one alpha per class weights positives alone; the
softmax with one number gives class 0 1 - alpha and the others alpha; "sum" is the mean over the volume, summed over images and
channels; soft targets are weighted as MONAI weights them. Different on purpose:

- ``ignore_index``: "mean" divides by the elements that count, pixels times channels. MONAI divides by the pixels, so that the
  argument makes the loss as many times larger as there are channels, even where nothing is ignored;
- a NaN or infinite logit of an ignored voxel is ignored too (with targets per channel: a finite one);
- "sum" of [B, C] logits, which have no volume, is the sum, where MONAI returns the mean;
- everything ignored: 0; 0 < gamma < 1: no NaN in the gradient of a confident voxel;
- logits are not copied to float32; float64 logits are computed in float64, and the loss rounded;
- a label out of range, alpha outside [0, 1] and a negative gamma are errors; negative weights are one when the module is made.

One call of the kernel: ``to_onehot_y``, whose labels stay indices, and targets per channel of 0 and 1. Targets per channel of a
float type are read to find out whether they are, which waits for a GPU; torch.compile takes the plain formula for them, and
fuses it. Slower, in plain PyTorch: soft targets with the sigmoid; targets per channel with the softmax and reduction "none" or
a type that is not float; targets that require a gradient; a module compiled by ``torch.jit.script``. Targets per channel with
ignore_index and one weight or alpha per class take a weight of the size of the logits.

DiceLoss, TverskyLoss and GeneralizedDiceLoss have MONAI's values; DiceCELoss and DiceFocalLoss are sums of a DiceLoss and the
other loss. Different on purpose:

- sums are exact; of half-precision logits the loss is float32, where MONAI adds in half precision, counts beyond 65504 as inf;
- all of an image (with ``batch``, of the batch) ignored: 0, where MONAI has 1 - smooth_nr / smooth_dr; 0 / 0: 0, not NaN;
- GeneralizedDiceLoss takes [B, C] logits, on which MONAI fails;
- a NaN or infinite logit of an ignored voxel is ignored too;
- targets per channel outside [0, 1] are an error in what the kernel takes; ``squared_pred`` takes integer targets, too;
- negative weights are an error when the module is made; DiceCELoss takes float64 logits with a float32 weight;
- DiceFocalLoss has what differs in FocalLoss.

One call of the kernel: ``to_onehot_y``, and targets per channel, hard or soft, with ``sigmoid``, ``softmax``, or, after
``other_act`` or without any of them, probabilities, which are read once more to see that they are in [0, 1]. Slower, in plain
PyTorch: the latter outside of that, or under torch.compile; targets per channel with ignore_index; soft ones with
``soft_label`` (float ones are read once more for it) unless ``squared_pred``; [B, C] without ``batch``; targets that require a
gradient; a negative alpha, beta or smoothing; all of GeneralizedDiceLoss; a module compiled by ``torch.jit.script``.

The two terms of DiceCELoss are one pass of ``veerloss.compound_loss`` with ``softmax``, ``to_onehot_y`` and reduction
"mean", without ``weight`` and ``squared_pred``; and for one channel with ``sigmoid`` and a target of 0 and 1 (of a float type:
on a CPU). Those of DiceFocalLoss are one with ``sigmoid`` and contiguous targets per channel of 0 and 1, reduction "mean",
background included, no ``weight``, no ``squared_pred``, and no ``batch`` but for one channel. (MONAI's focal term is of
sigmoids whatever the activation, so with ``softmax`` there are two.) Otherwise each term is a pass of its own; the
cross-entropy is a kernel then too, but for one channel with a weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .._arguments import REDUCTIONS
from ..focal import sigmoid_focal_loss as _sigmoid
from ..focal import softmax_focal_loss as _softmax
from ._focal import (
    cross_entropy_elements,
    float32_loss,
    index_sigmoid,
    is_hard,
    one_hot,
    positive_and_negative,
    power,
    require,
)
from ._monai_compound import dice_and_ce, dice_and_focal
from ._monai_region import DiceLoss, GeneralizedDiceLoss, TverskyLoss, checked, valid_voxels

PEER = "monai"
DISTRIBUTION = "monai"
VERSIONS = ">=1.3,<1.7"
REPLACES = {
    "monai.losses.focal_loss:FocalLoss": "FocalLoss",
    "monai.losses.dice:DiceLoss": "DiceLoss",
    "monai.losses.dice:DiceCELoss": "DiceCELoss",
    "monai.losses.dice:DiceFocalLoss": "DiceFocalLoss",
    "monai.losses.dice:GeneralizedDiceLoss": "GeneralizedDiceLoss",
    "monai.losses.tversky:TverskyLoss": "TverskyLoss",
}

__all__ = ["DiceCELoss", "DiceFocalLoss", "DiceLoss", "FocalLoss", "GeneralizedDiceLoss", "TverskyLoss"]


class FocalLoss(_Loss):
    """Focal loss of volumes.

    Args:
        include_background: False leaves channel 0 out of logits and target.
        to_onehot_y: the target holds class indices [B, 1, \\*].
        gamma: focusing exponent, >= 0.
        alpha: weight of positives in [0, 1], or one per class.
        weight: factor, or one per class, >= 0.
        reduction: "none", "mean" or "sum".
        use_softmax: softmax over the channels instead of the sigmoid of each.
        ignore_index: label whose voxels take no part. With targets per channel: a channel, or else a voxel without any.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Sequence[float] | float | int | Tensor | None = None,
        reduction: str = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=checked(reduction, REDUCTIONS, "reduction"))
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.gamma = gamma
        self.weight = weight
        self.use_softmax = use_softmax
        self.alpha = alpha if alpha is None else float(alpha) if isinstance(alpha, (float, int)) else torch.as_tensor(alpha)
        self.register_buffer("_alpha", None if alpha is None else torch.as_tensor(self.alpha), persistent=False)
        weight = None if weight is None else torch.as_tensor(weight)
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(f"weight must hold values >= 0, got {weight.tolist()}")
        self.register_buffer("class_weight", weight)
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss, float32, of logits [B, C, \\*] and a target [B, C, \\*] or, with ``to_onehot_y``, [B, 1, \\*].

        Raises:
            ValueError: the shapes do not fit, or ``weight`` or ``alpha`` has not one value per class.
            AssertionError: with ``to_onehot_y``, target has not one channel.
        """
        if not torch.jit.is_scripting():
            return self._forward(input, target)
        return _plain(
            input,
            target,
            self.include_background,
            self.to_onehot_y,
            float(self.gamma),
            self._alpha,
            self.class_weight,
            self.reduction,
            self.use_softmax,
            self.ignore_index,
        )

    @torch.jit.unused
    def _forward(self, input: Tensor, target: Tensor) -> Tensor:
        channels = input.shape[1]
        as_index = self.to_onehot_y and channels > 1
        if channels == 1 and self.to_onehot_y:
            warnings.warn("single channel prediction, `to_onehot_y=True` ignored.", stacklevel=5)
        if channels == 1 and not self.include_background:
            warnings.warn("single channel prediction, `include_background=False` ignored.", stacklevel=5)
        if as_index:
            require(target.shape[1] == 1, f"target must have one channel of class indices, got {list(target.shape)}")
        expected = input.shape[:1] + target.shape[1:2] + input.shape[2:] if as_index else input.shape
        if target.shape != expected:
            raise ValueError(
                f"target must have the shape {list(expected)} for input {list(input.shape)}, got {list(target.shape)}"
            )

        skip = not self.include_background and channels > 1
        classes = channels - 1 if skip else channels
        alpha = None if self._alpha is None else self._alpha.to(device=input.device)
        if alpha is not None and alpha.dim() > 0 and alpha.numel() != classes:
            raise ValueError(f"alpha must have one value for each of {classes} classes, got {alpha.numel()}")
        if alpha is not None and alpha.dim() == 0 and self.use_softmax and skip:
            warnings.warn("`include_background=False`, scalar `alpha` ignored when using softmax.", stacklevel=5)
            alpha = None
        weight = None if self.class_weight is None else self.class_weight.to(device=input.device)
        if weight is not None and weight.dim() > 0 and (weight.numel() != classes or classes == 1):
            raise ValueError(f"weight must be a number or have one value for each of {classes} classes, got {weight.numel()}")

        if as_index:
            labels = target[:, 0]
            labels = labels.long() if labels.dtype.is_floating_point else labels
            with float32_loss(input):
                loss = (self._softmax_of_labels if self.use_softmax else self._sigmoid_of_labels)(
                    input, labels, skip, classes, alpha, weight
                )
            return loss.float()
        return self._per_channel(input, target, skip, classes, alpha, weight)

    def _sigmoid_of_labels(self, input, labels, skip, classes, alpha, weight):
        ignore_index, background = self.ignore_index, None
        valid = None if ignore_index is None else labels != ignore_index
        if skip:
            input, labels = input[:, 1:], labels.long() - 1
            ignore_index = None if ignore_index is None else ignore_index - 1
            background = None if ignore_index == -1 else -1
        alpha, weight = _factors(alpha, weight, classes, self.alpha)
        reduction, normalizer = self.reduction, None
        if reduction == "sum":
            volume = math.prod(labels.shape[1:])
            if valid is None:
                reduction, normalizer = "mean", max(volume, 1)
            else:
                weight = _broadcast(weight, input) / valid.flatten(1).sum(1).clamp(min=1).reshape(-1, *[1] * labels.dim())
        return index_sigmoid(
            input, labels, background=background, ignore_index=ignore_index, alpha=alpha, gamma=self.gamma, weight=weight,
            reduction=reduction, normalizer=normalizer,
        )  # fmt: skip

    def _softmax_of_labels(self, input, labels, skip, classes, alpha, weight):
        valid = None if self.ignore_index is None else labels != self.ignore_index
        ignore_index = self.ignore_index
        if skip:  # labels of the background have no loss, but count
            input, labels = input[:, 1:], labels.long() - 1
            ignore_index = -1
            labels = labels if valid is None else labels.where(valid, labels.new_full((), -1))
        factor = _class_factor(alpha, weight, classes, input)
        if self.reduction == "mean":
            count = labels.numel() if valid is None else valid.sum()
            return _softmax(
                input, labels, alpha=factor, gamma=self.gamma, ignore_index=ignore_index,
                normalizer=max(count * classes, 1) if valid is None else count * classes,
            )  # fmt: skip
        loss = _softmax(input, labels, alpha=factor, gamma=self.gamma, ignore_index=ignore_index, reduction="none")
        if self.reduction == "sum":
            volume = max(math.prod(labels.shape[1:]), 1)
            return (loss.flatten(1).sum(1) / (volume if valid is None else valid.flatten(1).sum(1).clamp(min=1))).sum()
        place = labels if ignore_index is None else labels.where(labels != ignore_index, labels.new_zeros(()))
        return torch.zeros_like(input, dtype=loss.dtype).scatter_(1, place.long().unsqueeze(1), loss.unsqueeze(1))

    def _per_channel(self, input, target, skip, classes, alpha, weight):
        mask = valid_voxels(target, self.ignore_index)
        x, t = (input[:, 1:], target[:, 1:]) if skip else (input, target)
        ignore_index = self.ignore_index if target.shape[1] == 1 else None
        if self.use_softmax:
            fused = t.dtype.is_floating_point and self.reduction != "none" and ignore_index is None
        else:
            fused = is_hard(t, ignore_index)
        if not fused or target.requires_grad:
            return _plain(
                input, target, self.include_background, False, float(self.gamma), self._alpha, self.class_weight,
                self.reduction, self.use_softmax, self.ignore_index,
            )  # fmt: skip
        reduction, normalizer = self.reduction, None
        pixel_weight = (
            mask if ignore_index is None else None
        )  # of one channel the kernel leaves ignored voxels out, and uncounted
        if mask is None:
            if reduction == "sum":
                reduction, normalizer = "mean", max(math.prod(x.shape[2:]), 1)
        elif reduction == "sum":
            counts = mask.flatten(1).sum(1).clamp(min=1.2e-7).reshape(-1, *[1] * (mask.dim() - 1))
            pixel_weight = (1 if pixel_weight is None else pixel_weight) / counts
        elif reduction == "mean" and ignore_index is None:
            normalizer = (mask.sum() * classes).clamp(min=1.2e-7)
        if self.use_softmax and reduction == "mean" and normalizer is None:
            normalizer = max(x.numel(), 1)
        with float32_loss(input):
            if self.use_softmax:
                pixel_weight = None if pixel_weight is None else pixel_weight[:, 0]
                loss = _softmax(
                    x, t, alpha=_class_factor(alpha, weight, classes, x), gamma=self.gamma, weight=pixel_weight,
                    ignore_index=None, reduction=reduction, normalizer=normalizer,
                )  # fmt: skip
            else:
                alpha, weight = _factors(alpha, weight, classes, self.alpha)
                if pixel_weight is not None:
                    weight = _broadcast(weight, x) * pixel_weight
                loss = _sigmoid(
                    x, t, alpha=alpha, gamma=self.gamma, weight=weight, ignore_index=ignore_index, reduction=reduction,
                    normalizer=normalizer,
                )  # fmt: skip
        return loss.float()


def _factors(alpha: Tensor | None, weight: Tensor | None, classes: int, number: object) -> tuple:
    """The alpha and weight of sigmoid_focal_loss: a number weights negatives too, one alpha per class does not."""
    if alpha is not None and alpha.dim() > 0:
        alpha, factor = positive_and_negative(alpha, torch.ones_like(alpha))
        return alpha, factor if weight is None else factor * weight
    return None if alpha is None else number, weight if weight is None or weight.dim() > 0 else weight.expand(classes)


def _class_factor(alpha: Tensor | None, weight: Tensor | None, classes: int, input: Tensor) -> Tensor | None:
    """The alpha of softmax_focal_loss; with one number, class 0 has 1 - alpha."""
    if alpha is not None and alpha.dim() == 0:
        alpha = torch.cat([(1 - alpha).expand(1), alpha.expand(classes - 1)])
    if alpha is None or weight is None:
        return alpha if weight is None else weight
    return alpha * weight


def _broadcast(weight: Tensor | None, input: Tensor) -> Tensor:
    """One weight per class in a shape that broadcasts to the logits."""
    if weight is None:
        return input.new_ones((), dtype=torch.float32)
    return weight.reshape(-1, *[1] * (input.dim() - 2))


def _plain(
    input: Tensor,
    target: Tensor,
    include_background: bool,
    to_onehot_y: bool,
    gamma: float,
    alpha: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    use_softmax: bool,
    ignore_index: int | None,
) -> Tensor:
    """All of it in plain PyTorch, which TorchScript compiles."""
    channels = input.shape[1]
    mask = valid_voxels(target, ignore_index)
    if to_onehot_y and channels > 1:
        labels = target[:, 0].long()
        if mask is not None:
            labels = torch.where(mask[:, 0] > 0, labels, torch.zeros_like(labels))
        target = one_hot(labels, channels)
    if not include_background and channels > 1:
        input, target = input[:, 1:], target[:, 1:]
    if target.shape != input.shape:
        raise ValueError(f"target has the shape {target.shape}, logits have {input.shape}")
    x, t = input.float(), target.float()
    if mask is not None:
        x = torch.where(mask > 0, x, torch.zeros_like(x))
        t = torch.where(mask > 0, t, torch.zeros_like(t))
    per_channel = [1, -1] + [1] * (x.dim() - 2)

    if use_softmax:
        log_p = F.log_softmax(x, 1)
        # A class that is masked out by -inf has no target: 0, not 0 times infinity.
        log_p = torch.where(t == 0, torch.zeros_like(log_p), log_p)
        loss = -t * power(-torch.expm1(log_p), gamma) * log_p
        if alpha is not None:
            a = alpha.to(loss)
            if a.dim() > 0:
                loss = loss * a.reshape(per_channel)
            elif include_background or channels == 1:
                loss = torch.cat([(1 - a) * loss[:, :1], a * loss[:, 1:]], 1)
    else:
        loss = cross_entropy_elements(x, t) * torch.exp(gamma * F.logsigmoid(-x * (2 * t - 1)))
        if alpha is not None:
            a = alpha.to(loss)
            if a.dim() > 0:
                loss = loss * torch.where(t == 1, a.reshape(per_channel), torch.ones_like(loss))
            else:
                loss = loss * (t * a + (1 - t) * (1 - a))
    if class_weight is not None:
        w = class_weight.to(loss)
        loss = loss * (w.reshape(per_channel) if w.dim() > 0 else w)
    if mask is not None:
        loss = loss * mask

    if reduction == "mean":
        count = torch.full_like(loss.sum(), loss.numel()) if mask is None else mask.sum() * loss.shape[1]
        loss = loss.sum() / count.clamp(min=1.2e-7)
    elif reduction == "sum":
        volume = torch.ones_like(loss[:, :1]) if mask is None else mask
        loss = (loss.flatten(1).sum(1) / volume.flatten(1).sum(1).clamp(min=1.2e-7)).sum()
    return loss


class _Compound(_Loss):
    """The sum of a Dice loss and another, each with a factor."""

    @torch.jit.unused
    def _check(self, input: Tensor, target: Tensor) -> None:
        if input.dim() != target.dim() or (target.shape[1] != 1 and target.shape[1] != input.shape[1]):
            raise ValueError(
                f"target must have the dimensions of input, {list(input.shape)}, and one channel or as many, got "
                f"{list(target.shape)}"
            )


class DiceCELoss(_Compound):
    """``DiceLoss``, whose arguments are not explained again, and cross-entropy of the logits.

    Args:
        reduction: "mean" or "sum".
        weight: [C], of both; for one channel, that of the cross-entropy's positives.
        lambda_dice, lambda_ce: factors, >= 0.
        label_smoothing: of the softmax cross-entropy.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        reduction = checked(reduction, ("mean", "sum"), "reduction")
        dice_weight = weight[1:] if weight is not None and not include_background else weight
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, dice_weight,
        )  # fmt: skip
        self.cross_entropy = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=label_smoothing)
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(reduction=reduction, pos_weight=weight)
        self.lambda_dice = _factor("lambda_dice", lambda_dice)
        self.lambda_ce = _factor("lambda_ce", lambda_ce)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [B, C, \\*] and a target [B, C, \\*] or [B, 1, \\*].

        Raises:
            ValueError: the dimensions or channels do not fit.
            AssertionError: the shapes do not fit.
        """
        if not torch.jit.is_scripting():
            self._check(input, target)
            loss = dice_and_ce(self, input, target)
            if loss is None:
                loss = self.lambda_dice * self.dice(input, target) + self.lambda_ce * self._fused_ce(input, target)
            return loss
        if input.shape[1] == 1:
            entropy = self.binary_cross_entropy(input, target.to(input.dtype))
        elif target.shape[1] == 1:
            entropy = self.cross_entropy(input, target[:, 0].long())
        else:
            entropy = self.cross_entropy(input, target.to(input.dtype))
        return self.lambda_dice * self.dice(input, target) + self.lambda_ce * entropy

    @torch.jit.unused
    def _fused_ce(self, input: Tensor, target: Tensor) -> Tensor:
        weight, reduction = self.cross_entropy.weight, self.cross_entropy.reduction
        binary, labelled = input.shape[1] == 1, target.shape[1] == 1
        with float32_loss(input):
            if target.requires_grad or (binary and weight is not None):
                target = target if target.is_floating_point() else target.to(input.dtype)
                return (self.binary_cross_entropy if binary else self.cross_entropy)(input, target)
            if binary:
                return _sigmoid(input, target, gamma=0.0, reduction=reduction)
            options = {"alpha": weight, "gamma": 0.0, "label_smoothing": self.cross_entropy.label_smoothing}
            if not labelled:
                target = target if target.is_floating_point() else target.to(input.dtype)
                return _softmax(input, target, reduction=reduction, **options)
            labels = target[:, 0].long() if target.is_floating_point() else target[:, 0]
            if weight is None or reduction == "sum":
                return _softmax(input, labels, reduction=reduction, **options)
            total = _softmax(input, labels, reduction="sum", **options)
            weights = weight.to(total)[labels.long().clamp(0, input.shape[1] - 1)].sum()
            return torch.where(weights == 0, 0.0, total / torch.where(weights == 0, 1.0, weights))


class DiceFocalLoss(_Compound):
    """``DiceLoss`` and ``FocalLoss`` of the sigmoid, whose arguments are not explained again.

    Args:
        lambda_dice, lambda_focal: factors, >= 0.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Sequence[float] | float | int | Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight,
        )  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction)
        self.lambda_dice = _factor("lambda_dice", lambda_dice)
        self.lambda_focal = _factor("lambda_focal", lambda_focal)
        self.to_onehot_y = to_onehot_y

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [B, C, \\*] and a target [B, C, \\*] or, with ``to_onehot_y``, [B, 1, \\*].

        Raises:
            ValueError: the dimensions or channels do not fit.
            AssertionError: the shapes do not fit.
        """
        if not torch.jit.is_scripting():
            self._check(input, target)
            loss = dice_and_focal(self, input, target)
            if loss is not None:
                return loss
        return self.lambda_dice * self.dice(input, target) + self.lambda_focal * self.focal(input, target)


def _factor(name: str, value: float) -> float:
    if value < 0:
        raise ValueError(f"{name} should be no less than 0.0, got {value}")
    return value
