"""What the parity tests share: the same loss and the same gradient from us and from an installed peer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# No deadline: the first call of a peer may import half of it. Derandomised: CI tells about the change, not about luck.
settings.register_profile("peers", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("peers")

seeds = st.integers(0, 2**16)
#: [N, C, *]; one class, no pixels, one pixel, volumes
shapes = st.sampled_from([(2, 3, 4, 5), (1, 2, 7), (3, 4), (2, 1, 6), (1, 5, 1, 1), (2, 3, 2, 3, 2)])
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.3])
alphas = st.sampled_from([0.0, 0.25, 0.7, 1.0])
reductions = st.sampled_from(["none", "mean", "sum"])


def logits_of(shape: tuple[int, ...], seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels_of(shape: tuple[int, ...], seed: int, ignore_index: int | None = None, classes: int | None = None) -> Tensor:
    """int64 [N, *]; some ignored if asked for."""
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, shape[1] if classes is None else classes, shape[:1] + shape[2:], generator=generator)
    if ignore_index is not None:
        labels.view(-1)[::3] = ignore_index
    return labels


def hard_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed + 2)).double()


def soft_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)


def run(loss: Callable, x: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the logits), with a gradient of its own for each element of the loss."""
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    return value.detach(), gradient


def agree(ours: Callable, peer: Callable, x: Tensor, *args, rtol: float = 1e-9, atol: float = 1e-12, **options) -> None:
    """Value and gradient of both are the same, and so are the type and shape of the loss."""
    actual, expected = run(ours, x, *args, **options), run(peer, x, *args, **options)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
