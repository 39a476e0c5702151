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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _arguments as arguments
from . import ops
from ._layout import Interpolation

#: By mode, the number of spatial dimensions; None for any.
MODES = {"bilinear": 2, "trilinear": 3, "nearest": None}


@dataclass(frozen=True)
class LowLogits:
    """Logits [N, C, \\*] of low resolution, and the size to which they are upsampled."""

    logits: Tensor
    size: torch.Size
    mode: str
    align_corners: bool

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
        return F.interpolate(x, size=tuple(self.size), mode=self.mode, align_corners=align_corners)

    def shaped(self) -> Tensor:
        """What has the type, device and shape of the upsampled logits, without their memory: arguments are checked by it."""
        return self.logits.detach().new_empty(()).expand(*self.logits.shape[:2], *self.size)

    def inputs(self, target: Tensor, mask: bool = False) -> tuple[Tensor, Tensor]:
        """Logits and target for an operator, their pixels in order. The labels of a mask may have a channel of 1."""
        spatial = len(self.size)
        if mask:
            target = target.reshape(target.size(0), *self.size)
        # The CUDA kernels read neighbours in a row at one address.
        x = self.logits.contiguous() if by_cuda_kernels(self.logits) else _in_order(self.logits, 2)
        return x, _in_order(target, target.dim() - spatial)

    def fits_gpu(self, most_classes: int) -> bool:
        """Whether the CUDA kernels blend these: csrc/cuda/upsample.cuh, is_low."""
        low = self.logits.shape[2:]
        return (
            len(low) == 2
            and self.mode != "nearest"
            and self.logits.dtype != torch.float64
            and self.logits.size(1) <= most_classes
            and all(1 < a <= b and a * b < 1 << 30 for a, b in zip(low, self.size, strict=True))
            and math.prod(self.size) < 1 << 31
        )


def _in_order(t: Tensor, first: int) -> Tensor:
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


def by_cuda_kernels(logits: Tensor) -> bool:
    """Whether "native" is the kernels of csrc/cuda: on a GPU, or emulated."""
    return logits.is_cuda or ops.NAMESPACES["native"] != "veerloss"


def option(*, loss: str, fused: Callable[[LowLogits, Tensor, bool, dict], bool], mask: Callable[[dict], bool]) -> Callable:
    """Gives a loss function the options ``upsample`` and ``align_corners``.

    The function itself gets a LowLogits as its ``upsample`` where `fused(low, target, by_cuda_kernels, options)` says that the
    native kernels take it, with LowLogits.shaped() as its logits. `loss`: of _arguments.LOSSES; `mask(options)`: whether logits
    may be those of a binary mask, without a channel.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def with_upsample(
            logits: Tensor, target: Tensor, *, upsample: str | None = None, align_corners: bool = False, **options: Any
        ) -> Any:
            if upsample is None and align_corners is False:
                return function(logits, target, **options)
            low = _checked(logits, target, upsample, align_corners, mask(options))
            backend = options.get("backend", "auto")
            native = backend in ("auto", "native") and arguments.missing_reason("native", logits.device, loss) is None
            if native and len(low.size) > 1 and fused(low, target, by_cuda_kernels(logits), options):
                return function(low.shaped(), target, upsample=low, **options)
            found = function(low.interpolated(), target, **options)
            dtype = arguments.loss_dtype(logits)
            return (found[0].to(dtype), *found[1:]) if isinstance(found, tuple) else found.to(dtype)

        return with_upsample

    return decorate


def _checked(logits: Tensor, target: Tensor, upsample: str | None, align_corners: bool, mask: bool) -> LowLogits:
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
    return LowLogits(x, size, upsample, align_corners)
