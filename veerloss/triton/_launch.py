"""What every launch of a Triton kernel needs: checked arguments, the type to compute in, strides, the device.

Operators can be called directly, so they check whatever could make a kernel read outside a tensor.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import opmath_dtype


def describe(t: Tensor) -> str:
    """[2, 3] float32 on cpu"""
    contiguous = "" if t.is_contiguous() else ", not contiguous,"
    return f"{list(t.shape)} {dtype_name(t.dtype)}{contiguous} on {t.device}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(condition: bool, argument: str, t: Tensor, expected: str) -> None:
    if not condition:
        raise ValueError(f"veerloss: {argument} must be {expected}, got {describe(t)}")


def check_logits(logits: Tensor) -> None:
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    fits = logits.dim() == 3 and logits.dtype in floats
    check(fits, "logits", logits, "[N, C, P] float32, float64, bfloat16 or float16")


def check_like(argument: str, t: Tensor, logits: Tensor, *, channels: bool) -> None:
    """`t` is [N, P], or [N, C, P] with channels, beside logits [N, C, P]."""
    shape = logits.shape if channels else (logits.size(0), logits.size(-1))
    fits = t.shape == shape and t.device == logits.device
    check(fits, argument, t, f"{list(shape)}, for logits {describe(logits)}")


def check_data(argument: str, t: Tensor | None, like: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """`t`, unless it is None, is contiguous, on the device of `like`, of one of the types and has the elements of the shape."""
    if t is None:
        return
    fits = t.is_contiguous() and t.numel() == math.prod(shape) and t.dtype in dtypes and t.device == like.device
    check(fits, argument, t, f"{list(shape)} {' or '.join(map(dtype_name, dtypes))}, contiguous")


def opmath_t(logits: Tensor) -> tl.dtype:
    """The type that kernels compute in."""
    return tl.float64 if opmath_dtype(logits) == torch.float64 else tl.float32


def as_bytes(t: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, which every version of Triton loads alike; others as they are."""
    return t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t


def strides(t: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel; [N, P] has no channel."""
    return t.stride() if t.dim() == 3 else (t.stride(0), 0, t.stride(1))


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))
