"""The focal losses, on every backend that has kernels of them, and their reference. One file, because both losses share the
tables of cases."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import check_loss, evaluate
from grid import (
    DTYPES,
    FEW_IMAGES,
    SHAPES,
    labels,
    layouts,
    logits,
    over_focal,
    over_focal_kernels,
    some_layouts,
)
from hypothesis import given
from hypothesis import strategies as st

from veerloss import sigmoid_focal_loss, softmax_focal_loss

# Kernels have a branch for 0, for 2 and for the others; below 1 the derivative of (1 - p)^gamma is infinite at p = 1.
GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
PER_CLASS = torch.rand(5, generator=torch.Generator().manual_seed(2))


# ---- softmax


@over_focal_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, FEW_IMAGES], ids=str)
def test_softmax_grid(shape, dtype, backend):
    target = labels(shape, shape[1], ignore_index=-100)
    check_loss(softmax_focal_loss, some_layouts(logits(shape, dtype), backend), target, backend=backend)


@over_focal_kernels
@pytest.mark.parametrize(
    "classes", [1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 32, 33, 64, 65, 96, 97, 103, 160, 161, 256, 257]
)
def test_softmax_numbers_of_classes(classes, backend):
    """Kernels on a GPU are compiled for ranges of them, and divide many among threads."""
    x, target = logits((2, classes, 45)), labels((2, classes, 45), classes, ignore_index=-100)
    check_loss(softmax_focal_loss, some_layouts(x, backend), target, backend=backend)
    x[:, : classes // 2] = -math.inf  # some threads have nothing but classes that are masked out
    target = torch.where(target < 0, target, target.clamp(min=classes // 2))
    for value in layouts(x).values():
        loss, gradient = evaluate(softmax_focal_loss, value, target, backend=backend)
        expected = evaluate(
            softmax_focal_loss, x[:, classes // 2 :], target - classes // 2, backend=backend, ignore_index=-100 - classes // 2
        )
        torch.testing.assert_close((loss, gradient[:, classes // 2 :]), expected)
        assert (gradient[:, : classes // 2] == 0).all()


@over_focal_kernels
@pytest.mark.parametrize("classes", [2, 5, 19, 32, 33, 150, 256])
@pytest.mark.parametrize("pixels", [30, 1100])
def test_softmax_rows_with_a_gap_between_images(pixels, classes, backend):
    """A block on a GPU has a run of pixels of one image, or of several if these are small."""
    x = logits((2, pixels + 5, classes))[:, :pixels].movedim(-1, 1)
    check_loss(softmax_focal_loss, x, labels(x.shape, classes, ignore_index=-100), backend=backend)


@over_focal_kernels
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("alpha", [None, 0.3, PER_CLASS], ids=["no alpha", "alpha", "class alpha"])
def test_softmax_options(alpha, smoothing, gamma, reduction, backend):
    shape = (2, 5, 9, 7)
    target = labels(shape, 5, ignore_index=255)
    for x in (logits(shape), layouts(logits(shape, torch.float64))["channels_last"]):
        check_loss(
            softmax_focal_loss, x, target, gamma=gamma, alpha=alpha, label_smoothing=smoothing, reduction=reduction,
            ignore_index=255, backend=backend,
        )  # fmt: skip


@over_focal
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 4), (4,)], ids=str)
def test_gamma_0_is_cross_entropy(shape, reduction, weighted, smoothing, backend):
    classes = shape[1] if len(shape) > 1 else shape[0]
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    x = torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.dim():
        target.view(-1)[::4] = -100
    expected = evaluate(F.cross_entropy, x, target, weight, label_smoothing=smoothing, reduction=reduction)
    options = {"gamma": 0.0, "alpha": weight, "label_smoothing": smoothing, "reduction": reduction, "backend": backend}
    torch.testing.assert_close(evaluate(softmax_focal_loss, x, target, **options), expected)


@over_focal
def test_softmax_value_by_hand(backend):
    x = torch.tensor([[math.log(0.2), math.log(0.3), math.log(0.5)]], dtype=torch.float64)
    loss = softmax_focal_loss(x, torch.tensor([1]), alpha=0.25, gamma=2.0, backend=backend)
    assert loss.item() == pytest.approx(-0.25 * 0.7**2 * math.log(0.3), rel=1e-12)


@over_focal
def test_softmax_mean_divides_by_valid_pixels_or_normalizer(backend):
    x, target = logits((2, 3, 10)), labels((2, 3, 10), 3, ignore_index=-100)
    total = softmax_focal_loss(x, target, reduction="sum", backend=backend)
    mean = softmax_focal_loss(x, target, backend=backend)
    torch.testing.assert_close(mean, total / (target != -100).sum())
    for seven in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7.0]).bfloat16()):
        torch.testing.assert_close(softmax_focal_loss(x, target, normalizer=seven, backend=backend), total / 7)


@over_focal_kernels
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scale", [20.0, 80.0, 1e4])
def test_softmax_confident_pixels_keep_their_digits(scale, gamma, backend):
    """p within 1e-9 of 1, where 1 - p in float32 is 0: right and wrong pixels."""
    x = logits((1, 4, 300), scale=scale)
    for target in (x.argmax(1), x.argmin(1)):
        for smoothing in (0.0, 0.1):
            options = {"gamma": gamma, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
            check_loss(softmax_focal_loss, x, target, **options)


@over_focal
def test_minus_infinity_masks_a_class(backend):
    x, target = logits((2, 4, 6)), labels((2, 4, 6), 3)
    x[:, 3] = -math.inf
    loss, gradient = evaluate(softmax_focal_loss, x, target, backend=backend)
    torch.testing.assert_close((loss, gradient[:, :3]), evaluate(softmax_focal_loss, x[:, :3], target, backend=backend))
    if backend != "reference":  # a kernel's gradient there is 0; PyTorch's formulas multiply by the infinite logit
        assert (gradient[:, 3] == 0).all()


@over_focal
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [512, 513, 5000])
def test_many_classes(classes, layout, backend, monkeypatch):
    """Triton goes block by block from 513 on, or, where classes are contiguous, in these tiles of 4096, 5000."""
    if backend == "triton":
        monkeypatch.setattr("veerloss.triton._tuning.SOFTMAX_TILE", 4096)
    shape = (1, classes, 3)
    x, target = logits(shape), labels(shape, classes, ignore_index=-100)
    x[:, :1024, 0] = -math.inf  # the first blocks of a pixel have nothing
    target[:, 0] = classes - 1
    if classes <= 1024:
        x[:, -1] = 0
    loss = softmax_focal_loss(layouts(x)[layout], target, gamma=0.0, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x, target), rtol=1e-6, atol=0)
    if backend != "reference":
        check_loss(softmax_focal_loss, layouts(x)[layout], target, backend=backend)


@over_focal_kernels
@pytest.mark.parametrize(
    ("classes", "layout"),
    [(512, "contiguous"), (512, "channels_last"), (513, "contiguous"), (513, "channels_last"), (5000, "channels_last")],
)  # (5000 contiguous classes are 5000 / 64 blocks, three times: slow in the interpreter)
def test_many_classes_smoothed(classes, layout, backend, monkeypatch):
    monkeypatch.setattr("veerloss.triton._tuning.SOFTMAX_TILE", 4096)
    x, target = logits((1, classes, 3)), labels((1, classes, 3), classes, ignore_index=-100)
    check_loss(softmax_focal_loss, layouts(x)[layout], target, label_smoothing=0.1, gamma=1.5, backend=backend)


@over_focal_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1000, 10_000, 250_000])
def test_equal_terms_of_many_classes(classes, smoothing, backend):
    """Their rounding errors do not cancel: one float32 sum would be off by 2e-5, 4e-4, 4e-3."""
    x, target = torch.zeros(1, classes, 3), torch.tensor([[0, classes // 2, classes - 1]])
    x[0, target[0, 1], 1] = 2.3
    x = layouts(x)["channels_last"]  # Triton: in blocks of thousands
    for gamma in (0.0, 2.0):
        options = {"gamma": gamma, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
        check_loss(softmax_focal_loss, x, target, **options)
        loss = softmax_focal_loss(x, target, **options)
        truth = softmax_focal_loss(x.double(), target, **options | {"backend": "reference"})
        torch.testing.assert_close(loss.double(), truth, rtol=3e-6, atol=0)


# ---- softmax: class probabilities


def probabilities(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """As a teacher or mixing of labels gives them; some are 0."""
    t = torch.rand(shape, generator=torch.Generator().manual_seed(5)).sub(0.3).clamp(min=0)
    return (t / t.sum(1 if len(shape) > 1 else 0, keepdim=True).clamp(min=0.1)).to(dtype)


@over_focal_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, FEW_IMAGES, (5,)], ids=str)
def test_probabilities_grid(shape, dtype, backend):
    check_loss(softmax_focal_loss, some_layouts(logits(shape, dtype), backend), probabilities(shape, dtype), backend=backend)


@over_focal_kernels
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [None, 0.3, PER_CLASS], ids=["no alpha", "alpha", "class alpha"])
def test_probabilities_options(alpha, smoothing, gamma, reduction, backend):
    shape = (2, 5, 9, 7)
    options = {"gamma": gamma, "alpha": alpha, "label_smoothing": smoothing, "reduction": reduction, "backend": backend}
    check_loss(softmax_focal_loss, logits(shape), probabilities(shape), **options)


@over_focal_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_any_type_and_strides(dtype, backend):
    x, target = logits((2, 3, 6, 8)), probabilities((2, 3, 6, 8), dtype)
    for t in (*layouts(target).values(), target[:1, :, :, :1].expand(x.shape)):
        check_loss(softmax_focal_loss, x, t, backend=backend)


@over_focal
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (7, 4), (4,)], ids=str)
def test_probabilities_at_gamma_0_are_cross_entropy(shape, reduction, weighted, smoothing, backend):
    classes = shape[1] if len(shape) > 1 else shape[0]
    weight = torch.rand(classes, dtype=torch.float64) if weighted else None
    x, target = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)  # sums that are not 1, too
    expected = evaluate(F.cross_entropy, x, target, weight, label_smoothing=smoothing, reduction=reduction)
    options = {"gamma": 0.0, "alpha": weight, "label_smoothing": smoothing, "reduction": reduction, "backend": backend}
    for ignore_index in (-100, 1, None):  # nothing to ignore
        actual = evaluate(softmax_focal_loss, x, target, ignore_index=ignore_index, **options)
        torch.testing.assert_close(actual, expected)


@over_focal
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_probabilities_are_their_index(smoothing, backend):
    x, index = logits((2, 5, 40), torch.float64), labels((2, 5, 40), 5)
    target = F.one_hot(index, 5).movedim(-1, 1).double()
    for gamma in (0.5, 2.0):
        options = {"alpha": PER_CLASS, "gamma": gamma, "label_smoothing": smoothing, "reduction": "none", "backend": backend}
        expected = evaluate(softmax_focal_loss, x, index, **options)
        torch.testing.assert_close(evaluate(softmax_focal_loss, x, target, **options), expected)


@over_focal_kernels
@pytest.mark.parametrize("scale", [20.0, 80.0, 1e4])
def test_probabilities_of_confident_pixels_keep_their_digits(scale, backend):
    x = logits((1, 4, 300), scale=scale)
    right = F.one_hot(x.argmax(1), 4).movedim(-1, 1).float()
    for target in (right, 0.9 * right + 0.025, probabilities(x.shape)):
        check_loss(softmax_focal_loss, x, target, reduction="none", backend=backend)


@over_focal
def test_a_masked_class_without_probability_adds_nothing(backend):
    x, target = logits((2, 4, 6)), probabilities((2, 4, 6))
    x[:, 3], target[:, 3] = -math.inf, 0
    loss, gradient = evaluate(softmax_focal_loss, x, target, backend=backend)
    expected = evaluate(softmax_focal_loss, x[:, :3], target[:, :3], backend=backend)
    torch.testing.assert_close((loss, gradient[:, :3]), expected)
    assert (gradient[:, 3] == 0).all()
    target[0, 3, 0] = 0.1
    assert softmax_focal_loss(x, target, backend=backend) == math.inf


@over_focal_kernels
def test_probabilities_of_many_classes(backend):
    shape = (1, 5000, 3)
    check_loss(softmax_focal_loss, layouts(logits(shape))["channels_last"], probabilities(shape), backend=backend)


# ---- softmax: pixel weights


@over_focal
@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("weight_shape", [(2, 5, 7), (5, 7), (2, 1, 1), ()], ids=str)
def test_pixel_weight(weight_shape, kind, backend):
    x = logits((2, 4, 5, 7))
    weight = torch.rand(weight_shape, generator=torch.Generator().manual_seed(6))
    target = labels(x.shape, 4, ignore_index=-100) if kind == "index" else probabilities(x.shape)
    valid = (target != -100) if kind == "index" else torch.ones(2, 5, 7, dtype=torch.bool)

    def expected(x, reduction, normalizer=None):
        losses = weight * softmax_focal_loss(x, target, alpha=0.5, reduction="none", backend=backend)
        divisor = valid.sum() if normalizer is None else normalizer
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / divisor

    for options in (
        {"reduction": "none"}, {"reduction": "sum"}, {"reduction": "mean"},
        {"reduction": "mean", "normalizer": 3}, {"reduction": "mean", "normalizer": torch.tensor(3.0)},
    ):  # fmt: skip
        actual = evaluate(softmax_focal_loss, x, target, alpha=0.5, weight=weight, backend=backend, **options)
        torch.testing.assert_close(actual, evaluate(expected, x, **options))


@over_focal_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_pixel_weight_of_any_type(reduction, dtype, backend):
    x, target = logits((3, 4, 50), dtype), labels((3, 4, 50), 4, ignore_index=-100)
    for weight in (torch.rand(3, 50).bfloat16(), torch.rand(50).double(), target > 1):
        check_loss(softmax_focal_loss, x, target, weight=weight, reduction=reduction, backend=backend)


@over_focal
def test_pixel_weight_of_ignored_pixels_may_be_anything(backend):
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3, ignore_index=7)
    weight = torch.where(target == 7, math.nan, 1.0)
    for normalizer in (None, torch.tensor(5.0)):
        options = {"ignore_index": 7, "normalizer": normalizer, "backend": backend}
        expected = evaluate(softmax_focal_loss, x, target, **options)
        torch.testing.assert_close(evaluate(softmax_focal_loss, x, target, weight=weight, **options), expected)
    options["normalizer"] = torch.tensor(0.0)
    loss, gradient = evaluate(softmax_focal_loss, x, torch.full_like(target, 7), weight=weight, **options)
    assert loss == 0 and (gradient == 0).all()


# ---- sigmoid

TARGETS = ["bool", "uint8", "int64", "float", "soft", "soft bfloat16", "index"]


def sigmoid_target(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Of each logit a value, or for "index" of each pixel a class."""
    generator = torch.Generator().manual_seed(3)
    if kind == "index":
        return labels(shape, shape[1])
    if kind.startswith("soft"):
        soft = torch.rand(shape, generator=generator)
        return soft.bfloat16() if kind.endswith("bfloat16") else soft
    hard = torch.randint(0, 2, shape, generator=generator)
    return {"bool": hard.bool(), "uint8": hard.byte(), "int64": hard, "float": hard.float()}[kind]


@over_focal_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("shape", [*SHAPES, FEW_IMAGES, (), (5,)], ids=str)
def test_sigmoid_grid(shape, kind, dtype, backend):
    options = {"alpha": 0.25, "backend": backend}
    if kind == "index":
        if len(shape) < 2 or shape[1] == 1:
            pytest.skip("no classes")
        target = labels(shape, shape[1], ignore_index=-100)
        options["ignore_index"] = -100
    else:
        target = sigmoid_target(kind, shape)
    check_loss(sigmoid_focal_loss, some_layouts(logits(shape, dtype), backend), target, **options)


@over_focal_kernels
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", TARGETS)
def test_sigmoid_options(kind, gamma, reduction, backend):
    shape = (2, 5, 9, 7)
    per_element = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    for options in (
        {"alpha": PER_CLASS},
        {"weight": PER_CLASS},
        {"alpha": 0.9, "weight": per_element},
        {"weight": per_element[:1, :1].bfloat16()},
        {"ignore_index": 1},
    ):
        more = {"gamma": gamma, "reduction": reduction, "backend": backend}
        check_loss(sigmoid_focal_loss, logits(shape), sigmoid_target(kind, shape), **options, **more)


@over_focal_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, PER_CLASS], ids=["alpha", "alpha of classes"])
@pytest.mark.parametrize("kind", ["soft", "int64", "index"])
def test_sigmoid_layouts_of_logits_and_target(kind, alpha, gamma, dtype, backend):
    """Vectors of 16 bytes, whose pixels are whole images (or not), and memory that does not begin where a vector may."""
    for shape in ((3, 5, 8, 13), (3, 5, 7, 13)):
        x, target = logits(shape, dtype), sigmoid_target(kind, shape)
        targets = [target] if kind == "index" else layouts(target).values()
        for t in targets:
            for moved in (False, True):
                options = {"alpha": alpha, "gamma": gamma, "ignore_index": 1, "backend": backend}
                found = {name: past_one(v) if moved else v for name, v in layouts(x).items()}
                check_loss(sigmoid_focal_loss, found, past_one(t) if moved else t, **options)


def past_one(x: torch.Tensor) -> torch.Tensor:
    """The same, laid out alike, one element further in memory."""
    memory = x.new_empty(1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1)
    return memory.as_strided(x.shape, x.stride(), 1).copy_(x)


@over_focal_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sigmoid_none_has_the_place_of_each_logit(memory_format, backend):
    x = logits((2, 3, 4, 5)).to(memory_format=memory_format)
    target = torch.rand(2, 3, 4, 5).to(memory_format=memory_format)
    loss = sigmoid_focal_loss(x, target, reduction="none", backend=backend)
    torch.testing.assert_close(loss, sigmoid_focal_loss(x, target, reduction="none", backend="reference"))


@over_focal
@given(
    x=st.floats(-30, 30),
    t=st.floats(0, 1),
    alpha=st.none() | st.floats(0, 1),
    gamma=st.sampled_from(GAMMAS),
)
def test_sigmoid_is_the_formula(backend, x, t, alpha, gamma):
    """torchvision's formula, soft targets included, in Python's own floats."""
    p = 1 / (1 + math.exp(-x))
    q = 1 / (1 + math.exp(x))
    bce = t * math.log1p(math.exp(-x)) + (1 - t) * math.log1p(math.exp(x))
    alpha_t = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    expected = alpha_t * bce * (p * (1 - t) + q * t) ** gamma
    logit, target = torch.tensor([x, t], dtype=torch.float64)
    actual = sigmoid_focal_loss(logit, target, alpha=alpha, gamma=gamma, backend=backend)
    assert actual.item() == pytest.approx(expected, rel=1e-11, abs=1e-300)


@over_focal
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_index_target_is_its_one_hot(reduction, backend):
    x, target = logits((2, 6, 50)), labels((2, 6, 50), 6)
    options = {"alpha": 0.25, "reduction": reduction, "backend": backend}
    expected = sigmoid_focal_loss(x, F.one_hot(target, 6).movedim(-1, 1), **options)
    torch.testing.assert_close(sigmoid_focal_loss(x, target, **options), expected)


@over_focal_kernels
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("background_index", "ignore_index"), [(6, -1), (-1, None), (255, 6), (-(2**40), 255)])
def test_background_index_is_negative_in_every_class(background_index, ignore_index, reduction, backend):
    shape = (2, 6, 5, 10)
    target = labels(shape, 6, ignore_index=background_index)
    options = {"alpha": 0.25, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    if ignore_index is not None:
        target.view(-1)[::7] = ignore_index
    dense = F.one_hot(torch.where((target >= 0) & (target < 6), target, 6), 7)[..., :6].movedim(-1, 1).float()
    if ignore_index is not None:
        dense = torch.where((target == ignore_index).unsqueeze(1), torch.tensor(float(ignore_index)), dense)
    for x in some_layouts(logits(shape), backend).values():
        expected = evaluate(sigmoid_focal_loss, x, dense, **options)
        actual = evaluate(sigmoid_focal_loss, x, target, background_index=background_index, **options)
        torch.testing.assert_close(actual, expected)
    check_loss(sigmoid_focal_loss, logits(shape), target, background_index=background_index, **options)


@over_focal
def test_background_index_of_one_class(backend):
    x, target = logits((3, 1, 40)), labels((3, 2, 40), 2)
    expected = sigmoid_focal_loss(x, 1 - target.unsqueeze(1), alpha=0.25, backend=backend)
    loss = sigmoid_focal_loss(x, target, background_index=1, alpha=0.25, backend=backend)
    torch.testing.assert_close(loss, expected)


@over_focal_kernels
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigmoid_is_finite_for_every_finite_logit(dtype, gamma, backend):
    """Public code takes (1 - p)^(gamma - 1), NaN for 0 < gamma < 1 on confident logits."""
    x = torch.tensor([-6e4, -100, -87.4, -87.3, -20, -1, -0.0, 0, 1, 20, 100, 6e4], dtype=dtype)
    for value in (0.0, 1.0, 0.3):
        check_loss(sigmoid_focal_loss, x, torch.full((12,), value), gamma=gamma, reduction="none", backend=backend)


@over_focal_kernels
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_sigmoid_relative_error_of_each_element(value, backend):
    """No element is lost behind larger ones, as in the norms of the accuracy policy."""
    x, target = torch.linspace(-80, 80, 4001), torch.full((4001,), value)
    actual = evaluate(sigmoid_focal_loss, x, target, gamma=0.0, reduction="none", backend=backend)
    expected = evaluate(sigmoid_focal_loss, x.double(), target, gamma=0.0, reduction="none", backend="reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=4e-7, atol=0)
