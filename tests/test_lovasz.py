import math

import pytest
import torch
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from hypothesis import given
from hypothesis import strategies as st

import veerloss
from veerloss import lovasz_hinge_loss, lovasz_softmax_loss
from veerloss.reference.lovasz import lovasz_weights


@pytest.fixture(params=["native", "reference"])
def backend(request):
    return request.param


@pytest.fixture(params=["exact", "histogram"])
def method(request):
    return request.param


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
    target = labels((shape[0], 2, *shape[1:]), 2)
    if ignore_index is not None:
        target.view(-1)[::5] = ignore_index
    return target


# ---- against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_grid(shape, dtype):
    target = labels(shape, shape[1], ignore_index=255)
    for x in layouts(logits(shape, dtype)).values():
        for options in ({}, {"classes": "all"}, {"per_image": True}):
            check_loss(lovasz_softmax_loss, x, target, ignore_index=255, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["present", "all", [1], (4, 0, 3)], ids=str)
def test_softmax_options(classes, per_image, reduction):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    for options in ({}, {"class_weight": torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])}):
        check_loss(
            lovasz_softmax_loss, logits(shape), target, classes=classes, per_image=per_image, reduction=reduction,
            ignore_index=-1, **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_probabilities(per_image, dtype):
    x = logits((2, 5, 31, 33)).softmax(1).to(dtype)
    for p in layouts(x).values():
        check_loss(lovasz_softmax_loss, p, labels(x.shape, 5), from_logits=False, per_image=per_image)


def test_probabilities_outside_0_1_slope_as_the_error_does(backend):
    p = torch.tensor([[[-0.1, 1.2, 0.4], [1.1, -0.2, 0.6]]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 0, 1]])
    loss = -lovasz_softmax_loss(
        p, target, from_logits=False, backend=backend
    )  # the sign of the incoming gradient is another thing
    expected = -lovasz_softmax_loss(p, target, from_logits=False, backend="reference")
    torch.testing.assert_close(torch.autograd.grad(loss, p), torch.autograd.grad(expected, p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 17), (2, 31, 33), (70, 2, 2), (2, 3, 5, 7)], ids=str)
def test_hinge_grid(shape, dtype):
    target = binary_target(shape, ignore_index=255)
    wide = logits((*shape[:-1], 2 * shape[-1]), dtype)
    for x in (logits(shape, dtype), wide[..., ::2]):
        for per_image in (True, False):
            for reduction in ("none", "mean", "sum"):
                check_loss(lovasz_hinge_loss, x, target, per_image=per_image, reduction=reduction, ignore_index=255)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
def test_hinge_margins(scale):
    """All pixels inside the margin, some, and nearly none: there foreground with error 0 still outranks no background."""
    check_loss(lovasz_hinge_loss, logits((2, 50, 41), scale=scale), binary_target((2, 50, 41)))
    separated = (2 * binary_target((2, 50, 41)) - 1) * (scale + logits((2, 50, 41)).abs())
    check_loss(lovasz_hinge_loss, separated, binary_target((2, 50, 41)))


@pytest.mark.parametrize("pixels", [511, 512, 513, 65535, 65537, 131072, 200001])
def test_sort_sizes(pixels):
    """Around the sizes at which the sort and its parallel form change."""
    for scale in (0.01, 3.0):
        x = logits((1, 3, pixels), scale=scale)
        check_loss(lovasz_softmax_loss, x, labels(x.shape, 3))
        check_loss(lovasz_softmax_loss, x.double(), labels(x.shape, 3))


def test_confident_pixels_keep_their_digits():
    """p of the target within 1e-9 of 1: 1 - p in float32 would be 0, and p_j (g_j - sum p g) would cancel."""
    target = labels((1, 4, 4000), 4)
    x = logits((1, 4, 4000))
    for sharpness in (10.0, 20.0, 40.0):
        sure = x + sharpness * torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
        check_loss(lovasz_softmax_loss, sure, target)


def test_gradient_at_a_million_pixels():
    """Where float32 Jaccard differences lose 2% of the gradient, and exact counts none."""
    x, target = logits((1, 2, 1 << 20)), (torch.rand(1, 1 << 20, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    grads = []
    for run, value in (("native", x), ("reference", x.double())):
        value = value.requires_grad_()
        grads.append(torch.autograd.grad(lovasz_softmax_loss(value, target, method="exact", backend=run), value)[0].double())
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


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


@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 2**31))
def test_loss_is_berman_s(pixels, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, classes, pixels, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (1, pixels), generator=generator)
    p = x.softmax(1)
    by_class = [
        sort_and_subtract((p[0, c] - (target[0] == c).double()).abs(), target[0] == c) for c in target.unique().tolist()
    ]
    expected = torch.stack(by_class).mean()
    binary = target.clamp(max=1)
    hinge = sort_and_subtract(torch.relu(1 - (2 * binary[0] - 1) * x[0, 0]), binary[0] == 1)
    for run in ("native", "reference"):
        torch.testing.assert_close(lovasz_softmax_loss(x, target, backend=run), expected)
        if binary.any():
            torch.testing.assert_close(lovasz_hinge_loss(x[:, 0], binary, backend=run), hinge)


@given(st.integers(1, 200), st.integers(0, 2**31))
def test_hard_errors_give_one_minus_iou(pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randint(0, 2, (2, 1, pixels), generator=generator)
    iou_loss = 1 - (prediction & target).sum() / (prediction | target).sum().clamp(min=1)
    p = torch.stack([1 - prediction, prediction], 1).float()
    for run in ("native", "reference"):
        loss = lovasz_softmax_loss(p, target, classes=[1], from_logits=False, backend=run)
        if target.any():
            assert loss.item() == pytest.approx(iou_loss.item(), abs=1e-6)


@given(st.integers(2, 300), st.integers(0, 2**31))
def test_order_of_pixels_does_not_matter(pixels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, pixels, generator=generator)
    target = torch.randint(0, 3, (1, pixels), generator=generator)
    order = torch.randperm(pixels, generator=generator)
    grads = []
    for value, labels_ in ((x, target), (x[..., order], target[..., order])):
        value = value.clone().requires_grad_()
        grads.append(torch.autograd.grad(lovasz_softmax_loss(value, labels_), value)[0])
    torch.testing.assert_close(grads[0][..., order], grads[1], rtol=1e-5, atol=1e-9)


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


# ---- classes, images, reductions


def test_absent_class_counts_under_all(method, backend):
    """Its whole weight goes to its largest error."""
    p = logits((1, 3, 20)).softmax(1)
    target = labels((1, 2, 20), 2)
    values = lovasz_softmax_loss(p, target, classes="all", from_logits=False, reduction="none", method=method, backend=backend)
    torch.testing.assert_close(values[2], p[0, 2].max())
    present = lovasz_softmax_loss(p, target, from_logits=False, reduction="none", method=method, backend=backend)
    assert present[2] == 0
    torch.testing.assert_close(
        lovasz_softmax_loss(p, target, from_logits=False, method=method, backend=backend), present[:2].mean()
    )


@pytest.mark.parametrize("classes", [[0, 1], "present"], ids=str)
def test_a_class_that_takes_no_part_may_hold_anything(classes, method):
    """Its pixels have no gradient, not even that of NaN times 0. (The reference multiplies.)"""
    p = logits((1, 3, 50)).softmax(1)
    p[:, 2] = math.nan
    p.requires_grad_()
    loss = lovasz_softmax_loss(p, labels((1, 2, 50), 2), classes=classes, from_logits=False, method=method)
    gradient = torch.autograd.grad(loss, p)[0]
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("shape", [(300, 3, 2, 2), (40, 2, 70)], ids=str)
def test_small_images(shape, method):
    """Many to a tile or a block, or one, in a batch and each for itself."""
    x, target = logits(shape), labels(shape, shape[1], ignore_index=255)
    for options in ({}, {"per_image": True}) if method == "exact" else ({},):
        check_loss(lovasz_softmax_loss, x, target, ignore_index=255, method="exact", **options)
        exact = lovasz_softmax_loss(x, target, ignore_index=255, method="exact", **options)
        torch.testing.assert_close(lovasz_softmax_loss(x, target, ignore_index=255, method=method, **options), exact)


def test_reductions_and_images(method, backend):
    x, target = logits((3, 4, 6, 5)), labels((3, 4, 6, 5), 4)
    values = lovasz_softmax_loss(x, target, per_image=True, reduction="none", method=method, backend=backend)
    assert values.shape == (3, 4)
    single = [lovasz_softmax_loss(x[i : i + 1], target[i : i + 1], method=method, backend=backend) for i in range(3)]
    torch.testing.assert_close(
        lovasz_softmax_loss(x, target, per_image=True, method=method, backend=backend), torch.stack(single).mean()
    )
    torch.testing.assert_close(
        lovasz_softmax_loss(x, target, per_image=True, reduction="sum", method=method, backend=backend), values.sum()
    )
    hinge = lovasz_hinge_loss(x[:, 0], target.clamp(max=1), reduction="none", method=method, backend=backend)
    assert hinge.shape == (3,)
    torch.testing.assert_close(lovasz_hinge_loss(x[:, :1], target.clamp(max=1), method=method, backend=backend), hinge.mean())
    assert (
        lovasz_hinge_loss(x[:, 0], target.clamp(max=1), per_image=False, reduction="none", method=method, backend=backend).shape
        == ()
    )


def test_class_weight_scales_but_does_not_normalise(method, backend):
    x, target = logits((1, 3, 30)), labels((1, 3, 30), 3)
    weight = torch.tensor([0.5, 0.0, 4.0])
    values = lovasz_softmax_loss(x, target, reduction="none", method=method, backend=backend)
    torch.testing.assert_close(
        lovasz_softmax_loss(x, target, class_weight=weight, method=method, backend=backend), (values * weight).mean()
    )


@pytest.mark.parametrize(
    "target_type", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16], ids=str
)
def test_hinge_target_types(target_type):
    x, target = logits((2, 1, 6, 8)), binary_target((2, 6, 8))
    expected = lovasz_hinge_loss(x, target)
    torch.testing.assert_close(lovasz_hinge_loss(x, target.to(target_type)), expected)
    torch.testing.assert_close(lovasz_hinge_loss(x[:, 0], target.to(target_type).unsqueeze(1)), expected)


# ---- edges


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_nan_and_infinity_give_nan(bad, channels, method, backend):
    x = logits((2, channels, 40)).requires_grad_()
    with torch.no_grad():
        x[1, channels - 1, 17] = bad
    target = labels((2, channels, 40), channels)
    binary = target.clamp(max=1).unsqueeze(1).expand(x.shape)
    for loss in (
        lovasz_softmax_loss(x, target, method=method, backend=backend),
        lovasz_softmax_loss(x, target, from_logits=False, method=method, backend=backend),
        lovasz_hinge_loss(x, binary, method=method, backend=backend),
        lovasz_hinge_loss(-x, binary, method=method, backend=backend),
    ):
        loss.backward()
        assert loss.isnan()


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize(
    "dtype, bits",
    [(torch.float32, bits) for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF)]
    + [(torch.float64, bits << 48) for bits in (0x7FF8, 0xFFF8)]
    + [(torch.float64, bits) for bits in (0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)],
    ids=lambda value: hex(value) if isinstance(value, int) else str(value),
)
def test_every_nan_is_one(dtype, bits, foreground, method, backend):
    """Whatever its bits: those of one are the key of an ignored pixel."""
    x = logits((1, 2, 5000), dtype)
    target = labels((1, 2, 5000), 2)
    target[0, 17] = int(foreground)
    size = 8 * x.element_size()
    x.view(torch.int32 if size == 32 else torch.int64)[0, 1, 17] = bits - (bits >> (size - 1) << size)
    assert x[0, 1, 17].isnan()
    assert lovasz_softmax_loss(x, target, method=method, backend=backend).isnan()
    assert lovasz_softmax_loss(x, target, from_logits=False, method=method, backend=backend).isnan()
    assert lovasz_hinge_loss(x[:, 1], target, method=method, backend=backend).isnan()


def test_exact_probabilities_have_no_gradient(method, backend):
    """|y - p| has slope 0 where p is right."""
    target = labels((2, 3, 50), 3)
    p = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float().requires_grad_()
    loss = lovasz_softmax_loss(p, target, from_logits=False, method=method, backend=backend)
    assert loss == 0
    assert (torch.autograd.grad(loss, p)[0] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("per_image", [False, True])
def test_all_ignored_is_zero_with_zero_gradient(per_image, reduction, method, backend):
    x = logits((2, 3, 40))
    x[0, 0, 0] = math.nan  # what is ignored may hold anything
    x.requires_grad_()
    target = torch.full((2, 40), 255)
    for loss in (
        lovasz_softmax_loss(
            x, target, ignore_index=255, per_image=per_image, reduction=reduction, method=method, backend=backend
        ),
        lovasz_softmax_loss(
            x, target, ignore_index=255, classes="all", per_image=per_image, reduction=reduction, method=method, backend=backend
        ),
        lovasz_hinge_loss(
            x[:, 0], target, ignore_index=255, per_image=per_image, reduction=reduction, method=method, backend=backend
        ),
    ):
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0, 3, 0, 2)], ids=str)
def test_no_pixels(shape, method, backend):
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    for per_image in (True, False):
        for reduction in ("mean", "sum", "none"):
            for loss in (
                lovasz_softmax_loss(x, target, per_image=per_image, reduction=reduction, method=method, backend=backend),
                lovasz_hinge_loss(x[:, 0], target, per_image=per_image, reduction=reduction, method=method, backend=backend),
            ):
                assert loss.sum() == 0
                assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


def test_minus_infinity_masks_a_class(method, backend):
    x = logits((2, 4, 6)).requires_grad_()
    target = labels((2, 4, 6), 3)
    masked = x.clone()
    masked[:, 3] = -math.inf
    loss = lovasz_softmax_loss(masked, target, method=method, backend=backend)
    torch.testing.assert_close(loss, lovasz_softmax_loss(x[:, :3], target, method=method, backend=backend))
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_same_bits_for_any_number_of_threads():
    x, target = logits((1, 3, 300_000)), labels((1, 3, 300_000), 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            value = x.clone().requires_grad_()
            loss = lovasz_softmax_loss(value, target, method="exact")
            results.append((loss.detach(), torch.autograd.grad(loss, value)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_without_gradient_nothing_is_kept():
    x, target = logits((1, 3, 100)), labels((1, 3, 100), 3)
    with_gradient = lovasz_softmax_loss(x.clone().requires_grad_(), target)
    with torch.no_grad():
        torch.testing.assert_close(lovasz_softmax_loss(x.requires_grad_(), target), with_gradient.detach())
    _, _, kept = torch.ops.veerloss.lovasz_softmax_forward(x, target, None, True, False, None, None, True, 1, False, False)
    assert kept.numel() == 0


def test_modules_are_the_functions():
    x, target = logits((2, 3, 8)), labels((2, 3, 8), 3)
    module = veerloss.LovaszSoftmaxLoss(classes="all", per_image=True)
    assert torch.equal(module(x, target), lovasz_softmax_loss(x, target, classes="all", per_image=True))
    assert "classes='all'" in repr(module) and "per_image=True" in repr(module)
    hinge = veerloss.LovaszHingeLoss(per_image=False)
    assert torch.equal(hinge(x[:, 0], target.clamp(max=1)), lovasz_hinge_loss(x[:, 0], target.clamp(max=1), per_image=False))
    assert repr(hinge).startswith("LovaszHingeLoss(per_image=False")
