"""veerloss.compat.segmentation_models_pytorch: the focal losses beside the installed peer's."""

import pytest
import segmentation_models_pytorch.losses as peer
import segmentation_models_pytorch.losses._functional as functional
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, labels_of, logits_of, run, seeds, soft_of

from veerloss.compat import segmentation_models_pytorch as ours

SHAPES = [(2, 3, 4, 5), (3, 2, 7), (1, 4, 2, 3, 2), (2, 1, 5)]
thresholds = st.sampled_from([None, 0.3, 0.5])


@st.composite
def cases(draw):
    """(options, logits, target), where SMP is right."""
    shape, seed = draw(st.sampled_from(SHAPES)), draw(seeds)
    mode = draw(st.sampled_from(["binary", "multiclass", "multilabel"]))
    options = {
        "alpha": draw(st.none() | alphas),
        "gamma": draw(gammas),
        "ignore_index": draw(st.sampled_from([None, 255, 1])),
        "from_logits": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "batchwise_mean"] + ["none"] * (mode == "binary"))),
        "normalized": draw(st.booleans()),
        "reduced_threshold": draw(thresholds),
    }
    if options["gamma"] == 0.5:
        options["gamma"] = 1.5  # a NaN gradient there where p_t rounds to 1
    x = logits_of(shape, seed)
    if mode == "multiclass":
        if shape[1] == 1:
            options["ignore_index"] = None  # class 0 is all there is
        target = labels_of(shape, seed, options["ignore_index"])
    else:
        target = (soft_of if draw(st.booleans()) else hard_of)(shape, seed)
        target = draw(st.sampled_from([target, target.round().long()]))
        if mode == "multilabel":
            options["ignore_index"] = None  # SMP's own mask does not fit there
        elif options["ignore_index"] is not None:
            target.view(-1)[::3] = options["ignore_index"]
    if options["ignore_index"] is not None and options["reduction"] == "batchwise_mean" and mode == "multiclass":
        options["reduction"] = "sum"
    if mode != "binary" and options["reduction"] != "batchwise_mean" and draw(st.booleans()):
        options["class_weights"] = torch.linspace(0.2, 2, shape[1]).tolist()
    if not options["from_logits"]:
        x = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    return {"mode": mode, **options}, x, target


@given(cases())
def test_values_and_gradients(case):
    options, x, target = case
    agree(ours.FocalLoss(**options), peer.FocalLoss(**options), x, target, rtol=1e-6, atol=1e-9)


@given(
    shape=st.sampled_from([*SHAPES, (7,)]), seed=seeds, gamma=st.sampled_from([0.0, 1.0, 2.0, 3.3]), alpha=st.none() | alphas,
    reduction=st.sampled_from(["none", "mean", "sum", "batchwise_mean"]), normalized=st.booleans(), threshold=thresholds,
    soft=st.booleans(),
)  # fmt: skip
def test_functions(shape, seed, gamma, alpha, reduction, normalized, threshold, soft):
    x, target = logits_of(shape, seed), (soft_of if soft else hard_of)(shape, seed)
    args = (gamma, alpha, reduction, normalized, threshold)
    agree(ours.focal_loss_with_logits, functional.focal_loss_with_logits, x, target, *args, rtol=1e-6, atol=1e-9)
    if len(shape) > 1 and shape[1] > 1:
        target = labels_of(shape, seed, -100)
        both = ours.softmax_focal_loss_with_logits, functional.softmax_focal_loss_with_logits
        agree(*both, x, target, gamma, reduction, normalized, threshold, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{"mode": "ternary"}, {"mode": "binary", "class_weights": [1.0]}])
def test_both_refuse_with_the_same_error(options):
    with pytest.raises(Exception) as theirs:
        peer.FocalLoss(**options)
    with pytest.raises(theirs.type):
        ours.FocalLoss(**options)


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_both_refuse_another_shape(mode):
    x = torch.zeros(2, 3, 4)
    target = torch.zeros(2, 5, dtype=torch.long) if mode == "multiclass" else torch.zeros(2, 3, 5)
    for loss in (peer.FocalLoss(mode), ours.FocalLoss(mode)):
        with pytest.raises(ValueError):
            loss(x, target)


# ---- where SMP is wrong


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_all_ignored_is_nan_there(mode):
    x = logits_of((2, 3, 4), 0)
    target = torch.full((2, 3, 4) if mode == "binary" else (2, 4), 255)
    assert peer.FocalLoss(mode, ignore_index=255)(x, target).isnan()
    value, gradient = run(ours.FocalLoss(mode, ignore_index=255), x, target)
    assert value == 0 and not gradient.any()


def test_gamma_below_1_is_nan_there():
    x, target = torch.tensor([[[200.0], [0.5]]]), torch.tensor([[0]])
    assert run(peer.FocalLoss("multiclass", gamma=0.5), x, target)[1].isnan().any()
    assert run(ours.FocalLoss("multiclass", gamma=0.5), x, target)[1].isfinite().all()


def test_no_reduction_is_one_number_there():
    x, target = logits_of((2, 3, 4), 0), labels_of((2, 3, 4), 0)
    assert peer.FocalLoss("multiclass", reduction="none")(x, target).shape == ()
    loss = ours.FocalLoss("multiclass", reduction="none")(x, target)
    assert loss.shape == x.shape
    torch.testing.assert_close(loss.mean(), ours.FocalLoss("multiclass")(x, target))
    weighted = {"class_weights": [1.0, 2.0, 4.0]}
    loss = ours.FocalLoss("multiclass", reduction="none", **weighted)(x, target)
    torch.testing.assert_close(loss.mean(), ours.FocalLoss("multiclass", **weighted)(x, target))


def test_ignored_values_do_not_fit_multilabel_there():
    x, target = logits_of((2, 3, 4), 0), hard_of((2, 3, 4), 0)
    target[0, 1] = 255
    with pytest.raises(IndexError):
        peer.FocalLoss("multilabel", ignore_index=255)(x, target)
    loss = ours.FocalLoss("multilabel", ignore_index=255)
    kept = target != 255
    torch.testing.assert_close(loss(x, target), ours.FocalLoss("binary")(x[kept], target[kept]))


def test_a_label_that_is_no_class_is_background_there():
    x, target = logits_of((2, 3, 4), 0), labels_of((2, 3, 4), 0)
    target[0, 0] = 77
    assert peer.FocalLoss("multiclass")(x, target).isfinite()
    with pytest.raises(IndexError, match="target holds 77"):
        ours.FocalLoss("multiclass")(x, target)


def test_an_unknown_reduction_is_none_there():
    x = torch.zeros(4)
    assert peer.FocalLoss("binary", reduction="average")(x, x).shape == (4,)
    with pytest.raises(ValueError, match="reduction must be one of"):
        ours.FocalLoss("binary", reduction="average")
