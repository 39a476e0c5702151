"""`python -m benchmarks.figures`: the figures in README.md and docs/ from benchmarks/results; `make figures`.

A block of Markdown between `<!-- figures: name -->` and `<!-- end -->` is what the function of that name below makes of the
results. tests/test_figures.py fails where a document disagrees with them, or where they are of other kernels (report.kernels).
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import report
from .peers import CROSS_ENTROPY, EXACT, HISTOGRAM, MONAI, OURS, SMP

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PICTURE = ROOT / "docs" / "speed-and-accuracy.png"
BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
#: By the results that they are made of.
SOURCES = ("cpu", "accuracy", "low-resolution", "low-resolution-models")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(name: str) -> str:
    about = results(name)["machine"]
    return f"{about['cpu']} ({about['simd']}), {about['threads']} threads, torch {about['versions']['torch'].partition('+')[0]}"


def times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 9.95 else f"{ratio:.0f}x"


# ------------------------------------------------------------------ blocks

#: (what a row is called, the task of throughput and memory, what ours is called, peers)
LOSSES = [
    ("Lovász-Softmax", "lovasz_softmax", HISTOGRAM, (SMP, "kornia", CROSS_ENTROPY)),
    ("the same, sorted", "lovasz_softmax", EXACT, (SMP, "kornia")),
    ("Lovász hinge", "lovasz_hinge", EXACT, (SMP, "kornia")),
    ("Dice", "dice", OURS, (SMP, MONAI)),
    ("Dice + cross-entropy", "dice_cross_entropy", OURS, (MONAI,)),
    ("softmax focal", "softmax_focal", OURS, ("kornia", CROSS_ENTROPY)),
    ("sigmoid focal", "sigmoid_focal", OURS, ("torchvision", "torchvision, torch.compile")),
]


def _rows(part: str, task: str, shape: str) -> dict[str, dict]:
    """By contestant, of float32 random logits."""
    name = f"{task} {shape} float32 random"
    return {row["contestant"]: row for row in results("cpu")[part] if row["workload"] == name and row["status"] == "ok"}


def _shape(task: str, classes: int) -> str:
    return "[16, 512, 512]" if task == "lovasz_hinge" else f"[2, {classes}, 512, 512]"


def _memory(task: str) -> dict[str, float]:
    return {
        row["contestant"]: max(row["extra"], 0.0)
        for row in results("cpu")["memory"]
        if row["workload"].startswith(f"{task} [") and row["status"] == "ok"
    }


def _speed(classes: int) -> list[list[str]]:
    lines = []
    for name, task, ours, others in LOSSES:
        found, memory = _rows("throughput", task, _shape(task, classes)), _memory(task)
        if ours not in found or (task == "lovasz_hinge" and classes != 19):
            continue
        for k, other in enumerate(o for o in others if o in found):
            ratio = found[other]["median_ms"] / found[ours]["median_ms"]
            extra = f"{memory[other]:.1f}x" if other in memory else ""
            first = [f"{name} {_shape(task, classes)}", f"{found[ours]['median_ms']:.1f} ms", f"{memory.get(ours, 0):.2f}x"]
            lines.append([*(first if k == 0 else ["", "", ""]), other, times(ratio), extra])
    return lines


HEADER = ("loss, logits", "ours", "memory", "peer", "takes", "memory")


def speed() -> list[str]:
    return [
        f"Forward + backward on {where('cpu')}; medians of interleaved rounds, and peak memory beyond the gradient",
        "in multiples of the logits, by `make bench` ([all rows](benchmarks/results/cpu.md), [more](docs/performance.md)).",
        "",
        *report.table(HEADER, _speed(19)),
    ]


def speed_of_few() -> list[str]:
    return [f"On {where('cpu')}:", "", *report.table(HEADER, _speed(5))]


def _slower() -> list[list[str]]:
    """Where a peer wins, of all that is timed: the rows of a table."""
    by_workload: dict[str, dict[str, float]] = {}
    for row in results("cpu")["throughput"]:
        if row["status"] == "ok":
            by_workload.setdefault(row["workload"], {})[row["contestant"]] = row["median_ms"]
    lines = []
    for workload, found in by_workload.items():
        own = next((ms for name, ms in found.items() if name in (OURS, HISTOGRAM)), 0.0)
        for other, ms in found.items():
            if not other.startswith(("veerloss", "torch.sort")) and ms < own:
                lines.append([workload, other, times(ms / own), _reason(workload, other)])
    return lines


def _reason(workload: str, peer: str) -> str:
    if peer == CROSS_ENTROPY:
        return "another loss, without bins or sums"
    return "small images: ours costs a call, bins or sums whatever the size" if "64, 64]" in workload else ""


SLOWER_HEADER = ("logits", "faster than ours", "takes", "why")


def slower() -> list[str]:
    return report.table(SLOWER_HEADER, _slower())


def slower_than_peers() -> list[str]:
    lines = [line for line in _slower() if line[1] != CROSS_ENTROPY]
    return report.table(SLOWER_HEADER, lines) if lines else ["Nobody computes the same loss faster in any row."]


def errors() -> list[str]:
    """Of the Lovász losses, a million pixels in each segment."""
    by_workload: dict[str, dict[str, str]] = {}
    for row in results("cpu")["accuracy"]:
        if row["status"] == "ok" and row["workload"].startswith("lovasz") and "float64" not in row["contestant"]:
            by_workload.setdefault(row["workload"], {})[row["contestant"]] = f"{row['error']:.1e}"
    names = (HISTOGRAM, EXACT, SMP, "kornia")
    lines = [[workload, *(found.get(name, "") for name in names)] for workload, found in by_workload.items()]
    return report.table(("logits", *names), lines)


def low_resolution() -> list[str]:
    rows = results("low-resolution")["times"]
    contestants = ("interpolate + ours", "interpolate + torch cross_entropy", "ours at full size")
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["workload"], row["loss"]), {})[row["contestant"]] = row
    lines = [
        [
            workload,
            loss,
            f"{of['upsample=']['median_ms']:.1f} ms",
            *(times(of[c]["ratio"]) if c in of else "" for c in contestants),
        ]
        for (workload, loss), of in found.items()
    ]
    return [
        f"On {where('low-resolution')}, by `python -m benchmarks.low_resolution`",
        "([all rows, memory, and the bars that are missed](../benchmarks/results/low-resolution.md)): how many times longer",
        "the other way takes.",
        "",
        *report.table(("logits, target", "loss", "`upsample=`", *contestants), lines),
    ]


def low_resolution_models() -> list[str]:
    lines = [
        [row["model"]]
        + [
            f"{row[when][key]:.0f} {unit}"
            for key, unit in (("median_ms", "ms"), ("peak_mb", "MB"))
            for when in ("before", "after")
        ]
        for row in results("low-resolution-models")["rows"]
    ]
    return [
        f"On {where('low-resolution-models')}, by `python -m benchmarks.low_resolution_models`:",
        "",
        *report.table(("model", "step before", "after", "peak memory before", "after"), lines),
    ]


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "speed": speed,
    "speed-of-few": speed_of_few,
    "slower": slower,
    "slower-than-peers": slower_than_peers,
    "errors": errors,
    "low-resolution": low_resolution,
    "low-resolution-models": low_resolution_models,
}


def filled(text: str) -> str:
    """A document with its figures."""
    return BLOCK.sub(lambda found: found[1] + "\n".join(BLOCKS[found[2]]()).rstrip() + "\n" + found[3], text)


# ------------------------------------------------------------------ the picture


def picture(path: Path) -> None:
    """How much longer peers take, and the error of the gradient against the pixels of a segment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    names, ratios, colours = [], [], []
    for name, task, ours, others in LOSSES:
        found = _rows("throughput", task, _shape(task, 19))
        for other in others:
            if ours in found and other in found and other != CROSS_ENTROPY:
                names.append(f"{name}: {other}")
                ratios.append(found[other]["median_ms"] / found[ours]["median_ms"])
                colours.append("tab:grey" if "compile" in other else "tab:blue")
    left.barh(names, ratios, color=colours)
    left.invert_yaxis()
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=0.8)
    for k, ratio in enumerate(ratios):
        left.text(ratio * 1.05, k, times(ratio), va="center", fontsize=8)
    left.set_xlim(0.8, 2.5 * max(ratios))
    left.tick_params(axis="y", labelsize=8)
    left.set_title("time of the peer, over ours (19 classes, 512 x 512, CPU)", fontsize=9)

    worst: dict[str, dict[int, float]] = {}
    for row in results("accuracy")["rows"]:
        points = worst.setdefault(row["contestant"], {})
        points[row["pixels"]] = max(points.get(row["pixels"], 0.0), row["l2"])
    for name, points in worst.items():
        style = "-" if name in ("histogram", "exact") else "--"
        right.loglog(*zip(*sorted(points.items()), strict=True), f"o{style}", markersize=3, label=name)
    right.set_xlabel("pixels of a segment", fontsize=8)
    right.set_title("Lovász gradient: worst error against float64", fontsize=9)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"figures: {path.relative_to(ROOT)}")
    picture(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
