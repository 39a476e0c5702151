"""veerloss.compat.kornia: the Lovász losses beside the installed peer's."""

import kornia.losses as peer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, hard_of, labels_of, logits_of, run, seeds

from veerloss.compat import kornia as ours

images = st.sampled_from([(2, 3, 4, 5), (1, 2, 1, 7), (3, 4, 2, 2), (2, 2, 1, 1), (1, 6, 3, 4)])
dtypes = st.sampled_from([torch.int64, torch.int32, torch.uint8])
weights = st.sampled_from(["none", "constant", "parameter", "float32"])


def weight_of(kind, classes, seed):
    if kind == "none":
        return None
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(seed + 5), dtype=torch.float64)
    return {"constant": weight, "parameter": torch.nn.Parameter(weight), "float32": weight.float()}[kind]


@given(shape=images, seed=seeds, weight=weights, dtype=dtypes, absent=st.booleans(), one_for_all=st.booleans())
def test_lovasz_softmax_loss(shape, seed, weight, dtype, absent, one_for_all):
    target = labels_of(shape, seed, classes=shape[1] - absent).to(dtype)
    x = logits_of(shape, seed)
    x = x[:1] if one_for_all else x
    weight = weight_of(weight, shape[1], seed)
    agree(ours.lovasz_softmax_loss, peer.lovasz_softmax_loss, x, target, weight)
    agree(ours.LovaszSoftmaxLoss(weight), peer.LovaszSoftmaxLoss(weight), x, target)


@given(shape=images, seed=seeds, dtype=st.sampled_from([torch.int64, torch.uint8, torch.bool, torch.float32, torch.float64]))
def test_lovasz_hinge_loss(shape, seed, dtype):
    x = logits_of((shape[0], 1, *shape[2:]), seed)
    target = hard_of(x[:, 0].shape, seed).to(dtype)
    agree(ours.lovasz_hinge_loss, peer.lovasz_hinge_loss, x, target)
    agree(ours.LovaszHingeLoss(), peer.LovaszHingeLoss(), x, target)


def test_logits_of_integers():
    x, target = torch.tensor([[[[2, -1, 0]]]]), torch.tensor([[[1, 1, 0]]])
    torch.testing.assert_close(ours.lovasz_hinge_loss(x, target), peer.lovasz_hinge_loss(x, target))
    assert ours.lovasz_hinge_loss(x, target).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_types(weighted, dtype):
    x, target = logits_of((2, 3, 8, 8), 0).to(dtype), labels_of((2, 3, 8, 8), 0)
    weight = torch.tensor([0.5, 2.0, 1.0]) if weighted else None
    found, theirs = ours.lovasz_softmax_loss(x, target, weight), peer.lovasz_softmax_loss(x, target, weight)
    assert found.dtype == theirs.dtype
    # Ours is rounded once, to half precision; kornia rounds the probabilities too.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(found, theirs, rtol=tolerance, atol=0)


def test_a_weight_that_is_learned_has_a_gradient():
    x, target = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0)

    def gradient(module):
        weight = weight_of("parameter", 3, 0)
        loss = module.LovaszSoftmaxLoss(weight)
        assert dict(loss.named_parameters())["weight"] is weight
        return torch.autograd.grad(loss(x, target), weight)

    torch.testing.assert_close(gradient(ours), gradient(peer))


def test_a_weight_moves_with_its_module():
    for module in (peer, ours):
        loss = module.LovaszSoftmaxLoss(torch.ones(3)).double()
        assert loss.weight.dtype == torch.float64 and not loss.state_dict()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("weighted", [False, True])
def test_scripted(weighted):
    x, target, binary = logits_of((2, 3, 4, 5), 0), labels_of((2, 3, 4, 5), 0), hard_of((2, 4, 5), 0)
    weight = weight_of("constant", 3, 0) if weighted else None
    agree(torch.jit.script(ours.lovasz_softmax_loss), ours.lovasz_softmax_loss, x, target, weight)
    module = ours.LovaszSoftmaxLoss(weight)
    agree(torch.jit.script(module), module, x, target)
    agree(torch.jit.script(ours.lovasz_hinge_loss), ours.lovasz_hinge_loss, x[:, :1], binary)
    agree(torch.jit.script(ours.LovaszHingeLoss()), ours.LovaszHingeLoss(), x[:, :1], binary)


X, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "target", "weight"),
    [
        (X[0, 0], LABELS, None),
        (X, LABELS[0], None),
        (X, LABELS[:1], None),
        (X, LABELS[:, 1:], None),
        (X[:, :1], LABELS, None),
        (X, LABELS + 3, None),
        (X, LABELS - 1, None),
        (X, LABELS.to("meta"), None),
        (X, LABELS, torch.ones(4)),
        (X, LABELS, [1.0, 1.0, 1.0]),
        (X, LABELS, torch.ones(3, device="meta")),
    ],
    ids=["2-d", "target", "images", "pixels", "one class", "too large", "negative", "device", "weight", "list", "its device"],
)
def test_both_refuse_with_the_same_error(x, target, weight):
    with pytest.raises(Exception) as theirs:
        peer.lovasz_softmax_loss(x, target, weight)
    with pytest.raises(theirs.type):
        ours.lovasz_softmax_loss(x, target, weight)


@pytest.mark.parametrize(
    ("x", "target"),
    [
        (X[0, 0], LABELS),
        (X, LABELS),
        (X[:, :1], LABELS[0]),
        (X[:, :1], LABELS[:1]),
        (X[:1, :1], LABELS),
        (X[:, :1], LABELS[:, 1:]),
        (X[:, :1], LABELS.to("meta")),
    ],
    ids=["2-d", "channels", "target", "images", "one for all", "pixels", "device"],
)
def test_both_refuse_with_the_same_error_of_the_hinge(x, target):
    with pytest.raises(Exception) as theirs:
        peer.lovasz_hinge_loss(x, target)
    with pytest.raises(theirs.type):
        ours.lovasz_hinge_loss(x, target)


# ---- where kornia is wrong


def test_a_binary_label_of_minus_100_can_make_a_negative_loss_there():
    x, target = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[0, -100]]])
    assert peer.lovasz_hinge_loss(x, target) < 0
    with pytest.raises(IndexError, match="target holds -100"):
        ours.lovasz_hinge_loss(x, target)


def test_no_image_fails_there():
    for name, x in (("lovasz_softmax_loss", X), ("lovasz_hinge_loss", X[:, :1])):
        with pytest.raises(RuntimeError, match="0 elements"):
            getattr(peer, name)(x[:0], LABELS[:0])
        value, _ = run(getattr(ours, name), x[:0], LABELS[:0])
        assert value == 0


def test_volumes_are_refused_there():
    x, target = logits_of((2, 3, 2, 3, 4), 0), labels_of((2, 3, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="Shape"):
        peer.lovasz_softmax_loss(x, target)
    expected = peer.lovasz_softmax_loss(x.flatten(3), target.flatten(2))
    torch.testing.assert_close(ours.lovasz_softmax_loss(x, target), expected)


def test_the_gradient_loses_its_digits_there():
    """At a million pixels: it subtracts float32 Jaccard losses that differ by 1e-6."""
    x = logits_of((1, 2, 1024, 1024), 0, scale=0.3).float()
    target = (torch.rand(1, 1024, 1024, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    _, truth = run(peer.lovasz_softmax_loss, x.double(), target)

    def error(loss):
        return (run(loss, x, target)[1] - truth).abs().sum() / truth.abs().sum()

    assert error(ours.lovasz_softmax_loss) < 1e-3 < 1e-2 < error(peer.lovasz_softmax_loss)
