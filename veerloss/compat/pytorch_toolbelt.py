"""``pytorch_toolbelt.losses``: LovaszLoss, BinaryLovaszLoss, BinaryFocalLoss, CrossEntropyFocalLoss, and the functions that
the last two call.

The Lovász losses have toolbelt's values, which are Berman's: ``veerloss.compat.lovasz_losses`` tells where ours differ. What
LovaszLoss calls logits are probabilities, there as here: it applies no softmax. (One that does is
``veerloss.lovasz_softmax_loss``.)

Values of the focal losses are toolbelt's, and so is the type of the loss, float32; "mean" counts ignored elements. Different
on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit; a fractional gamma with ignore_index: none at all;
- BinaryFocalLoss has a repr without class_weights too;
- ``normalized`` counts the modulating factors of what is not ignored alone, in CrossEntropyFocalLoss too;
- "mean" of no elements is 0, not NaN;
- logits of half precision are not copied to float32; float64 ones are computed in float64, and the loss rounded;
- an unknown reduction, which toolbelt takes for "none", alpha outside [0, 1], a negative gamma and a target outside [0, 1] are
  errors.

One call of the kernel: BinaryFocalLoss and focal_loss_with_logits, of class indices too. Slower, in plain PyTorch:
``normalized``, ``reduced_threshold``, ``activation="softmax"``, targets that require a gradient; and CrossEntropyFocalLoss as a
whole: it weights the cross-entropy of sigmoids by the softmax, for which there is no kernel. For a softmax focal loss see
``veerloss.softmax_focal_loss``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .._arguments import check_label_range
from ..focal import sigmoid_focal_loss as _sigmoid
from . import _lovasz
from ._focal import (
    check_same_shape,
    cross_entropy_elements,
    float32_loss,
    index_error_as,
    index_sigmoid,
    one_hot,
    power,
    reduced,
)

PEER = "pytorch_toolbelt"
DISTRIBUTION = "pytorch-toolbelt"
VERSIONS = ">=0.8,<0.9"
REPLACES = {
    "pytorch_toolbelt.losses.lovasz:BinaryLovaszLoss": "BinaryLovaszLoss",
    "pytorch_toolbelt.losses.lovasz:LovaszLoss": "LovaszLoss",
    "pytorch_toolbelt.losses.focal:BinaryFocalLoss": "BinaryFocalLoss",
    "pytorch_toolbelt.losses.focal:CrossEntropyFocalLoss": "CrossEntropyFocalLoss",
    "pytorch_toolbelt.losses.focal:FocalLoss": "FocalLoss",
    "pytorch_toolbelt.losses.functional:focal_loss_with_logits": "focal_loss_with_logits",
    "pytorch_toolbelt.losses.functional:softmax_focal_loss_with_logits": "softmax_focal_loss_with_logits",
    "pytorch_toolbelt.losses.functional:sigmoid_focal_loss": "sigmoid_focal_loss",
    "pytorch_toolbelt.losses.functional:reduced_focal_loss": "reduced_focal_loss",
}

__all__ = [
    "BinaryFocalLoss",
    "BinaryLovaszLoss",
    "CrossEntropyFocalLoss",
    "FocalLoss",
    "LovaszLoss",
    "focal_loss_with_logits",
    "reduced_focal_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss_with_logits",
]


class BinaryLovaszLoss(_Loss):
    """Binary Lovász hinge loss of logits [N, \\*] or [N, 1, \\*]; target 0 or 1 of as many elements.

    Args:
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore_index: target value that takes no part; a fraction of a float target too, for which it is copied.
    """

    def __init__(self, per_image: bool = False, ignore_index: float | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.per_image = per_image

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _lovasz.hinge(logits, target, self.per_image, self.ignore_index)


class LovaszLoss(_Loss):
    """Lovász-Softmax loss of probabilities [N, C, \\*] and class indices [N, \\*], over the classes present.

    Args:
        per_image: the mean of the images' losses instead of one loss of the batch.
        ignore: target value that takes no part.
    """

    def __init__(self, per_image: bool = False, ignore: int | None = None) -> None:
        super().__init__()
        self.ignore = ignore
        self.per_image = per_image

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return _lovasz.softmax(logits, target, self.per_image, self.ignore, from_logits=False)


_REDUCTIONS = ("none", "mean", "sum", "batchwise_mean", None)


def focal_loss_with_logits(
    output: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    eps: float = 1e-6,
    ignore_index: int | None = None,
    activation: str = "sigmoid",
    softmax_dim: int | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Focal loss of each logit, float32.

    Args:
        output: logits of any shape.
        target: the shape of ``output``, in [0, 1].
        gamma: focusing exponent, >= 0.
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives; None for 1 and 1.
        reduction: "mean" (over all elements, ignored ones included), "sum", "batchwise_mean" (the sum over dimension 0), "none"
            or None.
        normalized: divide by the sum of the modulating factors, at least ``eps``.
        reduced_threshold: the modulating factor is 1 where p_t is below it, elsewhere
            ((1 - p_t) / (1 - reduced_threshold))^gamma.
        ignore_index: target value whose loss is 0.
        activation: "softmax" takes p_t from the softmax over ``softmax_dim``; the cross-entropy stays that of the sigmoid.
        class_weights: [C], factor of each channel of [N, C, \\*] logits.

    Raises:
        ValueError: an argument is out of range, or the shape of target is not that of output.
    """
    _check_reduction(reduction)
    check_same_shape(output, target, "target output")
    if activation not in ("sigmoid", "softmax"):
        raise ValueError(f"activation must be 'sigmoid' or 'softmax', got {activation!r}")
    if class_weights is not None:
        class_weights = class_weights.to(output.device).reshape(-1)
    if normalized or reduced_threshold is not None or activation != "sigmoid" or target.requires_grad:
        return _plain(
            output, target, gamma, alpha, reduction, normalized, reduced_threshold, eps, ignore_index, activation, softmax_dim,
            class_weights,
        )  # fmt: skip
    return _fused(_sigmoid, output, target, gamma, alpha, reduction, ignore_index, class_weights)


def _fused(loss, output, target, gamma, alpha, reduction, ignore_index, class_weights) -> Tensor:
    by_kernel = "none" if reduction in (None, "batchwise_mean") else reduction
    with float32_loss(output):
        loss = loss(
            output, target, alpha=alpha, gamma=gamma, weight=class_weights, ignore_index=ignore_index, reduction=by_kernel,
            normalizer=max(output.numel(), 1) if reduction == "mean" else None,
        ).float()  # fmt: skip
    return loss.sum(0) if reduction == "batchwise_mean" else loss


def _plain(
    output, target, gamma, alpha, reduction, normalized, reduced_threshold, eps, ignore_index, activation, softmax_dim,
    class_weights,
) -> Tensor:  # fmt: skip
    x, t = output.float(), target.float()
    valid = torch.ones_like(t, dtype=torch.bool) if ignore_index is None else t != ignore_index
    t = torch.where(valid, t, torch.zeros_like(t))
    if activation == "sigmoid":
        p, others = torch.sigmoid(x), torch.sigmoid(-x)
    else:
        p = torch.softmax(x, softmax_dim)
        others = 1 - p
    q = p * (1 - t) + others * t
    factor = _modulating(q, 1 - q, gamma, 1.0 if reduced_threshold is None else 1 - reduced_threshold, reduced_threshold)
    loss = factor * cross_entropy_elements(x, t)
    if alpha is not None:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    if class_weights is not None:
        loss = loss * class_weights.reshape(-1, *[1] * (loss.dim() - 2))
    loss = torch.where(valid, loss, torch.zeros_like(loss))
    if normalized:
        loss = loss / (factor * valid).sum().clamp_min(eps)
    return _reduced(loss, reduction)


def softmax_focal_loss_with_logits(
    output: Tensor,
    target: Tensor,
    class_weights: Tensor | None = None,
    gamma: float = 2.0,
    reduction: str | None = "mean",
    normalized: bool = False,
    reduced_threshold: float | None = None,
    eps: float = 1e-6,
    ignore_index: int = -100,
) -> Tensor:
    """The sigmoid's cross-entropy of each class against the rest, modulated by the softmax, summed over classes.

    Args:
        output: logits [N, C, \\*].
        target: class indices [N, \\*].
        class_weights: [C], factor of each channel.
        gamma: focusing exponent, >= 0.
        reduction: "mean" (over all pixels, ignored ones included), "sum", "batchwise_mean" (the sum over dimension 0), "none"
            or None ([N, \\*]).
        normalized: divide by the sum of the modulating factors, at least ``eps``.
        reduced_threshold: the modulating factor is 1 where 1 - p_t is below it, elsewhere
            ((1 - p_t) / reduced_threshold)^gamma.
        ignore_index: target value whose loss is 0.

    Raises:
        ValueError: reduction is not as above.
        RuntimeError: target holds another value.
    """
    _check_reduction(reduction)
    valid = target != ignore_index
    labels = torch.where(valid, target, torch.zeros_like(target)).long()
    x = output if output.dtype == torch.float64 else output.float()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        with index_error_as(RuntimeError):
            check_label_range(labels, x.size(1), None)
    x = torch.where(valid.unsqueeze(1), x, torch.zeros_like(x))
    t = one_hot(labels, x.size(1))
    p = torch.softmax(x, 1)
    q = torch.where(t, 1 - p, p)
    factor = _modulating(q, q, gamma, 1.0 if reduced_threshold is None else reduced_threshold, reduced_threshold)
    loss = factor * cross_entropy_elements(x, t)
    if class_weights is not None:
        loss = loss * class_weights.reshape(-1, *[1] * (loss.dim() - 2))
    loss = torch.where(valid, loss.sum(1), torch.zeros_like(x[:, 0]))
    if normalized:
        loss = loss / (factor * valid.unsqueeze(1)).sum().clamp_min(eps)
    return _reduced(loss, reduction)


def sigmoid_focal_loss(*input, **kwargs) -> Tensor:
    """Deprecated in toolbelt: ``focal_loss_with_logits``."""
    _deprecated("sigmoid_focal_loss", "focal_loss_with_logits")
    return focal_loss_with_logits(*input, **kwargs)


def reduced_focal_loss(
    output: Tensor, target: Tensor, threshold: float = 0.5, gamma: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """Deprecated in toolbelt: ``focal_loss_with_logits`` with a reduced_threshold."""
    _deprecated("reduced_focal_loss", "focal_loss_with_logits")
    return focal_loss_with_logits(output, target, alpha=None, gamma=gamma, reduction=reduction, reduced_threshold=threshold)


class BinaryFocalLoss(nn.Module):
    """Module of ``focal_loss_with_logits``; its target may hold class indices [N, \\*] for logits [N, C, \\*] too."""

    def __init__(
        self,
        alpha: float | None = None,
        gamma: float = 2.0,
        ignore_index: int | None = None,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        activation: str = "sigmoid",
        softmax_dim: int | None = None,
        class_weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.alpha = alpha
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.normalized = normalized
        self.reduced_threshold = reduced_threshold
        self.activation = activation
        self.softmax_dim = softmax_dim
        if class_weights is not None and not isinstance(class_weights, Tensor):
            class_weights = torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        rare = self.normalized or self.reduced_threshold is not None or self.activation != "sigmoid"
        if targets.dim() + 1 == inputs.dim():
            if targets.dtype.is_floating_point or targets.dtype == torch.bool:
                raise RuntimeError(f"targets without a channel must hold class indices, got {targets.dtype}")
            with index_error_as(RuntimeError):
                if not rare:
                    return _fused(
                        index_sigmoid, inputs, targets, self.gamma, self.alpha, self.reduction, self.ignore_index,
                        self.class_weights,
                    )  # fmt: skip
            targets = self._one_hot(targets, inputs.size(1))
        return focal_loss_with_logits(
            inputs, targets, alpha=self.alpha, gamma=self.gamma, reduction=self.reduction, normalized=self.normalized,
            reduced_threshold=self.reduced_threshold, ignore_index=self.ignore_index, activation=self.activation,
            softmax_dim=self.softmax_dim, class_weights=self.class_weights,
        )  # fmt: skip

    def _one_hot(self, labels: Tensor, classes: int) -> Tensor:
        if self.ignore_index is None:
            return F.one_hot(labels.long(), classes).movedim(-1, 1)
        ignored = labels == self.ignore_index
        one_hot = F.one_hot(labels.masked_fill(ignored, 0).long(), classes).movedim(-1, 1)
        return one_hot.masked_fill(ignored.unsqueeze(1), self.ignore_index)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, gamma={self.gamma}, ignore_index={self.ignore_index}, reduction={self.reduction}, "
            f"normalized={self.normalized}, reduced_threshold={self.reduced_threshold}, activation={self.activation}, "
            f"softmax_dim={self.softmax_dim}, class_weights={self.class_weights}"
        )


class CrossEntropyFocalLoss(nn.Module):
    """Module of ``softmax_focal_loss_with_logits``."""

    def __init__(
        self,
        gamma: float = 2.0,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        ignore_index: int = -100,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.gamma = gamma
        self.reduction = reduction
        self.reduced_threshold = reduced_threshold
        self.normalized = normalized
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return softmax_focal_loss_with_logits(
            inputs, targets, gamma=self.gamma, reduction=self.reduction, normalized=self.normalized,
            reduced_threshold=self.reduced_threshold, ignore_index=self.ignore_index, class_weights=self.class_weights,
        )  # fmt: skip


def FocalLoss(*input, **kwargs) -> CrossEntropyFocalLoss:
    """Deprecated in toolbelt: ``CrossEntropyFocalLoss``."""
    _deprecated("FocalLoss", "CrossEntropyFocalLoss")
    return CrossEntropyFocalLoss(*input, **kwargs)


def _modulating(q: Tensor, compared: Tensor, gamma: float, scale: float, threshold: float | None) -> Tensor:
    """(q / scale)^gamma, but 1 where ``compared`` is below the threshold."""
    factor = power(q / scale, gamma)
    return factor if threshold is None else torch.where(compared < threshold, torch.ones_like(factor), factor)


def _reduced(loss: Tensor, reduction: str | None) -> Tensor:
    return loss.sum(0) if reduction == "batchwise_mean" else reduced(loss, reduction or "none")


def _check_reduction(reduction: str | None) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def _deprecated(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=3)
