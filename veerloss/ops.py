"""Every operator: its schema, its fake kernel, its autograd. Two namespaces have the same operators: ``veerloss`` those of the
compiled libraries (csrc/cpu, csrc/cuda), ``veerloss_triton`` those of the Triton kernels (triton/).

Logits are [N, C, P] in any strides; targets are class indices [N, P] or, for sigmoid focal, values [N, C, P]. ``scale`` is the
factor between the sum that a kernel takes and the loss that it returns; the backward operators use it again.
_extension.py loads the compiled library with their kernels.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from . import _histogram
from ._arguments import arithmetic_dtype, loss_dtype

#: As ``Reduction`` in csrc/tensor.h.
NONE, MEAN, SUM = 0, 1, 2
_REDUCTION = {"none": NONE, "mean": MEAN, "sum": SUM}

_SIGMOID = "float? alpha, Tensor? class_alpha, float gamma, Tensor? weight, int? ignore_index, int reduction"
_SOFTMAX = "float alpha, Tensor? class_alpha, float gamma, float label_smoothing, int? ignore_index, int reduction"
# A class takes part if `selected`, [C] bool, has it (null: every class) and, with `present`, if it has foreground.
_CLASSES = "Tensor? selected, bool present, bool per_image, Tensor? class_weight, int? ignore_index, bool from_logits"
# A loss is `wide` if it is to be in the arithmetic type, whatever the logits are.
_FOCAL_RESULT = "float factor, Tensor? normalizer, bool wide) -> (Tensor loss, Tensor scale)"
# scale has one value per segment; weights are the signed weights of the errors, [C, N, P], or [0] without `keep`.
_LOVASZ_RESULT = "int reduction, bool keep, bool wide) -> (Tensor loss, Tensor scale, Tensor weights)"
_LOVASZ_BACKWARD = "(Tensor grad, Tensor logits, Tensor weights, Tensor scale, bool per_image"
_SCHEMAS = {
    "sigmoid_focal_forward": f"(Tensor logits, Tensor target, {_SIGMOID}, {_FOCAL_RESULT}",
    "sigmoid_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SIGMOID}, Tensor scale) -> Tensor",
    "softmax_focal_forward": f"(Tensor logits, Tensor target, {_SOFTMAX}, {_FOCAL_RESULT}",
    "softmax_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SOFTMAX}, Tensor scale) -> Tensor",
    "lovasz_softmax_forward": f"(Tensor logits, Tensor target, {_CLASSES}, {_LOVASZ_RESULT}",
    "lovasz_softmax_backward": f"{_LOVASZ_BACKWARD}, bool from_logits, int reduction) -> Tensor",
    "lovasz_hinge_forward": f"(Tensor logits, Tensor target, bool per_image, int? ignore_index, {_LOVASZ_RESULT}",
    "lovasz_hinge_backward": f"{_LOVASZ_BACKWARD}, int reduction) -> Tensor",
    # Method "histogram": the whole, and its steps. `errors` tells what logits are (_histogram.py).
    "lovasz_histogram_forward": "(Tensor logits, Tensor target, Tensor? selected, bool present, bool per_image, "
    "Tensor? class_weight, int? ignore_index, int errors, int reduction, bool wide) "
    "-> (Tensor loss, Tensor scale, Tensor table, Tensor weights, Tensor tops, Tensor bounds)",
    "lovasz_histogram_count": "(Tensor logits, Tensor target, Tensor? table, Tensor? wanted, int errors, bool per_image, "
    "int? ignore_index, bool sampled) -> (Tensor counts, Tensor largest)",
    "lovasz_histogram_place": "(Tensor counts, Tensor? table, int errors) -> Tensor",
    "lovasz_histogram_weigh": "(Tensor logits, Tensor counts, Tensor largest, Tensor table, Tensor? selected, bool present, "
    "Tensor? class_weight, int errors, bool per_image, int reduction, bool wide) "
    "-> (Tensor loss, Tensor scale, Tensor weights, Tensor tops, Tensor bounds, Tensor doubtful)",
    "lovasz_histogram_sum": "(Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor tops, Tensor units, "
    "int errors, bool per_image, int? ignore_index) -> Tensor",
    "lovasz_histogram_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor tops, "
    "Tensor scale, int errors, bool per_image, int? ignore_index, int reduction) -> Tensor",
}
#: The namespace of each backend's operators.
NAMESPACES = {"native": "veerloss", "triton": "veerloss_triton"}

#: By operator; see define().
_FAKES = {}


def _operators(backend: str):
    return getattr(torch.ops, NAMESPACES[backend])


def _fake(name: str):
    """The fake kernel of operator `name`, in every namespace."""

    def keep(kernel):
        _FAKES[name] = kernel
        return kernel

    return keep


def _wide(logits: Tensor) -> bool:
    return loss_dtype(logits) != logits.dtype


def _loss_dtype(logits: Tensor, wide: bool) -> torch.dtype:
    return arithmetic_dtype(logits) if wide else logits.dtype


# ---- focal


def sigmoid_focal(logits, target, alpha, class_alpha, gamma, weight, ignore_index, reduction, normalizer, backend) -> Tensor:
    options = (alpha, class_alpha, float(gamma), weight, ignore_index, *_divisor(reduction, normalizer), _wide(logits))
    return _operators(backend).sigmoid_focal_forward(logits, target, *options)[0]


def softmax_focal(
    logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, reduction, normalizer, backend
) -> Tensor:
    options = (float(alpha), class_alpha, float(gamma), float(label_smoothing), ignore_index)
    options += (*_divisor(reduction, normalizer), _wide(logits))
    return _operators(backend).softmax_focal_forward(logits, target, *options)[0]


def _divisor(reduction: str, normalizer: float | Tensor | None) -> tuple[int, float, Tensor | None]:
    """(reduction, factor, normalizer) for a kernel: a normaliser turns "mean" into a scaled sum."""
    if normalizer is None:
        return _REDUCTION[reduction], 1.0, None
    if isinstance(normalizer, Tensor):
        return SUM, 1.0, normalizer
    return SUM, 1.0 / normalizer, None


@_fake("sigmoid_focal_forward")
def _(logits, target, alpha, class_alpha, gamma, weight, ignore_index, reduction, factor, normalizer, wide):
    if reduction == NONE:
        loss = logits.new_empty(logits.shape, dtype=_loss_dtype(logits, wide)) if wide else torch.empty_like(logits)
    else:
        loss = logits.new_empty((), dtype=_loss_dtype(logits, wide))
    return loss, logits.new_empty((), dtype=arithmetic_dtype(logits))


@_fake("softmax_focal_forward")
def _(logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, reduction, factor, normalizer, wide):
    n, _, p = logits.shape
    loss = logits.new_empty((n, p) if reduction == NONE else (), dtype=_loss_dtype(logits, wide))
    return loss, logits.new_empty((), dtype=arithmetic_dtype(logits))


def _fake_backward(grad, logits, *args):
    return torch.empty_like(logits)


def _save_focal(ctx, inputs, output) -> None:
    logits, target, alpha, class_alpha, gamma, fifth, ignore_index, reduction, _, _, _ = inputs
    # The fifth option is a tensor for sigmoid (weight), a number for softmax (label_smoothing).
    tensor = fifth if isinstance(fifth, Tensor) else None
    ctx.save_for_backward(logits, target, class_alpha, tensor, output[1])
    ctx.options = (alpha, gamma, None if tensor is not None else fifth, ignore_index, reduction)
    ctx.mark_non_differentiable(output[1])


def _focal_backward(op: str, operators):
    def backward(ctx, grad, *_):
        logits, target, class_alpha, tensor, scale = ctx.saved_tensors
        alpha, gamma, fifth, ignore_index, reduction = ctx.options
        fifth = fifth if tensor is None else tensor
        kernel = getattr(operators, op)
        grad_logits = kernel(grad, logits, target, alpha, class_alpha, gamma, fifth, ignore_index, reduction, scale)
        return grad_logits, *[None] * 10

    return backward


# ---- Lovász


def lovasz_softmax(
    logits, target, selected, present, per_image, class_weight, ignore_index, from_logits, reduction, backend
) -> Tensor:
    keep = torch.is_grad_enabled() and logits.requires_grad
    options = (selected, present, per_image, class_weight, ignore_index, from_logits, _REDUCTION[reduction])
    return _operators(backend).lovasz_softmax_forward(logits, target, *options, keep, _wide(logits))[0]


def lovasz_hinge(logits, target, per_image, ignore_index, reduction, backend) -> Tensor:
    keep = torch.is_grad_enabled() and logits.requires_grad
    return _operators(backend).lovasz_hinge_forward(
        logits, target, per_image, ignore_index, _REDUCTION[reduction], keep, _wide(logits)
    )[0]


@_fake("lovasz_softmax_forward")
def _(logits, target, selected, present, per_image, class_weight, ignore_index, from_logits, reduction, keep, wide):
    n, c, p = logits.shape
    shape = (n, c) if per_image else (c,)
    dtype = arithmetic_dtype(logits)
    weights = logits.new_empty((c, n, p) if keep else (0,), dtype=dtype)
    loss = logits.new_empty(shape if reduction == NONE else (), dtype=_loss_dtype(logits, wide))
    return loss, logits.new_empty(shape, dtype=dtype), weights


@_fake("lovasz_hinge_forward")
def _(logits, target, per_image, ignore_index, reduction, keep, wide):
    n, c, p = logits.shape
    shape = (n,) if per_image else ()
    dtype = arithmetic_dtype(logits)
    weights = logits.new_empty((c, n, p) if keep else (0,), dtype=dtype)
    loss = logits.new_empty(shape if reduction == NONE else (), dtype=_loss_dtype(logits, wide))
    return loss, logits.new_empty(shape, dtype=dtype), weights


def lovasz_histogram(
    logits, target, selected, present, per_image, class_weight, ignore_index, errors, reduction, ranks, backend
) -> tuple[Tensor, Tensor]:
    """(loss, bounds): the bounds on what binning moved, one per segment [N or 1, C]."""
    options = (selected, present, per_image, class_weight, ignore_index, errors, _REDUCTION[reduction], _wide(logits))
    if ranks is not None:
        return _HistogramOfRanks.apply(logits, target, *options, ranks, _operators(backend))
    loss, _, _, _, _, bounds = _operators(backend).lovasz_histogram_forward(logits, target, *options)
    return loss, bounds


class _HistogramOfRanks(torch.autograd.Function):
    """lovasz_histogram_forward with counts of all ranks: not an operator, for it waits for other processes."""

    @staticmethod
    def forward(ctx, *inputs):
        *arguments, ranks, ctx.operators = inputs
        output = _histogram.forward(ctx.operators, *arguments, ranks=ranks)
        _save_histogram(ctx, arguments, output)
        return output[0], output[5]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return *_histogram_backward(ctx.operators)(ctx, grad), None, None


@_fake("lovasz_histogram_forward")
def _(logits, target, selected, present, per_image, class_weight, ignore_index, errors, reduction, wide):
    n, c, _ = logits.shape
    rows = n if per_image else 1
    shape = ((n,) if per_image else ()) if errors == _histogram.HINGE else ((n, c) if per_image else (c,))
    dtype = arithmetic_dtype(logits)
    cells, bins = _histogram.cells_and_bins(errors)
    return (
        logits.new_empty(shape if reduction == NONE else (), dtype=_loss_dtype(logits, wide)),
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty((rows, c, cells), dtype=torch.int32),
        logits.new_empty((rows, c, 2, bins), dtype=dtype),
        logits.new_empty((rows, c, 2), dtype=dtype),
        logits.new_empty((rows, c), dtype=torch.float64),
    )


def _save_histogram(ctx, inputs, output) -> None:
    logits, target, _, _, per_image, _, ignore_index, errors, reduction, _ = inputs
    _, scale, table, weights, tops, _ = output
    ctx.save_for_backward(logits, target, table, weights, tops, scale)
    ctx.options = (errors, per_image, ignore_index, reduction)
    ctx.mark_non_differentiable(*output[1:])


def _histogram_backward(operators):
    def backward(ctx, grad, *_):
        return operators.lovasz_histogram_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 9

    return backward


def _save_softmax(ctx, inputs, output) -> None:
    logits, _, _, _, per_image, _, _, from_logits, reduction, _, _ = inputs
    _, scale, weights = output
    ctx.save_for_backward(logits, weights, scale)
    ctx.options = (per_image, from_logits, reduction)
    ctx.mark_non_differentiable(scale, weights)


def _softmax_backward(operators):
    def backward(ctx, grad, *_):
        return operators.lovasz_softmax_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 10

    return backward


def _save_hinge(ctx, inputs, output) -> None:
    logits, _, per_image, _, reduction, _, _ = inputs
    _, scale, weights = output
    ctx.save_for_backward(logits, weights, scale)
    ctx.options = (per_image, reduction)
    ctx.mark_non_differentiable(scale, weights)


def _hinge_backward(operators):
    def backward(ctx, grad, *_):
        return operators.lovasz_hinge_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6

    return backward


# ---- registration

_AUTOGRAD = {
    "sigmoid_focal": (functools.partial(_focal_backward, "sigmoid_focal_backward"), _save_focal),
    "softmax_focal": (functools.partial(_focal_backward, "softmax_focal_backward"), _save_focal),
    "lovasz_softmax": (_softmax_backward, _save_softmax),
    "lovasz_hinge": (_hinge_backward, _save_hinge),
    "lovasz_histogram": (_histogram_backward, _save_histogram),
}


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "veerloss: the kernels have no second derivative; use backend='reference' for it (the focal losses are twice "
        "differentiable there, the Lovász losses are piecewise linear in their errors)"
    )


def define(namespace: str) -> None:
    """Every operator in `namespace`: schema, fake, autograd. Its kernels are registered elsewhere."""
    operators = getattr(torch.ops, namespace)
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"{namespace}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    for loss, (backward, save) in _AUTOGRAD.items():
        name = f"{namespace}::{loss}"
        torch.library.register_autograd(f"{name}_forward", backward(operators), setup_context=save)
        torch.library.register_fake(f"{name}_backward", _fake_backward)
        torch.library.register_autograd(f"{name}_backward", _no_second_derivative)
    whole = functools.partial(_histogram.forward, operators)
    torch.library.impl(f"{namespace}::lovasz_histogram_forward", ("CPU", "CUDA"))(whole)


for _namespace in NAMESPACES.values():
    define(_namespace)


def _triton(name: str):
    """The kernel of an operator: the function of its name in triton/focal.py or triton/lovasz.py, imported when called."""

    def kernel(*args):
        module = importlib.import_module(f".triton.{'focal' if 'focal' in name else 'lovasz'}", __package__)
        return getattr(module, name)(*args)

    return kernel


for _name in _SCHEMAS:
    if _name != "lovasz_histogram_forward":
        torch.library.impl(f"{NAMESPACES['triton']}::{_name}", ("CPU", "CUDA"))(_triton(_name))  # on the CPU: interpreted
