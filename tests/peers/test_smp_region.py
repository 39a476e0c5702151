"""veerloss.compat.segmentation_models_pytorch: the Dice, Jaccard and Tversky losses beside the installed peer's."""

import pytest
import segmentation_models_pytorch.losses as peer
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, hard_of, labels_of, logits_of, run, seeds, soft_of

from veerloss.compat import segmentation_models_pytorch as ours

NAMES = ["DiceLoss", "JaccardLoss", "TverskyLoss"]
over_names = pytest.mark.parametrize("name", NAMES)
SHAPES = [(2, 3, 4, 5), (1, 5, 7), (2, 3, 2, 3, 2), (7, 2)]


@st.composite
def cases(draw, name):
    """(options, logits or probabilities, target), where SMP is right."""
    mode = draw(st.sampled_from(["binary", "multiclass", "multilabel"]))
    shape, seed = draw(st.sampled_from(SHAPES + [(2, 1, 6)] * (mode != "multiclass"))), draw(seeds)
    options = {
        "log_loss": draw(st.booleans()),
        "from_logits": draw(st.booleans()),
        "smooth": draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "ignore_index": draw(st.sampled_from([None, 255, 1])),
        "eps": draw(st.sampled_from([1e-7, 1e-3, 0.7, 1e-9])),
    }
    classes = range(shape[1])
    if mode != "binary":
        options["classes"] = draw(st.sampled_from([None, [0], [1, 0, 1][: 3 * (shape[1] > 1)] or [0], list(classes)]))
        options["class_weights"] = draw(st.sampled_from([None, [0.5 + c for c in classes]]))
    if name == "TverskyLoss":
        options["alpha"], options["beta"] = draw(st.sampled_from([(0.3, 0.7), (1.5, 1.0), (0.7, 0.0)]))
        options["gamma"] = draw(st.sampled_from([1.0, 2.0]))
    x = logits_of(shape, seed)
    if mode == "multiclass":
        target = labels_of(shape, seed, options["ignore_index"], shape[1] - 1)  # the last class is absent
    else:
        target = (soft_of if draw(st.booleans()) else hard_of)(shape, seed)
        target[:, 0] *= draw(st.sampled_from([0, 1]))
        target = draw(st.sampled_from([target, target.round().long()]))
        if options["ignore_index"] is not None:
            target.view(-1)[::3] = options["ignore_index"]
    if not options["from_logits"]:
        x = x.softmax(1) if mode == "multiclass" else x.sigmoid()
    return {"mode": mode, **options}, x, target


@over_names
@given(data=st.data())
def test_values_and_gradients(name, data):
    options, x, target = data.draw(cases(name))
    agree(getattr(ours, name)(**options), getattr(peer, name)(**options), x, target)


@over_names
def test_float32(name):
    """Sums of the peer lose some digits: |p| + |t| - |p - t|."""
    x, labels = logits_of((2, 4, 30, 31), 0).float(), labels_of((2, 4, 30, 31), 0, 255)
    for mode, target in (("multiclass", labels), ("multilabel", hard_of((2, 4, 30, 31), 0)), ("binary", soft_of(x.shape, 0))):
        losses = (getattr(m, name)(mode, ignore_index=255) for m in (ours, peer))
        agree(*losses, x, target.float() if mode != "multiclass" else target, rtol=2e-4, atol=1e-6)


@over_names
def test_numbers_that_are_no_probabilities(name):
    x, target = logits_of((2, 3, 9), 0), hard_of((2, 3, 9), 0)
    agree(*(getattr(m, name)("multilabel", from_logits=False) for m in (ours, peer)), x.abs(), target)


@over_names
def test_everything_ignored(name):
    x, target = logits_of((2, 3, 4), 0), torch.full((2, 4), 255)
    for log_loss in (False, True):
        agree(*(getattr(m, name)("multiclass", log_loss=log_loss, ignore_index=255) for m in (ours, peer)), x, target)


@over_names
def test_attributes(name):
    theirs, found = (
        getattr(m, name)("multilabel", [0, 2], True, False, 0.5, 255, 1e-5, class_weights=[1, 2]) for m in (peer, ours)
    )
    assert isinstance(found, torch.nn.modules.loss._Loss)
    for key, value in vars(theirs).items():
        if not key.startswith("_"):
            assert torch.equal(getattr(found, key), value) if isinstance(value, torch.Tensor) else getattr(found, key) == value
    assert issubclass(ours.TverskyLoss, ours.DiceLoss)


X, LABELS, DENSE = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, 4)


@over_names
@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"mode": "multi"}, LABELS),
        ({"mode": "binary", "classes": [0]}, DENSE),
        ({"mode": "binary", "class_weights": [1.0]}, DENSE),
        ({"mode": "multiclass"}, LABELS[:1]),
        ({"mode": "multiclass"}, LABELS[:, 1:]),
        ({"mode": "multiclass"}, LABELS + 3),
        ({"mode": "multiclass"}, LABELS - 1),
        ({"mode": "multiclass", "ignore_index": 255}, LABELS + 3),
        ({"mode": "binary"}, DENSE[:, 1:]),
        ({"mode": "multilabel"}, DENSE[:, :, 1:]),
        ({"mode": "multilabel", "ignore_index": 255}, DENSE[:, :, 1:]),
    ],
)
def test_both_refuse_with_the_same_error(name, options, target):
    with pytest.raises(Exception) as theirs:
        getattr(peer, name)(**options)(X, target)
    with pytest.raises(theirs.type):
        getattr(ours, name)(**options)(X, target)


# ---- where SMP is wrong


@over_names
def test_an_ignored_nan_is_nan_there(name):
    x, target = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0)
    x[0, 1, 2], target[0, 2] = torch.nan, 255
    losses = [getattr(m, name)("multiclass", ignore_index=255) for m in (ours, peer)]
    assert losses[1](x, target).isnan()
    value, gradient = run(losses[0], x, target)
    assert value.isfinite() and not gradient[0, :, 2].any()


def test_gamma_below_1_is_nan_there():
    """Without a target pixel, the loss is 0."""
    x, target = torch.tensor([[[3.0, -1.0]]]), torch.zeros(1, 1, 2)
    losses = [m.TverskyLoss("binary", gamma=0.75) for m in (ours, peer)]
    assert run(losses[1], x, target)[1].isnan().any()
    value, gradient = run(losses[0], x, target)
    assert value == 0 and not gradient.any()


@over_names
def test_half_precision_counts_no_more_than_65504_there(name):
    x, target = torch.zeros(1, 1, 300, 300, dtype=torch.half), torch.ones(1, 1, 300, 300)
    losses = [getattr(m, name)("binary") for m in (ours, peer)]
    expected = losses[1](x.double(), target)
    assert losses[1](x, target) != pytest.approx(expected.item(), rel=1e-2)
    found = losses[0](x, target)
    assert found.dtype == torch.half and found == pytest.approx(expected.item(), rel=1e-3)


@over_names
def test_a_target_that_is_none_is_a_number_there(name):
    for target in (DENSE + 255, DENSE.long() + 255):
        assert getattr(peer, name)("multilabel")(X, target).isfinite()
        with pytest.raises(IndexError, match="target holds 255"):
            getattr(ours, name)("multilabel")(X, target)


@over_names
def test_class_indices_of_other_types_are_refused_there(name):
    x, target = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0)
    losses = [getattr(m, name)("multiclass") for m in (ours, peer)]
    for dtype in (torch.int32, torch.uint8, torch.float32):
        with pytest.raises(RuntimeError):
            losses[1](x, target.to(dtype))
        torch.testing.assert_close(losses[0](x, target.to(dtype)), losses[1](x, target))
