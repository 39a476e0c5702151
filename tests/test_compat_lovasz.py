"""veerloss.compat.lovasz_losses: Berman's file, against his formula in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import evaluate
from grid import labels, logits
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import lovasz_extension
from veerloss.compat import lovasz_losses as L


def softmax_formula(probas, target, classes="present", ignore=None):
    """Of probabilities [P, C] and labels [P]: errors, sorted, times the differences of the Jaccard loss."""
    probas = probas.double()
    if ignore is not None:
        probas, target = probas[target != ignore], target[target != ignore]
    losses = []
    for c in range(probas.size(1)) if isinstance(classes, str) else classes:
        fg = (target == c).double()
        if classes == "present" and fg.sum() == 0:
            continue
        p = probas[:, 0] if probas.size(1) == 1 else probas[:, c]
        losses.append(lovasz_extension((fg - p).abs(), fg))
    return torch.stack(losses).mean()


def hinge_formula(scores, target, ignore=None):
    scores, target = scores.double().flatten(), target.flatten()
    if ignore is not None:
        scores, target = scores[target != ignore], target[target != ignore]
    fg = target.double()
    return lovasz_extension(torch.relu(1 - scores * (2 * fg - 1)), fg)


def assert_is(loss, formula, x, rtol=1e-5):
    """Value and gradient."""
    found, gradient = evaluate(loss, x)
    expected, expected_gradient = evaluate(formula, x.double())
    assert found.dtype == x.dtype and gradient.dtype == x.dtype
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-6 * expected_gradient.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", ["present", "all", [0, 3], (4,)], ids=str)
@pytest.mark.parametrize("ignore", [None, 255, 0, -1])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (30, 5), (2, 5, 40), (1, 5, 3, 4, 5)], ids=str)
def test_softmax(shape, ignore, classes, dtype):
    """Images, points, [B, C, N], volumes; class 4 is absent."""
    p, target = logits(shape, dtype).softmax(1), labels(shape, 4, ignore_index=ignore)
    flat = target.reshape(-1)

    def formula(p):
        return softmax_formula(p.movedim(1, -1).reshape(-1, 5), flat, classes, ignore)

    assert_is(lambda p: L.lovasz_softmax(p, target, classes, ignore=ignore), formula, p)
    assert_is(lambda p: L.lovasz_softmax_flat(*L.flatten_probas(p, target, ignore), classes), formula, p)
    if len(shape) > 2:
        assert_is(
            lambda p: L.lovasz_softmax(p, target, classes, True, ignore),
            lambda p: (
                sum(softmax_formula(q.flatten(1).t(), t.flatten(), classes, ignore) for q, t in zip(p, target, strict=True))
                / len(p)
            ),
            p,
        )


@pytest.mark.parametrize("ignore", [None, 255, 0, 1, 2])
@pytest.mark.parametrize("channel", [False, True], ids=["[B, H, W]", "[B, 1, H, W]"])
def test_a_sigmoid_map(channel, ignore):
    """Class 2 against the others."""
    x, target = logits((2, 1, 6, 7)).sigmoid(), labels((2, 5, 6, 7), 5, ignore_index=255)
    p = x if channel else x[:, 0]
    target = target.clamp(max=4) if ignore != 255 else target
    assert_is(
        lambda p: L.lovasz_softmax(p, target, classes=[2], ignore=ignore),
        lambda p: softmax_formula(p.reshape(-1, 1), target.flatten(), [2], ignore),
        p,
    )
    for classes in ("present", "all", [1, 2]):
        with pytest.raises(ValueError, match="classes must be one class"):
            L.lovasz_softmax(p, target, classes)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32], ids=str)
def test_hinge(dtype, per_image, ignore):
    x, target = logits((3, 6, 7)), labels((3, 2, 6, 7), 2, ignore_index=ignore).to(dtype)

    def formula(x):
        if not per_image:
            return hinge_formula(x, target, ignore)
        return sum(hinge_formula(s, t, ignore) for s, t in zip(x, target, strict=True)) / 3

    assert_is(lambda x: L.lovasz_hinge(x, target, per_image, ignore), formula, x)
    assert_is(lambda x: L.lovasz_hinge(x[:, None], target, per_image, ignore), formula, x)
    if not per_image:
        assert_is(lambda x: L.lovasz_hinge_flat(*L.flatten_binary_scores(x, target, ignore)), formula, x)
        assert_is(lambda x: L.lovasz_hinge(x.flatten(), target.flatten(), ignore=ignore), formula, x)


def test_labels_of_any_integer_type_and_strides():
    p, target = logits((2, 3, 8, 6)).softmax(1), labels((2, 3, 6, 8), 3, ignore_index=255).transpose(1, 2)
    expected = L.lovasz_softmax(p, target.contiguous(), ignore=255)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        assert L.lovasz_softmax(p, target.to(dtype), ignore=255) == expected
    assert L.lovasz_softmax(p, target.float(), ignore=255) == expected


@pytest.mark.parametrize("ignore", [None, 255, 255.0])
def test_labels_of_another_shape(ignore):
    """The original flattens them without a look."""
    p, target = logits((2, 3, 6, 7)).softmax(1), labels((2, 3, 6, 7), 3, ignore_index=None if ignore is None else 255)
    expected = L.lovasz_softmax(p, target, ignore=ignore)
    assert expected == L.lovasz_softmax(p, target, ignore=None if ignore is None else 255)
    cloud = p.movedim(1, -1).reshape(-1, 3)
    for x, y in ((p, target[:, None]), (p, target.flatten()), (cloud, target), (cloud, target.reshape(-1, 1))):
        assert L.lovasz_softmax(x, y, ignore=ignore) == expected
    assert L.lovasz_softmax(p, target[:, None], per_image=True, ignore=ignore) == L.lovasz_softmax(
        p, target, "present", True, ignore
    )
    binary = target.where(target == 255, target % 2)
    x = logits((2, 6, 7))
    for y in (binary[:, None], binary.flatten(1)):
        assert L.lovasz_hinge(x, y, ignore=ignore) == L.lovasz_hinge(x, binary, ignore=ignore)
    one_class = L.lovasz_softmax(x.sigmoid(), binary, [1], ignore=ignore)
    for y in (binary[:, None], binary.flatten()):
        assert L.lovasz_softmax(x.sigmoid(), y, [1], ignore=ignore) == one_class
        assert L.lovasz_softmax(x.sigmoid()[:, None], y, [1], ignore=ignore) == one_class


@pytest.mark.parametrize("ignore", [None, 255])
def test_labels_of_another_number(ignore):
    """The errors that the original ends in, of a subtraction or a mask; with ``per_image`` it drops what has no counterpart."""
    p, target, x = logits((2, 3, 6, 7)).softmax(1), labels((2, 3, 6, 7), 2), logits((2, 6, 7))
    for call in (
        lambda: L.lovasz_softmax(p, target[:, 1:], ignore=ignore),
        lambda: L.lovasz_softmax(p, target[:1], per_image=True, ignore=ignore),
        lambda: L.lovasz_softmax(x.sigmoid(), target[:, 1:], [1], ignore=ignore),
        lambda: L.lovasz_hinge(x, target[:1], ignore=ignore),
        lambda: L.lovasz_hinge(x, target[:, 1:], False, ignore=ignore),
    ):
        with pytest.raises(RuntimeError if ignore is None else IndexError, match="the target must have as many elements as"):
            call()


def test_classes_that_are_none():
    p, target = logits((2, 3, 6, 7)).softmax(1), labels((2, 3, 6, 7), 3)
    assert L.lovasz_softmax(p, target, range(3)) == L.lovasz_softmax(p, target, {0, 1, 2}) == L.lovasz_softmax(p, target, "all")
    for classes, error in ((1, TypeError), (None, TypeError), ("absent", ValueError), ([], ValueError), ([3], IndexError)):
        with pytest.raises(error, match=r"classes (must|holds)"):
            L.lovasz_softmax(p, target, classes)
    with pytest.raises(ValueError, match="classes must be one class, such as"):
        L.lovasz_softmax(p[:, 0], target, 1)


# ---- where the original fails, or is wrong


def test_nothing_valid_is_zero():
    """The original: a loss of shape [0, C], whose backward pass fails."""
    target = torch.full((2, 6, 7), 255)
    for loss, x in (
        (lambda x: L.lovasz_softmax(x, target, ignore=255), logits((2, 3, 6, 7)).softmax(1)),
        (lambda x: L.lovasz_softmax(x, target, per_image=True, ignore=255), logits((2, 3, 6, 7)).softmax(1)),
        (lambda x: L.lovasz_softmax(x, target, [1], ignore=255), logits((2, 6, 7)).sigmoid()),
        (lambda x: L.lovasz_hinge(x, target, ignore=255), logits((2, 6, 7))),
        (lambda x: L.binary_xloss(x, target, ignore=255), logits((2, 6, 7))),
        (lambda x: L.lovasz_softmax_flat(x, target.new_zeros(0)), torch.zeros(0, 3)),
        (lambda x: L.lovasz_hinge_flat(x, target.new_zeros(0)), torch.zeros(0)),
    ):
        found, gradient = evaluate(loss, x)
        assert found.shape == () and found == 0 and gradient.shape == x.shape and (gradient == 0).all()


def test_one_valid_pixel():
    """The original: an IndexError of its weights."""
    p, target = logits((1, 3, 2, 2)).softmax(1), torch.full((1, 2, 2), 255)
    target[0, 1, 0] = 2
    assert_is(lambda p: L.lovasz_softmax(p, target, ignore=255), lambda p: 1 - p[0, 2, 1, 0], p)


def test_labels_that_are_no_class_are_named():
    """In the original they are background to all classes, and a forgotten ``ignore`` goes unnoticed."""
    p, target = logits((2, 3, 6, 7)).softmax(1), labels((2, 3, 6, 7), 3, ignore_index=255)
    with pytest.raises(IndexError, match="target holds 255"):
        L.lovasz_softmax(p, target)


def test_the_gradient_keeps_its_digits():
    """At a million pixels. (Logits of a scale at which few probabilities are equal: these have no order.)"""
    p = logits((1, 2, 1 << 20), scale=0.3).softmax(1)
    target = (torch.rand(1, 1 << 20, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    _, ours = evaluate(lambda p: L.lovasz_softmax(p, target), p)
    _, truth = evaluate(lambda p: softmax_formula(p[0].t(), target[0]), p.double())

    def in_float32(p):
        fg = [(target[0] == c).float() for c in range(2)]
        return torch.stack([lovasz_extension((fg[c] - p[0, c]).abs(), fg[c]) for c in range(2)]).mean()

    _, theirs = evaluate(in_float32, p)

    def error(gradient):
        return (gradient - truth).abs().sum() / truth.abs().sum()

    assert error(ours) < 1e-3 and error(theirs) > 1e-2, (error(ours), error(theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    """A float32 loss, as the original's, but counted: not rounded anywhere on the way."""
    p, target = logits((1, 3, 400, 400)).softmax(1).to(dtype), labels((1, 3, 400, 400), 3)
    found, gradient = evaluate(lambda p: L.lovasz_softmax(p, target), p)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(found.double(), softmax_formula(p[0].flatten(1).t(), target.flatten()), rtol=1e-5, atol=0)
    x, binary = logits((1, 400, 400), dtype), target % 2
    for loss in (L.lovasz_hinge, lambda x, y: L.lovasz_hinge_flat(x.flatten(), y.flatten())):
        found = loss(x, binary)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), hinge_formula(x, binary), rtol=1e-5, atol=0)
    found = L.lovasz_softmax(x.sigmoid(), target, [2])
    assert found.dtype == torch.float32
    expected = softmax_formula(x.sigmoid().reshape(-1, 1), target.flatten(), [2])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


# ---- the rest of the file


@given(st.lists(st.booleans(), min_size=0, max_size=60))
def test_lovasz_grad(foreground):
    fg = torch.tensor(foreground, dtype=torch.float64)
    found = L.lovasz_grad(fg)
    jaccard = 1 - (fg.sum() - fg.cumsum(0)) / (fg.sum() + (1 - fg).cumsum(0))
    torch.testing.assert_close(found, jaccard.diff(prepend=jaccard.new_zeros(1)), rtol=1e-9, atol=1e-12)
    assert L.lovasz_grad(fg.float()).dtype == torch.float32 and L.lovasz_grad(fg.long()).dtype == torch.float32


def test_measures():
    preds, target = labels((3, 4, 6, 7), 4), labels((3, 4, 6, 7), 4, seed=5, ignore_index=255)
    valid = target != 255
    for per_image in (False, True):
        expected = []
        for c in range(4):
            of_images = []
            for p, t, v in zip(preds, target, valid, strict=True) if per_image else [(preds, target, valid)]:
                a, b = (t == c)[v], (p == c)[v]
                of_images.append(((a & b).sum() / (a | b).sum()).item())
            expected.append(100 * np.mean(of_images))
        np.testing.assert_allclose(L.iou(preds, target, 4, ignore=255, per_image=per_image), expected, rtol=1e-6)
    assert len(L.iou(preds, target.clamp(max=3), 4, ignore=0)) == 3
    binary = preds.clamp(max=1), target.clamp(max=1)
    np.testing.assert_allclose(L.iou_binary(*binary, per_image=False), L.iou(*binary, 2)[1])
    assert L.iou_binary(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)) == 100.0
    assert L.iou_binary(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), EMPTY=0.5) == 50.0


def test_cross_entropies():
    x, target = logits((2, 4, 6, 7)), labels((2, 4, 6, 7), 4, ignore_index=255)
    torch.testing.assert_close(L.xloss(x, target), F.cross_entropy(x, target, ignore_index=255))
    torch.testing.assert_close(
        L.xloss(x, target.clamp(max=3), ignore=3), F.cross_entropy(x, target.clamp(max=3), ignore_index=3)
    )
    binary = target.where(target == 255, target % 2)
    valid = binary != 255
    expected = F.binary_cross_entropy_with_logits(x[:, 0][valid], binary[valid].float())
    torch.testing.assert_close(L.binary_xloss(x[:, 0], binary, ignore=255), expected)
    torch.testing.assert_close(L.StableBCELoss()(x[:, 0][valid], binary[valid]), expected)


def test_mean():
    assert L.mean(iter([1.0, 2.0, 6.0])) == 3.0 and L.mean([]) == 0 and L.mean([], empty=7) == 7
    assert L.mean([1.0, math.nan, 2.0], ignore_nan=True) == 1.5 and L.isnan(L.mean([1.0, math.nan]))
    assert L.mean([torch.tensor(1.0), torch.tensor(2.0)]) == 1.5
    with pytest.raises(ValueError, match="Empty mean"):
        L.mean([], empty="raise")
