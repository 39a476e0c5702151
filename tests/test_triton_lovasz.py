"""The Triton kernels of the Lovász losses, in Triton's interpreter; and compiled for GPUs that are not there."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from torch.library import opcheck

from veerloss import _histogram, lovasz_hinge_loss, lovasz_softmax_loss

SOFTMAX, PROBABILITIES, HINGE = _histogram.SOFTMAX, _histogram.PROBABILITIES, _histogram.HINGE
#: As in test_histogram.py.
BIN = 1e-6

triton_ops, native_ops = torch.ops.veerloss_triton, torch.ops.veerloss
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set")
pytestmark = [interpreted, pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero|All-NaN):RuntimeWarning")]


@pytest.fixture(params=["exact", "histogram"])
def method(request):
    return request.param


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter takes as long for a small array as for one of thousands."""
    monkeypatch.setattr("veerloss.triton.histogram.BINS_STEP", 8192)
    monkeypatch.setattr("veerloss.triton.lovasz.TILE", 8192)
    monkeypatch.setattr("veerloss.triton.lovasz.MOST_PIXELS", 1024)


def check(loss, x, target, **options):
    check_loss(loss, x, target, backend="triton", slack=BIN if options["method"] == "histogram" else 0.0, **options)


def kinds():
    """(kind of errors, logits or probabilities, target): a batch of each, with ignored pixels."""
    x, target = logits((2, 3, 700)), labels((2, 3, 700), 3, ignore_index=255)
    yield SOFTMAX, x, target
    yield PROBABILITIES, x.softmax(1), target
    yield HINGE, x[:, :1], torch.where(target == 2, 1, target)


# ---- against float64


@pytest.mark.parametrize("shape", [*SHAPES[:6], (9, 3, 2, 2), *SHAPES[7:]], ids=str)  # images are slow in the interpreter
def test_softmax_grid(shape, method):
    target = labels(shape, shape[1], ignore_index=255)
    for name, x in layouts(logits(shape)).items():
        if method == "histogram" and (name != "channels_last" or shape[1] > 5):
            continue  # a segment's bins take 50 ms; see test_many_classes
        if name == "channels_last" or shape[1] < 19:
            options = {"classes": "all", "per_image": True} if name == "every other pixel" else {}
            check(lovasz_softmax_loss, x, target, ignore_index=255, method=method, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype, method):
    shape = (2, 3, 31, 33)
    target = labels(shape, 3, ignore_index=255)
    for name, x in layouts(logits(shape, dtype)).items():
        if method == "exact" or name == "channels_last":
            check(lovasz_softmax_loss, x, target, ignore_index=255, method=method)
    check(lovasz_softmax_loss, logits(shape).softmax(1).to(dtype), target, ignore_index=255, from_logits=False, method=method)


@pytest.mark.parametrize(
    "method, classes, per_image",
    [("exact", classes, per_image) for classes in ("present", "all", (4, 0, 3)) for per_image in (False, True)]
    + [("histogram", "present", True), ("histogram", (4, 0, 3), False)],
    ids=str,
)
def test_options(method, classes, per_image):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    x, weight = logits(shape), torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    for value, reduction, options in (
        (x, "none", {"class_weight": weight}),
        (x, "mean", {}),
        (x.softmax(1), "sum", {"from_logits": False, "class_weight": weight}),
    ):
        check(
            lovasz_softmax_loss, value, target, classes=classes, per_image=per_image, reduction=reduction, ignore_index=-1,
            method=method, **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 31, 33)], ids=str)
def test_hinge_grid(shape, dtype, method):
    target = labels((shape[0], 2, *shape[1:]), 2, ignore_index=255)
    for scale in (1e-3, 2.0, 1e3) if dtype == torch.float32 else (2.0,):
        wide = logits((*shape[:-1], 2 * shape[-1]), dtype, scale=scale)
        for x, per_image, reduction in ((logits(shape, dtype, scale=scale), True, "none"), (wide[..., ::2], False, "mean")):
            check(
                lovasz_hinge_loss, x, target, per_image=per_image, reduction=reduction, ignore_index=255, method=method
            )  # fmt: skip


@pytest.mark.parametrize("pixels", [1023, 1024, 1025, 6000])
def test_sort_sizes(pixels):
    """Around the number of ranks to a program, and above."""
    x = logits((1, 3, pixels))
    check(lovasz_softmax_loss, x, labels(x.shape, 3), method="exact")


def test_confident_pixels_keep_their_digits():
    target, x = labels((1, 4, 4000), 4), logits((1, 4, 4000))
    for sharpness in (10.0, 40.0):
        sure = x + sharpness * torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
        check(lovasz_softmax_loss, sure, target, method="exact")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_target_types(dtype, method):
    x, target = logits((2, 3, 40)), labels((2, 2, 40), 2)
    expected = lovasz_hinge_loss(x[:, 0], target, method=method)
    torch.testing.assert_close(lovasz_hinge_loss(x[:, 0], target.to(dtype), method=method, backend="triton"), expected)
    if not dtype.is_floating_point and dtype != torch.bool:
        expected = lovasz_softmax_loss(x, target, method=method)
        torch.testing.assert_close(lovasz_softmax_loss(x, target.to(dtype), method=method, backend="triton"), expected)


def test_ignore_index_is_compared_in_64_bits(method):
    """As uint8, 257 would be class 1."""
    x, target = logits((1, 3, 40)), labels((1, 3, 40), 3)
    for index in (257, 1 << 40, -1):
        found = lovasz_softmax_loss(x, target.byte(), ignore_index=index, method=method, backend="triton")
        torch.testing.assert_close(found, lovasz_softmax_loss(x, target, method=method))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["softmax", "probabilities", "hinge"])
def test_ties_rank_as_in_the_reference(kind, seed):
    """Equal errors in the order of their pixels, whatever their kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 600, generator=generator, dtype=torch.float64).mul(2).round() / 2
    target = torch.randint(0, 2, (1, 600), generator=generator)
    gradients = []
    for backend in ("triton", "reference"):
        value = (x.softmax(1) if kind == "probabilities" else x if kind == "softmax" else x[:, 0]).requires_grad_()
        if kind == "hinge":
            loss = lovasz_hinge_loss(value, target, method="exact", backend=backend)
        else:
            loss = lovasz_softmax_loss(value, target, from_logits=kind == "softmax", method="exact", backend=backend)
        gradients.append(torch.autograd.grad(loss, value)[0])
    if kind == "softmax":  # 1 - p and p of two classes are tied in one arithmetic and not in another
        assert gradients[0].sum(1).abs().max() < 1e-15
    else:
        torch.testing.assert_close(*gradients)


# ---- edges


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_nan_and_infinity_give_nan(bad, channels, method):
    x = logits((2, channels, 40)).requires_grad_()
    with torch.no_grad():
        x[1, channels - 1, 17] = bad
    target = labels((2, channels, 40), channels)
    binary = target.clamp(max=1).unsqueeze(1).expand(x.shape)
    for loss in (
        lovasz_softmax_loss(x, target, method=method, backend="triton"),
        lovasz_softmax_loss(x, target, from_logits=False, method=method, backend="triton"),
        lovasz_hinge_loss(x, binary, method=method, backend="triton"),
        lovasz_hinge_loss(-x, binary, method=method, backend="triton"),
    ):
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("per_image", [False, True])
def test_all_ignored_is_zero_with_zero_gradient(per_image, reduction, method):
    x = logits((2, 3, 40))
    x[0, :, 0] = math.nan
    x.requires_grad_()
    options = {"ignore_index": 255, "per_image": per_image, "reduction": reduction, "method": method, "backend": "triton"}
    target = torch.full((2, 40), 255)
    for loss in (
        lovasz_softmax_loss(x, target, **options),
        lovasz_softmax_loss(x, target, classes="all", from_logits=False, **options),
        lovasz_hinge_loss(x[:, 0], target, **options),
    ):
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_ignored_pixels_may_hold_anything(method):
    x, target = logits((1, 2, 50)), labels((1, 2, 50), 2)
    target[0, 7] = 255
    for bad in (math.nan, math.inf):
        x[0, :, 7] = bad
        for loss, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
            results = []
            for backend in ("triton", "native"):
                leaf = value.clone().requires_grad_()
                result = loss(leaf, target, ignore_index=255, method=method, backend=backend)
                results.append((result.detach(), torch.autograd.grad(result, leaf)[0]))
            torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_no_pixels(shape, method):
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for per_image in (True, False):
        for reduction in ("mean", "none"):
            options = {"per_image": per_image, "reduction": reduction, "method": method}
            for loss, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
                found = loss(value, target, backend="triton", **options)
                assert found.shape == loss(value, target, **options).shape and found.sum() == 0
                assert torch.autograd.grad(found.sum(), x)[0].shape == x.shape


def test_minus_infinity_masks_a_class(method):
    x, target = logits((2, 4, 6)).requires_grad_(), labels((2, 4, 6), 3)
    masked = x.clone()
    masked[:, 3] = -math.inf
    loss = lovasz_softmax_loss(masked, target, method=method, backend="triton")
    torch.testing.assert_close(loss, lovasz_softmax_loss(x[:, :3], target, method=method))
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("wrong", [-5, 3, 255, 1 << 40])
@pytest.mark.parametrize("alone", [False, True])
def test_target_out_of_range_gives_nan(wrong, alone, method):
    """Even where no class has foreground besides."""
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3)
    if alone:
        target.fill_(-1)
    target[1, 17] = wrong
    for options in ({}, {"classes": "all"}, {"classes": [1]}, {"from_logits": False}, {"per_image": True}):
        assert lovasz_softmax_loss(x, target, ignore_index=-1, method=method, backend="triton", **options).isnan()
    binary = torch.where(target >= 0, target.clamp(max=1), -1)
    binary[1, 17] = 2
    assert lovasz_hinge_loss(x[:, 0], binary, ignore_index=-1, method=method, backend="triton").isnan()


def test_exact_probabilities_have_no_gradient(method):
    target = labels((2, 3, 50), 3)
    p = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float().requires_grad_()
    loss = lovasz_softmax_loss(p, target, from_logits=False, method=method, backend="triton")
    assert loss == 0 and (torch.autograd.grad(loss, p)[0] == 0).all()


def test_probabilities_outside_0_1_slope_as_the_error_does(method):
    p = torch.tensor([[[0.0, 1.0, 0.52, 0.41, -0.25, 1.37], [1.0, 0.0, 0.48, 0.44, 1.22, -0.33]]])
    target, weight = torch.tensor([[0, 0, 1, 1, 0, 1]]), torch.tensor([1.0, -2.0])
    gradients = []
    for backend in ("triton", "native"):
        value = p.clone().requires_grad_()
        loss = 1 - lovasz_softmax_loss(value, target, from_logits=False, class_weight=weight, method=method, backend=backend)
        gradients.append(torch.autograd.grad(loss, value)[0])
    torch.testing.assert_close(*gradients)


def test_without_gradient_nothing_is_kept():
    x, target = logits((1, 3, 100)), labels((1, 3, 100), 3)
    options = (None, True, False, None, None, True, 1)
    loss, scale, weights = triton_ops.lovasz_softmax_forward(x, target, *options, False, False)
    kept = triton_ops.lovasz_softmax_forward(x, target, *options, True, False)
    assert weights.shape == (0,) and kept[2].shape == (3, 1, 100)
    assert torch.equal(loss, kept[0]) and torch.equal(scale, kept[1])


# ---- method "histogram"


@pytest.mark.parametrize("per_image", [False, True])
def test_steps_are_those_of_the_native_library(per_image):
    """The same counts, tables within a bin, and the same weights, sums and gradients from the same tables.

    (The exponentials of the two backends differ in the last place: in other inputs than these a pixel may change its bin.)
    """
    for errors, x, target in kinds():
        how = (errors, per_image, 255)
        wanted = torch.ones((2 if per_image else 1, x.size(1)), dtype=torch.bool)
        wanted[0, -1] = x.size(1) == 1
        for sampled, flags in ((False, None), (True, wanted)):
            found = triton_ops.lovasz_histogram_count(x, target, None, flags, *how, sampled)
            expected = native_ops.lovasz_histogram_count(x, target, None, flags, *how, sampled)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        table = native_ops.lovasz_histogram_place(expected[0], None, errors)
        bins = triton_ops.lovasz_histogram_place(expected[0], None, errors) >> 16
        assert (bins - (table >> 16)).abs().max() <= 1
        assert torch.equal(bins, triton_ops.lovasz_histogram_place(expected[0].long(), None, errors) >> 16)
        found = triton_ops.lovasz_histogram_count(x, target, table, None, *how, False)
        expected = counts, largest = native_ops.lovasz_histogram_count(x, target, table, None, *how, False)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        again = [ops.lovasz_histogram_place(counts, table, errors) >> 16 for ops in (triton_ops, native_ops)]
        assert (again[0] - again[1]).abs().max() <= 1
        for given in (counts, counts.long()):
            options = (x, given, largest, table, None, False, None, errors, per_image, 0, True)
            found = triton_ops.lovasz_histogram_weigh(*options)
            expected = _, scale, weights, tops, bounds, _ = native_ops.lovasz_histogram_weigh(*options)
            torch.testing.assert_close(found, expected)
        units = torch.full_like(bounds, 2.0**40)
        kept = (table, weights, tops)
        sums = [ops.lovasz_histogram_sum(x, target, *kept, units, *how) for ops in (triton_ops, native_ops)]
        torch.testing.assert_close(sums[0].double(), sums[1].double(), rtol=1e-6, atol=0)
        grad = torch.linspace(-1, 2, scale.numel()).reshape(scale.shape)
        gradients = [ops.lovasz_histogram_backward(grad, x, target, *kept, scale, *how, 0) for ops in (triton_ops, native_ops)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["softmax", "hinge"])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_certificate_bounds_the_distance_of_the_weights(scale, kind):
    """As in test_histogram.py."""
    x, target = logits((1, 2, 3000), torch.float64, scale=scale), labels((1, 2, 3000), 2)
    gradients = []
    for how in ("histogram", "exact"):
        value = (x if kind == "softmax" else x[:, 0]).clone().requires_grad_()
        options = {"method": how, "return_certificate": True, "backend": "triton"}
        if kind == "softmax":
            loss, certificate = lovasz_softmax_loss(value, target, classes=[1], **options)
        else:
            loss, certificate = lovasz_hinge_loss(value, target, **options)
        gradients.append(torch.autograd.grad(loss, value)[0].flatten())
        if how == "histogram":
            bound = certificate.sum().item()
    distance = (gradients[0] - gradients[1]).abs().sum().item()
    assert bound > 0 and distance <= (0.5 if kind == "softmax" else 1.0) * bound + 1e-9


@pytest.mark.parametrize("kind", ["softmax", "probabilities", "hinge"])
def test_doubtful_bins_are_placed_again(kind, monkeypatch):
    """Of a rare foreground a sample has next to nothing; the bins that it places are far off, and placed again."""
    monkeypatch.setattr(_histogram, "SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_histogram, "SAMPLED_IMAGE", 1 << 10)
    x, target = logits((1, 2, 20_000), scale=0.25), torch.zeros(1, 20_000, dtype=torch.long)
    target[0, 100::200] = 1
    results = []
    for backend in ("triton", "native"):
        value = (x if kind == "softmax" else x.softmax(1) if kind == "probabilities" else x[:, 0]).clone().requires_grad_()
        if kind == "hinge":
            loss = lovasz_hinge_loss(value, target, method="histogram", backend=backend)
        else:
            loss = lovasz_softmax_loss(value, target, from_logits=kind == "softmax", method="histogram", backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, value)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-9)


def test_a_sample_has_doubts():
    x, target = logits((1, 2, 20_000), scale=0.25), torch.zeros(1, 20_000, dtype=torch.long)
    target[0, 100::200] = 1
    doubts = []
    for sampled in (True, False):
        counts, _ = triton_ops.lovasz_histogram_count(x, target, None, None, SOFTMAX, False, None, sampled)
        table = triton_ops.lovasz_histogram_place(counts, None, SOFTMAX)
        counts, largest = triton_ops.lovasz_histogram_count(x, target, table, None, SOFTMAX, False, None, False)
        options = (None, True, None, SOFTMAX, False, 1, False)
        found, expected = (
            ops.lovasz_histogram_weigh(x, counts, largest, table, *options)[5] for ops in (triton_ops, native_ops)
        )
        assert torch.equal(found, expected)
        doubts.append(found[0, 1].item())
    assert doubts[0]


@pytest.mark.parametrize("classes", [33, 150])
def test_many_classes(classes):
    """More than a tile has. In float64: the sums of many float32 exponentials differ by some units in the last place, which
    moves a few of these pixels across the edges of bins."""
    x, target = logits((1, classes, 100), torch.float64), labels((1, classes, 100), classes, ignore_index=255)
    counts, _ = native_ops.lovasz_histogram_count(x, target, None, None, SOFTMAX, False, 255, False)
    table = native_ops.lovasz_histogram_place(counts, None, SOFTMAX)
    counts, largest = native_ops.lovasz_histogram_count(x, target, table, None, SOFTMAX, False, 255, False)
    found = triton_ops.lovasz_histogram_count(x, target, table, None, SOFTMAX, False, 255, False)
    torch.testing.assert_close(found, (counts, largest), rtol=0, atol=0)
    options = (None, False, None, SOFTMAX, False, 1, False)
    _, scale, weights, tops, _, _ = native_ops.lovasz_histogram_weigh(x, counts, largest, table, *options)
    kept = (x, target, table, weights, tops, scale, SOFTMAX, False, 255, 1)
    gradients = [ops.lovasz_histogram_backward(x.new_ones(()), *kept) for ops in (triton_ops, native_ops)]
    torch.testing.assert_close(*gradients)


def test_segments_that_are_not_wanted_are_left_alone():
    x, target = logits((2, 3, 500)), labels((2, 3, 500), 3)
    table = triton_ops.lovasz_histogram_place(
        triton_ops.lovasz_histogram_count(x, target, None, None, SOFTMAX, False, None, False)[0], None, SOFTMAX
    )
    every, _ = triton_ops.lovasz_histogram_count(x, target, table, None, SOFTMAX, False, None, False)
    for wanted in (torch.tensor([[False, True, False]]), torch.zeros(1, 3, dtype=torch.bool)):
        counts, largest = triton_ops.lovasz_histogram_count(x, target, table, wanted, SOFTMAX, False, None, False)
        assert torch.equal(counts, torch.where(wanted[..., None, None], every, 0))
        assert torch.equal(largest[~wanted], torch.tensor([-1.0, 0.0], dtype=torch.float64).expand(int((~wanted).sum()), 2))


# ---- the operators


@pytest.mark.parametrize("kind", ["softmax", "hinge"])
def test_same_bits_in_every_run(kind, method):
    x, target = logits((2, 3, 3000)), labels((2, 3, 3000), 2)
    results = []
    for _ in range(2):
        value = (x if kind == "softmax" else x[:, 0]).clone().requires_grad_()
        loss = (lovasz_softmax_loss if kind == "softmax" else lovasz_hinge_loss)(value, target, method=method, backend="triton")
        results.append((loss.detach(), torch.autograd.grad(loss, value)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_opcheck():
    x, target = logits((2, 3, 10)), labels((2, 3, 10), 3)
    selected, weight = torch.tensor([True, False, True]), torch.tensor([0.2, 0.3, 0.5])
    binary = target.clamp(max=1)
    leaf = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for name, args in (
        ("softmax", (leaf, target, None, True, False, None, None, True, 1, True, False)),
        ("softmax", (leaf, target, selected, False, True, weight, 1, False, 0, True, True)),
        ("hinge", (leaf[:, :1].detach().requires_grad_(), binary, True, None, 1, True, False)),
        ("histogram", (leaf, target, selected, False, False, weight, 1, SOFTMAX, 0, True)),
        ("histogram", (leaf[:, :1].detach().requires_grad_(), binary, None, False, False, None, None, HINGE, 1, False)),
    ):
        opcheck(getattr(triton_ops, f"lovasz_{name}_forward").default, args)


@pytest.mark.parametrize("name", ["table", "weights", "tops", "scale"])
def test_backward_checks_what_it_is_given(name):
    x, target = logits((2, 3, 10)), labels((2, 3, 10), 3)
    _, scale, table, weights, tops, _ = triton_ops.lovasz_histogram_forward(
        x, target, None, True, False, None, None, SOFTMAX, 1, False
    )
    given = {"table": table, "weights": weights, "tops": tops, "scale": scale}
    wild = {**given, "table": torch.full_like(table, -1)}  # stays within the weights
    triton_ops.lovasz_histogram_backward(torch.ones(()), x, target, *wild.values(), SOFTMAX, False, None, 1)
    given[name] = given[name].flatten()[:-1].clone()
    with pytest.raises(ValueError, match="expected"):
        triton_ops.lovasz_histogram_backward(torch.ones(()), x, target, *given.values(), SOFTMAX, False, None, 1)


# ---- for GPUs


def launches():
    """The launches of all operators, over types, layouts and numbers of classes: see tests/offline.py."""
    from offline import recorded

    from veerloss.triton import histogram, lovasz

    warnings.filterwarnings("ignore")
    cases = [(torch.float32, 19, errors) for errors in (SOFTMAX, PROBABILITIES, HINGE)]
    cases += [(dtype, classes, SOFTMAX) for dtype, classes in ((torch.float32, 2), (torch.float32, 150), (torch.float64, 19))]
    cases += [(torch.bfloat16, 19, SOFTMAX), (torch.float32, 2, PROBABILITIES)]
    for dtype, classes, errors in cases:
        x = torch.empty((2, classes, 4096), dtype=dtype)
        target = torch.zeros((2, 4096), dtype=torch.int64 if dtype != torch.bfloat16 else torch.uint8)
        if dtype == torch.bfloat16:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        values = torch.zeros(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        selected = torch.ones(classes, dtype=torch.bool)
        if errors == HINGE:
            x, values, selected = x[:, :1], values[:1], selected[:1]
        name = f"{('softmax', 'probabilities', 'hinge')[errors]} {dtype} C={x.size(1)}"
        one, scale = torch.ones((), dtype=dtype), values.new_zeros(x.size(1))
        options = (errors, selected, True, False, values, 255, 1, True, False)
        yield from recorded(name, lambda: lovasz._forward(x, target, *options))  # noqa: B023
        kept = values.new_zeros(x.numel())
        yield from recorded(name, lambda: lovasz._backward(one, x, kept, scale, errors, False, 1))  # noqa: B023
        cells, bins = _histogram.cells_and_bins(errors)
        table = torch.full((1, x.size(1), cells), 1 << 16 | 1, dtype=torch.int32)
        counts = torch.zeros((1, x.size(1), 2, bins), dtype=torch.int32)
        largest, units = torch.zeros((1, x.size(1), 2), dtype=torch.float64), torch.zeros(x.size(1), dtype=torch.float64)
        weights, tops = values.new_zeros(2 * x.size(1) * bins), values.new_zeros(2 * x.size(1))
        how = (errors, False, 255)
        weigh = (selected, True, values, errors, False, 1, False)
        for call in (
            lambda: histogram.lovasz_histogram_count(x, target, None, None, *how, True),  # noqa: B023
            lambda: histogram.lovasz_histogram_count(x, target, table, selected, *how, False),  # noqa: B023
            lambda: histogram.lovasz_histogram_place(counts, table, errors),  # noqa: B023
            lambda: histogram.lovasz_histogram_weigh(x, counts, largest, table, *weigh),  # noqa: B023
            lambda: histogram.lovasz_histogram_sum(x, target, table, weights, tops, units, *how),  # noqa: B023
            lambda: histogram.lovasz_histogram_backward(one, x, target, table, weights, tops, scale, *how, 1),  # noqa: B023
        ):
            yield from recorded(name, call)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiles_for_gpus_without_spilling():
    """In a process of its own: Triton decides on its interpreter when it is imported. For one GPU only, as it takes half a
    minute; without an argument this file compiles for those of offline.py."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__, "90"], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


if __name__ == "__main__":
    import offline

    if sys.argv[1:]:
        offline.CAPABILITIES = tuple(map(int, sys.argv[1:]))
    offline.RECORDED["veerloss.triton.lovasz"] = launches
    sys.exit(offline.main(["veerloss.triton.lovasz"]))
