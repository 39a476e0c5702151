"""veerloss.compat.nnunetv2 against formulas in float64: nnU-Net itself need not be installed."""

import datetime
import importlib
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from budget import evaluate
from grid import labels, logits
from test_compat_focal import CLASSES, SHAPE, WEIGHT, FullSize, assert_is, one_hot

import veerloss
from veerloss.compat import nnunetv2 as ours

Y = labels(SHAPE, 4)  # class 4 is absent
IGNORED = labels(SHAPE, 4, ignore_index=5)  # nnU-Net's ignore label is the one behind the classes
REGIONS = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)).round()

over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
over_batch = pytest.mark.parametrize("batch_dice", [False, True])


def softmax_helper_dim1(x):  # as nnU-Net's
    return torch.softmax(x, 1)


def coefficient(p, t, batch_dice=False, do_bg=True, smooth=1.0, mask=None, clip_tp=None):
    """The mean Dice coefficient: (2 I + smooth) / (S + T + smooth)."""
    p, t = p.double(), t.double()
    m = torch.ones_like(t[:, :1]) if mask is None else mask.double()
    dims = (0, 2, 3) if batch_dice else (2, 3)
    i, s, e = (p * t * m).sum(dims), (p * m).sum(dims), (t * m).sum(dims)
    hit = i if clip_tp is None else i.clamp(min=clip_tp)
    dice = (2 * hit + smooth) / (2 * hit + s - i + e - i + smooth)
    return (dice if do_bg else dice[..., 1:]).mean()


@over_dtypes
@over_batch
@pytest.mark.parametrize("do_bg", [False, True])
@pytest.mark.parametrize("name", ["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"])
def test_dice(name, do_bg, batch_dice, dtype):
    x, mask = logits(SHAPE, dtype), (IGNORED != 5).unsqueeze(1)
    t, options = one_hot(Y), {"batch_dice": batch_dice, "do_bg": do_bg, "smooth": 0.3}
    outside = lambda x: 1.5 * x.sigmoid()  # noqa: E731
    for nonlinearity in (softmax_helper_dim1, torch.nn.Softmax(1), torch.sigmoid, outside, None):
        x = x if nonlinearity else x.sigmoid()
        loss, p = getattr(ours, name)(nonlinearity, **options), nonlinearity or torch.nn.Identity()
        for y in (Y, Y[:, None], Y[:, None].float(), t.float(), t):
            for m in (None, mask, mask.float(), 0.5 * mask):
                assert_is(
                    lambda x, y=y, m=m, loss=loss: loss(x, y, m),
                    lambda x, m=m, p=p: -coefficient(p(x), t, mask=m, **options),
                    x,
                )


@over_batch
def test_the_least_true_positives(batch_dice):
    x, t = logits(SHAPE), one_hot(Y)
    loss = ours.SoftDiceLoss(torch.sigmoid, batch_dice, smooth=1e-5, clip_tp=3.0)
    assert_is(lambda x: loss(x, Y), lambda x: -coefficient(x.sigmoid(), t, batch_dice, True, 1e-5, clip_tp=3.0), x)


def test_the_least_denominator_is_0():
    """Nothing predicted and nothing to be found, without smoothing."""
    loss, x = ours.SoftDiceLoss(smooth=0.0), torch.zeros(1, 1, 3, 3)
    assert loss(x, x) == -1


@pytest.mark.parametrize("ignore_label", [None, 5])
@pytest.mark.parametrize("do_bg", [False, True])
@over_batch
@over_dtypes
def test_dice_and_cross_entropy(dtype, batch_dice, do_bg, ignore_label):
    x, y = logits(SHAPE, dtype), Y if ignore_label is None else IGNORED
    mask = (y != 5).unsqueeze(1)
    dice = {"batch_dice": batch_dice, "do_bg": do_bg, "smooth": 1e-5}
    for weight, smoothing in ((None, 0.0), (WEIGHT.to(dtype), 0.1)):
        options = {"weight": weight, "label_smoothing": smoothing}

        def formula(x, weight=weight, smoothing=smoothing):
            w = None if weight is None else weight.double()
            entropy = F.cross_entropy(x, y, w, ignore_index=5, label_smoothing=smoothing)
            return 0.4 * entropy - 0.7 * coefficient(x.softmax(1), one_hot(y), mask=mask, **dice)

        for dice_class in (ours.SoftDiceLoss, ours.MemoryEfficientSoftDiceLoss):
            loss = ours.DC_and_CE_loss({**dice, "ddp": False}, options, 0.4, 0.7, ignore_label, dice_class)
            for target in (y[:, None], y[:, None].float(), y[:, None].short()):
                assert_is(lambda x, loss=loss, t=target: loss(x, t), formula, x)
    assert options.keys() == {"weight", "label_smoothing"}  # not changed


def test_terms_that_are_a_pass_each():
    """A cross-entropy that ignores what the Dice does not, and a Dice class of the user's."""

    class Squared(torch.nn.Module):
        def __init__(self, apply_nonlin, smooth):
            super().__init__()
            self.apply_nonlin, self.smooth = apply_nonlin, smooth

        def forward(self, x, y, loss_mask=None):
            assert (loss_mask is None) == (y is Y5) and (y < CLASSES).all()
            return -(self.apply_nonlin(x) ** 2).sum() / 100

    x, Y5 = logits(SHAPE), Y[:, None]
    loss = ours.DC_and_CE_loss({"ddp": False}, {"ignore_index": 0}, 2)
    expected = lambda x: 2 * F.cross_entropy(x, Y, ignore_index=0) - coefficient(x.softmax(1), one_hot(Y))  # noqa: E731
    assert_is(lambda x: loss(x, Y5), expected, x)
    for y, ignored in ((Y5, None), (IGNORED[:, None], 5)):
        theirs = ours.DC_and_CE_loss({"smooth": 0}, {}, ignore_label=ignored, dice_class=Squared)
        entropy = lambda x, y=y: F.cross_entropy(x, y[:, 0], ignore_index=5)  # noqa: E731
        assert_is(lambda x, y=y, loss=theirs: loss(x, y), lambda x, e=entropy: e(x) - (x.softmax(1) ** 2).sum() / 100, x)


def test_a_compiled_dice():
    """nnU-Net compiles loss.dc; one pass needs no compiler."""
    loss = ours.DC_and_CE_loss({"batch_dice": True}, {})
    x = logits(SHAPE)
    expected = evaluate(loss, x, Y[:, None])
    loss.dc = torch.compile(loss.dc, backend=lambda *_: pytest.fail("compiled"))
    torch.testing.assert_close(evaluate(loss, x, Y[:, None]), expected, rtol=0, atol=0)


@over_batch
@over_dtypes
@pytest.mark.parametrize("channels", [1, CLASSES])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("ignore", [False, True])
def test_dice_and_binary_cross_entropy(ignore, images, channels, dtype, batch_dice):
    x, t = logits(SHAPE, dtype)[:images, :channels], REGIONS[:images, :channels]
    mask = (IGNORED[:images] != 5).unsqueeze(1) if ignore else torch.ones_like(t[:, :1])

    def formula(x, pos_weight=None):
        elements = F.binary_cross_entropy_with_logits(x, t.double(), pos_weight=pos_weight, reduction="none") * mask
        entropy = elements.sum() / mask.sum() if ignore else elements.mean()
        return 0.4 * entropy - 0.7 * coefficient(x.sigmoid(), t, batch_dice, smooth=1e-5, mask=mask)

    given = torch.cat([t, 1 - mask.float()], 1) if ignore else t
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    loss = ours.DC_and_BCE_loss({}, dice, 0.4, 0.7, ignore)
    for target in (given, given.bool(), given.to(torch.int16)):
        assert_is(lambda x, t=target: loss(x, t), formula, x)
    weight = torch.tensor(2.0)
    loss = ours.DC_and_BCE_loss({"pos_weight": weight}, dice, 0.4, 0.7, ignore, ours.SoftDiceLoss)
    assert_is(lambda x: loss(x, given), lambda x: formula(x, weight.double()), x)


def test_soft_regions():
    x, t = logits(SHAPE), torch.rand(SHAPE, generator=torch.Generator().manual_seed(4))
    formula = lambda x: F.binary_cross_entropy_with_logits(x, t.double()) - coefficient(x.sigmoid(), t)  # noqa: E731
    assert_is(lambda x: ours.DC_and_BCE_loss({}, {})(x, t), formula, x)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(reduction):
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 5}
    loss = ours.RobustCrossEntropyLoss(WEIGHT, **options)
    formula = lambda x: F.cross_entropy(x, IGNORED, WEIGHT.double(), **options)  # noqa: E731
    for y in (IGNORED, IGNORED[:, None], IGNORED[:, None].float()):
        assert_is(lambda x, y=y: loss(x, y), formula, logits(SHAPE))


def common_calls():
    """By name the calls that nnU-Net's trainer makes, and the operators that make something as large as the logits."""
    x, dice = logits(SHAPE), {"smooth": 1e-5, "ddp": False}
    ce, bce = (ours.DC_and_CE_loss, ours.DC_and_BCE_loss)
    efficient = {"dice_class": ours.MemoryEfficientSoftDiceLoss}
    one = ["compound"]
    return {
        "classes": (ce({"do_bg": False, **dice}, {}, **efficient), x, Y[:, None].short(), one),
        "classes, batch": (ce({"do_bg": False, "batch_dice": True, **dice}, {}, **efficient), x, Y[:, None], one),
        "classes, ignored": (ce({"do_bg": False, **dice}, {}, 1, 1, 5, **efficient), x, IGNORED[:, None], one),
        "regions": (bce({}, dice, **efficient), x, REGIONS.bool(), one),
        "regions, batch": (bce({}, {"batch_dice": True, **dice}, **efficient), x, REGIONS.bool(), ["region", "sigmoid_focal"]),
        "Dice": (ours.SoftDiceLoss(softmax_helper_dim1), x, Y[:, None], ["region"]),
    }


@pytest.mark.parametrize("name", common_calls())
def test_no_full_size_temporary(name):
    loss, x, target, kernels = common_calls()[name]
    x = x.detach().requires_grad_()
    with FullSize(x.numel()) as forward:
        value = loss(x, target)
    with FullSize(x.numel()) as backward:
        value.backward()
    found = {f.split(".")[1] for f in backward.found if f.startswith("veerloss")}
    assert forward.found == [] and len(found) == len(kernels)
    assert found == {f"{kernel}_backward" for kernel in kernels}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", common_calls())
def test_the_loss_of_half_precision_is_float32(name, dtype):
    loss, x, target, _ = common_calls()[name]
    (value, gradient), expected = evaluate(loss, x.to(dtype), target), evaluate(loss, x.to(dtype).double(), target)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-2, atol=1e-6)


def test_nothing_valid():
    x = logits(SHAPE)
    for ignored in (torch.full_like(Y, 5), IGNORED.index_fill(0, torch.tensor([0]), 5)):
        loss = ours.DC_and_CE_loss({"ddp": False}, {}, ignore_label=5)
        value, gradient = evaluate(loss, x.masked_fill((ignored == 5)[:, None], torch.nan), ignored[:, None])
        assert value.isfinite() and not gradient[0].any()
        assert gradient[1].any() if (ignored != 5).any() else value == -1


def test_errors():
    x = logits(SHAPE)
    with pytest.raises(AssertionError, match=r"target must have one channel of class indices, got \[2, 5, 6, 7\]"):
        ours.DC_and_CE_loss({}, {})(x, REGIONS)
    for loss in (ours.DC_and_CE_loss({}, {}), ours.SoftDiceLoss(softmax_helper_dim1)):
        with pytest.raises(RuntimeError, match="target holds 7"):
            loss(x, Y[:, None] + 7)
    with pytest.raises(ValueError, match=r"target must have a channel for each of \[2, 5, 6, 7\]"):
        ours.DC_and_BCE_loss({}, {}, use_ignore_label=True)(x, REGIONS)


def test_patching(monkeypatch):
    """On modules made up for the test."""
    for place, name in ours.REPLACES.items():
        parts = place.partition(":")[0].split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                sys.modules[path].__path__ = []
        setattr(importlib.import_module(".".join(parts)), name, type(name, (), {}))
    monkeypatch.setattr(ours, "DISTRIBUTION", None)
    monkeypatch.setattr(ours, "VERSIONS", None)
    compound = sys.modules["nnunetv2.training.loss.compound_losses"]
    theirs = compound.DC_and_CE_loss
    with veerloss.patch("nnunetv2") as names:
        assert len(names) == 5 and compound.DC_and_CE_loss is ours.DC_and_CE_loss
    assert compound.DC_and_CE_loss is theirs


# ---- ranks


def _rank(rank, world, path):
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    try:
        x, cut = logits(SHAPE, torch.float64), slice(rank, rank + 1)
        t, c = one_hot(Y), REGIONS
        formulas = [
            (
                ours.DC_and_CE_loss({"batch_dice": True, "do_bg": False}, {}), Y[:, None],
                lambda x: F.cross_entropy(x, Y) - coefficient(x.softmax(1), t, True, False),
            ),
            (
                ours.DC_and_BCE_loss({}, {"batch_dice": True}), c,  # its cross-entropy is of the rank
                lambda x: F.binary_cross_entropy_with_logits(x, c.double()) - coefficient(x.sigmoid(), c, True),
            ),
            (ours.SoftDiceLoss(torch.exp, True), Y, lambda x: -coefficient(x.exp(), t, True)),
            (ours.SoftDiceLoss(torch.sigmoid, True), Y, lambda x: -coefficient(x.sigmoid(), t, True)),
        ]  # fmt: skip
        for loss, target, formula in formulas:
            value, gradient = evaluate(loss, x[cut], target[cut])
            expected, whole = evaluate(formula, x)
            dist.all_reduce(value)
            torch.testing.assert_close(value / world, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(gradient / world, whole[cut], rtol=1e-8, atol=1e-12)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_ranks(tmp_path):
    """The mean over ranks of loss and gradient, which DistributedDataParallel takes, is that of one process with all."""
    multiprocessing.start_processes(_rank, args=(2, tmp_path / "rendezvous"), nprocs=2, start_method="spawn")
