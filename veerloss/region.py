"""Region losses: public functions and modules. Most of these lines are what users read of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _arguments as arguments
from . import ops, reference
from ._distributed import join
from ._layout import Activation, Form
from ._module import LossModule
from ._upsample import LowLogits, option
from ._version import __version__

ACTIVATIONS = {"softmax": Activation.SOFTMAX, "sigmoid": Activation.SIGMOID, "none": Activation.NONE}
FORMS = {"linear": Form.LINEAR, "log": Form.LOG, "log_cosh": Form.LOG_COSH}
Smooth = float | tuple[float, float]


def _takes_low(low: LowLogits, target: Tensor, options: dict) -> bool:
    """On a GPU only what a softmax's own kernels do."""
    if low.kernels != "cuda":
        return low.kernels == "cpu"
    hard = target.dim() == low.logits.dim() - 1 and not options.get("squared", False)
    return hard and options.get("activation", "softmax") == "softmax" and low.fits_kernels(24)


_with_upsample = option(loss="region", fused=_takes_low, mask=lambda _: False)


@_with_upsample
def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    activation: str = "softmax",
    classes: str | Sequence[int] = "all",
    present_only: bool = False,
    per_image: bool = False,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    form: str = "linear",
    exponent: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Tversky loss: 1 - TI, the index of a class over its pixels.

    $$TI = \frac{I + s}{I + \alpha (S - I) + \beta (T - I) + s}, \quad I = \sum p t,\ S = \sum p,\ T = \sum t$$

    (Salehi, Erdogmus, Gholipour, MLMI 2017, arXiv 1706.05721, eq. 4.) alpha = beta = 1/2 is Dice, 1 soft Jaccard. The three
    sums of a class are integers of fixed point: the same bits for any number of threads and ranks.

    Args:
        logits: [N, C, \*] float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two, sums exact). A binary
            mask is [N, 1, \*] with "sigmoid".
        target: class indices [N, \*], uint8, int8, int16, int32 or int64 (with one channel 0 or 1); or values in [0, 1] of the
            shape of ``logits``, bool, integer or float: one-hot, multilabel or soft.
        alpha: weight of false positives, >= 0.
        beta: weight of false negatives, >= 0.
        activation: what makes probabilities of ``logits``: "softmax" over the classes, "sigmoid" of each, or "none": they are
            probabilities already.
        classes: "all" averages over every class, "present" over those that have a target pixel, a sequence of class ids over
            those. (Background is one of the classes: ``range(1, C)`` leaves it out.)
        present_only: of a sequence of ``classes`` only those that have a target pixel; what "present" is to "all".
        per_image: the loss of each image, then the mean over all images, instead of one loss of all pixels of the batch.
        squared: sum the squares of probabilities and targets in the denominator (Milletari, Navab, Ahmadi, 3DV 2016).
        smooth: added to numerator and denominator, >= 0; a pair has one for each. With 0 the index of a class that is neither
            in the target nor in the prediction is 1.
        form: "linear", 1 - index; "log", -log index; "log_cosh", log cosh (1 - index) (Jadon, CIBCB 2020).
        exponent: power of it, > 0: "linear" with 3/4 is focal Tversky (Abraham and Khan, ISBI 2019), "log" with 0.3 the
            exponential logarithmic loss (Wong et al., MICCAI 2018). "log_cosh" has none.
        class_weight: [C], factor of each class's loss. The mean divides by the number of classes, not by the sum of weights.
        ignore_index: target value that takes no part: of class indices a pixel, of values an element (not with "softmax").
        background_index: class index that is background to every class: a value outside [0, C).
        reduction: "mean", "sum" over classes (and images), or "none": one value per class [C], or [N, C] with ``per_image``; 0
            for classes that take no part.
        process_group: the loss of the batches of all its ranks, as if concatenated, by sums of integers: the bits of one
            process with the whole batch. Each rank gets that same loss and, in backward, its own pixels' part of that loss's
            gradient. DistributedDataParallel takes the mean of gradients over ranks where the sum is right: multiply the loss
            by the number of ranks. Not with ``per_image`` (there, the mean of the ranks' losses is the loss of all), and not
            inside torch.compile.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast. 0 where no pixel is valid. NaN or (but for -inf with
        "softmax", which masks a class out, and with "sigmoid") infinite logits give NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value out of range (on a GPU only if VEERLOSS_CHECK=1 is in the environment: else the loss
            is NaN), or ``classes`` an id that is none.
        RuntimeError: arguments or target of another rank of ``process_group`` are bad; it raises what is wrong with them.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = tversky_loss(logits, torch.ones(2, 4, dtype=torch.long), alpha=0.3, beta=0.7)
        >>> loss.backward()
    """
    return _region_loss(
        logits, target, alpha=alpha, beta=beta, smooth_scale=1.0, activation=activation, classes=classes,
        present_only=present_only, per_image=per_image, squared=squared, smooth=smooth, form=form, exponent=exponent,
        class_weight=class_weight, ignore_index=ignore_index, background_index=background_index, reduction=reduction,
        process_group=process_group, upsample=upsample, backend=backend,
    )  # fmt: skip


@_with_upsample
def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    classes: str | Sequence[int] = "all",
    present_only: bool = False,
    per_image: bool = False,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    form: str = "linear",
    exponent: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Dice loss: 1 - the soft Dice coefficient of a class over its pixels.

    $$1 - \frac{2 I + s}{S + T + s}, \quad I = \sum p t,\ S = \sum p,\ T = \sum t$$

    (Milletari, Navab, Ahmadi, 3DV 2016, with ``squared``; Drozdzal et al., DLMIA 2016, without.) Arguments, result and errors
    are those of ``tversky_loss``, without its weights.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = dice_loss(logits, torch.ones(2, 4, dtype=torch.long), classes=range(1, 3))
        >>> loss.backward()
    """
    return _region_loss(
        logits, target, alpha=0.5, beta=0.5, smooth_scale=0.5, activation=activation, classes=classes,
        present_only=present_only, per_image=per_image, squared=squared, smooth=smooth, form=form, exponent=exponent,
        class_weight=class_weight, ignore_index=ignore_index, background_index=background_index, reduction=reduction,
        process_group=process_group, upsample=upsample, backend=backend,
    )  # fmt: skip


@_with_upsample
def jaccard_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    classes: str | Sequence[int] = "all",
    present_only: bool = False,
    per_image: bool = False,
    squared: bool = False,
    smooth: Smooth = 1e-5,
    form: str = "linear",
    exponent: float = 1.0,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Soft Jaccard loss: 1 - the soft intersection over union of a class over its pixels.

    $$1 - \frac{I + s}{S + T - I + s}, \quad I = \sum p t,\ S = \sum p,\ T = \sum t$$

    (Rahman and Wang, ISVC 2016.) Not the Jaccard index of the thresholded prediction, whose convex surrogate is
    ``lovasz_softmax_loss``. Arguments, result and errors are those of ``tversky_loss``, without its weights.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 1, 4, requires_grad=True)
        >>> loss = jaccard_loss(logits, torch.ones(2, 4, dtype=torch.long), activation="sigmoid")
        >>> loss.backward()
    """
    return _region_loss(
        logits, target, alpha=1.0, beta=1.0, smooth_scale=1.0, activation=activation, classes=classes,
        present_only=present_only, per_image=per_image, squared=squared, smooth=smooth, form=form, exponent=exponent,
        class_weight=class_weight, ignore_index=ignore_index, background_index=background_index, reduction=reduction,
        process_group=process_group, upsample=upsample, backend=backend,
    )  # fmt: skip


def _region_loss(
    logits, target, *, alpha, beta, smooth_scale, activation, classes, present_only, per_image, squared, smooth, form, exponent,
    class_weight, ignore_index, background_index, reduction, process_group, upsample, backend,
) -> Tensor:  # fmt: skip
    """``smooth_scale``: of the user's ``smooth`` beside I; the numerator of Dice has twice it."""
    options: dict = {}

    def check() -> tuple[torch.Size, int | None, object]:
        arguments.check_logits(logits, 2, "[N, C, *]")
        arguments.check_choice("activation", activation, tuple(ACTIVATIONS))
        arguments.check_target(target, logits)
        dense = _is_dense(target, logits)
        if not dense:
            arguments.check_index_target(target, logits)
        arguments.check_has_classes(logits)
        ids = arguments.check_classes(classes, logits)
        for name, value in (("present_only", present_only), ("per_image", per_image), ("squared", squared)):
            arguments.check_flag(name, value)
        arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
        ignored = arguments.as_ignore_index(ignore_index)
        if dense and ignored is not None and activation == "softmax":
            raise ValueError(
                f"ignore_index is for class indices with activation='softmax', got {ignored} for a target of the shape of "
                f"logits, {list(target.shape)}"
            )
        if dense and background_index is not None:
            raise ValueError(
                f"background_index is for a target of class indices [N, *], got {arguments.shown(background_index)} for a "
                f"target of the shape of logits, {list(target.shape)}"
            )
        background = arguments.as_background_index(background_index, logits.size(1), ignored)
        if class_weight is not None:
            if not isinstance(class_weight, Tensor):
                raise TypeError(f"class_weight must be a Tensor or None, got {type(class_weight).__name__}")
            arguments.check_per_class("class_weight", class_weight, logits, logits.size(1))
        power = as_exponent(exponent, form)
        arguments.check_process_group(process_group, per_image)
        options.update(
            alpha=arguments.as_number("alpha", alpha, 0), beta=arguments.as_number("beta", beta, 0),
            smooth=[smooth_scale * value for value in as_smooth(smooth)], squared=squared, form=FORMS[form], exponent=power,
            activation=ACTIVATIONS[activation], present_only=present_only, per_image=per_image, ignore_index=ignored,
            background_index=background, reduction=reduction,
        )  # fmt: skip
        weights = None if class_weight is None or process_group is None else class_weight.tolist()
        return arguments.as_pixels(logits).shape, None, (options, ids, weights, logits.dtype, logits.size(1), __version__)

    def check_all() -> tuple[torch.Size, int | None, object]:
        found = check()
        chosen = arguments.choose_backend(backend, logits.device, "region")
        if arguments.checks_values(chosen, logits.device):
            if _is_dense(target, logits):
                arguments.check_unit_range(target, options["ignore_index"])
            elif _is_mask(logits, activation, background_index):
                arguments.check_binary(target, options["ignore_index"])
            else:
                arguments.check_label_range(target, logits.size(1), options["ignore_index"], options["background_index"])
        return (*found[:2], (found[2], chosen))

    ranks = None
    if process_group is None:
        check_all()
    else:
        ranks = join(process_group, logits, check_all)
    backend = arguments.choose_backend(backend, logits.device, "region")
    if backend == "reference":
        all_reduce: dict[str, Any] = {} if ranks is None else {"all_reduce": ranks.all_reduce}
        return reference.tversky_loss(logits, target, classes=classes, class_weight=class_weight, **options, **all_reduce)
    present_only = options.pop("present_only")
    present = classes == "present" or (present_only and classes != "all")
    if upsample is None:
        x = arguments.as_pixels(logits)
        y = arguments.as_pixels(target) if _is_dense(target, logits) else target.reshape(x.size(0), x.size(2))
    else:
        x, y = upsample.inputs(target)
        options["upsample"] = upsample.interpolation
    if class_weight is not None:
        class_weight = class_weight.to(arguments.opmath_dtype(logits)).contiguous()
    numerator, denominator = options.pop("smooth")
    return ops.region(
        x, y, selected=arguments.selected_classes(arguments.check_classes(classes, logits), logits), present=present,
        class_weight=class_weight, smooth_numerator=numerator, smooth_denominator=denominator, ranks=ranks, backend=backend,
        **options,
    )  # fmt: skip


def _is_dense(target: Tensor, logits: Tensor) -> bool:
    """Whether the target has a value for each class; else it holds class indices."""
    return target.dim() == logits.dim() and target.shape == logits.shape  # dim first: no guard on equal sizes


def _is_mask(logits: Tensor, activation: str, background_index: object) -> bool:
    """Whether class indices are the labels of a binary mask: 1 is the class of the only channel, 0 is background."""
    return logits.size(1) == 1 and activation != "softmax" and background_index is None


def as_exponent(exponent: object, form: object) -> float:
    """The power of a form, both checked."""
    arguments.check_choice("form", form, tuple(FORMS))
    power = arguments.as_number("exponent", exponent, 0, open_low=True)
    if form == "log_cosh" and power != 1:
        raise ValueError(f"exponent must be 1 with form='log_cosh', got {arguments.shown(exponent)}")
    return power


def as_smooth(smooth: object) -> tuple[float, float]:
    pair = smooth if isinstance(smooth, (tuple, list)) else (smooth, smooth)
    if len(pair) != 2:
        raise ValueError(f"smooth must be a number or a pair of them, got {arguments.shown(smooth)}")
    numerator, denominator = (arguments.as_number("smooth", value, 0) for value in pair)
    return numerator, denominator


class TverskyLoss(LossModule, function=tversky_loss):
    """Module of ``tversky_loss``, with the same arguments; tensors among them are buffers."""


class DiceLoss(LossModule, function=dice_loss):
    """Module of ``dice_loss``, with the same arguments; tensors among them are buffers."""


class JaccardLoss(LossModule, function=jaccard_loss):
    """Module of ``jaccard_loss``, with the same arguments; tensors among them are buffers."""
