"""Forward + backward times, as ratios to peers that ran in the same rounds."""

import gc

import torch

from . import peers, timing
from .inputs import Inputs

BF16 = torch.bfloat16
COPY = "copy"


def workloads(quick: bool) -> list[Inputs]:
    """The inputs of the table; `quick` shrinks the images and keeps every case."""
    side = 32 if quick else 512
    c19, c5 = (2, 19, side, side), (2, 5, side, side)
    hinge = (16, side, side)
    return [
        Inputs("lovasz_softmax", c19),
        Inputs("lovasz_softmax", c19, "trained"),
        Inputs("lovasz_softmax", c19, dtype=BF16),
        Inputs("lovasz_softmax", c19, channels_last=True),
        Inputs("lovasz_softmax", c5),
        Inputs("lovasz_softmax", c5, "trained"),
        Inputs("lovasz_hinge", hinge),
        Inputs("lovasz_hinge", hinge, "trained"),
        Inputs("softmax_focal", c19),
        Inputs("softmax_focal", c19, dtype=BF16),
        Inputs("softmax_focal", c19, channels_last=True),
        Inputs("softmax_focal", c5),
        Inputs("sigmoid_focal", c19),
        Inputs("sigmoid_focal", c19, dtype=BF16),
        Inputs("sigmoid_focal", c5),
        Inputs("sigmoid_focal_index", c19),
    ]


def floor_bytes(logits: torch.Tensor, target: torch.Tensor) -> int:
    """Bytes nobody can avoid: logits read twice, their gradient written, targets read twice."""
    return 3 * logits.nbytes + 2 * target.nbytes


def forward_backward(loss: peers.Loss, logits: torch.Tensor, target: torch.Tensor) -> timing.Step:
    """One step of a loss, its gradient in memory of its own."""

    def step() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return step


def steps(inputs: Inputs, *, compiled: bool) -> dict[str, timing.Step]:
    """What is timed, by contestant; ours comes first. Logits and target are shared by all."""
    logits, target = inputs.make()

    losses = peers.TASKS[inputs.task]()
    if not inputs.plain:  # to keep the run short: what the peers ship is timed on every input
        losses = {n: loss for n, loss in losses.items() if "formula" not in n}
    found = {n: forward_backward(x, logits, target) for n, x in losses.items() if compiled or "compile" not in n}
    keys = logits.detach()
    if inputs.task == "lovasz_softmax":
        keys = keys.movedim(1, 0)
    if inputs.task.startswith("lovasz"):
        keys = keys.flatten(1).contiguous()  # [segments, pixels]
        found["torch.sort of as many keys"] = lambda: keys.sort(dim=1, descending=True)
    return found


def measure(inputs: Inputs, *, quick: bool) -> list[dict]:
    """One row per contestant; `ratio` is its median over that of the first one, which is ours.

    The floor is `floor_bytes` at the bandwidth of a copy that ran in the same rounds, so that it
    and the losses saw the same machine.
    """
    # Compiling for every layout would take longer than timing it.
    timed = steps(inputs, compiled=not quick and not inputs.channels_last)
    copied = 1 << 22 if quick else 1 << 28
    timed[COPY] = timing.copy_step(copied)
    least, budget = (2, 0.0) if quick else (5, 4.0) if inputs.plain else (3, 2.0)
    results = timing.interleave(timed, least=least, budget=budget)

    copy_ms = timing.quantiles(results.pop(COPY))["median"]
    floor = copy_ms * floor_bytes(*inputs.make()) / (2 * copied)
    rows = []
    for name, seconds in results.items():
        row = {"workload": str(inputs), "contestant": name, "floor_ms": floor}
        if isinstance(seconds, str):
            row["status"] = seconds
        else:
            times = timing.quantiles(seconds)
            row |= {"status": "ok", "rounds": len(seconds), "copy_gb_s": 2e-6 * copied / copy_ms}
            row |= {f"{key}_ms": value for key, value in times.items()}
            row["floor_share"] = floor / times["median"]
        rows.append(row)
    ours = rows[0].get("median_ms")
    for row in rows:
        if ours and "median_ms" in row:
            row["ratio"] = row["median_ms"] / ours
    return rows


def run(*, quick: bool, only: str, log) -> list[dict]:
    """Rows of `measure` for the workloads whose name contains `only`."""
    rows = []
    for inputs in workloads(quick):
        if only in str(inputs):
            log(f"throughput: {inputs}")
            rows += measure(inputs, quick=quick)
            torch.compiler.reset()  # one shape's compiled code is of no use to the next one
            gc.collect()
    return rows
