"""Forward + backward of Lovász-Softmax against the number of pixels: what is linear and what is not."""

from pathlib import Path

from . import peers, timing
from .inputs import Inputs
from .throughput import forward_backward

CONTESTANTS = ("veerloss histogram", "veerloss exact", "torch cross_entropy", "Berman's formula")
CLASSES = 5


def sides(quick: bool) -> list[int]:
    """10^4 to 10^7 pixels, square."""
    return [32, 64] if quick else [100, 316, 1000, 3162]


def run(*, quick: bool, only: str, log) -> list[dict]:
    """Rows {"workload", "contestant", "status", "pixels", "median_ms", "ns"}: nanoseconds for each logit."""
    rows = []
    for side in sides(quick):
        inputs = Inputs("lovasz_softmax", (1, CLASSES, side, side))
        if only not in str(inputs):
            continue
        log(f"scaling: {inputs}")
        logits, target = inputs.make()
        losses = peers.TASKS[inputs.task]()
        steps = {name: forward_backward(losses[name], logits, target) for name in CONTESTANTS}
        for name, seconds in timing.interleave(steps, least=2 if quick else 3, budget=0.0 if quick else 2.0).items():
            row = {"workload": str(inputs), "contestant": name, "pixels": side * side, "status": "ok"}
            if isinstance(seconds, str):
                row["status"] = seconds
            else:
                row["median_ms"] = timing.quantiles(seconds)["median"]
                row["ns"] = 1e6 * row["median_ms"] / logits.numel()
            rows.append(row)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Time for a logit against pixels; a method that is linear in the pixels is a level line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in CONTESTANTS:
        points = [(row["pixels"], row["ns"]) for row in rows if row["contestant"] == name and "ns" in row]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set_xlabel(f"pixels ({CLASSES} classes, float32)")
    axes.set_ylabel("nanoseconds for a logit, forward + backward")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=90)
