"""What every launch of a Triton kernel needs: shapes checked, strides, the device, how many programs."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import arithmetic_dtype

#: Programs of a kernel that leaves one partial sum each. Each takes every MAX_PROGRAMS-th tile, in order: the sums, and so the
#: bits of the loss, do not depend on the GPU. A few waves of the largest GPUs (not measured yet).
MAX_PROGRAMS = 4096


def arithmetic(logits: Tensor) -> tl.dtype:
    """The type that kernels compute in."""
    if not logits.is_floating_point():
        raise ValueError(f"veerloss: expected logits of float32, float64, bfloat16 or float16, got {logits.dtype}")
    return tl.float64 if arithmetic_dtype(logits) == torch.float64 else tl.float32


def check_shape(name: str, t: Tensor, shape: tuple[int, ...], logits: Tensor) -> None:
    """Kernels read what the shape of the logits says: an operator called directly must not make them read beyond a tensor."""
    if t.shape != shape or t.device != logits.device:
        raise ValueError(
            f"veerloss: expected {name} of shape {list(shape)} on {logits.device} for logits {list(logits.shape)}, "
            f"got {list(t.shape)} on {t.device}"
        )


def as_bytes(t: Tensor) -> Tensor:
    """A bool tensor as uint8, which every version of Triton loads alike; others as they are."""
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def strides(t: Tensor) -> tuple[int, int, int]:
    """Of image, channel and pixel; [N, P] has no channel."""
    return t.stride() if t.dim() == 3 else (t.stride(0), 0, t.stride(1))


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))
