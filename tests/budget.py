"""The accuracy policy, in one place.

Truth is float64. A kernel's error may be twice that of the reference run in the input's own type, plus one unit in the last
place of that type. Errors are L2 norms over the whole tensor. For float64 inputs kernel and reference both round, and either
may be nearer to the exact value: they agree to 32 units (12 apart at most when measured, the reference being the one off).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FACTOR = 2.0
UNITS_FLOAT64 = 32

#: By method. A pixel whose coordinate is rounded across the edge of a bin moves the loss by its weight times a bin's width, no
#: more than the loss may be off. Its gradient moves by the step between the weights of two bins, by GRADIENT_SLACK times as
#: much at the most when measured, a thirtieth of what the gradient may be off.
SLACK = {"exact": 0.0, "histogram": 3e-6}
GRADIENT_SLACK = 10


def assert_within_budget(actual: Tensor, reference: Tensor, truth: Tensor, what: str, slack: float = 0.0) -> None:
    """``actual`` and ``reference`` were computed from the same inputs in one type, ``truth`` from them in float64."""
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert truth.dtype == torch.float64
    error = (actual.double() - truth).norm()
    units = UNITS_FLOAT64 if actual.dtype == torch.float64 else 1
    allowed = FACTOR * (reference.double() - truth).norm() + units * torch.finfo(actual.dtype).eps * truth.norm()
    # Below the smallest normal number of the type there are no digits to keep.
    allowed = allowed + torch.finfo(actual.dtype).tiny * max(truth.numel(), 1) ** 0.5
    allowed = allowed + slack * truth.norm()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (truth {truth.norm():.3e})"


def evaluate(function: Callable, logits: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient). The weights of the loss's elements differ, so that a gradient in the wrong place shows."""
    x = logits.detach().requires_grad_()  # a leaf with the same strides, which a clone would not have
    loss = function(x, *args, **options)
    # Made where the loss is: a copy from the host would make it wait for a GPU, and is nothing that a graph could capture.
    ramp = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=loss.device).reshape(loss.shape).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, x, ramp)[0]


def check_loss(
    function: Callable, logits: Tensor | Mapping[str, Tensor], *args, backend: str, slack: float = 0.0, **options
) -> None:
    """Loss and gradient of ``function`` against float64, and that the gradient lies in memory as the logits do.

    ``logits``: a tensor, or by name the same values in several layouts. ``slack``: what rounding of the inputs may move the
    loss by, besides, where the loss is not continuous in them.
    """
    layouts = logits if isinstance(logits, Mapping) else {"logits": logits}
    first = next(iter(layouts.values()))
    references, truths = (evaluate(function, x, *args, backend="reference", **options) for x in (first, first.double()))
    for layout, x in layouts.items():
        loss, gradient = evaluate(function, x, *args, backend=backend, **options)
        assert _strides(gradient) == _strides(torch.empty_like(x)), f"{layout}: the gradient is laid out in another way"
        assert loss.dtype == x.dtype and gradient.dtype == x.dtype
        assert_within_budget(loss, references[0], truths[0], f"{layout}: loss", slack)
        assert_within_budget(gradient, references[1], truths[1], f"{layout}: gradient", GRADIENT_SLACK * slack)


def _strides(t: Tensor) -> list[int]:
    """Of the dimensions in which there is a step to take."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
