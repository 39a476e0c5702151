"""The Lovász losses of veerloss.compat but Berman's file (test_compat_lovasz.py), against his formula in float64."""

import importlib
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import evaluate
from grid import labels, logits
from test_compat_focal import FullSize
from test_compat_lovasz import assert_is, hinge_formula, softmax_formula

from veerloss.compat import (
    kornia,
    lovasz_losses,
    mmdet,
    mmdet3d,
    mmseg,
    pointcept,
    pytorch_toolbelt,
    segmentation_models_pytorch,
    torchsparse,
)

SHAPE = (3, 5, 6, 7)
X, Y = logits(SHAPE), labels(SHAPE, 4, ignore_index=255)  # class 4 is absent
VALID = labels(SHAPE, 4)
B = labels((3, 2, 6, 7), 2, ignore_index=255)


def points(x):
    """[N, C, *] as [P, C]."""
    return x.movedim(1, -1).reshape(-1, x.size(1))


def whole(x, y=Y, classes="present", ignore=255):
    return softmax_formula(points(x.softmax(1)), y.flatten(), classes, ignore)


def by_image(x, y=Y, classes="present", ignore=255):
    return torch.stack([whole(x[i : i + 1], y[i : i + 1], classes, ignore) for i in range(len(x))])


def hinge_by_image(x, y=B):
    return torch.stack([hinge_formula(x[i], y[i], 255) for i in range(len(x))])


def test_smp():
    loss = segmentation_models_pytorch.LovaszLoss
    assert_is(lambda x: loss("multiclass", ignore_index=255)(x, Y), whole, X)
    assert_is(lambda x: loss("multiclass", True, 255)(x, Y), lambda x: by_image(x).mean(), X)
    assert_is(lambda x: loss("multiclass")(x, VALID.float()), lambda x: whole(x, VALID, ignore=None), X)
    assert_is(lambda x: loss("multiclass")(x.flatten(2), VALID.flatten(1)), lambda x: whole(x, VALID, ignore=None), X)
    for x in (X[:, 0], X[:, :1]):
        assert_is(lambda x: loss("binary", ignore_index=255)(x, B), lambda x: hinge_formula(x, B, 255), x)
    assert_is(lambda x: loss("binary", True, 255)(x, B), lambda x: hinge_by_image(x).mean(), X[:, 0])
    target = labels((3, 2, 5, 6, 7), 2)
    assert_is(lambda x: loss("multilabel")(x, target.float()), lambda x: hinge_formula(x, target), X)
    assert_is(lambda x: loss("multilabel", True)(x, target), lambda x: hinge_by_image(x, target).mean(), X)
    with pytest.raises(AssertionError, match="mode must be one of"):
        loss("multi")


def test_smp_takes_from_logits_at_its_word():
    """SMP does not look at it, and applies a softmax to probabilities."""
    loss = segmentation_models_pytorch.LovaszLoss
    found = loss("multiclass", from_logits=False)(X.softmax(1), VALID)
    torch.testing.assert_close(found, loss("multiclass")(X, VALID))
    found = loss("binary", ignore_index=255, from_logits=False)(X[:, 0].sigmoid(), B)
    torch.testing.assert_close(found, loss("binary", ignore_index=255)(X[:, 0], B))


@pytest.mark.parametrize("weight", [None, [0.2, 1.0, 3.0, 0.0, 0.5]], ids=["", "weighted"])
def test_kornia_softmax(weight):
    w = None if weight is None else torch.tensor(weight)

    def formula(x):
        factors = torch.ones(5) if w is None else w
        each = [[whole(x[i : i + 1], VALID[i : i + 1], [c], None) * factors[c] for c in range(5)] for i in range(3)]
        return torch.stack([torch.stack(row) for row in each]).mean()

    assert_is(lambda x: kornia.lovasz_softmax_loss(x, VALID, w), formula, X)
    assert_is(lambda x: kornia.LovaszSoftmaxLoss(w)(x, VALID.int()), formula, X)
    assert_is(lambda x: kornia.lovasz_softmax_loss(x[:1], VALID, w), lambda x: formula(x[:1].expand(3, -1, -1, -1)), X)
    if w is not None:
        w.requires_grad_()
        torch.testing.assert_close(kornia.lovasz_softmax_loss(X, VALID, w), kornia.lovasz_softmax_loss(X, VALID, w.detach()))
        (gradient,) = torch.autograd.grad(kornia.lovasz_softmax_loss(X, VALID, w), w)
        each = torch.stack([sum(whole(X[i : i + 1], VALID[i : i + 1], [c], None) for i in range(3)) for c in range(5)])
        torch.testing.assert_close(gradient.double(), each / 15, rtol=1e-5, atol=0)


def test_kornia_hinge():
    target = B.clamp(max=1)
    for y in (target, target.float(), target.bool()):
        assert_is(lambda x, y=y: kornia.lovasz_hinge_loss(x, y), lambda x: hinge_by_image(x, target).mean(), X[:, :1])
    assert_is(lambda x: kornia.LovaszHingeLoss()(x, target), lambda x: hinge_by_image(x, target).mean(), X[:, :1])


def test_kornia_errors(monkeypatch):
    """Of a process that has not imported kornia, whose own they are otherwise."""
    monkeypatch.delitem(sys.modules, "kornia.core.exceptions", raising=False)
    for function, x, y in ((kornia.lovasz_softmax_loss, X, VALID), (kornia.lovasz_hinge_loss, X[:, :1], B.clamp(max=1))):
        for bad_x, bad_y in ((x[0, 0], y), (x, y[0]), (x[..., 1:], y), (x[1:], y[:1])):
            with pytest.raises(ValueError, match="must"):
                function(bad_x, bad_y)
        with pytest.raises(ValueError, match="same device"):
            function(x, y.to("meta"))
    with pytest.raises(ValueError, match="C > 1"):
        kornia.lovasz_softmax_loss(X[:, :1], VALID)
    with pytest.raises(ValueError, match=r"weight must have the shape \[5\]"):
        kornia.lovasz_softmax_loss(X, VALID, torch.ones(4))
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        kornia.lovasz_softmax_loss(X, VALID, [1.0] * 5)
    with pytest.raises(RuntimeError, match="target holds 7"):
        kornia.lovasz_softmax_loss(X, VALID + 7)
    with pytest.raises(IndexError, match="target holds -100"):
        kornia.lovasz_hinge_loss(X[:, :1], -100 * B.clamp(max=1))


def test_toolbelt():
    def formula(p, y=Y):
        return softmax_formula(points(p), y.flatten(), "present", 255)

    def of_images(p):
        return sum(formula(p[i : i + 1], Y[i : i + 1]) for i in range(3)) / 3

    assert_is(lambda p: pytorch_toolbelt.LovaszLoss(ignore=255)(p, Y), formula, X.softmax(1))
    assert_is(lambda p: pytorch_toolbelt.LovaszLoss(True, 255)(p, Y), of_images, X.softmax(1))
    for ignored in (255, 255.0):
        binary = pytorch_toolbelt.BinaryLovaszLoss(ignore_index=ignored)
        assert_is(lambda x, loss=binary: loss(x, B), lambda x: hinge_formula(x, B, 255), X[:, 0])
    assert_is(lambda x: pytorch_toolbelt.BinaryLovaszLoss(True, 255)(x, B), lambda x: hinge_by_image(x).mean(), X[:, 0])
    halves = B.where(B != 255, 0.5)
    loss = pytorch_toolbelt.BinaryLovaszLoss(ignore_index=0.5)
    assert_is(lambda x: loss(x, halves), lambda x: hinge_formula(x, B, 255), X[:, 0])


@pytest.mark.parametrize("module", [mmseg, mmdet3d])
def test_mm(module, tmp_path):
    loss, weight = module.LovaszLoss, [0.2, 1.0, 3.0, 0.0, 0.5]
    assert_is(lambda x: loss()(x, Y), whole, X)
    assert_is(lambda x: loss(classes="all", loss_weight=0.4)(x, Y), lambda x: 0.4 * whole(x, classes="all"), X)
    assert_is(lambda x: loss(classes=[0, 4])(x, Y), lambda x: whole(x, classes=[0, 4]), X)
    assert_is(lambda x: loss()(points(x), Y.flatten()), whole, X)  # of a point cloud
    per_image = loss(per_image=True)
    assert_is(lambda x: per_image(x, Y), lambda x: by_image(x).mean(), X)
    assert_is(lambda x: per_image(x, Y, avg_factor=4.0), lambda x: by_image(x).sum() / 4, X)
    assert_is(lambda x: per_image(x, Y, reduction_override="sum"), lambda x: by_image(x).sum(), X)
    assert_is(lambda x: loss(per_image=True, reduction="none")(x, Y), by_image, X)
    assert_is(lambda x: per_image(x, VALID, ignore_index=-1), lambda x: by_image(x, VALID, ignore=None).mean(), X)

    def weighted(x):
        return sum(weight[c] * whole(x, classes=[c]) for c in range(4)) / 4

    np.save(tmp_path / "weight.npy", weight)
    (tmp_path / "weight.json").write_text(json.dumps(weight))
    for given in (weight, str(tmp_path / "weight.npy"), str(tmp_path / "weight.json")):
        assert_is(lambda x, w=given: loss(class_weight=w)(x, Y), weighted, X)
    assert_is(lambda x: loss("binary")(x, B), lambda x: hinge_formula(x, B, 255), X[:, 0])
    assert_is(lambda x: loss("binary", per_image=True)(x, B), lambda x: hinge_by_image(x).mean(), X[:, :1])
    assert loss(loss_name="loss_x").loss_name == "loss_x" and loss().loss_name == "loss_lovasz"
    if module is mmseg:
        with pytest.warns(UserWarning, match="weight is not used"):
            loss()(X, Y, torch.ones(3, 6, 7))
    else:  # its third argument is another
        assert_is(lambda x: per_image(x, Y, 4.0), lambda x: by_image(x).sum() / 4, X)
    for bad in ({"loss_type": "multi"}, {"classes": "some"}, {"classes": [0.5]}, {"reduction": "avg"}):
        with pytest.raises(AssertionError, match=next(iter(bad))):
            loss(**bad)
    with pytest.raises(AssertionError, match="reduction_override"):
        loss()(X, Y, reduction_override="avg")
    with pytest.raises(ValueError, match="avg_factor can not be used"):
        per_image(X, Y, avg_factor=2.0, reduction_override="sum")
    with pytest.raises(ValueError, match="class_weight must be a list"):
        loss(class_weight="weights.pkl")


def test_pointcept():
    x, y = points(X), Y.flatten()
    half = pointcept.LovaszLoss("multiclass", ignore_index=255, loss_weight=0.5)
    assert_is(lambda x: half(x, y), lambda x: 0.5 * softmax_formula(x.softmax(1), y, "present", 255), x)
    for seen, present in (([0, 2, 4], [0, 2]), ((1, 1, 30), [1])):
        found = pointcept.LovaszLoss("multiclass", seen, ignore_index=255)(x, y)
        torch.testing.assert_close(found.double(), whole(X, classes=present), rtol=1e-5, atol=0)
    loss, gradient = evaluate(pointcept.LovaszLoss("multiclass", [4], ignore_index=255), x, y)
    assert loss == 0 and (gradient == 0).all()
    assert_is(
        lambda x: pointcept.LovaszLoss("binary", ignore_index=255)(x, B.flatten()), lambda x: hinge_formula(x, B, 255), x[:, 0]
    )
    target = labels((x.size(0), 2, 5), 2)
    assert_is(lambda x: pointcept.LovaszLoss("multilabel")(x, target), lambda x: hinge_formula(x, target), x)
    assert_is(lambda x: pointcept.LovaszLoss("multiclass", None, True, 255)(x, Y), lambda x: by_image(x).mean(), X)
    with pytest.raises(AssertionError, match="mode must be one of"):
        pointcept.LovaszLoss("multi")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_torchsparse(weighted):
    x, y = points(X), Y.flatten()
    weight = torch.tensor([0.2, 1.0, 3.0, 0.1, 0.5]) if weighted else None

    def formula(x):
        factors = None if weight is None else weight.double()
        return softmax_formula(x.softmax(1), y, "present", 255) + F.cross_entropy(x, y, factors, ignore_index=255)

    assert_is(lambda x: torchsparse.MixLovaszCrossEntropy(weight, 255)(x, y), formula, x)
    loss, gradient = evaluate(torchsparse.MixLovaszCrossEntropy(weight, 255), x, torch.full_like(y, 255))
    assert loss == 0 and (gradient == 0).all()
    assert torchsparse.MixLovaszCrossEntropy(weight)(x, torch.full_like(y, -100)) == 0


#: The losses that flatten before they compare shapes, for an ignore_index: (multiclass, binary).
FLATTENING = {
    "smp": lambda i: [segmentation_models_pytorch.LovaszLoss(m, ignore_index=i) for m in ("multiclass", "binary")],
    "toolbelt": lambda i: [pytorch_toolbelt.LovaszLoss(ignore=i), pytorch_toolbelt.BinaryLovaszLoss(ignore_index=i)],
    "pointcept": lambda i: [pointcept.LovaszLoss(m, ignore_index=i) for m in ("multiclass", "binary")],
    "mmseg": lambda i: [lambda x, y, m=m: mmseg.LovaszLoss(m)(x, y, ignore_index=i) for m in ("multi_class", "binary")],
    "mmdet3d": lambda i: [lambda x, y, m=m: mmdet3d.LovaszLoss(m)(x, y, ignore_index=i) for m in ("multi_class", "binary")],
}


@pytest.mark.parametrize("peer", FLATTENING)
def test_targets_of_another_shape(peer):
    multiclass, binary = FLATTENING[peer](255)
    for y in (Y.unsqueeze(1), Y.flatten(), Y.float()):
        assert multiclass(X, y) == multiclass(X, Y)
    for x, y in ((X[:, :1], B), (X[:, 0], B.unsqueeze(1)), (X[:, 0], B.flatten()), (X[:, 0].flatten(), B)):
        torch.testing.assert_close(binary(x, y), binary(X[:, 0], B))


@pytest.mark.parametrize("peer", FLATTENING)
def test_the_errors_that_flattening_ends_in(peer):
    for ignore, error in ((None, RuntimeError), (255, IndexError)):
        multiclass, binary = FLATTENING[peer](ignore)
        for loss, x, y in ((multiclass, X, VALID[1:]), (binary, X[:, 0], VALID[1:]), (binary, X, VALID)):
            with pytest.raises(error, match="the target must have as many elements as"):
                loss(x, y)
        for x in (X[:, :1], X[:, 0]):
            with pytest.raises(ValueError, match=r"multiclass logits must have the shape \[N, C, \*\] with C > 1"):
                multiclass(x, VALID)


@pytest.mark.parametrize("peer", FLATTENING)
def test_the_loss_of_half_precision_is_float32(peer):
    """As there, where it does not fail."""
    multiclass, binary = FLATTENING[peer](255)
    for loss, x, y in ((multiclass, X.softmax(1).half(), Y), (binary, X[:, 0].half(), B)):
        found = loss(x, y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(x.float(), y))


def test_pointcept_class_seen():
    seen = pointcept.LovaszLoss("multiclass", [0, 2], per_image=True, ignore_index=255)  # Pointcept forgets it here
    assert_is(lambda x: seen(x, Y), lambda x: by_image(x, classes=[0, 2]).mean(), X)
    assert all((Y[i] == c).any() for i in range(3) for c in (0, 2))
    with pytest.raises(ValueError, match=r"class_seen must hold a class in \[0, 5\), got \[-1, 30\]"):
        pointcept.LovaszLoss("multiclass", [-1, 30], ignore_index=255)(X, Y)


def test_points_are_one_image():
    """In the peers each of them is one."""
    cloud, of_cloud, binary = points(X), Y.flatten(), B.flatten()
    for module in (segmentation_models_pytorch, pointcept):
        for mode, x, y in (("multiclass", cloud, of_cloud), ("binary", cloud[:, 0], binary)):
            one, each = (module.LovaszLoss(mode, per_image=per_image, ignore_index=255) for per_image in (False, True))
            assert one(x, y) == each(x, y)


class Registry:
    """As of OpenMMLab."""

    def __init__(self, names):
        self.modules = dict.fromkeys(names)  # its own losses

    def register_module(self, name=None, force=False, module=None):
        assert force or name not in self.modules
        self.modules[name] = module


@pytest.mark.parametrize(
    ("module", "path", "name", "losses"),
    [
        (mmseg, "mmseg.registry", "MODELS", ["LovaszLoss", "FocalLoss"]),
        (mmdet3d, "mmdet3d.registry", "MODELS", ["LovaszLoss"]),
        (mmdet, "mmdet.registry", "MODELS", ["FocalLoss"]),
        (pointcept, "pointcept.models.losses.builder", "LOSSES", ["LovaszLoss"]),
    ],
)
def test_registries(module, path, name, losses, monkeypatch):
    with pytest.raises(ImportError, match=rf"register\(\) needs {path}, which cannot be imported"):
        module.register()
    registry, parts = Registry(losses), path.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(parts[i - 1]))
    setattr(sys.modules[path], name, registry)
    module.register()
    assert registry.modules == {loss: getattr(module, loss) for loss in losses}
    assert importlib.import_module(path) is sys.modules[path]


def common_calls():
    """By name the common call of each loss: (loss, logits or probabilities, target)."""
    p, y = X.softmax(1), Y
    cloud, of_cloud = points(X).contiguous(), Y.flatten()
    return {
        "lovasz_losses": (lambda p, y: lovasz_losses.lovasz_softmax(p, y, ignore=255), p, y),
        "lovasz_losses, points": (lambda p, y: lovasz_losses.lovasz_softmax(p, y, ignore=255), cloud.softmax(1), of_cloud),
        "lovasz_losses, flat": (lovasz_losses.lovasz_softmax_flat, cloud.softmax(1), VALID.flatten()),
        "lovasz_losses, hinge": (lambda x, y: lovasz_losses.lovasz_hinge(x, y, ignore=255), X[:, 0], B),
        "lovasz_losses, hinge flat": (lovasz_losses.lovasz_hinge_flat, X[:, 0].flatten(), B.flatten().clamp(max=1)),
        "smp": (segmentation_models_pytorch.LovaszLoss("multiclass", ignore_index=255), X, y),
        "smp binary": (segmentation_models_pytorch.LovaszLoss("binary", ignore_index=255), X[:, :1], B),
        "smp multilabel": (segmentation_models_pytorch.LovaszLoss("multilabel"), X, (X > 0).long()),
        "kornia": (kornia.lovasz_softmax_loss, X, VALID),
        "kornia hinge": (kornia.lovasz_hinge_loss, X[:, :1], B.clamp(max=1)),
        "toolbelt": (pytorch_toolbelt.LovaszLoss(ignore=255), p, y),
        "toolbelt binary": (pytorch_toolbelt.BinaryLovaszLoss(ignore_index=255), X[:, 0], B),
        "mmseg": (mmseg.LovaszLoss(class_weight=[1.0, 2.0, 3.0, 4.0, 5.0]), X, y),
        "mmseg per image": (mmseg.LovaszLoss(per_image=True), X, y),
        "mmdet3d": (mmdet3d.LovaszLoss(), cloud, of_cloud),
        "pointcept": (pointcept.LovaszLoss("multiclass", [0, 2], ignore_index=255), cloud, of_cloud),
    }


def test_labels_of_a_sigmoid_map_are_copied_as_bytes():
    p, target = X[:, 0].sigmoid().requires_grad_(), B
    with FullSize(p.numel()) as made:
        lovasz_losses.lovasz_softmax(p, target, [1], ignore=255).backward()
    copies = [operator for operator in made.found if operator.startswith("aten")]
    assert copies == ["aten.ne.Scalar", "aten.eq.Scalar", "aten.masked_fill.Scalar"]  # bool, bool, uint8


@pytest.mark.parametrize("name", common_calls())
def test_no_one_hot_and_no_temporary(name):
    """The sorted weights, which the histogram method has not, and the gradient are all that is as large as the logits."""
    loss, x, target = common_calls()[name]
    x = x.detach().requires_grad_()
    with FullSize(x.numel() // 2) as made:
        loss(x, target).backward()
    assert [operator.split(".")[1] for operator in made.found] == ["lovasz_exact_forward", "lovasz_exact_backward"]
