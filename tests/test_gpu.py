"""What only a GPU can show. `make gpu` runs this file in parts, told apart by words in the tests' names and ids: the losses
(focal, lovasz), the backends (native, triton), the methods (exact, histogram), past_2_31 and sanitizer. It needs no conftest.

Truth is the reference on the CPU, so that a GPU is not judged by itself.
"""

import functools
import math
import shutil

import pytest
import torch
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from torch import Tensor
from torch.library import opcheck

from benchmarks import suite
from veerloss import lovasz_hinge_loss, lovasz_softmax_loss, sigmoid_focal_loss, softmax_focal_loss
from veerloss._arguments import missing_reason
from veerloss._extension import native_missing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make gpu"),
]

BACKENDS, METHODS = ("native", "triton"), ("exact", "histogram")
LOVASZ = [(backend, method) for backend in BACKENDS for method in METHODS]
over_lovasz = pytest.mark.parametrize(("backend", "method"), LOVASZ)

#: All types on every shape would have Triton compile for longer than the tests take: 16-bit and float64 on every third shape.
TRITON_GRID = [(s, torch.float32) for s in SHAPES] + [(s, d) for s in SHAPES[::3] for d in DTYPES if d != torch.float32]
LOVASZ_GRID = [(b, m, s, d) for b, m in LOVASZ for s in SHAPES for d in DTYPES if b == "native" or (s, d) in TRITON_GRID]

#: Besides rounding: a pixel that changes its bin moves the loss by its weight times the width of a bin.
BIN = 1e-6
SMALL = (2, 3, 37, 41)
LARGE = (2, 3, 400, 500)  # "histogram" places its bins by a sample


@pytest.fixture(autouse=True)
def what_can_run(request):
    """A backend that is missing is a skip with its reason; test_native_is_built fails where it should be there."""
    for backend in BACKENDS:
        if backend in request.node.name and "built" not in request.node.name:
            loss = "lovasz" if "lovasz" in request.node.name else "focal"
            reason = missing_reason(backend, torch.device("cuda"), loss)
            if reason is not None:
                pytest.skip(reason)


def check(loss, x: Tensor, *args, **options) -> None:
    """check_loss with everything on the GPU but the reference, which gets copies on the CPU."""

    def run(value: Tensor, *rest, backend: str, **more) -> Tensor:
        if backend != "reference":
            return loss(value, *rest, backend=backend, **more)
        rest = [_on_cpu(v) for v in rest]
        return loss(value.cpu(), *rest, backend=backend, **{k: _on_cpu(v) for k, v in more.items()}).to(value.device)

    check_loss(run, x, *args, **options)


def _on_cpu(value):
    return value.cpu() if isinstance(value, Tensor) else value


def slack(method: str) -> float:
    return BIN if method == "histogram" else 0.0


# ---- one function (logits [N, C, *], labels [N, *]) for each loss, backend and method


def sigmoid_dense(x: Tensor, y: Tensor, **options) -> Tensor:
    classes = torch.arange(x.size(1), device=x.device).reshape(-1, *[1] * (x.dim() - 2))
    return sigmoid_focal_loss(x, y[:, None] == classes, alpha=0.25, **options)


def hinge(x: Tensor, y: Tensor, **options) -> Tensor:
    return lovasz_hinge_loss(x[:, 0], y.clamp(max=1), **options)


CASES = {
    "focal-sigmoid-dense-triton": functools.partial(sigmoid_dense, backend="triton"),
    "focal-sigmoid-index-triton": functools.partial(sigmoid_focal_loss, alpha=0.25, backend="triton"),
    "focal-softmax-triton": functools.partial(softmax_focal_loss, label_smoothing=0.1, backend="triton"),
}
for _backend, _method in LOVASZ:
    for _name, _loss in (("softmax", lovasz_softmax_loss), ("hinge", hinge)):
        CASES[f"lovasz-{_name}-{_backend}-{_method}"] = functools.partial(_loss, backend=_backend, method=_method)
over_cases = pytest.mark.parametrize("case", CASES)


def inputs(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return logits(shape, dtype, seed=seed).cuda(), labels(shape, shape[1], seed=seed).cuda()


def evaluate(case: str, x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    x = x.detach().requires_grad_()
    loss = CASES[case](x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def assert_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], gradient: float = 1e-4) -> None:
    """Relative: of the loss 1e-5, of the gradient, in the L2 norm, `gradient`."""
    torch.testing.assert_close(actual[0].cpu(), expected[0].cpu(), rtol=1e-5, atol=1e-6)
    a, e = (g.double().cpu() for g in (actual[1], expected[1]))
    assert (a - e).norm() <= gradient * e.norm()


# ---- against float64


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_native_is_built():
    assert native_missing["cuda"] is None


@pytest.mark.parametrize(("shape", "dtype"), TRITON_GRID, ids=str)
def test_focal_softmax_grid(shape, dtype):
    target = labels(shape, shape[1], ignore_index=-100).cuda()
    for x in layouts(logits(shape, dtype).cuda()).values():
        check(softmax_focal_loss, x, target, backend="triton")


def dense_targets(shape) -> list[Tensor]:
    hard = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3))
    soft = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    return [t.cuda() for t in (hard.bool(), hard.byte(), hard, hard.float(), soft, soft.bfloat16())]


@pytest.mark.parametrize(("shape", "dtype"), [*TRITON_GRID, ((), torch.float32), ((5,), torch.float16)], ids=str)
def test_focal_sigmoid_grid(shape, dtype):
    """Every type of target on one shape; on the others soft targets and class indices."""
    found = dense_targets(shape)
    found = found if shape == SHAPES[3] else found[4:5]
    if len(shape) > 1 and shape[1] > 1:
        found.append(labels(shape, shape[1]).cuda())
    for x in layouts(logits(shape, dtype).cuda()).values():
        for target in found:
            check(sigmoid_focal_loss, x, target, alpha=0.25, backend="triton")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_focal_options(gamma, reduction):
    shape = (2, 5, 9, 7)
    x, target = logits(shape).cuda(), labels(shape, 5, ignore_index=255).cuda()
    per_class = torch.rand(5, generator=torch.Generator().manual_seed(2)).cuda()
    options = {"gamma": gamma, "reduction": reduction, "backend": "triton"}
    for alpha in (None, 0.3, per_class):
        for smoothing in (0.0, 0.1):
            check(softmax_focal_loss, x, target, alpha=alpha, label_smoothing=smoothing, ignore_index=255, **options)
    soft = dense_targets(shape)[4]
    per_element = torch.rand(shape, generator=torch.Generator().manual_seed(5)).cuda()
    for more in ({"alpha": per_class}, {"weight": per_class}, {"alpha": 0.9, "weight": per_element}, {"ignore_index": 1}):
        check(sigmoid_focal_loss, x, soft, **more, **options)
        check(sigmoid_focal_loss, x, labels(shape, 5).cuda(), **more, **options)


def test_focal_normalizer():
    shape = (2, 5, 9, 7)
    x, target = logits(shape).cuda(), labels(shape, 5).cuda()
    for normalizer in (7, torch.tensor(7.0, device="cuda")):
        for loss in (softmax_focal_loss, sigmoid_focal_loss):
            check(loss, x, target, normalizer=normalizer, backend="triton")


def chosen_layouts(backend: str, x: Tensor) -> list[Tensor]:
    """All of them, but of Triton on two shapes only: each compiles anew."""
    found = list(layouts(x).values())
    return found if backend == "native" or x.shape in (SHAPES[3], SHAPES[5]) else found[:1]


@over_lovasz
@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_absent_classes_keep_their_gradient(per_image, backend, method):
    """Their whole weight is on the largest error, which the backward pass finds only if it computes the very same one."""
    target = labels((2, 19, 4096), 9)
    x = logits((2, 19, 4096))
    how = {"classes": "all", "per_image": per_image, "method": method}
    actual, expected = (
        torch.autograd.grad(lovasz_softmax_loss(v, y, backend=b, **how), v)[0].cpu()
        for v, y, b in (
            (x.cuda().requires_grad_(), target.cuda(), backend),
            (x.clone().requires_grad_(), target, "reference"),
        )
    )
    assert (actual - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(("backend", "method", "shape", "dtype"), LOVASZ_GRID, ids=str)
def test_lovasz_softmax_grid(backend, method, shape, dtype):
    target = labels(shape, shape[1], ignore_index=255).cuda()
    how = {"backend": backend, "method": method, "slack": slack(method), "ignore_index": 255}
    for x in chosen_layouts(backend, logits(shape, dtype).cuda()):
        for options in ({}, {"classes": "all", "per_image": True}):
            check(lovasz_softmax_loss, x, target, **how, **options)


@over_lovasz
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 17), (2, 31, 33), (70, 2, 2)], ids=str)
def test_lovasz_hinge_grid(shape, dtype, backend, method):
    target = labels((shape[0], 2, *shape[1:]), 2, ignore_index=255).cuda()
    wide = logits((*shape[:-1], 2 * shape[-1]), dtype).cuda()
    for x in (logits(shape, dtype).cuda(), wide[..., ::2]):
        for per_image in (True, False):
            how = {"backend": backend, "method": method, "slack": slack(method)}
            check(lovasz_hinge_loss, x, target, per_image=per_image, ignore_index=255, **how)


@over_lovasz
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lovasz_probabilities(dtype, backend, method):
    x = logits((2, 5, 31, 33)).softmax(1).to(dtype).cuda()
    for p in layouts(x).values():
        how = {"backend": backend, "method": method, "slack": slack(method)}
        check(lovasz_softmax_loss, p, labels(x.shape, 5).cuda(), from_logits=False, **how)


@over_lovasz
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("classes", ["present", "all", (4, 0, 3)], ids=str)
def test_lovasz_options(classes, reduction, backend, method):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]).cuda()
    how = {"backend": backend, "method": method, "slack": slack(method), "reduction": reduction, "ignore_index": -1}
    for per_image in (False, True):
        for class_weight in (None, weight):
            check(
                lovasz_softmax_loss, logits(shape).cuda(), target.cuda(), classes=classes, per_image=per_image,
                class_weight=class_weight, **how,
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


@over_cases
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
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


# ---- edges


@over_cases
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(case, bad):
    x, y = inputs(SMALL)
    x[1, 0, 5, 7] = bad
    assert evaluate(case, x, y)[0].isnan()


@over_cases
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(case, reduction):
    x, y = inputs(SMALL)
    x[0, 0, 0, 0] = math.nan  # what is ignored may hold anything
    x.requires_grad_()
    # Dense targets and those of the hinge are made of labels, and 1 stands for each of those here.
    ignored, value = (1, 1) if "hinge" in case else (255, 255)
    if "dense" in case:
        target = torch.full_like(x, 255, requires_grad=False)
        loss = sigmoid_focal_loss(x, target, ignore_index=255, reduction=reduction, backend="triton")
    else:
        loss = CASES[case](x, torch.full_like(y, value), ignore_index=ignored, reduction=reduction)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


@over_cases
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_no_pixels(case, shape):
    x = torch.zeros(shape, device="cuda")
    loss, gradient = evaluate(case, x, torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device="cuda"))
    assert loss == 0 and gradient.shape == x.shape


def out_of_range(case: str, value: int):
    """A call of the loss with one such value in its target."""
    x, y = inputs(SMALL)
    x.requires_grad_()
    y[1, 20, 30] = value
    if "dense" in case:
        target = torch.ones_like(x, dtype=torch.long, requires_grad=False)
        target[1, 2, 20, 30] = value
        return x, lambda: sigmoid_focal_loss(x, target, backend="triton")
    if "hinge" in case:
        y = torch.where(y == value, value, y.clamp(max=1))
        options = CASES[case].keywords
        return x, lambda: lovasz_hinge_loss(x[:, 0], y, **options)
    return x, lambda: CASES[case](x, y)


@over_cases
@pytest.mark.parametrize("value", [-1, 3, 255, 2**40, -(2**40)])
def test_target_out_of_range(case, value, monkeypatch):
    """NaN, without a word, a synchronisation or a wild access; with VEERLOSS_CHECK=1 an error at the call."""
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    x, call = out_of_range(case, value)
    loss = call()
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.cuda.synchronize()
    assert gradient.shape == x.shape
    monkeypatch.setenv("VEERLOSS_CHECK", "1")
    with pytest.raises(IndexError, match=f"target holds {value}"):
        call()


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_focal_dense_target_outside_0_1(value, monkeypatch):
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    x = logits(SMALL).cuda()
    target = torch.ones_like(x)
    target[1, 2, 20, 30] = value
    assert sigmoid_focal_loss(x, target, backend="triton").isnan()
    monkeypatch.setenv("VEERLOSS_CHECK", "1")
    with pytest.raises(IndexError, match=f"target holds {value}"):
        sigmoid_focal_loss(x, target, backend="triton")


@over_cases
def test_autocast_gives_float32(case):
    x, y = inputs(SMALL, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradient = evaluate(case, x, y)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16


# ---- streams, graphs, compilation


@over_cases
def test_same_bits_every_time(case):
    """Of the histogram method; the others to rounding."""
    x, y = inputs(LARGE)
    expected = evaluate(case, x, y)
    for _ in range(3):
        found = evaluate(case, x, y)
        if "histogram" in case:
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert_near(found, expected)


@over_cases
def test_another_stream(case):
    """Logits that come late on it, so that a kernel on any other stream would read NaN."""
    x, y = inputs(LARGE)
    expected = evaluate(case, x, y)
    late = torch.full_like(x, math.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = evaluate(case, late, y)
    stream.synchronize()
    if "histogram" in case:
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert_near(found, expected)


@over_cases
def test_graph_capture_and_replay(case):
    x, y = inputs(LARGE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            evaluate(case, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(case, x, y)
    for seed in (5, 6):
        new = inputs(LARGE, seed)
        expected = evaluate(case, *new)
        x.copy_(new[0])
        y.copy_(new[1])
        graph.replay()
        torch.cuda.synchronize()
        assert_near(found, expected)


@over_cases
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_no_synchronisation(case, shape):
    x, y = inputs(shape)
    evaluate(case, x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(case, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@over_cases
def test_compile_whole_graph(case):
    torch._dynamo.reset()
    x, y = inputs(SMALL)
    x.requires_grad_()
    results = []
    function = lambda v: CASES[case](2 * v, y)  # noqa: E731
    for run in (function, torch.compile(function, fullgraph=True, dynamic=False)):
        loss = run(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    assert_near(results[1], results[0])


def samples() -> dict[str, tuple]:
    """Arguments of every forward operator."""
    x, y = (t.cuda() for t in (logits((2, 3, 10)), labels((2, 3, 10), 3)))
    some, weight = torch.tensor([True, False, True]).cuda(), torch.tensor([0.2, 0.3, 0.5]).cuda()
    return {
        "sigmoid_focal": (x, y, None, weight, 0.5, torch.rand_like(x), 1, 0, 1.0, None, True),
        "softmax_focal": (x, y, 1.0, weight, 0.5, 0.1, None, 0, 1.0, None, True),
        "lovasz_softmax": (x, y, some, False, True, weight, 1, True, 0, True, False),
        "lovasz_hinge": (x[:, :1], y.clamp(max=1), True, None, 1, True, False),
        "lovasz_histogram": (x, y, some, False, True, weight, 1, 0, 0, True),
    }


OPERATORS = [
    ("veerloss_triton", "sigmoid_focal"),
    ("veerloss_triton", "softmax_focal"),
    *(
        (space, name)
        for space in ("veerloss", "veerloss_triton")
        for name in ("lovasz_softmax", "lovasz_hinge", "lovasz_histogram")
    ),
]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize(("space", "name"), OPERATORS)
def test_opcheck(space, name, strided):
    if space == "veerloss" and native_missing["cuda"] is not None:
        pytest.skip(native_missing["cuda"])
    x, *rest = samples()[name]
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(getattr(getattr(torch.ops, space), f"{name}_forward").default, (x.detach().requires_grad_(), *rest))


# ---- past 2^31 elements

IMAGES, CLASSES, PIXELS = 9, 4, 60_000_001
assert IMAGES * CLASSES * PIXELS > 2**31
SHIFT = 1009


@pytest.fixture
def image(request):
    """One image of bfloat16 logits [1, 4, P] and its target, uint8; skips where the GPU has too little memory."""
    torch.cuda.empty_cache()
    node = request.node.name
    gigabytes = 30 if "exact" not in node else 75 if "native" in node else 110
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free memory on the GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, CLASSES, PIXELS, generator=generator, device="cuda", dtype=torch.bfloat16) * 2
    yield x, torch.randint(0, CLASSES, (1, PIXELS), generator=generator, device="cuda", dtype=torch.uint8)
    torch.cuda.empty_cache()


def images(x: Tensor) -> Tensor:
    """A batch of copies of one image, copy k with its pixels moved on by k * SHIFT."""
    batch = x.new_empty(IMAGES, *x.shape[1:])
    for k in range(IMAGES):
        batch[k] = x[0].roll(k * SHIFT, -1)
    return batch


@pytest.mark.parametrize("case", [name for name in CASES if "focal" in name and "dense" not in name])
def test_past_2_31_elements(case, image):
    """Every pixel's gradient is the one that it has in a batch of its image alone."""
    x, y = image
    _, expected = evaluate(case, x, y, reduction="sum")
    loss, gradient = evaluate(case, images(x), images(y), reduction="sum")
    assert loss.isfinite()
    for k in range(IMAGES):
        assert torch.equal(gradient[k].roll(-k * SHIFT, -1), expected[0])


def test_past_2_31_elements_focal_dense(image):
    x = image[0]
    target = (x > 1).byte()
    results = []
    for value, t in ((x, target), (images(x), images(target))):
        value = value.requires_grad_()
        loss = sigmoid_focal_loss(value, t, reduction="sum", backend="triton")
        results.append(torch.autograd.grad(loss, value)[0])
    for k in range(IMAGES):
        assert torch.equal(results[1][k].roll(-k * SHIFT, -1), results[0][0])


@pytest.mark.parametrize("case", [name for name in CASES if "lovasz-softmax" in name])
def test_past_2_31_elements_of_lovasz(case, image):
    """The loss of copies of an image is that of the image; the gradients of the copies of a pixel add up to its own."""
    x, y = image
    with torch.autocast("cuda", torch.bfloat16):  # for a float32 loss
        loss, expected = evaluate(case, x, y)
        of_copies, gradient = evaluate(case, images(x), images(y))
    torch.testing.assert_close(of_copies, loss, rtol=1e-5, atol=0)
    total = torch.zeros_like(expected[0], dtype=torch.float32)
    for k in range(IMAGES):
        total += gradient[k].roll(-k * SHIFT, -1)
    expected = expected[0].float()
    assert (total - expected).norm() <= 1e-2 * expected.norm()  # bfloat16 gradients


# ---- for compute-sanitizer: everything once, and small


@over_cases
def test_sanitizer(case):
    for shape, dtype in (((2, 3, 37), torch.float32), ((1, 5, 1030), torch.bfloat16), ((70, 2, 2, 2), torch.float32)):
        x, y = logits(shape, dtype), labels(shape, shape[1], ignore_index=255 if "focal-softmax" in case else None)
        options = {"ignore_index": 255} if "focal-softmax" in case else {}
        for value in layouts(x.cuda()).values():
            loss, gradient = evaluate(case, value, y.cuda(), **options)
            assert loss.cpu().isfinite() and gradient.cpu().isfinite().all()


@over_cases
def test_sanitizer_of_a_target_out_of_range(case, monkeypatch):
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    for value in (-1, 255, 2**40):
        x, call = out_of_range(case, value)
        loss = call()
        torch.autograd.grad(loss, x)
        assert loss.cpu().isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sanitizer_of_lovasz_bins_from_a_sample(backend):
    """One class is rare: its bins are placed again."""
    x, y = logits((1, 2, 300_000), scale=0.25), torch.zeros(1, 300_000, dtype=torch.long)
    y[0, ::200] = 1
    loss, gradient = evaluate(f"lovasz-softmax-{backend}-histogram", x.cuda(), y.cuda())
    assert loss.cpu().isfinite() and gradient.cpu().isfinite().all()
