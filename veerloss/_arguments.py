"""Checks of public arguments, and the choice of a backend. Each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._extension import cuda_missing, native_missing, triton_missing
from ._layout import Errors

REDUCTIONS = ("none", "mean", "sum")
#: What backends are chosen for.
LOSSES = ("sigmoid focal", "softmax focal", "lovasz", "lovasz histogram", "region", "compound")
BACKENDS = ("auto", "native", "triton", "reference")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def missing_reason(backend: str, device: torch.device, loss: str) -> str | None:
    """None where ``backend`` can run ``loss``, one of LOSSES, on ``device``, else why not."""
    if backend == "reference":
        return None
    if backend == "triton":
        if loss == "lovasz histogram":
            return "method 'histogram', which process_group needs too, has no Triton kernels"
        if loss in ("region", "compound"):
            return f"{loss} losses have no Triton kernels"
        return triton_missing(device.type)
    if device.type in ("meta", "cpu"):
        return native_missing["cpu"]
    if device.type == "cuda":
        return cuda_missing(device.index)
    return native_missing.get(device.type, f"there is no compiled library for device type {device.type!r}")


def choose_backend(backend: str, device: torch.device, loss: str) -> str:
    """The backend that runs ``loss``, one of LOSSES; an explicit name never falls back."""
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":
        fast = ("native", "triton") if device.type == "cuda" else ("native",)
        return next((b for b in fast if missing_reason(b, device, loss) is None), "reference")
    reason = missing_reason(backend, device, loss)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run on device {str(device)!r}: {reason}")
    return backend


def checks_values(backend: str, device: torch.device) -> bool:
    """Whether the values of the target are to be checked before ``backend`` runs.

    Kernels on the CPU check them as they read them. Those on a GPU cannot tell without waiting for it: a value out of range
    makes the loss NaN there, and VEERLOSS_CHECK=1 in the environment makes it an error at the call.
    """
    return backend == "reference" or (device.type == "cuda" and os.environ.get("VEERLOSS_CHECK", "0") == "1")


def shown(value: object) -> str:
    """``value`` in an error: on one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not write out ints of thousands of digits
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def check_dense(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested tensor of the layout {value.layout}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {value.layout}")


def check_logits(logits: Tensor, min_dim: int, shape: str) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a Tensor, got {type(logits).__name__}")
    check_dense("logits", logits)
    if logits.dtype not in _FLOATS:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() < min_dim:
        raise ValueError(f"logits must have the shape {shape}, got {list(logits.shape)}")


def check_target(target: Tensor, logits: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a Tensor, got {type(target).__name__}")
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits, {str(logits.device)!r}, got {str(target.device)!r}")
    check_dense("target", target)
    if target.dtype not in (*_FLOATS, *_INTEGERS, torch.bool):
        raise TypeError(f"target must be a float, integer or bool tensor, got {target.dtype}")
    if target.requires_grad:
        raise ValueError("target must not require a gradient: no loss here is differentiable in it; pass target.detach()")


def check_index_target(target: Tensor, logits: Tensor) -> None:
    """Class indices [N, *] for logits [N, C, *] ([] for [C])."""
    check_target(target, logits)
    expected = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]
    if target.shape != expected:
        raise ValueError(
            f"target must have the shape {list(expected)} (class indices for logits {list(logits.shape)}), "
            f"got {list(target.shape)}{upsample_hint(target, logits)}"
        )
    if target.dtype not in _INTEGERS:
        raise TypeError(f"target must hold class indices as uint8, int8, int16, int32 or int64, got {target.dtype}")
    check_has_classes(logits)


def check_class_probabilities(target: Tensor, logits: Tensor) -> None:
    """A float target [N, C, *]; or [C]."""
    check_target(target, logits)
    if target.shape != logits.shape:
        raise ValueError(
            f"target must have the shape of logits, {list(logits.shape)}, where it holds class probabilities ({target.dtype}), "
            f"got {list(target.shape)}{upsample_hint(target, logits)}"
        )
    check_has_classes(logits)


def upsample_hint(target: Tensor, logits: Tensor) -> str:
    """For an error about their shapes: what takes logits of another resolution."""
    spatial = logits.dim() - 2
    mode = {2: "bilinear", 3: "trilinear"}.get(spatial)
    fits = mode and target.dim() in (spatial + 1, spatial + 2) and target.size(0) == logits.size(0)
    return f"; logits of another resolution than the target need upsample={mode!r}" if fits else ""


def check_classes(classes: str | Sequence[int], logits: Tensor) -> str | list[int]:
    """Either word, or the ids in order."""
    if isinstance(classes, str):
        check_choice("classes", classes, ("present", "all"))
        return classes
    if not isinstance(classes, Sequence):
        raise TypeError(
            f"classes must be 'present', 'all' or a sequence of class ids, got {type(classes).__name__} {shown(classes)}"
        )
    count = logits.size(1)
    chosen = set()
    for c in classes:
        number = as_int(c)
        if number is None:
            raise TypeError(f"classes must hold ints, got {shown(c)}")
        if not 0 <= number < count:
            raise IndexError(f"classes holds {shown(number)}, expected class ids in [0, {count})")
        chosen.add(number)
    if len(chosen) != len(classes) or not chosen:
        raise ValueError(f"classes must hold at least one class id, and each once, got {shown(list(classes))}")
    return sorted(chosen)


def selected_classes(classes: str | list[int], logits: Tensor) -> Tensor | None:
    """[C] bool for ids in order, None where every class may take part."""
    if isinstance(classes, str):
        return None
    selected = torch.zeros(logits.size(1), dtype=torch.bool, device=logits.device)
    first = last = classes[0]
    for c in [*classes[1:], -1]:  # runs of ids are filled, not copied from the host: a CUDA graph could not hold that
        if c != last + 1:
            selected[first : last + 1].fill_(True)
            first = c
        last = c
    return selected


def check_has_classes(logits: Tensor) -> None:
    if logits.size(min(logits.dim(), 2) - 1) == 0:
        raise ValueError(f"logits must have at least one class, got the shape {list(logits.shape)}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {shown(value)}")


def as_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Any real number (Python's, NumPy's, symbolic ones of torch.compile) as a float, which all backends take."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {shown(value)}")
    try:
        number = torch.sym_float(value)
    except OverflowError:
        number = math.inf
    inside = (low < number if open_low else low <= number) and number <= high and number < math.inf
    if not inside:
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {shown(value)}")
    return number


def as_ignore_index(ignore_index: object, name: str = "ignore_index") -> int | None:
    if ignore_index is None:
        return None
    value = as_int(ignore_index)
    if value is None:
        raise TypeError(f"{name} must be an int or None, got {type(ignore_index).__name__} {shown(ignore_index)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {shown(value)}")
    return value


def as_background_index(background_index: object, classes: int, ignore_index: int | None) -> int | None:
    """A target value that is no class and not ignored."""
    value = as_ignore_index(background_index, "background_index")
    if value is None:
        return None
    if 0 <= value < classes:
        raise ValueError(f"background_index must be no class, that is not in [0, {classes}), got {value}")
    if value == ignore_index:
        raise ValueError(f"background_index must differ from ignore_index, got {value} for both")
    return value


def as_int(value: object) -> int | None:
    """Python's and NumPy's integers as an int; None for anything else."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # arrays have __index__, too
        return None


def check_process_group(process_group: object, per_image: bool, method: str = "histogram") -> None:
    """The options that a loss of all ranks needs."""
    if process_group is None:
        return
    if method == "exact":
        raise ValueError("process_group needs method='histogram' or 'auto', got method='exact': only counts can be added up")
    if per_image:
        raise ValueError(
            "process_group needs per_image=False, got per_image=True: the losses of images do not depend on other ranks"
        )


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_constant(name: str, value: Tensor, logits: Tensor) -> None:
    """A tensor argument that is a constant of the loss."""
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {str(logits.device)!r}, got {str(value.device)!r}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require a gradient: it is a constant of the loss; pass {name}.detach()")
    check_dense(name, value)
    if value.dtype not in (*_FLOATS, *_INTEGERS, torch.bool):
        raise TypeError(f"{name} must be a float, integer or bool tensor, got {value.dtype}")


def check_per_class(name: str, value: Tensor, logits: Tensor, classes: int) -> None:
    check_constant(name, value, logits)
    if value.shape != (classes,):
        raise ValueError(f"{name} must have the shape [{classes}] (one value per class), got {list(value.shape)}")


def as_normalizer(normalizer: object, reduction: str, logits: Tensor) -> float | Tensor | None:
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer replaces the divisor of reduction='mean', got reduction={reduction!r}")
    if not isinstance(normalizer, Tensor):
        return as_number("normalizer", normalizer, 0, open_low=True)
    check_constant("normalizer", normalizer, logits)
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a number or a tensor of one element, got the shape {list(normalizer.shape)}")
    return normalizer


# The values of targets: see checks_values.


def check_label_range(target: Tensor, classes: int, ignore_index: int | None, background_index: int | None = None) -> None:
    target = widened(target)
    bad, expected = (target < 0) | (target >= classes), f"class indices in [0, {classes})"
    if background_index is not None:
        bad = bad & (target != background_index)
        expected += f"{' or' if ignore_index is None else ','} background_index={background_index}"
    _raise_for(bad, target, expected, ignore_index)


def check_binary(target: Tensor, ignore_index: int | None) -> None:
    target = widened(target)
    _raise_for((target != 0) & (target != 1), target, "0 or 1", ignore_index)


def check_unit_range(target: Tensor, ignore_index: int | None) -> None:
    target = widened(target)
    _raise_for((target < 0) | (target > 1), target, "values in [0, 1]", ignore_index)


def check_probabilities(target: Tensor) -> None:
    _raise_for(~((target >= 0) & (target < math.inf)), target, "finite values >= 0", None)


def widened(target: Tensor) -> Tensor:
    """As int64 or float64: PyTorch takes a number to the type of the tensor that it is compared with, 511 to 255 for uint8,
    2049 to 2048 for float16."""
    return target.double() if target.dtype.is_floating_point else target.long()


def _raise_for(bad: Tensor, target: Tensor, expected: str, ignore_index: int | None) -> None:
    if torch.compiler.is_compiling() or target.is_meta or _is_batched(bad):  # these cannot branch on data
        return
    if ignore_index is not None:
        bad = bad & (target != ignore_index)
        expected += f" or ignore_index={ignore_index}"
    if bad.any():
        raise IndexError(f"target holds {target[bad][0].item()}, expected {expected}")


def _is_batched(t: Tensor) -> bool:
    """Whether t is one of the tensors that torch.func.vmap goes over."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def as_pixels(logits: Tensor) -> Tensor:
    """[N, C, *] as [N, C, P]: a view for every layout whose pixels have one stride (NCHW, channels_last), else a copy."""
    if logits.dim() == 1:
        return logits[None, :, None]
    n, c = logits.shape[:2]
    return logits.reshape(n, c, math.prod(logits.shape[2:]))


def per_segment_shape(logits: Tensor, errors: int, per_image: bool) -> tuple[int, ...]:
    """Of one value per segment of [N, C, \\*]: [], [C], [N] or [N, C]."""
    n, c = logits.shape[:2]
    return ((n,) if per_image else ()) + (() if errors == Errors.HINGE else (c,))


def opmath_dtype(logits: Tensor) -> torch.dtype:
    """What kernels compute in: float32, or float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def loss_dtype(logits: Tensor) -> torch.dtype:
    """The type of the loss: that of the logits, but float32 under autocast, as for PyTorch's own losses.

    A float16 loss has a float16 gradient, in which the usual scale of a gradient scaler, 65536, is infinite.
    """
    if logits.is_meta:  # autocast knows no such device
        return logits.dtype
    return opmath_dtype(logits) if torch.is_autocast_enabled(logits.device.type) else logits.dtype


def check_transforms(logits: Tensor) -> None:
    """Kernels have reverse mode alone. Without this, torch.func would fail in its own words, and forward mode give 0."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError(
            "veerloss: the kernels know neither torch.func transforms (grad, vjp, vmap, jvp) nor forward-mode differentiation; "
            "use loss.backward() or torch.autograd.grad, or backend='reference', which has them"
        )
