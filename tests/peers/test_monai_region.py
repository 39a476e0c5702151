"""veerloss.compat.monai: the Dice and Tversky losses, and the sums of them and another, beside the installed peer's."""

import warnings

import monai.losses as peer
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.utils import LossReduction, Weight
from parity import agree, hard_of, labels_of, logits_of, run, seeds, soft_of

from veerloss.compat import monai as ours

SHAPES = [(2, 3, 4, 5), (1, 5, 7), (2, 3, 2, 3, 2), (2, 1, 6)]
NAMES = ["DiceLoss", "TverskyLoss", "GeneralizedDiceLoss", "DiceCELoss", "DiceFocalLoss"]
over_names = pytest.mark.parametrize("name", NAMES)
# Of one-hot float32 targets the peer's sums of squares and norms are float32; so are its focal loss, and weights by volume.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}


@st.composite
def cases(draw, name):
    """(options, input, target), where MONAI is right."""
    shape, seed = draw(st.sampled_from(SHAPES)), draw(seeds)
    channels = shape[1]
    activation = draw(st.sampled_from(["sigmoid", "softmax", "other_act", "none", "none, no probabilities"]))
    options = {
        "include_background": draw(st.booleans()),
        "to_onehot_y": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum"] + ["none"] * (name != "DiceCELoss"))),
        "batch": draw(st.booleans()),
    }
    if not activation.startswith("none"):
        options[activation] = torch.tanh if activation == "other_act" else True
    classes = channels - (not options["include_background"] and channels > 1)
    if name in ("DiceLoss", "DiceCELoss", "DiceFocalLoss"):
        options["squared_pred"], options["jaccard"] = draw(st.booleans()), draw(st.booleans())
        weight = torch.linspace(0.5, 2, channels if name == "DiceCELoss" else classes)
        if draw(st.booleans()) and channels > 1:
            options["weight"] = weight.double() if name == "DiceCELoss" else draw(st.sampled_from([0.3, weight.tolist()]))
    if classes == 1 and name == "DiceFocalLoss":
        options.pop("weight", None)
    if name == "DiceCELoss":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    elif name == "DiceFocalLoss":
        options["alpha"], options["gamma"] = draw(st.sampled_from([(None, 2.0), (0.3, 1.5)]))
    else:
        options["soft_label"] = draw(st.booleans())
    if name in ("DiceCELoss", "DiceFocalLoss"):
        options["lambda_dice"] = 0.7
        options["lambda_ce" if name == "DiceCELoss" else "lambda_focal"] = draw(st.sampled_from([1.0, 0.4]))
    if name in ("DiceLoss", "TverskyLoss"):
        options["ignore_index"] = draw(st.sampled_from([None, 255, 1]))
    if name == "TverskyLoss":
        options["alpha"], options["beta"] = draw(st.sampled_from([(0.3, 0.7), (1.0, 1.0)]))
    if name == "GeneralizedDiceLoss":
        options["w_type"] = draw(st.sampled_from(["square", "simple", "uniform"]))
    ignore = options.get("ignore_index")
    if ignore is None:  # all of an image ignored: see below
        options["smooth_nr"], options["smooth_dr"] = draw(st.sampled_from([(1e-5, 1e-5), (0.0, 0.3), (1.0, 1.0)]))

    x, labels = logits_of(shape, seed), labels_of(shape, seed, ignore, max(channels - 1, 1))  # the last class is absent
    if channels == 1:
        target = draw(st.sampled_from([hard_of, soft_of]))(shape, seed)
        if ignore is not None:
            target.view(-1)[::3] = ignore
    elif options["to_onehot_y"]:
        target = draw(st.sampled_from([labels, labels.float()])).unsqueeze(1)
    else:
        target = draw(
            st.sampled_from([F.one_hot(labels.clamp(max=channels - 1), channels).movedim(-1, 1), soft_of(shape, seed)])
        )
        target = target.double()
        if ignore == 255:
            target[::2, :, ...] = 0
        elif ignore == 1:
            target[:, 1] = target[:, 1].round()
    if activation == "none":
        x = x.sigmoid()
    return options, x, target


@over_names
@given(data=st.data())
def test_values_and_gradients(name, data):
    options, x, target = data.draw(cases(name))
    rounded = name in ("DiceFocalLoss", "GeneralizedDiceLoss") or (options["to_onehot_y"] and x.shape[1] > 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree(
            getattr(ours, name)(**options), getattr(peer, name)(**options), x, target,
            **(FLOAT32 if rounded else {"rtol": 1e-8, "atol": 1e-11}),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
@pytest.mark.parametrize("batch", [False, True])
def test_without_a_volume(batch, name):
    """[B, C]: MONAI pools everything, unless it has the batch to sum over."""
    for softmax in (False, True):
        options = {"softmax": softmax, "sigmoid": not softmax, "batch": batch, "to_onehot_y": True}
        for reduction in ("none", "mean"):
            for weight in (None, 0.3) if name == "DiceLoss" else (None,):
                rest = {} if weight is None else {"weight": weight}
                losses = (getattr(m, name)(**options, **rest, reduction="sum" if rest else reduction) for m in (ours, peer))
                agree(*losses, logits_of((6, 3), 0), labels_of((6, 3), 0).unsqueeze(1), rtol=1e-7)


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": -0.1}, {"smooth_nr": -0.1}, {"smooth_dr": -0.1}])
def test_negative_numbers(options):
    losses = (m.TverskyLoss(sigmoid=True, **options) for m in (ours, peer))
    agree(*losses, logits_of((2, 3, 9), 0), hard_of((2, 3, 9), 0))


@over_names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types(name, dtype):
    """float32 of half precision."""
    x, target = logits_of((2, 3, 6), 0).to(dtype), labels_of((2, 3, 6), 0).unsqueeze(1)
    value, gradient = run(getattr(ours, name)(softmax=True, to_onehot_y=True), x, target)
    expected, _ = run(getattr(peer, name)(softmax=True, to_onehot_y=True), x.double(), target)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@over_names
def test_scripted(name):
    x, labels = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0).unsqueeze(1)
    dense = F.one_hot(labels[:, 0], 3).movedim(-1, 1).double()
    for options in ({}, {"sigmoid": True}, {"softmax": True, "include_background": False, "reduction": "sum", "batch": True}):
        for to_onehot_y, target in ((True, labels), (False, dense)):
            loss = getattr(ours, name)(to_onehot_y=to_onehot_y, **options)
            torch.testing.assert_close(torch.jit.script(loss)(x, target), loss(x, target))
    if name in ("DiceLoss", "TverskyLoss"):
        labels[0, 0, :2] = 255
        loss = getattr(ours, name)(softmax=True, to_onehot_y=True, ignore_index=255, reduction="none", soft_label=True)
        torch.testing.assert_close(torch.jit.script(loss)(x, labels), loss(x, labels))
        loss = getattr(ours, name)(other_act=torch.nn.Softmax(1))
        torch.testing.assert_close(torch.jit.script(loss)(x, dense), loss(x, dense))


def test_state_is_that_of_monai():
    for name, options in (
        ("DiceLoss", {}), ("DiceLoss", {"weight": [1.0, 2.0]}), ("TverskyLoss", {}), ("DiceCELoss", {}),
        ("DiceCELoss", {"weight": torch.ones(2)}), ("DiceFocalLoss", {"weight": [1.0, 2.0]}), ("DiceFocalLoss", {}),
    ):  # fmt: skip
        keys = {module: getattr(module, name)(**options).state_dict().keys() for module in (ours, peer)}
        assert keys[ours] == keys[peer]


def test_enumerations():
    assert ours.DiceLoss(reduction=LossReduction.SUM).reduction == "sum"
    assert ours.GeneralizedDiceLoss(w_type=Weight.SIMPLE).w_type == "simple"


@over_names
def test_volumes_with_metadata(name):
    x, labels = logits_of((2, 3, 4, 4), 0).float(), labels_of((2, 3, 4, 4), 0).unsqueeze(1).float()
    loss = getattr(ours, name)(to_onehot_y=True, softmax=True)
    meta = MetaTensor(x).requires_grad_()
    value = loss(meta, MetaTensor(labels))
    value.backward()
    torch.testing.assert_close(value.detach().as_tensor(), loss(x, labels))


X = torch.ones(1, 4, 3, 3)


@over_names
@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"other_act": 3}, X),
        ({"sigmoid": True, "softmax": True}, X),
        ({"sigmoid": True, "other_act": torch.tanh}, X),
        ({"reduction": "unknown"}, X),
        ({"reduction": None}, X),
        ({}, X[:, :1]),
        ({}, X[:, :, 1:]),
        ({"to_onehot_y": True}, X[:, :2]),
        ({"to_onehot_y": True}, X),
        ({"to_onehot_y": True}, 7 * X[:, :1]),
    ],
)
def test_both_refuse_with_the_same_error(name, options, target):
    with pytest.raises(Exception) as theirs:
        getattr(peer, name)(**options)(X, target)
    with pytest.raises(theirs.type):
        getattr(ours, name)(**options)(X, target)


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("DiceLoss", {"weight": (1.0, 1.0, 2.0)}, X),
        ("DiceLoss", {"include_background": False, "weight": (1.0,) * 4}, X),
        ("DiceLoss", {"weight": (1.0, 1.0, 1.0, -1.0)}, X),
        ("DiceLoss", {"weight": -1}, X),
        ("DiceCELoss", {"reduction": "none"}, X),
        ("DiceCELoss", {"lambda_ce": -1.0}, X),
        ("DiceCELoss", {"lambda_dice": -1.0}, X),
        ("DiceCELoss", {}, X[:, 0]),
        ("DiceFocalLoss", {"lambda_focal": -1.0}, X),
        ("DiceFocalLoss", {}, X[:, :2]),
        ("GeneralizedDiceLoss", {"w_type": "cube"}, X),
    ],
)
def test_both_refuse_options_of_one(name, options, target):
    with pytest.raises(Exception) as theirs:
        getattr(peer, name)(**options)(X, target)
    with pytest.raises(theirs.type):
        getattr(ours, name)(**options)(X, target)


@over_names
@pytest.mark.parametrize("options", [{"softmax": True}, {"to_onehot_y": True}, {"include_background": False}])
def test_both_warn_of_one_channel(name, options):
    for module in (peer, ours):
        with pytest.warns(UserWarning, match="single channel prediction"):
            getattr(module, name)(**options)(X[:, :1], X[:, :1])


# ---- where MONAI is wrong


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
def test_an_ignored_image_is_a_loss_there(name):
    x, labels = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0).unsqueeze(1)
    labels[0] = 255
    dense = F.one_hot(labels[:, 0].clamp(max=2), 3).movedim(-1, 1).double()
    dense[0] = 0
    for to_onehot_y, target in ((True, labels), (False, dense)):
        options = {"softmax": True, "to_onehot_y": to_onehot_y, "ignore_index": 255, "reduction": "none", "smooth_nr": 0.0}
        assert (getattr(peer, name)(**options)(x, target)[0] == 1).all()
        value, gradient = run(getattr(ours, name)(**options), x, target)
        assert not value[0].any() and not gradient[0].any() and value[1].all()


@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss"])
def test_an_ignored_nan_is_nan_there(name):
    x, labels = logits_of((2, 3, 5), 0), labels_of((2, 3, 5), 0).unsqueeze(1)
    x[0, 1, 2], labels[0, 0, 2] = torch.nan, 255
    dense = F.one_hot(labels[:, 0].clamp(max=2), 3).movedim(-1, 1).double()
    dense[0, :, 2] = 0
    for softmax in (False, True):
        for to_onehot_y, target in ((True, labels), (False, dense)):
            options = {"to_onehot_y": to_onehot_y, "ignore_index": 255, "softmax": softmax, "sigmoid": not softmax}
            assert getattr(peer, name)(**options)(x, target).isnan()
            value, gradient = run(getattr(ours, name)(**options), x, target)
            assert value.isfinite() and not gradient[0, :, 2].any()


def test_half_precision_counts_no_more_than_65504_there():
    x, target = torch.zeros(1, 1, 400, 400, dtype=torch.half), torch.ones(1, 1, 400, 400, dtype=torch.half)
    assert peer.DiceLoss(sigmoid=True)(x, target) != pytest.approx(1 / 3, rel=1e-2)
    assert ours.DiceLoss(sigmoid=True)(x, target) == pytest.approx(1 / 3, rel=1e-5)


def test_nothing_to_be_found_is_nan_there_without_smoothing():
    x = torch.zeros(1, 2, 5)
    options = {"smooth_nr": 0.0, "smooth_dr": 0.0}
    for name in ("DiceLoss", "TverskyLoss", "GeneralizedDiceLoss"):
        assert getattr(peer, name)(**options)(x, x).isnan()
        value, gradient = run(getattr(ours, name)(**options), x, x)
        assert value == 0 and gradient.isfinite().all()


def test_integer_targets_are_refused_with_squares_there():
    x, target = logits_of((2, 3, 5), 0), hard_of((2, 3, 5), 0)
    losses = [m.DiceLoss(sigmoid=True, squared_pred=True) for m in (ours, peer)]
    with pytest.raises(RuntimeError):
        losses[1](x, target.long())
    torch.testing.assert_close(losses[0](x, target.long()), losses[1](x, target))
