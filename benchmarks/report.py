"""The machine, the bars and the tables."""

import datetime
import os
import platform
from pathlib import Path

import torch

import veerloss

from . import peers

# (workload, ours, contestant, least ratio to our time); medians of interleaved rounds.
HISTOGRAM, EXACT, OURS = "veerloss histogram", "veerloss exact", "veerloss"
SPEED_BARS = [
    (f"{task} [2, {c}, 512, 512] float32 random", ours, contestant, least)
    for c in (19, 5)
    for task, ours, contestant, least in (
        ("lovasz_softmax", HISTOGRAM, "torch cross_entropy", 1 / 1.2),
        ("lovasz_softmax", HISTOGRAM, "segmentation-models-pytorch", 40.0),
        ("lovasz_softmax", HISTOGRAM, "Berman's formula", 40.0),
        ("lovasz_softmax", HISTOGRAM, "kornia", 20.0),
        ("lovasz_softmax", EXACT, "segmentation-models-pytorch", 10.0),
        ("lovasz_softmax", EXACT, "Berman's formula", 10.0),
        ("softmax_focal", OURS, "torch cross_entropy", 1.0),
        ("softmax_focal", OURS, "kornia", 2.5),
        ("sigmoid_focal", OURS, "torchvision", 15.0),
        ("sigmoid_focal", OURS, "plain formula", 15.0),
        ("sigmoid_focal", OURS, "torchvision, torch.compile", 1.3),
        ("sigmoid_focal", OURS, "plain formula, torch.compile", 1.3),
    )
]
LOVASZ_ERROR_BARS = {EXACT: 1e-5, HISTOGRAM: 1e-3}  # gradient against float64, 1M pixels per segment
FOCAL_ERROR_BAR = 2.0  # of the float32 reference's own error
MEMORY_BAR = 0.05  # of the logits; focal losses, and histogram from 10^6 pixels up


def machine(command: str, seconds: float) -> dict:
    """What the numbers depend on: processor, threads, versions, date, load of the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {
        "cpu": cpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {
            "veerloss": veerloss.__version__,
            **{name: peers.version(name) for name in ("torch", *peers.PEERS)},
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "seconds": round(seconds),
    }


def bars(results: dict) -> list[dict]:
    """{"bar", "measured", "met"} for every bar whose rows were measured in this run."""
    found = []

    def add(what: str, measured: str, met: bool) -> None:
        found.append({"bar": what, "measured": measured, "met": met})

    speed = {(row["workload"], row["contestant"]): row for row in results.get("throughput", ())}
    for workload, ours, contestant, least in SPEED_BARS:
        row, own_row = speed.get((workload, contestant)), speed.get((workload, ours))
        if row and own_row:
            what = f"{workload}: {contestant} takes >= {least:.3g}x the time of {ours}"
            ratio = row["median_ms"] / own_row["median_ms"] if "median_ms" in row and "median_ms" in own_row else None
            measured = f"{ratio:.2f}x" if ratio else f"no ratio ({row['status']})"
            add(what, measured, ratio is not None and ratio >= least)

    own: dict[str, dict[str, float]] = {}
    for row in results.get("accuracy", ()):
        if row["status"] == "ok":
            value = float("inf") if row["error"] is None else row["error"]  # NaN meets no bar
            own.setdefault(row["workload"], {})[row["contestant"]] = value
    for workload, errors in own.items():
        for name, bar in LOVASZ_ERROR_BARS.items():
            if name in errors:
                add(f"{workload}: gradient error of {name} <= {bar:g}", f"{errors[name]:.1e}", errors[name] <= bar)
        if {"veerloss", "veerloss reference, float32"} <= errors.keys():
            value = errors["veerloss"] / errors["veerloss reference, float32"]
            what = f"{workload}: gradient error <= {FOCAL_ERROR_BAR:g}x float32 reference's"
            add(what, f"{value:.2f}x", value <= FOCAL_ERROR_BAR)

    for row in results.get("memory", ()):
        if row["contestant"] in (OURS, HISTOGRAM) and row["status"] == "ok":
            what = f"{row['workload']}: extra peak memory <= {MEMORY_BAR:g}x the logits"
            add(what, f"{row['extra']:.3f}x", row["extra"] <= MEMORY_BAR)
    return found


def markdown(results: dict) -> str:
    """Everything as Markdown tables."""
    lines = [heading(results["machine"]), ""]
    if "throughput" in results:
        lines += _throughput(results["throughput"])
    if "scaling" in results:
        lines += ["## Lovász-Softmax against the number of pixels, nanoseconds for a logit", ""]
        header = ("inputs", "loss", "ns")
        lines += _table(header, results["scaling"], lambda row: [f"{row['ns']:.1f}"])
    if "accuracy" in results:
        lines += [
            "## Gradient error against float64 (relative, L2)",
            "",
            "The last column is the share of entries that come out as exactly 0 and should not.",
            "",
        ]
        header = ("inputs", "loss", "error", "lost to 0")
        lines += _table(header, results["accuracy"], _accuracy_cells)
    if "memory" in results:
        lines += ["## Extra peak memory beyond the gradient, in multiples of the logits", ""]
        header = ("inputs", "loss", "extra")
        lines += _table(header, results["memory"], lambda row: [f"{max(row['extra'], 0.0):.2f}x"])
    return "\n".join([*lines, *bar_table(results["bars"])])


def heading(about: dict) -> str:
    """What was measured where, in a paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['cpu']} ({about['simd']}), {about['cores']} cores, {about['threads']} threads, "
        f"load {about['load_average_1min']} at the start. {versions}, Python {about['python']}. "
        f"{about['date']}, {about['seconds']} s, `{about['command']}`."
    )


def bar_table(bars: list[dict]) -> list[str]:
    if not bars:
        return []
    header = ("bar", "measured", "met")
    rows = [(b["bar"], b["measured"], "yes" if b["met"] else "**no**") for b in bars]
    return ["## Bars", "", line(header), line(["---"] * 3), *(line(row) for row in rows), ""]


def _throughput(rows: list[dict]) -> list[str]:
    copies = [row["copy_gb_s"] for row in rows if "copy_gb_s" in row] or [0.0]
    return [
        "## Forward + backward",
        "",
        "Milliseconds, median (20th to 80th percentile) of interleaved rounds, and that median "
        "over ours. The floor is two reads and one write of the logits and two reads of the "
        "targets, at the bandwidth (read + written) of a `copy_` in the same rounds, "
        f"{min(copies):.0f} to {max(copies):.0f} GB/s. The copy's memory is mapped already; a "
        "gradient's pages are not.",
        "",
        *_table(
            ("inputs", "loss", "ms", "ratio to ours", "floor, ms", "share of floor"),
            rows,
            lambda row: [
                f"{row['median_ms']:.2f} ({row['p20_ms']:.2f} to {row['p80_ms']:.2f})",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                f"{row['floor_ms']:.2f}",
                f"{100 * row['floor_share']:.0f}%",
            ],
        ),
    ]


def _accuracy_cells(row: dict) -> list[str]:
    error = "NaN" if row["error"] is None else f"{row['error']:.1e}"
    return [error, f"{100 * row['lost']:.2g}%"]


def _table(header: tuple[str, ...], rows: list[dict], cells) -> list[str]:
    lines = [line(header), line(["---"] * len(header))]
    before = None
    for row in rows:
        name = row["workload"] if row["workload"] != before else ""
        before = row["workload"]
        rest = cells(row) if row["status"] == "ok" else [row["status"]]
        rest += [""] * (len(header) - 2 - len(rest))
        lines.append(line([name, row["contestant"], *rest]))
    return [*lines, ""]


def line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
