"""DiceLoss, JaccardLoss and TverskyLoss of segmentation-models-pytorch; segmentation_models_pytorch.py tells of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from .._arguments import check_label_range, check_unit_range, loss_dtype
from ..reference.region import LEAST_INDEX
from ._focal import NO_LABEL, index_error_as, is_hard, one_hot, require, to_opmath
from ._region import are_probabilities, mean_of, region_losses, region_sums

MODES = ("binary", "multiclass", "multilabel")


class _RegionLoss(_Loss):
    #: Of false positives and of false negatives.
    _weights = (0.5, 0.5)

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        require(mode in MODES, f"mode must be one of {MODES}, got {mode!r}")
        if class_weights is not None and mode == "binary":
            raise ValueError("class_weights are not supported with mode='binary'")
        require(classes is None or mode != "binary", "classes are not supported with mode='binary'")
        super().__init__()
        self.mode = mode
        self.classes = None if classes is None else torch.as_tensor(classes, dtype=torch.long)
        self.from_logits = from_logits
        self.smooth = smooth
        self.eps = eps
        self.log_loss = log_loss
        self.ignore_index = ignore_index
        self.class_weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float)

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Raises:
            AssertionError: y_true has another number of elements; a RuntimeError with ignore_index.
            RuntimeError: "multiclass", and y_true holds a value that is no class (on a GPU only with VEERLOSS_CHECK=1 in the
                environment).
            IndexError: in the other modes, y_true holds a value outside [0, 1] (the same).
        """
        dtype = loss_dtype(y_pred)
        y_pred, y_true = self._as_pixels(y_pred, y_true)
        loss = (self._fused if self._fuses(y_pred, y_true) else self._plain)(y_pred, y_true)
        if self.classes is not None:
            loss = loss[self.classes.to(loss.device)]
        return self.aggregate_loss(loss).to(dtype)

    def aggregate_loss(self, loss: Tensor) -> Tensor:
        """The mean over classes of their losses [C], weighted by class_weights."""
        if self.class_weights is None:
            return mean_of(loss)
        weights = self.class_weights.to(loss.device)
        if self.classes is not None:
            weights = weights[self.classes.to(loss.device)]
        return (loss * weights).sum() / weights.sum()

    def _as_pixels(self, y_pred: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor]:
        """Both [N, C, P]; the labels of "multiclass" [N, P]."""
        n, c = y_pred.size(0), y_pred.size(1) if self.mode != "binary" else 1
        pixels = y_pred.numel() // max(n * c, 1)
        expected = n * pixels * (1 if self.mode == "multiclass" else c)
        if y_true.size(0) != n or y_true.numel() != expected:
            error = AssertionError if self.ignore_index is None or y_true.size(0) != n else RuntimeError
            raise error(f"y_true must have {expected} elements for y_pred {list(y_pred.shape)}, got {list(y_true.shape)}")
        y_pred = y_pred.reshape(n, c, pixels)
        if self.mode != "multiclass":
            return y_pred, y_true.reshape(n, c, pixels)
        y_true = y_true.reshape(n, pixels)
        return y_pred, y_true.long() if y_true.dtype.is_floating_point or y_true.dtype == torch.bool else y_true

    def _fuses(self, y_pred: Tensor, y_true: Tensor) -> bool:
        alpha, beta = self._weights
        if y_true.requires_grad or min(alpha, beta, self.smooth) < 0 or (self.log_loss and self.eps < LEAST_INDEX):
            return False
        # One target pixel makes the denominator at least this: then eps is not seen.
        if min(1.0, beta) + self.smooth < self.eps:
            return False
        if self.mode != "multiclass" and not is_hard(y_true, self.ignore_index):
            return False
        return self.from_logits or are_probabilities(y_pred)

    def _fused(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Of each class [C]."""
        alpha, beta = self._weights
        activation = ("softmax" if self.mode == "multiclass" else "sigmoid") if self.from_logits else "none"
        indices = self.mode == "multiclass"
        with index_error_as(RuntimeError if indices else IndexError):
            loss = region_losses(
                y_pred, y_true, activation=activation, alpha=alpha, beta=beta, smooth=self.smooth, classes="present",
                per_image=False, form="log" if self.log_loss else "linear", ignore_index=self.ignore_index,
                background_index=NO_LABEL if indices and y_pred.size(1) == 1 else None,
            )  # fmt: skip
        return loss.clamp(max=-math.log(self.eps)) if self.log_loss and self.eps > LEAST_INDEX else loss

    def _plain(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        valid = torch.ones_like(y_true, dtype=torch.bool) if self.ignore_index is None else y_true != self.ignore_index
        y_true = torch.where(valid, y_true, torch.zeros_like(y_true))
        checks = y_true.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.mode == "multiclass":
            if checks:
                with index_error_as(RuntimeError):
                    check_label_range(y_true, y_pred.size(1), None)
            y_true, valid = one_hot(y_true, y_pred.size(1)) & valid.unsqueeze(1), valid.unsqueeze(1)
        elif checks:
            check_unit_range(y_true.detach(), None)
        p = torch.where(valid, to_opmath(y_pred), 0.0)
        if self.from_logits:
            p = p.softmax(1) if self.mode == "multiclass" else p.sigmoid()
        p = torch.where(valid, p, 0.0)
        i, s, t = region_sums(p, y_true.to(p.dtype), [0, 2], False, True)
        alpha, beta = self._weights
        score = (i + self.smooth) / (i + alpha * (s - i) + beta * (t - i) + self.smooth).clamp_min(self.eps)
        loss = -torch.log(score.clamp_min(self.eps)) if self.log_loss else 1 - score
        return torch.where(t > 0, loss, torch.zeros_like(loss))


class DiceLoss(_RegionLoss):
    """Dice loss of each class over the batch, 0 for a class without a target pixel; the mean over all classes.

    Args:
        mode: "binary" (prediction and target of as many elements, all one class), "multiclass" (logits [N, C, \\*], class
            indices [N, \\*]) or "multilabel" (both [N, C, \\*]).
        classes: the classes that the mean is over. Not for "binary".
        log_loss: -log of the Dice coefficient instead of 1 - it.
        from_logits: False: the prediction holds probabilities.
        smooth: added to numerator and denominator of I / (I + (S - I) / 2 + (T - I) / 2).
        ignore_index: target value that takes no part.
        eps: the denominator is at least this, and so is what log_loss takes the logarithm of.
        class_weights: one per class: the mean over classes is weighted by them. Not for "binary".
    """


class JaccardLoss(_RegionLoss):
    """Soft Jaccard loss, I / (I + (S - I) + (T - I)); else as ``DiceLoss``."""

    _weights = (1.0, 1.0)


class TverskyLoss(DiceLoss):
    """Tversky loss, I / (I + alpha (S - I) + beta (T - I)); else as ``DiceLoss``.

    Args:
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: power of the mean over classes.
    """

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(mode, classes, log_loss, from_logits, smooth, ignore_index, eps, class_weights)
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma

    @property
    def _weights(self) -> tuple[float, float]:
        return self.alpha, self.beta

    def aggregate_loss(self, loss: Tensor) -> Tensor:
        """The mean over classes to the power of gamma, whose gradient at 0 is 0."""
        loss = super().aggregate_loss(loss)
        if self.gamma == 1:
            return loss
        return torch.where(loss > 0, torch.where(loss > 0, loss, 1.0) ** self.gamma, 0.0 * loss)
