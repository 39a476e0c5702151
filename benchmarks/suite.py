"""`python -m benchmarks.suite` (make accuracy): how near to float64 the Lovász methods are, case by case and size by size.

Errors of the loss (absolute; relative above 1) and of the gradient (relative, L2 and L1) against the exact weights in float64,
of "histogram", "exact" and Berman's formula, all in float32. The certificate is of "histogram", beside the distance that it
bounds: sum over a segment's pixels of |weight - exact weight|, mean over the segments.

Where errors tie, any order is a subgradient. The truth then is the mean over each group of ties, and the order that sorting
leaves them in counts as an error of it.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from veerloss import _layout
from veerloss.reference import histogram
from veerloss.reference.lovasz import lovasz_weights

from . import peers, report

RESULTS = Path(__file__).parent / "results" / "accuracy"
PIXELS = [10**k for k in range(3, 8)]
MOST_LOGITS = 2 * 10**7  # float64 and the sorts take a minute and 100 bytes for each of them
GRADIENT_BAR, LOSS_BAR, CERTIFICATE_BAR = 1e-3, 3e-6, 3.0
BARS_FROM, PEER_BAR_FROM = 10**4, 10**6
CONTESTANTS = {"histogram": peers.HISTOGRAM, "exact": peers.EXACT, peers.BERMAN: peers.BERMAN}

Make = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
MakeTarget = Callable[[int, torch.Generator], Tensor]  # of a number of pixels: [1, P]
MakeLogits = Callable[[Tensor, int, torch.Generator], Tensor]  # of a target and a number of classes: [1, C, P]


def even(classes: int) -> MakeTarget:
    return lambda pixels, g: torch.randint(classes, (1, pixels), generator=g)


def giant(pixels: int, g: torch.Generator) -> Tensor:
    """99% of class 0."""
    target = even(5)(pixels, g)
    return torch.where(torch.rand(1, pixels, generator=g) < 0.99, 0, target)


def curves(pixels: int, g: torch.Generator) -> Tensor:
    """Two thin classes, 1% each, on background."""
    draw = torch.rand(1, pixels, generator=g)
    return (draw < 0.02).long() + (draw < 0.01).long()


def rare(share: float) -> MakeTarget:
    def make(pixels: int, g: torch.Generator) -> Tensor:
        target = (torch.rand(1, pixels, generator=g) < share).long()
        target[0, 0] = 1
        return target

    return make


def noise(scale: float) -> MakeLogits:
    return lambda target, classes, g: torch.randn(1, classes, target.size(1), generator=g) * scale


def peaked(height: float, scale: float, wrong: float) -> MakeLogits:
    """Logits of a network that is sure: `height` on the class shown, a share `wrong` of the pixels showing any, plus noise."""

    def make(target: Tensor, classes: int, g: torch.Generator) -> Tensor:
        anywhere = torch.rand(target.shape, generator=g) < wrong
        shown = torch.where(anywhere, torch.randint(classes, target.shape, generator=g), target)[:, None]
        return noise(scale)(target, classes, g).scatter_add_(1, shown, torch.full(shown.shape, height))

    return make


def case(classes: int, target: MakeTarget, logits: MakeLogits) -> tuple[int, Make]:
    def make(pixels: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        y = target(pixels, g)
        return logits(y, classes, g), y

    return classes, make


#: name: (classes, inputs). One class: the hinge.
CASES: dict[str, tuple[int, Make]] = {
    "random, 5 classes": case(5, even(5), noise(1.0)),
    "random, 2 classes, foreground 0.3": case(2, rare(0.3), noise(1.0)),
    "thin curves, at initialisation": case(3, curves, noise(0.1)),
    "thin curves, trained": case(3, curves, peaked(6.0, 1.5, 0.02)),
    "trained, 5 classes": case(5, even(5), peaked(8.0, 1.0, 0.05)),
    "sharp, 5 classes": case(5, even(5), peaked(20.0, 4.0, 0.02)),
    "saturated, 19 classes": case(19, even(19), noise(10.0)),
    "clustered, logits x 0.001": case(2, rare(0.3), noise(1e-3)),
    "near uniform, 150 classes": case(150, even(150), noise(0.01)),
    "saturated, rare class 0.001": case(2, rare(0.001), peaked(12.0, 3.0, 0.001)),
    "ties, logits in steps of 1/4": case(5, even(5), lambda y, c, g: (noise(1.0)(y, c, g) * 4).round() / 4),
    "one giant class": case(5, giant, noise(1.0)),
    "absent classes": case(8, even(3), noise(1.0)),
    "hinge, random": case(1, rare(0.3), noise(1.0)),
    "hinge, clustered, logits x 0.001": case(1, rare(0.3), noise(1e-3)),
    "hinge, trained, rare class 0.01": case(1, rare(0.01), lambda y, c, g: 8.0 * y[:, None] - 4.0 + noise(2.0)(y, c, g)),
}


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


def coordinates_of(x: Tensor, foreground: Tensor) -> Tensor:
    """[C, P] float32, by which the errors of x [1, C, P] are binned: as the kernels have them, with the digits of 1 - p."""
    if x.size(1) == 1:
        return histogram.coordinates(errors_of(x, foreground.long())[0], _layout.Errors.HINGE)
    p = x.softmax(1)[0]
    top = torch.zeros_like(foreground).scatter_(0, p.argmax(0, keepdim=True), True)
    others = torch.where(top, 0.0, p).sum(0)  # 1 - p of a most probable class
    background = torch.where(top & (p > 0.5), -1 - others.log2(), 1 + p.log2())
    return torch.where(foreground, -background, background).float()


def binned_weights(coordinate: Tensor, foreground: Tensor, table: Tensor, weights: Tensor, softmax: bool) -> Tensor:
    """[P] that "histogram" gives to errors, from what its forward pass kept of a segment."""
    found = histogram.Table(table, weights.size(1)).bin_of(coordinate)
    found = found if softmax else torch.where(coordinate > -torch.inf, found.clamp(min=1), 0)
    bg, fg = weights.double()
    return torch.where(foreground, -fg[found], bg[found])


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

    logits, task = (x[:, 0], "lovasz_hinge") if binary else (x, "lovasz_softmax")
    losses = peers.TASKS[task]()
    rows = []
    for contestant, name_of_loss in CONTESTANTS.items():
        leaf = logits.clone().requires_grad_()
        value = losses[name_of_loss](leaf, target)
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
    # In float64: there the kernel's coordinates and these are the same float32 numbers, when they are binned, but for a few.
    _, _, table, kept, bounds = torch.ops.veerloss.lovasz_histogram_forward(
        logits=x.double(), target=target, selected=None, present=not binary, per_image=binary, class_weight=None,
        ignore_index=None, background_index=None, errors=_layout.Errors.HINGE if binary else _layout.Errors.SOFTMAX,
        reduction=_layout.Reduction.MEAN, valid_pixels=None, upcast_loss=False,
    )  # fmt: skip
    coordinates = coordinates_of(x.double(), foreground)
    distance = bound = 0.0
    for c in present:
        inside = errors[c] > 0
        used = binned_weights(coordinates[c], foreground[c], table[0, c], kept[0, c], not binary)
        order = lovasz_weights(errors[c], foreground[c], torch.ones_like(inside))
        distance += (used - order)[inside].abs().sum().item() / segments
        bound += bounds[0, c].item() / segments
    rows[0] |= {"certificate": bound, "distance": distance}
    return rows


def bars(rows: list[dict]) -> list[dict]:
    """{"bar", "measured", "met"}: the worst case of each."""
    ours = [row for row in rows if row["contestant"] == "histogram" and row["pixels"] >= BARS_FROM]
    certified = [row for row in ours if row["distance"] > 1e-9]  # below, rounding is all there is
    large = [row for row in ours if row["pixels"] >= PEER_BAR_FROM]
    berman = {(row["case"], row["pixels"]): row["l2"] for row in rows if row["contestant"] == peers.BERMAN}
    over_berman = lambda r: r["l2"] / berman[r["case"], r["pixels"]]  # noqa: E731
    found = [
        ("gradient error, L2, <= {:g}", GRADIENT_BAR, ours, lambda r: r["l2"]),
        ("loss error <= {:g}", LOSS_BAR, ours, lambda r: r["loss"]),
        ("certificate <= {:g} x distance", CERTIFICATE_BAR, certified, lambda r: r["certificate"] / r["distance"]),
        ("distance <= certificate", 1.0, ours, lambda r: r["distance"] / (r["certificate"] + 1e-7)),
        (f"gradient error <= that of Berman's formula from {PEER_BAR_FROM:.0e} pixels up", 1.0, large, over_berman),
    ]
    return [
        report.worst(what.format(limit), [(key(r), f"{r['case']}, {r['pixels']:.0e} pixels") for r in of], limit, "{:.1e}")
        for what, limit, of, key in found
        if of
    ]


def markdown(results: dict) -> str:
    columns = {
        "case": "{case}",
        "pixels": "{pixels:.0e}",
        "loss": "{contestant}",
        "loss error": "{loss:.1e}",
        "gradient, L2": "{l2:.1e}",
        "gradient, L1": "{l1:.1e}",
        "lost to 0": report.percent_lost,
        "certificate": "{certificate:.1e}",
        "distance": "{distance:.1e}",
    }
    rows = [report.cells(row, columns.values()) for row in results["rows"]]
    lines = [report.heading(results["machine"]), "", __doc__.split("\n", 2)[2].strip(), "", *report.table(columns, rows)]
    return "\n".join([*lines, *report.bar_table(results["bars"])])


def plot(rows: list[dict], path: Path) -> None:
    """Gradient error against pixels, a panel for each case."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure, across = Figure(figsize=(13, 11), layout="constrained"), 4
    axes = figure.subplots(math.ceil(len(CASES) / across), across, sharex=True, sharey=True)
    styles = {peers.BERMAN: ("s-", "tab:red"), "histogram": ("o-", "tab:blue"), "exact": ("^-", "tab:green")}
    for panel, name in zip(axes.flat, CASES, strict=False):
        for contestant, (marker, color) in styles.items():
            points = [(r["pixels"], max(r["l2"], 1e-9)) for r in rows if (r["case"], r["contestant"]) == (name, contestant)]
            if points:
                panel.loglog(*zip(*points, strict=True), marker, color=color, markersize=4)
        panel.axhline(GRADIENT_BAR, color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], marker=m[0], color=c, markersize=4, label=f"{n}, float32") for n, (m, c) in styles.items()]
    axes.flat[0].legend(handles=handles, fontsize=8)
    figure.supxlabel("pixels per segment")
    figure.supylabel("relative error of the gradient against float64, L2")
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser("benchmarks.suite", __doc__)
    parser.add_argument("--most", type=float, default=PIXELS[-1], help="pixels per segment at the most")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.filter or options.most < PIXELS[-1] else RESULTS)
    start, rows = time.perf_counter(), []
    results = {"machine": report.machine("benchmarks.suite", arguments), "rows": rows}
    for name, (classes, _) in CASES.items():
        for pixels in PIXELS:
            if options.filter in name and pixels <= options.most and pixels * classes <= MOST_LOGITS:
                report.log(f"{name}: {pixels:.0e} pixels")
                rows += run_case(name, pixels)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = bars(rows)
    report.save(results, markdown(results), output)
    if output:
        plot(rows, output.with_name(f"{output.name}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
