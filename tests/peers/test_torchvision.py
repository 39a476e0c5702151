"""veerloss.compat.torchvision: the focal losses beside the installed peer's."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops as peer
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, logits_of, reductions, run, seeds, shapes, soft_of

from veerloss.compat.torchvision import sigmoid_focal_loss


@given(shape=shapes, seed=seeds, alpha=alphas | st.just(-1), gamma=gammas, reduction=reductions, soft=st.booleans())
def test_values_and_gradients(shape, seed, alpha, gamma, reduction, soft):
    target = (soft_of if soft else hard_of)(shape, seed)
    agree(sigmoid_focal_loss, peer.sigmoid_focal_loss, logits_of(shape, seed), target, alpha, gamma, reduction)


@given(shape=shapes, seed=seeds, gamma=gammas, reduction=reductions)
def test_targets_that_require_a_gradient(shape, seed, gamma, reduction):
    def gradients(loss):
        x, t = logits_of(shape, seed).requires_grad_(), soft_of(shape, seed).requires_grad_()
        return torch.autograd.grad(loss(x, t, 0.25, gamma, reduction).sum(), (x, t))

    torch.testing.assert_close(gradients(sigmoid_focal_loss), gradients(peer.sigmoid_focal_loss))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half])
def test_scripted(dtype, reduction):
    x, t = logits_of((3, 5), 0).to(dtype), soft_of((3, 5), 0).to(dtype)
    scripted = torch.jit.script(sigmoid_focal_loss)
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if dtype == torch.half else {}
    torch.testing.assert_close(scripted(x, t, reduction=reduction), sigmoid_focal_loss(x, t, reduction=reduction), **tolerance)
    with pytest.raises(torch.jit.Error, match="Invalid reduction"):
        scripted(x, t, reduction="some")


def test_gradcheck():
    x, t = logits_of((3, 4), 0).requires_grad_(), soft_of((3, 4), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, t.detach()), x)
    assert torch.autograd.gradcheck(sigmoid_focal_loss, (x, t))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"alpha": 1.5}, "alpha"), ({"alpha": -2}, "alpha"), ({"reduction": "some"}, "reduction")],
)
def test_both_refuse(options, match):
    x = torch.zeros(2, 3)
    for loss in (peer.sigmoid_focal_loss, sigmoid_focal_loss):
        with pytest.raises(ValueError, match=f"Invalid.*{match}"):
            loss(x, x, **options)


def test_both_refuse_another_shape():
    for loss in (peer.sigmoid_focal_loss, sigmoid_focal_loss):
        with pytest.raises(ValueError):
            loss(torch.zeros(2, 3), torch.zeros(3))


# ---- where torchvision is wrong


def test_gamma_below_1_is_nan_there():
    x, t = torch.tensor([200.0, -200.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    assert run(peer.sigmoid_focal_loss, x, t, gamma=0.5)[1].isnan().any()
    assert run(sigmoid_focal_loss, x, t, gamma=0.5)[1].isfinite().all()


def test_integer_targets_are_refused_there():
    x, t = logits_of((2, 3), 0), torch.tensor([[0, 1, 1], [1, 0, 0]])
    for target in (t, t.bool()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            peer.sigmoid_focal_loss(x, target)
        torch.testing.assert_close(sigmoid_focal_loss(x, target), peer.sigmoid_focal_loss(x, t.double()))


def test_no_elements_are_nan_there():
    x = torch.zeros(0, 3)
    assert peer.sigmoid_focal_loss(x, x, reduction="mean").isnan()
    assert sigmoid_focal_loss(x, x, reduction="mean") == 0


def test_gamma_0_is_cross_entropy():
    x, t = logits_of((5, 2), 1), hard_of((5, 2), 1)
    expected = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    torch.testing.assert_close(sigmoid_focal_loss(x, t, alpha=-1, gamma=0), expected)
