"""veerloss.compat.fvcore: the focal losses beside the installed peer's."""

import fvcore.nn as peer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, logits_of, reductions, run, seeds, shapes, soft_of

from veerloss.compat import fvcore

NAMES = ["sigmoid_focal_loss", "sigmoid_focal_loss_jit", "sigmoid_focal_loss_star", "sigmoid_focal_loss_star_jit"]
over_names = pytest.mark.parametrize("name", NAMES)
# fvcore computes in float32, whatever the logits are.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}


def pair(name):
    return getattr(fvcore, name), getattr(peer, name)


@over_names
@given(shape=shapes, seed=seeds, alpha=alphas | st.just(-1), gamma=gammas, reduction=reductions, soft=st.booleans())
def test_values_and_gradients(name, shape, seed, alpha, gamma, reduction, soft):
    target = (soft_of if soft else hard_of)(shape, seed)
    gamma = gamma or 1.0 if "star" in name else gamma  # FL* divides by gamma
    for dtype in (torch.float32, torch.float64):
        agree(*pair(name), logits_of(shape, seed).to(dtype), target, alpha, gamma, reduction, **FLOAT32)


@over_names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_float32(name, dtype):
    x, t = logits_of((4, 5), 0).to(dtype), hard_of((4, 5), 0).to(dtype)
    for reduction in ("none", "mean", "sum"):
        (value, gradient), (expected, _) = (run(loss, x, t, reduction=reduction) for loss in pair(name))
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@over_names
def test_integer_targets(name):
    x, t = logits_of((4, 5), 0), hard_of((4, 5), 0)
    for target in (t.long(), t.bool(), t.to(torch.uint8)):
        ours, theirs = pair(name)
        torch.testing.assert_close(ours(x, target), theirs(x, target), **FLOAT32)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@over_names
def test_scripted(name):
    x, t = logits_of((3, 5), 0), soft_of((3, 5), 0)
    ours, _ = pair(name)
    torch.testing.assert_close(torch.jit.script(ours)(x, t, 0.25, 2.0, "mean"), ours(x, t, 0.25, 2.0, "mean"))


@over_names
def test_targets_that_require_a_gradient(name):
    def gradients(loss):
        x, t = logits_of((3, 4), 0).requires_grad_(), soft_of((3, 4), 0).requires_grad_()
        return torch.autograd.grad(loss(x, t, 0.25, 2.0, "sum"), (x, t))

    ours, theirs = pair(name)
    torch.testing.assert_close(gradients(ours), gradients(theirs), **FLOAT32)


# ---- where fvcore is wrong


def test_gamma_below_1_is_nan_there():
    x, t = torch.tensor([200.0, -200.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    ours, theirs = pair("sigmoid_focal_loss")
    assert run(theirs, x, t, gamma=0.5)[1].isnan().any()
    assert run(ours, x, t, gamma=0.5)[1].isfinite().all()


@over_names
def test_an_unknown_reduction_is_none_there(name):
    ours, theirs = pair(name)
    x = torch.zeros(2, 3)
    assert theirs(x, x, reduction="average").shape == x.shape
    with pytest.raises(ValueError, match=r"Invalid reduction.*'average'"):
        ours(x, x, reduction="average")


def test_no_elements_are_nan_there():
    ours, theirs = pair("sigmoid_focal_loss")
    x = torch.zeros(0, 3)
    assert theirs(x, x, reduction="mean").isnan() and ours(x, x, reduction="mean") == 0


@over_names
def test_another_shape_is_refused(name):
    ours, theirs = pair(name)
    if "star" not in name:  # fvcore's broadcasts
        with pytest.raises(torch.jit.Error if "jit" in name else ValueError, match="Target size"):
            theirs(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"targets must have the shape of inputs, \[2, 3\], got \[3\]"):
        ours(torch.zeros(2, 3), torch.zeros(3))
