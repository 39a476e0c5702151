"""Both focal losses at the edges of their domain, and what holds for every call; for all backends. See test_focal.py."""

import math

import pytest
import torch
from budget import check_loss, evaluate
from grid import DTYPES, labels, logits, over_focal, over_focal_kernels

import veerloss
from veerloss import ops, sigmoid_focal_loss, softmax_focal_loss


def sigmoid_dense(x, **options):
    return sigmoid_focal_loss(x, labels(x.shape, 2).unsqueeze(1).expand(x.shape).contiguous(), **options)


def sigmoid_index(x, **options):
    return sigmoid_focal_loss(x, labels(x.shape, 3), **options)


def softmax(x, **options):
    return softmax_focal_loss(x, labels(x.shape, 3), **options)


#: The public functions, where a test calls them with targets of its own.
over_functions = pytest.mark.parametrize("loss", [softmax_focal_loss, sigmoid_focal_loss], ids=lambda f: f.__name__)
over_losses = pytest.mark.parametrize("loss", [sigmoid_dense, sigmoid_index, softmax], ids=lambda f: f.__name__)


@over_focal
@over_losses
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(bad, loss, backend):
    x = logits((2, 3, 40))
    x[1, 2, 17] = bad
    value, gradient = evaluate(loss, x, backend=backend)
    assert value.isnan() and gradient[1, 2, 17].isnan()
    assert loss(x, reduction="none", backend=backend).isnan().sum() == 1


@over_focal
@over_functions
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(reduction, loss, backend):
    x, target = logits((2, 3, 40)), torch.full((2, 40), 255)
    x[0, 0, 0] = math.nan  # what is ignored may hold anything
    options = {"ignore_index": 255, "reduction": reduction, "backend": backend}
    cases = [(target, {})]
    if loss is softmax_focal_loss:
        cases.append((target, {"label_smoothing": 0.1}))
    else:
        cases.append((torch.full((2, 3, 40), 255), {}))
    if loss is sigmoid_focal_loss and backend != "reference":  # which multiplies
        cases.append((torch.full((2, 3, 40), 255.0), {"weight": torch.full((3,), math.inf)}))
    for t, more in cases:
        value, gradient = evaluate(loss, x, t, **options, **more)
        assert (value == 0).all() and (gradient == 0).all()
    if reduction == "mean":  # divided by the number of positives, 0, perhaps
        for normalizer in (torch.zeros(()), torch.tensor(0), torch.tensor(math.nan)):
            for t, more in cases:
                value, gradient = evaluate(loss, x, t, normalizer=normalizer, **options, **more)
                assert value == 0 and (gradient == 0).all()


@over_focal
@over_functions
def test_gradient_of_ignored_pixels_is_zero_whatever_comes_in(loss, backend):
    """NaN, where the caller divides by a number of positives that is 0."""
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=255)
    dense = torch.where((target == 255).unsqueeze(1), 255.0, torch.rand(2, 3, 40))
    softmax_cases = ((target, {}), (target, {"label_smoothing": 0.1}))
    for t, options in softmax_cases if loss is softmax_focal_loss else ((target, {}), (dense, {})):
        leaf = x.detach().requires_grad_()
        value = loss(leaf, t, ignore_index=255, reduction="none", backend=backend, **options)
        ignored = target == 255 if value.dim() == 2 else (target == 255).unsqueeze(1).expand(x.shape)
        gradient = torch.autograd.grad(value, leaf, torch.where(ignored, math.nan, 1.0))[0]
        assert torch.equal(gradient == 0, (target == 255).unsqueeze(1).expand(x.shape))


@over_focal
@over_functions
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0, 2)], ids=str)
def test_no_pixels(shape, loss, backend):
    x, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for t in (target, torch.zeros(shape)):  # for softmax class probabilities
        for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 3}):
            value, gradient = evaluate(loss, x, t, backend=backend, **options)
            assert value.sum() == 0 and gradient.shape == x.shape


@over_focal_kernels
@over_functions
@pytest.mark.parametrize("target_type", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_types_and_strides(target_type, loss, backend):
    x, target = logits((2, 3, 6, 8)), labels((2, 3, 6, 8), 3)
    strided = target.to(target_type).repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    check_loss(loss, x, strided, ignore_index=2, backend=backend)


def assert_out_of_range(loss, x, target, *, backend, **options):
    """An error, but for kernels of GPUs, which make the loss NaN."""
    if backend == "triton" or (backend == "native" and ops.NAMESPACES["native"] != "veerloss"):
        assert loss(x, target, backend=backend, **options).isnan()
    else:
        with pytest.raises(IndexError, match="target holds"):
            loss(x, target, backend=backend, **options)


@over_focal
@pytest.mark.parametrize("ignore_index", [-1, 255, 511, -(2**40)])
@pytest.mark.parametrize("target_type", [torch.uint8, torch.int32], ids=str)
def test_ignore_index_is_not_wrapped_to_the_type_of_the_target(target_type, ignore_index, backend):
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3).to(target_type)
    dense = labels((2, 2, 120), 2).reshape(2, 3, 40).to(target_type)
    for function, t in ((softmax_focal_loss, target), (sigmoid_focal_loss, target), (sigmoid_focal_loss, dense)):
        expected = function(x, t, ignore_index=None, backend=backend)
        assert torch.equal(function(x, t, ignore_index=ignore_index, backend=backend), expected)
        wrapped = torch.full_like(t, 255)
        if ignore_index == 255:
            assert function(x, wrapped, ignore_index=ignore_index, backend=backend) == 0
        else:
            assert_out_of_range(function, x, wrapped, ignore_index=ignore_index, backend=backend)


@over_focal
def test_values_are_ignored_before_they_are_rounded(backend):
    almost = torch.full((4,), 1 - 1e-11, dtype=torch.float64)
    assert sigmoid_focal_loss(torch.zeros(4), almost, ignore_index=1, backend=backend) > 0


@over_focal
@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [(torch.float16, 2049), (torch.float16, 70000), (torch.bfloat16, 257), (torch.float32, 2**24 + 1)],
    ids=str,
)  # as this type they are 2048, infinity, 256, 2^24
def test_ignore_index_is_not_rounded_to_the_type_of_the_target(dtype, ignore_index, backend):
    """What it would be rounded to is no value in [0, 1], and not ignored."""
    x, target = torch.zeros(4), torch.tensor([0, 1, 0.5, 1], dtype=dtype)
    expected = sigmoid_focal_loss(x, target, backend=backend)
    assert torch.equal(sigmoid_focal_loss(x, target, ignore_index=ignore_index, backend=backend), expected)
    target[1] = ignore_index
    assert_out_of_range(sigmoid_focal_loss, x, target, ignore_index=ignore_index, backend=backend)


@over_focal
def test_one_logit_of_no_dimension(backend):
    x, target = torch.tensor(0.3), torch.tensor(1.0)
    expected = sigmoid_focal_loss(x[None], target[None], alpha=0.25, reduction="none", backend=backend)[0]
    for alpha in (0.25, torch.tensor(0.25), torch.tensor([0.25])):
        loss = sigmoid_focal_loss(x, target, alpha=alpha, reduction="none", backend=backend)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)  # kernels on the CPU raise: test_arguments.py
@over_functions
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_a_target_out_of_range_is_nan_and_nothing_else(wrong, loss, backend):
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=-100)
    target[1, 7] = wrong
    dense = torch.rand(2, 3, 40)
    dense[1, 2, 7] = wrong
    pixel, element = (1, slice(None), 7), (1, 2, 7)
    softmax_cases = (
        (target, {}, pixel),
        (target, {"label_smoothing": 0.1, "alpha": torch.ones(3)}, pixel),
        (target, {"weight": torch.ones(2, 40)}, pixel),
    )
    sigmoid_cases = ((target, {"ignore_index": -100, "gamma": 0.0}, pixel), (dense, {"gamma": 0.5}, element))
    for t, options, nan in softmax_cases if loss is softmax_focal_loss else sigmoid_cases:
        assert loss(x, t, backend=backend, **options).isnan()
        values, gradient = evaluate(loss, x, t, reduction="none", backend=backend, **options)
        expected = torch.zeros(x.shape, dtype=torch.bool)
        expected[nan] = True
        assert torch.equal(gradient.isnan(), expected)
        assert torch.equal(values.isnan(), expected[:, 0] if values.dim() == 2 else expected)


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
@pytest.mark.parametrize("wrong", [-1e-3, math.inf, math.nan])
def test_no_probability_is_nan_and_nothing_else(wrong, backend):
    x, target = logits((2, 3, 40)), torch.rand(2, 3, 40)
    target[1, 2, 7] = wrong
    assert softmax_focal_loss(x, target, backend=backend).isnan()
    values, gradient = evaluate(softmax_focal_loss, x, target, reduction="none", backend=backend)
    expected = torch.zeros(2, 40, dtype=torch.bool)
    expected[1, 7] = True
    assert torch.equal(values.isnan(), expected)
    assert torch.equal(gradient.isnan(), expected.unsqueeze(1).expand(x.shape))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@over_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_native(dtype, loss, backend):
    """The same values as the other kernels, for normalizers and autocast too, and the same bits from run to run."""
    x = logits((2, 3, 40), dtype)
    for options in ({"normalizer": 7}, {"normalizer": torch.tensor([7.0]).bfloat16()}, {"reduction": "none"}):
        with torch.autocast("cpu", torch.bfloat16, enabled="normalizer" in options):
            first, native = (evaluate(loss, x, backend=b, **options) for b in (backend, "native"))
        torch.testing.assert_close(first, native)
    torch.testing.assert_close(evaluate(loss, x, backend=backend, **options), first, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@over_losses
def test_more_tiles_than_programs(loss, backend, monkeypatch):
    x = logits((2, 3, 40))  # 3 tiles to an image
    expected = evaluate(loss, x, backend=backend)
    for name, value in (("SIGMOID_TILE", 64), ("SOFTMAX_TILE", 64), ("MAX_PROGRAMS", 2)):
        monkeypatch.setattr(f"veerloss.triton._tuning.{name}", value)
    torch.testing.assert_close(evaluate(loss, x, backend=backend), expected, rtol=1e-6, atol=0)


def test_same_bits_for_any_number_of_threads(threads):
    x, target = logits((2, 5, 200, 200)), labels((2, 5, 200, 200), 5)
    for function in (softmax_focal_loss, sigmoid_focal_loss):
        results = [evaluate(function, x, target, gamma=1.5) for _ in threads(1, 2, 3, 7)]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_modules_are_the_functions():
    x, target = logits((2, 3, 8)), labels((2, 3, 8), 3)
    alpha = torch.tensor([0.2, 0.3, 0.5])
    module = veerloss.SoftmaxFocalLoss(alpha=alpha, gamma=1.0, reduction="sum")
    assert torch.equal(module(x, target), softmax_focal_loss(x, target, alpha=alpha, gamma=1.0, reduction="sum"))
    assert "gamma=1.0" in repr(module) and "alpha=Tensor[3]" in repr(module)
    assert "alpha" in module.state_dict()
    sigmoid = veerloss.SigmoidFocalLoss(alpha=0.25)
    assert torch.equal(sigmoid(x, target), sigmoid_focal_loss(x, target, alpha=0.25))
    assert repr(sigmoid).startswith("SigmoidFocalLoss(alpha=0.25, gamma=2.0")
