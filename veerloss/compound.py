"""Compound losses: public function and module. Most of these lines are what users read of the arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _arguments as arguments
from . import ops
from ._layout import Errors
from ._module import LossModule
from ._upsample import LowLogits, option
from .focal import as_class_alpha, check_alpha, sigmoid_focal_loss, softmax_focal_loss
from .lovasz import METHODS, check_mask, choose_method, lovasz_hinge_loss, lovasz_softmax_loss, mask_shape, prepare
from .region import FORMS, Smooth, as_exponent, as_smooth, tversky_loss

#: alpha and beta of the index, and of what numerator and denominator are smoothed by beside I.
REGIONS = {"dice": (0.5, 0.5, 0.5), "tversky": (None, None, 1.0), "jaccard": (1.0, 1.0, 1.0)}
#: What an option is where it is not given, and the terms that have it.
OPTIONS = {
    "gamma": (2.0, ("focal",)), "alpha": (None, ("focal", "cross_entropy")),
    "label_smoothing": (0.0, ("focal", "cross_entropy")), "lovasz_classes": ("present", ("lovasz",)),
    "method": ("auto", ("lovasz",)), "region_classes": ("all", tuple(REGIONS)),
    "tversky_alpha": (0.5, ("tversky",)), "tversky_beta": (0.5, ("tversky",)), "smooth": (1e-5, tuple(REGIONS)),
    "form": ("linear", tuple(REGIONS)), "exponent": (1.0, tuple(REGIONS)),
}  # fmt: skip


def _takes_low(low: LowLogits, target: Tensor, options: dict) -> bool:
    """On a GPU of a softmax without smoothing, and of method "histogram", which keeps nothing for each pixel."""
    if low.kernels != "cuda":
        return low.kernels == "cpu"
    if options.get("activation", "softmax") != "softmax" or options.get("label_smoothing", 0.0) or not low.fits_kernels(24):
        return False
    if options.get("lovasz") is None:
        return True
    if options.get("method", "auto") == "auto":
        options["method"] = "histogram"
    return options["method"] == "histogram" and options.get("lovasz_classes", "present") == "present"


@option(loss="compound", fused=_takes_low, mask=lambda options: options.get("activation") == "sigmoid")
def compound_loss(
    logits: Tensor,
    target: Tensor,
    *,
    cross_entropy: float | None = None,
    focal: float | None = None,
    lovasz: float | None = None,
    dice: float | None = None,
    tversky: float | None = None,
    jaccard: float | None = None,
    activation: str = "softmax",
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    lovasz_classes: str | Sequence[int] = "present",
    method: str = "auto",
    region_classes: str | Sequence[int] = "all",
    tversky_alpha: float = 0.5,
    tversky_beta: float = 0.5,
    smooth: Smooth = 1e-5,
    form: str = "linear",
    exponent: float = 1.0,
    per_image: bool = False,
    ignore_index: int | None = None,
    return_parts: bool = False,
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""A weighted sum of losses on one softmax: what training scripts add up, by one pass forward and one backward.

    ``compound_loss(x, y, cross_entropy=1.0, lovasz=1.0, dice=0.5)`` is, up to rounding, the sum of
    ``F.cross_entropy(x, y)``, ``lovasz_softmax_loss(x, y)`` and ``0.5 * dice_loss(x, y)``. A term whose weight is None is
    absent; of cross_entropy and focal there is one at most, and of dice, tversky and jaccard. All are means, as by default in
    their own functions, which say more of the options.

    Args:
        logits: [N, C, \*] float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two). With "sigmoid" one
            logit per pixel, [N, \*] or [N, 1, \*], or [P].
        target: class indices [N, \*], uint8, int8, int16, int32 or int64. With "sigmoid" 0 or 1 in any type, [N, \*] or
            [N, 1, \*].
        cross_entropy: weight, >= 0, of cross-entropy; with "sigmoid" binary cross-entropy.
        focal: weight of ``softmax_focal_loss``, or ``sigmoid_focal_loss``.
        lovasz: weight of ``lovasz_softmax_loss``, or ``lovasz_hinge_loss``.
        dice: weight of ``dice_loss``; of the three region losses one at most has a weight.
        tversky: weight of ``tversky_loss``.
        jaccard: weight of ``jaccard_loss``.
        activation: "softmax" over classes, or "sigmoid" for a binary mask.
        gamma: focusing exponent of focal, >= 0.
        alpha: factor of focal or cross-entropy: a number or a tensor [C]; as everywhere, the mean of focal divides by the
            number of pixels, that of cross-entropy, as ``weight`` of PyTorch's, by the sum of their factors. With "sigmoid" a
            number in [0, 1], that of the mask; 1 - alpha is that of the background.
        label_smoothing: of focal or cross-entropy, in [0, 1]; not with "sigmoid".
        lovasz_classes: "present", "all" or class ids: those that the Lovász term is a mean of.
        method: "exact", "histogram" or "auto", of the Lovász term.
        region_classes: "all", "present" or class ids: those that the region term is a mean of. ``range(1, C)`` leaves
            background out.
        tversky_alpha: weight of false positives.
        tversky_beta: weight of false negatives.
        smooth: of the region term, as for ``tversky_loss``.
        form: likewise.
        exponent: likewise.
        per_image: the Lovász and the region term of each image, then their mean, instead of one of all pixels of the batch.
        ignore_index: target value that takes no part in any term.
        return_parts: return (loss, parts): the terms by name, before their weights, detached, at no extra pass.
        process_group: the loss of the batches of all its ranks, as if concatenated, as for ``lovasz_softmax_loss``:
            Lovász and region terms with the bits of one process, the sum of focal or cross-entropy rounded in float64.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native" or "reference", which adds up the references of the terms; so, with the kernels that there
            are, does "auto" where no kernel has them in one pass: on a GPU of "sigmoid", or with label smoothing. An explicit
            name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast; and with ``return_parts`` a dict of float32 ones, of float64
        logits float64. A term is 0 where no pixel is valid. As in the terms, NaN gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or an option of a term that is absent.
        IndexError: target holds a value out of range (on a GPU only if VEERLOSS_CHECK=1 is in the environment: else the loss is
            NaN), or a sequence of classes an id that is none.
        RuntimeError: arguments or target of another rank of ``process_group`` are bad; it raises what is wrong with them.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss, parts = compound_loss(
        ...     logits, torch.ones(2, 4, dtype=torch.long), cross_entropy=1.0, lovasz=1.0, dice=0.5, return_parts=True
        ... )
        >>> loss.backward()
        >>> list(parts)
        ['cross_entropy', 'lovasz', 'dice']
    """
    given = {
        "gamma": gamma, "alpha": alpha, "label_smoothing": label_smoothing, "lovasz_classes": lovasz_classes, "method": method,
        "region_classes": region_classes, "tversky_alpha": tversky_alpha, "tversky_beta": tversky_beta, "smooth": smooth,
        "form": form, "exponent": exponent,
    }  # fmt: skip
    weights = {
        "cross_entropy": cross_entropy, "focal": focal, "lovasz": lovasz, "dice": dice, "tversky": tversky, "jaccard": jaccard,
    }  # fmt: skip
    found: dict[str, Any] = {}

    def check() -> tuple[torch.Size, int | None, object]:
        arguments.check_choice("activation", activation, ("softmax", "sigmoid"))
        found["terms"] = terms = _check_terms(weights, given)
        arguments.check_flag("return_parts", return_parts)
        arguments.check_flag("per_image", per_image)
        if activation == "sigmoid":
            check_mask(logits, target, per_image, "activation='softmax'")
            for name in ("label_smoothing", "lovasz_classes", "region_classes"):
                if given[name] != OPTIONS[name][0]:
                    raise ValueError(f"{name} is for activation='softmax', got {arguments.shown(given[name])} with 'sigmoid'")
            shape = mask_shape(logits)
        else:
            arguments.check_logits(logits, 2, "[N, C, *]")
            arguments.check_index_target(target, logits)
            shape = arguments.as_pixels(logits).shape
        found["gamma"] = 0.0 if "focal" not in terms else arguments.as_number("gamma", gamma, 0)
        found["label_smoothing"] = arguments.as_number("label_smoothing", label_smoothing, 0, 1)
        if activation == "sigmoid" and isinstance(alpha, Tensor):
            raise TypeError(f"alpha must be a number with activation='sigmoid', got a Tensor {list(alpha.shape)}")
        found["alpha"] = check_alpha(alpha, logits, shape[1], 1 if activation == "sigmoid" else torch.inf)
        arguments.check_choice("method", method, METHODS)
        power = as_exponent(exponent, form)
        alphas = [arguments.as_number(name, given[name], 0) for name in ("tversky_alpha", "tversky_beta")]
        found["region"] = (*alphas, as_smooth(smooth), form, power)
        x = logits if activation == "softmax" else logits.reshape(shape)
        found["classes"] = [arguments.check_classes(kind, x) for kind in (lovasz_classes, region_classes)]
        ignored = arguments.as_ignore_index(ignore_index)
        arguments.check_process_group(process_group, per_image, method)
        factors = found["alpha"]
        factors = factors.tolist() if isinstance(factors, Tensor) and process_group is not None else None
        same = (*(found[name] for name in ("terms", "gamma", "label_smoothing", "region", "classes")), factors, activation,
                ignored, logits.dtype)  # fmt: skip
        return shape, ignored, same

    def check_values() -> None:
        if activation == "sigmoid":
            arguments.check_binary(target, ignore_index)
        else:
            arguments.check_label_range(target, logits.size(1), ignore_index)

    chosen, valid_pixels, ranks = prepare(check, check_values, logits, target, method, process_group, backend, "compound")
    if chosen == "native" and (reason := not_fused(logits.device, activation, found["label_smoothing"])):
        if backend == "native":
            raise RuntimeError(f"backend='native' cannot run on device {str(logits.device)!r}: {reason}")
        chosen = "reference"
    options = {
        "activation": activation, "method": method, "per_image": per_image, "process_group": process_group,
        "ignore_index": arguments.as_ignore_index(ignore_index),
    }  # fmt: skip
    if chosen == "reference":
        loss, parts = _sum_of_parts(logits, target, found, options, backend)
    else:
        loss, parts = _fused(logits, target, found, options, chosen, valid_pixels, ranks, upsample)
    return (loss, parts) if return_parts else loss


def _check_terms(weights: Mapping[str, object], given: Mapping[str, object]) -> dict[str, float]:
    """The weights of the terms that there are, by name."""
    terms = {name: arguments.as_number(name, weight, 0) for name, weight in weights.items() if weight is not None}
    if not terms:
        raise ValueError(f"at least one term must have a weight, got None for all of {', '.join(weights)}")
    for kind in (("cross_entropy", "focal"), tuple(REGIONS)):
        both = [name for name in kind if name in terms]
        if len(both) > 1:
            raise ValueError(
                f"of {', '.join(kind)} one at most can have a weight, got "
                + ", ".join(f"{name}={arguments.shown(weights[name])}" for name in both)
            )
    for name, (default, owners) in OPTIONS.items():
        value = given[name]
        is_default = value is default or (isinstance(value, (int, float, str)) and value == default)
        if not is_default and not any(owner in terms for owner in owners):
            raise ValueError(
                f"{name} is an option of {', '.join(owners)}, got {arguments.shown(value)} without a weight for any"
            )
    return terms


def _region_options(terms: dict[str, float], region: tuple) -> tuple[str | None, dict]:
    """The name of the region term, and its options as those of tversky_loss."""
    name = next((name for name in REGIONS if name in terms), None)
    tversky_alpha, tversky_beta, smooth, form, exponent = region
    alpha, beta, scale = REGIONS[name or "tversky"]
    if alpha is None:
        alpha, beta = tversky_alpha, tversky_beta
    return name, {
        "alpha": alpha, "beta": beta, "smooth": tuple(scale * value for value in smooth), "form": form, "exponent": exponent,
    }  # fmt: skip


def not_fused(device: torch.device, activation: str, label_smoothing: float) -> str | None:
    """None where the kernels of a device have a loss in one pass, else why not."""
    if device.type != "cuda" or (activation == "softmax" and label_smoothing == 0):
        return None
    return (
        "compound losses in one pass are there for activation='softmax' and label_smoothing=0 on a GPU; backend='auto' adds up "
        "the losses of the terms"
    )


def _fused(logits, target, found, options, backend, valid_pixels, ranks, upsample) -> tuple[Tensor, dict[str, Tensor]]:
    """By the operators of a backend."""
    terms, mask = found["terms"], options["activation"] == "sigmoid"
    focal = next((name for name in ("focal", "cross_entropy") if name in terms), None)
    region, index = _region_options(terms, found["region"])
    x = logits.reshape(mask_shape(logits)) if mask else arguments.as_pixels(logits)
    n, _, p = x.shape
    method, per_image = options["method"], options["per_image"]
    histogram = choose_method(method, n, p, valid_pixels, per_image, ranks, backend) == "histogram"
    alpha = found["alpha"]
    of_class = as_class_alpha(alpha, logits)
    (lovasz_classes, region_classes), smooth = found["classes"], index.pop("smooth")
    y, low = target.reshape(n, p), {}
    if upsample is not None:
        x, y = upsample.inputs(target, mask)
        low = {"upsample": upsample.interpolation}
    loss, parts = ops.compound(
        x, y, focal=terms.get(focal), lovasz=terms.get("lovasz"), region=terms.get(region),
        alpha=None if of_class is not None else alpha, class_alpha=of_class, gamma=found["gamma"],
        label_smoothing=found["label_smoothing"], weighted_mean=focal == "cross_entropy" and not mask,
        selected=arguments.selected_classes(lovasz_classes, x), present=lovasz_classes == "present" and not mask,
        region_selected=arguments.selected_classes(region_classes, x), region_present=region_classes == "present",
        region_alpha=index["alpha"], region_beta=index["beta"], smooth_numerator=smooth[0], smooth_denominator=smooth[1],
        form=int(FORMS[index["form"]]), exponent=index["exponent"], errors=int(Errors.HINGE if mask else Errors.SOFTMAX),
        histogram=histogram, per_image=per_image, ignore_index=options["ignore_index"], valid_pixels=valid_pixels, ranks=ranks,
        backend=backend, **low,
    )  # fmt: skip
    names = [name for name in (focal, "lovasz", region) if name is not None and name in terms]
    return loss, dict(zip(names, parts.detach(), strict=True))


def _sum_of_parts(logits, target, found, options, backend) -> tuple[Tensor, dict[str, Tensor]]:
    """By the functions of the terms: what compound losses are by definition."""
    terms, mask = found["terms"], options["activation"] == "sigmoid"
    ignore_index, group, per_image = options["ignore_index"], options["process_group"], options["per_image"]
    if mask:
        logits = logits.reshape(mask_shape(logits))
        target = target.reshape(logits.shape)
    common = {"ignore_index": ignore_index, "backend": backend}
    shared = {**common, "per_image": per_image, "process_group": group}
    _, index = _region_options(terms, found["region"])
    lovasz_classes, region_classes = found["classes"]
    parts: dict[str, Any] = {}
    for name in terms:
        if name in ("cross_entropy", "focal"):
            parts[name] = _focal_part(logits, target, found, name, mask, group, common)
        elif name == "lovasz" and mask:
            parts[name] = lovasz_hinge_loss(logits, target, method=options["method"], **shared)
        elif name == "lovasz":
            parts[name] = lovasz_softmax_loss(logits, target, classes=lovasz_classes, method=options["method"], **shared)
        else:
            labels = target[:, 0] if mask else target
            labels = labels.long() if mask else labels
            parts[name] = tversky_loss(
                logits, labels, activation=options["activation"], classes=region_classes, **index, **shared
            )  # fmt: skip
    loss = sum(terms[name] * part.to(arguments.opmath_dtype(logits)) for name, part in parts.items())
    return loss.to(arguments.loss_dtype(logits)), {
        name: part.detach().to(arguments.opmath_dtype(logits)) for name, part in parts.items()
    }


def _focal_part(logits, target, found, name, mask, group, common) -> Tensor:
    function = sigmoid_focal_loss if mask else softmax_focal_loss
    options = {"alpha": found["alpha"], "gamma": found["gamma"], **common}
    if not mask:
        options["label_smoothing"] = found["label_smoothing"]
    ignored = common["ignore_index"]
    labels = arguments.widened(target)
    valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    divisor = valid.sum().double()
    if name == "cross_entropy" and not mask and isinstance(found["alpha"], Tensor):
        divisor = (found["alpha"].double()[torch.where(valid, labels, 0)] * valid).sum()
    elif name == "cross_entropy" and not mask and found["alpha"] is not None:
        divisor = divisor * found["alpha"]
    total = function(logits, target, reduction="sum", **options).to(arguments.opmath_dtype(logits))
    if group is not None:
        sums = torch.stack([total.detach().double(), divisor])
        dist.all_reduce(sums, group=group)
        total, divisor = total + (sums[0] - total.detach()).to(total), sums[1]
    return (total * torch.where(divisor > 0, 1 / divisor, 0.0)).to(total)


class CompoundLoss(LossModule, function=compound_loss):
    """Module of ``compound_loss``, with the same arguments; tensors among them are buffers."""
