"""What a GPU makes of NaN, of targets that are ignored or out of range, of nothing, and of autocast."""

import math

import pytest
import torch
from gpu_cases import CASES, SMALL, evaluate, inputs, needs_gpu, out_of_range, over_cases, over_focal_backends
from grid import logits

from veerloss import sigmoid_focal_loss

pytestmark = needs_gpu


@over_cases()
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(case, bad):
    x, y = inputs(SMALL)
    x[1, 0, 5, 7] = bad
    assert evaluate(case, x, y)[0].isnan()


@over_cases(but="compound")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_zero_with_zero_gradient(case, reduction):
    x, y = inputs(SMALL)
    x[0, 0, 0, 0] = math.nan  # what is ignored may hold anything
    x.requires_grad_()
    # Dense targets and those of the hinge are made of labels, and 1 stands for each of those here.
    ignored, value = (1, 1) if "hinge" in case else (255, 255)
    if "dense" in case:
        target = torch.full_like(x, 255, requires_grad=False)
        loss = sigmoid_focal_loss(x, target, ignore_index=255, reduction=reduction, **CASES[case].keywords)
    else:
        loss = CASES[case](x, torch.full_like(y, value), ignore_index=ignored, reduction=reduction)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


@over_cases("compound")
def test_all_ignored_is_zero_with_zero_gradient_of_compound_losses(case):
    x, y = inputs(SMALL)
    x[0, 0, 0, 0] = math.nan
    loss, gradient = evaluate(case, x, torch.full_like(y, 255), ignore_index=255)
    assert loss == 0 and (gradient == 0).all()


@over_cases()
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_no_pixels(case, shape):
    x = torch.zeros(shape, device="cuda")
    loss, gradient = evaluate(case, x, torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device="cuda"))
    assert loss == 0 and gradient.shape == x.shape


@over_cases()
@pytest.mark.parametrize("value", [-1, 3, 255, 2**40, -(2**40)])
def test_target_out_of_range(case, value, monkeypatch):
    """NaN, without a word, a synchronisation or a wild access; with VEERLOSS_CHECK=1 an error at the call."""
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    x, call = out_of_range(case, value)
    loss = call()
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, x)
    torch.cuda.synchronize()
    assert gradient.shape == x.shape
    monkeypatch.setenv("VEERLOSS_CHECK", "1")
    with pytest.raises(IndexError, match=f"target holds {value}"):
        call()


@over_focal_backends
@pytest.mark.parametrize("value", [1.5, -0.25])
def test_focal_dense_target_outside_0_1(value, backend, monkeypatch):
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    x = logits(SMALL).cuda()
    target = torch.ones_like(x)
    target[1, 2, 20, 30] = value
    assert sigmoid_focal_loss(x, target, backend=backend).isnan()
    monkeypatch.setenv("VEERLOSS_CHECK", "1")
    with pytest.raises(IndexError, match=f"target holds {value}"):
        sigmoid_focal_loss(x, target, backend=backend)


@over_cases()
def test_autocast_gives_float32(case):
    x, y = inputs(SMALL, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradient = evaluate(case, x, y)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
