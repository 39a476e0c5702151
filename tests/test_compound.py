"""Compound losses in one pass, against the sum of the references of their terms in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import SLACK, check_loss, evaluate
from grid import DTYPES, METHODS, SHAPES, labels, layouts, logits, over_compound, over_compound_kernels, over_methods
from hypothesis import given
from hypothesis import strategies as st

import veerloss
from veerloss import (
    CompoundLoss,
    compound_loss,
    dice_loss,
    lovasz_hinge_loss,
    lovasz_softmax_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
    tversky_loss,
)

ALL = {"focal": 0.7, "lovasz": 1.3, "dice": 0.5}
TERMS = [
    ALL,
    {"cross_entropy": 1.0, "lovasz": 1.0},
    {"lovasz": 2.0, "tversky": 1.0},
    {"cross_entropy": 1.0, "dice": 1.0},
    {"focal": 2.0},
    {"jaccard": 0.5},
    {"lovasz": 0.5},
]
over_terms = pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms))
#: Number of classes: in registers or not, and in sums of many.
CLASSES = (1, 2, 5, 8, 9, 70)


def check(x, y, terms, options, method, backend):
    """Against float64, by the accuracy policy; the method is that of the Lovász term."""
    method, chosen = (method, {"method": method}) if "lovasz" in terms else ("exact", {})
    check_loss(compound_loss, x, y, backend=backend, slack=SLACK[method], **terms, **options, **chosen)


# ---- against float64


#: The reference takes seconds for the tables of 150 classes, which are those of fewer.
GRID = [
    (shape, dtype, terms, method)
    for shape in SHAPES
    for dtype in DTYPES
    for terms in TERMS[:3]
    for method in METHODS
    if method == "exact" or shape[1] < 100 or (dtype, terms) == (torch.float32, ALL)
]


@over_compound_kernels
@pytest.mark.parametrize(("shape", "dtype", "terms", "method"), GRID, ids=str)
def test_grid(shape, dtype, terms, method, backend):
    check(logits(shape).to(dtype), labels(shape, shape[1], ignore_index=255), terms, {"ignore_index": 255}, method, backend)


@over_compound_kernels
@over_methods
@over_terms
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_terms(per_image, terms, method, backend):
    shape = (2, 5, 31, 33)
    check(layouts(logits(shape)), labels(shape, 5), terms, {"per_image": per_image}, method, backend)


@over_compound_kernels
@over_methods
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "gamma": 0.5},
        {"alpha": 0.3, "gamma": 0.0},
        {"alpha": "each", "gamma": 1.5},
        {"alpha": "each", "label_smoothing": 0.2, "gamma": 0.0},
    ],
    ids=str,
)
def test_focal_options(options, classes, method, backend):
    shape = (1, classes, 23, 29)
    if options.get("alpha") == "each":
        options = {**options, "alpha": torch.linspace(0.5, 1.5, classes)}
    check(logits(shape), labels(shape, classes, ignore_index=-100), ALL, {"ignore_index": -100, **options}, method, backend)


@over_compound_kernels
@over_methods
@pytest.mark.parametrize(
    "options",
    [
        {"region_classes": [1, 3], "lovasz_classes": "all"},
        {"region_classes": "present", "lovasz_classes": (4, 0)},
        {"smooth": (0.0, 1e-3)},
        {"form": "log", "exponent": 0.3},
        {"form": "log_cosh"},
        {"exponent": 0.75, "smooth": 1.0},
        {"tversky_alpha": 0.3, "tversky_beta": 0.7},
    ],
    ids=str,
)
def test_region_and_lovasz_options(options, method, backend):
    shape, region = (2, 5, 31, 33), "tversky" if "tversky_alpha" in options else "dice"
    y = labels(shape, 4)  # class 4 is absent
    check(logits(shape), y, {"cross_entropy": 1.0, "lovasz": 1.0, region: 2.0}, options, method, backend)


@over_compound_kernels
@over_methods
@over_terms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"ignore_index": 255}, {"per_image": True}], ids=str)
def test_binary(options, dtype, terms, method, backend):
    y = labels((2, 2, 31, 33), 2, ignore_index=options.get("ignore_index"))
    if {"focal", "cross_entropy"} & {*terms}:
        options = {**options, "alpha": 0.3}
    x = logits((2, 1, 31, 33)).to(dtype)
    check(x, y, terms, {"activation": "sigmoid", **options}, method, backend)


@over_compound
def test_shapes_of_a_mask(backend):
    x, y = logits((2, 31, 33)), labels((2, 2, 31, 33), 2)
    options = {**ALL, "activation": "sigmoid", "backend": backend}
    expected = compound_loss(x, y, **options)
    for logit, target in ((x[:, None], y), (x, y[:, None]), (x[:, None], y[:, None].bool()), (x, y.half())):
        torch.testing.assert_close(compound_loss(logit, target, **options), expected, rtol=0, atol=0)
    torch.testing.assert_close(compound_loss(x.flatten(), y.flatten(), **options), expected)


# ---- the sum of the parts


@over_compound
@over_methods
def test_parts_are_the_losses_alone(method, backend):
    shape = (2, 5, 31, 33)
    x, y, alpha = logits(shape).requires_grad_(), labels(shape, 5, ignore_index=255), torch.linspace(0.5, 1.5, 5)
    common = {"ignore_index": 255, "backend": backend}
    loss, parts = compound_loss(
        x, y, **ALL, method=method, alpha=alpha, gamma=1.5, region_classes=[1, 2], return_parts=True, **common
    )
    assert [*parts] == ["focal", "lovasz", "dice"] and not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(parts["focal"], softmax_focal_loss(x, y, alpha=alpha, gamma=1.5, **common).detach())
    # From the same integers.
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(parts["lovasz"], lovasz_softmax_loss(x, y, method=method, **common).detach(), **exact)
    torch.testing.assert_close(parts["dice"], dice_loss(x, y, classes=[1, 2], **common).detach(), **exact)
    torch.testing.assert_close(loss.detach(), sum(ALL[name] * part for name, part in parts.items()))


@over_compound
def test_parts_of_a_mask_are_the_losses_alone(backend):
    x, y = logits((2, 1, 31, 33)), labels((2, 2, 31, 33), 2)
    _, parts = compound_loss(x, y, **ALL, activation="sigmoid", alpha=0.3, return_parts=True, backend=backend)
    torch.testing.assert_close(parts["focal"], sigmoid_focal_loss(x, y[:, None], alpha=0.3, backend=backend))
    torch.testing.assert_close(parts["lovasz"], lovasz_hinge_loss(x, y, per_image=False, backend=backend), rtol=0, atol=0)
    torch.testing.assert_close(parts["dice"], dice_loss(x, y, activation="sigmoid", backend=backend), rtol=0, atol=0)


@over_compound
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_cross_entropy_is_that_of_pytorch(weighted, smoothing, backend):
    """Its mean divides by the sum of the labels' factors."""
    shape = (2, 5, 31, 33)
    x, y = logits(shape).double(), labels(shape, 5, ignore_index=-100)
    weight = torch.linspace(0.5, 1.5, 5, dtype=torch.float64) if weighted else None
    options = {"ignore_index": -100, "label_smoothing": smoothing}
    found = evaluate(compound_loss, x, y, cross_entropy=1.0, alpha=weight, backend=backend, **options)
    expected = evaluate(F.cross_entropy, x, y, weight=weight, **options)
    torch.testing.assert_close(found, expected)
    bce = evaluate(compound_loss, x[:, 0], y.clamp(0, 1), cross_entropy=1.0, activation="sigmoid", backend=backend)
    torch.testing.assert_close(bce, evaluate(F.binary_cross_entropy_with_logits, x[:, 0], y.clamp(0, 1).double()))


@over_compound
def test_a_weight_of_0_leaves_the_part(backend):
    """To be raised over the first epochs."""
    shape = (2, 3, 17)
    x, y = logits(shape), labels(shape, 3)
    loss, parts = compound_loss(x, y, cross_entropy=1.0, lovasz=0.0, return_parts=True, backend=backend)
    assert parts["lovasz"] > 0 and torch.equal(loss, parts["cross_entropy"])


@over_compound_kernels
@over_methods
@pytest.mark.parametrize("classes", [3, 20])
def test_gradients_of_a_softmax_add_up_to_zero(classes, method, backend):
    @given(st.integers(0, 2**31 - 1), st.floats(0, 60), st.sampled_from(TERMS))
    def run(seed, scale, terms):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, classes, 70, generator=generator) * scale
        y = torch.randint(0, classes, (2, 70), generator=generator)
        chosen = {"method": method} if "lovasz" in terms else {}
        loss, gradient = evaluate(compound_loss, x, y, backend=backend, **terms, **chosen)
        assert loss >= 0 and gradient.isfinite().all()
        assert (gradient.sum(1).abs() <= 4e-6 * gradient.abs().sum(1) + 1e-8).all()  # rounding of dL/dp, 0.02 at most

    run()


@over_compound_kernels
@over_methods
def test_confident_pixels_keep_their_digits(method, backend):
    """Where 1 - p is 1e-7, what focal adds at the label is no difference of two numbers near 1."""
    x, y = torch.zeros(1, 3, 1000), torch.zeros(1, 1000, dtype=torch.long)
    x[:, 0] = torch.linspace(10, 18, 1000)
    options = {"cross_entropy": 1.0, "lovasz": 1e-9, "dice": 1e-9, "method": method}
    truth = evaluate(compound_loss, x.double(), y, backend="reference", **options)[1]
    found = evaluate(compound_loss, x, y, backend=backend, **options)[1]
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)


@over_compound_kernels
@over_methods
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_same_bits_for_any_number_of_threads(activation, method, backend, threads):
    shape = (3, 6, 64, 65)
    x, y = logits(shape), labels(shape, 2 if activation == "sigmoid" else 6)
    x = x[:, :1].contiguous() if activation == "sigmoid" else x
    options = {**ALL, "method": method, "activation": activation, "backend": backend}
    results = [evaluate(compound_loss, x, y, **options) for _ in threads(1, 2, 3)]
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


# ---- edges


@over_compound
@over_methods
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_ignored_pixels_may_hold_anything(activation, method, backend):
    shape = (2, 1 if activation == "sigmoid" else 5, 31, 33)
    x, y = logits(shape), labels(shape, 2 if activation == "sigmoid" else 5, ignore_index=255)
    options = {**ALL, "method": method, "activation": activation, "ignore_index": 255, "backend": backend}
    expected = evaluate(compound_loss, x, y, **options)
    x = x.masked_fill((y == 255)[:, None], math.nan)
    loss, gradient = evaluate(compound_loss, x, y, **options)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
    assert (gradient.movedim(1, -1)[y == 255] == 0).all()


@over_compound
@over_methods
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_nothing_valid_is_zero(activation, method, backend):
    shape = (2, 1 if activation == "sigmoid" else 5, 7)
    x, y = logits(shape), torch.full((2, 7), 255)
    options = {**ALL, "method": method, "activation": activation, "ignore_index": 255, "backend": backend}
    loss, gradient = evaluate(compound_loss, x, y, **options)
    assert loss == 0 and (gradient == 0).all()


@over_compound
@over_methods
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (2, 3, 0, 4)], ids=str)
def test_empty(shape, method, backend):
    loss, gradient = evaluate(
        compound_loss, logits(shape), labels(shape, 3), **ALL, method=method, per_image=True, backend=backend
    )
    assert loss == 0 and gradient.shape == shape


@over_compound
@over_methods
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms))
def test_nan_in_nan_out(terms, activation, method, backend):
    shape = (2, 1 if activation == "sigmoid" else 5, 31)
    x, y = logits(shape), labels(shape, 2 if activation == "sigmoid" else 5)
    x[1, 0, 7] = math.nan
    chosen = {"method": method} if "lovasz" in terms else {}
    assert compound_loss(x, y, **terms, **chosen, activation=activation, backend=backend).isnan()


@over_compound
@over_methods
def test_a_class_that_is_masked_out(method, backend):
    """-inf in every pixel, and in no target: as if the class were not there."""
    shape = (2, 4, 31)
    x, y = logits(shape), labels(shape, 3)
    options = {**ALL, "method": method, "backend": backend, "region_classes": [0, 1, 2], "lovasz_classes": [0, 1, 2]}
    expected = evaluate(compound_loss, x[:, :3].contiguous(), y, **options)
    x[:, 3] = -math.inf
    loss, gradient = evaluate(compound_loss, x, y, **options)
    slack = {"rtol": 1e-3, "atol": 1e-6} if method == "histogram" else {}  # 4 classes have as many bins as 3, in other places
    torch.testing.assert_close(loss, expected[0], **slack)
    torch.testing.assert_close(gradient[:, :3], expected[1], **slack)
    assert (gradient[:, 3] == 0).all()


@over_compound
def test_one_pixel_and_one_class(backend):
    loss, gradient = evaluate(compound_loss, torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long), **ALL, backend=backend)
    assert loss == pytest.approx(0, abs=1e-12) and (gradient == 0).all()


@over_compound_kernels
def test_types_and_autocast(backend):
    shape = (2, 3, 17)
    x, y = logits(shape), labels(shape, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = compound_loss(x.bfloat16(), y, **ALL, return_parts=True, backend=backend)
    assert loss.dtype == torch.float32 and all(part.dtype == torch.float32 for part in parts.values())
    assert compound_loss(x.half(), y, **ALL, backend=backend).dtype == torch.float16
    assert compound_loss(x.double(), y, **ALL, return_parts=True, backend=backend)[1]["dice"].dtype == torch.float64


@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_compiles_as_a_whole(method):
    shape = (2, 3, 40)
    x, y = logits(shape), labels(shape, 3)
    options = {**ALL, "method": method, "return_parts": True}

    def training_step(x, y):
        loss, parts = compound_loss(x, y, **options)
        return loss + 0 * parts["dice"]

    compiled = torch.compile(training_step, backend="aot_eager", fullgraph=True)
    for found, expected in zip(evaluate(compiled, x, y), evaluate(training_step, x, y), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_weights_are_kept_without_a_gradient():
    x, y = logits((1, 3, 1000)), labels((1, 3, 1000), 3)
    assert torch.equal(
        compound_loss(x, y, **ALL, method="exact"), compound_loss(x.clone().requires_grad_(), y, **ALL, method="exact").detach()
    )


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "at least one term must have a weight"),
        ({"dice": -1.0}, ValueError, r"dice must be in \[0, inf\), got -1.0"),
        ({"dice": "1"}, TypeError, "dice must be a number, got str '1'"),
        ({"focal": 1, "cross_entropy": 0.5}, ValueError, "of cross_entropy, focal one at most .* cross_entropy=0.5, focal=1"),
        ({"dice": 1, "jaccard": 2}, ValueError, "of dice, tversky, jaccard one at most .* dice=1, jaccard=2"),
        ({"dice": 1, "gamma": 1.0}, ValueError, "gamma is an option of focal, got 1.0 without"),
        ({"cross_entropy": 1, "gamma": 1.0}, ValueError, "gamma is an option of focal"),
        ({"lovasz": 1, "alpha": 0.5}, ValueError, "alpha is an option of focal, cross_entropy, got 0.5"),
        ({"lovasz": 1, "smooth": 0.0}, ValueError, "smooth is an option of dice, tversky, jaccard"),
        ({"dice": 1, "tversky_alpha": 0.3}, ValueError, "tversky_alpha is an option of tversky"),
        ({"dice": 1, "method": "exact"}, ValueError, "method is an option of lovasz"),
        ({"focal": 1, "gamma": -1}, ValueError, "gamma must be in"),
        ({"focal": 1, "label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ({"focal": 1, "alpha": torch.ones(4)}, ValueError, r"alpha must have the shape \[3\]"),
        ({"lovasz": 1, "method": "sort"}, ValueError, "method must be one of"),
        ({"lovasz": 1, "lovasz_classes": [3]}, IndexError, "classes holds 3"),
        ({"dice": 1, "region_classes": []}, ValueError, "classes must hold at least one"),
        ({"dice": 1, "form": "log_cosh", "exponent": 2}, ValueError, "exponent must be 1"),
        ({"dice": 1, "activation": "none"}, ValueError, "activation must be one of"),
        ({"dice": 1, "per_image": 1}, TypeError, "per_image must be True or False"),
        ({"dice": 1, "return_parts": 1}, TypeError, "return_parts must be True or False"),
        ({"dice": 1, "ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ({"dice": 1, "backend": "triton"}, RuntimeError, "backend='triton' cannot run"),
    ],
    ids=str,
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        compound_loss(logits((2, 3, 10)), labels((2, 3, 10), 3), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_smoothing": 0.1, "focal": 1}, ValueError, "label_smoothing is for activation='softmax', got 0.1"),
        ({"region_classes": [0], "dice": 1}, ValueError, "region_classes is for activation='softmax'"),
        ({"alpha": torch.ones(1), "focal": 1}, TypeError, "alpha must be a number with activation='sigmoid'"),
        ({"alpha": 1.5, "focal": 1}, ValueError, r"alpha must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_bad_options_of_a_mask(options, error, words):
    with pytest.raises(error, match=words):
        compound_loss(logits((2, 1, 10)), labels((2, 1, 10), 1), activation="sigmoid", **options)


@over_compound
@over_methods
@over_terms
def test_bad_targets(terms, method, backend):
    x, y = logits((2, 3, 10)), labels((2, 3, 10), 3)
    y[1, 3] = 3
    chosen = {"method": method} if "lovasz" in terms else {}
    with pytest.raises(IndexError, match=r"target holds 3, expected class indices in \[0, 3\)"):
        compound_loss(x, y, **terms, **chosen, backend=backend)
    with pytest.raises(IndexError, match="target holds 3, expected 0 or 1"):
        compound_loss(x[:, :1], y.where(y == 3, 0), **terms, **chosen, activation="sigmoid", backend=backend)


def test_bad_shapes():
    x, y = logits((2, 3, 10)), labels((2, 3, 10), 3)
    with pytest.raises(ValueError, match=r"target must have the shape \[2, 10\]"):
        compound_loss(x, y[:1], dice=1.0)
    with pytest.raises(ValueError, match=r"for two-class logits .* use activation='softmax'"):
        compound_loss(x[:, :2], y, dice=1.0, activation="sigmoid")
    with pytest.raises(ValueError, match="per_image must be False for points"):
        compound_loss(x[0, 0], y[0], dice=1.0, activation="sigmoid", per_image=True)


def test_module():
    x, y, alpha = logits((2, 3, 10)), labels((2, 3, 10), 3), torch.linspace(0.5, 1.5, 3)
    module = CompoundLoss(cross_entropy=1.0, lovasz=1.0, tversky=0.5, tversky_alpha=0.3, alpha=alpha, return_parts=True)
    loss, parts = module(x, y)
    assert "alpha" in dict(module.named_buffers()) and "tversky=0.5" in repr(module)
    expected = tversky_loss(x, y, alpha=0.3, beta=0.5)
    torch.testing.assert_close(parts["tversky"], expected, rtol=0, atol=0)
    assert torch.equal(loss, veerloss.compound_loss(x, y, **module.options())[0])
