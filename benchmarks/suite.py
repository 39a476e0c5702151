"""`python -m benchmarks.suite` (make accuracy): how near to float64 the Lovász methods are, case by case and size by size.

Errors of the loss (absolute; relative above 1) and of the gradient (relative, L2 and L1) against the exact weights in float64,
of "histogram", "exact" and Berman's formula, all in float32. The certificate is of "histogram", beside the distance that it
bounds: sum over a segment's pixels of |weight - exact weight|, mean over the segments.

Where errors tie, any order is a subgradient. The truth then is the mean over each group of ties, and the order that sorting
leaves them in counts as an error of it.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import veerloss
from veerloss import _histogram
from veerloss.reference import histogram
from veerloss.reference.lovasz import lovasz_weights

from . import peers, report

RESULTS = Path(__file__).parent / "results" / "accuracy"
PIXELS = [10**k for k in range(3, 8)]
MOST_LOGITS = 2 * 10**7  # float64 and the sorts take a minute and 100 bytes for each of them
GRADIENT_BAR, LOSS_BAR, CERTIFICATE_BAR = 1e-3, 1e-6, 3.0
BARS_FROM, PEER_BAR_FROM = 10**4, 10**6

Make = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


def peaked(target: Tensor, classes: int, height: float, noise: float, wrong: float, g: torch.Generator) -> Tensor:
    """Logits of a network that is sure: `height` on the class shown, a share `wrong` of the pixels showing any."""
    shown = torch.where(
        torch.rand(target.shape, generator=g) < wrong, torch.randint(classes, target.shape, generator=g), target
    )
    x = torch.randn(1, classes, target.size(1), generator=g) * noise
    return x.scatter_add_(1, shown[:, None], torch.full((1, 1, 1), height).expand(1, 1, target.size(1)))


def curves(pixels: int, g: torch.Generator) -> Tensor:
    """Two thin classes, 1% each, on background."""
    draw = torch.rand(1, pixels, generator=g)
    return (draw < 0.02).long() + (draw < 0.01).long()


def even(classes: int, pixels: int, g: torch.Generator) -> Tensor:
    return torch.randint(classes, (1, pixels), generator=g)


def rare(pixels: int, share: float, g: torch.Generator) -> Tensor:
    target = (torch.rand(1, pixels, generator=g) < share).long()
    target[0, 0] = 1
    return target


def noise(classes: int, scale: float, pixels: int, g: torch.Generator) -> Tensor:
    return torch.randn(1, classes, pixels, generator=g) * scale


def with_target(target: Callable[[int, torch.Generator], Tensor], logits: Callable[[Tensor, torch.Generator], Tensor]) -> Make:
    def make(pixels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        y = target(pixels, g)
        return logits(y, g), y

    return make


def plain(classes: int, scale: float, target: Callable[[int, torch.Generator], Tensor]) -> Make:
    return with_target(target, lambda y, g: noise(classes, scale, y.size(1), g))


def giant(pixels: int, g: torch.Generator) -> Tensor:
    """99% of class 0."""
    target = even(5, pixels, g)
    return torch.where(torch.rand(1, pixels, generator=g) < 0.99, 0, target)


#: name: (classes, inputs). One class: the hinge.
CASES: dict[str, tuple[int, Make]] = {
    "random, 5 classes": (5, plain(5, 1.0, lambda p, g: even(5, p, g))),
    "random, 2 classes, foreground 0.3": (2, plain(2, 1.0, lambda p, g: rare(p, 0.3, g))),
    "thin curves, at initialisation": (3, plain(3, 0.1, curves)),
    "thin curves, trained": (3, with_target(curves, lambda y, g: peaked(y, 3, 6.0, 1.5, 0.02, g))),
    "trained, 5 classes": (5, with_target(lambda p, g: even(5, p, g), lambda y, g: peaked(y, 5, 8.0, 1.0, 0.05, g))),
    "sharp, 5 classes": (5, with_target(lambda p, g: even(5, p, g), lambda y, g: peaked(y, 5, 20.0, 4.0, 0.02, g))),
    "saturated, 19 classes": (19, plain(19, 10.0, lambda p, g: even(19, p, g))),
    "clustered, logits x 0.001": (2, plain(2, 1e-3, lambda p, g: rare(p, 0.3, g))),
    "near uniform, 150 classes": (150, plain(150, 0.01, lambda p, g: even(150, p, g))),
    "saturated, rare class 0.001": (
        2,
        with_target(lambda p, g: rare(p, 0.001, g), lambda y, g: peaked(y, 2, 12.0, 3.0, 0.001, g)),
    ),
    "ties, logits in steps of 1/4": (5, with_target(lambda p, g: even(5, p, g), lambda y, g: _steps(y, g))),
    "one giant class": (5, plain(5, 1.0, giant)),
    "absent classes": (8, plain(8, 1.0, lambda p, g: even(3, p, g))),
    "hinge, random": (1, plain(1, 1.0, lambda p, g: rare(p, 0.3, g))),
    "hinge, clustered, logits x 0.001": (1, plain(1, 1e-3, lambda p, g: rare(p, 0.3, g))),
    "hinge, trained, rare class 0.01": (
        1,
        with_target(lambda p, g: rare(p, 0.01, g), lambda y, g: 8.0 * y[:, None] - 4.0 + noise(1, 2.0, y.size(1), g)),
    ),
}


def _steps(target: Tensor, g: torch.Generator) -> Tensor:
    return (noise(5, 1.0, target.size(1), g) * 4).round() / 4


# ------------------------------------------------------------------ truth


def errors_of(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[C, P] errors, in the type of x [1, C, P], and foreground."""
    if x.size(1) == 1:
        return torch.relu(1 - (2 * target - 1) * x[0]), target == 1
    p = x.softmax(1)[0]
    foreground = torch.zeros_like(p, dtype=torch.bool).scatter_(0, target, True)
    return torch.where(foreground, torch.where(foreground, 0.0, p).sum(0), p), foreground


def exact_weights(errors: Tensor, foreground: Tensor, ties: bool) -> Tensor:
    """[P] of one segment; with `ties`, the mean over errors that are equal up to rounding."""
    weights = lovasz_weights(errors, foreground, torch.ones_like(foreground))
    if not ties:
        return weights
    _, group = torch.stack([(errors * 1e10).round(), foreground.double()]).unique(dim=1, return_inverse=True)
    # The other order of foreground and background within a group: as if its foreground had slightly less error.
    _, level = (errors * 1e10).round().unique(return_inverse=True)
    for order in (foreground, ~foreground):
        ranked = lovasz_weights(level + 0.5 * order.double(), foreground, torch.ones_like(foreground))
        weights = ranked if order is foreground else (weights + ranked) / 2
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, weights)
    return (sums / group.bincount())[group]


def gradient_of(weights: Tensor, x: Tensor, foreground: Tensor, segments: int) -> Tensor:
    """d loss / d x [C, P], from the weights of the errors [C, P]."""
    signed = torch.where(foreground, -weights, weights) / segments
    if x.size(1) == 1:
        return torch.where(errors_of(x, foreground.long())[0] > 0, signed, 0.0)
    p = x.softmax(1)[0]
    top = p.argmax(0, keepdim=True)
    signed = signed - signed.gather(0, top)  # so that sure pixels keep their digits
    return p * (signed - (p * signed).sum(0))


def binned_weights(errors: Tensor, foreground: Tensor, table: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    """[P] that "histogram" gives to errors, from what its forward pass kept of a segment; errors count as float32."""
    cell, position = histogram.cells_of(errors, softmax)
    entry = table.long()[cell]
    index = (entry & 0xFFFF) + ((position * (entry >> 16)) >> histogram.POSITION_BITS)
    bg, fg = weights.double()
    return torch.where(foreground, -fg[index], bg[index])


# ------------------------------------------------------------------ measure


def run_case(name: str, pixels: int) -> list[dict]:
    """A row per contestant."""
    classes, make = CASES[name]
    x, target = make(pixels, torch.Generator().manual_seed(0))
    binary, ties = classes == 1, name.startswith("ties")
    errors, foreground = errors_of(x.double(), target)
    present = [c for c in range(classes) if foreground[c].any()]
    weights = torch.zeros_like(errors)
    for c in present:
        weights[c] = exact_weights(errors[c], foreground[c], ties)
    segments = len(present)
    truth = (weights * errors).sum().item() / segments
    exact = gradient_of(weights, x.double(), foreground, segments)

    if binary:
        logits, kind, ours, berman = x[:, 0], _histogram.HINGE, veerloss.lovasz_hinge_loss, peers.berman_hinge
    else:
        logits, kind, ours, berman = x, _histogram.SOFTMAX, veerloss.lovasz_softmax_loss, peers.berman_softmax
    contestants = {
        "histogram": functools.partial(ours, method="histogram"),
        "exact": functools.partial(ours, method="exact"),
        "Berman's formula": berman,
    }
    rows = []
    for contestant, loss in contestants.items():
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        found = leaf.grad.double().view_as(exact)
        difference = found - exact
        rows.append(
            {
                "case": name,
                "pixels": pixels,
                "contestant": contestant,
                "loss": abs(value.item() - truth) / max(truth, 1.0),
                "l2": (difference.norm() / exact.norm()).item(),
                "l1": (difference.abs().sum() / exact.abs().sum()).item(),
                "lost": ((found == 0) & (exact != 0)).double().mean().item(),
            }
        )
    options = (None, not binary, binary, None, None, kind, 1, False)
    # In float64: there the kernel's errors and these are the same float32 numbers when they are binned.
    _, _, table, kept, _, bounds = torch.ops.veerloss.lovasz_histogram_forward(x.double(), target, *options)
    distance = bound = 0.0
    for c in present:
        inside = errors[c] > 0
        used = binned_weights(errors[c], foreground[c], table[0, c], kept[0, c], not binary)
        order = lovasz_weights(errors[c], foreground[c], torch.ones_like(inside))
        distance += (used - order)[inside].abs().sum().item() / segments
        bound += bounds[0, c].item() / segments
    rows[0] |= {"certificate": bound, "distance": distance}
    return rows


def bars(rows: list[dict]) -> list[dict]:
    """{"bar", "measured", "met"}: the worst case of each."""
    ours = [row for row in rows if row["contestant"] == "histogram" and row["pixels"] >= BARS_FROM]
    found = []

    def worst(what: str, key: Callable[[dict], float], bar: float, of: list[dict]) -> None:
        if of:
            row = max(of, key=key)
            measured = f"{key(row):.1e} ({row['case']}, {row['pixels']:.0e} pixels)"
            found.append({"bar": what, "measured": measured, "met": key(row) <= bar})

    worst(f"gradient error, L2, <= {GRADIENT_BAR:g}", lambda r: r["l2"], GRADIENT_BAR, ours)
    worst(f"loss error <= {LOSS_BAR:g}", lambda r: r["loss"], LOSS_BAR, ours)
    certified = [r for r in ours if r["distance"] > 1e-9]  # below, rounding is all there is
    worst(
        f"certificate <= {CERTIFICATE_BAR:g} x distance", lambda r: r["certificate"] / r["distance"], CERTIFICATE_BAR, certified
    )
    worst("distance <= certificate", lambda r: r["distance"] / (r["certificate"] + 1e-9), 1.0, ours)
    berman = {(r["case"], r["pixels"]): r["l2"] for r in rows if r["contestant"] == "Berman's formula"}
    large = [r for r in ours if r["pixels"] >= PEER_BAR_FROM]
    ratio = lambda r: r["l2"] / berman[r["case"], r["pixels"]]  # noqa: E731
    worst(f"gradient error <= that of Berman's formula from {PEER_BAR_FROM:.0e} pixels up", ratio, 1.0, large)
    return found


def markdown(results: dict) -> str:
    lines = [report.heading(results["machine"]), "", __doc__.split("\n", 2)[2].strip(), ""]
    columns = ("case", "pixels", "loss", "loss error", "gradient, L2", "gradient, L1", "lost to 0", "certificate", "distance")
    lines += [report.line(columns), report.line(["---"] * len(columns))]
    for row in results["rows"]:
        cells = [row["case"], f"{row['pixels']:.0e}", row["contestant"]]
        cells += [f"{row[key]:.1e}" for key in ("loss", "l2", "l1")]
        cells += [f"{100 * row['lost']:.2g}%"]
        cells += [f"{row[key]:.1e}" if key in row else "" for key in ("certificate", "distance")]
        lines.append(report.line(cells))
    return "\n".join([*lines, "", *report.bar_table(results["bars"])])


def plot(rows: list[dict], path: Path) -> None:
    """Gradient error against pixels, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = 4
    figure, axes = pyplot.subplots(
        math.ceil(len(CASES) / across), across, figsize=(13, 11), sharex=True, sharey=True, layout="constrained"
    )
    styles = {"Berman's formula": ("s-", "tab:red"), "histogram": ("o-", "tab:blue"), "exact": ("^-", "tab:green")}
    for panel, name in zip(axes.flat, CASES, strict=False):
        for contestant, (marker, color) in styles.items():
            points = [(r["pixels"], max(r["l2"], 1e-9)) for r in rows if (r["case"], r["contestant"]) == (name, contestant)]
            if points:
                panel.loglog(*zip(*points, strict=True), marker, color=color, markersize=4)
        panel.axhline(GRADIENT_BAR, color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    handles = [pyplot.Line2D([], [], marker=m[0], color=c, markersize=4, label=f"{n}, float32") for n, (m, c) in styles.items()]
    axes.flat[0].legend(handles=handles, fontsize=8)
    figure.supxlabel("pixels per segment")
    figure.supylabel("relative error of the gradient against float64, L2")
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=float, default=PIXELS[-1], help="pixels per segment at the most")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    parser.add_argument("--output", type=Path, help="path without suffix for .json, .md and .png")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.filter or options.most < PIXELS[-1] else RESULTS)
    start, rows = time.perf_counter(), []
    results = {"machine": report.machine("python -m benchmarks.suite", 0.0), "rows": rows}
    for name, (classes, _) in CASES.items():
        for pixels in PIXELS:
            if options.filter in name and pixels <= options.most and pixels * classes <= MOST_LOGITS:
                print(f"{time.strftime('%H:%M:%S')} {name}: {pixels:.0e} pixels", file=sys.stderr, flush=True)
                rows += run_case(name, pixels)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = bars(rows)
    text = markdown(results)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
        plot(rows, output.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
