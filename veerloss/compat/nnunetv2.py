"""nnU-Net's ``DC_and_CE_loss``, ``DC_and_BCE_loss``, the two soft Dice losses that they take, and ``RobustCrossEntropyLoss``.

Values are nnU-Net's: the Dice term is minus the Dice coefficient, so that losses begin near 0 and fall to -1. Different on
purpose:

- with ``ddp`` and ``batch_dice`` the cross-entropy of DC_and_CE_loss, too, is that of the batches of all ranks, as of one
  process. There it is each rank's own, whose mean over ranks is another where ranks have not as many valid voxels. The gradient
  is the sum over ranks when DistributedDataParallel has taken its mean, as there; ranks may have batches of different sizes. A
  Dice loss with ranks cannot be inside torch.compile (``loss.dc`` compiled is not: one pass does not call it);
- ``ddp`` without a process group is one process, not an error; ``do_bg=False`` of one channel is an error, not NaN;
- nothing valid: a cross-entropy of 0 that has a gradient, and an image without valid voxels has a coefficient of 1 also where
  ``smooth`` is 0; the least denominator is 0, not 1e-8, and 0 / 0 is 1;
- ignored voxels may hold NaN; sums are exact; of half-precision logits the loss is float32;
- the dicts that are passed stay as they are.

DC_and_CE_loss is one pass of ``veerloss.compound_loss`` where ``ce_kwargs`` has no more than "weight" and
"label_smoothing", and so is DC_and_BCE_loss for hard targets, no ``bce_kwargs``, background included, where each image and
region has a Dice coefficient of its own (no ``batch_dice``, or one region, or one image) and the logits are contiguous.
Otherwise, and where ``dice_class`` or ``dc`` is not from here, each term is a pass of its own. The Dice losses are one call of
a kernel for labels [B, \\*] and [B, 1, \\*], and for targets per channel, where ``apply_nonlin`` is softmax or sigmoid; any
other, or none, is applied, and its result read once more to see that it is in [0, 1]. Slower, in plain PyTorch: results that
are not; ``clip_tp``; targets per channel with a ``loss_mask`` and the softmax; a ``loss_mask`` other than 0 and 1; the
cross-entropy with ``bce_kwargs``. DC_and_topk_loss is not here: it sorts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..compound import compound_loss
from ..focal import sigmoid_focal_loss, softmax_focal_loss
from ..region import dice_loss
from ._focal import float32_loss, index_error_as, is_hard, one_hot, require, to_opmath
from ._region import are_probabilities

PEER = "nnunetv2"
DISTRIBUTION = "nnunetv2"
VERSIONS = ">=2.2,<2.9"
REPLACES = {
    "nnunetv2.training.loss.compound_losses:DC_and_CE_loss": "DC_and_CE_loss",
    "nnunetv2.training.loss.compound_losses:DC_and_BCE_loss": "DC_and_BCE_loss",
    "nnunetv2.training.loss.dice:SoftDiceLoss": "SoftDiceLoss",
    "nnunetv2.training.loss.dice:MemoryEfficientSoftDiceLoss": "MemoryEfficientSoftDiceLoss",
    "nnunetv2.training.loss.robust_ce_loss:RobustCrossEntropyLoss": "RobustCrossEntropyLoss",
}

__all__ = ["DC_and_BCE_loss", "DC_and_CE_loss", "MemoryEfficientSoftDiceLoss", "RobustCrossEntropyLoss", "SoftDiceLoss"]

_IGNORED = -(2**62)  # no label


def softmax_helper_dim1(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


class MemoryEfficientSoftDiceLoss(nn.Module):
    """Minus the mean soft Dice coefficient of the classes (and images).

    Args:
        apply_nonlin: what makes probabilities of the input.
        batch_dice: one coefficient of all images.
        do_bg: False leaves channel 0 out.
        smooth: added to numerator and denominator of 2 I / (S + T).
        ddp: with ``batch_dice``, of the images of all ranks of the default process group.
    """

    clip_tp: float | None = None

    def __init__(
        self,
        apply_nonlin: Callable | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
    ) -> None:
        super().__init__()
        self.do_bg = do_bg
        self.batch_dice = batch_dice
        self.apply_nonlin = apply_nonlin
        self.smooth = smooth
        self.ddp = ddp

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """The loss of x [B, C, \\*], labels [B, \\*] or [B, 1, \\*] or a target of the shape of x, and a mask [B, 1, \\*].

        Raises:
            RuntimeError: a label is no class (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        y = y.unsqueeze(1) if y.dim() != x.dim() else y
        activation = _activation(self.apply_nonlin)
        if activation is None:
            activation, x = "none", x if self.apply_nonlin is None else self.apply_nonlin(x)
        dense = y.shape == x.shape
        masked = loss_mask is not None
        group = _group(self)
        plain = (
            (masked and dense and activation == "softmax") or (masked and not is_hard(loss_mask)) or self.clip_tp is not None
            or y.requires_grad or self.smooth < 0 or (activation == "none" and not are_probabilities(x))
        )  # fmt: skip
        if plain:
            return self._plain(x, y, loss_mask, activation, group)
        target = (y.float() if y.dtype == torch.bool and masked else y) if dense else _labels(y)
        if loss_mask is not None:
            target = torch.where((loss_mask if dense else loss_mask[:, 0]) != 0, target, -1 if dense else _IGNORED)
        with float32_loss(x), index_error_as(RuntimeError):
            loss = dice_loss(
                x, target, activation=activation, classes=self.classes(x), per_image=not self.batch_dice, smooth=self.smooth,
                ignore_index=None if not masked else -1 if dense else _IGNORED, process_group=group,
            )  # fmt: skip
        return _of_ranks(loss, group) - 1

    def classes(self, x: Tensor) -> str | range:
        return "all" if self.do_bg else range(1, x.size(1))

    def _plain(self, x, y, loss_mask, activation, group) -> Tensor:
        y = y if y.shape == x.shape else one_hot(y[:, 0].long(), x.size(1))
        x = to_opmath(x)
        p = {"softmax": softmax_helper_dim1, "sigmoid": torch.sigmoid, "none": lambda x: x}[activation](x)
        t = y.to(p.dtype)
        if not self.do_bg:
            p, t = p[:, 1:], t[:, 1:]
        m = torch.ones_like(t[:, :1]) if loss_mask is None else loss_mask.to(p.dtype)
        axes = list(range(2, x.dim()))
        i, s, e = (p * t * m).sum(axes), (p * m).sum(axes), (t * m).sum(axes)
        if self.batch_dice:
            i, s, e = i.sum(0), s.sum(0), e.sum(0)
        if group is not None:
            i, s, e = (_summed(value, group) for value in (i, s, e))
        hit = i if self.clip_tp is None else i.clamp(min=self.clip_tp)
        whole = s + e + 2 * (hit - i) + self.smooth
        return -((2 * hit + self.smooth) / whole.clamp(min=1e-8)).mean()


class SoftDiceLoss(MemoryEfficientSoftDiceLoss):
    """``MemoryEfficientSoftDiceLoss``, whose arguments are not explained again.

    Args:
        clip_tp: the least I.
    """

    def __init__(
        self,
        apply_nonlin: Callable | None = None,
        batch_dice: bool = False,
        do_bg: bool = True,
        smooth: float = 1.0,
        ddp: bool = True,
        clip_tp: float | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.do_bg = do_bg
        self.batch_dice = batch_dice
        self.apply_nonlin = apply_nonlin
        self.smooth = smooth
        self.clip_tp = clip_tp
        self.ddp = ddp


class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of logits [B, C, \\*] and labels [B, \\*] or [B, 1, \\*] of any type."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; an AssertionError if the target has more channels."""
        if target.dim() == input.dim():
            require(target.shape[1] == 1, f"target must have one channel of class indices, got {list(target.shape)}")
            target = target[:, 0]
        target = target.long()
        with float32_loss(input):
            if self.reduction != "mean":
                return softmax_focal_loss(
                    input, target, alpha=self.weight, gamma=0.0, label_smoothing=self.label_smoothing,
                    ignore_index=self.ignore_index, reduction=self.reduction,
                )  # fmt: skip
            return compound_loss(
                input, target, cross_entropy=1.0, alpha=self.weight, label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
            )  # fmt: skip


class DC_and_CE_loss(nn.Module):
    """weight_ce times the cross-entropy, minus weight_dice times the Dice coefficient, of the softmax.

    Args:
        soft_dice_kwargs: of ``dice_class``.
        ce_kwargs: of ``RobustCrossEntropyLoss``.
        weight_ce, weight_dice: factors.
        ignore_label: label that takes no part.
        dice_class: ``SoftDiceLoss``, ``MemoryEfficientSoftDiceLoss``, or one of the same arguments.
    """

    def __init__(
        self,
        soft_dice_kwargs: dict,
        ce_kwargs: dict,
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: type = SoftDiceLoss,
    ) -> None:
        super().__init__()
        if ignore_label is not None:
            ce_kwargs = {**ce_kwargs, "ignore_index": ignore_label}
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.ignore_label = ignore_label
        self.ce = RobustCrossEntropyLoss(**ce_kwargs)
        self.dc = dice_class(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [B, C, \\*] and labels [B, 1, \\*].

        Raises:
            AssertionError: the target has more channels.
            RuntimeError: a label is no class (on a GPU only with VEERLOSS_CHECK=1 in the environment).
        """
        require(target.shape[1] == 1, f"target must have one channel of class indices, got {list(target.shape)}")
        dc, ce = _of_compiled(self.dc), self.ce
        ignored = -100 if self.ignore_label is None else self.ignore_label
        if (
            _is_plain(dc, "softmax", self.weight_ce, self.weight_dice) and type(ce) is RobustCrossEntropyLoss
            and ce.reduction == "mean" and ce.ignore_index == ignored and not target.requires_grad
        ):  # fmt: skip
            group = _group(dc)
            with float32_loss(net_output), index_error_as(RuntimeError):
                loss = compound_loss(
                    net_output, _labels(target), cross_entropy=self.weight_ce, dice=self.weight_dice, alpha=ce.weight,
                    label_smoothing=ce.label_smoothing, region_classes=dc.classes(net_output), smooth=dc.smooth,
                    per_image=not dc.batch_dice, ignore_index=self.ignore_label, process_group=group,
                )  # fmt: skip
            return _of_ranks(loss, group) - self.weight_dice
        mask, labels = None, target
        if self.ignore_label is not None:
            mask = target != self.ignore_label
            labels = torch.where(mask, target, 0)
        loss = self.weight_ce * self.ce(net_output, target[:, 0]) if self.weight_ce != 0 else 0
        return loss + (self.weight_dice * self.dc(net_output, labels, loss_mask=mask) if self.weight_dice != 0 else 0)


class DC_and_BCE_loss(nn.Module):
    """weight_ce times the binary cross-entropy, minus weight_dice times the Dice coefficient, of the sigmoid of each region.

    Args:
        bce_kwargs: of ``torch.nn.BCEWithLogitsLoss``.
        soft_dice_kwargs: of ``dice_class``.
        weight_ce, weight_dice: factors.
        use_ignore_label: the last channel of the target is 1 where a voxel takes no part. The cross-entropy is then divided by
            the voxels that do, not by their logits.
        dice_class: as of ``DC_and_CE_loss``.
    """

    def __init__(
        self,
        bce_kwargs: dict,
        soft_dice_kwargs: dict,
        weight_ce: float = 1,
        weight_dice: float = 1,
        use_ignore_label: bool = False,
        dice_class: type = MemoryEfficientSoftDiceLoss,
    ) -> None:
        super().__init__()
        if use_ignore_label:
            bce_kwargs = {**bce_kwargs, "reduction": "none"}
        self.weight_dice = weight_dice
        self.weight_ce = weight_ce
        self.use_ignore_label = use_ignore_label
        self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
        self.dc = dice_class(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """The loss of logits [B, C, \\*] and a target [B, C, \\*], or [B, C + 1, \\*] with ``use_ignore_label``.

        Raises:
            ValueError: the shapes do not fit.
        """
        mask, regions = None, target
        if self.use_ignore_label:
            mask, regions = target[:, -1:] == 0, target[:, :-1]
        if regions.shape != net_output.shape:
            raise ValueError(f"target must have a channel for each of {list(net_output.shape)}, got {list(target.shape)}")
        dc, ce = _of_compiled(self.dc), self.ce
        n, c = net_output.shape[:2]
        bare = type(ce) is nn.BCEWithLogitsLoss and ce.weight is None and ce.pos_weight is None
        if (
            bare and _is_plain(dc, "sigmoid", self.weight_ce, self.weight_dice) and dc.do_bg and not target.requires_grad
            and ce.reduction == ("mean" if mask is None else "none") and (not dc.batch_dice or c == 1 or n == 1)
            and (c == 1 or net_output.is_contiguous()) and _group(dc) is None and is_hard(regions)
        ):  # fmt: skip
            # Each region of each image is a mask of its own, [B C, P]; with batch_dice and many images there is one region.
            if mask is not None:
                regions = torch.where(mask, regions.to(torch.int8), -1)
            x, t = (tensor.flatten(0, 1).flatten(1) for tensor in (net_output, regions))
            with float32_loss(net_output):
                loss = compound_loss(
                    x, t, cross_entropy=self.weight_ce * (1 if mask is None else c), dice=self.weight_dice,
                    activation="sigmoid", smooth=dc.smooth, per_image=c > 1 or not dc.batch_dice,
                    ignore_index=None if mask is None else -1,
                )  # fmt: skip
            return loss - self.weight_dice
        loss = self.weight_dice * self.dc(net_output, regions, loss_mask=mask)
        return loss + self.weight_ce * self._entropy(net_output, regions, mask, bare)

    def _entropy(self, x: Tensor, regions: Tensor, mask: Tensor | None, bare: bool) -> Tensor:
        if bare and not regions.requires_grad:
            with float32_loss(x):
                if mask is None:
                    return sigmoid_focal_loss(x, regions, gamma=0.0, reduction=self.ce.reduction)
                regions = torch.where(mask, regions.float(), -1)
                return sigmoid_focal_loss(x, regions, gamma=0.0, ignore_index=-1, reduction="sum") / mask.sum().clamp(min=1)
        elements = self.ce(to_opmath(x), regions.to(to_opmath(x).dtype))
        return elements if mask is None else torch.where(mask, elements, 0.0).sum() / mask.sum().clamp(min=1)


# ---- what they have in common


def _activation(function: Callable | None) -> str | None:
    """The kernels' name of a function, nnU-Net's own included."""
    name = getattr(function, "__name__", None)
    if name == "softmax_helper_dim1" or (isinstance(function, nn.Softmax) and function.dim == 1):
        return "softmax"
    if function in (torch.sigmoid, F.sigmoid) or isinstance(function, nn.Sigmoid):
        return "sigmoid"
    return None


def _of_compiled(module: nn.Module) -> nn.Module:
    """nnU-Net puts torch.compile(loss.dc) in the place of the Dice loss."""
    return getattr(module, "_orig_mod", module)


def _is_plain(dc: nn.Module, activation: str, *weights: object) -> bool:
    """A Dice loss from here, with the options of compound losses."""
    return (
        type(dc) in (SoftDiceLoss, MemoryEfficientSoftDiceLoss) and dc.clip_tp is None and dc.smooth >= 0
        and _activation(dc.apply_nonlin) == activation and all(isinstance(w, (int, float)) and w >= 0 for w in weights)
    )  # fmt: skip


def _labels(target: Tensor) -> Tensor:
    """[B, 1, *] of any type as indices [B, *]."""
    labels = target[:, 0]
    return labels.long() if labels.dtype.is_floating_point or labels.dtype == torch.bool else labels


def _group(dc: nn.Module) -> dist.ProcessGroup | None:
    ranks = dc.ddp and dc.batch_dice and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if ranks and dist.get_world_size() > 1 else None


def _of_ranks(loss: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """With the gradient as many times as large as there are ranks, whose mean DistributedDataParallel takes."""
    return loss if group is None else loss + (dist.get_world_size(group) - 1) * (loss - loss.detach())


def _summed(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of all ranks; as ``_of_ranks``."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total + dist.get_world_size(group) * (value - value.detach())
