"""The region losses, on every backend that has kernels of them, and their reference. One file, because every test is of all."""

import itertools
import math

import pytest
import torch
from budget import check_loss, evaluate
from grid import DTYPES, SHAPES, labels, layouts, logits, over_region, over_region_kernels
from hypothesis import given
from hypothesis import strategies as st

import veerloss
from veerloss import DiceLoss, dice_loss, jaccard_loss, lovasz_softmax_loss, tversky_loss
from veerloss.ops import operators

ACTIVATIONS = ("softmax", "sigmoid", "none")
over_activations = pytest.mark.parametrize("activation", ACTIVATIONS)
over_targets = pytest.mark.parametrize("kind", ["index", "one-hot", "soft", "bool"])
FORMS = [("linear", 1.0), ("linear", 0.75), ("linear", 2.0), ("log", 1.0), ("log", 0.3), ("log_cosh", 1.0)]


def case(shape, activation, kind="index", dtype=torch.float32, ignore_index=None):
    """(what the loss takes for logits, its target)."""
    x = logits(shape, torch.float32)
    x = (x.softmax(1) if activation == "none" else x).to(dtype)
    classes = shape[1]
    index = labels(shape, 2 if classes == 1 and activation != "softmax" else classes, ignore_index=ignore_index)
    if kind == "index":
        return x, index
    generator = torch.Generator().manual_seed(5)
    if kind == "soft":
        y = torch.rand(shape, generator=generator)
    else:
        y = (index.clamp(0, classes - 1)[:, None] == torch.arange(classes).view(-1, *[1] * (len(shape) - 2))).float()
        y = y.bool() if kind == "bool" else y
    if ignore_index is not None and activation != "softmax" and kind != "bool":
        y.movedim(1, -1).reshape(-1)[::7] = ignore_index
        y = y.flatten().index_fill(0, torch.arange(0, y.numel(), 7), ignore_index).view(shape)
    return x, y


def by_hand(p, t, alpha, beta, smooth):
    """1 - TI of [P] probabilities and targets, float64, in another order of operations: by true and false positives."""
    p, t = p.double(), t.double()
    hit, false_positive, false_negative = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
    return 1 - (hit + smooth) / (hit + alpha * false_positive + beta * false_negative + smooth)


# ---- against float64


@over_region_kernels
@over_activations
@over_targets
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(shape, dtype, kind, activation, backend):
    ignored = 255 if kind == "index" else None
    x, y = case(shape, activation, kind, dtype, ignored)
    options = {"ignore_index": ignored, "activation": activation, "backend": backend}
    check_loss(dice_loss, layouts(x), y, **options)
    check_loss(tversky_loss, x, y, alpha=0.3, beta=0.7, per_image=True, reduction="none", **options)


@over_region_kernels
@over_activations
@pytest.mark.parametrize("form, exponent", FORMS)
@pytest.mark.parametrize("squared", [False, True], ids=["", "squared"])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("smooth", [0.0, 1.0, (0.0, 1e-3)], ids=str)
def test_forms(smooth, kind, squared, form, exponent, activation, backend):
    x, y = case((2, 5, 31, 33), activation, kind)
    check_loss(
        jaccard_loss, x, y, smooth=smooth, squared=squared, form=form, exponent=exponent, activation=activation, backend=backend
    )


@over_region_kernels
@over_activations
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
@pytest.mark.parametrize("classes", ["present", "all", [1], (4, 0, 3)], ids=str)
def test_options(classes, per_image, weighted, reduction, activation, backend):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    x = logits(shape).softmax(1) if activation == "none" else logits(shape)
    check_loss(
        tversky_loss, x, target, alpha=0.3, beta=0.7, classes=classes, per_image=per_image, reduction=reduction,
        class_weight=torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]) if weighted else None, ignore_index=-1, activation=activation,
        backend=backend,
    )  # fmt: skip


@over_region_kernels
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("kind", ["one-hot", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_elements(dtype, kind, activation, backend):
    x, y = case((2, 3, 31, 33), activation, kind, ignore_index=255)
    assert (y == 255).any()
    check_loss(dice_loss, layouts(x.to(dtype)), y.to(dtype), activation=activation, ignore_index=255, backend=backend)


@over_region
@over_activations
def test_by_hand(activation, backend):
    x, y = case((2, 4, 9, 7), activation, dtype=torch.float64)
    p = {"softmax": x.softmax(1), "sigmoid": x.sigmoid(), "none": x}[activation]
    for alpha, beta, smooth in ((0.3, 0.7, 1e-5), (1.0, 1.0, 0.0), (2.0, 0.0, 1.0)):
        expected = [by_hand(p[:, c].flatten(), (y == c).flatten(), alpha, beta, smooth) for c in range(4)]
        options = {"alpha": alpha, "beta": beta, "smooth": smooth, "activation": activation, "backend": backend}
        found = tversky_loss(x, y, reduction="none", **options)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(tversky_loss(x, y, **options), torch.stack(expected).mean(), rtol=1e-12, atol=1e-14)


@over_region
def test_the_three_are_one(backend):
    x, y = case((2, 3, 9, 7), "softmax", dtype=torch.float64)
    pairs = [(dice_loss, 0.5, 0.5), (jaccard_loss, 1.0, 1.0), (jaccard_loss, 1, 1)]
    for loss, alpha, beta in pairs:
        expected = tversky_loss(x, y, alpha=alpha, beta=beta, smooth=1.0, backend=backend)
        torch.testing.assert_close(loss(x, y, smooth=2.0 if loss is dice_loss else 1.0, backend=backend), expected)
    # J = D / (2 - D) of the coefficients, without smoothing
    dice, jaccard = (1 - f(x, y, smooth=0, reduction="none", backend=backend) for f in (dice_loss, jaccard_loss))
    torch.testing.assert_close(jaccard, dice / (2 - dice))


@over_region
@given(seed=st.integers(0, 2**31 - 1), alpha=st.sampled_from([0.0, 0.3, 1.0]), hard=st.booleans())
def test_bounds_and_certainty(backend, seed, alpha, hard):
    """Between 0 and 1; 0 for a prediction that is right and certain, about 1 where it is wrong and certain."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (2, 30), generator=generator)
    x = torch.randn(2, 3, 30, generator=generator) * (50 if hard else 1)
    value = tversky_loss(x, y, alpha=alpha, beta=1 - alpha, backend=backend)
    assert 0 <= value <= 1
    sure = 200.0 * torch.nn.functional.one_hot(y, 3).movedim(-1, 1)
    assert tversky_loss(sure, y, alpha=alpha, beta=1 - alpha, backend=backend) == 0
    wrong = 200.0 * torch.nn.functional.one_hot((y + 1) % 3, 3).movedim(-1, 1)
    present = tversky_loss(wrong, y, alpha=0.5, beta=0.5, classes="present", smooth=0.0, backend=backend)
    assert present == pytest.approx(1)


@over_region_kernels
def test_soft_targets_of_0_and_1_are_labels(backend):
    for activation in ACTIVATIONS:
        x, y = case((2, 4, 31, 33), activation)
        hot = torch.nn.functional.one_hot(y, 4).movedim(-1, 1)
        options = {"activation": activation, "backend": backend}
        for dense in (hot, hot.float(), hot.bool(), hot.contiguous().bfloat16()):
            for one, other in zip(evaluate(dice_loss, x, y, **options), evaluate(dice_loss, x, dense, **options), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@over_region
def test_a_binary_mask(backend):
    x = logits((2, 1, 9, 7))
    mask = labels((2, 2, 9, 7), 2)
    losses = [jaccard_loss(x, y, activation="sigmoid", backend=backend) for y in (mask, mask[:, None], mask.bool()[:, None])]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    inverted = jaccard_loss(-x, 1 - mask, activation="sigmoid", backend=backend)
    assert (losses[0] - inverted).abs() > 1e-3, "Jaccard of foreground is not that of background"
    # with a background_index the only channel is class 0
    of_class = jaccard_loss(x, torch.where(mask == 1, 0, 7), activation="sigmoid", background_index=7, backend=backend)
    torch.testing.assert_close(of_class, losses[0])


# ---- the same bits


@over_region_kernels
@over_activations
def test_same_bits_for_any_number_of_threads_and_order_of_images(activation, backend, threads):
    x, y = case((4, 5, 67, 71), activation)
    found = []
    for _ in threads(1, 2, 3):
        found.append(evaluate(dice_loss, x, y, activation=activation, backend=backend))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1])
    order = [2, 0, 3, 1]
    loss, gradient = evaluate(dice_loss, x[order], y[order], activation=activation, backend=backend)
    assert torch.equal(loss, found[0][0]) and torch.equal(gradient, found[0][1][order])


@over_region_kernels
def test_sums_of_parts_are_those_of_the_whole(backend):
    """Whatever the parts: their integers add up to the same."""
    ops = operators(backend)
    x, y = case((5, 3, 40, 41), "softmax")
    x, y = x.flatten(2), y.flatten(1)
    options = {"activation": 0, "squared": False, "per_image": False, "ignore_index": None, "background_index": None}
    weigh = {
        "selected": None, "present": False, "per_image": False, "class_weight": None, "alpha": 0.5, "beta": 0.5,
        "smooth_numerator": 0.0, "smooth_denominator": 0.0, "form": 0, "exponent": 1.0, "reduction": 0, "upcast_loss": False,
    }  # fmt: skip
    whole = ops.region_weigh(logits=x, sums=ops.region_sum(logits=x, target=y, **options), **weigh)
    for cuts in ([1, 1, 3], [4, 1], [2, 2, 1]):
        parts = [ops.region_sum(logits=a, target=b, **options) for a, b in zip(x.split(cuts), y.split(cuts), strict=True)]
        for one, other in zip(ops.region_weigh(logits=x, sums=sum(parts), **weigh), whole, strict=True):
            assert torch.equal(one, other)


# ---- edges


@over_region
@over_activations
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_valid_is_zero_with_zero_gradient(reduction, per_image, activation, backend):
    x, y = case((2, 3, 5, 4), activation)
    loss, gradient = evaluate(
        dice_loss, x * float("nan"), torch.full_like(y, 255), ignore_index=255, per_image=per_image, reduction=reduction,
        activation=activation, backend=backend,
    )  # fmt: skip
    assert not loss.any() and not gradient.any()


@over_region
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 3, 0, 4)], ids=str)
def test_empty(shape, backend):
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    loss, gradient = evaluate(dice_loss, torch.zeros(shape), y, backend=backend)
    assert loss == 0 and gradient.shape == shape


@over_region
@over_activations
def test_a_class_that_is_nowhere(activation, backend):
    """Smooth 0, neither in the target nor in the prediction: its index is 1, its gradient 0."""
    x = torch.zeros(1, 3, 8) if activation == "none" else torch.full((1, 3, 8), -200.0)
    x[:, 0] = 1.0 if activation == "none" else 200.0
    y = torch.zeros(1, 8, dtype=torch.long)
    loss, gradient = evaluate(dice_loss, x, y, smooth=0.0, activation=activation, reduction="none", backend=backend)
    assert not loss.any() and gradient.isfinite().all() and not gradient[:, 1:].any()
    assert evaluate(dice_loss, x, y, smooth=0.0, form="log", exponent=0.3, activation=activation, backend=backend)[0] == 0


@over_region
def test_no_gradient_beneath_the_logarithm(backend):
    """The index is 0: the loss is finite, and so is the gradient."""
    p, y = torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor([[1, 1, 0]])
    loss, gradient = evaluate(dice_loss, p, y, form="log", smooth=0.0, activation="none", backend=backend)
    assert loss == pytest.approx(-math.log(1e-7)) and not gradient.any()


@over_region
@over_activations
def test_nan_in_nan_out(activation, backend):
    x, y = case((2, 3, 40), activation)
    x[1, 1, 3] = float("nan")
    loss = dice_loss(x, y, activation=activation, reduction="none", backend=backend)
    assert loss[1].isnan() and (activation == "softmax" or loss[[0, 2]].isfinite().all())
    soft = torch.full(x.shape, 0.5)
    soft[0, 2, 1] = float("nan")
    loss = dice_loss(logits(x.shape), soft, activation="sigmoid", reduction="none", backend=backend)
    assert loss[2].isnan() and loss[:2].isfinite().all()
    y[1, 3] = 255
    clean = dice_loss(x, y, activation=activation, ignore_index=255, backend=backend)
    assert clean.isfinite()


@over_region
def test_infinite_logits(backend):
    x, y = case((1, 3, 40), "softmax")
    y = y % 2
    x[:, 2] = -math.inf  # masks a class out
    loss, gradient = evaluate(dice_loss, x, y, classes="present", backend=backend)
    expected = dice_loss(x[:, :2], y, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert not gradient[:, 2].any()
    x[:, 0, 0] = math.inf
    assert dice_loss(x, y, backend=backend).isnan()
    sure = torch.tensor([[[math.inf, -math.inf]]])
    assert dice_loss(sure, torch.tensor([[1, 0]]), activation="sigmoid", smooth=0.0, backend=backend) == 0


@over_region_kernels
def test_probabilities_outside_0_1_are_nan(backend):
    p, y = case((1, 2, 40), "none")
    p[0, 0, 3] = 1 + 2**-20  # a rounding
    assert dice_loss(p, y, activation="none", backend=backend).isfinite()
    for bad in (1.5, -0.1, 3e9):
        p[0, 0, 3] = bad
        assert dice_loss(p, y, activation="none", backend=backend).isnan()


@over_region_kernels
def test_many_pixels_keep_their_digits(backend):
    """2^24 pixels: a float32 sum of ones ends there, one of halves in bfloat16 at 128."""
    y = torch.zeros(1, 1 << 24, dtype=torch.uint8)
    y[:, ::2] = 1
    x = torch.zeros(1, 1, 1 << 24, dtype=torch.bfloat16)
    loss = dice_loss(x, y, activation="sigmoid", smooth=0.0, backend=backend).double()
    assert loss == 0.5


# ---- bad input


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"activation": "tanh"}, ValueError, r"activation must be one of \('softmax', 'sigmoid', 'none'\), got 'tanh'"),
        ({"form": "square"}, ValueError, "form must be one of"),
        ({"exponent": 0}, ValueError, r"exponent must be in \(0, inf\), got 0"),
        ({"form": "log_cosh", "exponent": 2.0}, ValueError, "exponent must be 1 with form='log_cosh', got 2.0"),
        ({"smooth": -1.0}, ValueError, r"smooth must be in \[0, inf\), got -1.0"),
        ({"smooth": (1.0, 2.0, 3.0)}, ValueError, "smooth must be a number or a pair of them"),
        ({"smooth": "1"}, TypeError, "smooth must be a number, got str"),
        ({"squared": 1}, TypeError, "squared must be True or False, got 1"),
        ({"classes": "some"}, ValueError, "classes must be one of"),
        ({"classes": [3]}, IndexError, r"classes holds 3, expected class ids in \[0, 3\)"),
        ({"class_weight": torch.ones(2)}, ValueError, r"class_weight must have the shape \[3\]"),
        ({"class_weight": 2.0}, TypeError, "class_weight must be a Tensor or None, got float"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"background_index": 1}, ValueError, "background_index must be no class"),
        ({"process_group": "world"}, TypeError, "process_group must be a torch.distributed.ProcessGroup or None, got str"),
    ],
    ids=str,
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), **options)


def test_bad_weights_of_tversky():
    for name in ("alpha", "beta"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\), got -0.5"):
            tversky_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), **{name: -0.5})


@pytest.mark.parametrize("backend", ["native", "reference"], indirect=True)  # kernels on a GPU cannot raise: see below
@pytest.mark.parametrize(
    "shape, target, options, words",
    [
        ((2, 3, 4), torch.full((2, 4), 3), {}, r"target holds 3, expected class indices in \[0, 3\)"),
        ((2, 3, 4), torch.full((2, 4), -1), {"ignore_index": 9}, r"target holds -1, .* or ignore_index=9"),
        ((2, 1, 4), torch.full((2, 4), 2), {"activation": "sigmoid"}, "target holds 2, expected 0 or 1"),
        ((2, 3, 4), torch.full((2, 3, 4), 1.5), {}, r"target holds 1.5, expected values in \[0, 1\]"),
        (
            (2, 3, 4),
            torch.full((2, 3, 4), 2),
            {"activation": "sigmoid", "ignore_index": 255},
            "target holds 2, expected values",
        ),
    ],
    ids=str,
)
def test_bad_targets(shape, target, options, words, backend):
    with pytest.raises(IndexError, match=words):
        dice_loss(torch.zeros(shape), target, backend=backend, **options)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@over_activations
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 40, 33), (1, 300, 5)], ids=str)
@pytest.mark.parametrize("wrong", [-5, 300, 1 << 40])
@pytest.mark.parametrize("alone", [False, True], ids=["", "alone"])
def test_target_out_of_range_gives_nan(alone, wrong, shape, activation, backend):
    """Even where no class has foreground besides."""
    x, y = case(shape, activation)
    if alone:
        y.fill_(-1)
    y[-1, 3] = wrong
    common = {"ignore_index": -1, "activation": activation, "backend": backend}
    for options in ({}, {"classes": "present"}, {"classes": [1]}, {"per_image": True}, {"squared": True}):
        assert evaluate(dice_loss, x, y, **options, **common)[0].isnan()
    soft = torch.full(shape, 0.0 if alone else 0.5)
    soft[-1, 2, 3] = 1.5
    for classes in ("all", "present", [2]):
        assert dice_loss(x, soft, classes=classes, activation=activation, backend=backend).isnan()
    mask = torch.zeros(2, 40, dtype=torch.long)
    mask[1, 3] = wrong
    if activation != "softmax":
        assert dice_loss(torch.rand(2, 1, 40), mask, activation=activation, classes="present", backend=backend).isnan()


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"logits must have the shape \[N, C, \*\], got \[4\]"):
        dice_loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match=r"target must have the shape \[2, 4\]"):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TypeError, match="target must hold class indices"):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="ignore_index is for class indices with activation='softmax', got 255"):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), ignore_index=255)
    with pytest.raises(ValueError, match="background_index is for a target of class indices"):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), background_index=-1, activation="sigmoid")


def test_backends_without_kernels():
    with pytest.raises(RuntimeError, match="region losses have no Triton kernels"):
        dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), backend="triton")


# ---- modules, dtypes


def test_module():
    module = DiceLoss(classes=[1, 2], class_weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=255)
    x, y = case((2, 3, 9, 7), "softmax", ignore_index=255)
    expected = dice_loss(x, y, classes=[1, 2], class_weight=torch.tensor([1.0, 2.0, 3.0]), ignore_index=255)
    assert torch.equal(module(x, y), expected) and "class_weight" in dict(module.named_buffers())
    assert {veerloss.TverskyLoss.function, veerloss.JaccardLoss.function} == {tversky_loss, jaccard_loss}


@over_region
def test_autocast_and_types(backend):
    x, y = case((2, 3, 9, 7), "softmax", dtype=torch.bfloat16)
    assert dice_loss(x, y, backend=backend).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = evaluate(dice_loss, x, y, backend=backend)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16


@over_region
def test_descends_to_the_target(backend):
    """What it is for: a few steps of gradient descent raise the overlap that Lovász measures."""
    x, y = case((1, 3, 16, 16), "softmax")
    before = lovasz_softmax_loss(x, y)
    for _, loss in itertools.product(range(60), (dice_loss, jaccard_loss)):
        x = x - 200 * evaluate(loss, x, y, backend=backend)[1]
    assert lovasz_softmax_loss(x, y) < before / 2
