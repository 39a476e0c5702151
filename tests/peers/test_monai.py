"""veerloss.compat.monai: the focal losses beside the installed peer's."""

import warnings

import monai.losses as peer
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.utils import LossReduction
from parity import agree, alphas, gammas, hard_of, labels_of, logits_of, reductions, run, seeds, soft_of

from veerloss.compat.monai import FocalLoss

# MONAI computes in float32, whatever the logits are.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}
SHAPES = [(2, 3, 4, 5), (1, 2, 7), (2, 4, 2, 3, 2), (3, 3)]


@st.composite
def cases(draw):
    """(options, logits, target), where MONAI is right."""
    shape = draw(st.sampled_from(SHAPES))
    seed = draw(seeds)
    options = {
        "include_background": draw(st.booleans()),
        "to_onehot_y": draw(st.booleans()),
        "gamma": draw(gammas),
        "reduction": draw(reductions),
        "use_softmax": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([None, None, 255, 1])),
    }
    if options["use_softmax"] and options["gamma"] == 0.5:
        options["gamma"] = 1.5  # NaN there where p rounds to 1
    classes = shape[1] - (not options["include_background"])
    options["alpha"] = draw(st.none() | alphas | st.just("per class"))
    options["weight"] = draw(st.sampled_from([None, 0.3] + (["per class"] if classes > 1 else [])))
    for name in ("alpha", "weight"):
        if options[name] == "per class":
            options[name] = torch.linspace(0.1, 0.9, classes).tolist()
    if options["reduction"] == "sum" and len(shape) == 2:
        options["reduction"] = "mean"
    labels = labels_of(shape, seed)
    if options["to_onehot_y"]:
        if options["ignore_index"] == 255:
            labels.view(-1)[::3] = 255
        target = labels.unsqueeze(1)
        target = draw(st.sampled_from([target, target.float()]))
    else:
        kind = draw(st.sampled_from(["one-hot", "long", "soft"]))
        target = F.one_hot(labels, shape[1]).movedim(-1, 1)
        target = {"one-hot": target.float(), "long": target, "soft": soft_of(shape, seed).float()}[kind]
        if options["ignore_index"] == 255:
            target[::2, :, ...] = 0
        elif options["ignore_index"] == 1 and kind == "soft":
            target[:, 1] = target[:, 1].round()  # half ignored is no more than an accident
    return options, logits_of(shape, seed).float(), target


@given(cases())
def test_values_and_gradients(case):
    options, x, target = case
    ours, theirs = FocalLoss(**options), peer.FocalLoss(**options)
    if options["ignore_index"] is not None and options["reduction"] == "mean":
        # C times larger there than the mean over what counts: see below
        theirs = lambda x, t, loss=theirs: loss(x, t) / (x.shape[1] - (not options["include_background"]))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(ours, theirs, x, target, **FLOAT32)


@given(
    seed=seeds, softmax=st.booleans(), gamma=gammas, alpha=st.none() | alphas, reduction=reductions,
    ignore=st.sampled_from([None, 255]), kind=st.sampled_from(["hard", "long", "soft"]),
    shape=st.sampled_from([(2, 1, 4, 3), (3, 1, 5)]),
)  # fmt: skip
def test_one_channel(seed, softmax, gamma, alpha, reduction, ignore, kind, shape):
    target = (soft_of if kind == "soft" else hard_of)(shape, seed).float()
    target = target.long() if kind == "long" else target
    if ignore is not None:
        target.view(-1)[::4] = ignore
    gamma = 1.5 if softmax and gamma == 0.5 else gamma  # p is 1: NaN there
    options = {"use_softmax": softmax, "gamma": gamma, "alpha": alpha, "reduction": reduction, "ignore_index": ignore}
    agree(FocalLoss(**options), peer.FocalLoss(**options), logits_of(shape, seed).float(), target, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softmax", [False, True])
def test_the_loss_is_float32(softmax, dtype):
    x, target = logits_of((2, 3, 6), 0).to(dtype), labels_of((2, 3, 6), 0).unsqueeze(1)
    for reduction in ("none", "mean", "sum"):
        losses = (m(to_onehot_y=True, use_softmax=softmax, reduction=reduction) for m in (FocalLoss, peer.FocalLoss))
        (value, gradient), (expected, _) = (run(loss, x, target) for loss in losses)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("options", [
    {},
    {"alpha": 0.25, "reduction": "sum", "gamma": 0},
    {"alpha": [0.1, 0.2, 0.3], "weight": [1, 2, 3], "reduction": "none", "ignore_index": 255},
    {"include_background": False, "alpha": 0.3, "ignore_index": 1},
])  # fmt: skip
def test_scripted(options, softmax):
    x, labels = logits_of((2, 3, 5), 0).float(), labels_of((2, 3, 5), 0, options.get("ignore_index")).unsqueeze(1)
    loss = FocalLoss(to_onehot_y=True, use_softmax=softmax, **options)
    scripted = torch.jit.script(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(scripted(x, labels), loss(x, labels))
        dense = F.one_hot(labels[:, 0] % 3, 3).movedim(-1, 1).float()
        loss = FocalLoss(use_softmax=softmax, **options)
        torch.testing.assert_close(torch.jit.script(loss)(x, dense), loss(x, dense))


def test_state_is_that_of_monai():
    for options in ({}, {"weight": [1.0, 2.0]}, {"alpha": [0.1, 0.2]}):
        assert FocalLoss(**options).state_dict().keys() == peer.FocalLoss(**options).state_dict().keys()


def test_reduction_as_an_enumeration():
    assert FocalLoss(reduction=LossReduction.SUM).reduction == "sum"


def test_volumes_with_metadata():
    x, labels = logits_of((2, 3, 4, 4), 0).float(), labels_of((2, 3, 4, 4), 0).unsqueeze(1).float()
    loss = FocalLoss(to_onehot_y=True)
    x = MetaTensor(x).requires_grad_()
    value = loss(x, MetaTensor(labels))
    value.backward()
    torch.testing.assert_close(value.detach().as_tensor(), loss(x.detach().as_tensor(), labels))


X = torch.ones(1, 4, 3, 3)


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"weight": (1.0, 1.0, 2.0)}, X),
        ({"include_background": False, "weight": (1.0,) * 4}, X),
        ({"include_background": False, "weight": (1.0, 1.0, -1.0)}, X),
        ({"weight": -1}, X),
        ({"alpha": [0.1, 0.2]}, X),
        ({"alpha": [0.1, 0.2], "use_softmax": True}, X),
        ({"reduction": "unknown"}, X),
        ({"reduction": None}, X),
        ({}, X[:, :1]),
        ({"to_onehot_y": True}, X[:, :2]),
        ({"to_onehot_y": True}, X[:, :1, 1:]),
    ],
)
def test_both_refuse_with_the_same_error(options, target):
    with pytest.raises(Exception) as theirs:
        peer.FocalLoss(**options)(X, target)
    with pytest.raises(theirs.type):
        FocalLoss(**options)(X, target)


@pytest.mark.parametrize("options", [{"to_onehot_y": True}, {"include_background": False}])
def test_both_warn_of_one_channel(options):
    for loss in (peer.FocalLoss, FocalLoss):
        with pytest.warns(UserWarning, match="single channel prediction"):
            loss(**options)(X[:, :1], X[:, :1])


def test_both_warn_of_alpha_without_background():
    for loss in (peer.FocalLoss, FocalLoss):
        with pytest.warns(UserWarning, match="scalar `alpha` ignored"):
            loss(include_background=False, use_softmax=True, alpha=0.25)(X, X)


# ---- where MONAI is wrong


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("as_index", [False, True])
def test_ignore_index_makes_the_mean_c_times_larger_there(as_index, softmax):
    """Even where nothing is ignored."""
    x, labels = logits_of((2, 3, 5), 0).float(), labels_of((2, 3, 5), 0)
    target = labels.unsqueeze(1) if as_index else F.one_hot(labels, 3).movedim(-1, 1).float()
    options = {"to_onehot_y": as_index, "use_softmax": softmax}
    plain, with_index = (peer.FocalLoss(**options, ignore_index=i)(x, target) for i in (None, 255))
    torch.testing.assert_close(with_index, 3 * plain)
    for i in (None, 255):
        torch.testing.assert_close(FocalLoss(**options, ignore_index=i)(x, target), plain)


def test_the_sum_without_a_volume_is_a_mean_there():
    x, target = logits_of((4, 3), 0).float(), labels_of((4, 3), 0).unsqueeze(1)
    options = {"to_onehot_y": True}
    total = peer.FocalLoss(**options, reduction="none")(x, target).sum()
    torch.testing.assert_close(peer.FocalLoss(**options, reduction="sum")(x, target), total / 12)
    torch.testing.assert_close(FocalLoss(**options, reduction="sum")(x, target), total)


def test_an_ignored_nan_is_nan_there():
    x, labels = logits_of((2, 3, 5), 0).float(), labels_of((2, 3, 5), 0).unsqueeze(1)
    x[0, 1, 2], labels[0, 0, 2] = torch.nan, 255
    for softmax in (False, True):
        options = {"to_onehot_y": True, "ignore_index": 255, "use_softmax": softmax}
        assert peer.FocalLoss(**options)(x, labels).isnan()
        value, gradient = run(FocalLoss(**options), x, labels)
        assert value.isfinite() and (gradient[0, :, 2] == 0).all()


def test_gamma_below_1_is_nan_in_the_softmax_there():
    x, labels = torch.tensor([[[200.0, 1.0], [-200.0, 0.5]]]), torch.tensor([[[0, 1]]])
    options = {"to_onehot_y": True, "use_softmax": True, "gamma": 0.5}
    assert run(peer.FocalLoss(**options), x, labels)[1].isnan().any()
    assert run(FocalLoss(**options), x, labels)[1].isfinite().all()
