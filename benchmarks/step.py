"""A whole training step, network and optimiser too: of the demo's network, with our losses and with the peers'."""

import functools

import torch

from . import peers, throughput, timing
from .inputs import Inputs, Job

TASKS = ("lovasz_softmax", "dice", "softmax_focal")


def measure(inputs: Inputs, quick: bool) -> list[dict]:
    """A row per contestant; "ratio" is a median over that of the first, which is ours."""
    from .digitise.model import UNet

    torch.manual_seed(0)
    images, classes, *size = inputs.shape
    pages = torch.rand(images, 1, *size)
    _, target = inputs.make()
    model = UNet(torch.full((classes,), 1 / classes), tuple(size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(loss: peers.Loss) -> None:
        optimizer.zero_grad()
        loss(model(pages), target).backward()
        optimizer.step()

    losses = {
        name: loss for name, loss in peers.TASKS[inputs.task]().items() if "formula" not in name and "compile" not in name
    }
    steps = {name: functools.partial(step, loss) for name, loss in losses.items()}
    results = timing.interleave(steps, min_rounds=2 if quick else 5, budget=0.0 if quick else 5.0)
    rows = [{"workload": f"step with {inputs}", "contestant": name} | timing.summary(found) for name, found in results.items()]
    throughput.add_ratios(rows, rows[0], "ratio")
    return rows


def jobs(quick: bool) -> list[Job]:
    shape = (2, 3, 64, 96) if quick else (8, 3, 256, 384)
    return [(inputs, functools.partial(measure, inputs, quick)) for inputs in (Inputs(task, shape) for task in TASKS)]
