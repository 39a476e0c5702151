"""DiceLoss, TverskyLoss and GeneralizedDiceLoss of MONAI; monai.py tells of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .._arguments import REDUCTIONS, check_label_range
from ._focal import index_error_as, is_hard, one_hot, require, to_opmath
from ._region import are_probabilities, mean_of, region_loss, region_losses, region_sums


class _RegionLoss(_Loss):
    """What the three have in common: their options, and what they take the sums of."""

    def __init__(
        self,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Callable | None,
        reduction: str,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        soft_label: bool,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=checked(reduction, REDUCTIONS, "reduction"))
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act must be None or callable but is {type(other_act).__name__}.")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            raise ValueError("Incompatible values: more than 1 of [sigmoid=True, softmax=True, other_act is not None].")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.sigmoid = sigmoid
        self.softmax = softmax
        self.other_act = other_act
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label
        self.ignore_index = ignore_index

    @torch.jit.unused
    def _checked_target(self, input: Tensor, target: Tensor) -> None:
        """Warns and raises as MONAI does."""
        one = input.shape[1] == 1
        for name, ignored in (
            ("softmax=True", self.softmax), ("to_onehot_y=True", self.to_onehot_y),
            ("include_background=False", not self.include_background),
        ):  # fmt: skip
            if one and ignored:
                warnings.warn(f"single channel prediction, `{name}` ignored.", stacklevel=6)
        expected = list(input.shape)
        if self.to_onehot_y and not one:
            expected[1] = 1
        require(
            list(target.shape) == expected,
            f"target must have the shape {expected} for input {list(input.shape)}, got {list(target.shape)}",
        )

    @torch.jit.unused
    def _check_labels(self, input: Tensor, target: Tensor) -> None:
        """The error of a scatter with an index that is out of range, where looking does not wait for a GPU."""
        labelled = self.to_onehot_y and input.shape[1] > 1
        if labelled and target.device.type == "cpu" and not torch.compiler.is_compiling():
            with index_error_as(RuntimeError):
                check_label_range(target, input.shape[1], self.ignore_index)

    @torch.jit.unused
    def _losses(
        self, input: Tensor, target: Tensor, alpha: float, beta: float, smooth: tuple[float, float], squared: bool
    ) -> Tensor:
        """Of the classes that count, [C], or [B, C] without ``batch``; ``smooth`` beside the intersection."""
        self._checked_target(input, target)
        if self.other_act is not None:
            input = self.other_act(input)
        channels = input.shape[1]
        labelled = self.to_onehot_y and channels > 1
        activation = "sigmoid" if self.sigmoid else "softmax" if self.softmax and channels > 1 else "none"
        if not self._fuses(input, target, labelled, activation, min(alpha, beta, *smooth), squared):
            self._check_labels(input, target)
            return self._plain_losses(input, target, alpha, beta, smooth[0], smooth[1], squared)
        if labelled:
            target = target[:, 0]
            target = target.long() if target.dtype.is_floating_point or target.dtype == torch.bool else target
        with index_error_as(RuntimeError if labelled else IndexError):
            loss = region_losses(
                input, target, activation=activation, alpha=alpha, beta=beta, smooth=smooth, squared=squared,
                per_image=not self.batch, ignore_index=self.ignore_index,
            )  # fmt: skip
        return loss if self.include_background or channels == 1 else loss[..., 1:]

    @torch.jit.unused
    def _fuses(self, input: Tensor, target: Tensor, labelled: bool, activation: str, least: float, squared: bool) -> bool:
        if target.requires_grad or least < 0 or (input.dim() == 2 and not self.batch):
            return False  # of [B, C], which has no volume, MONAI's sums are of everything
        if not labelled:
            # With channels of their own, the classes of a voxel are ignored together.
            if self.ignore_index is not None and input.shape[1] > 1:
                return False
            if self.soft_label and not squared and not is_hard(target, self.ignore_index):
                return False
        return activation != "none" or are_probabilities(input)

    def _plain_losses(
        self, input: Tensor, target: Tensor, alpha: float, beta: float, smooth_nr: float, smooth_dr: float, squared: bool
    ) -> Tensor:
        """The same in plain PyTorch, which TorchScript compiles; ``other_act`` was applied."""
        p, t, valid = self._probabilities(input, target)
        dims = self._dims(input.dim())
        i, s, e = self._sums(p, t, dims, squared)
        loss = region_loss(i, s, e, alpha, beta, smooth_nr, smooth_dr)
        if valid is not None:
            loss = torch.where(valid.expand_as(p).sum(dims) > 0, loss, torch.zeros_like(loss))
        return loss

    def _sums(self, p: Tensor, t: Tensor, dims: list[int], squared: bool) -> tuple[Tensor, Tensor, Tensor]:
        if squared or not self.soft_label:
            return region_sums(p, t, dims, squared, False)
        i, s, e = region_sums(p.clamp_min(0), t, dims, False, True)
        return i, s + p.clamp(max=0).neg().sum(dims), e  # of what is no probability |p| counts as predicted, and finds nothing

    def _dims(self, dim: int) -> list[int]:
        dims: list[int] = []
        if self.batch:
            dims.append(0)
        for d in range(2, dim):
            dims.append(d)
        return dims

    def _probabilities(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Probabilities and targets of the classes that count, 0 where ignored; 1 where a voxel counts, [B, 1, \\*]."""
        channels = input.shape[1]
        valid = valid_voxels(target, self.ignore_index)
        if self.to_onehot_y and channels > 1:
            labels = target[:, 0].long()
            if valid is not None:
                labels = torch.where(valid[:, 0] > 0, labels, torch.zeros_like(labels))
            target = one_hot(labels, channels)
        p = to_opmath(input)
        if valid is not None:
            p = torch.where(valid > 0, p, torch.zeros_like(p))
        if self.sigmoid:
            p = torch.sigmoid(p)
        elif self.softmax and channels > 1:
            p = torch.softmax(p, 1)
        if channels > 1 and not self.include_background:
            p, target = p[:, 1:], target[:, 1:]
        t = target.to(p.dtype)
        if valid is not None:
            p = p * valid
            t = torch.where(valid > 0, t, torch.zeros_like(t)) * valid
        return p, t, valid

    def _reduced(self, loss: Tensor) -> Tensor:
        if self.reduction == "mean":
            return mean_of(loss)
        return loss.sum() if self.reduction == "sum" else loss


class DiceLoss(_RegionLoss):
    """Dice or Jaccard loss of each class of each image.

    Args:
        include_background: False leaves channel 0 out.
        to_onehot_y: the target holds class indices [B, 1, \\*].
        sigmoid, softmax, other_act: what makes probabilities of the input, at most one of them; without, it holds some.
        squared_pred: squares in the denominator.
        jaccard: Jaccard instead of Dice.
        reduction: "mean" and "sum" are over classes and images; "none": [B, C, 1, ...].
        smooth_nr, smooth_dr: added to numerator and denominator of 2 I / (S + T), or of 2 I / (2 (S + T - I)).
        batch: one loss of all images; "none" is [C, 1, ...].
        weight: factor, or one per class that counts, >= 0. The mean divides by the number of classes.
        soft_label: the intersection is the sum of min(p, t) instead of that of p t.
        ignore_index: label whose voxels take no part. With targets per channel: a channel, or else a voxel without any.
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
        weight: Sequence[float] | float | int | Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch, soft_label,
            ignore_index,
        )  # fmt: skip
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        weight = None if weight is None else torch.as_tensor(weight)
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(f"weight must hold values >= 0, got {weight.tolist()}")
        self.register_buffer("class_weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of input [B, C, \\*] and a target [B, C, \\*] or, with ``to_onehot_y``, [B, 1, \\*].

        Raises:
            AssertionError: the shapes do not fit.
            ValueError: ``weight`` has not one value per class.
            RuntimeError: a label is no class (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        # The index is that of I, half of what MONAI writes.
        weight = 1.0 if self.jaccard else 0.5
        nr, dr = self.smooth_nr / 2, self.smooth_dr / 2
        if not torch.jit.is_scripting():
            loss = self._losses(input, target, weight, weight, (nr, dr), self.squared_pred)
        else:
            if self.other_act is not None:
                input = self.other_act(input)
            loss = self._plain_losses(input, target, weight, weight, nr, dr, self.squared_pred)
        if self.class_weight is not None:
            w = self.class_weight.to(loss)
            classes = input.shape[1] - int(not self.include_background and input.shape[1] > 1)
            if classes > 1:
                if w.dim() > 0 and w.numel() != classes:
                    raise ValueError(
                        f"weight must be a number or have one value for each of {classes} classes, got {w.numel()}"
                    )
                loss = loss * w.expand(classes)
        if self.reduction == "none":
            return loss.reshape(list(loss.shape) + [1] * (input.dim() - 2))
        return self._reduced(loss)


class TverskyLoss(_RegionLoss):
    """Tversky loss of each class of each image; the other arguments are those of ``DiceLoss``.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        reduction: "none" is [B, C], or [C] with ``batch``.
        smooth_nr, smooth_dr: added to numerator and denominator of I / (I + alpha (S - I) + beta (T - I)).
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch, soft_label,
            ignore_index,
        )  # fmt: skip
        self.alpha = alpha
        self.beta = beta

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """As ``DiceLoss.forward``."""
        alpha, beta = float(self.alpha), float(self.beta)
        if not torch.jit.is_scripting():
            return self._reduced(self._losses(input, target, alpha, beta, (self.smooth_nr, self.smooth_dr), False))
        if self.other_act is not None:
            input = self.other_act(input)
        return self._reduced(self._plain_losses(input, target, alpha, beta, self.smooth_nr, self.smooth_dr, False))


class GeneralizedDiceLoss(_RegionLoss):
    """Dice loss of sums over classes, each weighted by its number of voxels (Sudre et al., DLMIA 2017), in plain PyTorch.

    The other arguments are those of ``DiceLoss``.

    Args:
        w_type: "square", the weight of a class is 1 / T^2; "simple", 1 / T; "uniform", 1. A class without a voxel has the
            largest weight of the others.
        reduction: "none" is [B, 1, ...].
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch, soft_label
        )
        self.w_type = checked(w_type, ("square", "simple", "uniform"), "w_type")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """As ``DiceLoss.forward``."""
        if not torch.jit.is_scripting():
            self._checked_target(input, target)
            self._check_labels(input, target)
        if self.other_act is not None:
            input = self.other_act(input)
        p, t, _ = self._probabilities(input, target)
        i, s, e = self._sums(p, t, self._dims(input.dim()), False)
        w = self._weights(e)
        i, s, e = (w * i).sum(-1, keepdim=True), (w * s).sum(-1, keepdim=True), (w * e).sum(-1, keepdim=True)
        loss = region_loss(i, s, e, 0.5, 0.5, self.smooth_nr / 2, self.smooth_dr / 2)
        if self.reduction == "none":
            return loss.reshape(list(loss.shape) + [1] * (input.dim() - 2))
        return self._reduced(loss)

    def _weights(self, expected: Tensor) -> Tensor:
        expected = expected.detach()
        if self.w_type == "uniform":
            return torch.ones_like(expected)
        w = torch.reciprocal(expected * expected if self.w_type == "square" else expected)
        absent = torch.isinf(w)
        w = torch.where(absent, torch.zeros_like(w), w)
        return torch.where(absent, w.amax(-1, keepdim=True), w)


def checked(value: object, choices: Sequence[str], name: str) -> str:
    """One of the words, or the member of MONAI's enumeration that means it."""
    value = str(getattr(value, "value", value))
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
    return value


def valid_voxels(target: Tensor, ignore_index: int | None) -> Tensor | None:
    """[B, 1, \\*], float32: 1 where a voxel counts, 0 where it is ignored."""
    if ignore_index is None:
        return None
    if target.shape[1] == 1:
        return (target != ignore_index).float()
    if ignore_index >= 0 and ignore_index < target.shape[1]:
        return 1.0 - target[:, ignore_index : ignore_index + 1].float()
    return (target.sum(1, keepdim=True) > 0).float()
