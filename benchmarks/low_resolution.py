"""`python -m benchmarks.low_resolution`: losses with `upsample` beside F.interpolate and a loss, and a loss at full size."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import veerloss

from . import memory, report, throughput, timing

RESULTS = Path(__file__).parent / "results" / "low-resolution"
#: Logits, and the size of the target.
SHAPES = [
    ((2, 19, 128, 128), (512, 512)),
    ((2, 150, 128, 128), (512, 512)),
    ((2, 5, 64, 64), (512, 512)),
    ((1, 19, 97, 161), (389, 645)),
]
LOSSES = {
    "cross-entropy": functools.partial(veerloss.softmax_focal_loss, gamma=0.0),
    "softmax focal": veerloss.softmax_focal_loss,
    "Lovász histogram": functools.partial(veerloss.lovasz_softmax_loss, method="histogram"),
    "Dice": veerloss.dice_loss,
    "focal + Lovász + Dice": functools.partial(veerloss.compound_loss, focal=1.0, lovasz=1.0, dice=1.0, method="histogram"),
}
UPSAMPLE, INTERPOLATED, FULL, TORCH = (
    "upsample=",
    "interpolate + ours",
    "ours at full size",
    "interpolate + torch cross_entropy",
)
#: (loss, contestant, least ratio to our time)
BARS = [
    *((loss, *bar) for loss in ("cross-entropy", "softmax focal") for bar in ((INTERPOLATED, 8.0), (FULL, 2.0))),
    *(("Lovász histogram", *bar) for bar in ((FULL, 1.0), (INTERPOLATED, 2.0))),
]  # fmt: skip
MEMORY_BAR = 0.1  # of the logits at full size


def inputs(shape, size) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).requires_grad_()
    return logits, torch.randint(shape[1], (shape[0], *size), generator=generator)


def interpolated(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, size=target.shape[1:], mode="bilinear")


def contestants(name: str) -> dict:
    loss = LOSSES[name]
    found = {
        UPSAMPLE: lambda x, y: loss(x, y, upsample="bilinear"),
        INTERPOLATED: lambda x, y: loss(interpolated(x, y), y),
    }
    if name == "cross-entropy":
        found[TORCH] = lambda x, y: F.cross_entropy(interpolated(x, y), y)
    return found


def measure(shape, size, seconds: float) -> list[dict]:
    """Of all losses in the same rounds."""
    logits, target = inputs(shape, size)
    full = interpolated(logits.detach(), target).requires_grad_()
    steps = {}
    for name, loss in LOSSES.items():
        for contestant, of_low in contestants(name).items():
            steps[name, contestant] = throughput.forward_backward(of_low, logits, target)
        steps[name, FULL] = throughput.forward_backward(loss, full, target)
    times = timing.interleave(steps, min_rounds=3, budget=seconds)
    ours = {name: timing.summary(times[name, UPSAMPLE]) for name in LOSSES}
    return [
        {"workload": f"{list(shape)} to {list(size)}", "loss": name, "contestant": contestant, **timing.summary(seconds)}
        | {"ratio": timing.summary(seconds)["median_ms"] / ours[name]["median_ms"]}
        for (name, contestant), seconds in times.items()
    ]


def extra(name: str, contestant: str, index: int) -> float:
    """Peak beyond logits and gradient over the bytes of the logits at full size, in this process."""
    shape, size = SHAPES[index]
    make = functools.partial(inputs, shape, size)
    low = memory.extra_peak(contestants(name)[contestant], functools.partial(inputs, (1, shape[1], 8, 8), (32, 32)), make)
    return low * shape[2] * shape[3] / (size[0] * size[1])


def measure_memory(index: int) -> list[dict]:
    rows = []
    for name in LOSSES:
        for contestant in contestants(name):
            arguments = [sys.executable, "-m", "benchmarks.low_resolution", "--memory", name, contestant, str(index)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)
            shape, size = SHAPES[index]
            row = {"workload": f"{list(shape)} to {list(size)}", "loss": name, "contestant": contestant}
            rows.append(row | {"extra": json.loads(done.stdout)})
    return rows


def bars(results: dict) -> list[dict]:
    found = []
    for loss, contestant, least in BARS:
        of = [(r["ratio"], r["workload"]) for r in results["times"] if (r["loss"], r["contestant"]) == (loss, contestant)]
        found.append(report.worst(f"{loss}: {contestant} at least {least:g}x", of, least, "{:.2f}x", at_least=True))
    medians = {(r["workload"], r["loss"]): r["median_ms"] for r in results["times"] if r["contestant"] == UPSAMPLE}
    of = [(ms / medians[w, "Lovász histogram"], w) for (w, loss), ms in medians.items() if loss == "focal + Lovász + Dice"]
    found.append(report.worst("focal + Lovász + Dice: at most 1.2x of Lovász", of, 1.2, "{:.2f}x", at_least=False))
    of = [(r["extra"], f"{r['loss']}, {r['workload']}") for r in results["memory"] if r["contestant"] == UPSAMPLE]
    found.append(report.worst("extra memory at most 0.1x the logits at full size", of, MEMORY_BAR, "{:.2f}x", at_least=False))
    return found


def markdown(results: dict) -> str:
    lines = [report.heading(results["machine"]), "", "Forward + backward, medians of interleaved rounds.", ""]
    lines += ["| logits, target | loss | with | ms (20th to 80th percentile) | over ours |", "|---|---|---|---|---|"]
    for r in results["times"]:
        ms = f"{r['median_ms']:.1f} ({r['p20_ms']:.1f} to {r['p80_ms']:.1f})"
        lines.append(f"| {r['workload']} | {r['loss']} | {r['contestant']} | {ms} | {r['ratio']:.2f}x |")
    lines += ["", "Peak memory beyond the logits and their gradient, in multiples of the logits at full size.", ""]
    lines += ["| logits, target | loss | with | extra |", "|---|---|---|---|"]
    lines += [f"| {r['workload']} | {r['loss']} | {r['contestant']} | {r['extra']:.2f}x |" for r in results["memory"]]
    return "\n".join([*lines, "", *report.bar_table(results["bars"])])


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser("benchmarks.low_resolution", __doc__)
    parser.add_argument("--quick", action="store_true", help="one round of the smallest: does everything run?")
    parser.add_argument("--memory", nargs=3, metavar=("LOSS", "CONTESTANT", "INDEX"), help="of one, in this process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(memory.THREADS)
    if options.memory:
        print(json.dumps(extra(*options.memory[:2], int(options.memory[2]))))
        return 0
    start = time.perf_counter()
    results: dict = {"machine": report.machine("benchmarks.low_resolution", arguments), "times": [], "memory": []}
    for index, (shape, size) in enumerate(SHAPES[3:] if options.quick else SHAPES):
        report.log(f"{list(shape)} to {list(size)}")
        results["times"] += measure(shape, size, 0.0 if options.quick else 12.0)
        if not options.quick and index < 2:
            results["memory"] += measure_memory(index)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = bars(results)
    report.save(results, markdown(results), options.output or (None if options.quick else RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
