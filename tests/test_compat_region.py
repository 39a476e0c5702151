"""The region losses of veerloss.compat against formulas in float64. Beside the peers themselves: tests/peers."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from budget import evaluate
from grid import labels, logits
from test_compat_focal import CLASSES, SHAPE, WEIGHT, FullSize, assert_is, one_hot, sigmoid_elements, some

from veerloss.compat import _focal, kornia, monai
from veerloss.compat import segmentation_models_pytorch as smp

over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def index_of(p, t, alpha=0.5, beta=0.5, smooth=(0.0, 0.0), dims=(0, 2, 3), squared=False, soft=False):
    """Of each class the Tversky index of probabilities and targets [N, C, H, W]; ``smooth`` beside the intersection."""
    p, t = p.double(), t.double()
    i = (torch.minimum(p, t) if soft else p * t).sum(dims)
    s, e = ((p * p).sum(dims), (t * t).sum(dims)) if squared else (p.sum(dims), t.sum(dims))
    return (i + smooth[0]) / (i + alpha * (s - i) + beta * (e - i) + smooth[1])


# ---- segmentation-models-pytorch

SMP = {
    "DiceLoss": ({}, (0.5, 0.5)),
    "JaccardLoss": ({}, (1.0, 1.0)),
    "TverskyLoss": ({"alpha": 0.3, "beta": 0.7}, (0.3, 0.7)),
}
over_smp = pytest.mark.parametrize("name", SMP)


def smp_mean(score, present, log_loss=False, weights=None, classes=None):
    loss = torch.where(present, -score.log() if log_loss else 1 - score, 0.0)
    weights = torch.ones(len(loss)) if weights is None else weights
    classes = list(range(len(loss))) if classes is None else classes
    return (loss * weights)[classes].sum() / weights[classes].sum()


@over_smp
@over_dtypes
@pytest.mark.parametrize("log_loss", [False, True])
@pytest.mark.parametrize("from_logits", [False, True])
def test_smp_multiclass(from_logits, log_loss, dtype, name):
    """Class 4 is absent: a loss of 0 that counts."""
    x, y = logits(SHAPE, dtype), labels(SHAPE, 4, ignore_index=255)
    options, weights = SMP[name]
    t = one_hot(y)

    def formula(x, **rest):
        p = x.softmax(1) if from_logits else x
        return smp_mean(index_of(p * (y != 255).unsqueeze(1), t, *weights, (0.2, 0.2)), t.sum((0, 2, 3)) > 0, log_loss, **rest)

    x = x if from_logits else x.softmax(1)
    options = {**options, "log_loss": log_loss, "from_logits": from_logits, "smooth": 0.2, "ignore_index": 255}
    assert_is(lambda x: getattr(smp, name)("multiclass", **options)(x, y), formula, x)
    loss = getattr(smp, name)("multiclass", classes=[4, 1, 1], class_weights=WEIGHT.tolist(), **options)
    assert_is(lambda x: loss(x, y), lambda x: formula(x, weights=WEIGHT, classes=[4, 1, 1]), x)


@over_smp
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_smp_binary_and_multilabel(kind, name):
    x, t = some(kind, ignore_index=255)
    valid, (options, weights) = t != 255, SMP[name]

    def score(x, dims):
        return index_of(x.sigmoid() * valid, t * valid, *weights, dims=dims, soft=True)

    for mode, dims in (("multilabel", (0, 2, 3)), ("binary", (0, 1, 2, 3))):
        loss = getattr(smp, name)(mode, ignore_index=255, **options)
        assert_is(lambda x, loss=loss: loss(x, t), lambda x, dims=dims: (1 - score(x, dims)).mean(), x)


def test_smp_gamma():
    x, y = logits(SHAPE), labels(SHAPE, CLASSES)
    for gamma in (0.75, 2.0):
        loss = smp.TverskyLoss("multiclass", gamma=gamma)
        assert_is(lambda x, loss=loss: loss(x, y), lambda x, g=gamma: (1 - index_of(x.softmax(1), one_hot(y))).mean() ** g, x)


@over_smp
def test_smp_eps(name):
    """Of the denominator, where it can be so small; and of what a logarithm is taken of."""
    x, y = logits(SHAPE), labels(SHAPE, 4)
    options, weights = SMP[name]
    t = one_hot(y)
    present = t.sum((0, 2, 3)) > 0
    loss = getattr(smp, name)("multiclass", log_loss=True, eps=0.3, **options)
    assert_is(lambda x: loss(x, y), lambda x: smp_mean(index_of(x.softmax(1), t, *weights).clamp(min=0.3), present, True), x)
    large = getattr(smp, name)("multiclass", eps=1e3, **options)  # the denominator of every class is below
    assert_is(lambda x: large(x, y), lambda x: smp_mean((x.softmax(1) * t).sum((0, 2, 3)) / 1e3, present), x)
    t = one_hot(labels(SHAPE, CLASSES))
    y, sure = t.int().argmax(1), -40.0 * t  # an index of about 4e-18
    small = getattr(smp, name)("multiclass", log_loss=True, eps=1e-30, **options)
    assert_is(lambda x: small(x, y), lambda x: -index_of(x.softmax(1), t, *weights).log().mean(), sure.double())


def test_smp_one_channel():
    """Class 0 is the only one, of probabilities too; in "binary" it is what is found."""
    x = logits((2, 1, 6, 7))
    y = torch.zeros(2, 6, 7, dtype=torch.long)
    p = x.sigmoid()
    loss = smp.DiceLoss("multiclass", from_logits=False)
    assert_is(lambda p: loss(p, y), lambda p: (1 - index_of(p, torch.ones_like(p))).mean(), p)
    assert smp.DiceLoss("multiclass")(x, y) == 0
    with pytest.raises(RuntimeError, match="target holds 1"):
        loss(p, y + 1)


# ---- kornia


def kornia_macro(p, y, weights, smooth, weight=None):
    """Per image, over the classes present."""
    t, valid = one_hot(y), (y != -100).unsqueeze(1)
    losses = 1 - index_of(p * valid, t, *weights, (0.0, smooth), dims=(2, 3))
    each = t.any(-1).any(-1) * (1 if weight is None else weight)
    return (torch.where(each > 0, losses * each, 0.0).sum(1) / each.sum(1)).mean()


@over_dtypes
@pytest.mark.parametrize("weighted", [False, True])
def test_kornia(weighted, dtype):
    """Class 4 is absent."""
    x, y = logits(SHAPE, dtype), labels(SHAPE, 4, ignore_index=-100)
    weight = WEIGHT.to(dtype) if weighted else None
    w = torch.ones(CLASSES) if weight is None else weight
    t, valid = one_hot(y), (y != -100).unsqueeze(1)

    def micro(x):
        p, per_class = x.softmax(1) * valid, w.reshape(-1, 1, 1)
        return (1 - 2 * (p * t * per_class).sum((1, 2, 3)) / (((p + t) * per_class).sum((1, 2, 3)) + 0.1)).mean()

    assert_is(lambda x: kornia.dice_loss(x, y, "micro", 0.1, weight), micro, x)
    macro = lambda x: kornia_macro(x.softmax(1), y, (0.5, 0.5), 0.05, weight)  # noqa: E731
    assert_is(lambda x: kornia.DiceLoss("macro", 0.1, weight)(x, y), macro, x)
    if weight is None:
        loss = kornia.TverskyLoss(0.3, 0.7, 0.1)
        assert_is(lambda x: loss(x, y), lambda x: kornia_macro(x.softmax(1), y, (0.3, 0.7), 0.1), x)


def test_kornia_images_without_a_valid_pixel_are_1():
    x, y = logits(SHAPE), labels(SHAPE, CLASSES)
    y[0] = 255
    for loss in (
        lambda x, y: kornia.dice_loss(x, y, "micro", ignore_index=255),
        lambda x, y: kornia.dice_loss(x, y, "micro", weight=WEIGHT, ignore_index=255),
        lambda x, y: kornia.dice_loss(x, y, "macro", ignore_index=255),
        lambda x, y: kornia.dice_loss(x, y, "macro", weight=WEIGHT, ignore_index=255),
        lambda x, y: kornia.tversky_loss(x, y, 0.3, 0.7, ignore_index=255),
    ):
        value, gradient = evaluate(loss, x, y)
        torch.testing.assert_close(value, (1 + loss(x[1:], y[1:])) / 2)
        assert not gradient[0].any() and gradient[1].any()
        assert loss(x[:1], y[:1]) == 1


def test_kornia_micro_keeps_the_digits_of_a_small_loss():
    x, y = logits(SHAPE, scale=0.1) * 0, labels(SHAPE, CLASSES)
    x = x + 20.0 * one_hot(y)
    assert_is(
        lambda x: kornia.dice_loss(x, y, eps=0.0), lambda x: 1 - (x.softmax(1) * one_hot(y)).sum((1, 2, 3)).div(42).mean(), x
    )


# ---- MONAI


@over_dtypes
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_monai_dice(activation, batch, jaccard, squared, dtype):
    x, y = logits(SHAPE, dtype), labels(SHAPE, 4, ignore_index=255)
    x = x.sigmoid() if activation == "none" else x
    valid, t = (y != 255).unsqueeze(1), one_hot(y)
    weights, dims = (1.0, 1.0) if jaccard else (0.5, 0.5), (0, 2, 3) if batch else (2, 3)

    def losses(x):
        p = {"sigmoid": x.sigmoid(), "softmax": x.softmax(1), "none": x}[activation] * valid
        return (1 - index_of(p, t, *weights, (0.05, 0.15), dims, squared))[..., 1:]

    options = {"include_background": False, "to_onehot_y": True, "squared_pred": squared, "jaccard": jaccard, "batch": batch}
    options |= {"smooth_nr": 0.1, "smooth_dr": 0.3, "ignore_index": 255}
    options |= {} if activation == "none" else {activation: True}
    for weight, reduction in ((None, "mean"), (2.0, "sum"), (WEIGHT[1:].tolist(), "none")):
        w = torch.as_tensor(1.0 if weight is None else weight)
        loss = monai.DiceLoss(reduction=reduction, weight=weight, **options)
        reduce = {"none": lambda v: v[..., None, None], "mean": torch.mean, "sum": torch.sum}[reduction]
        assert_is(lambda x, loss=loss: loss(x, y[:, None]), lambda x, w=w, r=reduce: r(losses(x) * w), x)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("soft_label", [False, True])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_monai_tversky_per_channel(kind, soft_label, batch):
    x, t = some(kind)
    options = {"sigmoid": True, "alpha": 0.3, "beta": 0.7, "soft_label": soft_label, "batch": batch}

    def losses(x):
        return 1 - index_of(x.sigmoid(), t, 0.3, 0.7, (1e-5, 1e-5), (0, 2, 3) if batch else (2, 3), soft=soft_label)

    assert_is(lambda x: monai.TverskyLoss(reduction="none", **options)(x, t), losses, x)
    assert_is(lambda x: monai.TverskyLoss(**options)(x, t), lambda x: losses(x).mean(), x)


@pytest.mark.parametrize("w_type", ["square", "simple", "uniform"])
@pytest.mark.parametrize("batch", [False, True])
def test_monai_generalized_dice(batch, w_type):
    """Class 4, which is absent, has the weight of the rarest class."""
    x, y = logits(SHAPE), labels(SHAPE, 4)
    t, dims = one_hot(y).double(), (0, 2, 3) if batch else (2, 3)
    volume = t.sum(dims)
    w = {"square": 1 / volume**2, "simple": 1 / volume, "uniform": torch.ones_like(volume)}[w_type]
    w = torch.where(w.isinf(), w.masked_fill(w.isinf(), 0).amax(-1, keepdim=True), w)

    def formula(x):
        p = x.softmax(1)
        i, both = (p * t).sum(dims), (p + t).sum(dims)
        return (1 - (2 * (w * i).sum(-1) + 1e-5) / ((w * both).sum(-1) + 1e-5)).mean()

    loss = monai.GeneralizedDiceLoss(to_onehot_y=True, softmax=True, w_type=w_type, batch=batch)
    assert_is(lambda x: loss(x, y[:, None]), formula, x)


@pytest.mark.parametrize("activation", [torch.tanh, lambda x: x.sigmoid() ** 2, None], ids=["tanh", "in [0, 1]", "none"])
@pytest.mark.parametrize("soft_label", [False, True])
def test_monai_other_activations(soft_label, activation):
    """Inside of [0, 1] the kernel, outside of it the plain formula, where |p| of what is below 0 is predicted."""
    x, t = some("soft")

    def formula(x):
        p = x if activation is None else activation(x)
        if not soft_label:
            return (1 - index_of(p, t, smooth=(5e-6, 5e-6), dims=(2, 3))).mean()
        i = ((p.abs() + t - (p - t).abs()) / 2).sum((2, 3))
        return (1 - (2 * i + 1e-5) / ((p.abs() + t).sum((2, 3)) + 1e-5)).mean()

    assert_is(lambda x: monai.DiceLoss(other_act=activation, soft_label=soft_label)(x, t), formula, x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_monai_sums(smoothing, reduction):
    x, y = logits(SHAPE), labels(SHAPE, CLASSES)
    dense = one_hot(y).float()
    options = {"softmax": True, "reduction": reduction, "lambda_dice": 0.7}

    def dice(x):
        losses = 1 - index_of(x.softmax(1), dense, smooth=(5e-6, 5e-6), dims=(2, 3))
        return 0.7 * (losses.mean() if reduction == "mean" else losses.sum())

    def entropy(x, target):
        return 0.4 * F.cross_entropy(x, target, reduction=reduction, label_smoothing=smoothing)

    for target, to_onehot_y in ((y[:, None], True), (y[:, None].float(), True), (dense, False), (dense.long(), False)):
        ce = y if to_onehot_y else dense.double()
        loss = monai.DiceCELoss(to_onehot_y=to_onehot_y, lambda_ce=0.4, label_smoothing=smoothing, **options)
        assert_is(lambda x, t=target, loss=loss: loss(x, t), lambda x, ce=ce: dice(x) + entropy(x, ce), x)
    loss = monai.DiceCELoss(to_onehot_y=True, lambda_ce=0.4, label_smoothing=smoothing, weight=WEIGHT, **options)
    weighted = F.cross_entropy(x.double(), y, WEIGHT.double(), reduction=reduction, label_smoothing=smoothing)
    expected = monai.DiceLoss(to_onehot_y=True, softmax=True, reduction=reduction, weight=WEIGHT)(x, y[:, None]) * 0.7
    torch.testing.assert_close(loss(x, y[:, None]), expected + 0.4 * weighted.float())

    def focal(x):
        elements = sigmoid_elements(x, dense, 1.5, 0.3)
        return 0.4 * (elements.mean() if reduction == "mean" else elements.flatten(2).mean(2).sum())

    for target, to_onehot_y in ((y[:, None], True), (dense, False)):
        loss = monai.DiceFocalLoss(to_onehot_y=to_onehot_y, lambda_focal=0.4, gamma=1.5, alpha=0.3, **options)
        assert_is(lambda x, t=target, loss=loss: loss(x, t), lambda x: dice(x) + focal(x), x)


@over_dtypes
@pytest.mark.parametrize("jaccard", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_monai_sums_in_one_pass(batch, jaccard, dtype):
    """Background left out, smoothing of its own, labels of a float type; and masks, by the sigmoid."""
    weights, dims = (1.0, 1.0) if jaccard else (0.5, 0.5), (0, 2, 3) if batch else (2, 3)
    x, y = logits(SHAPE, dtype), labels(SHAPE, 4)
    hard = some("hard")[1]
    rest = {"jaccard": jaccard, "batch": batch, "smooth_nr": 0.1, "smooth_dr": 0.3, "lambda_dice": 0.7}

    def dice(p, t):
        return 0.7 * (1 - index_of(p, t, *weights, (0.05, 0.15), dims))

    def entropy(x):
        return 0.4 * F.cross_entropy(x, y, label_smoothing=0.1)

    loss = monai.DiceCELoss(False, True, softmax=True, lambda_ce=0.4, label_smoothing=0.1, **rest)
    for target in (y[:, None], y[:, None].float(), y[:, None].byte()):
        assert_is(lambda x, t=target: loss(x, t), lambda x: dice(x.softmax(1), one_hot(y))[..., 1:].mean() + entropy(x), x)
    binary = monai.DiceCELoss(sigmoid=True, lambda_ce=0.4, **rest)
    focal = monai.DiceFocalLoss(sigmoid=True, lambda_focal=0.4, gamma=1.5, alpha=0.3, **rest)
    for t in (hard, hard.bool(), hard.long()):
        one, mask = x[:, :1], t[:, :1]
        assert_is(
            lambda x, t=mask: binary(x, t),
            lambda x: dice(x.sigmoid(), hard[:, :1]).mean() + 0.4 * F.binary_cross_entropy_with_logits(x, hard[:, :1].double()),
            one,
        )
        # Without one pass the focal term is float32, as in MONAI.
        for channels in (1,) if batch and dtype == torch.float64 else (1, CLASSES):
            assert_is(
                lambda x, t=t[:, :channels]: focal(x, t),
                lambda x, t=hard[:, :channels]: dice(x.sigmoid(), t).mean() + 0.4 * sigmoid_elements(x, t, 1.5, 0.3).mean(),
                x[:, :channels], dtype=dtype,
            )  # fmt: skip


@pytest.mark.parametrize("weight", [None, 3.0])
def test_monai_binary_cross_entropy(weight):
    x, t = (tensor[:, :1] for tensor in some("soft"))
    weight = None if weight is None else torch.tensor([weight])

    def formula(x):
        dice = (1 - index_of(x.sigmoid(), t, smooth=(5e-6, 5e-6), dims=(2, 3))).mean()
        pos_weight = None if weight is None else weight.double()
        return dice + F.binary_cross_entropy_with_logits(x, t.double(), pos_weight=pos_weight)

    assert_is(lambda x: monai.DiceCELoss(sigmoid=True, weight=weight)(x, t), formula, x)


def test_monai_ignores_voxels_of_targets_per_channel():
    """Those without a channel, or of an ignored one, as those of class indices."""
    x, y = some("index", ignore_index=255)
    for ignore_index in (255, 2):
        target = y if ignore_index == 255 else y.clamp(max=4)
        for loss in (monai.DiceLoss, monai.TverskyLoss):
            options = {"softmax": True, "ignore_index": ignore_index}
            expected = loss(to_onehot_y=True, **options)(x, target[:, None])
            torch.testing.assert_close(loss(**options)(x, one_hot(target).float()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_monai_scripted():
    x, soft = some("soft")
    y = labels(SHAPE, CLASSES)[:, None]
    ignored = labels(SHAPE, CLASSES, ignore_index=255)[:, None]
    for module, target in (
        (monai.DiceLoss(softmax=True, to_onehot_y=True, weight=WEIGHT, squared_pred=True, ignore_index=255), ignored),
        (monai.DiceLoss(sigmoid=True, soft_label=True, jaccard=True, batch=True, reduction="none"), soft),
        (monai.TverskyLoss(False, True, softmax=True, alpha=0.3, beta=0.7), y),
        (monai.GeneralizedDiceLoss(to_onehot_y=True, softmax=True), y),
        (monai.DiceCELoss(to_onehot_y=True, softmax=True, weight=WEIGHT), y),
        (monai.DiceCELoss(sigmoid=True), soft),
        (monai.DiceFocalLoss(to_onehot_y=True, softmax=True), y),
    ):
        torch.testing.assert_close(torch.jit.script(module)(x, target), module(x, target))


def test_targets_that_require_a_gradient():
    x, t = some("soft", torch.float64)
    hard = some("hard")[1].double().requires_grad_()
    expected = torch.autograd.grad((1 - index_of(x.sigmoid(), hard, dims=(0, 2, 3), soft=True)).mean(), hard)
    torch.testing.assert_close(torch.autograd.grad(smp.DiceLoss("multilabel")(x, hard), hard), expected)
    t = t.double().requires_grad_()
    expected = torch.autograd.grad((1 - index_of(x.sigmoid(), t, dims=(0, 2, 3), soft=True)).mean(), t)
    torch.testing.assert_close(torch.autograd.grad(smp.DiceLoss("multilabel")(x, t), t), expected)
    losses = 1 - index_of(x.sigmoid(), t, smooth=(5e-6, 5e-6), dims=(2, 3))
    expected = torch.autograd.grad(losses.mean(), t)
    torch.testing.assert_close(torch.autograd.grad(monai.DiceLoss(sigmoid=True)(x, t), t), expected)


# ---- what every one must do


def index_losses(ignore_index):
    """By name a loss of (logits [N, C, *], class indices [N, *]) that is 0 where everything is ignored."""
    options = {"ignore_index": ignore_index}
    return {
        "smp dice": smp.DiceLoss("multiclass", **options),
        "smp jaccard, log": smp.JaccardLoss("multiclass", log_loss=True, **options),
        "smp tversky": smp.TverskyLoss("multiclass", gamma=0.75, **options),
        "smp tversky, plain": smp.TverskyLoss("multiclass", beta=0.0, gamma=0.75, **options),
        "monai dice": lambda x, y: monai.DiceLoss(to_onehot_y=True, softmax=True, **options)(x, y[:, None]),
        "monai tversky": lambda x, y: monai.TverskyLoss(False, True, True, alpha=1, smooth_nr=0, **options)(x, y[:, None]),
    }


@pytest.mark.parametrize("name", index_losses(255))
def test_everything_ignored_is_zero(name):
    value, gradient = evaluate(index_losses(255)[name], logits(SHAPE), torch.full((2, 6, 7), 255))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name", index_losses(255))
def test_confident_pixels_have_finite_gradients(name):
    x, y = logits(SHAPE, scale=1e4), labels(SHAPE, CLASSES, ignore_index=255)
    assert all(t.isfinite().all() for t in evaluate(index_losses(255)[name], x, y))


@pytest.mark.parametrize("name", index_losses(255))
def test_a_label_that_is_no_class_is_an_error(name):
    with pytest.raises(RuntimeError, match="holds 77"):
        index_losses(255)[name](logits(SHAPE), torch.full((2, 6, 7), 77))


@pytest.mark.parametrize("name", index_losses(255))
def test_an_ignored_nan_is_ignored(name):
    x, y = logits(SHAPE), labels(SHAPE, CLASSES, ignore_index=255)
    expected = evaluate(index_losses(255)[name], x, y)
    x = torch.where((y == 255).unsqueeze(1), torch.nan, x)
    torch.testing.assert_close(evaluate(index_losses(255)[name], x, y), expected)


def common_calls():
    """By name the common call of each loss, (loss, logits, target): with class indices where it takes them."""
    x, y = logits(SHAPE), labels(SHAPE, CLASSES, ignore_index=255)
    dense, indices = one_hot(labels(SHAPE, CLASSES)).float(), labels(SHAPE, CLASSES)[:, None]
    return {
        "smp binary": (smp.DiceLoss("binary"), x[:, :1], dense[:, :1]),
        "smp multiclass": (smp.DiceLoss("multiclass", ignore_index=255, class_weights=WEIGHT.tolist()), x, y),
        "smp multiclass, log": (smp.JaccardLoss("multiclass", log_loss=True, classes=[0, 2], ignore_index=255), x, y),
        "smp multilabel": (smp.TverskyLoss("multilabel", alpha=0.3, beta=0.7, gamma=0.75), x, dense),
        "smp probabilities": (smp.DiceLoss("multilabel", from_logits=False), x.sigmoid(), dense.bool()),
        "kornia micro": (lambda x, y: kornia.dice_loss(x, y, ignore_index=255), x, y),
        "kornia macro": (lambda x, y: kornia.dice_loss(x, y, "macro", ignore_index=255), x, y),
        "kornia macro, weight": (lambda x, y: kornia.dice_loss(x, y, "macro", weight=WEIGHT, ignore_index=255), x, y),
        "kornia tversky": (kornia.TverskyLoss(0.3, 0.7, ignore_index=255), x, y),
        "monai dice": (monai.DiceLoss(sigmoid=True, squared_pred=True), x, dense),
        "monai dice, labels": (monai.DiceLoss(to_onehot_y=True, softmax=True, ignore_index=255), x, y[:, None]),
        "monai dice, no background": (monai.DiceLoss(False, True, softmax=True, batch=True, reduction="none"), x, indices),
        "monai dice, probabilities": (monai.DiceLoss(jaccard=True), x.sigmoid(), dense),
        "monai tversky": (monai.TverskyLoss(softmax=True, alpha=0.3, beta=0.7), x, dense),
        "monai dice and ce": (monai.DiceCELoss(to_onehot_y=True, softmax=True), x, indices),
        "monai dice and ce, per channel": (monai.DiceCELoss(softmax=True), x, dense),
        "monai dice and ce, one channel": (monai.DiceCELoss(sigmoid=True, jaccard=True), x[:, :1], dense[:, :1]),
        "monai dice and focal": (monai.DiceFocalLoss(to_onehot_y=True, sigmoid=True), x, indices),
        "monai dice and focal, per channel": (monai.DiceFocalLoss(sigmoid=True), x, dense.contiguous()),
    }


#: Whose two terms are one pass.
COMPOUND = ("monai dice and ce", "monai dice and ce, one channel", "monai dice and focal, per channel")


@pytest.mark.parametrize("name", common_calls())
def test_no_full_size_temporary(name, monkeypatch):
    monkeypatch.setitem(_focal._CHUNK, "cpu", 50)  # what is read to find soft targets
    loss, x, target = common_calls()[name]
    x = x.detach().requires_grad_()
    with FullSize(x.numel()) as forward:
        value = loss(x, target).sum()
    with FullSize(x.numel()) as backward:
        value.backward()
    assert forward.found == []
    if name in COMPOUND:
        assert [f for f in backward.found if "detach" not in f] == ["veerloss.compound_backward.default"]
        return
    # The gradients of two losses are added.
    kernels = ("region_backward", "focal_backward", "detach", *(["aten.add"] if " and " in name else []))
    assert [f for f in backward.found if not any(kernel in f for kernel in kernels)] == []


@pytest.mark.parametrize("name", common_calls())
def test_compiles_to_one_graph(name):
    loss, x, target = common_calls()[name]
    if isinstance(loss, torch.nn.Module):
        loss = loss.forward
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(evaluate(compiled, x, target), evaluate(loss, x, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", common_calls())
def test_half_precision(name, dtype):
    """float32 in MONAI, else the type of the logits (or of a wider weight)."""
    loss, x, target = common_calls()[name]
    (value, gradient), expected = evaluate(loss, x.to(dtype), target), evaluate(loss, x.to(dtype).double(), target)
    single = name.startswith("monai") or name == "kornia macro, weight"
    assert value.dtype == (torch.float32 if single else dtype) and gradient.dtype == dtype
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(value.double(), expected[0].double(), rtol=1e-5 if single else rtol, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1].double(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("name", common_calls())
def test_autocast_makes_the_loss_float32(name):
    loss, x, target = common_calls()[name]
    with torch.autocast("cpu"):
        assert loss(x.bfloat16(), target).dtype == torch.float32


# ---- bad input

X, DENSE, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: smp.DiceLoss("x"), AssertionError, "mode must be one of.*got 'x'"),
        (lambda: smp.DiceLoss("binary", classes=[0]), AssertionError, "classes are not supported with mode='binary'"),
        (lambda: smp.JaccardLoss("binary", class_weights=[1.0]), ValueError, "class_weights are not supported"),
        (lambda: smp.DiceLoss("multiclass")(X, Y[:, 1:]), AssertionError, r"y_true must have 8 elements.*\[2, 3\]"),
        (lambda: smp.DiceLoss("multiclass", ignore_index=9)(X, Y[:, 1:]), RuntimeError, "y_true must have 8 elements"),
        (lambda: smp.DiceLoss("multiclass")(X, Y + 3), RuntimeError, "target holds 3"),
        (lambda: smp.DiceLoss("binary")(X, DENSE + 255), IndexError, "target holds 255"),
        (lambda: smp.TverskyLoss("binary")(X, DENSE.long() + 2), IndexError, "target holds 2"),
        (lambda: kornia.dice_loss(X[0], Y), ValueError, r"Invalid pred shape: expected \[B, C, \*\], got \[3, 4\]"),
        (lambda: kornia.dice_loss(X, Y[:1]), ValueError, "pred and target shapes must be the same"),
        (
            lambda: kornia.dice_loss(X, Y.float()),
            Exception,
            "target must hold class indices of an integer type, got torch.float32",
        ),
        (lambda: kornia.dice_loss(X, Y, "x"), Exception, "average must be 'micro' or 'macro', got 'x'"),
        (lambda: kornia.dice_loss(X, Y, weight=torch.ones(4)), Exception, r"weight must have the shape \[3\], got \[4\]"),
        (lambda: kornia.dice_loss(X, Y + 3), RuntimeError, "target holds 3"),
        (lambda: kornia.tversky_loss(X, Y + 3, 0.5, 0.5), RuntimeError, "target holds 3"),
        (lambda: kornia.tversky_loss(X, Y, -0.5, 0.5), ValueError, "alpha must be in"),
        (lambda: monai.DiceLoss(reduction="x"), ValueError, "reduction must be one of.*got 'x'"),
        (lambda: monai.DiceLoss(sigmoid=True, softmax=True), ValueError, "Incompatible values"),
        (lambda: monai.TverskyLoss(other_act=3), TypeError, "other_act must be None or callable but is int"),
        (lambda: monai.DiceLoss(weight=[1.0, -1.0]), ValueError, r"weight must hold values >= 0, got \[1.0, -1.0\]"),
        (lambda: monai.DiceLoss(weight=[1.0])(X, DENSE), ValueError, "one value for each of 3 classes, got 1"),
        (lambda: monai.DiceLoss()(X, DENSE[:, :1]), AssertionError, r"target must have the shape \[2, 3, 4\].*\[2, 1, 4\]"),
        (lambda: monai.DiceLoss(to_onehot_y=True)(X, DENSE), AssertionError, r"target must have the shape \[2, 1, 4\]"),
        (lambda: monai.DiceLoss(to_onehot_y=True)(X, Y[:, None] + 3), RuntimeError, "target holds 3"),
        (lambda: monai.GeneralizedDiceLoss(to_onehot_y=True)(X, Y[:, None] + 3), RuntimeError, "target holds 3"),
        (lambda: monai.DiceLoss(sigmoid=True)(X, DENSE + 2), IndexError, "target holds 2"),
        (lambda: monai.GeneralizedDiceLoss(w_type="x"), ValueError, "w_type must be one of.*got 'x'"),
        (lambda: monai.DiceCELoss(lambda_ce=-1.0), ValueError, "lambda_ce should be no less than 0.0, got -1.0"),
        (lambda: monai.DiceCELoss()(X, Y), ValueError, "target must have the dimensions of input"),
        (lambda: monai.DiceFocalLoss()(X, DENSE[:, :2]), ValueError, "and one channel or as many"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
