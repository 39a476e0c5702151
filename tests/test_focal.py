import math

import pytest
import torch
import torch.nn.functional as F
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from hypothesis import given
from hypothesis import strategies as st

import veerloss
from veerloss import sigmoid_focal_loss, softmax_focal_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param


# ---- softmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_grid(shape, dtype):
    target = labels(shape, shape[1], ignore_index=-100)
    for x in layouts(logits(shape, dtype)).values():
        check_loss(softmax_focal_loss, x, target)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_options(gamma, smoothing, reduction):
    shape = (2, 5, 9, 7)
    target = labels(shape, 5, ignore_index=255)
    for alpha in (None, 0.3, torch.rand(5, generator=torch.Generator().manual_seed(2))):
        check_loss(
            softmax_focal_loss, logits(shape), target, gamma=gamma, alpha=alpha, label_smoothing=smoothing, reduction=reduction,
            ignore_index=255,
        )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 4), (4,)], ids=str)
def test_gamma_0_is_cross_entropy(shape, reduction, weighted, smoothing, backend):
    classes = shape[1] if len(shape) > 1 else shape[0]
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[::4] = -100
    expected = F.cross_entropy(x, target, weight, label_smoothing=smoothing, reduction=reduction)
    actual = softmax_focal_loss(
        x, target, gamma=0.0, alpha=weight, label_smoothing=smoothing, reduction=reduction, backend=backend
    )
    torch.testing.assert_close(actual, expected)
    (a,), (e,) = (torch.autograd.grad(v.sum(), x) for v in (actual, expected))
    torch.testing.assert_close(a, e)


def test_softmax_value_by_hand(backend):
    x = torch.tensor([[math.log(0.2), math.log(0.3), math.log(0.5)]], dtype=torch.float64)
    loss = softmax_focal_loss(x, torch.tensor([1]), alpha=0.25, gamma=2.0, backend=backend)
    assert loss.item() == pytest.approx(-0.25 * 0.7**2 * math.log(0.3), rel=1e-12)


def test_softmax_mean_divides_by_valid_pixels_or_normalizer(backend):
    x, target = logits((2, 3, 10)), labels((2, 3, 10), 3, ignore_index=-100)
    total = softmax_focal_loss(x, target, reduction="sum", backend=backend)
    mean = softmax_focal_loss(x, target, backend=backend)
    torch.testing.assert_close(mean, total / (target != -100).sum())
    for seven in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        torch.testing.assert_close(softmax_focal_loss(x, target, normalizer=seven, backend=backend), total / 7)


@pytest.mark.parametrize("scale", [20.0, 80.0, 1e4])
def test_softmax_confident_pixels_keep_their_digits(scale):
    """p within 1e-9 of 1, where 1 - p in float32 is 0: right and wrong pixels."""
    x = logits((1, 4, 300), scale=scale)
    for target in (x.argmax(1), x.argmin(1)):
        for gamma in GAMMAS:
            check_loss(softmax_focal_loss, x, target, gamma=gamma, reduction="none")
            check_loss(softmax_focal_loss, x, target, gamma=gamma, label_smoothing=0.1)


def test_minus_infinity_masks_a_class(backend):
    x = logits((2, 4, 6)).requires_grad_()
    target = labels((2, 4, 6), 3)
    masked = x.clone()
    masked[:, 3] = -math.inf
    loss = softmax_focal_loss(masked, target, backend=backend)
    torch.testing.assert_close(loss, softmax_focal_loss(x[:, :3], target, backend=backend))
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


# ---- sigmoid


def sigmoid_targets(shape):
    generator = torch.Generator().manual_seed(3)
    hard = torch.randint(0, 2, shape, generator=generator)
    targets = {"bool": hard.bool(), "uint8": hard.byte(), "int64": hard, "float": hard.float()}
    targets["soft"] = torch.rand(shape, generator=generator)
    targets["soft bfloat16"] = targets["soft"].bfloat16()
    if len(shape) > 1 and shape[1] > 1:
        targets["index"] = labels(shape, shape[1])
    return targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (), (5,)], ids=str)
def test_sigmoid_grid(shape, dtype):
    for target in sigmoid_targets(shape).values():
        for x in layouts(logits(shape, dtype)).values():
            check_loss(sigmoid_focal_loss, x, target, alpha=0.25)


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
            {"weight": per_element[:1, :1]},
            {"ignore_index": 1},
        ):
            check_loss(sigmoid_focal_loss, logits(shape), target, gamma=gamma, reduction=reduction, **options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sigmoid_none_has_the_place_of_each_logit(memory_format):
    x = logits((2, 3, 4, 5)).to(memory_format=memory_format)
    target = torch.rand(2, 3, 4, 5).to(memory_format=memory_format)
    loss = sigmoid_focal_loss(x, target, reduction="none")
    torch.testing.assert_close(loss, sigmoid_focal_loss(x, target, reduction="none", backend="reference"))


@given(
    x=st.floats(-30, 30),
    t=st.floats(0, 1),
    alpha=st.none() | st.floats(0, 1),
    gamma=st.sampled_from(GAMMAS),
)
def test_sigmoid_is_the_formula(x, t, alpha, gamma):
    """torchvision's formula, soft targets included, in Python's own floats."""
    p = 1 / (1 + math.exp(-x))
    q = 1 / (1 + math.exp(x))
    bce = t * math.log1p(math.exp(-x)) + (1 - t) * math.log1p(math.exp(x))
    alpha_t = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    expected = alpha_t * bce * (p * (1 - t) + q * t) ** gamma
    for backend in ("native", "reference"):
        actual = sigmoid_focal_loss(
            torch.tensor(x, dtype=torch.float64),
            torch.tensor(t, dtype=torch.float64),
            alpha=alpha,
            gamma=gamma,
            backend=backend,
        )
        assert actual.item() == pytest.approx(expected, rel=1e-11, abs=1e-300)


def test_index_target_is_its_one_hot(backend):
    x, target = logits((2, 6, 50)), labels((2, 6, 50), 6)
    one_hot = F.one_hot(target, 6).movedim(-1, 1)
    for reduction in ("none", "mean", "sum"):
        by_index = sigmoid_focal_loss(x, target, alpha=0.25, reduction=reduction, backend=backend)
        torch.testing.assert_close(by_index, sigmoid_focal_loss(x, one_hot, alpha=0.25, reduction=reduction, backend=backend))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_is_finite_for_every_finite_logit(gamma, dtype):
    """Public code takes (1 - p)^(gamma - 1), NaN for 0 < gamma < 1 on confident logits."""
    x = torch.tensor([-6e4, -100, -20, -1, 0, 1, 20, 100, 6e4], dtype=dtype)
    for target in (torch.zeros(9), torch.ones(9), torch.full((9,), 0.3)):
        check_loss(sigmoid_focal_loss, x, target, gamma=gamma, reduction="none")


# ---- both


def losses():
    dense = lambda x, **o: sigmoid_focal_loss(x, (labels(x.shape, 2).unsqueeze(1)).expand(x.shape).contiguous(), **o)  # noqa: E731
    index = lambda x, **o: sigmoid_focal_loss(x, labels(x.shape, 3), **o)  # noqa: E731
    softmax = lambda x, **o: softmax_focal_loss(x, labels(x.shape, 3), **o)  # noqa: E731
    return {"sigmoid dense": dense, "sigmoid index": index, "softmax": softmax}


@pytest.mark.parametrize("loss", losses())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(loss, bad, backend):
    x = logits((2, 3, 40)).requires_grad_()
    with torch.no_grad():
        x[1, 2, 17] = bad
    value = losses()[loss](x, backend=backend)
    assert value.isnan()
    value.backward()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(reduction, backend):
    x = logits((2, 3, 40))
    x[0, 0, 0] = math.nan  # what is ignored may hold anything
    x.requires_grad_()
    target = torch.full((2, 40), 255)
    for loss in (
        softmax_focal_loss(x, target, ignore_index=255, reduction=reduction, backend=backend),
        softmax_focal_loss(x, target, ignore_index=255, label_smoothing=0.1, reduction=reduction, backend=backend),
        sigmoid_focal_loss(x, target, ignore_index=255, reduction=reduction, backend=backend),
        sigmoid_focal_loss(x, torch.full_like(x, 255).detach(), ignore_index=255, reduction=reduction, backend=backend),
    ):
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0, 2)], ids=str)
def test_no_pixels(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        for loss in (
            softmax_focal_loss(x, target, reduction=reduction, backend=backend),
            softmax_focal_loss(x, target, normalizer=3, backend=backend),
            sigmoid_focal_loss(x, target, reduction=reduction, backend=backend),
            sigmoid_focal_loss(x, torch.zeros(shape), reduction=reduction, backend=backend),
        ):
            assert loss.sum() == 0
            assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_types_and_strides(dtype):
    x, target = logits((2, 3, 6, 8)), labels((2, 3, 6, 8), 3)
    strided = target.to(dtype).repeat_interleave(2, -1)[..., ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(softmax_focal_loss(x, strided), softmax_focal_loss(x, target))
    torch.testing.assert_close(sigmoid_focal_loss(x, strided), sigmoid_focal_loss(x, target))


def test_same_bits_for_any_number_of_threads():
    x, target = logits((2, 5, 200, 200)), labels((2, 5, 200, 200), 5)
    before = torch.get_num_threads()
    try:
        for function in (softmax_focal_loss, sigmoid_focal_loss):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                value = x.clone().requires_grad_()
                loss = function(value, target, gamma=1.5)
                results.append((loss.detach(), torch.autograd.grad(loss, value)[0]))
            for loss, gradient in results[1:]:
                assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_many_classes(backend):
    x, target = logits((1, 5000, 3)), labels((1, 5000, 3), 5000)
    torch.testing.assert_close(
        softmax_focal_loss(x, target, gamma=0.0, backend=backend), F.cross_entropy(x, target), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("ignore_index", [-1, 255, 511, -(2**40)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_ignore_index_is_not_wrapped_to_the_type_of_the_target(dtype, ignore_index, backend):
    x = logits((2, 3, 40))
    target = labels((2, 3, 40), 3)
    dense = labels((2, 2, 3 * 40), 2).reshape(2, 3, 40)
    in_range = torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max
    expected = [softmax_focal_loss(x, target, backend=backend), sigmoid_focal_loss(x, dense, backend=backend)]
    for actual, value in zip(
        (
            softmax_focal_loss(x, target.to(dtype), ignore_index=ignore_index, backend=backend),
            sigmoid_focal_loss(x, dense.to(dtype), ignore_index=ignore_index, backend=backend),
        ),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(actual, value)
    if dtype == torch.uint8 and not in_range:
        for t in (torch.full((2, 40), 255, dtype=dtype), torch.full((2, 3, 40), 255, dtype=dtype)):
            with pytest.raises(IndexError, match="target holds 255"):
                sigmoid_focal_loss(x, t, ignore_index=ignore_index, backend=backend)


def test_values_are_ignored_before_they_are_rounded(backend):
    x = torch.zeros(4)
    almost = torch.full((4,), 1 - 1e-11, dtype=torch.float64)
    assert sigmoid_focal_loss(x, almost, ignore_index=1, backend=backend) > 0


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
