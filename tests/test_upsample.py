"""Logits of lower resolution than the target: against F.interpolate and the reference in float64.

One option of all losses, and so in one file, by what may be wrong with it: sizes, types, options, PyTorch's view, bad input.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from budget import GRADIENT_SLACK, SLACK, assert_within_budget, evaluate
from grid import DTYPES, METHODS, labels, layouts, logits
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import veerloss
from veerloss import (
    compound_loss,
    dice_loss,
    jaccard_loss,
    lovasz_hinge_loss,
    lovasz_softmax_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
    tversky_loss,
)
from veerloss._layout import Errors, Interpolation, Reduction
from veerloss._upsample import Interpolated, LowLogits, adjoint_of_axis

ALL = {"focal": 0.7, "lovasz": 1.3, "dice": 0.5}
#: Of labels: loss(logits, labels, **options).
LOSSES = {
    "softmax focal": softmax_focal_loss,
    "cross-entropy": functools.partial(softmax_focal_loss, gamma=0.0, reduction="sum"),
    "softmax focal, each": functools.partial(softmax_focal_loss, reduction="none"),
    "sigmoid focal": functools.partial(sigmoid_focal_loss, alpha=0.25),
    "sigmoid focal, each": functools.partial(sigmoid_focal_loss, gamma=1.5, reduction="none"),
    "lovasz exact": functools.partial(lovasz_softmax_loss, method="exact"),
    "lovasz histogram": functools.partial(lovasz_softmax_loss, method="histogram"),
    "dice": dice_loss,
    "compound": functools.partial(compound_loss, **ALL, method="histogram"),
    "compound exact": functools.partial(compound_loss, **ALL, method="exact"),
    "compound without lovasz": functools.partial(compound_loss, cross_entropy=1.0, jaccard=1.0),
}
over_losses = pytest.mark.parametrize("loss", LOSSES)
over_backends = pytest.mark.parametrize("backend", ["native", "emulated", "reference"], indirect=True)
over_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)
#: That have Triton kernels.
OF_TRITON = [name for name in LOSSES if "focal" in name or name == "cross-entropy"]
over_kernels = pytest.mark.parametrize("backend", ["native", "emulated"], indirect=True)
MODES = [("bilinear", False), ("bilinear", True), ("nearest", False)]
over_modes = pytest.mark.parametrize(("mode", "align_corners"), MODES, ids=["bilinear", "corners", "nearest"])
#: [N, C, h, w], (H, W): whole factors and others, to smaller sizes too, of one axis alone, single pixels, primes; many classes.
SIZES = [
    ((2, 3, 4, 5), (16, 20)),
    ((1, 5, 8, 6), (64, 48)),
    ((1, 4, 7, 9), (26, 33)),
    ((1, 19, 13, 11), (47, 41)),
    ((2, 3, 12, 11), (5, 6)),
    ((1, 3, 12, 5), (7, 30)),
    ((2, 5, 6, 7), (6, 29)),
    ((2, 4, 5, 5), (5, 5)),
    ((2, 3, 1, 1), (9, 8)),
    ((1, 3, 1, 7), (9, 8)),
    ((3, 2, 3, 3), (1, 1)),
    ((1, 2, 2, 2), (61, 67)),
    ((1, 26, 5, 6), (17, 24)),
    ((1, 40, 3, 4), (12, 15)),
]


def interpolated(x, size, mode, align_corners=False):
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=None if mode == "nearest" else align_corners)


def slack_of(loss):
    return SLACK["histogram"] if "histogram" in loss or loss == "compound" else 0.0


def check(function, x, target, mode, align_corners, backend, slack=0.0, strides=None, **options):
    """Against the loss of the interpolated logits, in float64; a kernel may err as the reference does in the logits' type."""

    size = target.shape[2 - x.dim() :]

    def full(value, **more):
        return evaluate(lambda v: function(interpolated(v, size, mode, align_corners), target, **options, **more), value)

    opmath = x.to(torch.promote_types(x.dtype, torch.float32))
    reference, truth = full(opmath, backend="reference"), full(x.double(), backend="reference")
    for name, value in layouts(x).items():
        if strides is not None and name not in strides:
            continue
        common = {"upsample": mode, "align_corners": align_corners, "backend": backend}
        found = evaluate(function, value, target, **options, **common)
        assert found[0].dtype == x.dtype and found[1].dtype == x.dtype
        assert_within_budget(found[0], reference[0], truth[0], f"{name}: loss", slack)
        assert_within_budget(found[1], reference[1], truth[1], f"{name}: gradient", GRADIENT_SLACK * slack)


@over_backends
@over_losses
@over_modes
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_grid(shape, size, mode, align_corners, loss, backend):
    target = labels((shape[0], shape[1], *size), shape[1], ignore_index=255)
    check(LOSSES[loss], logits(shape), target, mode, align_corners, backend, slack_of(loss), ignore_index=255)


# Triton's interpreter takes a second for each pass; what interpolates first is that of the other backends.


@over_triton
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("loss", "size"), [*[("softmax focal", SIZES[k]) for k in (2, 4, 8, 9)], ("sigmoid focal", SIZES[5])])
def test_grid_of_triton(loss, size, align_corners, backend):
    shape, full = size
    target = labels((shape[0], shape[1], *full), shape[1], ignore_index=255)
    check(LOSSES[loss], logits(shape), target, "bilinear", align_corners, backend, ignore_index=255, strides=["contiguous"])


@over_triton
@pytest.mark.parametrize(
    ("loss", "dtype"), [*[(loss, torch.float32) for loss in OF_TRITON], *[("softmax focal", dtype) for dtype in DTYPES[1:]]]
)
def test_types_of_triton(loss, dtype, backend):
    target = labels((2, 5, 11, 9), 5, ignore_index=255).to(torch.int16)
    x = logits((2, 5, 4, 3), dtype)
    check(LOSSES[loss], x, target, "bilinear", False, backend, ignore_index=255, strides=["channels_last"])


@over_triton
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_options_of_triton(reduction, backend):
    shape, size = (2, 5, 4, 3), (11, 9)
    soft = torch.rand(2, 5, *size, generator=torch.Generator().manual_seed(3))
    x, y = logits(shape), labels((2, 5, *size), 5)
    common = {"reduction": reduction, "gamma": 1.5, "alpha": torch.linspace(0.2, 0.9, 5), "strides": ["contiguous"]}
    check(sigmoid_focal_loss, x, soft, "bilinear", True, backend, weight=torch.rand(5), **common)
    check(sigmoid_focal_loss, x, (soft > 0.5).mT.contiguous().mT, "bilinear", False, backend, **common)
    check(softmax_focal_loss, x, y, "bilinear", False, backend, weight=torch.rand(size), **common)
    check(softmax_focal_loss, x, soft, "bilinear", False, backend, **common)


@over_kernels
@over_losses
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_types(dtype, loss, backend):
    shape, size = (2, 5, 6, 7), (23, 28)
    target = labels((2, 5, *size), 5, ignore_index=255)
    check(LOSSES[loss], logits(shape, dtype), target, "bilinear", False, backend, slack_of(loss), ignore_index=255)


@over_kernels
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("loss", ["softmax focal", "lovasz histogram", "dice"])
def test_types_of_labels(loss, dtype, backend):
    target = labels((2, 5, 23, 28), 5).to(dtype)
    check(LOSSES[loss], logits((2, 5, 6, 7)), target, "bilinear", False, backend, slack_of(loss))


VOLUMES = [
    ((1, 3, 3, 4, 5), (9, 12, 20)),
    ((2, 2, 4, 3, 3), (7, 3, 5)),
    ((1, 2, 1, 2, 3), (3, 5, 6)),
    ((1, 2, 40, 2, 2), (90, 3, 4)),
]


@over_losses
@pytest.mark.parametrize(("mode", "align_corners"), [("trilinear", False), ("trilinear", True), ("nearest", False)], ids=str)
@pytest.mark.parametrize(("shape", "size"), VOLUMES, ids=str)
def test_volumes(shape, size, mode, align_corners, loss):
    target = labels((shape[0], shape[1], *size), shape[1], ignore_index=255)
    check(LOSSES[loss], logits(shape), target, mode, align_corners, "native", slack_of(loss), ignore_index=255)


@over_losses
def test_nearest_of_rows(loss):
    """Of one spatial dimension."""
    target = labels((2, 3, 29), 3, ignore_index=255)
    check(LOSSES[loss], logits((2, 3, 7)), target, "nearest", False, "native", slack_of(loss), ignore_index=255)


SHAPE, SIZE = (2, 5, 6, 7), (23, 28)


@over_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": torch.linspace(0.5, 1.5, 5), "gamma": 1.5},
        {"label_smoothing": 0.1},
        {"weight": torch.rand(23, 28)},
        {"normalizer": 7.0},
        {"normalizer": torch.tensor(3.0), "alpha": 0.3},
        {"reduction": "none", "gamma": 0.0},
    ],
    ids=lambda o: "+".join(o),
)
def test_softmax_focal_options(options, backend):
    check(softmax_focal_loss, logits(SHAPE), labels((2, 5, *SIZE), 5), "bilinear", False, backend, **options)


@over_kernels
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_targets_of_values(reduction, backend):
    """Class probabilities, dense and soft targets: [N, C, H, W]."""
    soft = torch.rand(2, 5, *SIZE, generator=torch.Generator().manual_seed(3))
    x = logits(SHAPE)
    check(softmax_focal_loss, x, soft, "bilinear", False, backend, reduction=reduction)
    check(sigmoid_focal_loss, x, soft, "bilinear", True, backend, reduction=reduction, weight=torch.rand(5))
    check(dice_loss, x, soft, "bilinear", False, backend, reduction=reduction, activation="sigmoid", squared=True)
    check(tversky_loss, x, (soft > 0.5).to(torch.uint8), "nearest", False, backend, reduction=reduction, alpha=0.3, beta=0.7)


@over_kernels
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["present", "all", (4, 0)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_lovasz_options(method, classes, per_image, backend):
    target = labels((2, 5, *SIZE), 4, ignore_index=255)
    options = {"per_image": per_image, "classes": classes, "method": method, "ignore_index": 255, "reduction": "sum"}
    options |= {"class_weight": torch.linspace(0.5, 1.5, 5)}
    check(lovasz_softmax_loss, logits(SHAPE), target, "bilinear", False, backend, SLACK[method], **options)


@over_kernels
@pytest.mark.parametrize("method", METHODS)
def test_binary(method, backend):
    """Logits with a channel of 1, and without."""
    # Rounding may move a pixel to another bin, whose share of the gradient of 23 x 28 pixels was 4e-5; or past another one.
    size = SIZE if method == "exact" else (69, 84)
    target = labels((2, 2, *size), 2, ignore_index=255)
    common = {"ignore_index": 255, "method": method}
    for options in ({"per_image": False}, {"per_image": True}):
        check(lovasz_hinge_loss, logits((2, 1, 6, 7)), target, "bilinear", False, backend, SLACK[method], **options, **common)
    x, found = logits((2, 1, 6, 7)), [lovasz_hinge_loss]
    if veerloss.ops.NAMESPACES["native"] == "veerloss":  # of a mask there is no kernel on a GPU, with upsample or without
        mask = {**ALL, "activation": "sigmoid", **common}
        check(compound_loss, x, target, "bilinear", True, backend, SLACK[method], **mask)
        found.append(functools.partial(compound_loss, **ALL, activation="sigmoid"))
    for loss in found:
        common = {"upsample": "bilinear", "backend": backend, "ignore_index": 255, "method": method}
        expected = loss(x, target, **common)
        assert torch.equal(loss(x[:, 0], target, **common), expected)
        assert torch.equal(loss(x, target[:, None], **common), expected)


def test_multilabel_hinge():
    target = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2)) > 0.5
    for options in ({}, {"per_image": False, "reduction": "none"}, {"reduction": "sum", "return_certificate": False}):
        common = {"per_class": True, "method": "exact", **options}
        check(lovasz_hinge_loss, logits((2, 3, 6, 7)), target, "bilinear", False, "native", **common)
    common = {"upsample": "bilinear", "per_class": True, "return_certificate": True, "method": "histogram"}
    for per_image, shape in ((True, (2, 3)), (False, (3,))):
        loss, certificate = lovasz_hinge_loss(logits((2, 3, 6, 7)), target, per_image=per_image, reduction="none", **common)
        assert loss.shape == certificate.shape == shape


@over_kernels
@over_losses
def test_large_images(loss, backend):
    """Several bands, tiles and threads; bins from a sample."""
    emulated = veerloss.ops.NAMESPACES["native"] != "veerloss"
    shape, size = ((1, 4, 20, 18), (80, 71)) if emulated else ((1, 4, 150, 140), (600, 560))
    target = labels((1, 4, *size), 4, ignore_index=255)
    check(LOSSES[loss], logits(shape), target, "bilinear", False, backend, slack_of(loss), ignore_index=255)


@over_losses
@pytest.mark.parametrize(
    ("shape", "size", "mode"), [((1, 3, 40, 37), (160, 149), "bilinear"), ((2, 3, 34, 5, 6), (70, 9, 11), "trilinear")]
)
def test_threads_change_no_bit(shape, size, mode, loss, threads):
    x, target = logits(shape), labels((shape[0], 3, *size), 3)
    found = [evaluate(LOSSES[loss], x, target, upsample=mode, backend="native") for _ in threads(1, 2, 3)]
    for result in found[1:]:
        assert torch.equal(result[0], found[0][0]) and torch.equal(result[1], found[0][1])


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("loss", ["softmax focal", "sigmoid focal", "lovasz histogram", "dice", "compound"])
def test_order_of_gpu_threads_changes_no_bit(loss, backend, monkeypatch):
    x, target = logits((2, 5, 9, 8)), labels((2, 5, 33, 35), 5)
    expected = evaluate(LOSSES[loss], x, target, upsample="bilinear", backend=backend)
    for seed in range(2):
        monkeypatch.setenv("VEERLOSS_EMULATOR_SEED", str(seed))
        found = evaluate(LOSSES[loss], x, target, upsample="bilinear", backend=backend)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@given(
    low=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    full=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    align_corners=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_the_gradient_is_the_adjoint(low, full, align_corners, seed):
    """<U x, y> = <x, U^T y>: of a sum of cross-entropies U^T y is the gradient, where y is that at full resolution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, *low, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (1, *full), generator=generator)
    options = {"gamma": 0.0, "reduction": "sum", "backend": "native"}
    _, gradient = evaluate(softmax_focal_loss, x, target, upsample="bilinear", align_corners=align_corners, **options)
    up = interpolated(x, full, "bilinear", align_corners)
    _, at_full_size = evaluate(softmax_focal_loss, up, target, **options)
    torch.testing.assert_close((x * gradient).sum(), (up * at_full_size).sum(), rtol=1e-9, atol=1e-9)


@given(
    low=st.integers(1, 20),
    full=st.integers(1, 90),
    align_corners=st.booleans(),
    axis=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_adjoint_of_an_axis(low, full, align_corners, axis, seed):
    """That of logits which a GPU interpolates."""
    shape = [2, 5, 5]
    x = torch.zeros(*shape[:axis], low, *shape[axis + 1 :], dtype=torch.float64, requires_grad=True)
    size = (full, 5) if axis == 1 else (5, full)
    up = interpolated(x[None], size, "bilinear", align_corners)[0]
    grad = torch.randn(up.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(adjoint_of_axis(grad, axis, low, align_corners), torch.autograd.grad(up, x, grad)[0])


def test_interpolation_is_differentiated_twice():
    x = logits((1, 2, 3, 2), torch.float64).requires_grad_()
    low = LowLogits(x, torch.Size((7, 5)), "bilinear", False)
    assert torch.autograd.gradgradcheck(lambda v: Interpolated.apply(v, low).square(), x)


def test_reference_passes_gradcheck():
    x, target = logits((1, 3, 3, 2), torch.float64), labels((1, 3, 7, 5), 3)
    for loss in (softmax_focal_loss, dice_loss, functools.partial(lovasz_softmax_loss, method="exact")):
        function = functools.partial(loss, target=target, upsample="bilinear", backend="reference")
        assert torch.autograd.gradcheck(lambda v, f=function: f(v), x.clone().requires_grad_())


# ---- as PyTorch sees it


@over_losses
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(loss, dynamic):
    torch._dynamo.reset()
    x, target = logits(SHAPE).requires_grad_(), labels((2, 5, *SIZE), 5)
    function = lambda v: LOSSES[loss](2 * v, target, upsample="bilinear").sum()  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for f, g in ((compiled, function),):
        found, expected = (torch.autograd.grad(h(x), x)[0] for h in (f, g))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(loss, monkeypatch):
    """Every operator that the loss calls, with the arguments that it passes."""
    called = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "veerloss":
                called[operator] = (args, kwargs or {})
            return operator(*args, **(kwargs or {}))

    x, target = layouts(logits(SHAPE))["channels_last"], labels((2, 5, *SIZE), 5)
    with Watch():
        evaluate(LOSSES[loss], x, target, upsample="bilinear", backend="native")
    assert any("forward" in operator.__name__ for operator in called) and any("backward" in o.__name__ for o in called)
    for operator, (args, kwargs) in called.items():
        values = dict(zip([a.name for a in operator._schema.arguments], args, strict=False)) | kwargs
        values = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        differentiable = "forward" in operator.__name__
        opcheck(operator, (), values | ({"logits": x.clone().requires_grad_()} if differentiable else {}))


@over_kernels
@pytest.mark.parametrize("loss", ["softmax focal", "lovasz histogram", "dice", "compound"])
def test_autocast_gives_float32(loss, backend):
    x, target = logits(SHAPE, torch.bfloat16).requires_grad_(), labels((2, 5, *SIZE), 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[loss](x, target, upsample="bilinear", backend=backend)
    assert found.dtype == torch.float32 and torch.autograd.grad(found, x)[0].dtype == torch.bfloat16


def test_without_gradient():
    x, target = logits(SHAPE), labels((2, 5, *SIZE), 5)
    for loss in LOSSES.values():
        with torch.no_grad():
            found = loss(x, target, upsample="bilinear")
        torch.testing.assert_close(found, loss(x.clone().requires_grad_(), target, upsample="bilinear").detach())


def test_modules_and_parts():
    x, target = logits(SHAPE), labels((2, 5, *SIZE), 5)
    module = veerloss.SoftmaxFocalLoss(upsample="bilinear", align_corners=True)
    assert torch.equal(module(x, target), softmax_focal_loss(x, target, upsample="bilinear", align_corners=True))
    loss, parts = compound_loss(x, target, **ALL, upsample="bilinear", return_parts=True)
    assert [*parts] == [*ALL] and loss.isfinite()
    for low in (x, x.bfloat16()):
        loss, certificate = lovasz_softmax_loss(low, target, method="histogram", upsample="bilinear", return_certificate=True)
        assert loss.dtype == low.dtype and certificate.shape == (5,)


# ---- edges, bad input


@over_backends
@over_losses
@pytest.mark.parametrize(("shape", "size"), [((0, 3, 4, 5), (8, 9)), ((2, 3, 4, 5), (0, 9)), ((2, 3, 0, 5), (0, 9))], ids=str)
def test_nothing(shape, size, loss, backend):
    x = torch.zeros(shape)
    found = evaluate(LOSSES[loss], x, torch.zeros(shape[0], *size, dtype=torch.long), upsample="bilinear", backend=backend)
    assert (found[0] == 0).all() and found[1].shape == shape and (found[1] == 0).all()


@over_kernels
@pytest.mark.parametrize("loss", [n for n in LOSSES if "each" not in n])
def test_all_ignored(loss, backend):
    x = logits(SHAPE)
    x[0, 0, 0, 0] = torch.nan
    found = evaluate(LOSSES[loss], x, torch.full((2, *SIZE), 255), upsample="bilinear", ignore_index=255, backend=backend)
    assert found[0] == 0 and (found[1] == 0).all()


@over_kernels
@over_losses
def test_nan_gives_nan(loss, backend):
    x = logits(SHAPE)
    x[1, 2, 3, 4] = torch.nan
    assert LOSSES[loss](x, labels((2, 5, *SIZE), 5), upsample="bilinear", backend=backend).isnan().any()


@over_losses
@pytest.mark.parametrize("value", [-1, 5, 2**40])
def test_target_out_of_range(loss, value):
    target = labels((2, 5, *SIZE), 5)
    target[1, 20, 11] = value
    with pytest.raises(IndexError, match=f"target holds {value}, expected"):
        LOSSES[loss](logits(SHAPE), target, upsample="bilinear")


X, Y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X, Y, {}, ValueError, r"target must have the shape \[2, 4, 5\].*upsample='bilinear'"),
        (X, Y, {"upsample": "bicubic"}, ValueError, "upsample must be one of .*, got 'bicubic'"),
        (X, Y, {"upsample": 2}, ValueError, "upsample must be one of .*, got 2"),
        (X, Y, {"upsample": "trilinear"}, ValueError, r"upsample='trilinear' is for logits \[N, C, d, h, w\].*\[2, 3, 4, 5\]"),
        (X, Y[0], {"upsample": "bilinear"}, ValueError, r"\[N, C, h, w\] and a target \[N, H, W\].*target \[8, 10\]"),
        (X[0], Y, {"upsample": "bilinear"}, ValueError, r"logits \[3, 4, 5\] and target \[2, 8, 10\]"),
        (X[:1], Y, {"upsample": "bilinear"}, ValueError, r"as many images as logits.*\[1, 3, 4, 5\] and target \[2, 8, 10\]"),
        (X, torch.zeros(2, 4, 8, 10), {"upsample": "bilinear"}, ValueError, r"channels of logits.*target \[2, 4, 8, 10\]"),
        (X[..., :0], Y, {"upsample": "bilinear"}, ValueError, r"at least one pixel.*\[2, 3, 4, 0\] and target \[2, 8, 10\]"),
        (X, Y, {"upsample": "nearest", "align_corners": True}, ValueError, "align_corners is for upsample='bilinear'"),
        (X, Y, {"align_corners": True}, ValueError, "align_corners .* without upsample"),
        (X, Y, {"upsample": "bilinear", "align_corners": 1}, TypeError, "align_corners must be True or False, got 1"),
        (X, Y.double(), {"upsample": "bilinear"}, TypeError, "class indices"),
    ],
    ids=lambda v: "" if isinstance(v, torch.Tensor) else str(v)[:40],
)  # fmt: skip
def test_bad_input(x, y, options, error, message):
    for loss in (softmax_focal_loss, lovasz_softmax_loss, dice_loss, functools.partial(compound_loss, **ALL)):
        with pytest.raises(error, match=message):
            loss(x, y, **options)
        with pytest.raises(error, match=message):
            loss(x, y, backend="reference", **options)


def test_what_gpu_kernels_take():
    """What they do not is interpolated first."""

    def low(shape, size, mode="bilinear", dtype=torch.float32):
        return LowLogits(torch.zeros(shape, dtype=dtype), torch.Size(size), mode, False, "cuda").fits_kernels(24)

    assert low((1, 19, 4, 4), (16, 16)) and low((1, 24, 2, 2), (2, 3), dtype=torch.bfloat16)
    assert not low((1, 25, 4, 4), (16, 16)) and not low((1, 19, 4, 4), (3, 16)) and not low((1, 19, 1, 4), (4, 16))
    assert not low((1, 3, 4, 4), (16, 16), "nearest") and not low((1, 3, 4, 4), (16, 16), dtype=torch.float64)
    assert not low((1, 3, 2, 4, 4), (4, 16, 16), "trilinear")


def test_distributed_losses_take_it():
    """Of one rank; see test_distributed.py for more."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, target = logits(SHAPE), labels((2, 5, *SIZE), 5)
        for loss in (dice_loss, lovasz_softmax_loss, functools.partial(compound_loss, **ALL)):
            expected = evaluate(loss, x, target, upsample="bilinear", **({} if loss is dice_loss else {"method": "histogram"}))
            found = evaluate(loss, x, target, upsample="bilinear", process_group=dist.group.WORLD)
            torch.testing.assert_close(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1])
    finally:
        dist.destroy_process_group()


def test_jaccard_takes_it():
    check(jaccard_loss, logits(SHAPE), labels((2, 5, *SIZE), 5), "bilinear", False, "native", per_image=True, classes="present")


@over_kernels
def test_operators_refuse_what_they_do_not_take(backend):
    """Called directly, they would read outside of small logits."""
    operators, emulated = veerloss.ops.operators(backend), veerloss.ops.NAMESPACES["native"] != "veerloss"
    x, y = logits(SHAPE), labels((2, 5, *SIZE), 5)
    low = {"logits": x, "target": y, "upsample": Interpolation.LINEAR}
    scale = {"grad": torch.ones(()), "scale": torch.ones(()), "reduction": Reduction.MEAN}
    result = {"reduction": Reduction.MEAN, "factor": 1.0, "normalizer": None, "upcast_loss": False}
    sigmoid = {"alpha": None, "class_alpha": None, "gamma": 2.0, "weight": None, "ignore_index": None, "background_index": None}
    softmax = {"alpha": 1.0, "class_alpha": None, "gamma": 2.0, "label_smoothing": 0.1, "ignore_index": None}
    if emulated:
        for stem, options in (
            ("sigmoid_focal", sigmoid | {"logits": x.double()}),
            ("sigmoid_focal", sigmoid | {"weight": torch.ones(2, 5, *SIZE)}),
            ("softmax_focal", softmax),
        ):
            with pytest.raises(RuntimeError, match="upsample"):
                getattr(operators, f"{stem}_forward")(**low | options, **result)
            with pytest.raises(RuntimeError, match="upsample"):
                getattr(operators, f"{stem}_backward")(**low | options, **scale)
        exact = {"errors": Errors.SOFTMAX, "per_image": False, "ignore_index": None, "valid_pixels": None}
        with pytest.raises(RuntimeError, match="method 'histogram'"):
            operators.lovasz_exact_backward(
                **low, **exact, **scale | {"scale": torch.ones(5)}, weights=torch.zeros(5, 2, SIZE[0] * SIZE[1])
            )
    for bad in ({"logits": x[:1]}, {"target": y[:1]}, {"logits": x[..., ::2]}, {"upsample": 3}, {"target": y.half()[:, None]}):
        with pytest.raises((RuntimeError, ValueError), match=r"logits|target|upsample"):
            operators.region_sum(
                **low | bad, activation=0, squared=False, per_image=False, ignore_index=None, background_index=None
            )
