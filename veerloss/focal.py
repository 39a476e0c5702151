"""Focal losses: public functions and modules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _arguments as arguments
from . import ops, reference
from ._module import LossModule
from ._upsample import LowLogits, as_low, in_order, option


def _sigmoid_takes_low(low: LowLogits, target: Tensor, options: dict) -> bool:
    """The CUDA kernels take a loss that is reduced, without a weight."""
    each = options.get("reduction", "mean") == "none" or options.get("weight") is not None
    return low.kernels == "cpu" or (low.fits_kernels() and not (low.kernels == "cuda" and each))


@option(loss="sigmoid focal", fused=_sigmoid_takes_low, mask=lambda _: False)
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
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Binary focal loss of every logit: multilabel, one-vs-rest, or dense detection.

    $$\alpha_t\, \mathrm{bce}(x, t)\, (1 - p_t)^\gamma, \quad 1 - p_t = p (1 - t) + (1 - p) t, \quad p = \sigma(x)$$

    (Lin et al., ICCV 2017, arXiv 1708.02002, eq. 5; for soft targets the formula of torchvision.) Finite, with a finite
    gradient, for every finite logit and every gamma >= 0. An infinite logit gives NaN.

    Args:
        logits: [N, C, \*] or any shape; float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two).
        target: the shape of ``logits``, bool, integer (0 or 1) or float in [0, 1]; or integer class indices [N, \*] for
            logits [N, C, \*], each channel then being its class against the rest (C = 1 needs a ``background_index``).
        alpha: weight of positives, 1 - alpha being that of negatives: a number in [0, 1], or a tensor [C]. None: 1 for both.
        gamma: focusing exponent, >= 0.
        weight: factor of each element: a tensor [C] for logits [N, C, \*], or one that broadcasts to ``logits``.
        ignore_index: target value that takes no part.
        background_index: class index that is none, outside [0, C): a pixel that has it is a negative of every class, as
            detectors count background (often C, or -1).
        reduction: "none" (the shape of ``logits``), "mean" over the valid elements, or "sum".
        normalizer: divisor of "mean" instead of the number of valid elements, such as the number of positives: a number > 0 or
            a tensor of one element.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native", "triton" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast: 0-d, or the shape of ``logits`` for "none". 0 where
        nothing is valid.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value out of range. On a GPU only if VEERLOSS_CHECK=1 is in the environment: else the loss is
            NaN.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = sigmoid_focal_loss(logits, torch.ones(2, 4, dtype=torch.long), alpha=0.25)
        >>> loss.backward()
    """
    arguments.check_logits(logits, 0, "[N, C, *]")
    arguments.check_target(target, logits)
    one_vs_rest = target.dim() != logits.dim() or target.shape != logits.shape  # dim first: no guard on equal sizes
    if one_vs_rest:
        if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                f"target must have the shape of logits, {list(logits.shape)}, or hold class indices [N, *] for logits "
                f"[N, C, *], got {list(target.shape)}{arguments.upsample_hint(target, logits)}"
            )
        if logits.size(1) == 1 and background_index is None:
            raise ValueError(
                f"target without a channel is ambiguous for one-channel logits {list(logits.shape)}, got {list(target.shape)}; "
                "expected target.unsqueeze(1), or class indices with a background_index"
            )
        arguments.check_index_target(target, logits)
    gamma = arguments.as_number("gamma", gamma, 0)
    alpha = check_alpha(alpha, logits, logits.size(1) if logits.dim() > 1 else 1, 1)
    if weight is not None:
        weight = _element_weight(weight, logits)
    ignore_index = arguments.as_ignore_index(ignore_index)
    if background_index is not None:
        if not one_vs_rest:
            raise ValueError(
                f"background_index is for a target of class indices [N, *], got {arguments.shown(background_index)} "
                f"for a target of the shape of logits, {list(target.shape)}"
            )
        background_index = arguments.as_background_index(background_index, logits.size(1), ignore_index)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    normalizer = arguments.as_normalizer(normalizer, reduction, logits)

    backend = arguments.choose_backend(backend, logits.device, "sigmoid focal")
    if arguments.checks_values(backend, logits.device):
        if one_vs_rest:
            arguments.check_label_range(target, logits.size(1), ignore_index, background_index)
        else:
            arguments.check_unit_range(target, ignore_index)
    if backend == "reference":
        return reference.sigmoid_focal_loss(
            logits, target, alpha=alpha, gamma=gamma, weight=weight, ignore_index=ignore_index,
            background_index=background_index, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    class_alpha = as_class_alpha(alpha, logits)
    options = {
        "alpha": alpha if class_alpha is None else None, "class_alpha": class_alpha, "gamma": gamma,
        "ignore_index": ignore_index, "background_index": background_index, "reduction": reduction, "normalizer": normalizer,
        "backend": backend,
    }  # fmt: skip
    if (low := as_low(upsample)) is not None:
        x, t = low.inputs(target)
        w = None if weight is None else in_order(weight, 2)
        options["upsample"] = low.interpolation

        def restore(loss):
            return loss.reshape(logits.shape)
    else:
        x, t, w, restore = _elements(logits, target, weight, isinstance(alpha, Tensor))
    loss = ops.sigmoid_focal(x, t, weight=w, **options)
    return restore(loss) if reduction == "none" else loss


def _softmax_takes_low(low: LowLogits, target: Tensor, options: dict) -> bool:
    """Kernels of a GPU take one class a pixel."""
    hard = target.dim() == low.logits.dim() - 1 and options.get("label_smoothing", 0.0) == 0
    return low.kernels == "cpu" or (hard and low.fits_kernels(32 if low.kernels == "cuda" else 128))


@option(loss="softmax focal", fused=_softmax_takes_low, mask=lambda _: False)
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
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Multiclass focal loss of every pixel.

    $$-\sum_c t_c\, \alpha_c (1 - p_c)^\gamma \log p_c, \quad p = \mathrm{softmax}(x)$$

    (Lin et al., ICCV 2017, arXiv 1708.02002, with the softmax of all classes; t is 1 for the target's class and 0 for the
    others, or the target itself.) gamma = 0 is
    ``torch.nn.functional.cross_entropy`` with ``alpha`` as its weight, but for what "mean" divides by. 1 - p is the sum of
    the other probabilities, so that confident pixels keep their digits.

    Args:
        logits: [N, C, \*] or [C]; float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two).
        target: class indices [N, \*] (or 0-d), uint8, int8, int16, int32 or int64; or class probabilities, the shape of
            ``logits``, float32, float64, bfloat16 or float16: finite and >= 0, and they need not add up to 1.
        alpha: factor of each class's loss: a number >= 0, or a tensor [C] of values >= 0, one per class.
        gamma: focusing exponent, >= 0.
        weight: factor of each pixel's loss: a tensor that broadcasts to [N, \*]. It is applied to the loss of each pixel, and
            so takes memory of [N, \*].
        label_smoothing: in [0, 1]: the target becomes 1 - label_smoothing times itself plus label_smoothing / C on every class.
        ignore_index: class index that takes no part; None for none. Class probabilities have none: it does not matter there.
        reduction: "none" (the shape [N, \*]), "mean" over the valid pixels (not weighted by alpha or weight), or "sum".
        normalizer: divisor of "mean" instead of the number of valid pixels: a number > 0 or a tensor of one element.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native", "triton" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast: 0-d, or [N, \*] for "none". 0 where no pixel is valid. As in
        cross_entropy, -inf masks a class out, and NaN or +inf gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value that is neither a class nor ``ignore_index``, or no probability. On a GPU only if
            VEERLOSS_CHECK=1 is in the environment: else the loss is NaN.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = softmax_focal_loss(logits, torch.ones(2, 4, dtype=torch.long), gamma=2.0)
        >>> loss.backward()
    """
    arguments.check_logits(logits, 1, "[N, C, *] or [C]")
    probabilities = isinstance(target, Tensor) and target.is_floating_point() and target.dim() == logits.dim()
    if probabilities:
        arguments.check_class_probabilities(target, logits)
    else:
        arguments.check_index_target(target, logits)
    gamma = arguments.as_number("gamma", gamma, 0)
    label_smoothing = arguments.as_number("label_smoothing", label_smoothing, 0, 1)
    classes = logits.size(1) if logits.dim() > 1 else logits.size(0)
    alpha = check_alpha(alpha, logits, classes, math.inf)
    if weight is not None:
        weight = _pixel_weight(weight, logits)
    ignore_index = arguments.as_ignore_index(ignore_index)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    normalizer = arguments.as_normalizer(normalizer, reduction, logits)

    backend = arguments.choose_backend(backend, logits.device, "softmax focal")
    if arguments.checks_values(backend, logits.device):
        if probabilities:
            arguments.check_probabilities(target)
        else:
            arguments.check_label_range(target, classes, ignore_index)
    if backend == "reference":
        return reference.softmax_focal_loss(
            logits, target, alpha=alpha, gamma=gamma, weight=weight, label_smoothing=label_smoothing,
            ignore_index=ignore_index, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    class_alpha = as_class_alpha(alpha, logits)
    options = {
        "alpha": 1.0 if alpha is None or class_alpha is not None else alpha, "class_alpha": class_alpha, "gamma": gamma,
        "label_smoothing": label_smoothing, "ignore_index": ignore_index, "backend": backend,
    }  # fmt: skip
    if (low := as_low(upsample)) is not None:
        x, y = low.inputs(target)
        options["upsample"] = low.interpolation
    else:
        x = arguments.as_pixels(logits)
        y = arguments.as_pixels(target) if probabilities else target.reshape(x.size(0), x.size(2))
    if weight is None:
        loss = ops.softmax_focal(x, y, reduction=reduction, normalizer=normalizer, **options)
        return loss.reshape(_pixel_shape(logits)) if reduction == "none" else loss
    losses = ops.softmax_focal(x, y, reduction="none", normalizer=None, upcast_loss=True, **options)
    if probabilities or ignore_index is None:
        valid = torch.ones_like(weight, dtype=torch.bool)
    else:
        valid = arguments.widened(target) != ignore_index
    loss = _weighted(losses.reshape(weight.shape), weight, valid, reduction, normalizer)
    return loss.to(arguments.loss_dtype(logits))


def check_alpha(alpha: float | Tensor | None, logits: Tensor, classes: int, high: float) -> float | Tensor | None:
    """A number, or a tensor of one value per class."""
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        return arguments.as_number("alpha", alpha, 0, high)
    if alpha.dim() == 0:
        alpha = alpha.expand(classes)
    arguments.check_per_class("alpha", alpha, logits, classes)
    return alpha


def as_class_alpha(alpha: float | Tensor | None, logits: Tensor) -> Tensor | None:
    return alpha.to(arguments.opmath_dtype(logits)).contiguous() if isinstance(alpha, Tensor) else None


def _element_weight(weight: Tensor, logits: Tensor) -> Tensor:
    """``weight`` expanded to the shape of ``logits``; a 1-d weight goes by channel."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__}")
    arguments.check_constant("weight", weight, logits)
    if weight.dim() == 1 and logits.dim() > 1:
        arguments.check_per_class("weight", weight, logits, logits.size(1))
        weight = weight.reshape(-1, *[1] * (logits.dim() - 2))
    try:
        return weight.expand(logits.shape)
    except RuntimeError:
        raise ValueError(f"weight must broadcast to logits, {list(logits.shape)}, got {list(weight.shape)}") from None


def _weighted(losses: Tensor, weight: Tensor, valid: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The loss from those of the pixels, which kernels reduce themselves where there is no weight."""
    losses = losses * torch.where(valid, weight, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    divisor = valid.sum() if normalizer is None else normalizer
    if isinstance(divisor, Tensor):  # nothing valid: loss and gradient are 0, whatever it is
        divisor = torch.where(valid.any(), divisor.reshape(()), 1)
    return total / divisor


def _pixel_shape(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]


def _pixel_weight(weight: Tensor, logits: Tensor) -> Tensor:
    """``weight`` expanded to the shape of the pixels."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {type(weight).__name__} {arguments.shown(weight)}")
    arguments.check_constant("weight", weight, logits)
    shape = _pixel_shape(logits)
    try:
        return weight.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"weight must broadcast to the pixels, {list(shape)} of logits {list(logits.shape)}, got {list(weight.shape)}"
        ) from None


def _elements(
    logits: Tensor, target: Tensor, weight: Tensor | None, by_channel: bool
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """The tensors as [N, C, P] for the kernels, and how to give a loss of that shape the shape of ``logits``.

    Where every element is treated alike and all tensors lie in memory the same way, that is one long row.
    """
    shape = logits.shape
    tensors = [logits, target] if weight is None else [logits, target, weight]
    dense = target.dim() == logits.dim()
    if logits.dim() < 2 or (dense and not by_channel and all(t.is_contiguous() for t in tensors)):
        x, t, *w = (t.reshape(1, 1, logits.numel()) for t in tensors)
        return x, t, w[0] if w else None, lambda loss: loss.reshape(shape)
    if dense and not by_channel and all(t.movedim(1, -1).is_contiguous() for t in tensors):  # channels_last
        last = logits.movedim(1, -1).shape
        x, t, *w = (t.movedim(1, -1).reshape(1, 1, logits.numel()) for t in tensors)
        return x, t, w[0] if w else None, lambda loss: loss.reshape(last).movedim(-1, 1)
    x = arguments.as_pixels(logits)
    t = arguments.as_pixels(target) if dense else target.reshape(x.size(0), x.size(2))
    return x, t, None if weight is None else arguments.as_pixels(weight), lambda loss: loss.reshape(shape)


class SigmoidFocalLoss(LossModule, function=sigmoid_focal_loss):
    """Module of ``sigmoid_focal_loss``, with the same arguments; tensors among them are buffers."""


class SoftmaxFocalLoss(LossModule, function=softmax_focal_loss):
    """Module of ``softmax_focal_loss``, with the same arguments; tensors among them are buffers."""
