"""The focal losses as Triton kernels: in Triton's interpreter where there is no GPU, and compiled for GPUs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from test_focal import losses, sigmoid_targets
from test_ops import samples
from torch.library import opcheck

from veerloss import sigmoid_focal_loss, softmax_focal_loss
from veerloss._arguments import missing_reason

kernels = pytest.importorskip("veerloss.triton.focal", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    missing_reason("triton", torch.device("cpu"), "focal") is not None,
    reason="with a GPU, Triton does not interpret: tests/test_gpu.py",
)

GAMMAS = [0.0, 0.5, 2.0]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter takes its time by the operation, not by the element."""
    monkeypatch.setattr(kernels, "SIGMOID_TILE", 1 << 14)
    monkeypatch.setattr(kernels, "SOFTMAX_TILE", 1 << 14)


def check(function, *args, **options):
    check_loss(function, *args, backend="triton", **options)


def both(loss, x, **options):
    """Loss and gradient of one of test_focal.losses()."""
    x = x.detach().requires_grad_()
    value = loss(x, **options)
    return value.detach(), torch.autograd.grad(value, x, torch.ones_like(value))[0]


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, d) for s in SHAPES for d in DTYPES if d == torch.float32 or s in SHAPES[:5]], ids=str
)
def test_grid(shape, dtype):
    target = labels(shape, shape[1], ignore_index=-100)
    dense = sigmoid_targets(shape)["soft"]
    for layout, x in layouts(logits(shape, dtype)).items():
        if layout != "contiguous" and dtype in (torch.float16, torch.float64):
            continue
        check(softmax_focal_loss, x, target)
        check(sigmoid_focal_loss, x, dense, alpha=0.25)
        if shape[1] > 1:
            check(sigmoid_focal_loss, x, target, alpha=0.25, ignore_index=-100)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_options(gamma, reduction):
    shape = (2, 5, 9, 7)
    target = labels(shape, 5, ignore_index=255)
    per_class = torch.rand(5, generator=torch.Generator().manual_seed(2))
    for alpha, smoothing in ((None, 0.0), (0.3, 0.1), (per_class, 0.0), (per_class, 0.1), (None, 1.0)):
        for x in (logits(shape), layouts(logits(shape, torch.float64))["channels_last"]):
            check(
                softmax_focal_loss, x, target, gamma=gamma, alpha=alpha, label_smoothing=smoothing, reduction=reduction,
                ignore_index=255,
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid_options(gamma, reduction):
    shape = (2, 5, 9, 7)
    per_class = torch.rand(5, generator=torch.Generator().manual_seed(2))
    per_element = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    for target in sigmoid_targets(shape).values():
        for options in (
            {"alpha": per_class},
            {"weight": per_class},
            {"alpha": 0.9, "weight": per_element},
            {"weight": per_element[:1, :1].bfloat16()},
            {"ignore_index": 1},
        ):
            check(sigmoid_focal_loss, logits(shape), target, gamma=gamma, reduction=reduction, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_confident_pixels_keep_their_digits(smoothing):
    for scale in (20.0, 80.0, 1e4):
        x = logits((1, 4, 300), scale=scale)
        for target in (x.argmax(1), x.argmin(1)):
            for gamma in GAMMAS:
                check(softmax_focal_loss, x, target, gamma=gamma, label_smoothing=smoothing, reduction="none")


@pytest.mark.parametrize("gamma", [*GAMMAS, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_is_finite_for_every_finite_logit(gamma, dtype):
    x = torch.tensor([-6e4, -100, -87.4, -87.3, -20, -1, -0.0, 0, 1, 20, 100, 6e4], dtype=dtype)
    for target in (torch.zeros(12), torch.ones(12), torch.full((12,), 0.3)):
        check(sigmoid_focal_loss, x, target, gamma=gamma, reduction="none")


def test_relative_error_of_each_element():
    """No element is lost behind larger ones, as in the norms of the accuracy policy."""
    x = torch.linspace(-80, 80, 4001)
    for t in (torch.zeros(4001), torch.ones(4001)):
        actual = both(lambda x, **o: sigmoid_focal_loss(x, t, **o), x, gamma=0.0, reduction="none", backend="triton")  # noqa: B023
        expected = both(lambda x, **o: sigmoid_focal_loss(x, t, **o), x.double(), gamma=0.0, reduction="none")  # noqa: B023
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=4e-7, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [512, 513, 5000])
def test_many_classes(classes, layout, monkeypatch):
    """Block by block from 513 on, or, where classes are contiguous, 5000."""
    monkeypatch.setattr(kernels, "SOFTMAX_TILE", 4096)
    shape = (1, classes, 3)
    x, target = logits(shape), labels(shape, classes, ignore_index=-100)
    x[:, :1024, 0] = -math.inf  # the first blocks of a pixel have nothing
    target[:, 0] = classes - 1
    if classes <= 1024:
        x[:, -1] = 0
    x = layouts(x)[layout]
    if classes == 5000:
        torch.testing.assert_close(
            softmax_focal_loss(x, target, gamma=0.0, backend="triton"), F.cross_entropy(x, target), rtol=1e-6, atol=0
        )
    check(softmax_focal_loss, x, target)
    if (classes, layout) != (5000, "contiguous"):  # 5000 / 64 blocks, three times: slow here
        finite = layouts(logits(shape))[layout]
        check(softmax_focal_loss, finite, target, label_smoothing=0.1, gamma=1.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_types_and_strides(dtype):
    x, target = logits((2, 3, 6, 8)), labels((2, 3, 6, 8), 3)
    strided = target.to(dtype).repeat_interleave(2, -1)[..., ::2]
    for function in (softmax_focal_loss, sigmoid_focal_loss):
        check(function, x, strided, ignore_index=2)


@pytest.mark.parametrize("ignore_index", [-1, 255, 511, -(2**40)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_ignore_index_is_not_wrapped_to_the_type_of_the_target(dtype, ignore_index):
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3).to(dtype)
    dense = labels((2, 2, 120), 2).reshape(2, 3, 40).to(dtype)
    for function, t in ((softmax_focal_loss, target), (sigmoid_focal_loss, target), (sigmoid_focal_loss, dense)):
        plain = function(x, t, ignore_index=None, backend="triton")
        assert torch.equal(function(x, t, ignore_index=ignore_index, backend="triton"), plain)
        value = function(x, torch.full_like(t, 255), ignore_index=ignore_index, backend="triton")
        assert value == 0 if ignore_index == 255 else value.isnan()


def test_values_are_ignored_before_they_are_rounded():
    almost = torch.full((4,), 1 - 1e-11, dtype=torch.float64)
    assert sigmoid_focal_loss(torch.zeros(4), almost, ignore_index=1, backend="triton") > 0


@pytest.mark.parametrize("loss", losses())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(loss, bad):
    x = logits((2, 3, 40))
    x[1, 2, 17] = bad
    value, gradient = both(losses()[loss], x, backend="triton")
    assert value.isnan() and gradient[1, 2, 17].isnan()
    elementwise, _ = both(losses()[loss], x, reduction="none", backend="triton")
    assert elementwise.isnan().sum() == 1


def test_minus_infinity_masks_a_class():
    x, target = logits((2, 4, 6)), labels((2, 4, 6), 3)
    x[:, 3] = -math.inf
    value, gradient = both(lambda x, **o: softmax_focal_loss(x, target, **o), x, backend="triton")
    expected, fewer = both(lambda x, **o: softmax_focal_loss(x, target, **o), x[:, :3], backend="triton")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :3], fewer)
    assert (gradient[:, 3] == 0).all()


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_target_out_of_range_is_nan_and_nothing_else(wrong):
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=-100)
    target[1, 7] = wrong
    dense = torch.rand(2, 3, 40)
    dense[1, 2, 7] = wrong
    for function, t, options in (
        (softmax_focal_loss, target, {}),
        (softmax_focal_loss, target, {"label_smoothing": 0.1, "alpha": torch.ones(3)}),
        (sigmoid_focal_loss, target, {"ignore_index": -100, "gamma": 0.0}),
        (sigmoid_focal_loss, dense, {"gamma": 0.5}),
    ):
        assert function(x, t, backend="triton", **options).isnan()
        value, gradient = both(function_of(function, t), x, reduction="none", backend="triton", **options)
        for found, place in ((value, (1, 7)), (gradient, (1, slice(None), 7))):
            wanted = torch.zeros(found.shape, dtype=torch.bool)
            if t is dense:
                wanted[1, 2, 7] = True
            elif found.dim() == 3:
                wanted[1, :, 7] = True
            else:
                wanted[place] = True
            assert torch.equal(found.isnan(), wanted)


def function_of(function, target):
    return lambda x, **options: function(x, target, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(reduction):
    x, target = logits((2, 3, 40)), torch.full((2, 40), 255)
    x[0, 0, 0] = math.nan
    for function, t, options in (
        (softmax_focal_loss, target, {}),
        (softmax_focal_loss, target, {"label_smoothing": 0.1}),
        (softmax_focal_loss, target, {} if reduction != "mean" else {"normalizer": torch.zeros(())}),
        (sigmoid_focal_loss, target, {}),
        (sigmoid_focal_loss, torch.full((2, 3, 40), 255.0), {"weight": torch.full((3,), math.inf)}),
    ):
        options = {"ignore_index": 255, "reduction": reduction, "backend": "triton", **options}
        if "normalizer" in options:  # the gradient would be 0 times what the caller divides by
            assert function(x, t, **options) == 0
            continue
        value, gradient = both(function_of(function, t), x, **options)
        assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0, 2)], ids=str)
def test_no_pixels(shape):
    x, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for function, t in ((softmax_focal_loss, target), (sigmoid_focal_loss, target), (sigmoid_focal_loss, torch.zeros(shape))):
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 3}):
            value, gradient = both(function_of(function, t), x, backend="triton", **options)
            assert value.sum() == 0 and gradient.shape == x.shape


@pytest.mark.parametrize("loss", losses())
def test_as_native(loss):
    """The same values as the other backend, for normalizers and autocast too, and the same bits from run to run."""
    for dtype in DTYPES:
        x = logits((2, 3, 40), dtype)
        for options in ({"normalizer": 7}, {"normalizer": torch.tensor([7.0]).bfloat16()}, {"reduction": "none"}):
            with torch.autocast("cpu", torch.bfloat16, enabled="normalizer" in options):
                runs = [both(losses()[loss], x, backend=b, **options) for b in ("triton", "triton", "native")]
            for first, second, native in zip(*runs, strict=True):
                assert torch.equal(first, second)
                torch.testing.assert_close(first, native)


@pytest.mark.parametrize("loss", losses())
def test_more_tiles_than_programs(loss, monkeypatch):
    x = logits((5, 3, 100))
    expected = both(losses()[loss], x, backend="triton")
    monkeypatch.setattr(kernels, "SIGMOID_TILE", 64)
    monkeypatch.setattr(kernels, "SOFTMAX_TILE", 64)
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 2)
    torch.testing.assert_close(both(losses()[loss], x, backend="triton"), expected, rtol=1e-6, atol=0)


FOCAL = [(name, i) for name, cases in samples().items() if "focal" in name for i in range(len(cases))]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("name", "case"), FOCAL)
def test_opcheck(name, case, strided):
    x, *rest = samples()[name][case]
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    forward = getattr(torch.ops.veerloss_triton, name)
    opcheck(forward.default, (x.detach().requires_grad_(), *rest))
    loss, scale = forward(x, *rest)
    backward = getattr(torch.ops.veerloss_triton, name.replace("forward", "backward"))
    opcheck(backward.default, (torch.ones_like(loss), x, *rest[:7], scale))


def test_operators_check_their_arguments():
    forward, backward = torch.ops.veerloss_triton.softmax_focal_forward, torch.ops.veerloss_triton.softmax_focal_backward
    sigmoid = torch.ops.veerloss_triton.sigmoid_focal_forward
    x, y, options = logits((2, 3, 10)), labels((2, 3, 10), 3), (1.0, None, 2.0, 0.0, None)
    for call, expected in (
        (lambda: forward(x.to(torch.int8), y, *options, 1, 1.0, None, False), "logits of float32"),
        (lambda: forward(x, y.T.contiguous(), *options, 1, 1.0, None, False), "a target"),
        (lambda: forward(x, y, 1.0, torch.ones(6)[::2], 2.0, 0.0, None, 1, 1.0, None, False), "class_alpha"),
        (lambda: sigmoid(x, x, None, None, 2.0, x[:1], None, 0, 1.0, None, False), "a weight"),
        (lambda: backward(torch.ones(1, 1), x, y, *options, 0, torch.ones(())), "a gradient"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_compiles_for_gpus():
    """For sm_80, sm_90 and sm_100, in a process whose Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), environment.get("PYTHONPATH"))))
    command = [sys.executable, str(root / "tests/offline.py"), "veerloss.triton.focal"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {line.split(":")[0].split()[-1] for line in run.stdout.splitlines()} == {"sm_80", "sm_90", "sm_100"}
