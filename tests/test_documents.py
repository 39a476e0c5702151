"""The snippets of docs/which-loss.md."""

import re
from pathlib import Path

import pytest
import torch

import veerloss

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "which-loss.md").read_text(encoding="utf-8")
TABLE = [line for line in TEXT.splitlines() if line.startswith("| ")][1:]
#: Every piece of code in a row of the table that is a whole call, and the blocks.
CALLS = [code for line in TABLE for code in re.findall(r"`([a-z.]+\w*\(.*?\))`", line) if "..." not in code]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def names():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (2, 16, 16), generator=generator)
    logits = torch.randn(2, 4, 16, 16, generator=generator, requires_grad=True)
    binary = torch.randn(2, 1, 16, 16, generator=generator, requires_grad=True)
    return {
        "veerloss": veerloss, "torch": torch, "logits": logits, "target": target, "C": 4, "binary_logits": binary,
        "mask": (target[:, None] > 1).float(), "class_weights": torch.tensor([0.2, 1.0, 1.0, 2.0]),
        "distance": torch.ones(2, 16, 16),
    }  # fmt: skip


def is_a_loss(value, names):
    value = value.mean()
    gradients = torch.autograd.grad(value, [names["logits"], names["binary_logits"]], allow_unused=True)
    assert value.isfinite() and any(g is not None and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("call", CALLS)
def test_calls(call, names):
    if call.startswith("monai"):
        pytest.importorskip("monai")
        import monai.losses

        names["monai"] = monai
    is_a_loss(eval(call, names), names)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block, names):
    names["numpy"] = pytest.importorskip("numpy")
    pytest.importorskip("scipy")
    exec(block, names)
    is_a_loss(names["loss"], names)


def test_every_row_has_code():
    assert len(TABLE) == 19 and all("`" in line or "see below" in line or "as for" in line for line in TABLE)
    assert len(CALLS) >= 16 and len(BLOCKS) == 2
