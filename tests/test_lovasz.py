"""The Lovász losses by both methods, on every backend that has kernels of them, and their reference. What only the method
"histogram" has is in test_histogram*.py. One file, because every test is of both."""

import math

import pytest
import torch
from budget import SLACK, check_loss, evaluate
from grid import (
    DTYPES,
    FEW_IMAGES,
    SHAPES,
    labels,
    layouts,
    logits,
    lovasz_case,
    over_kinds,
    over_lovasz,
    over_lovasz_kernels,
    over_methods,
    some_layouts,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from veerloss import lovasz, lovasz_hinge_loss, lovasz_softmax_loss
from veerloss.reference.lovasz import lovasz_weights


def sort_and_subtract(errors, foreground):
    """Berman's algorithm as published (alg. 1), in float64: the loss of one segment. Right as a value, not as a gradient."""
    errors, order = errors.double().sort(descending=True)
    fg = foreground[order].double()
    intersection = fg.sum() - fg.cumsum(0)
    union = fg.sum() + (1 - fg).cumsum(0)
    jaccard = 1 - intersection / union
    jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
    return (errors * jaccard).sum()


def binary_target(shape, *, ignore_index=None):
    return labels((shape[0], 2, *shape[1:]), 2, ignore_index=ignore_index)


# ---- against float64


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"classes": "all", "per_image": True}], ids=["", "all per image"])
@pytest.mark.parametrize("shape", [*SHAPES, FEW_IMAGES], ids=str)
def test_softmax_grid(shape, options, dtype, method, backend):
    target = labels(shape, shape[1], ignore_index=255)
    x = some_layouts(logits(shape, dtype), backend)
    common = {"ignore_index": 255, "method": method, "slack": SLACK[method], "backend": backend}
    check_loss(lovasz_softmax_loss, x, target, **options, **common)


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("from_logits", [False, True], ids=["probabilities", "softmax"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
@pytest.mark.parametrize("classes", ["present", "all", [1], (4, 0, 3)], ids=str)
def test_softmax_options(classes, per_image, from_logits, weighted, reduction, method, backend):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    x = logits(shape) if from_logits else logits(shape).softmax(1)
    # Triton's exponentials differ from the reference's in the last place, and here take a pixel to another bin.
    slack = SLACK[method] if backend == "triton" else 0.0
    check_loss(
        lovasz_softmax_loss, x, target, classes=classes, per_image=per_image, from_logits=from_logits, reduction=reduction,
        class_weight=torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]) if weighted else None, ignore_index=-1, method=method,
        slack=slack, backend=backend,
    )  # fmt: skip


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_probabilities(per_image, dtype, method, backend):
    p = logits((2, 5, 31, 33)).softmax(1).to(dtype)
    check_loss(
        lovasz_softmax_loss, some_layouts(p, backend), labels(p.shape, 5), from_logits=False, per_image=per_image,
        method=method, slack=SLACK[method], backend=backend,
    )  # fmt: skip


@over_lovasz
@over_methods
@pytest.mark.parametrize("factor", [1, -2])
def test_probabilities_outside_0_1_slope_as_the_error_does(factor, method, backend):
    """At 0, at 1, and outside, where the slope of |y - p| is told from the sign of the weight, not from that of the gradient
    that comes in."""
    p = torch.tensor([[[0.0, 1.0, 0.52, 0.41, -0.25, 1.37], [1.0, 0.0, 0.48, 0.44, 1.22, -0.33]]])
    options = {"from_logits": False, "class_weight": torch.tensor([1.0, float(factor)])}
    target = torch.tensor([[0, 0, 1, 1, 0, 1]])
    loss = lambda *args, **common: 1 - lovasz_softmax_loss(*args, **options, **common)  # noqa: E731
    _, gradient = evaluate(loss, p, target, method=method, backend=backend)
    _, expected = evaluate(loss, p.double(), target, method=method, backend="reference")
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-7)
    _, exact = evaluate(loss, p, target, method="exact", backend="reference")
    torch.testing.assert_close(gradient, exact, rtol=0.02, atol=1e-6)


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 2.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 1), (5,), (5, 1), (3, 17), (2, 31, 33), (70, 2, 2), (2, 3, 5, 7)], ids=str)
def test_hinge_grid(shape, scale, dtype, method, backend):
    target = binary_target(shape, ignore_index=255)
    x = some_layouts(logits(shape, dtype, scale=scale), backend, hinge=True)
    common = {"ignore_index": 255, "method": method, "slack": SLACK[method], "backend": backend}
    for options in ({"reduction": "none"}, {"per_image": False}):
        if len(shape) == 1 and options.get("per_image", True):
            continue  # points have no image: see test_points
        check_loss(lovasz_hinge_loss, x, target, **options, **common)


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_hinge_options(per_image, reduction, method, backend):
    """One image is all ignored, one has no foreground."""
    x, target = logits((4, 9, 7)), binary_target((4, 9, 7), ignore_index=255)
    target[1], target[2] = 255, 0
    common = {"ignore_index": 255, "method": method, "slack": SLACK[method], "backend": backend}
    check_loss(lovasz_hinge_loss, x, target, per_image=per_image, reduction=reduction, **common)


@over_lovasz_kernels
@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
def test_hinge_margins(scale, backend):
    """All pixels inside the margin, some, and nearly none: there foreground with error 0 still outranks no background."""
    x, target = logits((2, 50, 41), scale=scale), binary_target((2, 50, 41))
    check_loss(lovasz_hinge_loss, x, target, backend=backend)
    separated = (2 * target - 1) * (scale + logits((2, 50, 41)).abs())
    check_loss(lovasz_hinge_loss, separated, target, backend=backend)


@over_lovasz_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize("pixels", [511, 512, 513, 1023, 1024, 1025, 6000, 65535, 65537, 131072, 200001])
def test_sort_sizes(pixels, scale, dtype, backend, threads):
    """Around the sizes at which a sort and its parallel form change, and around the ranks to a program of Triton's."""
    x = logits((1, 3, pixels), scale=scale).to(dtype)
    for _ in threads(3):
        check_loss(lovasz_softmax_loss, x, labels(x.shape, 3), method="exact", backend=backend)


@over_lovasz_kernels
@pytest.mark.parametrize("sharpness", [10.0, 20.0, 40.0])
def test_confident_pixels_keep_their_digits(sharpness, backend):
    """p of the target within 1e-9 of 1: 1 - p in float32 would be 0, and p_j (g_j - sum p g) would cancel."""
    target = labels((1, 4, 4000), 4)
    sure = logits((1, 4, 4000)) + sharpness * torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    check_loss(lovasz_softmax_loss, sure, target, method="exact", backend=backend)


@over_lovasz_kernels
@pytest.mark.parametrize("classes", [1000, 250_000])
def test_equal_terms_of_many_classes(classes, backend):
    """Their rounding errors do not cancel: with one float32 sum the gradient of 250,000 classes would be off by 1.4e-3."""
    x, target = torch.zeros(1, classes, 3), torch.tensor([[0, classes // 2, classes - 1]])
    x[0, target[0, 1], 1] = 2.3
    check_loss(lovasz_softmax_loss, x, target, method="exact", backend=backend)
    _, gradient = evaluate(lovasz_softmax_loss, x, target, method="exact", backend=backend)
    _, truth = evaluate(lovasz_softmax_loss, x.double(), target, method="exact", backend="reference")
    assert (gradient.double() - truth).norm() <= 1e-5 * truth.norm()


def test_gradient_at_a_million_pixels():
    """Where float32 Jaccard differences lose 2% of the gradient, and exact counts none."""
    x, target = logits((1, 2, 1 << 20)), (torch.rand(1, 1 << 20, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    _, gradient = evaluate(lovasz_softmax_loss, x, target, method="exact", backend="native")
    _, expected = evaluate(lovasz_softmax_loss, x.double(), target, method="exact", backend="reference")
    assert (gradient.double() - expected).norm() <= 1e-5 * expected.norm()


# ---- what the loss is


@given(st.integers(1, 40), st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_weights_are_the_steps_of_the_jaccard_loss(pixels, seed, share):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(pixels, generator=generator, dtype=torch.float64)
    foreground = torch.rand(pixels, generator=generator) < share
    valid = torch.rand(pixels, generator=generator) < 0.8
    weights = lovasz_weights(errors, foreground, valid)
    assert (weights >= 0).all() and (weights[~valid] == 0).all()
    if valid.any():
        assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)
    if (foreground & valid).any():
        expected = sort_and_subtract(errors[valid], foreground[valid])
        torch.testing.assert_close((weights * errors).sum(), expected)
        # They depend on the order of the errors alone.
        torch.testing.assert_close(lovasz_weights(errors**3 + 5, foreground, valid), weights)


@over_lovasz
@given(pixels=st.integers(1, 60), classes=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_loss_is_berman_s(backend, pixels, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, classes, pixels, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (1, pixels), generator=generator)
    p = x.softmax(1)
    by_class = [
        sort_and_subtract((p[0, c] - (target[0] == c).double()).abs(), target[0] == c) for c in target.unique().tolist()
    ]
    torch.testing.assert_close(lovasz_softmax_loss(x, target, backend=backend), torch.stack(by_class).mean())
    binary = target.clamp(max=1)
    if binary.any():
        expected = sort_and_subtract(torch.relu(1 - (2 * binary[0] - 1) * x[0, 0]), binary[0] == 1)
        torch.testing.assert_close(lovasz_hinge_loss(x[:, 0], binary, backend=backend), expected)


@over_lovasz
@given(pixels=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_hard_errors_give_one_minus_iou(backend, pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randint(0, 2, (2, 1, pixels), generator=generator)
    iou_loss = 1 - (prediction & target).sum() / (prediction | target).sum().clamp(min=1)
    p = torch.stack([1 - prediction, prediction], 1).float()
    loss = lovasz_softmax_loss(p, target, classes=[1], from_logits=False, backend=backend)
    if target.any():
        assert loss.item() == pytest.approx(iou_loss.item(), abs=1e-6)


@over_lovasz
@given(pixels=st.integers(2, 300), seed=st.integers(0, 2**31))
def test_order_of_pixels_does_not_matter(backend, pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, pixels, generator=generator)
    target = torch.randint(0, 3, (1, pixels), generator=generator)
    order = torch.randperm(pixels, generator=generator)
    p = x.double().softmax(1)[0]
    errors = torch.where(target[0] == torch.arange(3).unsqueeze(1), 1 - p, p)
    assume(errors.sort().values.diff().min() > 1e-6)  # equal errors, in float32, rank in the order of the pixels
    _, gradient = evaluate(lovasz_softmax_loss, x, target, backend=backend)
    _, permuted = evaluate(lovasz_softmax_loss, x[..., order], target[..., order], backend=backend)
    torch.testing.assert_close(permuted, gradient[..., order], rtol=1e-5, atol=1e-9)


@over_lovasz
@over_methods
def test_ties_get_a_subgradient(method, backend):
    """In each group of equal errors the weights add up to the step of the Jaccard loss, in whatever order they were ranked."""
    levels = torch.randint(1, 4, (1, 300), generator=torch.Generator().manual_seed(0))
    target = labels((1, 2, 300), 2)
    p = torch.where(target == 1, 1 - levels / 4, levels / 4).requires_grad_()
    both = torch.stack([1 - p, p], 1)
    loss = lovasz_softmax_loss(both, target, classes=[1], from_logits=False, method=method, backend=backend)
    weights = torch.autograd.grad(loss, p)[0].abs()
    total, fg, bg, before = target.sum().item(), 0, 0, 0.0
    for level in (3, 2, 1):
        group = levels == level
        fg, bg = fg + (group & (target == 1)).sum().item(), bg + (group & (target == 0)).sum().item()
        after = 1 - (total - fg) / (total + bg)
        assert weights[group].sum().item() == pytest.approx(after - before, rel=1e-5)
        before = after


@over_lovasz_kernels
@over_kinds
@pytest.mark.parametrize("seed", range(3))
def test_ties_rank_as_in_the_reference(seed, kind, backend):
    """Equal errors in the order of their pixels, whatever their kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 600, generator=generator, dtype=torch.float64).mul(2).round() / 2
    target = torch.randint(0, 2, (1, 600), generator=generator)
    loss, x, options = lovasz_case(kind, x)
    results = [evaluate(loss, x, target, method="exact", backend=b, **options)[1] for b in (backend, "reference")]
    if kind == "softmax":  # 1 - p and p of two classes are tied in one arithmetic and not in another
        assert results[0].sum(1).abs().max() < 1e-15
    else:
        torch.testing.assert_close(*results)


# ---- classes, images, reductions


@over_lovasz
@over_methods
def test_absent_class_counts_under_all(method, backend):
    """Its whole weight goes to its largest error."""
    p, target = logits((1, 3, 20)).softmax(1), labels((1, 2, 20), 2)
    options = {"from_logits": False, "method": method, "backend": backend}
    values = lovasz_softmax_loss(p, target, classes="all", reduction="none", **options)
    torch.testing.assert_close(values[2], p[0, 2].max())
    present = lovasz_softmax_loss(p, target, reduction="none", **options)
    assert present[2] == 0
    torch.testing.assert_close(lovasz_softmax_loss(p, target, **options), present[:2].mean())


@over_lovasz_kernels  # the reference multiplies
@over_methods
@pytest.mark.parametrize("classes", [[0, 1], "present"], ids=str)
def test_a_class_that_takes_no_part_may_hold_anything(classes, method, backend):
    """Its pixels have no gradient, not even that of NaN times 0."""
    p = logits((1, 3, 50)).softmax(1)
    p[:, 2] = math.nan
    options = {"classes": classes, "from_logits": False, "method": method, "backend": backend}
    loss, gradient = evaluate(lovasz_softmax_loss, p, labels((1, 2, 50), 2), **options)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[:, 2] == 0).all()


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("shape", [(300, 3, 2, 2), (40, 2, 70)], ids=str)
def test_small_images(shape, method, backend):
    """Many to a tile or a block, or one, in a batch and each for itself."""
    x, target = logits(shape), labels(shape, shape[1], ignore_index=255)
    common = {"ignore_index": 255, "method": method, "backend": backend}
    if method == "exact":
        for per_image in (False, True):
            check_loss(lovasz_softmax_loss, x, target, per_image=per_image, **common)
    exact = lovasz_softmax_loss(x, target, ignore_index=255, method="exact", backend="reference")
    torch.testing.assert_close(lovasz_softmax_loss(x, target, **common), exact)


@over_lovasz
@over_methods
def test_reductions_and_images(method, backend):
    x, target = logits((3, 4, 6, 5)), labels((3, 4, 6, 5), 4)
    common = {"method": method, "backend": backend}
    values = lovasz_softmax_loss(x, target, per_image=True, reduction="none", **common)
    assert values.shape == (3, 4)
    single = [lovasz_softmax_loss(x[i : i + 1], target[i : i + 1], **common) for i in range(3)]
    torch.testing.assert_close(lovasz_softmax_loss(x, target, per_image=True, **common), torch.stack(single).mean())
    torch.testing.assert_close(lovasz_softmax_loss(x, target, per_image=True, reduction="sum", **common), values.sum())
    binary = target.clamp(max=1)
    hinge = lovasz_hinge_loss(x[:, 0], binary, reduction="none", **common)
    assert hinge.shape == (3,)
    torch.testing.assert_close(lovasz_hinge_loss(x[:, :1], binary, **common), hinge.mean())
    assert lovasz_hinge_loss(x[:, 0], binary, per_image=False, reduction="none", **common).shape == ()


@over_lovasz
@over_methods
def test_class_weight_scales_but_does_not_normalise(method, backend):
    x, target = logits((1, 3, 30)), labels((1, 3, 30), 3)
    weight = torch.tensor([0.5, 0.0, 4.0])
    common = {"method": method, "backend": backend}
    values = lovasz_softmax_loss(x, target, reduction="none", **common)
    torch.testing.assert_close(lovasz_softmax_loss(x, target, class_weight=weight, **common), (values * weight).mean())


FLOATS = [torch.float32, torch.float64, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@over_lovasz_kernels
@over_methods
@pytest.mark.parametrize("target_type", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_target_types(target_type, method, backend):
    x, target = logits((2, 3, 6, 8)), binary_target((2, 6, 8))
    common = {"method": method, "backend": backend}
    expected = lovasz_hinge_loss(x[:, :1], target, method=method, backend="reference")
    torch.testing.assert_close(lovasz_hinge_loss(x[:, :1], target.to(target_type), **common), expected)
    torch.testing.assert_close(lovasz_hinge_loss(x[:, 0], target.to(target_type).unsqueeze(1), **common), expected)
    if target_type in INTEGERS:
        expected = lovasz_softmax_loss(x, target, method=method, backend="reference")
        torch.testing.assert_close(lovasz_softmax_loss(x, target.to(target_type), **common), expected)


@over_lovasz
@over_methods
@pytest.mark.parametrize("ignore_index", [257, 1 << 40, -1])
def test_ignore_index_is_compared_in_64_bits(ignore_index, method, backend):
    """As uint8, 257 would be class 1."""
    x, target = logits((1, 3, 40)), labels((1, 3, 40), 3)
    loss = lovasz_softmax_loss(x, target.byte(), ignore_index=ignore_index, method=method, backend=backend)
    torch.testing.assert_close(loss, lovasz_softmax_loss(x, target, method=method, backend=backend), rtol=0, atol=0)


# ---- which pixels, classes and channels


@over_lovasz_kernels
@over_methods
@over_kinds
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_ignored_pixels_are_left_out(share, per_image, kind, method, backend):
    """In long runs and one by one, as in a voxel grid."""
    shape = (2, 3, 5, 700)
    x, target = logits(shape), labels(shape, 3)
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) > share] = 255
    target[0, 1:3], target[1, 4] = 255, labels(shape, 3, seed=3)[1, 4]
    loss, x, options = lovasz_case(kind, x)
    if kind == "hinge":
        target = target.where(target == 255, target % 2)
    options |= {"per_image": per_image, "ignore_index": 255, "method": method, "slack": SLACK[method]}
    check_loss(loss, some_layouts(x, backend, hinge=kind == "hinge"), target, backend=backend, **options)


@pytest.mark.parametrize("method", ["exact", "histogram", "auto"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other pixel"])
def test_loss_of_ignored_pixels_is_that_of_the_others(layout, method):
    """Large enough for a sample, which is of the pixels that are not ignored: the same bins, the same loss."""
    x, target = logits((1, 4, 600_000)), labels((1, 4, 600_000), 4)
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) > 0.5] = -1
    valid = target[0] != -1
    found, gradient = evaluate(lovasz_softmax_loss, layouts(x)[layout], target, ignore_index=-1, method=method)
    expected, of_valid = evaluate(lovasz_softmax_loss, x[..., valid].contiguous(), target[:, valid], method=method)
    assert found == expected
    torch.testing.assert_close(gradient[..., valid], of_valid, rtol=1e-6, atol=1e-12)
    assert (gradient[..., ~valid] == 0).all()


def test_auto_counts_the_pixels_that_are_not_ignored(monkeypatch):
    monkeypatch.setattr(lovasz, "AUTO_HISTOGRAM_FROM", 100)
    called = []
    for name in ("lovasz_exact", "lovasz_histogram"):
        function = getattr(lovasz.ops, name)
        monkeypatch.setattr(
            lovasz.ops, name, lambda *args, name=name, function=function, **o: called.append(name) or function(*args, **o)
        )
    x, target = logits((2, 3, 120)), labels((2, 3, 120), 3)
    lovasz_softmax_loss(x, target, ignore_index=255)
    target[:, 45:] = 255
    lovasz_softmax_loss(x, target, ignore_index=255)
    lovasz_softmax_loss(x, target.clamp(max=2), per_image=True)
    lovasz_softmax_loss(x, target, per_image=True, ignore_index=255)
    lovasz_hinge_loss(x[:, 0], target.clamp(max=1), per_image=False)
    lovasz_hinge_loss(x[:, 0], target.where(target == 255, target % 2), per_image=False, ignore_index=255)
    assert [name.removeprefix("lovasz_") for name in called] == ["histogram", "exact"] * 3


@over_lovasz
@over_methods
@pytest.mark.parametrize("ignore_index", [None, 254])
@pytest.mark.parametrize("from_logits", [False, True], ids=["probabilities", "softmax"])
def test_background_index(from_logits, ignore_index, method, backend):
    """As if the value were a class more, which has no part in the mean. As many pixels as "histogram" takes to be held to its
    accuracy."""
    x, target = logits((2, 4, 90, 70)), labels((2, 4, 90, 70), 4, ignore_index=ignore_index)
    p = x.softmax(1)
    options = {"ignore_index": ignore_index, "method": method, "backend": backend, "from_logits": from_logits}
    for classes in ("all", [0, 2]):
        found = lovasz_softmax_loss(
            x[:, :3].softmax(1).log() if from_logits else p[:, :3], target.where(target != 3, 255), classes=classes,
            background_index=255, reduction="none", **options,
        )  # fmt: skip
        whole = torch.cat([x[:, :3].softmax(1) if from_logits else p[:, :3], p[:, 3:]], 1)
        expected = lovasz_softmax_loss(
            whole.double(), target, classes=[0, 1, 2] if classes == "all" else classes, reduction="none", method="exact",
            ignore_index=ignore_index, from_logits=False, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(found.double(), expected[:3], rtol=1e-5, atol=1e-6)


@over_lovasz
@over_methods
def test_one_channel_of_probabilities(method, backend):
    """A sigmoid map: foreground is class 0, the rest background_index."""
    p, target = logits((2, 1, 300)).sigmoid(), labels((2, 2, 300), 2)
    options = {"from_logits": False, "background_index": 1, "method": method, "slack": SLACK[method], "backend": backend}
    check_loss(lovasz_softmax_loss, p, 1 - target, **options)
    found = lovasz_softmax_loss(p, 1 - target, from_logits=False, background_index=1, backend=backend, method=method)
    expected = sort_and_subtract((target - p[:, 0].double()).abs().flatten(), target.flatten() == 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@over_lovasz
@over_methods
def test_present_only(method, backend):
    x, target = logits((2, 5, 60)), labels((2, 5, 60), 3)  # 3 and 4 are absent
    options = {"method": method, "backend": backend}
    found = evaluate(lovasz_softmax_loss, x, target, classes=[1, 2, 4], present_only=True, **options)
    expected = evaluate(lovasz_softmax_loss, x, target, classes=[1, 2], **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert lovasz_softmax_loss(x, target, classes=[3, 4], present_only=True, **options) == 0
    for classes in ("present", "all"):
        found = lovasz_softmax_loss(x, target, classes=classes, present_only=True, **options)
        assert found == lovasz_softmax_loss(x, target, classes=classes, **options)


@over_lovasz
@over_methods
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_hinge_per_class(per_image, reduction, method, backend):
    x, target = logits((2, 3, 5, 7)), labels((2, 2, 3, 5, 7), 2)
    target[0, 1] = 255
    options = {"per_image": per_image, "ignore_index": 255, "method": method, "backend": backend}
    found, gradient = evaluate(lovasz_hinge_loss, x, target, per_class=True, reduction=reduction, **options)
    each = [lovasz_hinge_loss(x[:, c], target[:, c], reduction="none", **options) for c in range(3)]
    expected = torch.stack(each, -1)
    assert expected.shape == ((2, 3) if per_image else (3,))
    if reduction != "none":
        expected = expected.mean() if reduction == "mean" else expected.sum()
    torch.testing.assert_close(found, expected)
    assert gradient.shape == x.shape and (gradient[0, 1] == 0).all()
    loss, certificate = lovasz_hinge_loss(x, target, per_class=True, return_certificate=True, reduction="none", **options)
    assert certificate.shape == loss.shape


@over_lovasz
@over_methods
def test_points(method, backend):
    """[P, C] and [P] are one image of P points."""
    x, target = logits((300, 4)), labels((300, 4), 4)
    options = {"method": method, "backend": backend}
    as_image = lovasz_softmax_loss(x.t()[None], target[None], **options)
    assert lovasz_softmax_loss(x, target, **options) == as_image
    y = target % 2
    as_image = lovasz_hinge_loss(x[None, :, 0], y[None], **options)
    assert lovasz_hinge_loss(x[:, 0], y, per_image=False, **options) == as_image
    for points in (x[:, 0], x[:, :1]):
        with pytest.raises(ValueError, match="per_image must be False for points"):
            lovasz_hinge_loss(points, y, **options)


def test_points_are_sampled():
    """As an image is: the certificate tells the bins of one sample from those of another, or of all pixels."""
    x, target = logits((1 << 18, 3)), labels((1 << 18, 3), 3)
    options = {"method": "histogram", "return_certificate": True}
    found = lovasz_softmax_loss(x, target, **options)
    torch.testing.assert_close(found, lovasz_softmax_loss(x.t()[None], target[None], **options), rtol=0, atol=0)
