"""veerloss.compat.transformers: the focal losses beside the installed peer's."""

import pytest
import torch
import transformers.loss.loss_for_object_detection as peer
from hypothesis import given
from hypothesis import strategies as st
from parity import agree, alphas, gammas, hard_of, logits_of, run, seeds, shapes, soft_of

from veerloss.compat.transformers import sigmoid_focal_loss


@given(
    shape=shapes,
    seed=seeds,
    num_boxes=st.sampled_from([1, 7, 2.5, "tensor", "vector"]),
    alpha=alphas | st.just(-1),
    gamma=gammas,
    soft=st.booleans(),
)
def test_values_and_gradients(shape, seed, num_boxes, alpha, gamma, soft):
    num_boxes = {"tensor": torch.tensor(3.0), "vector": torch.tensor([3.0])}.get(num_boxes, num_boxes)
    target = (soft_of if soft else hard_of)(shape, seed)
    agree(sigmoid_focal_loss, peer.sigmoid_focal_loss, logits_of(shape, seed), target, num_boxes, alpha, gamma)


def test_both_refuse():
    for loss in (peer.sigmoid_focal_loss, sigmoid_focal_loss):
        with pytest.raises(ValueError):
            loss(torch.zeros(2, 3), torch.zeros(3), 1)
        with pytest.raises(IndexError):
            loss(torch.zeros(3), torch.zeros(3), 1)


def test_gamma_below_1_is_nan_there():
    x, t = torch.tensor([[200.0, -200.0, 0.5]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert run(peer.sigmoid_focal_loss, x, t, 1, gamma=0.5)[1].isnan().any()
    assert run(sigmoid_focal_loss, x, t, 1, gamma=0.5)[1].isfinite().all()


def test_no_queries_are_nan_there():
    x = torch.zeros(2, 0, 5)
    assert peer.sigmoid_focal_loss(x, x, 1).isnan()
    assert sigmoid_focal_loss(x, x, 1) == 0
