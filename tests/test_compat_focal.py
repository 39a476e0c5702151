"""The focal losses of veerloss.compat against formulas in float64. Beside the peers themselves: tests/peers.
A section for each peer, and they share the formulas at the head."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from budget import evaluate
from grid import labels, logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veerloss.compat import (
    _focal,
    apex,
    detectron2,
    fvcore,
    kornia,
    mmcv,
    mmdet,
    mmdet3d,
    mmseg,
    monai,
    pytorch_toolbelt,
    torchvision,
    transformers,
)
from veerloss.compat import segmentation_models_pytorch as smp

SHAPE = (2, 5, 6, 7)
CLASSES = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])


def sigmoid_elements(x, t, gamma=2.0, alpha=None):
    """Lin et al. for 0 and 1 and in between, as torchvision writes it."""
    x, t = x.double(), t.double()
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    loss = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x)) * (p * (1 - t) + q * t) ** gamma
    return loss if alpha is None else loss * (alpha * t + (1 - alpha) * (1 - t))


def softmax_pixels(x, y, gamma=2.0):
    """Of each pixel; 0 for targets that are no class."""
    log_p = x.double().log_softmax(1).gather(1, y.clamp(0, x.size(1) - 1).unsqueeze(1)).squeeze(1)
    return torch.where((y >= 0) & (y < x.size(1)), -((1 - log_p.exp()) ** gamma) * log_p, 0.0)


def one_hot(y, classes=CLASSES):
    """[N, C, *]; all 0 for labels that are no class."""
    return F.one_hot(torch.where((y >= 0) & (y < classes), y, classes), classes + 1)[..., :-1].movedim(-1, 1)


def assert_is(loss, formula, x, *, dtype=None):
    """Value and gradient; ``dtype`` of the loss, if it is not that of the logits."""
    (value, gradient), expected = evaluate(loss, x), evaluate(formula, x.double())
    assert value.dtype == (dtype or x.dtype) and gradient.dtype == x.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if torch.float32 in (value.dtype, x.dtype) else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close((value.double(), gradient.double()), expected, **tolerance)


def some(kind, dtype=torch.float32, ignore_index=None):
    """(logits, target) of SHAPE; "index" [N, *], the others one value for each logit."""
    generator = torch.Generator().manual_seed(3)
    if kind == "index":
        return logits(SHAPE, dtype), labels(SHAPE, CLASSES, ignore_index=ignore_index)
    target = torch.rand(SHAPE, generator=generator)
    target = target if kind == "soft" else target.round()
    if ignore_index is not None:
        target.view(-1)[::5] = ignore_index
    return logits(SHAPE, dtype), target


over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
over_reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def reduced(loss, reduction, count=None):
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (count or loss.numel())}[reduction]


# ---- a target for each logit


@over_dtypes
@over_reductions
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("alpha", [-1, 0.25])
def test_torchvision_and_fvcore(alpha, kind, reduction, dtype):
    x, t = some(kind, dtype)
    factor = None if alpha < 0 else alpha
    for gamma in (0, 0.5, 2):

        def formula(x, gamma=gamma):
            return reduced(sigmoid_elements(x, t, gamma, factor), reduction)

        assert_is(lambda x, g=gamma: torchvision.sigmoid_focal_loss(x, t, alpha, g, reduction), formula, x)
        for loss in (fvcore.sigmoid_focal_loss, fvcore.sigmoid_focal_loss_jit):
            assert_is(lambda x, g=gamma, loss=loss: loss(x, t, alpha, g, reduction), formula, x, dtype=torch.float32)


@over_reductions
def test_fvcore_star(reduction):
    x, t = some("hard")

    def formula(x):
        return reduced(-F.logsigmoid(3 * x * (2 * t - 1)) / 3 * (0.25 * t + 0.75 * (1 - t)), reduction)

    for loss in (fvcore.sigmoid_focal_loss_star, fvcore.sigmoid_focal_loss_star_jit):
        assert_is(lambda x, loss=loss: loss(x, t, 0.25, 3, reduction), formula, x)
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        fvcore.sigmoid_focal_loss_star(x, t, gamma=0)


@over_dtypes
def test_transformers(dtype):
    x, t = some("hard", dtype)
    assert_is(
        lambda x: transformers.sigmoid_focal_loss(x, t, 7), lambda x: sigmoid_elements(x, t, 2, 0.25).mean(1).sum() / 7, x
    )


@over_reductions
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_binary_kornia(kind, reduction):
    x, t = some(kind, ignore_index=-100)
    pos_weight = WEIGHT.flip(0)

    def formula(x):
        valid = t != -100
        per_channel = [-1, 1, 1]
        positive = sigmoid_elements(x, torch.ones_like(t), alpha=0.3) * pos_weight.double().reshape(per_channel)
        negative = sigmoid_elements(x, torch.zeros_like(t), alpha=0.3)
        loss = (t * positive + (1 - t) * negative) * WEIGHT.double().reshape(per_channel)
        return reduced(torch.where(valid, loss, 0.0), reduction)

    module = kornia.BinaryFocalLossWithLogits(0.3, 2.0, reduction, pos_weight, WEIGHT)
    assert_is(lambda x: module(x, t), formula, x)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_binary_smp(kind):
    x, t = some(kind, ignore_index=255)
    valid = t != 255

    def elements(x):  # p_t is exp(-bce), of soft targets too
        bce = F.binary_cross_entropy_with_logits(x[valid], t[valid].double(), reduction="none")
        return (1 - (-bce).exp()) ** 2 * bce * (0.3 * t[valid] + 0.7 * (1 - t[valid]))

    for reduction in ("mean", "sum"):
        loss = smp.FocalLoss("binary", alpha=0.3, ignore_index=255, reduction=reduction)
        assert_is(lambda x, loss=loss: loss(x, t), lambda x, r=reduction: reduced(elements(x), r), x)
    loss = smp.FocalLoss("binary", alpha=0.3, ignore_index=255, reduction="none")
    assert_is(lambda x: loss(x, t), elements, x)


def test_per_channel_monai():
    x, t = some("soft")

    def formula(x):  # the modulating factor is sigmoid(-x (2 t - 1))
        bce = F.binary_cross_entropy_with_logits(x, t.double(), reduction="none")
        return (bce * torch.sigmoid(-x * (2 * t - 1)) ** 2).mean()

    assert_is(lambda x: monai.FocalLoss()(x, t), formula, x)
    assert_is(lambda x: monai.FocalLoss()(x, t.round()), lambda x: sigmoid_elements(x, t.round()).mean(), x)


@over_reductions
def test_toolbelt(reduction):
    x, t = some("hard", ignore_index=255)

    def formula(x):
        loss = sigmoid_elements(x, t.clamp(max=1), alpha=0.3) * WEIGHT.reshape(-1, 1, 1)
        return reduced(torch.where(t == 255, 0.0, loss), reduction)

    module = pytorch_toolbelt.BinaryFocalLoss(0.3, ignore_index=255, reduction=reduction, class_weights=WEIGHT.tolist())
    assert_is(lambda x: module(x, t), formula, x)


# ---- class indices


@over_reductions
def test_softmax_kornia(reduction):
    x, y = some("index", ignore_index=-100)
    factor = torch.tensor([0.7, 0.3, 0.3, 0.3, 0.3]) * WEIGHT

    def formula(x):
        pixels = softmax_pixels(x, y) * factor[y.clamp(0)]
        return reduced(one_hot(y) * pixels.unsqueeze(1), reduction)

    assert_is(lambda x: kornia.focal_loss(x, y, 0.3, 2.0, reduction, WEIGHT), formula, x)
    assert_is(lambda x: kornia.FocalLoss(0.3, 2.0, reduction, WEIGHT)(x, y), formula, x)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@over_reductions
def test_labels_monai(reduction, softmax, background):
    x, y = some("index", ignore_index=255)
    weight = WEIGHT if background else WEIGHT[1:]
    alpha = torch.linspace(0.1, 0.9, len(weight))

    def formula(x):
        t = one_hot(y).double()
        x, t = (x, t) if background else (x[:, 1:], t[:, 1:])
        per_channel = [-1, 1, 1]
        if softmax:
            log_p = x.log_softmax(1)
            loss = -t * (1 - log_p.exp()) ** 2 * log_p * alpha.reshape(per_channel)
        else:
            loss = sigmoid_elements(x, t) * torch.where(t == 1, alpha.reshape(per_channel), 1.0)
        valid = (y != 255).unsqueeze(1)
        loss = loss * weight.reshape(per_channel) * valid
        if reduction == "sum":  # the mean over the volume, image by image
            return (loss.flatten(1).sum(1) / valid.flatten(1).sum(1)).sum()
        return reduced(loss, reduction, valid.sum() * x.size(1))

    module = monai.FocalLoss(
        include_background=background, to_onehot_y=True, alpha=alpha.tolist(), weight=weight.tolist(), reduction=reduction,
        use_softmax=softmax, ignore_index=255,
    )  # fmt: skip
    assert_is(lambda x: module(x, y.unsqueeze(1)), formula, x)


def test_one_vs_rest_smp():
    x, y = some("index", ignore_index=255)
    valid = (y != 255).unsqueeze(1)

    def per_class(x):
        return (sigmoid_elements(x, one_hot(y), 2.0, 0.3) * valid).sum([0, 2, 3])

    for reduction, divisor in (("mean", valid.sum()), ("sum", 1)):
        loss = smp.FocalLoss("multiclass", alpha=0.3, ignore_index=255, reduction=reduction, class_weights=WEIGHT.tolist())

        def formula(x, divisor=divisor):
            return (per_class(x) / divisor * WEIGHT).sum() / WEIGHT.sum()

        assert_is(lambda x, loss=loss: loss(x, y), formula, x)


@over_reductions
def test_mmseg(reduction):
    x, y = some("index", ignore_index=255)
    alpha = torch.linspace(0.1, 0.9, CLASSES).tolist()
    pixel_weight = torch.rand(y.numel(), generator=torch.Generator().manual_seed(0))

    def formula(x, target=y):
        t = one_hot(target) if target is y else target
        per_channel = [-1, 1, 1]
        a = torch.tensor(alpha).reshape(per_channel)
        loss = sigmoid_elements(x, t) * (a * t + (1 - a) * (1 - t))
        loss = loss * WEIGHT.reshape(per_channel) * pixel_weight.reshape(y.shape).unsqueeze(1)
        return 3 * reduced(loss if target is not y else torch.where((y == 255).unsqueeze(1), 0.0, loss), reduction)

    module = mmseg.FocalLoss(alpha=alpha, class_weight=WEIGHT.tolist(), loss_weight=3.0, reduction=reduction)
    assert_is(lambda x: module(x, y, weight=pixel_weight), formula, x)
    soft = some("soft")[1]
    assert_is(lambda x: module(x, soft, weight=pixel_weight), lambda x: formula(x, soft), x)
    if reduction == "mean":
        torch.testing.assert_close(module(x, y, avg_factor=11.0), module(x, y, reduction_override="sum") / 11)


@over_reductions
def test_mmdet(reduction):
    x, y = anchors(None, K)
    weight = torch.rand(R, K, generator=torch.Generator().manual_seed(0))

    def formula(x, w, t=None):
        t = one_hot(y, K) if t is None else t
        return 3 * reduced(sigmoid_elements(x, t, 1.5, 0.25) * w, reduction)

    loss = mmdet3d.FocalLoss(gamma=1.5, reduction=reduction, loss_weight=3.0)
    assert_is(lambda x: loss(x, y), lambda x: formula(x, 1), x)
    assert_is(lambda x: loss(x, y, weight[:, 0]), lambda x: formula(x, weight[:, :1]), x)
    for w in (weight, weight.flatten()):
        assert_is(lambda x, w=w: loss(x, y, w), lambda x: formula(x, weight), x)
    soft = torch.rand(R, K)
    assert_is(lambda x: loss(x, soft), lambda x: formula(x, 1, soft), x)
    activated = mmdet.FocalLoss(gamma=1.5, reduction=reduction, loss_weight=3.0, activated=True)
    torch.testing.assert_close(activated(x.double().sigmoid(), y), loss(x.double(), y))
    if reduction == "mean":
        torch.testing.assert_close(loss(x, y, avg_factor=7.0), loss(x, y, reduction_override="sum") / 7)


def test_mmseg_ignores_a_class_of_targets_per_logit():
    x, y = some("index")
    loss = mmseg.FocalLoss(reduction="sum")
    torch.testing.assert_close(loss(x, one_hot(y), ignore_index=2), loss(x, y, ignore_index=2))


R, K = 40, 5


def anchors(ignored, background, seed=0, dtype=torch.float32):
    """Logits [R, K] and a class for each, background and ignored ones among them."""
    y = torch.randint(0, K, (R,), generator=torch.Generator().manual_seed(seed))
    y[::4] = background
    if ignored is not None:
        y[::7] = ignored
    return logits((R, K), dtype), y


@over_dtypes
@over_reductions
def test_detectron2_is_its_fvcore_on_a_one_hot(reduction, dtype):
    x, y = anchors(-1, K, dtype=dtype)
    valid = (y >= 0).unsqueeze(1)

    def formula(x):
        loss = sigmoid_elements(x, one_hot(y, K), 1.5, 0.25) * valid
        return reduced(loss, reduction, valid.sum() * K)

    assert_is(lambda x: detectron2.sigmoid_focal_loss(x, y, 0.25, 1.5, reduction), formula, x)
    kept = fvcore.sigmoid_focal_loss(x[y >= 0], one_hot(y, K)[y >= 0].to(dtype), 0.25, 1.5, "sum")
    for normalizer in (9, torch.tensor(9.0)):
        found = detectron2.sigmoid_focal_loss(x, y, gamma=1.5, normalizer=normalizer)
        torch.testing.assert_close(found.float(), kept / 9)


def test_detectron2_shapes():
    x, y = anchors(-1, K)
    expected = detectron2.sigmoid_focal_loss(x, y)
    torch.testing.assert_close(detectron2.sigmoid_focal_loss(x.reshape(4, 10, K), y.reshape(4, 10)), expected)
    none = detectron2.sigmoid_focal_loss(x.reshape(4, 10, K), y.reshape(4, 10), reduction="none")
    assert none.shape == (4, 10, K) and not none.reshape(R, K)[y == -1].any()
    torch.testing.assert_close(none.sum(), expected)
    assert detectron2.sigmoid_focal_loss(x.bfloat16(), y).dtype == torch.float32
    one, y = x[:, :1], torch.where(y > 0, 1, y)  # a detector of one class
    torch.testing.assert_close(
        detectron2.sigmoid_focal_loss(one, y), sigmoid_elements(one[y >= 0], one_hot(y[y >= 0], 1), alpha=0.25).sum().float()
    )


@over_reductions
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_sigmoid_mmcv(weight, reduction):
    x, y = anchors(None, K)
    per_sample = torch.ones(R) if weight is None else torch.cat([weight, torch.ones(1)])[y]

    def formula(x):
        return reduced(sigmoid_elements(x, one_hot(y, K), 2.0, 0.25) * per_sample.unsqueeze(1), reduction, R)

    assert_is(lambda x: mmcv.sigmoid_focal_loss(x, y, 2.0, 0.25, weight, reduction), formula, x)
    assert_is(lambda x: mmcv.SigmoidFocalLoss(2.0, 0.25, weight, reduction)(x, y), formula, x)
    one = x[:, :1]
    found = mmcv.sigmoid_focal_loss(one, (y > 0).long())
    torch.testing.assert_close(found.double(), sigmoid_elements(one, one_hot(y, 1), alpha=0.25).mean())


@over_reductions
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_softmax_mmcv(weight, reduction):
    x, y = anchors(-7, -1)
    per_sample = torch.ones(R) if weight is None else weight[y.clamp(0)]

    def formula(x):
        return reduced(softmax_pixels(x, y, 1.5) * 0.3 * per_sample, reduction)

    assert_is(lambda x: mmcv.softmax_focal_loss(x, y, 1.5, 0.3, weight, reduction), formula, x)
    assert_is(lambda x: mmcv.SoftmaxFocalLoss(1.5, 0.3, weight, reduction)(x, y), formula, x)


@over_dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("real", [K, K - 2])
def test_apex(real, smoothing, dtype):
    x, y = anchors(-2, -1, dtype=dtype)
    y = torch.where(y >= real, -1, y)
    positives = torch.tensor(9.0)

    def formula(x):
        x, t = x[:, :real], one_hot(y, real).double()
        smooth = t * (1 - smoothing) + smoothing / 2
        q = torch.sigmoid(-x) * t + torch.sigmoid(x) * (1 - t)
        loss = F.binary_cross_entropy_with_logits(x, smooth, reduction="none") * q**2 * (0.24 * t + 0.76 * (1 - t))
        return (loss * (y != -2).unsqueeze(1)).sum() / 9

    assert_is(lambda x: apex.focal_loss(x, y, positives, real, 0.24, 2.0, smoothing), formula, x)
    rest = (positives, real, 0.24, 2.0, smoothing)
    boxes = apex.focal_loss(x.reshape(2, 4, 5, K), y.reshape(2, 4, 5), *rest)
    torch.testing.assert_close(boxes, apex.focal_loss(x, y, *rest))
    padded = x.clone()
    padded[:, real:] = math.nan
    _, gradient = evaluate(lambda x: apex.focal_loss(x, y, positives, real, 0.24, 2.0, smoothing), padded)
    assert gradient.isfinite().all() and not gradient[:, real:].any()
    half = apex.focal_loss(x.bfloat16(), y, positives, real, 0.24, 2.0, smoothing)
    assert half.dtype == torch.float32


# ---- slower paths


def modulated(q, gamma, scale, threshold, compared):
    """The reduced modulating factor: 1 where ``compared`` is below the threshold."""
    return torch.where(compared < threshold, 1.0, (q / scale) ** gamma)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_smp_normalized_and_reduced(threshold, normalized):
    x, y = some("index", torch.float64, ignore_index=255)
    valid = (y != 255).unsqueeze(1)

    def formula(x, t=None):
        bce = F.binary_cross_entropy_with_logits(x, (one_hot(y) if t is None else t).double(), reduction="none")
        p = (-bce).exp()
        factor = (1 - p) ** 3 if threshold is None else modulated(1 - p, 3, threshold, threshold, p)
        loss, dims = factor * bce * (valid if t is None else 1), [0, 2, 3] if t is None else [0, 1, 2, 3]
        if normalized:
            loss = loss / (factor * (valid if t is None else 1)).sum(dims, keepdim=True)
        return loss.sum() / (valid.sum() * CLASSES if t is None else t.numel())

    options = {"gamma": 3, "normalized": normalized, "reduced_threshold": threshold}
    loss = smp.FocalLoss("multiclass", ignore_index=255, **options)
    assert_is(lambda x: loss(x, y), formula, x)
    soft = some("soft")[1].double()
    loss = smp.FocalLoss("binary", **options)
    assert_is(lambda x: loss(x, soft), lambda x: formula(x, soft), x)
    assert_is(lambda x: smp.focal_loss_with_logits(x, soft, alpha=None, **options), lambda x: formula(x, soft), x)
    with pytest.raises(IndexError, match="target holds 77"):
        smp.FocalLoss("multiclass", **{**options, "normalized": True})(x, torch.full_like(y, 77))


def test_smp_softmax():
    x, y = some("index", torch.float64, ignore_index=-100)
    for reduction in ("none", "mean", "sum"):
        expected = reduced(softmax_pixels(x, y), reduction)
        torch.testing.assert_close(smp.softmax_focal_loss_with_logits(x, y, reduction=reduction), expected)
    log_p = -F.cross_entropy(x, y, reduction="none")
    factor = modulated(1 - log_p.exp(), 2, 0.5, 0.5, log_p.exp())
    expected = (-factor * log_p / factor.sum()).mean()
    torch.testing.assert_close(smp.softmax_focal_loss_with_logits(x, y, normalized=True, reduced_threshold=0.5), expected)
    both = (smp.softmax_focal_loss_with_logits(x, y, reduction=r) for r in ("batchwise_mean", "none"))
    torch.testing.assert_close(next(both), next(both).sum(0))


def test_smp_probabilities():
    x, y = some("index", torch.float64, ignore_index=255)
    binary, multiclass = (smp.FocalLoss(mode, ignore_index=255, from_logits=False) for mode in ("binary", "multiclass"))
    hard = some("hard")[1]
    torch.testing.assert_close(binary(x.sigmoid(), hard), sigmoid_elements(x, hard).mean())
    log_p = x.log_softmax(1)
    torch.testing.assert_close(multiclass(x.softmax(1), y), smp.FocalLoss("multiclass", ignore_index=255)(log_p, y))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_toolbelt_normalized_and_reduced(activation, threshold, normalized):
    x, y = some("index", ignore_index=255)
    valid = (y != 255).unsqueeze(1)
    per_channel = WEIGHT.reshape(-1, 1, 1)

    def formula(x):
        t = one_hot(y).double()
        p = x.sigmoid() if activation == "sigmoid" else x.softmax(1)
        q = p * (1 - t) + (1 - p) * t
        factor = q**3 if threshold is None else modulated(q, 3, 1 - threshold, threshold, 1 - q)
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        loss = factor * bce * (0.3 * t + 0.7 * (1 - t)) * per_channel * valid
        return (loss / (factor * valid).sum() if normalized else loss).mean()

    module = pytorch_toolbelt.BinaryFocalLoss(
        0.3,
        3,
        255,
        normalized=normalized,
        reduced_threshold=threshold,
        activation=activation,
        softmax_dim=1,
        class_weights=WEIGHT,
    )
    assert_is(lambda x: module(x, y), formula, x)
    target = one_hot(y)
    target[~valid.expand_as(target)] = 255
    assert_is(lambda x: module(x, target), formula, x)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_toolbelt_cross_entropy(threshold, normalized):
    x, y = some("index", ignore_index=-100)
    valid = y != -100

    def formula(x):
        t, p = one_hot(y).double(), x.softmax(1)
        q = p * (1 - t) + (1 - p) * t
        factor = q**2 if threshold is None else modulated(q, 2, threshold, threshold, q)
        loss = factor * F.binary_cross_entropy_with_logits(x, t, reduction="none") * WEIGHT.reshape(-1, 1, 1)
        loss = loss.sum(1) * valid
        return (loss / (factor * valid.unsqueeze(1)).sum() if normalized else loss).mean()

    options = {"class_weights": WEIGHT, "normalized": normalized, "reduced_threshold": threshold}
    assert_is(lambda x: pytorch_toolbelt.CrossEntropyFocalLoss(**options)(x, y), formula, x)
    with pytest.raises(RuntimeError, match="target holds 77"):
        pytorch_toolbelt.CrossEntropyFocalLoss()(x, torch.full_like(y, 77))


def test_monai_without_reduction():
    x, y = some("index")
    dense = one_hot(y).float()
    loss = monai.FocalLoss(use_softmax=True, alpha=0.3, weight=2.0, reduction="none")
    factor = torch.tensor([0.7, 0.3, 0.3, 0.3, 0.3]).reshape(-1, 1, 1) * 2
    assert_is(lambda x: loss(x, dense), lambda x: dense * softmax_pixels(x, y).unsqueeze(1) * factor, x)
    labelled = monai.FocalLoss(to_onehot_y=True, use_softmax=True, alpha=0.3, weight=2.0, reduction="none")
    torch.testing.assert_close(labelled(x, y[:, None]), loss(x, dense))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("softmax", [False, True])
def test_monai_ignores_voxels_of_targets_per_channel(softmax, reduction):
    """Those without a channel, or of an ignored one."""
    x, y = some("index", ignore_index=255)
    options = {"use_softmax": softmax, "reduction": reduction, "weight": WEIGHT.tolist()}
    for ignore_index in (255, 2):
        target = y if ignore_index == 255 else y.clamp(max=4)
        expected = monai.FocalLoss(to_onehot_y=True, ignore_index=ignore_index, **options)(x, target[:, None])
        found = monai.FocalLoss(ignore_index=ignore_index, **options)(x, one_hot(target).float())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_monai_one_channel(reduction):
    x, t = (tensor[:, :1] for tensor in some("hard", ignore_index=255))
    valid = t != 255

    def formula(x):
        loss = torch.where(valid, sigmoid_elements(x, t.clamp(max=1), alpha=0.3), 0.0)
        if reduction == "sum":
            return (loss.flatten(1).sum(1) / valid.flatten(1).sum(1)).sum()
        return reduced(loss, reduction, valid.sum())

    loss = monai.FocalLoss(alpha=0.3, ignore_index=255, reduction=reduction)
    assert_is(lambda x: loss(x, t), formula, x)
    with pytest.warns(UserWarning, match="single channel prediction"):
        torch.testing.assert_close(
            monai.FocalLoss(False, True, alpha=0.3, ignore_index=255, reduction=reduction)(x, t), loss(x, t)
        )


def test_targets_and_weights_that_require_a_gradient():
    x, t = some("soft", torch.float64)
    weight = torch.nn.Parameter(WEIGHT.double())
    y = labels(SHAPE, CLASSES)

    def gradient(loss, wanted):
        return torch.autograd.grad(loss, wanted)[0]

    t.requires_grad_()
    t64 = t.double()
    expected = gradient(sigmoid_elements(x, t64, 2, 0.25).mean(), t)
    for loss in (
        torchvision.sigmoid_focal_loss(x, t, reduction="mean"),
        fvcore.sigmoid_focal_loss(x, t, 0.25, reduction="mean"),
        transformers.sigmoid_focal_loss(x, t, x[:, 0].numel()),
        pytorch_toolbelt.focal_loss_with_logits(x, t),
    ):
        torch.testing.assert_close(gradient(loss, t), expected, rtol=1e-4, atol=1e-7)
    loss = kornia.FocalLoss(0.25, reduction="sum", weight=weight)
    assert loss.weight is weight
    pixels = softmax_pixels(x, y) * torch.where(y == 0, 0.75, 0.25)
    expected = torch.stack([pixels[y == c].sum() for c in range(CLASSES)])
    torch.testing.assert_close(gradient(loss(x, y), weight), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@over_reductions
def test_scripted(reduction):
    """TorchScript knows no kernel of ours: the plain formulas."""
    x, soft = some("soft")
    y = labels(SHAPE, CLASSES, ignore_index=-100)
    modules = [
        (kornia.FocalLoss(0.25, 2.0, reduction, WEIGHT), y),
        (kornia.BinaryFocalLossWithLogits(0.25, 2.0, reduction, WEIGHT, WEIGHT), soft),
        (monai.FocalLoss(alpha=0.25, reduction=reduction), soft.round()),
        (monai.FocalLoss(False, True, 0, [0.1, 0.2, 0.3, 0.4], WEIGHT[1:], reduction, True, -100), y[:, None]),
        (monai.FocalLoss(True, True, 1.0, 0.3, 2, reduction, True), y[:, None].clamp(0)),
        (monai.FocalLoss(True, True, 1.0, WEIGHT, None, reduction, False, 255), y[:, None].clamp(0)),
    ]
    for module, target in modules:
        torch.testing.assert_close(torch.jit.script(module)(x, target), module(x, target))
    for function in (
        torchvision.sigmoid_focal_loss, fvcore.sigmoid_focal_loss, fvcore.sigmoid_focal_loss_jit,
        fvcore.sigmoid_focal_loss_star, fvcore.sigmoid_focal_loss_star_jit,
    ):  # fmt: skip
        options = {"alpha": 0.25, "gamma": 2.0, "reduction": reduction}
        torch.testing.assert_close(torch.jit.script(function)(x, soft, **options), function(x, soft, **options))


# ---- what every one must do


def index_losses(ignore_index):
    """By name a loss of (logits [N, C, *], class indices [N, *]), with all its defaults but for the ignored value."""
    return {
        "detectron2": lambda x, y: detectron2.sigmoid_focal_loss(
            x.movedim(1, -1).contiguous(), torch.where(y == ignore_index, -1, y)
        ),
        "apex": lambda x, y: apex.focal_loss(
            x.movedim(1, -1).contiguous(), torch.where(y == ignore_index, -2, y), x.new_full((), 7.0), x.size(1), 0.25, 0.5
        ),
        "kornia": lambda x, y: kornia.focal_loss(x, y, 0.25, 0.5, "mean", None, ignore_index),
        "monai sigmoid": lambda x, y: monai.FocalLoss(to_onehot_y=True, gamma=0.5, ignore_index=ignore_index)(x, y[:, None]),
        "monai softmax": lambda x, y: monai.FocalLoss(
            to_onehot_y=True, gamma=0.5, use_softmax=True, include_background=False, ignore_index=ignore_index
        )(x, y[:, None]),
        "smp": lambda x, y: smp.FocalLoss("multiclass", gamma=0.5, ignore_index=ignore_index)(x, y),
        "toolbelt": lambda x, y: pytorch_toolbelt.BinaryFocalLoss(gamma=0.5, ignore_index=ignore_index)(x, y),
        "toolbelt softmax": lambda x, y: pytorch_toolbelt.CrossEntropyFocalLoss(gamma=0.5, ignore_index=ignore_index)(x, y),
        "mmseg": lambda x, y: mmseg.FocalLoss(gamma=0.5)(x, y, ignore_index=ignore_index),
    }


@pytest.mark.parametrize("name", index_losses(255))
def test_everything_ignored_is_zero(name):
    value, gradient = evaluate(index_losses(255)[name], logits(SHAPE), torch.full((2, 6, 7), 255))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name", index_losses(255))
def test_confident_pixels_have_finite_gradients(name):
    """gamma is 0.5, whose derivative at p = 1 is infinite."""
    x, y = logits(SHAPE, scale=1e4), labels(SHAPE, CLASSES, ignore_index=255)
    assert all(t.isfinite().all() for t in evaluate(index_losses(255)[name], x, y))


@pytest.mark.parametrize("name", sorted({*index_losses(255)} - {"toolbelt softmax"}))
def test_a_label_that_is_no_class_is_an_error(name):
    y = torch.full((2, 6, 7), 77)
    with pytest.raises((IndexError, RuntimeError), match=r"holds 7[67]"):
        index_losses(255)[name](logits(SHAPE), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_soft_targets_are_found(chunk, dtype, monkeypatch):
    monkeypatch.setitem(_focal._CHUNK, "cpu", chunk)
    hard = some("hard")[1].to(dtype)
    for layout in (hard, hard.to(memory_format=torch.channels_last), hard[:, 1:], hard[:0]):
        assert _focal.is_hard(layout)
    tiny = torch.finfo(dtype).tiny
    for value in (0.5, 1 - torch.finfo(dtype).eps, 1 + torch.finfo(dtype).eps, tiny, -1.0, 255.0, math.nan):
        soft = hard.clone()
        soft[1, 4, 5, 6] = value
        for layout in (soft, soft.to(memory_format=torch.channels_last), soft[:, 1:]):
            assert not _focal.is_hard(layout)
            assert _focal.is_hard(layout, 255) == (value == 255)
    assert _focal.is_hard(torch.tensor([3, 7])) and _focal.is_hard(torch.tensor(True))


class FullSize(TorchDispatchMode):
    """The operators that make a tensor of at least so many elements in storage of its own."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(outputs):
            if isinstance(t, torch.Tensor) and t.numel() >= self.elements and t.untyped_storage()._cdata not in given:
                self.found.append(str(function))
        return outputs


def common_calls():
    """By name the common call of each loss, (loss, logits, target): with class indices where it takes them."""
    x, y = logits(SHAPE), labels(SHAPE, CLASSES, ignore_index=255)
    dense = one_hot(labels(SHAPE, CLASSES)).float()
    rows = logits((R, K))
    _, detected = anchors(-1, K)
    _, matched = anchors(-2, -1)
    return {
        "torchvision": (lambda x, t: torchvision.sigmoid_focal_loss(x, t, reduction="mean"), x, dense),
        "fvcore": (lambda x, t: fvcore.sigmoid_focal_loss_jit(x, t, 0.25, 2.0, "sum"), x, dense),
        "transformers": (lambda x, t: transformers.sigmoid_focal_loss(x, t, 7), x, dense),
        "detectron2": (lambda x, y: detectron2.sigmoid_focal_loss(x, y, normalizer=7), rows, detected),
        "mmcv sigmoid": (mmcv.SigmoidFocalLoss(2.0, 0.25), rows, detected.clamp(0)),
        "mmcv sigmoid, weight": (mmcv.SigmoidFocalLoss(2.0, 0.25, WEIGHT), rows, detected.clamp(0)),
        "mmcv softmax": (mmcv.SoftmaxFocalLoss(2.0, 0.25), rows, matched),
        "apex": (lambda x, y: apex.focal_loss(x, y, torch.tensor(7.0), K, 0.25, 2.0), rows, matched),
        "kornia": (lambda x, y: kornia.focal_loss(x, y, 0.25, reduction="mean", ignore_index=255), x, y),
        "kornia, weight": (kornia.FocalLoss(0.25, reduction="sum", weight=WEIGHT, ignore_index=255), x, y),
        "kornia binary": (kornia.BinaryFocalLossWithLogits(0.25, reduction="mean", pos_weight=WEIGHT), x, dense),
        "mmdet": (lambda x, y: mmdet.FocalLoss()(x, y, torch.linspace(0, 1, R), 7.0), rows, detected.clamp(0)),
        "monai": (monai.FocalLoss(), x, dense),
        "monai labels": (monai.FocalLoss(to_onehot_y=True, alpha=0.25, ignore_index=255), x, y[:, None]),
        "monai labels, softmax": (monai.FocalLoss(to_onehot_y=True, use_softmax=True, ignore_index=255), x, y[:, None]),
        "monai labels, no background": (monai.FocalLoss(False, True, alpha=0.25, reduction="sum"), x, y[:, None].clamp(max=4)),
        "monai softmax": (monai.FocalLoss(use_softmax=True, alpha=0.25, ignore_index=255), x, dense),
        "smp binary": (smp.FocalLoss("binary"), x, dense),
        "smp multiclass": (smp.FocalLoss("multiclass", ignore_index=255, class_weights=WEIGHT.tolist()), x, y),
        "smp multilabel": (smp.FocalLoss("multilabel", alpha=0.25), x, dense),
        "toolbelt": (pytorch_toolbelt.BinaryFocalLoss(alpha=0.25, ignore_index=255), x, y),
        "toolbelt, per logit": (pytorch_toolbelt.focal_loss_with_logits, x, dense),
        "mmseg": (mmseg.FocalLoss(class_weight=WEIGHT.tolist()), x, y),
    }


@pytest.mark.parametrize("name", common_calls())
def test_no_full_size_temporary(name, monkeypatch):
    monkeypatch.setitem(_focal._CHUNK, "cpu", 100)  # what is read to find soft targets
    loss, x, target = common_calls()[name]
    x.requires_grad_()
    with FullSize(x.numel()) as forward:
        value = loss(x, target)
    with FullSize(x.numel()) as backward:
        value.backward()
    assert forward.found == []
    # The gradient alone; where channel 0 is left out, also its place in that of all channels.
    padded = ["aten.slice_backward.default"] if "no background" in name else []
    assert [f for f in backward.found if "focal_backward" not in f and "detach" not in f] in ([], padded)


def test_a_full_size_temporary_is_found():
    x, y = some("index")
    with FullSize(x.numel()) as forward:
        torchvision.sigmoid_focal_loss(x, one_hot(y).float(), reduction="mean")
    assert len(forward.found) >= 2  # the one-hot, and its copy in float


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
    """float32 where the peer's is, else the type of the logits."""
    loss, x, target = common_calls()[name]
    (value, gradient), expected = evaluate(loss, x.to(dtype), target), evaluate(loss, x.to(dtype).double(), target)
    upcasts = name.split()[0].rstrip(",") in ("fvcore", "detectron2", "apex", "monai", "toolbelt")
    assert value.dtype == (torch.float32 if upcasts else dtype) and gradient.dtype == dtype
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(value.double(), expected[0].double(), rtol=1e-5 if upcasts else rtol, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected[1].double(), rtol=rtol, atol=1e-6)


# ---- bad input


X, DENSE, Y = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: torchvision.sigmoid_focal_loss(X, DENSE, alpha=1.1), ValueError, r"Invalid alpha.*\[0, 1\].*got 1.1"),
        (lambda: torchvision.sigmoid_focal_loss(X, DENSE, reduction="x"), ValueError, r"Invalid reduction.*got 'x'"),
        (
            lambda: torchvision.sigmoid_focal_loss(X, Y),
            ValueError,
            r"targets must have the shape of inputs, \[2, 3\], got \[2\]",
        ),
        (lambda: torchvision.sigmoid_focal_loss(X, DENSE + 2), IndexError, r"target holds 2"),
        (lambda: transformers.sigmoid_focal_loss(X[0], X[0], 1), IndexError, r"inputs must have the shape \[N, Q, \*\]"),
        (lambda: detectron2.sigmoid_focal_loss(X, DENSE), ValueError, r"gt_classes must have the shape.*\[2\], got \[2, 3\]"),
        (lambda: detectron2.sigmoid_focal_loss(X, Y + 4), IndexError, "target holds 4"),
        (lambda: detectron2.sigmoid_focal_loss(X, Y, reduction="mean", normalizer=2), ValueError, "normalizer divides the sum"),
        (lambda: mmcv.sigmoid_focal_loss(X[0], Y), AssertionError, r"input must have the shape \[N, C\], got \[3\]"),
        (lambda: mmcv.sigmoid_focal_loss(X, Y[:1]), AssertionError, r"target must have the shape \[2\], got \[1\]"),
        (
            lambda: mmcv.softmax_focal_loss(X, Y, weight=X[0, :2]),
            AssertionError,
            r"weight must have the shape \[3\], got \[2\]",
        ),
        (lambda: mmcv.softmax_focal_loss(X, Y, reduction="x"), AssertionError, "reduction must be one of.*got 'x'"),
        (lambda: mmcv.sigmoid_focal_loss(X, Y - 1), IndexError, "target holds -1"),
        (lambda: mmcv.softmax_focal_loss(X, Y + 3), IndexError, "target holds 3"),
        (lambda: apex.focal_loss(X, DENSE, X, 3, 0.25, 2.0), ValueError, r"cls_targets_at_level must have the shape.*\[2\]"),
        (lambda: apex.focal_loss(X, Y, X.sum(), 4, 0.25, 2.0), ValueError, r"num_real_classes must be in \[1, 3\], got 4"),
        (
            lambda: apex.focal_loss(X, Y, X.sum(), 3, 0.25, 2.0, 1.5),
            ValueError,
            r"label_smoothing must be in \[0, 1\], got 1.5",
        ),
        (lambda: apex.focal_loss(X, Y - 3, X.sum(), 3, 0.25, 2.0), IndexError, "holds -3"),
        (lambda: apex.focal_loss(X, Y - 3, X.sum(), 3, 0.25, 2.0, 0.1), IndexError, "holds -3"),
        (lambda: kornia.focal_loss(X, Y, 1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: kornia.focal_loss(X, Y, 0.5, reduction="x"), NotImplementedError, "Invalid reduction mode.*got 'x'"),
        (lambda: kornia.focal_loss(X, Y.int(), 0.5), Exception, "target must hold class indices as int64, got torch.int32"),
        (lambda: monai.FocalLoss(reduction="x"), ValueError, "reduction must be one of.*got 'x'"),
        (lambda: monai.FocalLoss(weight=[1.0, -1.0]), ValueError, r"weight must hold values >= 0, got \[1.0, -1.0\]"),
        (lambda: monai.FocalLoss(alpha=[0.5])(X, DENSE), ValueError, "alpha must have one value for each of 3 classes, got 1"),
        (lambda: monai.FocalLoss()(X, DENSE[:, :1]), ValueError, r"target must have the shape \[2, 3\].*got \[2, 1\]"),
        (lambda: monai.FocalLoss(to_onehot_y=True)(X, DENSE), AssertionError, "target must have one channel"),
        (lambda: smp.FocalLoss("x"), AssertionError, "mode must be one of.*got 'x'"),
        (lambda: smp.FocalLoss("binary", reduction="x"), ValueError, "reduction must be one of.*got 'x'"),
        (lambda: smp.FocalLoss("binary", class_weights=[1.0]), ValueError, "class_weights are not supported"),
        (lambda: smp.FocalLoss("multiclass")(X, DENSE), ValueError, r"y_true must have the shape \[2\], got \[2, 3\]"),
        (lambda: pytorch_toolbelt.BinaryFocalLoss(reduction="x"), ValueError, "reduction must be one of.*got 'x'"),
        (lambda: pytorch_toolbelt.BinaryFocalLoss()(X, Y + 3), RuntimeError, "target holds 3"),
        (lambda: pytorch_toolbelt.focal_loss_with_logits(X, Y), ValueError, r"target must have the shape of output, \[2, 3\]"),
        (lambda: mmdet.FocalLoss(use_sigmoid=False), AssertionError, "use_sigmoid must be True.*got False"),
        (lambda: mmdet.FocalLoss()(X, Y + 4), RuntimeError, "target holds 4"),
        (lambda: mmdet.FocalLoss()(X, Y, X[0]), AssertionError, "weight must hold one factor for each of 2 rows"),
        (lambda: mmdet.FocalLoss(reduction="sum")(X, Y, avg_factor=2), ValueError, "avg_factor can not be used"),
        (lambda: mmseg.FocalLoss(use_sigmoid=False), AssertionError, "use_sigmoid must be True.*got False"),
        (lambda: mmseg.FocalLoss(gamma=2), AssertionError, "gamma must be a float, got 2"),
        (lambda: mmseg.FocalLoss()(X, Y[:1]), AssertionError, "target must have the shape of pred"),
        (lambda: mmseg.FocalLoss(reduction="sum")(X, Y, avg_factor=2), ValueError, "avg_factor can not be used"),
        (lambda: mmseg.FocalLoss()(X, Y + 3), RuntimeError, "target holds 3"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
