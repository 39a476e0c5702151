"""The options with which DiceCELoss and DiceFocalLoss of MONAI are one pass of compound_loss; monai.py tells of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compound import compound_loss
from ._focal import float32_loss, index_error_as, is_hard
from ._monai_region import DiceLoss


@torch.jit.unused
def dice_and_ce(loss, input: Tensor, target: Tensor) -> Tensor | None:
    """DiceCELoss; None where its terms take a pass each."""
    dice, entropy = loss.dice, loss.cross_entropy
    if not _is_plain(dice, input, target, loss.lambda_dice, loss.lambda_ce) or entropy.weight is not None:
        return None
    options = {"cross_entropy": loss.lambda_ce, **_region_options(dice, loss.lambda_dice)}
    if input.shape[1] == 1:
        # A float target is read to see whether it is hard: the terms need not know, and a GPU would wait for it.
        waits = target.is_cuda and target.is_floating_point()
        return None if waits else _of_masks(dice, input, target, options)
    if not (dice.softmax and dice.to_onehot_y):
        return None
    dice._checked_target(input, target)
    labels = target[:, 0]
    labels = labels.long() if labels.dtype.is_floating_point or labels.dtype == torch.bool else labels
    with float32_loss(input), index_error_as(RuntimeError):
        return compound_loss(
            input, labels, label_smoothing=entropy.label_smoothing, per_image=not dice.batch,
            region_classes="all" if dice.include_background else range(1, input.shape[1]), **options,
        )  # fmt: skip


@torch.jit.unused
def dice_and_focal(loss, input: Tensor, target: Tensor) -> Tensor | None:
    """DiceFocalLoss; None where its terms take a pass each."""
    dice, focal = loss.dice, loss.focal
    if not _is_plain(dice, input, target, loss.lambda_dice, loss.lambda_focal) or isinstance(focal.alpha, Tensor):
        return None
    options = {"focal": loss.lambda_focal, "gamma": focal.gamma, "alpha": focal.alpha}
    return _of_masks(dice, input, target, {**options, **_region_options(dice, loss.lambda_dice)})


def _is_plain(dice: DiceLoss, input: Tensor, target: Tensor, *factors: object) -> bool:
    """Without what compound losses have not."""
    return (
        dice.reduction == "mean" and dice.class_weight is None and not dice.squared_pred and dice.other_act is None
        and min(dice.smooth_nr, dice.smooth_dr) >= 0 and all(isinstance(factor, (int, float)) for factor in factors)
        and input.dim() > 2 and not target.requires_grad
    )  # fmt: skip


def _region_options(dice: DiceLoss, factor: float) -> dict:
    if dice.jaccard:  # MONAI's smooths are beside 2 I
        return {"jaccard": factor, "smooth": (dice.smooth_nr / 2, dice.smooth_dr / 2)}
    return {"dice": factor, "smooth": (dice.smooth_nr, dice.smooth_dr)}


def _of_masks(dice: DiceLoss, input: Tensor, target: Tensor, options: dict) -> Tensor | None:
    """By the sigmoid: each channel of each image is a mask of its own."""
    channels = input.shape[1]
    if not dice.sigmoid or dice.to_onehot_y or not dice.include_background or (dice.batch and channels > 1):
        return None
    # channels_last would be copied.
    viewed = channels == 1 or (input.is_contiguous() and target.is_contiguous())
    if target.shape != input.shape or not viewed or not is_hard(target):
        return None
    x, t = (tensor.flatten(0, 1).flatten(1) for tensor in (input, target))
    with float32_loss(input):
        return compound_loss(x, t, activation="sigmoid", per_image=not dice.batch, **options)
