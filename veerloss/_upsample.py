"""The option `upsample` of the losses: logits of lower resolution than the target.

The loss is that of the logits which torch.nn.functional.interpolate makes of them, of the size of the target, in the type that
kernels compute in: 16-bit logits are not rounded again at full resolution. Where kernels take logits as they are, nothing of
full resolution is made but the loss; elsewhere the option is this interpolation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments as arguments
from ._layout import Interpolation
from .ops import kernels_of

#: By mode, the number of spatial dimensions; None for any.
MODES = {"bilinear": 2, "trilinear": 3, "nearest": None}


@dataclass(frozen=True)
class LowLogits:
    """Logits [N, C, \\*] of low resolution, the size to which they are upsampled, and by which kernels (ops.kernels_of)."""

    logits: Tensor
    size: torch.Size
    mode: str
    align_corners: bool
    kernels: str = "reference"

    @property
    def interpolation(self) -> int:
        if self.mode == "nearest":
            return int(Interpolation.NEAREST)
        return int(Interpolation.LINEAR_ALIGNED if self.align_corners else Interpolation.LINEAR)

    def interpolated(self) -> Tensor:
        align_corners = None if self.mode == "nearest" else self.align_corners
        x = self.logits.to(arguments.opmath_dtype(self.logits))
        if x.numel() == 0 or 0 in self.size:  # which interpolate does not take
            return x.flatten(2).sum(-1).reshape(*x.shape[:2], *[1] * len(self.size)).expand(*x.shape[:2], *self.size)
        if x.is_cuda and self.mode != "nearest":
            return Interpolated.apply(x, self)
        return F.interpolate(x, size=tuple(self.size), mode=self.mode, align_corners=align_corners)

    def shaped(self) -> Tensor:
        """What has the type, device and shape of the upsampled logits, without their memory: arguments are checked by it."""
        return self.logits.detach().new_empty(()).expand(*self.logits.shape[:2], *self.size)

    def inputs(self, target: Tensor, mask: bool = False) -> tuple[Tensor, Tensor]:
        """Logits and target for an operator, their pixels in order. The labels of a mask may have a channel of 1."""
        spatial = len(self.size)
        if mask:
            target = target.reshape(target.size(0), *self.size)
        # The CUDA kernels read neighbours in a row at one address; those of Triton take any strides.
        x = {"cuda": self.logits.contiguous, "cpu": lambda: in_order(self.logits, 2)}.get(self.kernels, lambda: self.logits)()
        target = in_order(target, target.dim() - spatial)
        # Operators take images and volumes; a row is an image of one.
        return (x.unsqueeze(2), target.unsqueeze(-2)) if spatial == 1 else (x, target)

    def fits_kernels(self, most_classes: float = math.inf) -> bool:
        """Whether kernels of a GPU blend these: those of CUDA as is_low in csrc/cuda/upsample.cuh."""
        low, cuda = self.logits.shape[2:], self.kernels == "cuda"
        return (
            len(low) == 2
            and self.mode != "nearest"
            and self.logits.size(1) <= most_classes
            and not (cuda and self.logits.dtype == torch.float64)
            and all((1 < a <= b if cuda else a > 0) and a * b < 1 << 30 for a, b in zip(low, self.size, strict=True))
            and 0 < math.prod(self.size) < 1 << 31
            and self.logits.numel() > 0
        )


class Interpolated(torch.autograd.Function):
    """F.interpolate of a linear mode with a backward pass of gathers, whose bits are the same in every run: that of PyTorch on
    a GPU adds with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: LowLogits) -> Tensor:
        ctx.low = low
        return F.interpolate(x, size=tuple(low.size), mode=low.mode, align_corners=low.align_corners)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for axis in reversed(range(2, grad.dim())):  # the last, along rows, makes what is left to sum smaller at once
            grad = adjoint_of_axis(grad, axis, ctx.low.logits.size(axis), ctx.low.align_corners)
        return grad, None


def adjoint_of_axis(grad: Tensor, axis: int, low: int, align_corners: bool) -> Tensor:
    """The transpose of linear interpolation along ``axis`` from ``low`` pixels (csrc/math/upsample.h), in any order of pixels
    that each sums by itself: its k-th contributions of all pixels at once, for every k."""
    full = grad.size(axis)
    if low == 1:
        return grad.sum(axis, keepdim=True)
    # Pixel i lies at numerator / denominator, between the first of a pair and the second.
    i = torch.arange(full, device=grad.device)
    if align_corners:
        numerator, denominator = i * (low - 1), max(full - 1, 1)
        longest = (full - 1) // (low - 1) + 1  # how many pixels have the same first, at most
    else:
        numerator, denominator = ((2 * i + 1) * low - full).clamp(min=0), 2 * full
        longest = 3 * full // (2 * low) + 1 if low > 2 else full  # the outer pairs have those outside too
    first = torch.div(numerator, denominator, rounding_mode="floor").clamp(max=low - 2)
    second_weight = ((numerator - first * denominator).to(torch.float64) / denominator).clamp(max=1)
    starts = torch.searchsorted(first, torch.arange(low, device=grad.device))
    ends = torch.searchsorted(first, torch.arange(low, device=grad.device), right=True)
    shape = [-1 if d == axis else 1 for d in range(grad.dim())]
    result = grad.new_zeros([low + 1 if d == axis else n for d, n in enumerate(grad.shape)])
    for k in range(longest):
        at = (starts + k).clamp(max=full - 1)
        has = starts + k < ends
        values = grad.index_select(axis, at)
        to_second = torch.where(has, second_weight[at], 0)
        to_first = torch.where(has, 1 - second_weight[at], 0)
        result.narrow(axis, 0, low).add_(values * to_first.to(grad.dtype).reshape(shape))
        result.narrow(axis, 1, low).add_(values * to_second.to(grad.dtype).reshape(shape))
    return result.narrow(axis, 0, low)


def in_order(t: Tensor, first: int) -> Tensor:
    """``t`` with one step from each of its pixels, the dimensions from ``first`` on, to the next."""
    step = inside = 1
    for size, stride in zip(reversed(t.shape[first:]), reversed(t.stride()[first:]), strict=True):
        if size == 1:
            continue
        step = stride if inside == 1 else step
        if stride != step * inside:
            return t.contiguous()
        inside *= size
    return t


Function = TypeVar("Function", bound=Callable[..., Any])


def as_low(upsample: object) -> LowLogits | None:
    """What `option` has put in the place of the option."""
    return upsample if isinstance(upsample, LowLogits) else None


def option(
    *, loss: str, fused: Callable[[LowLogits, Tensor, dict], bool], mask: Callable[[dict], bool]
) -> Callable[[Function], Function]:
    """Gives a loss function the options ``upsample`` and ``align_corners``.

    The function itself gets a LowLogits as its ``upsample`` where `fused(low, target, options)` says that its kernels take it,
    with LowLogits.shaped() as its logits. `loss`: of _arguments.LOSSES; `mask(options)`: whether logits
    may be those of a binary mask, without a channel.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_upsample(
            logits: Tensor, target: Tensor, *, upsample: str | None = None, align_corners: bool = False, **options: Any
        ) -> Any:
            if upsample is None and align_corners is False:
                return function(logits, target, **options)
            backend = arguments.choose_backend(options.get("backend", "auto"), logits.device, loss)
            low = _checked(logits, target, upsample, align_corners, mask(options), kernels_of(backend, logits))
            if low.kernels != "reference" and len(low.size) <= 3 and fused(low, target, options):
                return function(low.shaped(), target, upsample=low, **options)
            found = function(low.interpolated(), target, **options)
            dtype = arguments.loss_dtype(logits)
            return (found[0].to(dtype), *found[1:]) if isinstance(found, tuple) else found.to(dtype)

        return with_upsample  # type: ignore[return-value]

    return decorate


def _checked(logits: Tensor, target: Tensor, upsample: str | None, align_corners: bool, mask: bool, kernels: str) -> LowLogits:
    arguments.check_flag("align_corners", align_corners)
    if upsample is None:
        raise ValueError("align_corners is for upsample='bilinear' or 'trilinear', got align_corners=True without upsample")
    arguments.check_choice("upsample", upsample, tuple(MODES))
    if align_corners and upsample == "nearest":
        raise ValueError("align_corners is for upsample='bilinear' or 'trilinear', got align_corners=True with 'nearest'")
    arguments.check_logits(logits, 2, "[N, C, *]")
    arguments.check_target(target, logits)
    shapes = f"got logits {list(logits.shape)} and target {list(target.shape)}"
    x, spatial = logits, MODES[upsample]
    if mask and x.dim() == (3 if spatial is None else spatial + 1):
        x = x[:, None]
    spatial = x.dim() - 2 if spatial is None else spatial
    if x.dim() != spatial + 2 or spatial < 1 or target.dim() not in (spatial + 1, spatial + 2):
        low, full = {2: ("h, w", "H, W"), 3: ("d, h, w", "D, H, W")}.get(spatial, ("*", "*"))
        raise ValueError(
            f"upsample={upsample!r} is for logits [N, C, {low}] and a target [N, {full}] or [N, C, {full}], {shapes}"
        )
    if target.size(0) != x.size(0):
        raise ValueError(f"target must have as many images as logits with upsample={upsample!r}, {shapes}")
    if target.dim() == x.dim() and target.size(1) != x.size(1):
        raise ValueError(f"target must have the channels of logits, or none, with upsample={upsample!r}, {shapes}")
    size = target.shape[target.dim() - spatial :]
    if 0 in x.shape[2:] and 0 not in size:
        raise ValueError(f"logits must have at least one pixel with upsample={upsample!r}, {shapes}")
    return LowLogits(x, size, upsample, align_corners, kernels)
