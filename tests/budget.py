"""The accuracy policy, in one place.

Truth is float64. A kernel's error may be twice that of the reference run in the input's own type, plus one unit in the last
place of that type. Errors are L2 norms over the whole tensor. For float64 inputs kernel and reference both round, and either
may be nearer to the exact value: they agree to 32 units (12 apart at most when measured, the reference being the one off).
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
UNITS_FLOAT64 = 32


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


def check_loss(function, logits: Tensor, *args, backend: str = "native", slack: float = 0.0, **options) -> None:
    """Loss and gradient of ``function`` against float64, and that the gradient lies in memory as the logits do.

    ``slack``: what rounding of the inputs may move the loss by, besides, where the loss is not continuous in them.
    """
    results = {}
    for name, run, x in (
        ("actual", backend, logits),
        ("reference", "reference", logits),
        ("truth", "reference", logits.double()),
    ):
        x = x.detach().requires_grad_()  # a leaf with the same strides, which a clone would not have
        loss = function(x, *args, backend=run, **options)
        # Weights that differ from element to element, so that a gradient in the wrong place shows.
        ramp = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss)
        (gradient,) = torch.autograd.grad(loss, x, ramp)
        results[name] = loss.detach(), gradient
    loss, gradient = results["actual"]
    assert _strides(gradient) == _strides(torch.empty_like(logits)), "the gradient is laid out in another way than the logits"
    assert loss.dtype == logits.dtype and gradient.dtype == logits.dtype
    assert_within_budget(loss, results["reference"][0], results["truth"][0], "loss", slack)
    assert_within_budget(gradient, results["reference"][1], results["truth"][1], "gradient")


def _strides(t: Tensor) -> list[int]:
    """Of the dimensions in which there is a step to take."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
