"""veerloss.compat.kornia: the focal losses beside the installed peer's."""

import kornia.core.exceptions
import kornia.losses as peer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, labels_of, logits_of, reductions, run, seeds, shapes, soft_of

from veerloss.compat import kornia as ours

weights = st.sampled_from(["none", "constant", "parameter"])


def weight_of(kind, classes, seed):
    if kind == "none":
        return None
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(seed + 5), dtype=torch.float64)
    return weight if kind == "constant" else torch.nn.Parameter(weight)


@given(
    shape=shapes, seed=seeds, alpha=st.none() | alphas, gamma=gammas, reduction=reductions, weight=weights,
    ignore=st.sampled_from([None, -100, 0]),
)  # fmt: skip
def test_focal_loss(shape, seed, alpha, gamma, reduction, weight, ignore):
    target = labels_of(shape, seed, ignore)
    args = (target, alpha, gamma, reduction, weight_of(weight, shape[1], seed), ignore)
    agree(ours.focal_loss, peer.focal_loss, logits_of(shape, seed), *args)
    agree(ours.FocalLoss(*args[1:]), peer.FocalLoss(*args[1:]), logits_of(shape, seed), target)


@given(
    shape=shapes, seed=seeds, alpha=st.none() | alphas, gamma=gammas, reduction=reductions, weight=weights, pos_weight=weights,
    kind=st.sampled_from(["long", "hard", "soft"]), ignore=st.sampled_from([None, -100, 1]), some_ignored=st.booleans(),
)  # fmt: skip
def test_binary_focal_loss_with_logits(shape, seed, alpha, gamma, reduction, weight, pos_weight, kind, ignore, some_ignored):
    target = (soft_of if kind == "soft" else hard_of)(shape, seed)
    target = target.long() if kind == "long" else target
    if ignore is not None and some_ignored:
        target.view(-1)[::3] = ignore
    pos_weight, weight = weight_of(pos_weight, shape[1], seed + 1), weight_of(weight, shape[1], seed)
    args = (alpha, gamma, reduction, pos_weight, weight, ignore)
    agree(ours.binary_focal_loss_with_logits, peer.binary_focal_loss_with_logits, logits_of(shape, seed), target, *args)
    modules = ours.BinaryFocalLossWithLogits(*args), peer.BinaryFocalLossWithLogits(*args)
    agree(*modules, logits_of(shape, seed), target)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("binary", [False, True])
def test_a_weight_that_is_learned_has_a_gradient(binary, name):
    if name == "pos_weight" and not binary:
        pytest.skip("the softmax has none")
    x = logits_of((2, 3, 5), 0)
    target = hard_of((2, 3, 5), 0) if binary else labels_of((2, 3, 5), 0, -100)

    def gradient(module):
        weight = weight_of("parameter", 3, 0)
        loss = module(0.25, reduction="mean", **{name: weight})
        assert dict(loss.named_parameters())[name] is weight
        return torch.autograd.grad(loss(x, target), weight)

    both = (m.BinaryFocalLossWithLogits if binary else m.FocalLoss for m in (ours, peer))
    torch.testing.assert_close(*map(gradient, both))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scripted(weighted, reduction):
    x, labels, soft = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0, -100), soft_of((2, 3, 5), 0)
    weight = weight_of("constant", 3, 0) if weighted else None
    softmax = {"alpha": 0.25, "gamma": 1.5, "reduction": reduction, "weight": weight}
    binary = {**softmax, "pos_weight": weight}
    torch.testing.assert_close(torch.jit.script(ours.focal_loss)(x, labels, **softmax), ours.focal_loss(x, labels, **softmax))
    scripted = torch.jit.script(ours.binary_focal_loss_with_logits)
    torch.testing.assert_close(scripted(x, soft, **binary), ours.binary_focal_loss_with_logits(x, soft, **binary))
    module = ours.FocalLoss(**softmax)
    torch.testing.assert_close(torch.jit.script(module)(x, labels), module(x, labels))
    module = ours.BinaryFocalLossWithLogits(**binary)
    torch.testing.assert_close(torch.jit.script(module)(x, soft), module(x, soft))


def test_alpha_as_a_tensor():
    x, labels, hard = logits_of((2, 3, 4), 0), labels_of((2, 3, 4), 0), hard_of((2, 3, 4), 0)
    agree(ours.focal_loss, peer.focal_loss, x, labels, torch.tensor(0.25))
    agree(ours.binary_focal_loss_with_logits, peer.binary_focal_loss_with_logits, x, hard, torch.tensor(0.25))


def test_gradcheck():
    x = logits_of((2, 3, 4), 0).requires_grad_()
    assert torch.autograd.gradcheck(ours.focal_loss, (x, labels_of((2, 3, 4), 0, -100), 0.25))
    for target in (hard_of((2, 3, 4), 0), soft_of((2, 3, 4), 0)):
        assert torch.autograd.gradcheck(ours.binary_focal_loss_with_logits, (x, target))


X, LABELS, HARD = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "target", "options"),
    [
        (X[0, 0], LABELS, {}),
        (X, LABELS[:1], {}),
        (X, LABELS.int(), {}),
        (X, LABELS + 7, {}),
        (X, LABELS + 7, {"reduction": "mean"}),
        (X, LABELS, {"reduction": "average"}),
        (X, LABELS, {"weight": torch.ones(4)}),
        (X, LABELS, {"weight": [1.0, 1.0, 1.0]}),
    ],
    ids=["1-d", "shape", "int32", "range", "range, mean", "reduction", "weight", "list"],
)
def test_both_refuse_with_the_same_error(x, target, options):
    with pytest.raises(Exception) as theirs:
        peer.focal_loss(x, target, 0.25, **options)
    with pytest.raises(theirs.type):
        ours.focal_loss(x, target, 0.25, **options)
    if "range" not in str(theirs.value) and target.dtype == torch.long and target.shape == LABELS.shape and not target.any():
        for loss in (peer, ours):
            with pytest.raises(theirs.type):
                loss.binary_focal_loss_with_logits(x, HARD, **options)


def test_another_shape_is_refused():
    for loss in (peer, ours):
        with pytest.raises(kornia.core.exceptions.BaseError):
            loss.binary_focal_loss_with_logits(X, LABELS)


# ---- where kornia is wrong


def test_alpha_out_of_range_is_taken_there():
    assert peer.focal_loss(X, LABELS, 1.5, reduction="sum") < 0
    for loss in (lambda: ours.focal_loss(X, LABELS, 1.5), lambda: ours.binary_focal_loss_with_logits(X, HARD, 1.5)):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            loss()


def test_an_ignored_nan_is_nan_in_the_binary_loss_there():
    x, target = torch.tensor([[torch.nan, 1.0]]), torch.tensor([[-100.0, 1.0]])
    assert peer.binary_focal_loss_with_logits(x, target, reduction="sum").isnan()
    value, gradient = run(ours.binary_focal_loss_with_logits, x, target, reduction="sum")
    assert value.isfinite() and gradient[0, 0] == 0


def test_no_pixels_are_nan_there():
    x, labels = torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.long)
    for loss, target in ((lambda m: m.focal_loss, labels), (lambda m: m.binary_focal_loss_with_logits, x)):
        assert loss(peer)(x, target, 0.25, reduction="mean").isnan()
        assert loss(ours)(x, target, 0.25, reduction="mean") == 0
