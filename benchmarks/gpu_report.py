"""The bars of `python -m benchmarks.gpu` and its tables."""

from collections.abc import Callable

from . import report
from .model import CITY, SORT
from .peers import BERMAN, CROSS_ENTROPY, EXACT, HISTOGRAM, LOVASZ_ALONE, ONE_BY_ONE, OURS, SMP

FOCAL, LOVASZ = ("sigmoid_focal", "softmax_focal", "sigmoid_focal_index"), ("lovasz_softmax", "lovasz_hinge")
REGION = ("dice", "dice_cross_entropy", "compound")
SMALL = (2, 4, 64, 64)

Value = Callable[[dict], float | None]  # what a bar reads from a row; None where it does not speak of the row


def own(family: str, key: str) -> Value:
    """Of the row of ours that backend="auto" would give."""
    return lambda row: row.get(key) if row.get("auto") == family else None


def over(family: str, match: Callable[[str], bool], *, small: bool = False) -> Value:
    """Our time over that of the contestants whose name matches."""
    key = f"over {family}"
    return lambda row: 1 / row[key] if key in row and row["small"] == small and match(row["contestant"]) else None


def slower(peer: str) -> Value:
    """How many times longer than HISTOGRAM a peer takes, on the large images of the city alone."""
    key = f"over {HISTOGRAM}"
    return lambda row: row.get(key) if row["contestant"] == peer and row["shape"] == list(CITY) else None


def is_compiled(name: str) -> bool:
    return "compile" in name


def is_peer(name: str) -> bool:
    return not name.startswith((OURS, CROSS_ENTROPY))


#: (what, tasks, value, limit, format); "at least" in `what` makes the limit a lower one. The first hold for either type.
BARS = [
    *((f"{task}: at least 85% of the floor", (task,), own(OURS, "floor_share"), 0.85, "{:.0%}") for task in FOCAL),
    *((f"{task}: at most 1x the time of a compiled peer", (task,), over(OURS, is_compiled), 1.0, "{:.2f}x") for task in FOCAL),
    ("Lovász histogram: at least 50% of the floor", LOVASZ, own(HISTOGRAM, "floor_share"), 0.5, "{:.0%}"),
    ("Lovász histogram: at most 1.5x the time of cross_entropy", LOVASZ, over(HISTOGRAM, CROSS_ENTROPY.__eq__), 1.5, "{:.2f}x"),
    *((f"{p}, {list(CITY)}: at least 50x the time of histogram", LOVASZ, slower(p), 50.0, "{:.2f}x") for p in (SMP, BERMAN)),
    ("Lovász exact: at most 1.5x the time of one radix sort", LOVASZ, over(EXACT, SORT.__eq__), 1.5, "{:.2f}x"),
    ("dice: at least 85% of the floor", ("dice",), own(OURS, "floor_share"), 0.85, "{:.0%}"),
    ("compound: at most 1.2x the time of Lovász alone", ("compound",), over(OURS, LOVASZ_ALONE.__eq__), 1.2, "{:.2f}x"),
    ("compound: at most 0.6x the time of one by one", ("compound",), over(OURS, ONE_BY_ONE.__eq__), 0.6, "{:.2f}x"),
    ("region and compound: extra memory at most 0.05x the logits", REGION, own(OURS, "extra_ratio"), 0.05, "{:.3f}x"),
    ("focal: extra memory at most 0.05x the logits", FOCAL, own(OURS, "extra_ratio"), 0.05, "{:.3f}x"),
    ("Lovász histogram: extra memory at most 0.05x the logits", LOVASZ, own(HISTOGRAM, "extra_ratio"), 0.05, "{:.3f}x"),
    ("Lovász exact: extra memory at most 4x the logits", LOVASZ, own(EXACT, "extra_ratio"), 4.0, "{:.3f}x"),
]  # fmt: skip
SMALL_BARS = [
    (f"{what}, {list(SMALL)}: at most 1/3 of the time of a peer", tasks, over(family, is_peer, small=True), 1 / 3, "{:.2f}x")
    for what, tasks, family in (("focal", FOCAL, OURS), ("Lovász exact", LOVASZ, EXACT))
]


def bars(rows: list[dict]) -> list[dict]:
    """{"bar", "measured", "met"}: the worst case of each bar; `met` is None where nothing was measured."""
    found = []
    for dtype, listed in (("float32", BARS + SMALL_BARS), ("bfloat16", BARS)):
        for what, tasks, value, limit, style in listed:
            values = [
                (number, f"{row['contestant']}, {row['workload']}")
                for row in rows
                if row["task"] in tasks and row["dtype"] == dtype and (number := value(row)) is not None
            ]
            found.append(report.worst(f"{dtype}, {what}", values, limit, style, at_least="at least" in what))
    return found


# ------------------------------------------------------------------ tables

TIME = {"ms (20th to 80th percentile)": "{median_ms:.3f} ({p20_ms:.3f} to {p80_ms:.3f})"}
OVER = {f"over {family}": f"{{over {family}:.2f}}x" for family in (OURS, HISTOGRAM, EXACT)}
LARGE_COLUMNS = {
    "us (20th to 80th percentile)": lambda row: " ".join(
        style.format(1e3 * row[key])
        for style, key in (("{:.0f}", "median_ms"), ("({:.0f}", "p20_ms"), ("to {:.0f})", "p80_ms"))
    ),
    "floor, us": lambda row: f"{1e3 * row['floor_ms']:.0f}",
    "of the floor": "{floor_share:.0%}",
    "predicted, us": "{predicted_us:.0f}",
    "measured / predicted": "{over_predicted:.2f}",
    "bound by": "{bound}",
    "GB/s": "{gb_s:.0f}",
    "extra MB": "{extra_mb:.1f}",
} | OVER
SMALL_COLUMNS = TIME | {"kernels": "{kernels:.0f}", "ms on the GPU": "{gpu_ms:.3f}"} | OVER


def clock_text(gpu: dict | None) -> str:
    return " The GPU has {multiprocessors} multiprocessors, at {ghz:.2f} GHz.".format(**gpu) if gpu else ""


def markdown(results: dict) -> str:
    rows = results["rows"]
    copies = [row["copy_gb_s"] for row in rows if "copy_gb_s" in row] or [0.0]
    lines = [
        report.heading(results["machine"]),
        "",
        "## Forward + backward",
        "",
        "A contestant's time is the median over interleaved rounds, by the GPU's own clock, of one forward + backward with its "
        "data out of the cache. The GPU is kept busy until the host has issued its work, so that the host's time shows only "
        "where a contestant waits for the GPU, or takes longer than that to issue.",
        "",
        "The floor is two reads and one write of the logits and two reads of the target (the backward pass needs it again), at "
        f"the bandwidth, read and written, of a copy in the same rounds, {min(copies):.0f} to {max(copies):.0f} GB/s. GB/s are "
        "these bytes over the time, extra MB the peak beyond the gradient, the last columns the time over that of ours.",
        "",
        "Predicted is what the kernels should take by their bytes, at that bandwidth, and their instructions "
        "(docs/performance-model.md), bound by that of these which most of it goes for. Where measured / predicted is far from "
        "1, the model misses something." + clock_text(results.get("gpu")),
        "",
        *report.loss_table(LARGE_COLUMNS, [row for row in rows if not row["small"]]),
        "## Small inputs",
        "",
        "By the clock on the wall, as one call follows the other. What is not time on the GPU is the host's, which issues the "
        "kernels.",
        "",
        *report.loss_table(SMALL_COLUMNS, [row for row in rows if row["small"]]),
    ]
    if results["left_out"]:
        lines += ["## Left out", "", *(f"- {line}" for line in results["left_out"]), ""]
    return "\n".join([*lines, *report.bar_table(results["bars"])])
