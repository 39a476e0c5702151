"""What every benchmark reports alike: the machine, bars, tables, files; and the tables of `python -m benchmarks`."""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch.utils import collect_env

import veerloss

from . import peers
from .peers import BERMAN, CROSS_ENTROPY, EXACT, HISTOGRAM, LOVASZ_ALONE, MONAI, ONE_BY_ONE, OURS, SMP

Style = str | Callable[[dict], str]  # a cell of a row: a format of its values, or a function of it

# (workload, ours, contestant, least ratio to our time); medians of interleaved rounds.
SPEED_BARS = [
    (f"{task} [2, {c}, 512, 512] float32 random", ours, contestant, least)
    for c in (19, 5)
    for task, ours, contestant, least in (
        ("lovasz_softmax", HISTOGRAM, CROSS_ENTROPY, 1 / 1.2),
        ("lovasz_softmax", HISTOGRAM, SMP, 40.0),
        ("lovasz_softmax", HISTOGRAM, BERMAN, 40.0),
        ("lovasz_softmax", HISTOGRAM, "kornia", 20.0),
        ("lovasz_softmax", EXACT, SMP, 10.0),
        ("lovasz_softmax", EXACT, BERMAN, 10.0),
        ("softmax_focal", OURS, CROSS_ENTROPY, 1.0),
        ("softmax_focal", OURS, "kornia", 2.5),
        ("sigmoid_focal", OURS, "torchvision", 15.0),
        ("sigmoid_focal", OURS, "plain formula", 15.0),
        ("sigmoid_focal", OURS, "torchvision, torch.compile", 1.3),
        ("sigmoid_focal", OURS, "plain formula, torch.compile", 1.3),
        ("dice", OURS, CROSS_ENTROPY, 1 / 0.8),
        ("dice", OURS, MONAI, 5.0),
        ("dice", OURS, SMP, 5.0),
        ("dice_cross_entropy", OURS, MONAI, 5.0),
        ("compound", OURS, LOVASZ_ALONE, 1 / 1.2),
        ("compound", OURS, ONE_BY_ONE, 1.7),
    )
]
LOVASZ_ERROR_BARS = {EXACT: 1e-5, HISTOGRAM: 1e-3}  # gradient against float64, 1M pixels per segment
FOCAL_ERROR_BAR = 2.0  # of the float32 reference's own error
MEMORY_BAR = 0.05  # of the logits; focal losses, and histogram from 10^6 pixels up


# ------------------------------------------------------------------ shared by all


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parser(module: str, doc: str) -> argparse.ArgumentParser:
    """Of `python -m module`, with the options that all have."""
    warnings.filterwarnings("ignore", module=r"(kornia|timm|torchvision|torch)\b")
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n")[0])
    found.add_argument("--filter", default="", help="only inputs whose name contains this text")
    found.add_argument("--output", type=Path, help="path without suffix; a partial run writes nothing without it")
    return found


def kernels() -> str:
    """What the CPU's kernels are, but for comments and white space: a result says which it measured."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted((*root.glob("csrc/*.h"), *root.glob("csrc/math/*"), *root.glob("csrc/cpu/**/*"))):
        if path.is_file():
            digest.update("".join(re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8")).split()).encode())
    return digest.hexdigest()[:12]


def machine(module: str, arguments: list[str] | None, device: torch.device | str = "cpu") -> dict:
    """What the numbers of `python -m module` depend on: processors, threads, versions, date, load of the machine."""
    gpu = {}
    if torch.device(device).type == "cuda":
        gpu = {
            "gpu": torch.cuda.get_device_name(device),
            "driver": collect_env.get_nvidia_driver_version(collect_env.run),
            "cuda": torch.version.cuda,
            "triton": peers.version("triton"),
        }
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: *(.+)", info.read_text() if info.exists() else "", re.MULTILINE)
    return gpu | {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {"veerloss": veerloss.__version__, **{name: peers.version(name) for name in ("torch", *peers.PEERS)}},
        "kernels": kernels(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
        "seconds": 0,
    }


def heading(about: dict) -> str:
    """What was measured where, in a paragraph."""
    gpu = "{gpu}, driver {driver}, CUDA {cuda}, Triton {triton}; ".format(**about) if "gpu" in about else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{gpu}{about['cpu']} ({about['simd']}), {about['cores']} cores, {about['threads']} threads, "
        f"load {about['load_average_1min']} at the start. {versions}, Python {about['python']}. "
        f"{about['date']}, {about['seconds']} s, `{about['command']}`."
    )


def save(results: dict, text: str, output: Path | None) -> None:
    """Prints the text; writes `output`.json and .md."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        output.with_name(f"{output.name}.md").write_text(text)
    print(text)


def bar(what: str, value: float, limit: float, style: str, *, at_least: bool = False, where: str = "") -> dict:
    met = value >= limit if at_least else value <= limit
    return {"bar": what, "measured": style.format(value) + where, "met": met}


def worst(what: str, values: Collection[tuple[float, str]], limit: float, style: str, *, at_least: bool = False) -> dict:
    """The bar of the worst of (value, where it was measured); `met` is None where there is nothing."""
    if not values:
        return {"bar": what, "measured": "not measured", "met": None}
    value, where = (min if at_least else max)(values, key=lambda pair: pair[0])
    return bar(what, value, limit, style, at_least=at_least, where=f" ({where})")


def bar_table(bars: list[dict]) -> list[str]:
    met = {True: "yes", False: "**no**", None: ""}
    rows = [(b["bar"], b["measured"], met[b["met"]]) for b in bars]
    return ["## Bars", "", *table(("bar", "measured", "met"), rows)] if bars else []


def table(header: Collection[str], rows: list[Sequence[str]]) -> list[str]:
    """Lines of Markdown; cells that a row lacks at its end are empty."""
    padded = ([*row, *[""] * (len(header) - len(row))] for row in rows)
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *padded)] + [""]


def cells(row: dict, styles: Collection[Style]) -> list[str]:
    """What a row has for each column, empty where it has no such value."""

    def cell(style: Style) -> str:
        try:
            return style(row) if callable(style) else style.format(**row)
        except KeyError:
            return ""

    return [cell(style) for style in styles]


def percent_lost(row: dict) -> str:
    return f"{100 * row['lost']:.2g}%"


def loss_table(columns: dict[str, Style], rows: list[dict]) -> list[str]:
    """A line per workload and contestant, or the status of what did not run."""
    lines, before = [], None
    for row in rows:
        name = row["workload"] if row["workload"] != before else ""
        before = row["workload"]
        found = cells(row, columns.values()) if row["status"] == "ok" else [row["status"]]
        lines.append([name, row["contestant"], *found])
    return table(("inputs", "loss", *columns), lines)


# ------------------------------------------------------------------ of `python -m benchmarks`


def bars(results: dict) -> list[dict]:
    """{"bar", "measured", "met"} for every bar whose rows were measured in this run."""
    found = []
    speed = {(row["workload"], row["contestant"]): row for row in results.get("throughput", ())}
    for workload, ours, contestant, least in SPEED_BARS:
        row, own_row = speed.get((workload, contestant)), speed.get((workload, ours))
        if row and own_row:
            what = f"{workload}: {contestant} takes >= {least:.3g}x the time of {ours}"
            if "median_ms" in row and "median_ms" in own_row:
                found.append(bar(what, row["median_ms"] / own_row["median_ms"], least, "{:.2f}x", at_least=True))
            else:
                found.append({"bar": what, "measured": f"no ratio ({row['status']})", "met": False})

    own: dict[str, dict[str, float]] = {}
    for row in results.get("accuracy", ()):
        if row["status"] == "ok":
            value = float("inf") if row["error"] is None else row["error"]  # NaN meets no bar
            own.setdefault(row["workload"], {})[row["contestant"]] = value
    for workload, errors in own.items():
        for name, limit in LOVASZ_ERROR_BARS.items():
            if name in errors:
                found.append(bar(f"{workload}: gradient error of {name} <= {limit:g}", errors[name], limit, "{:.1e}"))
        if {OURS, "veerloss reference, float32"} <= errors.keys():
            what = f"{workload}: gradient error <= {FOCAL_ERROR_BAR:g}x float32 reference's"
            found.append(bar(what, errors[OURS] / errors["veerloss reference, float32"], FOCAL_ERROR_BAR, "{:.2f}x"))

    for row in results.get("memory", ()):
        if row["contestant"] in (OURS, HISTOGRAM) and row["status"] == "ok":
            what = f"{row['workload']}: extra peak memory <= {MEMORY_BAR:g}x the logits"
            found.append(bar(what, row["extra"], MEMORY_BAR, "{:.3f}x"))
    return found


TIME_TEXT = """## Forward + backward

Milliseconds, median (20th to 80th percentile) of interleaved rounds, and that median over ours. The floor is two reads and \
one write of the logits and two reads of the targets, at the bandwidth (read + written) of a `copy_` in the same rounds, \
{least:.0f} to {most:.0f} GB/s. The copy's memory is mapped already; a gradient's pages are not."""
TIME_COLUMNS = {
    "ms": "{median_ms:.2f} ({p20_ms:.2f} to {p80_ms:.2f})",
    "ratio to ours": "{ratio:.2f}",
    "floor, ms": "{floor_ms:.2f}",
    "share of floor": "{floor_share:.0%}",
}
STEP_COLUMNS = {key: TIME_COLUMNS[key] for key in ("ms", "ratio to ours")}
ERROR_TEXT = """## Gradient error against float64 (relative, L2)

The last column is the share of entries that come out as exactly 0 and should not."""
ERROR_COLUMNS = {
    "error": lambda row: "NaN" if row["error"] is None else f"{row['error']:.1e}",
    "lost to 0": percent_lost,
}
MEMORY_COLUMNS = {"extra": lambda row: f"{max(row['extra'], 0.0):.2f}x"}


def markdown(results: dict) -> str:
    """Everything as Markdown tables."""
    lines = [heading(results["machine"]), ""]
    copies = [row["copy_gb_s"] for row in results.get("throughput", ()) if "copy_gb_s" in row] or [0.0]
    for part, columns, text in (
        ("throughput", TIME_COLUMNS, TIME_TEXT.format(least=min(copies), most=max(copies))),
        ("step", STEP_COLUMNS, "## A training step of the demo's network, milliseconds"),
        ("scaling", {"ns": "{ns:.1f}"}, "## Lovász-Softmax against the number of pixels, nanoseconds for a logit"),
        ("accuracy", ERROR_COLUMNS, ERROR_TEXT),
        ("memory", MEMORY_COLUMNS, "## Extra peak memory beyond the gradient, in multiples of the logits"),
    ):
        if part in results:
            lines += [text, "", *loss_table(columns, results[part])]
    return "\n".join([*lines, *bar_table(results["bars"])])
