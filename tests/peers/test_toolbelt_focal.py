"""veerloss.compat.pytorch_toolbelt: the focal losses beside the installed peer's."""

import pytest
import pytorch_toolbelt.losses as peer
import pytorch_toolbelt.losses.functional as functional
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, labels_of, logits_of, run, seeds, soft_of

from veerloss.compat import pytorch_toolbelt as ours

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
# toolbelt computes in float32, whatever the logits are.
FLOAT32 = {"rtol": 5e-5, "atol": 1e-6}
SHAPES = st.sampled_from([(2, 3, 4, 5), (3, 2, 7), (2, 1, 5)])
reductions = st.sampled_from(["none", "mean", "sum", "batchwise_mean"])
thresholds = st.sampled_from([None, None, 0.3, 0.5])


@st.composite
def binary_options(draw, classes):
    options = {
        "alpha": draw(st.none() | alphas),
        "gamma": draw(gammas),
        "ignore_index": draw(st.sampled_from([None, -100, 255])),
        "reduction": draw(reductions),
        "normalized": draw(st.booleans()),
        "reduced_threshold": draw(thresholds),
        "activation": draw(st.sampled_from(["sigmoid", "sigmoid", "softmax"])),
        "softmax_dim": 1,
        "class_weights": draw(st.sampled_from([None, torch.linspace(0.2, 2, classes)])),
    }
    if options["gamma"] == 0.5 and (options["reduced_threshold"] is not None or options["activation"] == "softmax"):
        options["gamma"] = 1.5  # a NaN gradient there where p_t rounds to 1
    return options


@given(data=st.data(), shape=SHAPES, seed=seeds, kind=st.sampled_from(["hard", "soft", "long", "index"]))
def test_binary(data, shape, seed, kind):
    options = data.draw(binary_options(shape[1]))
    ignore = options["ignore_index"]
    if ignore is not None and options["gamma"] % 1:
        options["gamma"] = 2.0  # a NaN gradient there: see below
    if kind == "index":
        target = labels_of(shape, seed, ignore)
    else:
        target = (soft_of if kind == "soft" else hard_of)(shape, seed)
        target = target.long() if kind == "long" else target
        if ignore is not None:
            target.view(-1)[::3] = ignore
    x = logits_of(shape, seed)
    agree(ours.BinaryFocalLoss(**options), peer.BinaryFocalLoss(**options), x, target, **FLOAT32)
    if kind != "index":
        agree(ours.focal_loss_with_logits, functional.focal_loss_with_logits, x, target, **options, **FLOAT32)


@given(
    shape=SHAPES, seed=seeds, gamma=st.sampled_from([0.0, 1.0, 2.0, 3.3]), reduction=reductions, normalized=st.booleans(),
    threshold=thresholds, weighted=st.booleans(), ignore=st.sampled_from([-100, 255]),
)  # fmt: skip
def test_cross_entropy_focal_loss(shape, seed, gamma, reduction, normalized, threshold, weighted, ignore):
    options = {
        "gamma": gamma,
        "reduction": reduction,
        "normalized": normalized,
        "reduced_threshold": threshold,
        "ignore_index": ignore,
        "class_weights": torch.linspace(0.2, 2, shape[1]) if weighted else None,
    }
    x, target = logits_of(shape, seed).float(), labels_of(shape, seed, None if normalized else ignore)
    agree(ours.CrossEntropyFocalLoss(**options), peer.CrossEntropyFocalLoss(**options), x, target, **FLOAT32)
    both = ours.softmax_focal_loss_with_logits, functional.softmax_focal_loss_with_logits
    agree(*both, x, target, **options, **FLOAT32)


def test_deprecated_names():
    x, target = logits_of((2, 3, 4), 0), hard_of((2, 3, 4), 0)
    for name in ("sigmoid_focal_loss", "reduced_focal_loss"):
        agree(getattr(ours, name), getattr(functional, name), x, target, **FLOAT32)
        with pytest.warns(DeprecationWarning, match="focal_loss_with_logits"):
            getattr(ours, name)(x, target)
    assert isinstance(ours.FocalLoss(gamma=1.0), ours.CrossEntropyFocalLoss)


def test_both_refuse_with_the_same_error():
    for target in (torch.zeros(2, 4), torch.full((2, 4), 7), torch.zeros(2, 1, 4)):
        with pytest.raises(Exception) as theirs:
            peer.BinaryFocalLoss()(torch.zeros(2, 3, 4), target)
        with pytest.raises(theirs.type):
            ours.BinaryFocalLoss()(torch.zeros(2, 3, 4), target)


# ---- where toolbelt is wrong


def test_repr_without_class_weights_fails_there():
    with pytest.raises(AttributeError):
        repr(peer.BinaryFocalLoss())
    assert "gamma=2.0" in repr(ours.BinaryFocalLoss())


def test_gamma_below_1_is_nan_there():
    x, target = torch.tensor([200.0, -200.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    assert run(functional.focal_loss_with_logits, x, target, gamma=0.5)[1].isnan().any()
    assert run(ours.focal_loss_with_logits, x, target, gamma=0.5)[1].isfinite().all()


def test_an_ignored_value_is_nan_for_a_fractional_gamma_there():
    """p_t of a target of 255 is outside [0, 1], and a negative number to the power of 1.5 is NaN."""
    x, target = logits_of((2, 3), 0), torch.tensor([[255, 0, 1], [1, 0, 0]])
    options = {"gamma": 1.5, "ignore_index": 255}
    assert run(functional.focal_loss_with_logits, x, target, **options)[1].isnan().any()
    assert run(ours.focal_loss_with_logits, x, target, **options)[1].isfinite().all()


def test_an_unknown_reduction_is_none_there():
    x = torch.zeros(4)
    assert functional.focal_loss_with_logits(x, x, reduction="average").shape == (4,)
    with pytest.raises(ValueError, match="reduction must be one of"):
        ours.focal_loss_with_logits(x, x, reduction="average")


def test_ignored_pixels_are_part_of_the_normaliser_there():
    x, target = logits_of((2, 3, 4), 0).float(), labels_of((2, 3, 4), 0)
    target[0] = -100
    loss = {module: module.CrossEntropyFocalLoss(normalized=True, reduction="sum") for module in (peer, ours)}
    expected = loss[peer](x[1:], target[1:])
    torch.testing.assert_close(loss[ours](x, target), expected)
    assert loss[peer](x, target) < 0.9 * expected


def test_no_elements_are_nan_there():
    x = torch.zeros(0, 3)
    assert functional.focal_loss_with_logits(x, x).isnan()
    assert ours.focal_loss_with_logits(x, x) == 0
