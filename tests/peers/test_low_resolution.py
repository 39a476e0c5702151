"""Models that upsample their logits for the loss alone: the same training with the loss of the logits as they are."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import veerloss
from benchmarks import low_resolution_models

STEPS = 30


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return found


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=40, hidden_dropout_prob=0.0,
        drop_path_rate=0.0, classifier_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config).train()


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 40, (2, 8, 8), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :5] = 255
    return torch.randn(2, 3, 64, 64, generator=generator) + 0.1 * labels[:, None], labels


def train(model: nn.Module) -> tuple[list[float], int]:
    """(the curve, bytes of the largest tensor of the last step)"""
    x, labels = pictures()
    # Adam takes steps of one size wherever a gradient is not 0, and so makes much of rounding: 2e-3 after 27 steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    curve, largest = [], Largest()
    for step in range(STEPS):
        optimizer.zero_grad()
        if step < STEPS - 1:
            loss = model(pixel_values=x, labels=labels).loss
            loss.backward()
        else:
            with largest:
                loss = model(pixel_values=x, labels=labels).loss
                loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve, largest.nbytes


def test_segformer_trains_alike():
    expected, at_full_size = train(segformer())
    with veerloss.patch("transformers") as names:
        assert any(name.endswith("SegformerForSemanticSegmentation.forward") for name in names)
        found, largest = train(segformer())
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-3)
    # The logits of all pixels are the largest tensor there, and none of their size is here.
    assert at_full_size == 4 * 2 * 40 * 64 * 64 and largest < at_full_size / 4


def test_segformer_is_as_it_was_but_for_training():
    x, labels = pictures()
    original = SegformerForSemanticSegmentation.forward

    def outputs():
        model = segformer()  # whose batch normalisation remembers what it has seen
        return model.eval()(pixel_values=x, labels=labels), model.train()(pixel_values=x), model(x, labels)

    with veerloss.patch("transformers"):
        assert SegformerForSemanticSegmentation.forward is not original
        found = outputs()
    assert SegformerForSemanticSegmentation.forward is original
    for ours, theirs in zip(found, expected := outputs(), strict=True):
        assert [*ours] == [*theirs]
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
    assert torch.equal(found[0].loss, expected[0].loss) and found[1].loss is None
    torch.testing.assert_close(found[2].loss, expected[2].loss)


@pytest.mark.parametrize("name", low_resolution_models.MODELS)
def test_recipes_of_the_documentation(name):
    """Loss and gradient of a step, before and after."""
    results = []
    for after in (False, True):
        torch.manual_seed(0)
        model, *steps = low_resolution_models.MODELS[name]()
        images, labels = low_resolution_models.inputs(64)
        torch.manual_seed(1)  # of dropout
        loss = steps[after](model.train(), images, labels)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert (results[1][1] - results[0][1]).norm() <= 1e-3 * results[0][1].norm()
