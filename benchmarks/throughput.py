"""Forward + backward times, as ratios to peers that ran in the same rounds."""

import functools

import torch

from . import peers, timing
from .inputs import Inputs, Job

BF16 = torch.bfloat16
COPY = "copy"
#: Seconds for the rounds of all workloads, besides the least number of rounds; None: 4 of a plain input, 2 of another.
BUDGET: float | None = None


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
        Inputs("dice", c19),
        Inputs("dice", c19, dtype=BF16),
        Inputs("dice", c5),
        Inputs("dice_cross_entropy", c19),
        Inputs("dice_cross_entropy", c5),
        Inputs("compound", c19),
        Inputs("compound", c5),
        # What some users have: small images, the points of a cloud, the anchors of a detector.
        *(Inputs(task, (2, 4, side // 8, side // 8)) for task in ("lovasz_softmax", "softmax_focal", "dice", "compound")),
        Inputs("lovasz_softmax", (side * side if quick else 200_000, 20)),
        Inputs("sigmoid_focal", (8, 91, side * side if quick else 76_725)),
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


def measure(
    inputs: Inputs, steps: dict[str, timing.Step], *, moved: int = 0, copied: int = 0, device="cpu", **rounds
) -> tuple[list[dict], dict]:
    """(a row per contestant, a row of the copy), timed by timing.interleave with the options `rounds`.

    The floor is the time that `moved` bytes take at the bandwidth of a copy of `copied` bytes, if any, that runs in the same
    rounds, so that it and the losses see the same machine.
    """
    if copied:
        steps[COPY] = timing.copy_step(copied, device)
    results = timing.interleave(steps, **rounds)
    copy = {"contestant": COPY} | timing.summary(results.pop(COPY, "not timed"))
    found = [{"workload": str(inputs), "contestant": name} | timing.summary(seconds) for name, seconds in results.items()]
    if copy["status"] == "ok":
        copy["gb_s"] = 2e-6 * copied / copy["median_ms"]
        for row in found:
            row["floor_ms"] = 1e-6 * moved / copy["gb_s"]
            if row["status"] == "ok":
                row |= {"copy_gb_s": copy["gb_s"], "floor_share": row["floor_ms"] / row["median_ms"]}
    return found, copy


def add_ratios(found: list[dict], ours: dict, key: str) -> None:
    """Every median over that of ours."""
    for row in found:
        if "median_ms" in row and "median_ms" in ours:
            row[key] = row["median_ms"] / ours["median_ms"]


def steps(inputs: Inputs, logits: torch.Tensor, target: torch.Tensor, *, compiled: bool) -> dict[str, timing.Step]:
    """What is timed, by contestant; ours comes first."""
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


def measure_workload(inputs: Inputs, quick: bool) -> list[dict]:
    """Rows of `measure`; "ratio" is a median over that of the first contestant, which is ours."""
    logits, target = inputs.make()
    # Compiling for every layout would take longer than timing it.
    timed = steps(inputs, logits, target, compiled=not quick and not inputs.channels_last)
    min_rounds, budget = (2, 0.0) if quick else (5, 4.0) if inputs.plain else (3, 2.0)
    if BUDGET is not None:
        budget *= BUDGET / sum(4.0 if other.plain else 2.0 for other in workloads(quick))
    moved, copied = floor_bytes(logits, target), 1 << 22 if quick else 1 << 28
    rows, _ = measure(inputs, timed, moved=moved, copied=copied, min_rounds=min_rounds, budget=budget)
    add_ratios(rows, rows[0], "ratio")
    return rows


def jobs(quick: bool) -> list[Job]:
    return [(inputs, functools.partial(measure_workload, inputs, quick)) for inputs in workloads(quick)]
