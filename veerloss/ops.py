"""Every operator: its fake kernel, its autograd, and the function that calls it; _schemas.py has the schemas. Each backend has
the same operators in a namespace of its own: ``veerloss`` those of the compiled libraries (csrc/ops), ``veerloss_triton`` those
of the Triton kernels (triton/).

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
from ._schemas import SCHEMAS

#: Operator families, each with a <stem>_forward and a <stem>_backward; and the module of triton/ that has its kernels, None
#: where there are none.
FAMILIES = {
    "sigmoid_focal": "focal",
    "softmax_focal": "focal",
    "upsampled_sigmoid_focal": None,
    "upsampled_softmax_focal": None,
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


def sigmoid_focal(logits, target, **options) -> Tensor:
    return _focal("sigmoid_focal", logits, target, **options)


def softmax_focal(logits, target, **options) -> Tensor:
    return _focal("softmax_focal", logits, target, **options)


def _focal(stem, logits, target, *, reduction, normalizer, backend, upcast_loss=False, upsample=None, **options) -> Tensor:
    """A reduced loss of logits of low resolution has a forward operator of its own on a CPU, which makes the gradient."""
    namespace = _checked(backend, logits)
    options |= _divisor(reduction, normalizer)
    if upsample is not None and reduction != "none" and kernels_of(backend, logits) == "cpu":
        options["keep_gradient"] = _is_differentiated(logits)
        stem = f"upsampled_{stem}"
    return getattr(namespace, f"{stem}_forward").default(
        logits=logits, target=target, upcast_loss=upcast_loss or _upcasts(logits), upsample=upsample, **options
    )[0]


def kernels_of(backend: str, logits: Tensor) -> str:
    """Which kernels run the operators of a backend: "cpu", "cuda", where these are emulated too, or "triton"."""
    if backend != "native":
        return backend
    return "cuda" if logits.is_cuda or NAMESPACES["native"] != "veerloss" else "cpu"


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


@_fake("upsampled_sigmoid_focal_forward")
@_fake("upsampled_softmax_focal_forward")
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
        return _over_ranks("lovasz_histogram", arguments, ranks, backend)
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


def _over_ranks(stem: str, arguments: dict, ranks, backend: str) -> tuple[Tensor, Tensor]:
    """First and last result of <stem>_forward."""
    schema = getattr(operators(backend), f"{stem}_forward").default._schema
    return _OfRanks.apply(NAMESPACES[backend], stem, ranks, *(arguments.get(argument.name) for argument in schema.arguments))


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
    return _over_ranks("region", arguments, ranks, backend)[0]


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
    return _over_ranks("compound", arguments, ranks, backend)


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
_WHOLE: dict[str, Callable] = {
    "lovasz_histogram_forward": _histogram.forward,
    "region_forward": _region_forward,
    "compound_forward": _compound.forward,
    "upsampled_sigmoid_focal_backward": _upsampled_focal_backward,
    "upsampled_softmax_focal_backward": _upsampled_focal_backward,
}


def stems_of(namespace: str) -> tuple[str, ...]:
    """The operator families that a namespace has."""
    return tuple(stem for stem, module in FAMILIES.items() if module is not None or namespace != NAMESPACES["triton"])


def define(namespace: str) -> None:
    """Every operator in `namespace`: schema, fake, autograd. Its kernels are registered elsewhere."""
    found = getattr(torch.ops, namespace)
    stems = stems_of(namespace)
    for name, schema in SCHEMAS.items():
        if name.startswith(stems):
            torch.library.define(f"{namespace}::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
    for stem in stems:
        forward, backward = f"{stem}_forward", f"{stem}_backward"
        fakes = {forward: _FAKES[forward], backward: lambda logits, **_: torch.empty_like(logits)}
        for name, fake in fakes.items():
            schema = getattr(found, name).default._schema
            torch.library.register_fake(f"{namespace}::{name}", _autograd.by_name(schema, fake))
        _autograd.register(namespace, stem)
    for name in _WHOLE.keys() & SCHEMAS.keys():
        if not name.startswith(stems):
            continue
        whole = functools.partial(_WHOLE[name], found)
        schema = getattr(found, name).default._schema
        torch.library.impl(f"{namespace}::{name}", ("CPU", "CUDA"))(_autograd.by_name(schema, whole))


def _triton_kernel(stem: str, name: str) -> Callable:
    """The function of the operator's name in the module of its family, which is imported when it is first called."""

    def kernel(*, upsample=None, **arguments):
        module = FAMILIES[stem]
        if upsample is not None:
            if module != "focal":
                raise RuntimeError(f"veerloss: {name} takes no logits of low resolution in Triton: interpolate them first")
            module, arguments["upsample"] = "focal_low", upsample
        return getattr(importlib.import_module(f".triton.{module}", __package__), name)(**arguments)

    return _autograd.by_name(getattr(operators("triton"), name).default._schema, kernel)


for _namespace in NAMESPACES.values():
    define(_namespace)
torch.library.define(f"{NAMESPACES['native']}::layout_constants", "(Tensor like) -> Tensor")
torch.library.define(f"{NAMESPACES['native']}::count_not_ignored", "(Tensor target, int ignore_index) -> int")

for _name in SCHEMAS:
    for _stem in stems_of(NAMESPACES["triton"]):
        if not _name.startswith(_stem):
            continue
        # On the CPU they are interpreted.
        torch.library.impl(f"{NAMESPACES['triton']}::{_name}", ("CPU", "CUDA"))(_triton_kernel(_stem, _name))
