"""veerloss.compat.kornia: the Dice and Tversky losses beside the installed peer's."""

import kornia.losses as peer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, labels_of, logits_of, run, seeds

from veerloss.compat import kornia as ours

shapes = st.sampled_from([(2, 3, 4, 5), (1, 2, 1, 7), (3, 1, 2, 2), (4, 5, 6, 7)])
epsilons = st.sampled_from([1e-8, 0.0, 0.1, 1.0])
ignored = st.sampled_from([None, -100, 0, 1])
averages = st.sampled_from(["micro", "macro"])


def target_of(shape, seed, ignore, whole_image):
    """The last class is absent."""
    target = labels_of(shape, seed, ignore, max(shape[1] - 1, 1))
    if ignore is not None and whole_image:
        target[0] = ignore
    return target


def weight_of(kind, classes):
    """Class 0 has none."""
    return {"none": None, "some": torch.linspace(0, 2, classes).double(), "zero": torch.zeros(classes).double()}[kind]


@given(
    shape=shapes, seed=seeds, average=averages, eps=epsilons, weight=st.sampled_from(["none", "some", "zero"]), ignore=ignored,
    whole_image=st.booleans(),
)  # fmt: skip
def test_dice_loss(shape, seed, average, eps, weight, ignore, whole_image):
    x, target = logits_of(shape, seed), target_of(shape, seed, ignore, whole_image)
    args = (average, eps, weight_of(weight, shape[1]), ignore)
    agree(ours.dice_loss, peer.dice_loss, x, target, *args)
    agree(ours.DiceLoss(*args), peer.DiceLoss(*args), x, target)


@given(
    shape=shapes, seed=seeds, weights=st.sampled_from([(0.5, 0.5), (1.0, 1.0), (0.0, 0.7), (0.3, 1.5)]), eps=epsilons,
    ignore=ignored, whole_image=st.booleans(),
)  # fmt: skip
def test_tversky_loss(shape, seed, weights, eps, ignore, whole_image):
    x, target = logits_of(shape, seed), target_of(shape, seed, ignore, whole_image)
    args = (*weights, eps, ignore)
    agree(ours.tversky_loss, peer.tversky_loss, x, target, *args)
    agree(ours.TverskyLoss(*args), peer.TverskyLoss(*args), x, target)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_large_images(average, weighted):
    """kornia has another path for them."""
    shape = (2, 5, 80, 90)
    x, target = logits_of(shape, 0).float(), target_of(shape, 0, -100, False)
    weight = torch.linspace(0.5, 2, 5) if weighted else None
    agree(ours.dice_loss, peer.dice_loss, x, target, average, 1e-8, weight, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_a_weight_that_is_learned_has_a_gradient(average):
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0, -100)

    def gradient(module):
        weight = torch.nn.Parameter(torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
        loss = module.DiceLoss(average, weight=weight)
        assert dict(loss.named_parameters())["weight"] is weight
        return torch.autograd.grad(loss(x, target), weight)

    torch.testing.assert_close(gradient(ours), gradient(peer))


@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, average):
    """That of the logits; and of a wider weight, where there is one."""
    x, target = logits_of((2, 3, 4, 5), 0).to(dtype), labels_of((2, 3, 4, 5), 0)
    for weight in (None, torch.ones(3)):
        found, expected = (m.dice_loss(x, target, average, weight=weight) for m in (ours, peer))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(*(m.tversky_loss(x, target, 0.3, 0.7) for m in (ours, peer)), rtol=1e-2, atol=0)


X, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "target", "options"),
    [
        (X[0, 0], LABELS, {}),
        (X, LABELS[:1], {}),
        (X, LABELS[:, 1:], {}),
        (X, LABELS.float(), {}),
        (X, LABELS + 7, {}),
        (X, LABELS - 1, {}),
        (X, LABELS, {"average": "mean"}),
        (X, LABELS, {"weight": torch.ones(4)}),
        (X, LABELS, {"weight": [1.0, 1.0, 1.0]}),
    ],
    ids=["2-d", "images", "pixels", "float", "range", "negative", "average", "weight", "list"],
)
def test_both_refuse_with_the_same_error(x, target, options):
    for average in ("micro", "macro") if "average" not in options else (options["average"],):
        with pytest.raises(Exception) as theirs:
            peer.dice_loss(x, target, **{**options, "average": average})
        with pytest.raises(theirs.type):
            ours.dice_loss(x, target, **{**options, "average": average})
    if not options:
        with pytest.raises(Exception) as theirs:
            peer.tversky_loss(x, target, 0.5, 0.5)
        with pytest.raises(theirs.type):
            ours.tversky_loss(x, target, 0.5, 0.5)


# ---- where kornia is wrong


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_an_ignored_nan_is_nan_there(average):
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0)
    x[0, 1, 2, 3], target[0, 2, 3] = torch.nan, -100
    for weight in (None, torch.ones(3).double()):
        assert peer.dice_loss(x, target, average, weight=weight).isnan()
        value, gradient = run(ours.dice_loss, x, target, average, weight=weight)
        assert value.isfinite() and gradient.isfinite().all() and not gradient[0, :, 2, 3].any()


def test_no_image_is_nan_there():
    for average in ("micro", "macro"):
        assert peer.dice_loss(X[:0], LABELS[:0], average).isnan()
        for weight in (None, torch.ones(3)):
            assert ours.dice_loss(X[:0], LABELS[:0], average, weight=weight) == 0
    assert ours.tversky_loss(X[:0], LABELS[:0], 0.5, 0.5) == 0


def test_volumes_and_other_integers_are_refused_there():
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0)
    for average in ("micro", "macro"):
        expected = peer.dice_loss(x, target, average)
        for volume, labels in ((x.reshape(2, 3, 2, 2, 5), target.reshape(2, 2, 2, 5)), (x.flatten(2), target.flatten(1))):
            with pytest.raises(ValueError, match="BxNxHxW"):
                peer.dice_loss(volume, labels, average)
            torch.testing.assert_close(ours.dice_loss(volume, labels, average), expected)
        torch.testing.assert_close(ours.dice_loss(x, target.to(torch.uint8), average), expected)


def test_negative_numbers_are_taken_there():
    assert peer.tversky_loss(X, LABELS, -0.5, 0.5).isfinite()
    for loss, name in (
        (lambda: ours.tversky_loss(X, LABELS, -0.5, 0.5), "alpha"),
        (lambda: ours.tversky_loss(X, LABELS, 0.5, -0.5), "beta"),
        (lambda: ours.dice_loss(X, LABELS, eps=-1.0), "eps"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, inf\)"):
            loss()
