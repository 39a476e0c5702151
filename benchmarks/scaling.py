"""Forward + backward of Lovász-Softmax against the number of pixels: what is linear and what is not."""

import functools
from pathlib import Path

from . import peers, throughput
from .inputs import Inputs, Job

CONTESTANTS = (peers.HISTOGRAM, peers.EXACT, peers.CROSS_ENTROPY, peers.BERMAN)
CLASSES = 5


def sides(quick: bool) -> list[int]:
    """10^4 to 10^7 pixels, square."""
    return [32, 64] if quick else [100, 316, 1000, 3162]


def measure(inputs: Inputs, quick: bool) -> list[dict]:
    """Rows of throughput.measure with "pixels" and "ns", nanoseconds for each logit."""
    logits, target = inputs.make()
    losses = peers.TASKS[inputs.task]()
    steps = {name: throughput.forward_backward(losses[name], logits, target) for name in CONTESTANTS}
    rows, _ = throughput.measure(inputs, steps, min_rounds=2 if quick else 3, budget=0.0 if quick else 2.0)
    for row in rows:
        row["pixels"] = target.numel()
        if row["status"] == "ok":
            row["ns"] = 1e6 * row["median_ms"] / logits.numel()
    return rows


def jobs(quick: bool) -> list[Job]:
    workloads = [Inputs("lovasz_softmax", (1, CLASSES, side, side)) for side in sides(quick)]
    return [(inputs, functools.partial(measure, inputs, quick)) for inputs in workloads]


def plot(rows: list[dict], path: Path) -> None:
    """Time for a logit against pixels; a method that is linear in the pixels is a level line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in CONTESTANTS:
        points = [(row["pixels"], row["ns"]) for row in rows if row["contestant"] == name and "ns" in row]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set_xlabel(f"pixels ({CLASSES} classes, float32)")
    axes.set_ylabel("nanoseconds for a logit, forward + backward")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=90)
