"""Loss and gradient on a GPU against float64, and against the other kernels."""

import functools
import shutil

import pytest
import torch
from budget import SLACK
from gpu_cases import (
    LARGE,
    LOVASZ,
    SMALL,
    TERMS,
    TRITON_GRID,
    assert_near,
    check,
    evaluate,
    hinge,
    inputs,
    needs_gpu,
    of_backend,
    over_cases,
    over_compound_backends,
    over_focal_backends,
    over_lovasz,
    over_region_backends,
    over_sizes,
)
from grid import DTYPES, METHODS, SHAPES, labels, layouts, logits
from torch import Tensor

from benchmarks import suite
from veerloss import (
    compound_loss,
    dice_loss,
    lovasz_hinge_loss,
    lovasz_softmax_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
    tversky_loss,
)
from veerloss._extension import native_missing

pytestmark = needs_gpu

GRID = {"native": [(s, d) for s in SHAPES for d in DTYPES], "triton": TRITON_GRID}
LOVASZ_GRID = [(b, m, s, d) for b, m in LOVASZ for s, d in GRID[b]]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_native_is_built():
    assert native_missing["cuda"] is None


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"), [of_backend(b, "softmax focal", b, s, d) for b in GRID for s, d in GRID[b]], ids=str
)
def test_focal_softmax_grid(backend, shape, dtype):
    target = labels(shape, shape[1], ignore_index=-100).cuda()
    check(softmax_focal_loss, layouts(logits(shape, dtype).cuda()), target, backend=backend)


def dense_targets(shape) -> list[Tensor]:
    hard = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3))
    soft = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return [t.cuda() for t in (hard.bool(), hard.byte(), hard, hard.float(), soft, soft.bfloat16())]


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [of_backend(b, "sigmoid focal", b, s, d) for b in GRID for s, d in [*GRID[b], ((), torch.float32), ((5,), torch.float16)]],
    ids=str,
)
def test_focal_sigmoid_grid(backend, shape, dtype):
    """Every type of target on one shape; on the others soft targets and class indices."""
    found = dense_targets(shape)
    found = found if shape == SHAPES[3] else found[4:5]
    if len(shape) > 1 and shape[1] > 1:
        found.append(labels(shape, shape[1]).cuda())
    for target in found:
        check(sigmoid_focal_loss, layouts(logits(shape, dtype).cuda()), target, alpha=0.25, backend=backend)


over_reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
over_gammas = pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])


@over_focal_backends
@over_reductions
@over_gammas
def test_focal_softmax_options(gamma, reduction, backend):
    shape = (2, 5, 9, 7)
    x, target = logits(shape).cuda(), labels(shape, 5, ignore_index=255).cuda()
    per_class = torch.rand(5, generator=torch.Generator().manual_seed(2)).cuda()
    options = {"gamma": gamma, "reduction": reduction, "backend": backend}
    for alpha in (None, 0.3, per_class):
        for smoothing in (0.0, 0.1):
            check(softmax_focal_loss, x, target, alpha=alpha, label_smoothing=smoothing, ignore_index=255, **options)
            check(softmax_focal_loss, x, x.softmax(1), alpha=alpha, label_smoothing=smoothing, **options)


@over_focal_backends
@over_reductions
@over_gammas
def test_focal_sigmoid_options(gamma, reduction, backend):
    shape = (2, 5, 9, 7)
    x = logits(shape).cuda()
    per_class = torch.rand(5, generator=torch.Generator().manual_seed(2)).cuda()
    options = {"gamma": gamma, "reduction": reduction, "backend": backend}
    soft = dense_targets(shape)[4]
    per_element = torch.rand(shape, generator=torch.Generator().manual_seed(5)).cuda()
    for more in ({"alpha": per_class}, {"weight": per_class}, {"alpha": 0.9, "weight": per_element}, {"ignore_index": 1}):
        check(sigmoid_focal_loss, x, soft, **more, **options)
        check(sigmoid_focal_loss, x, labels(shape, 5).cuda(), **more, **options)


@over_focal_backends
def test_focal_normalizer(backend):
    shape = (2, 5, 9, 7)
    x, target = logits(shape).cuda(), labels(shape, 5).cuda()
    for normalizer in (7, torch.tensor(7.0, device="cuda")):
        for loss in (softmax_focal_loss, sigmoid_focal_loss):
            check(loss, x, target, normalizer=normalizer, backend=backend)


def chosen_layouts(backend: str, x: Tensor) -> dict[str, Tensor]:
    """All of them, but of Triton on two shapes only: each compiles anew."""
    return layouts(x) if backend == "native" or x.shape in (SHAPES[3], SHAPES[5]) else {"contiguous": x}


@over_lovasz
@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_absent_classes_keep_their_gradient(per_image, backend, method):
    """Their whole weight is on the largest error, which the backward pass finds only if it computes the very same one."""
    target = labels((2, 19, 4096), 9)
    x = logits((2, 19, 4096))
    common = {"classes": "all", "per_image": per_image, "method": method}
    actual, expected = (
        torch.autograd.grad(lovasz_softmax_loss(v, y, backend=b, **common), v)[0].cpu()
        for v, y, b in (
            (x.cuda().requires_grad_(), target.cuda(), backend),
            (x.clone().requires_grad_(), target, "reference"),
        )
    )
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("backend", "method", "shape", "dtype"), [of_backend(point[0], "lovasz", *point) for point in LOVASZ_GRID], ids=str
)
def test_lovasz_softmax_grid(backend, method, shape, dtype):
    target = labels(shape, shape[1], ignore_index=255).cuda()
    common = {"backend": backend, "method": method, "slack": SLACK[method], "ignore_index": 255}
    for options in ({}, {"classes": "all", "per_image": True}):
        check(lovasz_softmax_loss, chosen_layouts(backend, logits(shape, dtype).cuda()), target, **common, **options)


@over_lovasz
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 17), (2, 31, 33), (70, 2, 2)], ids=str)
def test_lovasz_hinge_grid(shape, dtype, backend, method):
    target = labels((shape[0], 2, *shape[1:]), 2, ignore_index=255).cuda()
    x = layouts(logits(shape, dtype).cuda())
    x = {name: x[name] for name in ("contiguous", "every other pixel")}
    for per_image in (True, False):
        common = {"backend": backend, "method": method, "slack": SLACK[method]}
        check(lovasz_hinge_loss, x, target, per_image=per_image, ignore_index=255, **common)


@over_lovasz
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lovasz_probabilities(dtype, backend, method):
    p = logits((2, 5, 31, 33)).softmax(1).to(dtype).cuda()
    common = {"backend": backend, "method": method, "slack": SLACK[method]}
    check(lovasz_softmax_loss, layouts(p), labels(p.shape, 5).cuda(), from_logits=False, **common)


@over_lovasz
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("classes", ["present", "all", (4, 0, 3)], ids=str)
def test_lovasz_options(classes, reduction, backend, method):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]).cuda()
    common = {"backend": backend, "method": method, "slack": SLACK[method], "reduction": reduction, "ignore_index": -1}
    for per_image in (False, True):
        for class_weight in (None, weight):
            check(
                lovasz_softmax_loss, logits(shape).cuda(), target.cuda(), classes=classes, per_image=per_image,
                class_weight=class_weight, **common,
            )  # fmt: skip


@functools.lru_cache(maxsize=2)
def suite_inputs(name: str, pixels: int) -> tuple[Tensor, Tensor, float, Tensor]:
    """Logits [1, C, P] and target of a case, and its loss and gradient in float64."""
    classes, make = suite.CASES[name]
    ties = name.startswith("ties")
    x, target = make(pixels, torch.Generator().manual_seed(0))
    at = torch.device("cpu" if ties else "cuda")  # the truth of ties is written for the CPU
    x, target = x.to(at), target.to(at)
    errors, foreground = suite.errors_of(x.double(), target)
    weights = torch.zeros_like(errors)
    present = [c for c in range(classes) if foreground[c].any()]
    for c in present:
        weights[c] = suite.exact_weights(errors[c], foreground[c], ties)
    loss = (weights * errors).sum().item() / len(present)
    gradient = suite.gradient_of(weights, x.double(), foreground, len(present))
    return x.cuda(), target.cuda(), loss, gradient.cuda()


@over_lovasz
@pytest.mark.parametrize("pixels", [10**5, 10**6])
@pytest.mark.parametrize("name", suite.CASES)
def test_lovasz_accuracy_suite(name, pixels, backend, method):
    classes, _ = suite.CASES[name]
    if pixels * classes > suite.MOST_LOGITS or (pixels == 10**6 and name.startswith("ties")):
        pytest.skip("its truth takes too long")
    x, target, truth, exact = suite_inputs(name, pixels)
    value = x.clone().requires_grad_()
    if classes == 1:
        loss = lovasz_hinge_loss(value[:, 0], target, backend=backend, method=method)
    else:
        loss = lovasz_softmax_loss(value, target, backend=backend, method=method)
    (gradient,) = torch.autograd.grad(loss, value)
    assert abs(loss.item() - truth) <= suite.LOSS_BAR * max(truth, 1.0)
    assert (gradient[0].double() - exact).norm() <= suite.GRADIENT_BAR * exact.norm()


@over_region_backends
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_region_grid(shape, dtype, activation, backend):
    """Class indices; of some shapes every type of values."""
    x = logits(shape, torch.float32)
    x = (x.softmax(1) if activation == "none" else x).to(dtype).cuda()
    target = labels(shape, 2 if shape[1] == 1 and activation != "softmax" else shape[1], ignore_index=255).cuda()
    options = {"activation": activation, "backend": backend}
    check(dice_loss, layouts(x), target, ignore_index=255, **options)
    check(tversky_loss, x, target, alpha=0.3, beta=0.7, per_image=True, ignore_index=255, reduction="none", **options)
    for values in dense_targets(shape) if shape in SHAPES[3:6] else []:
        for squared in (False, True):
            check(dice_loss, layouts(x), values, squared=squared, **options)


@over_compound_backends
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compound_grid(shape, dtype, method, backend):
    target = labels(shape, shape[1], ignore_index=255).cuda()
    common = {"ignore_index": 255, "method": method, "slack": SLACK[method], "backend": backend}
    check(compound_loss, layouts(logits(shape, dtype).cuda()), target, **TERMS, **common)
    per_class = torch.linspace(0.5, 1.5, shape[1]).cuda()
    check(compound_loss, logits(shape, dtype).cuda(), target, cross_entropy=1.0, lovasz=0.5, alpha=per_class, **common)


@over_cases()
@over_sizes
def test_agrees_with_the_cpu(case, shape):
    if native_missing["cpu"] is not None:
        pytest.skip(native_missing["cpu"])
    x, y = inputs(shape)
    expected = evaluate(case, x.cpu(), y.cpu(), backend="native")
    assert_near(evaluate(case, x, y), expected, 1e-3 if "histogram" in case else 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_lovasz_reference_runs_on_a_gpu(method):
    x, y = inputs(SMALL)
    for loss in (lovasz_softmax_loss, hinge):
        found = loss(x, y, method=method, backend="reference")
        torch.testing.assert_close(found.cpu(), loss(x.cpu(), y.cpu(), method=method, backend="reference"))


def test_focal_reference_runs_on_a_gpu():
    x, y = inputs(SMALL)
    for loss in (softmax_focal_loss, sigmoid_focal_loss):
        torch.testing.assert_close(loss(x, y, backend="reference").cpu(), loss(x.cpu(), y.cpu(), backend="reference"))


@over_lovasz
def test_lovasz_certificate_is_that_of_the_cpu(backend, method):
    x, y = inputs(LARGE)
    for per_image in (False, True):
        _, found = lovasz_softmax_loss(x, y, per_image=per_image, method=method, backend=backend, return_certificate=True)
        _, expected = lovasz_softmax_loss(x.cpu(), y.cpu(), per_image=per_image, method=method, return_certificate=True)
        torch.testing.assert_close(found.cpu(), expected, rtol=0.25, atol=0)
