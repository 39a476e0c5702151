"""What a target out of range does to the CUDA kernels, which cannot raise an error: run by test_cuda.py, with plugin.py."""

import pytest
import torch
from grid import labels, logits

from veerloss import lovasz_hinge_loss, lovasz_softmax_loss, ops

pytestmark = pytest.mark.skipif(
    ops.NAMESPACES["native"] != "veerloss_emulated", reason="needs -p emulator.plugin: test_cuda.py runs it"
)


@pytest.mark.parametrize("method", ["exact", "histogram"])
@pytest.mark.parametrize("wrong", [-5, 3, 255, 1 << 40])
@pytest.mark.parametrize("alone", [False, True])
def test_target_that_is_no_class_gives_nan(alone, wrong, method):
    """Even where no class has foreground besides."""
    x, target = logits((2, 3, 40)), labels((2, 3, 40), 3)
    if alone:
        target.fill_(-1)
    target[1, 17] = wrong
    for options in ({}, {"classes": "all"}, {"classes": [1]}, {"from_logits": False}, {"per_image": True}):
        leaf = x.clone().requires_grad_()
        loss = lovasz_softmax_loss(leaf, target, ignore_index=-1, method=method, **options)
        loss.backward()
        assert loss.isnan()
    binary = torch.where(target >= 0, target.clamp(max=1), -1)
    binary[1, 17] = 2
    assert lovasz_hinge_loss(x[:, 0], binary, ignore_index=-1, method=method).isnan()


def test_without_gradient_the_loss_is_the_same():
    x, target = logits((2, 3, 5000)), labels((2, 3, 5000), 3)
    with torch.no_grad():
        loss = lovasz_softmax_loss(x, target, method="exact")
    assert torch.equal(loss, lovasz_softmax_loss(x.requires_grad_(), target, method="exact").detach())
