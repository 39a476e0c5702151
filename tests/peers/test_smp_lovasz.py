"""veerloss.compat.segmentation_models_pytorch: LovaszLoss beside the installed peer's.

The peer's weights are float32 whatever the logits are, and its sum of products of float64 ones fails: it runs in float32.
"""

import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from parity import agree, hard_of, labels_of, logits_of, run, seeds

from veerloss.compat import segmentation_models_pytorch as ours

peer = smp.losses

images = st.sampled_from([(2, 3, 4, 5), (1, 5, 1, 2), (4, 2, 3, 3), (2, 3, 2, 3, 2)])
ignored = st.sampled_from([None, 255, 0, 1, -1])


def agree_in_float32(mode, options, x, target):
    # Float32 keeps seven digits of logits and of a sum; a gradient of weights near 1 loses a few more.
    loss = ours.LovaszLoss(mode, **options), peer.LovaszLoss(mode, **options)
    agree(*loss, x.float(), target, rtol=1e-4, atol=1e-6)


@given(
    shape=images | st.just((7, 4)), seed=seeds, per_image=st.booleans(), ignore=ignored,
    dtype=st.sampled_from([torch.int64, torch.int16, torch.float32]), channel=st.booleans(),
)  # fmt: skip
def test_multiclass(shape, seed, per_image, ignore, dtype, channel):
    target = labels_of(shape, seed, ignore).to(dtype)
    valid = target.flatten(1).ne(-9 if ignore is None else ignore) if target.dim() > 1 else target.ne(ignore or 0)[None]
    per_image = per_image and len(shape) > 2
    assume(valid.any(1).all())  # see below for what the peer does
    target = target.unsqueeze(1) if channel else target
    agree_in_float32("multiclass", {"per_image": per_image, "ignore_index": ignore}, logits_of(shape, seed), target)


@given(
    shape=images, mode=st.sampled_from(["binary", "multilabel"]), seed=seeds, per_image=st.booleans(), ignore=ignored,
    dtype=st.sampled_from([torch.int64, torch.uint8, torch.float32]), channel=st.booleans(),
)  # fmt: skip
def test_hinge(shape, mode, seed, per_image, ignore, dtype, channel):
    x = logits_of(shape, seed)
    x = x if mode == "multilabel" else x[:, :1]
    target = hard_of(x.shape, seed).long()
    if ignore is not None:
        target.view(-1)[::3] = ignore
        assume(ignore != -1 or dtype != torch.uint8)
    target = target if mode == "multilabel" or channel else target.squeeze(1)
    agree_in_float32(mode, {"per_image": per_image, "ignore_index": ignore}, x, target.to(dtype))


def test_points():
    x, target = logits_of((50, 1), 0)[:, 0], hard_of((50,), 0)
    agree_in_float32("binary", {}, x, target)


def test_attributes():
    theirs, found = (m.LovaszLoss("binary", True, 255) for m in (peer, ours))
    assert isinstance(found, torch.nn.modules.loss._Loss)
    assert all(getattr(found, name) == value for name, value in vars(theirs).items() if not name.startswith("_"))


X, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize(
    ("mode", "x", "target"),
    [
        ("multi", X, LABELS),
        ("multiclass", X, LABELS[:, 1:]),
        ("multiclass", X, LABELS[:1]),
        ("multiclass", X[:, :1], LABELS),
        ("multiclass", X[:, 0], LABELS),
        ("binary", X[:, 0], LABELS[:, 1:]),
        ("multilabel", X, LABELS),
    ],
    ids=["mode", "pixels", "images", "one channel", "a map", "binary", "multilabel"],
)
def test_both_refuse_with_the_same_error(mode, x, target, ignore):
    with pytest.raises(Exception) as theirs:
        peer.LovaszLoss(mode, ignore_index=ignore)(x, target)
    with pytest.raises(theirs.type):
        ours.LovaszLoss(mode, ignore_index=ignore)(x, target)


# ---- where SMP is wrong


def test_from_logits_is_not_looked_at_there():
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0)
    p = x.softmax(1).float()
    theirs = peer.LovaszLoss("multiclass", from_logits=False)(p, target)
    assert theirs == peer.LovaszLoss("multiclass")(p, target)  # a softmax of the softmax
    expected = ours.LovaszLoss("multiclass")(x, target)
    torch.testing.assert_close(ours.LovaszLoss("multiclass", from_logits=False)(x.softmax(1), target), expected)
    binary = hard_of((2, 4, 5), 0)
    expected = ours.LovaszLoss("binary")(x[:, 0], binary)
    torch.testing.assert_close(ours.LovaszLoss("binary", from_logits=False)(x[:, 0].sigmoid(), binary), expected)


def test_everything_ignored_has_no_gradient_there():
    target = torch.full_like(LABELS, 255)
    assert peer.LovaszLoss("multiclass", ignore_index=255)(X, target).shape == (0, 3)
    for mode, x in (("multiclass", X), ("binary", X[:, 0])):
        value, gradient = run(ours.LovaszLoss(mode, ignore_index=255), x, target)
        assert value == 0 and value.shape == () and (gradient == 0).all()


def test_an_ignored_image_among_others_fails_there():
    x, target = logits_of((2, 3, 4, 5), 0).float(), labels_of((2, 3, 4, 5), 0)
    target[1] = 255
    with pytest.raises(RuntimeError, match="shape"):
        peer.LovaszLoss("multiclass", True, 255)(x, target)
    alone = ours.LovaszLoss("multiclass")(x[:1], target[:1])
    torch.testing.assert_close(ours.LovaszLoss("multiclass", True, 255)(x, target), alone / 2)


def test_no_image_is_an_int_there():
    assert type(peer.LovaszLoss("binary", True)(X[:0, 0], LABELS[:0])) is int
    value, _ = run(ours.LovaszLoss("binary", True), X[:0, 0], LABELS[:0])
    assert value == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["multiclass", "binary"])
def test_other_types_fail_there(mode, dtype):
    """But half precision in the hinge, whose loss is float32; here in both."""
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0) % 2
    x = (x if mode == "multiclass" else x[:, 0]).to(dtype)
    found = ours.LovaszLoss(mode)(x, target)
    if mode == "binary" and dtype != torch.float64:
        torch.testing.assert_close(found, peer.LovaszLoss(mode)(x, target))
    else:
        with pytest.raises(RuntimeError):
            peer.LovaszLoss(mode)(x, target)
        tolerance = {torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        expected = peer.LovaszLoss(mode)(x.float(), target).to(torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    ones = (x > 0).to(dtype)  # 0 and 1 have no logits
    assert ours.LovaszLoss(mode, from_logits=False)(ones, target).isfinite()


def test_points_of_a_batch_are_a_map_there():
    x, target = logits_of((2, 3, 20), 0).float(), labels_of((2, 3, 20), 0)
    with pytest.raises((ValueError, RuntimeError)):
        peer.LovaszLoss("multiclass")(x, target)
    torch.testing.assert_close(
        ours.LovaszLoss("multiclass")(x, target), peer.LovaszLoss("multiclass")(x[..., None], target[..., None])
    )


def test_labels_that_are_no_class_are_background_there():
    assert peer.LovaszLoss("multiclass")(X, LABELS + 255) == 0
    assert peer.LovaszLoss("binary")(X[:, 0], LABELS + 2).isfinite()
    for mode, x in (("multiclass", X), ("binary", X[:, 0])):
        with pytest.raises(IndexError, match="target holds 2"):
            ours.LovaszLoss(mode)(x, LABELS + 255 if mode == "multiclass" else LABELS + 2)


def test_points_are_images_there():
    x, target = logits_of((9, 3), 0).float(), labels_of((9, 3), 0)
    each = torch.stack([peer.LovaszLoss("multiclass")(x[i : i + 1], target[i : i + 1]) for i in range(9)]).mean()
    torch.testing.assert_close(peer.LovaszLoss("multiclass", True)(x, target), each)
    torch.testing.assert_close(ours.LovaszLoss("multiclass", True)(x, target), peer.LovaszLoss("multiclass")(x, target))
