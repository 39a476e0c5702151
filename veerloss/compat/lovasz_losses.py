"""Berman's ``lovasz_losses.py`` (LovaszSoftmax, 2018), which most projects of segmentation in 3D carry a copy of:
``from veerloss.compat import lovasz_losses as L``, or ``from veerloss.compat.lovasz_losses import lovasz_softmax``.

The whole file, its names, arguments and defaults. Probabilities are [B, C, H, W], [B, C, \\*] as the copies for volumes and
points take them, or [P, C]; and [B, H, W], the sigmoid map of one class. Values are Berman's formula in exact weights.
Different on purpose:

- the gradient keeps its digits on large images: Berman subtracts float32 Jaccard values, and loses 9% of it at 4M pixels;
- nothing valid: 0, of which the backward pass is 0 (there a loss of shape [0, C], on which it fails; ``lovasz_hinge_flat`` had
  it right); no class present, or no image in the batch: a 0 that has a gradient, not the int 0;
- one valid pixel, on which the original fails with an IndexError; labels of any integer type;
- labels that are neither a class nor ``ignore`` are an IndexError: there they are background to every class, without a word,
  which is how a forgotten ``ignore=255`` went unnoticed. Of a sigmoid map other labels are background, as it is meant;
- float64, on which the original fails. Of float16 and bfloat16 the loss is float32, as there.

``lovasz_softmax`` and ``lovasz_hinge``, and their ``_flat`` forms, are one call of a kernel, which leaves ignored pixels out;
for the sigmoid map of one class the labels are copied first, as bytes.
The measures ``iou`` and ``iou_binary``, ``lovasz_grad``, ``xloss`` and ``binary_xloss`` are plain PyTorch, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import filterfalse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import widened
from ..lovasz import lovasz_softmax_loss
from . import _lovasz
from ._focal import float32_loss

PEER = "lovasz_losses"
DISTRIBUTION = None
VERSIONS = None
REPLACES = {
    f"lovasz_losses:{name}": name
    for name in ("lovasz_softmax", "lovasz_softmax_flat", "lovasz_hinge", "lovasz_hinge_flat", "lovasz_grad")
}

__all__ = [
    "StableBCELoss",
    "binary_xloss",
    "flatten_binary_scores",
    "flatten_probas",
    "iou",
    "iou_binary",
    "isnan",
    "lovasz_grad",
    "lovasz_hinge",
    "lovasz_hinge_flat",
    "lovasz_softmax",
    "lovasz_softmax_flat",
    "mean",
    "xloss",
]


# ---- binary


def lovasz_hinge(logits: Tensor, labels: Tensor, per_image: bool = True, ignore: int | None = None) -> Tensor:
    """Binary Lovász hinge loss.

    Args:
        logits: [B, H, W], or [B, \\*] and [P]: of [P] all points are one image.
        labels: as many as ``logits``, 0 or 1 in any type.
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore: label of pixels that take no part.

    Raises:
        RuntimeError: labels are not as many; an IndexError with ``ignore``.
        IndexError: labels hold another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    return _lovasz.hinge(logits, labels, per_image, ignore)


def lovasz_hinge_flat(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary Lovász hinge loss of logits [P] and labels [P], 0 or 1."""
    return _lovasz.hinge(logits, labels, False, None)


def flatten_binary_scores(scores: Tensor, labels: Tensor, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores and labels as [P], without the pixels whose label is ``ignore``."""
    return _without_ignored(scores.reshape(-1), labels.reshape(-1), ignore)


class StableBCELoss(nn.Module):
    """Binary cross-entropy of logits, mean over all elements."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(input, target.to(input.dtype))


def binary_xloss(logits: Tensor, labels: Tensor, ignore: int | None = None) -> Tensor:
    """Binary cross-entropy of logits [B, H, W] and labels [B, H, W], mean over the pixels that are not ignored: 0 of none."""
    logits, labels = flatten_binary_scores(logits, labels, ignore)
    if logits.numel() == 0:
        return logits.sum()
    return StableBCELoss()(logits, labels)


# ---- multiclass


def lovasz_softmax(
    probas: Tensor,
    labels: Tensor,
    classes: str | Sequence[int] = "present",
    per_image: bool = False,
    ignore: int | None = None,
) -> Tensor:
    """Multiclass Lovász-Softmax loss of probabilities.

    Args:
        probas: [B, C, H, W], [B, C, \\*] or [P, C], between 0 and 1: those of a softmax over C. Or [B, H, W], with a label for
            each: of a sigmoid, with ``classes=[c]`` those of class c.
        labels: class indices [B, H, W], [B, \\*] or [P], or as many in another shape.
        classes: "present": those in the labels; "all"; or a list of class ids, which all count, present or not.
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore: label of pixels that take no part.

    Raises:
        ValueError: ``classes`` is not one class for the probabilities of one.
        RuntimeError: labels are not as many as pixels; an IndexError with ``ignore``.
        IndexError: labels hold a value that is neither a class nor ``ignore`` (on a GPU only with VEERLOSS_CHECK=1 in the
            environment).
    """
    return _softmax(_with_channel(probas, labels), labels, classes, per_image, ignore)


def lovasz_softmax_flat(probas: Tensor, labels: Tensor, classes: str | Sequence[int] = "present") -> Tensor:
    """Multiclass Lovász-Softmax loss of probabilities [P, C] and labels [P]; ``classes`` as in ``lovasz_softmax``."""
    return _softmax(probas, labels, classes, False, None)


def _softmax(probas: Tensor, labels: Tensor, classes, per_image: bool, ignore: int | None) -> Tensor:
    if isinstance(classes, Iterable) and not isinstance(classes, str):
        classes = list(classes)
    per_image = bool(per_image) and probas.dim() > 2  # points are one image
    if probas.dim() < 2 or probas.size(1) != 1:
        return _lovasz.softmax(probas, labels, per_image, ignore, classes=classes, from_logits=False)
    # One class, whose label need not be 0: it becomes 0, all others 1, background.
    if not isinstance(classes, list) or len(classes) != 1:
        raise ValueError(f"classes must be one class, such as [1], for the probabilities of one class, got {classes!r}")
    labels = widened(_lovasz.in_shape(labels, probas.shape[:1] + probas.shape[2:], per_image, ignore))
    binary = (labels != classes[0]).view(torch.uint8)
    if ignore is not None:
        binary, ignore = binary.masked_fill(labels == ignore, 2), 2
    with float32_loss(probas):
        return lovasz_softmax_loss(
            probas, binary, classes="all", background_index=1, per_image=per_image, ignore_index=ignore, from_logits=False
        )


def _with_channel(probas: Tensor, labels: Tensor) -> Tensor:
    """[B, H, W] as [B, 1, H, W]. Copies for points have [B, C, N] too: with a label [B, N] for each pixel."""
    for_each = probas.dim() == 3 and labels.dim() != 2 and labels.numel() == probas.numel() > 0
    return probas.unsqueeze(1) if for_each or (probas.dim() > 1 and probas.shape == labels.shape) else probas


def flatten_probas(probas: Tensor, labels: Tensor, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities as [P, C] and labels as [P], without the pixels whose label is ``ignore``. (No loss here needs that.)"""
    probas = _with_channel(probas, labels)
    probas = probas.movedim(1, -1).reshape(-1, probas.size(1)) if probas.dim() > 1 else probas.reshape(-1, 1)
    return _without_ignored(probas, labels.reshape(-1), ignore)


def _without_ignored(values: Tensor, labels: Tensor, ignore: int | None) -> tuple[Tensor, Tensor]:
    if ignore is None:
        return values, labels
    valid = widened(labels) != ignore
    return values[valid], labels[valid]


def xloss(logits: Tensor, labels: Tensor, ignore: int | None = None) -> Tensor:
    """Cross-entropy of logits [B, C, H, W] and labels [B, H, W], mean over the pixels that are not ignored; 255 by default."""
    return F.cross_entropy(logits, labels.long(), ignore_index=255 if ignore is None else ignore)


# ---- what the losses are made of, and measures


def lovasz_grad(gt_sorted: Tensor) -> Tensor:
    """The Lovász extension's gradient with respect to sorted errors: the step of the Jaccard loss at each.

    Args:
        gt_sorted: [P], 1 for foreground and 0 for background, in descending order of the errors.

    Returns:
        [P], the type of ``gt_sorted``, float32 for integers and bool; from integer counts (see ``veerloss``).
    """
    from ..reference.lovasz import lovasz_weights

    dtype = gt_sorted.dtype if gt_sorted.dtype.is_floating_point else torch.float32
    places = torch.arange(gt_sorted.numel(), 0, -1, device=gt_sorted.device, dtype=torch.float64)
    foreground = gt_sorted > 0
    return lovasz_weights(places, foreground, torch.ones_like(foreground)).to(dtype)


def iou_binary(preds: Tensor, labels: Tensor, EMPTY: float = 1.0, ignore: int | None = None, per_image: bool = True) -> float:
    """IoU of the foreground, in percent: mean over the images, or of the batch. ``EMPTY`` counts where there is neither."""
    if not per_image:
        preds, labels = (preds,), (labels,)
    ious = [_iou_of(label == 1, pred == 1, label, EMPTY, ignore) for pred, label in zip(preds, labels, strict=True)]
    return 100 * mean(ious)


def iou(preds: Tensor, labels: Tensor, C: int, EMPTY: float = 1.0, ignore: int | None = None, per_image: bool = False):
    """IoU of each of C classes but ``ignore``, in percent, a NumPy array: mean over the images, or of the batch."""
    import numpy as np  # which veerloss does not need otherwise

    if not per_image:
        preds, labels = (preds,), (labels,)
    classes = [c for c in range(C) if c != ignore]
    ious = [
        [_iou_of(label == c, pred == c, label, EMPTY, ignore) for c in classes]
        for pred, label in zip(preds, labels, strict=True)
    ]
    return 100 * np.array([mean(of_class) for of_class in zip(*ious, strict=True)])


def _iou_of(label: Tensor, pred: Tensor, labels: Tensor, empty: float, ignore: int | None) -> float:
    counted = pred if ignore is None else pred & (labels != ignore)
    union = (label | counted).sum()
    return float((label & pred).sum() / union) if union > 0 else empty


# ---- helpers


def isnan(x: object) -> bool:
    return x != x


def mean(values: Iterable, ignore_nan: bool = False, empty=0):
    """Mean of an iterable of numbers or tensors; ``empty`` of none, with ``empty="raise"`` a ValueError."""
    values = list(filterfalse(isnan, values) if ignore_nan else values)
    if not values:
        if empty == "raise":
            raise ValueError("Empty mean")
        return empty
    return math.fsum(values) / len(values) if not any(isinstance(v, Tensor) for v in values) else sum(values) / len(values)
