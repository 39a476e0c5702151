"""veerloss.compat.pytorch_toolbelt: the Lovász losses beside the installed peer's.

The peer's weights are float32 whatever the logits are, and its sum of products of float64 ones fails: it runs in float32.
"""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from parity import agree, hard_of, labels_of, logits_of, run, seeds
from pytorch_toolbelt import losses as peer

from veerloss.compat import pytorch_toolbelt as ours

images = st.sampled_from([(2, 3, 4, 5), (1, 5, 1, 2), (4, 2, 3, 3), (2, 3, 2, 3, 2)])
ignored = st.sampled_from([None, 255, 0, 1, -1])


def agree_in_float32(name, options, x, target):
    # Float32 keeps seven digits of logits and of a sum; a gradient of weights near 1 loses a few more.
    agree(*(getattr(m, name)(**options) for m in (ours, peer)), x.float(), target, rtol=1e-4, atol=1e-6)


@given(
    shape=images | st.just((7, 4)), seed=seeds, per_image=st.booleans(), ignore=ignored, channel=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int16, torch.float32]), softmax=st.booleans(),
)  # fmt: skip
def test_lovasz_loss(shape, seed, per_image, ignore, channel, dtype, softmax):
    """Of probabilities, to which neither applies a softmax; of other numbers too."""
    target = labels_of(shape, seed, ignore).to(dtype)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore is None else target != ignore
    per_image = per_image and len(shape) > 2
    assume(valid.flatten(1 if per_image else 0).any(-1).all())  # see below for what the peer does
    x = logits_of(shape, seed)
    x = x.softmax(1) if softmax else x
    agree_in_float32("LovaszLoss", {"per_image": per_image, "ignore": ignore}, x, target.unsqueeze(1) if channel else target)


@given(
    shape=images, seed=seeds, per_image=st.booleans(), ignore=ignored | st.sampled_from([255.0, 0.5]), channel=st.booleans(),
    pooled=st.booleans(), dtype=st.sampled_from([torch.int64, torch.uint8, torch.float32]),
)  # fmt: skip
def test_binary_lovasz_loss(shape, seed, per_image, ignore, channel, pooled, dtype):
    x = logits_of(shape, seed)
    x = x if pooled else x[:, :1]
    target = hard_of(x.shape, seed)
    if ignore is not None:
        assume(dtype == torch.float32 or ignore != 0.5)
        assume(dtype != torch.uint8 or ignore != -1)
        target.view(-1)[::3] = ignore
    target = target if channel or pooled else target.squeeze(1)
    agree_in_float32("BinaryLovaszLoss", {"per_image": per_image, "ignore_index": ignore}, x, target.to(dtype))


def test_attributes():
    for name in ("LovaszLoss", "BinaryLovaszLoss"):
        theirs, found = (getattr(m, name)(True, 255) for m in (peer, ours))
        assert isinstance(found, torch.nn.modules.loss._Loss)
        assert all(getattr(found, key) == value for key, value in vars(theirs).items() if not key.startswith("_"))


X, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
MAP = torch.zeros(2, 4, 5)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize(
    ("name", "x", "target"),
    [
        ("LovaszLoss", X, torch.zeros(2, 3, 5).long()),
        ("LovaszLoss", X, LABELS[:1]),
        ("LovaszLoss", X[:, :1], LABELS),
        ("LovaszLoss", MAP, LABELS),
        ("BinaryLovaszLoss", MAP, torch.zeros(2, 3, 5).long()),
        ("BinaryLovaszLoss", X, LABELS),
    ],
    ids=["pixels", "images", "one channel", "a map", "binary", "binary, channels"],
)
def test_both_refuse_with_the_same_error(name, x, target, ignore):
    with pytest.raises(Exception) as theirs:
        getattr(peer, name)(False, ignore)(x, target)
    with pytest.raises(theirs.type):
        getattr(ours, name)(False, ignore)(x, target)


# ---- where toolbelt is wrong


def test_everything_ignored_has_no_gradient_there():
    target = torch.full_like(LABELS, 255)
    assert peer.LovaszLoss(ignore=255)(X, target).shape == (0, 3)
    for loss, x in ((ours.LovaszLoss(ignore=255), X), (ours.BinaryLovaszLoss(ignore_index=255), MAP)):
        value, gradient = run(loss, x, target)
        assert value == 0 and value.shape == () and (gradient == 0).all()


def test_an_ignored_image_among_others_fails_there():
    p, target = logits_of((2, 3, 4, 5), 0).softmax(1).float(), labels_of((2, 3, 4, 5), 0)
    target[1] = 255
    with pytest.raises(RuntimeError, match="shape"):
        peer.LovaszLoss(True, 255)(p, target)
    alone = ours.LovaszLoss()(p[:1], target[:1])
    torch.testing.assert_close(ours.LovaszLoss(True, 255)(p, target), alone / 2)


def test_float64_fails_there():
    p, target = logits_of((2, 3, 4, 5), 0).softmax(1), labels_of((2, 3, 4, 5), 0)
    for name, x, y in (("LovaszLoss", p, target), ("BinaryLovaszLoss", p[:, 0].contiguous(), target % 2)):
        with pytest.raises(RuntimeError):
            getattr(peer, name)()(x, y)
        found = getattr(ours, name)()(x, y)
        torch.testing.assert_close(found, getattr(peer, name)()(x.float(), y).double(), rtol=1e-6, atol=0)


def test_a_view_of_a_binary_map_fails_there():
    x, target = logits_of((2, 4, 5), 0).float(), hard_of((2, 4, 5), 0)
    with pytest.raises(RuntimeError, match="view size"):
        peer.BinaryLovaszLoss()(x.mT, target.mT)
    expected = peer.BinaryLovaszLoss()(x, target)
    torch.testing.assert_close(ours.BinaryLovaszLoss()(x.mT, target.mT), expected)


def test_labels_that_are_no_class_are_background_there():
    assert peer.LovaszLoss()(X, LABELS + 255) == 0
    assert peer.BinaryLovaszLoss()(MAP, LABELS + 2).isfinite()
    with pytest.raises(IndexError, match="target holds 255"):
        ours.LovaszLoss()(X, LABELS + 255)
    with pytest.raises(IndexError, match="target holds 2"):
        ours.BinaryLovaszLoss()(MAP, LABELS + 2)


def test_points_are_images_there():
    p, target = logits_of((9, 3), 0).softmax(1).float(), labels_of((9, 3), 0)
    each = torch.stack([peer.LovaszLoss()(p[i : i + 1], target[i : i + 1]) for i in range(9)]).mean()
    torch.testing.assert_close(peer.LovaszLoss(True)(p, target), each)
    torch.testing.assert_close(ours.LovaszLoss(True)(p, target), peer.LovaszLoss()(p, target))
