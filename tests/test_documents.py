"""The code of the README and of docs/ runs; of docs/which-loss.md every call is a loss."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import veerloss
from benchmarks.peers import declare_torchvision_operators

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "which-loss.md").read_text(encoding="utf-8")
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


# ---- the README, and other pages


#: Blocks of code by page and number. Recipes for models of other libraries are tested with these: tests/peers.
PAGES = [
    pytest.param(block, id=f"{path.name}-{k}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name not in ("which-loss.md", "coming-from.md")
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
    if "model." not in block and "FCNHead" not in block and "backbone(" not in block
]


@pytest.mark.parametrize("block", PAGES)
def test_code_of_pages(block, names):
    import torch.distributed as dist

    patched = re.findall(r"^veerloss\.patch\(\"(\w+)\"\)", block, re.MULTILINE)
    for peer in patched:
        if importlib.util.find_spec(peer) is None:
            pytest.skip(f"needs {peer}")
        if peer == "torchvision":
            declare_torchvision_operators()
    generator = torch.Generator().manual_seed(1)
    labels = names["target"].clone()
    labels[0, :2] = 255
    low = torch.randn(2, 4, 4, 4, generator=generator, requires_grad=True)
    public = {name: getattr(veerloss, name) for name in veerloss.__all__}
    names |= public | {"F": torch.nn.functional, "labels": labels, "low_logits": low, "outputs": [low, names["logits"]]}
    if "logits, size=" in block or ("upsample=" in block and "low_logits" not in block):
        names["logits"], names["target"] = low, labels
    if "outputs" in block:
        names["labels"] = names["target"].clamp(max=3)
    if "group" in block:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        names |= {"group": dist.group.WORLD, "target": names["target"]}
    try:
        exec(block, names)
    finally:
        for peer in patched:
            veerloss.unpatch(peer)
        if "group" in block:
            dist.destroy_process_group()
    if "loss" in names:
        names["loss"].mean().backward()


def test_pages_have_code():
    assert len(PAGES) >= 6
