"""Lovász losses: public functions and modules. Half of these lines are what users read of the arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _arguments as arguments
from . import ops, reference
from ._distributed import join
from ._layout import Errors
from ._module import LossModule
from ._upsample import LowLogits, as_low, option
from ._version import __version__

METHODS = ("auto", "exact", "histogram")

#: Segments of at least this many pixels take "histogram" under method="auto". It is the faster from some 10^5 pixels on. From
#: here on it is also nearer to float64, in all cases of the accuracy suite but one, than the float32 sort-and-subtract code
#: that it replaces. The one is "saturated, rare class 0.001": 3.4e-4 against 2.2e-4 here, 2.9e-4 against 5.2e-4 at 10^6.
AUTO_HISTOGRAM_FROM = 1 << 19


def _takes_low(low: LowLogits, target: Tensor, options: dict) -> bool:
    """Of lovasz_softmax_loss: on a GPU of method "histogram", which keeps nothing for each pixel, and so is "auto" here."""
    if low.kernels != "cuda":
        return low.kernels == "cpu"
    if not options.get("from_logits", True) or options.get("classes", "present") != "present" or not low.fits_kernels(24):
        return False
    if options.get("method", "auto") == "auto":
        options["method"] = "histogram"
    return options["method"] == "histogram"


@option(loss="lovasz", fused=_takes_low, mask=lambda _: False)
def lovasz_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    classes: str | Sequence[int] = "present",
    present_only: bool = False,
    per_image: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    background_index: int | None = None,
    from_logits: bool = True,
    reduction: str = "mean",
    method: str = "auto",
    return_certificate: bool = False,
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Lovász-Softmax: the convex surrogate of the mean Jaccard loss (1 - IoU).

    For each class, the errors of all valid pixels (1 - p of the class where it is the target, p elsewhere) are sorted, and each
    is weighted with the step that its pixel makes in the Jaccard loss. The weights come from integer counts in closed form, so
    that the gradient keeps its digits on images of any size. (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790, eq. 9-11.)

    There are no weights of pixels. Weights of the errors would make it the surrogate of no Jaccard loss; a Jaccard loss of
    weighted pixels sums real numbers in the place of counts, and rounding depends on their order: neither exact nor the same on
    all ranks.

    Args:
        logits: [N, C, \*] float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two). Probabilities if
            ``from_logits`` is False.
        target: class indices [N, \*], uint8, int8, int16, int32 or int64.
        classes: "present" averages over the classes that have a target pixel, "all" over every class, a sequence of class ids
            over those. A class without target pixels has the largest of its errors as its loss.
        present_only: of a sequence of ``classes`` only those that have a target pixel; what "present" is to "all".
        per_image: the loss of each image, then the mean over all images, instead of one loss of all pixels of the batch.
        class_weight: [C], factor of each class's loss. The mean divides by the number of classes, not by the sum of weights.
        ignore_index: target value that takes no part.
        background_index: target value that is background to every class: a value outside [0, C). With it, one channel of
            probabilities is the binary loss: 0 for foreground, ``background_index`` for background.
        from_logits: apply the softmax. If False the gradient is that of the probabilities.
        reduction: "mean", "sum" over classes (and images), or "none": one value per class [C], or [N, C] with ``per_image``; 0
            for classes that take no part.
        method: "exact" sorts the errors. "histogram" counts them, as float32, in 1920 to 8192 bins that it places where they
            matter: time linear in the pixels, a table for each segment but no memory of their size, and in the cases of the
            accuracy suite a gradient within 1e-3 (relative, L2) of the exact one; the certificate tells for the case at hand.
            It is for large segments: for many small ones the tables cost more than the pixels. "auto" takes
            "histogram" for segments (the pixels of the batch, or of an image) of 524 288 pixels and more, "exact" for smaller;
            on the CPU, outside torch.compile, it does not count those that are ignored.
        return_certificate: return (loss, certificate). The certificate, float64 [C], or [N, C] with ``per_image``, bounds the
            sum of \|weight used - exact weight\| over a segment's pixels of error > 0, where the weights add up to 1; it comes
            from the counts alone. 0 for "exact" and for classes that take no part.
        process_group: the loss of the batches of all its ranks, as if concatenated, by sums of counts. Each rank gets that
            same loss and, in backward, its own pixels' part of that loss's gradient. DistributedDataParallel takes the mean of
            gradients over ranks where the sum is right: multiply the loss by the number of ranks. Method "histogram" only,
            not with ``per_image`` (there, the mean of the ranks' losses is the loss of all), and not inside torch.compile.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native", "triton" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast. 0 where no pixel is valid. As in cross_entropy, -inf masks
        a class out, and NaN or +inf gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value that is neither a class, ``background_index`` nor ``ignore_index`` (on a GPU only if
            VEERLOSS_CHECK=1 is in the environment: else the loss is NaN), or ``classes`` an id that is none.
        RuntimeError: arguments or target of another rank of ``process_group`` are bad; it raises what is wrong with them.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = lovasz_softmax_loss(logits, torch.ones(2, 4, dtype=torch.long))
        >>> loss.backward()
    """
    options: dict[str, Any] = {"per_image": per_image, "reduction": reduction}

    def check() -> tuple[torch.Size, int | None, object]:
        arguments.check_logits(logits, 2, "[N, C, *]")
        arguments.check_index_target(target, logits)
        ids = arguments.check_classes(classes, logits)
        arguments.check_flag("present_only", present_only)
        arguments.check_flag("from_logits", from_logits)
        if class_weight is not None:
            if not isinstance(class_weight, Tensor):
                raise TypeError(f"class_weight must be a Tensor or None, got {type(class_weight).__name__}")
            arguments.check_per_class("class_weight", class_weight, logits, logits.size(1))
        ignored = arguments.as_ignore_index(ignore_index)
        background = arguments.as_background_index(background_index, logits.size(1), ignored)
        _check_common(reduction, method, per_image, return_certificate, process_group)
        weights = None if class_weight is None or process_group is None else class_weight.tolist()
        same = (ids, present_only, from_logits, reduction, weights, ignored, background, logits.dtype, logits.size(1))
        return arguments.as_pixels(logits).shape, ignored, same

    def check_values() -> None:
        ignored = arguments.as_ignore_index(ignore_index)
        background = arguments.as_background_index(background_index, logits.size(1), ignored)
        arguments.check_label_range(target, logits.size(1), ignored, background)

    backend, valid_pixels, ranks = prepare(check, check_values, logits, target, method, process_group, backend)
    ignore_index = arguments.as_ignore_index(ignore_index)
    background_index = arguments.as_background_index(background_index, logits.size(1), ignore_index)
    n, c, p = arguments.as_pixels(logits).shape
    method = choose_method(method, n, p, valid_pixels, per_image, ranks, backend)
    if backend == "reference":
        loss, certificate = reference.lovasz_softmax_loss(
            logits, target, classes=classes, present_only=present_only, class_weight=class_weight, ignore_index=ignore_index,
            background_index=background_index, from_logits=from_logits, method=method, **options, **_of_ranks(ranks),
        )  # fmt: skip
        return (loss, certificate) if return_certificate else loss
    if class_weight is not None:
        class_weight = class_weight.to(arguments.opmath_dtype(logits)).contiguous()
    options = {
        "selected": arguments.selected_classes(arguments.check_classes(classes, logits), logits),
        "present": classes == "present" or (present_only and classes != "all"), "per_image": per_image,
        "class_weight": class_weight, "ignore_index": ignore_index, "background_index": background_index,
        "errors": Errors.SOFTMAX if from_logits else Errors.PROBABILITIES, "reduction": reduction, "backend": backend,
    }  # fmt: skip
    if (low := as_low(upsample)) is None:
        x, y = arguments.as_pixels(logits), target.reshape(n, p)
    else:
        x, y = low.inputs(target)
        options["upsample"] = low.interpolation
    if method == "exact":
        loss = ops.lovasz_exact(x, y, valid_pixels=valid_pixels, **options)
        certificate = loss.new_zeros((n, c) if per_image else (c,), dtype=torch.float64)
    else:
        loss, certificate = ops.lovasz_histogram(x, y, valid_pixels=valid_pixels, ranks=ranks, **options)
        certificate = certificate if per_image else certificate[0]
    return (loss, certificate) if return_certificate else loss


@option(
    loss="lovasz",
    fused=lambda low, target, options: low.kernels == "cpu",
    mask=lambda options: not options.get("per_class", False),
)
def lovasz_hinge_loss(
    logits: Tensor,
    target: Tensor,
    *,
    per_image: bool = True,
    per_class: bool = False,
    ignore_index: int | None = None,
    reduction: str = "mean",
    method: str = "auto",
    return_certificate: bool = False,
    process_group: dist.ProcessGroup | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Lovász hinge: the convex surrogate of the binary Jaccard loss (1 - IoU of the foreground).

    The errors relu(1 - s x), s = +1 on foreground and -1 on background, are sorted, and each is weighted with the step that its
    pixel makes in the Jaccard loss. (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790; Yu and Blaschko, arXiv 1512.07797.)

    Args:
        logits: [N, \*] or [N, 1, \*], one logit per pixel; [N, C, \*] with ``per_class``; [P] points without ``per_image``.
            float32, float64, bfloat16 or float16.
        target: [N, \*] or [N, 1, \*], 0 or 1 in any bool, integer or float type; the shape of ``logits`` with ``per_class``.
        per_image: the loss of each image, then the mean over all images, instead of one loss of all pixels of the batch.
        per_class: multilabel: the loss of each channel of [N, C, \*], then their mean. (Without it, and a target of the same
            shape, all channels of an image are one segment.) Channels of a batch, without ``per_image``, are copied once.
        ignore_index: target value that takes no part.
        reduction: "mean", "sum" over images and classes, or "none": one value per image [N], 0-d without ``per_image``; with
            ``per_class`` [N, C] or [C].
        method: "exact" sorts the errors. "histogram" counts them, as float32, in 1920 to 8192 bins that it places where they
            matter: time linear in the pixels, a table for each segment but no memory of their size, and in the cases of the
            accuracy suite a gradient within 1e-3 (relative, L2) of the exact one; the certificate tells for the case at hand.
            It is for large segments: for many small ones the tables cost more than the pixels. "auto" takes
            "histogram" for segments (the pixels of an image, or of the batch) of 524 288 pixels and more, "exact" for smaller.
        return_certificate: return (loss, certificate). The certificate, float64, of the shape of "none", bounds the
            sum of \|weight used - exact weight\| over a segment's pixels of error > 0, where the weights add up to 1; it comes
            from the counts alone. 0 for "exact".
        process_group: the loss of the batches of all its ranks, as if concatenated, by two sums of counts; as for
            ``lovasz_softmax_loss``. Needs ``per_image=False`` and ``per_class=False``.
        upsample: "bilinear" ([N, C, h, w]), "trilinear" ([N, C, d, h, w]) or "nearest": the loss of the logits that
            ``torch.nn.functional.interpolate`` makes of ``logits``, of the size of ``target``. None: they have it already.
        align_corners: of "bilinear" and "trilinear", as for interpolate.
        backend: "auto", "native", "triton" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast. Images without valid pixels count as 0. NaN or an infinite
        logit gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value that is neither 0, 1 nor ``ignore_index``. On a GPU only if VEERLOSS_CHECK=1 is in
            the environment: else the loss is NaN.
        RuntimeError: arguments or target of another rank of ``process_group`` are bad; it raises what is wrong with them.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
        >>> loss = lovasz_hinge_loss(logits, torch.ones(2, 4, 4, dtype=torch.long))
        >>> loss.backward()
    """
    arguments.check_flag("per_class", per_class)
    if per_class:
        return _hinge_of_channels(
            logits, target, per_image=per_image, ignore_index=ignore_index, reduction=reduction, method=method,
            return_certificate=return_certificate, process_group=process_group, upsample=upsample, backend=backend,
        )  # fmt: skip
    options: dict[str, Any] = {"per_image": per_image, "reduction": reduction}

    def check() -> tuple[torch.Size, int | None, object]:
        check_mask(logits, target, per_image, "lovasz_softmax_loss")
        ignored = arguments.as_ignore_index(ignore_index)
        _check_common(reduction, method, per_image, return_certificate, process_group)
        return mask_shape(logits), ignored, ("hinge", reduction, ignored, logits.dtype)

    def check_values() -> None:
        arguments.check_binary(target, arguments.as_ignore_index(ignore_index))

    backend, valid_pixels, ranks = prepare(check, check_values, logits, target, method, process_group, backend)
    ignore_index = arguments.as_ignore_index(ignore_index)
    n, _, p = mask_shape(logits)
    method = choose_method(method, n, p, valid_pixels, per_image, ranks, backend)
    if backend == "reference":
        loss, certificate = reference.lovasz_hinge_loss(
            logits, target, ignore_index=ignore_index, method=method, **options, **_of_ranks(ranks)
        )
        return (loss, certificate) if return_certificate else loss
    options |= {
        "selected": None, "present": False, "class_weight": None, "ignore_index": ignore_index, "background_index": None,
        "errors": Errors.HINGE, "backend": backend,
    }  # fmt: skip
    if (low := as_low(upsample)) is None:
        x, y = logits.reshape(n, 1, p), target.reshape(n, p)
    else:
        x, y = low.inputs(target, mask=True)
        options["upsample"] = low.interpolation
    if method == "exact":
        loss = ops.lovasz_exact(x, y, valid_pixels=valid_pixels, **options)
        certificate = loss.new_zeros((n,) if per_image else (), dtype=torch.float64)
    else:
        loss, certificate = ops.lovasz_histogram(x, y, valid_pixels=valid_pixels, ranks=ranks, **options)
        certificate = certificate[:, 0] if per_image else certificate[0, 0]
    return (loss, certificate) if return_certificate else loss


def _hinge_of_channels(logits, target, *, per_image, reduction, return_certificate, process_group, upsample, **options):
    """``lovasz_hinge_loss`` with ``per_class``: each channel of the batch, or of an image, is an image of its own."""
    arguments.check_logits(logits, 2, "[N, C, *] with per_class=True")
    arguments.check_target(target, logits)
    if target.shape != logits.shape:
        raise ValueError(
            f"target must have the shape of logits, {list(logits.shape)}, with per_class=True, got {list(target.shape)}"
        )
    arguments.check_flag("per_image", per_image)
    if process_group is not None:
        raise ValueError("process_group needs per_class=False, got per_class=True")
    n, c, p = arguments.as_pixels(logits).shape
    shape = (n, c) if per_image else (c,)
    images = n * c if per_image else c
    options |= {"reduction": reduction, "return_certificate": return_certificate}
    if upsample is not None and images > 0:
        return _low_hinge_of_channels(upsample, target, per_image, shape, **options)
    x, y = (arguments.as_pixels(t) if per_image else arguments.as_pixels(t).transpose(0, 1) for t in (logits, target))
    length = n * c * p // images if images else 0
    result = lovasz_hinge_loss(x.reshape(images, length), y.reshape(images, length), per_image=True, **options)
    loss, certificate = result if return_certificate else (result, None)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, certificate.reshape(shape)) if return_certificate else loss


def _low_hinge_of_channels(low: LowLogits, target, per_image, shape, *, reduction, return_certificate, **options):
    """The same of logits of low resolution. Channel by channel, where the images of one are a segment: they lie apart."""
    options |= {"per_image": per_image, "upsample": low.mode, "align_corners": low.align_corners}
    if per_image:
        batches = [(low.logits.flatten(0, 1).unsqueeze(1), target.flatten(0, 1))]
    else:
        batches = list(zip(low.logits.split(1, 1), target.unbind(1), strict=True))
    found = [lovasz_hinge_loss(x, y, reduction="none", return_certificate=True, **options) for x, y in batches]
    loss, certificate = (torch.stack(values).reshape(shape) for values in zip(*found, strict=True))
    loss = loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
    return (loss, certificate) if return_certificate else loss


def _check_common(reduction, method, per_image, return_certificate, process_group) -> None:
    arguments.check_flag("per_image", per_image)
    arguments.check_flag("return_certificate", return_certificate)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.check_choice("method", method, METHODS)
    arguments.check_process_group(process_group, per_image, method)


def prepare(check, check_values, logits, target, method, process_group, backend, loss=None):
    """(backend, pixels that are not ignored or None, ranks or None) after `check`, and `check_values` where kernels do not
    check values themselves.

    What they raise, all ranks of a process group learn. `loss`: of _arguments.LOSSES, where it is not Lovász alone.
    """

    counting = isinstance(method, str) and method == "histogram"  # `check` has yet to see what it is
    loss = loss or ("lovasz histogram" if counting or process_group is not None else "lovasz")

    def check_all() -> tuple[torch.Size, int | None, object]:
        shape, ignored, options = check()
        chosen = arguments.choose_backend(backend, logits.device, loss)
        if arguments.checks_values(chosen, logits.device):
            check_values()
        valid_pixels = _count_valid(target.reshape(shape[0], shape[2]), ignored, chosen)
        return shape, valid_pixels, (options, chosen, __version__)  # ranks with different ones count in different bins

    if process_group is None:
        _, valid_pixels, _ = check_all()
        return arguments.choose_backend(backend, logits.device, loss), valid_pixels, None
    ranks = join(process_group, logits, check_all)
    return arguments.choose_backend(backend, logits.device, loss), None, ranks


def _count_valid(target: Tensor, ignore_index: int | None, backend: str) -> int | None:
    """How many pixels of a target [N, P] are not ignored: where it takes no waiting for a GPU, and no branch of a graph."""
    if ignore_index is None or backend != "native" or not target.is_cpu or torch.compiler.is_compiling():
        return None
    if type(target) is not Tensor or torch.jit.is_tracing() or ops.NAMESPACES["native"] != "veerloss":
        return None  # a fake tensor, for one
    return torch.ops.veerloss.count_not_ignored.default(target, ignore_index)


def choose_method(method: str, n: int, p: int, valid_pixels: int | None, per_image: bool, ranks, backend: str) -> str:
    """Triton has no "histogram", and the reference's is there to be read: alone, "auto" does not take it."""
    if method != "auto":
        return method
    pixels = n * p if valid_pixels is None else valid_pixels
    linear = pixels >= AUTO_HISTOGRAM_FROM * (max(n, 1) if per_image else 1) and backend == "native"
    return "histogram" if linear or ranks is not None else "exact"


def _of_ranks(ranks) -> dict:
    return {} if ranks is None else {"all_reduce": ranks.all_reduce}


def check_mask(logits: Tensor, target: Tensor, per_image: bool, of_two_classes: str) -> None:
    """Logits of a binary mask, and its labels; `of_two_classes`: what takes two logits a pixel."""
    arguments.check_logits(logits, 1, "[N, *] or [N, 1, *]")
    arguments.check_target(target, logits)
    if per_image is True and (logits.dim() == 1 or target.dim() == 1):
        raise ValueError(
            f"per_image must be False for points, got True and logits {list(logits.shape)}: every point would be a "
            "segment; points of one image are logits [1, P]"
        )
    if _without_channel(logits, target) != _without_channel(target, logits):
        expected = f"the shape of logits, {list(logits.shape)}, with or without a channel of 1"
        message = f"target must have {expected}, got {list(target.shape)}{arguments.upsample_hint(target, logits)}"
        if logits.dim() > 1 and logits.size(1) == 2:
            message += (
                f"; for two-class logits [N, 2, *] use {of_two_classes}, or give this function one logit per pixel: "
                "logits[:, 1] - logits[:, 0]"
            )
        raise ValueError(message)


def mask_shape(logits: Tensor) -> torch.Size:
    """The shape of the logits of a binary mask as [N, 1, P]."""
    n = logits.size(0)
    return torch.Size((n, 1, logits.numel() // n if n else 0))


def _without_channel(t: Tensor, other: Tensor) -> torch.Size:
    """The shape of t, less a channel of 1 that the other tensor has not."""
    if t.dim() == other.dim() + 1 and t.size(1) == 1:
        return t.shape[:1] + t.shape[2:]
    return t.shape


class LovaszSoftmaxLoss(LossModule, function=lovasz_softmax_loss):
    """Module of ``lovasz_softmax_loss``, with the same arguments; tensors among them are buffers."""


class LovaszHingeLoss(LossModule, function=lovasz_hinge_loss):
    """Module of ``lovasz_hinge_loss``, with the same arguments."""
