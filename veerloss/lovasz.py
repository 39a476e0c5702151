"""Lovász losses: public functions and modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _arguments as arguments
from . import ops, reference
from ._module import LossModule

METHODS = ("auto", "exact")


def lovasz_softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    classes: str | Sequence[int] = "present",
    per_image: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int | None = None,
    from_logits: bool = True,
    reduction: str = "mean",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Lovász-Softmax: the convex surrogate of the mean Jaccard loss (1 - IoU).

    For each class, the errors of all valid pixels (1 - p of the class where it is the target, p elsewhere) are sorted, and each
    is weighted with the step that its pixel makes in the Jaccard loss. The weights come from integer counts in closed form, so
    that the gradient keeps its digits on images of any size. (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790, eq. 9-11.)

    Args:
        logits: [N, C, \*] float32, float64, bfloat16 or float16 (arithmetic in float32 for the last two). Probabilities if
            ``from_logits`` is False.
        target: class indices [N, \*], uint8, int8, int16, int32 or int64.
        classes: "present" averages over the classes that have a target pixel, "all" over every class, a sequence of class ids
            over those. A class without target pixels has the largest of its errors as its loss.
        per_image: the loss of each image, then the mean over all images, instead of one loss of all pixels of the batch.
        class_weight: [C], factor of each class's loss. The mean divides by the number of classes, not by the sum of weights.
        ignore_index: target value that takes no part.
        from_logits: apply the softmax. If False the gradient is that of the probabilities.
        reduction: "mean", "sum" over classes (and images), or "none": one value per class [C], or [N, C] with ``per_image``; 0
            for classes that take no part.
        method: "exact" sorts the errors; "auto" is "exact".
        backend: "auto", "native" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast. 0 where no pixel is valid. As in cross_entropy, -inf masks
        a class out, and NaN or +inf gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value that is neither a class nor ``ignore_index``, or ``classes`` an id that is none.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4, requires_grad=True)
        >>> loss = lovasz_softmax_loss(logits, torch.ones(2, 4, dtype=torch.long))
        >>> loss.backward()
    """
    arguments.check_logits(logits, 2, "[N, C, *]")
    arguments.check_index_target(target, logits)
    selected = _selected_classes(classes, logits)
    arguments.check_flag("per_image", per_image)
    arguments.check_flag("from_logits", from_logits)
    if class_weight is not None:
        if not isinstance(class_weight, Tensor):
            raise TypeError(f"class_weight must be a Tensor or None, got {type(class_weight).__name__}")
        arguments.check_per_class("class_weight", class_weight, logits, logits.size(1))
    ignore_index = arguments.as_ignore_index(ignore_index)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.check_choice("method", method, METHODS)

    if arguments.choose_backend(backend, logits.device) == "reference":
        arguments.check_label_range(target, logits.size(1), ignore_index)
        return reference.lovasz_softmax_loss(
            logits, target, classes=classes, per_image=per_image, class_weight=class_weight, ignore_index=ignore_index,
            from_logits=from_logits, reduction=reduction,
        )  # fmt: skip
    x = arguments.as_pixels(logits)
    if class_weight is not None:
        class_weight = class_weight.to(arguments.arithmetic_dtype(logits)).contiguous()
    return ops.lovasz_softmax(
        x, target.reshape(x.size(0), x.size(2)), selected, classes == "present", per_image, class_weight, ignore_index,
        from_logits, reduction,
    )  # fmt: skip


def lovasz_hinge_loss(
    logits: Tensor,
    target: Tensor,
    *,
    per_image: bool = True,
    ignore_index: int | None = None,
    reduction: str = "mean",
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Lovász hinge: the convex surrogate of the binary Jaccard loss (1 - IoU of the foreground).

    The errors relu(1 - s x), s = +1 on foreground and -1 on background, are sorted, and each is weighted with the step that its
    pixel makes in the Jaccard loss. (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790; Yu and Blaschko, arXiv 1512.07797.)

    Args:
        logits: [N, \*] or [N, 1, \*], one logit per pixel; float32, float64, bfloat16 or float16.
        target: [N, \*] or [N, 1, \*], 0 or 1 in any bool, integer or float type.
        per_image: the loss of each image, then the mean over all images, instead of one loss of all pixels of the batch.
        ignore_index: target value that takes no part.
        reduction: "mean", "sum" over images, or "none": one value per image [N], 0-d without ``per_image``.
        method: "exact" sorts the errors; "auto" is "exact".
        backend: "auto", "native" or "reference". An explicit name never falls back.

    Returns:
        A tensor of the type of ``logits``, float32 under autocast. Images without valid pixels count as 0. NaN or an infinite
        logit gives NaN.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.
        IndexError: target holds a value that is neither 0, 1 nor ``ignore_index``.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
        >>> loss = lovasz_hinge_loss(logits, torch.ones(2, 4, 4, dtype=torch.long))
        >>> loss.backward()
    """
    arguments.check_logits(logits, 1, "[N, *] or [N, 1, *]")
    arguments.check_target(target, logits)
    if _without_channel(logits, target) != _without_channel(target, logits):
        expected = f"the shape of logits, {list(logits.shape)}, with or without a channel of 1"
        message = f"target must have {expected}, got {list(target.shape)}"
        if logits.dim() > 1 and logits.size(1) == 2:
            message += (
                "; for two-class logits [N, 2, *] use lovasz_softmax_loss, or give this function one logit per pixel: "
                "logits[:, 1] - logits[:, 0]"
            )
        raise ValueError(message)
    arguments.check_flag("per_image", per_image)
    ignore_index = arguments.as_ignore_index(ignore_index)
    arguments.check_choice("reduction", reduction, arguments.REDUCTIONS)
    arguments.check_choice("method", method, METHODS)

    if arguments.choose_backend(backend, logits.device) == "reference":
        arguments.check_binary(target, ignore_index)
        return reference.lovasz_hinge_loss(logits, target, per_image=per_image, ignore_index=ignore_index, reduction=reduction)
    pixels = logits.numel() // logits.size(0) if logits.size(0) else 0
    x = logits.reshape(logits.size(0), 1, pixels)
    return ops.lovasz_hinge(x, target.reshape(logits.size(0), pixels), per_image, ignore_index, reduction)


def _without_channel(t: Tensor, other: Tensor) -> torch.Size:
    """The shape of t, less a channel of 1 that the other tensor has not."""
    if t.dim() == other.dim() + 1 and t.size(1) == 1:
        return t.shape[:1] + t.shape[2:]
    return t.shape


def _selected_classes(classes: str | Sequence[int], logits: Tensor) -> Tensor | None:
    """[C] bool for a sequence of ids, None where every class may take part."""
    if isinstance(classes, str):
        arguments.check_choice("classes", classes, ("present", "all"))
        return None
    if not isinstance(classes, Sequence):
        raise TypeError(f"classes must be 'present', 'all' or a sequence of class ids, got {type(classes).__name__}")
    count = logits.size(1)
    chosen = set()
    for c in classes:
        number = arguments.as_int(c)
        if number is None:
            raise TypeError(f"classes must hold ints, got {c!r}")
        if not 0 <= number < count:
            raise IndexError(f"classes holds {c}, expected class ids in [0, {count})")
        chosen.add(number)
    if len(chosen) != len(classes) or not chosen:
        raise ValueError(f"classes must hold at least one class id, and each once, got {list(classes)}")
    return torch.tensor([c in chosen for c in range(count)], device=logits.device)


class LovaszSoftmaxLoss(LossModule):
    """Module of :func:`lovasz_softmax_loss`, with the same arguments; tensors among them are buffers."""

    def __init__(
        self,
        *,
        classes: str | Sequence[int] = "present",
        per_image: bool = False,
        class_weight: Tensor | None = None,
        ignore_index: int | None = None,
        from_logits: bool = True,
        reduction: str = "mean",
        method: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            classes=classes, per_image=per_image, class_weight=class_weight, ignore_index=ignore_index, from_logits=from_logits,
            reduction=reduction, method=method, backend=backend,
        )  # fmt: skip

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return lovasz_softmax_loss(logits, target, **self.options())


class LovaszHingeLoss(LossModule):
    """Module of :func:`lovasz_hinge_loss`, with the same arguments."""

    def __init__(
        self,
        *,
        per_image: bool = True,
        ignore_index: int | None = None,
        reduction: str = "mean",
        method: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__(per_image=per_image, ignore_index=ignore_index, reduction=reduction, method=method, backend=backend)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return lovasz_hinge_loss(logits, target, **self.options())
