"""The references are the specification: their derivatives are right, to second order where the loss has one."""

import pytest
import torch
from grid import labels
from torch.autograd import gradcheck, gradgradcheck

from veerloss import reference


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("kind", ["hard", "soft", "index"])
def test_sigmoid_focal(kind, gamma):
    x = double(2, 3, 4)
    target = {
        "hard": torch.randint(0, 2, (2, 3, 4)),
        "soft": torch.rand(2, 3, 4, dtype=torch.float64),
        "index": labels((2, 3, 4), 3, ignore_index=-1),
    }[kind]
    loss = lambda x: reference.sigmoid_focal_loss(x, target, alpha=0.25, gamma=gamma, ignore_index=-1)  # noqa: E731
    assert gradcheck(loss, x)
    assert gradgradcheck(loss, x)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_softmax_focal(kind, smoothing, gamma):
    x, target = double(2, 3, 5), labels((2, 3, 5), 3, ignore_index=-100)
    alpha, weight = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    if kind == "probabilities":
        target = torch.rand(2, 3, 5, dtype=torch.float64)
    options = {"alpha": alpha, "gamma": gamma, "weight": weight, "label_smoothing": smoothing}
    loss = lambda x: reference.softmax_focal_loss(x, target, **options)  # noqa: E731
    assert gradcheck(loss, x)
    assert gradgradcheck(loss, x)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("classes", ["present", "all", [0, 2]], ids=str)
def test_lovasz_softmax(classes, per_image):
    x, target = double(2, 3, 6), labels((2, 3, 6), 2, ignore_index=-1)
    assert gradcheck(
        lambda x: reference.lovasz_softmax_loss(x, target, classes=classes, per_image=per_image, ignore_index=-1)[0], x
    )
    p = x.softmax(1).detach().requires_grad_()
    assert gradcheck(lambda p: reference.lovasz_softmax_loss(p, target, ignore_index=-1, from_logits=False)[0], p)


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_hinge(per_image):
    x, target = double(2, 9), labels((2, 2, 9), 2, ignore_index=255)
    assert gradcheck(lambda x: reference.lovasz_hinge_loss(x, target, per_image=per_image, ignore_index=255)[0], x)
