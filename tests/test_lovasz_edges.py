"""The Lovász losses at the edges of their domain, and what holds for every call; for all backends. See test_lovasz.py."""

import math

import pytest
import torch
from budget import evaluate
from grid import (
    DTYPES,
    labels,
    logits,
    lovasz_case,
    over_histogram,
    over_kinds,
    over_lovasz,
    over_lovasz_kernels,
    over_methods,
)

import veerloss
from veerloss import lovasz_hinge_loss, lovasz_softmax_loss, ops

# ---- edges


@over_lovasz
@over_methods
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_nan_and_infinity_give_nan(bad, channels, method, backend):
    x, target = logits((2, channels, 40)), labels((2, channels, 40), channels)
    x[1, channels - 1, 17] = bad
    binary = target.clamp(max=1).unsqueeze(1).expand(x.shape)
    common = {"method": method, "backend": backend}
    for function, value, t, options in (
        (lovasz_softmax_loss, x, target, {}),
        (lovasz_softmax_loss, x, target, {"from_logits": False}),
        (lovasz_hinge_loss, x, binary, {}),
        (lovasz_hinge_loss, -x, binary, {}),
    ):
        loss, gradient = evaluate(function, value, t, **options, **common)
        assert loss.isnan()
        if backend == "triton":
            assert gradient.isnan().any()


@over_lovasz
@over_methods
@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize(
    "dtype, bits",
    [(torch.float32, bits) for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)]
    + [(torch.float64, bits << 48) for bits in (0x7FF8, 0xFFF8)]
    + [(torch.float64, bits) for bits in (0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)],
    ids=lambda value: hex(value) if isinstance(value, int) else str(value),
)
def test_every_nan_is_one(dtype, bits, foreground, method, backend):
    """Whatever its bits: those of one are the key of an ignored pixel."""
    x, target = logits((1, 2, 5000), dtype), labels((1, 2, 5000), 2)
    target[0, 17] = int(foreground)
    size = 8 * x.element_size()
    x.view(torch.int32 if size == 32 else torch.int64)[0, 1, 17] = bits - (bits >> (size - 1) << size)
    assert x[0, 1, 17].isnan()
    common = {"method": method, "backend": backend}
    assert lovasz_softmax_loss(x, target, **common).isnan()
    assert lovasz_softmax_loss(x, target, from_logits=False, **common).isnan()
    assert lovasz_hinge_loss(x[:, 1], target, **common).isnan()


@over_lovasz
@over_methods
def test_exact_probabilities_have_no_gradient(method, backend):
    """|y - p| has slope 0 where p is right."""
    target = labels((2, 3, 50), 3)
    p = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    loss, gradient = evaluate(lovasz_softmax_loss, p, target, from_logits=False, method=method, backend=backend)
    assert loss == 0 and (gradient == 0).all()


@over_lovasz
@over_methods
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_all_ignored_is_zero_with_zero_gradient(per_image, reduction, method, backend):
    x, target = logits((2, 3, 40)), torch.full((2, 40), 255)
    x[0, :, 0] = math.nan  # what is ignored may hold anything
    common = {"ignore_index": 255, "per_image": per_image, "reduction": reduction, "method": method, "backend": backend}
    for function, value, options in (
        (lovasz_softmax_loss, x, {}),
        (lovasz_softmax_loss, x, {"classes": "all"}),
        (lovasz_softmax_loss, x, {"classes": "all", "from_logits": False}),
        (lovasz_hinge_loss, x[:, 0], {}),
    ):
        loss, gradient = evaluate(function, value, target, **options, **common)
        assert (loss == 0).all() and (gradient == 0).all()


@over_lovasz
@over_methods
@over_kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ignored_pixels_may_hold_anything(bad, kind, method, backend):
    x, target = logits((1, 2, 50)), labels((1, 2, 50), 2)
    target[0, 7] = 255
    loss, x, options = lovasz_case(kind, x)
    spoiled = x.clone()
    spoiled[..., 7] = bad
    common = {"ignore_index": 255, "method": method, "backend": backend}
    result = evaluate(loss, spoiled, target, **options, **common)
    torch.testing.assert_close(result, evaluate(loss, x, target, **options, **common), rtol=0, atol=0)
    exact = loss(x, target, ignore_index=255, method="exact", backend="reference", **options)
    torch.testing.assert_close(result[0], exact, rtol=1e-5, atol=1e-6)


@over_lovasz
@over_methods
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0, 2)], ids=str)
def test_no_pixels(shape, method, backend):
    x, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for per_image in (True, False):
        for reduction in ("mean", "sum", "none"):
            common = {"per_image": per_image, "reduction": reduction, "method": method}
            for function, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
                loss, gradient = evaluate(function, value, target, backend=backend, **common)
                assert loss.sum() == 0 and gradient.shape == value.shape
                assert loss.shape == function(value, target, backend="reference", **common).shape


@over_lovasz
@over_methods
def test_minus_infinity_masks_a_class(method, backend):
    x, target = logits((2, 4, 6)).requires_grad_(), labels((2, 4, 6), 3)
    masked = x.clone()
    masked[:, 3] = -math.inf
    loss = lovasz_softmax_loss(masked, target, method=method, backend=backend)
    torch.testing.assert_close(loss, lovasz_softmax_loss(x[:, :3], target, method=method, backend=backend))
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)  # kernels on the CPU raise: test_arguments.py
@over_methods
@pytest.mark.parametrize("wrong", [-5, 3, 255, 1 << 40])
@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
def test_target_out_of_range_gives_nan(alone, wrong, method, backend):
    """Even where no class has foreground besides."""
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3)
    if alone:
        target.fill_(-1)
    target[1, 17] = wrong
    common = {"ignore_index": -1, "method": method, "backend": backend}
    for options in ({}, {"classes": "all"}, {"classes": [1]}, {"from_logits": False}, {"per_image": True}):
        assert evaluate(lovasz_softmax_loss, x, target, **options, **common)[0].isnan()
    binary = torch.where(target >= 0, target.clamp(max=1), -1)
    binary[1, 17] = 2
    assert lovasz_hinge_loss(x[:, 0], binary, **common).isnan()


# ---- the same bits, and what is kept


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("kind", ["softmax", "hinge"])
def test_same_bits_in_every_run(kind, method, backend):
    x, target = logits((2, 3, 3000)), labels((2, 3, 3000), 2)
    loss, x, _ = lovasz_case(kind, x)
    first, second = (evaluate(loss, x, target, method=method, backend=backend) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@over_methods
@pytest.mark.parametrize("kind", ["softmax", "hinge"])
def test_same_bits_for_any_number_of_threads(kind, method, threads):
    x, target = logits((2, 3, 150_000)), labels((2, 3, 150_000), 2 if kind == "hinge" else 3)
    loss, x, options = lovasz_case(kind, x)
    if kind == "hinge":
        options["per_image"] = False
    results = [evaluate(loss, x, target, method=method, **options) for _ in threads(1, 2, 3, 5, 2)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@over_lovasz_kernels
@pytest.mark.parametrize("pixels", [100, 5000])
def test_without_gradient_nothing_is_kept(pixels, backend):
    x, target = logits((1, 3, pixels)), labels((1, 3, pixels), 3)
    with_gradient = lovasz_softmax_loss(x.clone().requires_grad_(), target, method="exact", backend=backend)
    with torch.no_grad():
        assert torch.equal(lovasz_softmax_loss(x.requires_grad_(), target, method="exact", backend=backend), with_gradient)
    arguments = {
        "logits": x.detach(), "target": target, "selected": None, "present": True, "per_image": False, "class_weight": None,
        "ignore_index": None, "background_index": None, "errors": 0, "reduction": 1, "valid_pixels": None,
        "upcast_loss": False,
    }  # fmt: skip
    loss, scale, kept = ops.operators(backend).lovasz_exact_forward(keep_weights=False, **arguments)
    assert kept.shape == (0,)
    *expected, kept = ops.operators(backend).lovasz_exact_forward(keep_weights=True, **arguments)
    assert kept.shape == (3, 1, pixels)
    torch.testing.assert_close([loss, scale], expected, rtol=0, atol=0)


@over_histogram
def test_certificates_of_empty_segments_and_of_nan(backend):
    """0 where there is no pixel, NaN where an error is not a number."""
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=255)
    x[0, 1, 7], target[0, 7], target[1] = math.nan, 0, 255
    options = {"ignore_index": 255, "per_image": True, "method": "histogram", "return_certificate": True, "backend": backend}
    _, certificate = lovasz_softmax_loss(x, target, classes="all", **options)
    assert certificate[0].isnan().all() and (certificate[1] == 0).all()
    binary = target.where(target == 255, target % 2)
    _, certificate = lovasz_hinge_loss(x[:, 1], binary, **options)
    assert certificate[0].isnan() and certificate[1] == 0


def test_modules_are_the_functions():
    x, target = logits((2, 3, 8)), labels((2, 3, 8), 3)
    module = veerloss.LovaszSoftmaxLoss(classes="all", per_image=True)
    assert torch.equal(module(x, target), lovasz_softmax_loss(x, target, classes="all", per_image=True))
    assert "classes='all'" in repr(module) and "per_image=True" in repr(module)
    hinge = veerloss.LovaszHingeLoss(per_image=False)
    assert torch.equal(hinge(x[:, 0], target.clamp(max=1)), lovasz_hinge_loss(x[:, 0], target.clamp(max=1), per_image=False))
    assert repr(hinge).startswith("LovaszHingeLoss(per_image=False")


@pytest.mark.parametrize("backend", ["native", "reference"])
@over_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float_target_of_minus_1_is_not_ignored(dtype, method, backend):
    """Targets in {-1, 1} are another convention: without an error their background would be lost."""
    x, target = logits((2, 1, 40))[:, 0], labels((2, 1, 40), 2).mul(2).sub(1).to(dtype)
    for ignore_index in (None, 255, -100, 0):
        with pytest.raises(IndexError, match="target holds -1"):
            lovasz_hinge_loss(x, target, ignore_index=ignore_index, method=method, backend=backend)
    loss = lovasz_hinge_loss(x, target, ignore_index=-1, method=method, backend=backend)
    foreground_alone = lovasz_hinge_loss(x, target.clamp(min=0), ignore_index=0, method=method, backend=backend)
    assert loss == foreground_alone
