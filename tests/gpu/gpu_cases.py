"""What the tests of this folder have in common.

Cases are told apart by words in their names: the losses (focal, lovasz, region, compound), the backends (native, triton), the
methods (exact, histogram). `make gpu` runs everything without conftest.py, which needs packages that a machine with a GPU need
not have; and the tests that have past_2_31 or sanitizer in their names by themselves.
"""

from __future__ import annotations

import functools

import budget
import pytest
import torch
from grid import DTYPES, METHODS, SHAPES, labels, logits
from torch import Tensor

from veerloss import (
    compound_loss,
    dice_loss,
    jaccard_loss,
    lovasz_hinge_loss,
    lovasz_softmax_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from veerloss._arguments import missing_reason

#: Of every file here.
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu")]

SMALL = (2, 3, 37, 41)
LARGE = (2, 3, 400, 500)  # "histogram" places its bins by a sample
over_sizes = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])

#: All types on every shape would have Triton compile for longer than the tests take: 16-bit and float64 on every third shape.
TRITON_GRID = [(s, torch.float32) for s in SHAPES] + [(s, d) for s in SHAPES[::3] for d in DTYPES if d != torch.float32]


# ---- backends: one that is missing is a skip with its reason; test_native_is_built fails where it should be there


def of_backend(backend: str, loss: str, *values):
    """pytest.param(*values), which `loss`, as choose_backend knows it, runs on a backend."""
    reason = missing_reason(backend, torch.device("cuda"), loss)
    return pytest.param(*values, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


BACKENDS = ("native", "triton")
LOVASZ = [("native", method) for method in METHODS] + [("triton", "exact")]
over_focal_backends = pytest.mark.parametrize("backend", [of_backend(b, "softmax focal", b) for b in BACKENDS])
over_lovasz = pytest.mark.parametrize(("backend", "method"), [of_backend(b, "lovasz", b, m) for b, m in LOVASZ])
over_histogram_backends = pytest.mark.parametrize("backend", [of_backend("native", "lovasz histogram", "native")])
over_region_backends = pytest.mark.parametrize("backend", [of_backend("native", "region", "native")])
over_compound_backends = pytest.mark.parametrize("backend", [of_backend("native", "compound", "native")])


# ---- one function (logits [N, C, *], labels [N, *]) for each loss, backend and method


def sigmoid_dense(x: Tensor, y: Tensor, **options) -> Tensor:
    classes = torch.arange(x.size(1), device=x.device).reshape(-1, *[1] * (x.dim() - 2))
    return sigmoid_focal_loss(x, y[:, None] == classes, alpha=0.25, **options)


def hinge(x: Tensor, y: Tensor, **options) -> Tensor:
    return lovasz_hinge_loss(x[:, 0], y.clamp(max=1), **options)


CASES = {}
for _backend in BACKENDS:
    CASES[f"focal-sigmoid-dense-{_backend}"] = functools.partial(sigmoid_dense, backend=_backend)
    CASES[f"focal-sigmoid-index-{_backend}"] = functools.partial(sigmoid_focal_loss, alpha=0.25, backend=_backend)
    CASES[f"focal-softmax-{_backend}"] = functools.partial(softmax_focal_loss, backend=_backend)
    CASES[f"focal-softmax-smoothed-{_backend}"] = functools.partial(softmax_focal_loss, label_smoothing=0.1, backend=_backend)
for _backend, _method in LOVASZ:
    for _name, _loss in (("softmax", lovasz_softmax_loss), ("hinge", hinge)):
        CASES[f"lovasz-{_name}-{_backend}-{_method}"] = functools.partial(_loss, backend=_backend, method=_method)
CASES["region-dice-native"] = functools.partial(dice_loss, backend="native")
CASES["region-jaccard-squared-native"] = functools.partial(jaccard_loss, squared=True, backend="native")
TERMS = {"focal": 0.7, "lovasz": 1.0, "dice": 0.5}
CASES["compound-native-histogram"] = functools.partial(compound_loss, **TERMS, method="histogram", backend="native")
CASES["compound-native-exact"] = functools.partial(compound_loss, **TERMS, method="exact", backend="native")
CASES["compound-native-without"] = functools.partial(compound_loss, cross_entropy=1.0, dice=1.0, backend="native")


def loss_of(name: str) -> str:
    """What choose_backend calls the loss of a case or an operator."""
    if "compound" in name:
        return "compound"
    if "region" in name:
        return "region"
    return "lovasz" if "lovasz" in name else "softmax focal" if "softmax" in name else "sigmoid focal"


def over_cases(*words: str, but: str = "no such word"):
    """The cases that have all these words in their names, and not `but`."""
    found = [name for name in CASES if all(word in name for word in words) and but not in name]
    params = [of_backend(CASES[name].keywords["backend"], loss_of(name), name) for name in found]
    return pytest.mark.parametrize("case", params)


def inputs(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return logits(shape, dtype, seed=seed).cuda(), labels(shape, shape[1], seed=seed).cuda()


def evaluate(case: str, x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    return budget.evaluate(CASES[case], x, y, **options)


def out_of_range(case: str, value: int):
    """Logits, and a call of the loss with one such value in its target."""
    x, y = inputs(SMALL)
    x.requires_grad_()
    y[1, 20, 30] = value
    if "dense" in case:
        target = torch.ones_like(x, dtype=torch.long, requires_grad=False)
        target[1, 2, 20, 30] = value
        return x, lambda: sigmoid_focal_loss(x, target, backend=CASES[case].keywords["backend"])
    if "hinge" in case:
        y = torch.where(y == value, value, y.clamp(max=1))
        options = CASES[case].keywords
        return x, lambda: lovasz_hinge_loss(x[:, 0], y, **options)
    return x, lambda: CASES[case](x, y)


# ---- comparisons: truth is the reference on the CPU, so that a GPU is not judged by itself


def check(loss, x, *args, **options) -> None:
    """budget.check_loss with everything on the GPU but the reference, which gets copies on the CPU."""

    def run(value: Tensor, *rest, backend: str, **more) -> Tensor:
        if backend != "reference":
            return loss(value, *rest, backend=backend, **more)
        rest = [_on_cpu(v) for v in rest]
        return loss(value.cpu(), *rest, backend=backend, **{k: _on_cpu(v) for k, v in more.items()}).to(value.device)

    budget.check_loss(run, x, *args, **options)


def _on_cpu(value):
    return value.cpu() if isinstance(value, Tensor) else value


def assert_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], gradient: float = 1e-4) -> None:
    """Relative: of the loss 1e-5, of the gradient, in the L2 norm, `gradient`."""
    torch.testing.assert_close(actual[0].cpu(), expected[0].cpu(), rtol=1e-5, atol=1e-6)
    a, e = (g.double().cpu() for g in (actual[1], expected[1]))
    assert (a - e).norm() <= gradient * e.norm()


def assert_same(case: str, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same bits of the histogram method and of region losses; the others to rounding."""
    if "histogram" in case or "region" in case:
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert_near(actual, expected)
