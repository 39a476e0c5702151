"""Every operator: its schema, its fake kernel, its autograd. Each backend has the same operators in a namespace of its own:
``veerloss`` those of the compiled libraries (csrc/ops), ``veerloss_triton`` those of the Triton kernels (triton/).

Logits are [N, C, P] in any strides; targets are class indices [N, P] or, of the focal losses, values [N, C, P]. ``scale`` is
the factor between the sum that a kernel computes and the loss that it returns; the backward operators use it again. With
``upcast_loss`` the loss is in the opmath type (float32, float64 for float64 logits), whatever the logits are. Arguments that
mean the same have the same name everywhere, and are passed by it.

Whatever takes logits and a target takes besides ``upsample``, one of _layout.Interpolation: then logits are of low resolution,
and both have their spatial dimensions, [N, C, h, w] and [N, H, W] or of volumes one more, each with its pixels in order.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _autograd, _compound, _histogram
from ._arguments import check_transforms, loss_dtype, opmath_dtype, per_segment_shape
from ._layout import REGION_WORDS, TABLE, Errors, Reduction, bin_count

_SIGMOID = (
    "float? alpha, Tensor? class_alpha, float gamma, Tensor? weight, int? ignore_index, int? background_index, int reduction"
)
_SOFTMAX = "float alpha, Tensor? class_alpha, float gamma, float label_smoothing, int? ignore_index, int reduction"
_FOCAL_RESULT = "float factor, Tensor? normalizer, bool upcast_loss) -> (Tensor loss, Tensor scale)"
# A class takes part if `selected`, [C] bool, has it (None: every class) and, with `present`, if it has foreground. `errors` is
# one of _layout.Errors; scale has one value per segment.
_LOVASZ = (
    "Tensor logits, Tensor target, Tensor? selected, bool present, bool per_image, Tensor? class_weight, int? ignore_index, "
    "int? background_index, int errors, int reduction"
)
_SCHEMAS = {
    "sigmoid_focal_forward": f"(Tensor logits, Tensor target, {_SIGMOID}, {_FOCAL_RESULT}",
    "sigmoid_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SIGMOID}, Tensor scale) -> Tensor",
    "softmax_focal_forward": f"(Tensor logits, Tensor target, {_SOFTMAX}, {_FOCAL_RESULT}",
    "softmax_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SOFTMAX}, Tensor scale) -> Tensor",
    # Of a CPU, and hard labels. gradient: of the sum of the pixels' losses; [0] without `keep_gradient`.
    "upsampled_focal_forward": "(Tensor logits, Tensor target, float alpha, Tensor? class_alpha, float gamma, "
    "int? ignore_index, int reduction, float factor, Tensor? normalizer, bool upcast_loss, bool keep_gradient, int upsample) "
    "-> (Tensor loss, Tensor scale, Tensor gradient)",
    "upsampled_focal_backward": "(Tensor grad, Tensor logits, Tensor scale, Tensor gradient) -> Tensor",
    # valid_pixels: how many pixels are not ignored, where that is known.
    # weights: the signed weights of the errors, [C, N, P], or [0] without `keep_weights`; with valid_pixels, which only kernels
    # of the CPU take, [C, valid_pixels].
    "lovasz_exact_forward": f"({_LOVASZ}, int? valid_pixels, bool keep_weights, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor weights)",
    "lovasz_exact_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor weights, Tensor scale, int errors, "
    "bool per_image, int? ignore_index, int? valid_pixels, int reduction) -> Tensor",
    # The whole method, and its steps: see _histogram.py. What the tensors hold is told in csrc/kernels.h.
    "lovasz_histogram_forward": f"({_LOVASZ}, int? valid_pixels, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor table, Tensor weights, Tensor bounds)",
    "lovasz_histogram_count": "(Tensor(a!) counts, Tensor(b!) largest, Tensor logits, Tensor target, Tensor? table, "
    "Tensor? segment_mask, int errors, bool per_image, int? ignore_index, int? background_index, bool sampled, "
    "bool find_largest) -> ()",
    "lovasz_histogram_place": "(Tensor counts, Tensor? counted_table, int errors, bool sampled, int bins) -> Tensor",
    "lovasz_histogram_weigh": "(Tensor logits, Tensor counts, Tensor? recounted_mask, Tensor? recounts, "
    "Tensor? recounted_table, Tensor largest, Tensor table, Tensor? selected, bool present, Tensor? class_weight, "
    "int errors, bool per_image, int reduction, bool upcast_loss, bool again=False) "
    "-> (Tensor loss, Tensor scale, Tensor weights, Tensor bounds, Tensor needs_rebin, Tensor better_table)",
    "lovasz_histogram_sum": "(Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor units, int errors, "
    "bool per_image, int? ignore_index, int? background_index) -> Tensor",
    "lovasz_histogram_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor scale, "
    "int errors, bool per_image, int? ignore_index, int? background_index, int reduction) -> Tensor",
}
# How a region loss sums; activation is one of _layout.Activation, form of _layout.Form.
_REGION = "int activation, bool squared, bool per_image, int? ignore_index, int? background_index"
_REGION_INDEX = (
    "Tensor? selected, bool present, bool per_image, Tensor? class_weight, float alpha, float beta, float smooth_numerator, "
    "float smooth_denominator, int form, float exponent, int reduction, bool upcast_loss"
)
_SCHEMAS |= {
    # The whole loss, and its steps: sums of integers (csrc/math/region.h), which may be added up over ranks; the loss and the
    # coefficients of the gradient from them.
    "region_forward": f"(Tensor logits, Tensor target, {_REGION}, {_REGION_INDEX.replace('bool per_image, ', '')}) "
    "-> (Tensor loss, Tensor scale, Tensor coefficients)",
    "region_sum": f"(Tensor logits, Tensor target, {_REGION}) -> Tensor",
    "region_weigh": f"(Tensor logits, Tensor sums, {_REGION_INDEX}) -> (Tensor loss, Tensor scale, Tensor coefficients)",
    "region_backward": f"(Tensor grad, Tensor logits, Tensor target, {_REGION}, int reduction, Tensor scale, "
    "Tensor coefficients) -> Tensor",
}
_COMPOUND = "int errors, bool per_image, int? ignore_index"
_FOCAL_TERM = "float? alpha, Tensor? class_alpha, float gamma, float label_smoothing"
_SCHEMAS |= {
    # The whole loss (its region loss as region_weigh takes it, with its classes named apart from those of Lovász), and the
    # passes over the pixels that a Lovász loss has too: see _compound.py. Each adds to focal_sums, [3] float64, and to
    # region_sums as region_sum makes them. focal, lovasz and region are the weights of the terms, None: without.
    "compound_forward": "(Tensor logits, Tensor target, float? focal, float? lovasz, float? region, "
    f"{_FOCAL_TERM}, bool weighted_mean, Tensor? selected, bool present, Tensor? region_selected, bool region_present, "
    "float region_alpha, float region_beta, float smooth_numerator, float smooth_denominator, int form, float exponent, "
    f"{_COMPOUND}, bool histogram, int? valid_pixels, bool keep_weights, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor focal_scale, Tensor region_weights, Tensor table, Tensor weights, Tensor parts)",
    "compound_count": "(Tensor(a!) counts, Tensor(b!) largest, Tensor(c!)? focal_sums, Tensor(d!)? region_sums, Tensor logits, "
    f"Tensor target, Tensor table, Tensor? segment_mask, {_FOCAL_TERM}, {_COMPOUND}, bool find_largest) -> ()",
    "compound_exact": "(Tensor(a!)? focal_sums, Tensor(b!)? region_sums, Tensor logits, Tensor target, Tensor? selected, "
    f"bool present, {_FOCAL_TERM}, {_COMPOUND}, int? valid_pixels, bool keep_weights) "
    "-> (Tensor loss, Tensor scale, Tensor weights)",
    "compound_sum": "(Tensor(a!)? focal_sums, Tensor(b!)? region_sums, Tensor logits, Tensor target, "
    f"{_FOCAL_TERM}, {_COMPOUND}) -> ()",
    "compound_backward": "(Tensor grad, Tensor logits, Tensor target, float? focal, float? lovasz, float? region, "
    f"{_FOCAL_TERM}, {_COMPOUND}, bool histogram, int? valid_pixels, Tensor scale, Tensor focal_scale, Tensor region_weights, "
    "Tensor table, Tensor weights) -> Tensor",
}
_SCHEMAS = {
    name: schema.replace(") ->", ", int? upsample=None) ->")
    if "Tensor target" in schema and "upsample" not in schema
    else schema
    for name, schema in _SCHEMAS.items()
}
#: Operator families, each with a <stem>_forward and a <stem>_backward; and the module of triton/ that has its kernels, None
#: where there are none.
FAMILIES = {
    "sigmoid_focal": "focal",
    "softmax_focal": "focal",
    "upsampled_focal": None,
    "lovasz_exact": "lovasz_exact",
    "lovasz_histogram": None,
    "region": None,
    "compound": None,
}
#: The namespace of each backend's operators.
NAMESPACES = {"native": "veerloss", "triton": "veerloss_triton"}

_REDUCTION = {"none": Reduction.NONE.value, "mean": Reduction.MEAN.value, "sum": Reduction.SUM.value}

#: By operator: see _fake() and define().
_FAKES: dict[str, Callable] = {}


def operators(backend: str):
    return getattr(torch.ops, NAMESPACES[backend])


def _checked(backend: str, logits: Tensor):
    """The operators, for a call of which autograd is to know."""
    check_transforms(logits)
    return operators(backend)


def _fake(name: str):
    """The fake kernel of operator `name`, in every namespace. It is called by keyword, and takes those that it needs."""

    def keep(kernel):
        _FAKES[name] = kernel
        return kernel

    return keep


def _upcasts(logits: Tensor) -> bool:
    return loss_dtype(logits) != logits.dtype


def loss_dtype_of(logits: Tensor, upcast_loss: bool) -> torch.dtype:
    return opmath_dtype(logits) if upcast_loss else logits.dtype


# ---- focal


def sigmoid_focal(
    logits, target, *, alpha, class_alpha, gamma, weight, ignore_index, background_index, reduction, normalizer, backend
) -> Tensor:
    return _checked(backend, logits).sigmoid_focal_forward.default(
        logits=logits, target=target, alpha=alpha, class_alpha=class_alpha, gamma=gamma, weight=weight,
        ignore_index=ignore_index, background_index=background_index, **_divisor(reduction, normalizer),
        upcast_loss=_upcasts(logits),
    )[0]  # fmt: skip


def softmax_focal(
    logits, target, *, alpha, class_alpha, gamma, label_smoothing, ignore_index, reduction, normalizer, backend,
    upcast_loss=False, upsample=None,
) -> Tensor:  # fmt: skip
    return _checked(backend, logits).softmax_focal_forward.default(
        logits=logits, target=target, alpha=alpha, class_alpha=class_alpha, gamma=gamma,
        label_smoothing=label_smoothing, ignore_index=ignore_index, **_divisor(reduction, normalizer),
        upcast_loss=upcast_loss or _upcasts(logits), upsample=upsample,
    )[0]  # fmt: skip


def upsampled_focal(logits, target, *, alpha, class_alpha, gamma, ignore_index, reduction, normalizer, upsample) -> Tensor:
    return _checked("native", logits).upsampled_focal_forward.default(
        logits=logits, target=target, alpha=alpha, class_alpha=class_alpha, gamma=gamma, ignore_index=ignore_index,
        **_divisor(reduction, normalizer), upcast_loss=_upcasts(logits), keep_gradient=_is_differentiated(logits),
        upsample=upsample,
    )[0]  # fmt: skip


def _upsampled_focal_backward(_, *, grad, logits, scale, gradient) -> Tensor:
    return torch.mul(gradient, grad.to(gradient.dtype) * scale, out=torch.empty_like(logits))


def _divisor(reduction: str, normalizer: float | Tensor | None) -> dict:
    """A normaliser turns "mean" into a scaled sum."""
    if normalizer is None:
        return {"reduction": _REDUCTION[reduction], "factor": 1.0, "normalizer": None}
    if isinstance(normalizer, Tensor):
        return {"reduction": _REDUCTION["sum"], "factor": 1.0, "normalizer": normalizer}
    return {"reduction": _REDUCTION["sum"], "factor": 1.0 / normalizer, "normalizer": None}


@_fake("sigmoid_focal_forward")
def _(logits, target, reduction, upcast_loss, upsample=None, **_):
    dtype = loss_dtype_of(logits, upcast_loss)
    if reduction != Reduction.NONE:
        loss = logits.new_empty((), dtype=dtype)
    elif upsample is not None:
        first = 2 if target.dim() == logits.dim() else 1
        loss = logits.new_empty((*logits.shape[:2], *target.shape[first:]), dtype=dtype)
    else:
        loss = logits.new_empty(logits.shape, dtype=dtype) if upcast_loss else torch.empty_like(logits)
    return loss, logits.new_empty((), dtype=opmath_dtype(logits))


@_fake("softmax_focal_forward")
def _(logits, target, reduction, upcast_loss, **_):
    shape = target.shape[:1] + target.shape[target.dim() - logits.dim() + 2 :] if reduction == Reduction.NONE else ()
    loss = logits.new_empty(shape, dtype=loss_dtype_of(logits, upcast_loss))
    return loss, logits.new_empty((), dtype=opmath_dtype(logits))


@_fake("upsampled_focal_forward")
def _(logits, upcast_loss, keep_gradient, **_):
    opmath = opmath_dtype(logits)
    gradient = logits.new_empty(logits.shape if keep_gradient else (0,), dtype=opmath)
    return logits.new_empty((), dtype=loss_dtype_of(logits, upcast_loss)), logits.new_empty((), dtype=opmath), gradient


# ---- Lovász


def lovasz_exact(
    logits, target, *, selected, present, per_image, class_weight, ignore_index, background_index, errors, reduction,
    valid_pixels, backend, upsample=None,
) -> Tensor:  # fmt: skip
    return _checked(backend, logits).lovasz_exact_forward.default(
        logits=logits, target=target, selected=selected, present=present, per_image=per_image, class_weight=class_weight,
        ignore_index=ignore_index, background_index=background_index, errors=int(errors), reduction=_REDUCTION[reduction],
        valid_pixels=valid_pixels, keep_weights=_is_differentiated(logits), upcast_loss=_upcasts(logits), upsample=upsample,
    )[0]  # fmt: skip


def _is_differentiated(logits: Tensor) -> bool:
    """Whether a backward pass may follow. A graph that is exported, or traced, says nothing of those who will run it."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or (torch.is_grad_enabled() and logits.requires_grad)


def lovasz_histogram(
    logits, target, *, selected, present, per_image, class_weight, ignore_index, background_index, errors, reduction,
    valid_pixels, ranks, backend, upsample=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, bounds): the bounds on what binning changed, one per segment [N or 1, C]."""
    arguments = {
        "logits": logits, "target": target, "selected": selected, "present": present, "per_image": per_image,
        "class_weight": class_weight, "ignore_index": ignore_index, "background_index": background_index,
        "errors": int(errors), "reduction": _REDUCTION[reduction], "valid_pixels": valid_pixels,
        "upcast_loss": _upcasts(logits), "upsample": upsample,
    }  # fmt: skip
    namespace = _checked(backend, logits)
    if ranks is not None:
        return _OfRanks.apply(NAMESPACES[backend], "lovasz_histogram", ranks, *arguments.values())
    loss, _, _, _, bounds = namespace.lovasz_histogram_forward.default(**arguments)
    return loss, bounds


class _OfRanks(torch.autograd.Function):
    """A forward operator with what all ranks counted or summed: no operator, because it waits for other processes."""

    @staticmethod
    def forward(ctx, namespace, stem, ranks, *inputs):
        found = getattr(torch.ops, namespace)
        schema = getattr(found, f"{stem}_forward").default._schema
        output = _autograd.by_name(schema, functools.partial(_WHOLE[f"{stem}_forward"], found, ranks=ranks))(*inputs)
        ctx.saved = _autograd.SavedByName(namespace, stem)
        ctx.saved.setup_context(ctx, inputs, output)
        return output[0], output[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return None, None, None, *ctx.saved.backward(ctx, grad)


def _fake_loss_and_scale(logits, errors, per_image, reduction, upcast_loss) -> tuple[Tensor, Tensor]:
    shape = per_segment_shape(logits, errors, per_image)
    loss = logits.new_empty(shape if reduction == Reduction.NONE else (), dtype=loss_dtype_of(logits, upcast_loss))
    return loss, logits.new_empty(shape, dtype=opmath_dtype(logits))


@_fake("lovasz_exact_forward")
def _(logits, target, per_image, errors, reduction, valid_pixels, keep_weights, upcast_loss, **_):
    n, c = logits.shape[:2]
    shape = (c, n, math.prod(target.shape[1:])) if valid_pixels is None else (c, valid_pixels)
    weights = logits.new_empty(shape if keep_weights else (0,), dtype=opmath_dtype(logits))
    return *_fake_loss_and_scale(logits, errors, per_image, reduction, upcast_loss), weights


@_fake("lovasz_histogram_forward")
def _(logits, per_image, errors, reduction, upcast_loss, **_):
    n, c = logits.shape[:2]
    rows, dtype = n if per_image else 1, opmath_dtype(logits)
    return (
        *_fake_loss_and_scale(logits, errors, per_image, reduction, upcast_loss),
        logits.new_empty((rows, c, TABLE, 2), dtype=torch.float32),
        logits.new_empty((rows, c, 2, bin_count(c)), dtype=dtype),
        logits.new_empty((rows, c), dtype=torch.float64),
    )


# ---- region losses


def region(logits, target, *, activation, form, reduction, ranks, backend, **options) -> Tensor:
    arguments = {
        "logits": logits, "target": target, "activation": int(activation), "form": int(form),
        "reduction": _REDUCTION[reduction], "upcast_loss": _upcasts(logits), **options,
    }  # fmt: skip
    namespace = _checked(backend, logits)
    if ranks is None:
        return namespace.region_forward.default(**arguments)[0]
    names = [argument.name for argument in namespace.region_forward.default._schema.arguments]
    return _OfRanks.apply(NAMESPACES[backend], "region", ranks, *(arguments.get(name) for name in names))[0]


def _region_forward(
    ops, *, logits, target, activation, squared, per_image, ignore_index, background_index, upsample=None, ranks=None, **rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator region_forward by its steps."""

    def sums():
        return ops.region_sum(
            logits=logits, target=target, activation=activation, squared=squared, per_image=per_image,
            ignore_index=ignore_index, background_index=background_index, upsample=upsample,
        )  # fmt: skip

    found = sums() if ranks is None else ranks.sum_of(sums, (1, logits.size(1), REGION_WORDS))
    return ops.region_weigh(logits=logits.flatten(2), sums=found, per_image=per_image, **rule)


@_fake("region_forward")
def _(logits, per_image, reduction, upcast_loss, **_):
    n, c = logits.shape[:2]
    return (
        *_fake_loss_and_scale(logits, Errors.PROBABILITIES, per_image, reduction, upcast_loss),
        logits.new_empty((n if per_image else 1, c, 2), dtype=torch.float64),
    )


# ---- compound losses


def compound(logits, target, *, ranks, backend, **options) -> tuple[Tensor, Tensor]:
    """(loss, parts): the terms that there are, focal, Lovász, region."""
    arguments = {
        "logits": logits, "target": target, "keep_weights": _is_differentiated(logits), "upcast_loss": _upcasts(logits),
        **options,
    }  # fmt: skip
    namespace = _checked(backend, logits)
    if ranks is None:
        loss, *_, parts = namespace.compound_forward.default(**arguments)
        return loss, parts
    names = [argument.name for argument in namespace.compound_forward.default._schema.arguments]
    return _OfRanks.apply(NAMESPACES[backend], "compound", ranks, *(arguments.get(name) for name in names))


@_fake("compound_forward")
def _(logits, target, focal, lovasz, region, errors, histogram, per_image, valid_pixels, keep_weights, upcast_loss, **_):
    n, c = logits.shape[:2]
    rows, dtype, table, weights = n if per_image else 1, opmath_dtype(logits), (0,), (0,)
    if lovasz is not None and histogram:
        table, weights = (rows, c, TABLE, 2), (rows, c, 2, bin_count(c))
    elif lovasz is not None and keep_weights:
        weights = (c, n, math.prod(target.shape[1:])) if valid_pixels is None else (c, valid_pixels)
    return (
        *_fake_loss_and_scale(logits, errors, per_image, Reduction.MEAN, upcast_loss),
        logits.new_empty((0,) if focal is None else (), dtype=dtype),
        logits.new_empty((0,) if region is None else (rows, c, 2), dtype=dtype),
        logits.new_empty(table, dtype=torch.float32),
        logits.new_empty(weights, dtype=dtype),
        logits.new_empty((sum(term is not None for term in (focal, lovasz, region)),), dtype=dtype),
    )


# ---- registration

#: Operators that are others put together.
_WHOLE = {
    "lovasz_histogram_forward": _histogram.forward,
    "region_forward": _region_forward,
    "compound_forward": _compound.forward,
    "upsampled_focal_backward": _upsampled_focal_backward,
}


def stems_of(namespace: str) -> tuple[str, ...]:
    """The operator families that a namespace has."""
    return tuple(stem for stem, module in FAMILIES.items() if module is not None or namespace != NAMESPACES["triton"])


def define(namespace: str) -> None:
    """Every operator in `namespace`: schema, fake, autograd. Its kernels are registered elsewhere."""
    found = getattr(torch.ops, namespace)
    stems = stems_of(namespace)
    for name, schema in _SCHEMAS.items():
        if name.startswith(stems):
            torch.library.define(f"{namespace}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    for stem in stems:
        forward, backward = f"{stem}_forward", f"{stem}_backward"
        fakes = {forward: _FAKES[forward], backward: lambda logits, **_: torch.empty_like(logits)}
        for name, fake in fakes.items():
            schema = getattr(found, name).default._schema
            torch.library.register_fake(f"{namespace}::{name}", _autograd.by_name(schema, fake))
        _autograd.register(namespace, stem)
    for name in _WHOLE.keys() & _SCHEMAS.keys():
        if not name.startswith(stems):
            continue
        whole = functools.partial(_WHOLE[name], found)
        schema = getattr(found, name).default._schema
        torch.library.impl(f"{namespace}::{name}", ("CPU", "CUDA"))(_autograd.by_name(schema, whole))


def _triton_kernel(stem: str, name: str) -> Callable:
    """The function of the operator's name in the module of its family, which is imported when it is first called."""

    def kernel(*, upsample=None, **arguments):
        if upsample is not None:
            raise RuntimeError(f"veerloss: {name} takes no logits of low resolution in Triton: interpolate them first")
        return getattr(importlib.import_module(f".triton.{FAMILIES[stem]}", __package__), name)(**arguments)

    return _autograd.by_name(getattr(operators("triton"), name).default._schema, kernel)


for _namespace in NAMESPACES.values():
    define(_namespace)
torch.library.define(f"{NAMESPACES['native']}::layout_constants", "(Tensor like) -> Tensor")
torch.library.define(f"{NAMESPACES['native']}::count_not_ignored", "(Tensor target, int ignore_index) -> int")

for _name in _SCHEMAS:
    for _stem in stems_of(NAMESPACES["triton"]):
        if not _name.startswith(_stem):
            continue
        # On the CPU they are interpreted.
        torch.library.impl(f"{NAMESPACES['triton']}::{_name}", ("CPU", "CUDA"))(_triton_kernel(_stem, _name))
