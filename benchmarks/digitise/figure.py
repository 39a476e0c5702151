"""The figures: of the demo, page, true mask, predicted mask, recovered against real curve; of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .arms import ARMS
from .outcomes import Outcome, mae_interval, miou_interval
from .pages import Page
from .recover import POINTS, measure, resample

if TYPE_CHECKING:
    from .study import PageSet

CURVE_COLOURS = ("#0b6e99", "#d1571e")  # solid, dashed; told apart by colour-blind eyes too
INK, PAPER = "#22262b", "#f5f2ea"


@dataclass
class Row:
    """One test page and, once judged, what was made of it.

    names: of the two curves; depth: ``[width]`` feet; predicted: ``[height, width]`` classes;
    recovered: per curve ``[POINTS]`` values or None; errors: per curve the mean absolute error.
    """

    names: tuple[str, str]
    depth: np.ndarray
    page: Page
    predicted: np.ndarray | None = None
    recovered: Sequence[np.ndarray | None] = ()
    errors: Sequence[float] = ()


def draw_figure(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write ``rows`` as a PNG to ``path``, one test page per row."""
    figure = Figure(figsize=(17, 2.6 * len(rows) + 1.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.suptitle(title, fontsize=14, color=INK)
    columns = figure.subplots(len(rows), 4, squeeze=False, width_ratios=(1, 1, 1, 1.75))
    heads = ("page", "true mask", "predicted mask", "real (wide), recovered (thin)")
    for axes, head in zip(columns[0], heads, strict=True):
        axes.set_title(head, fontsize=11.5, color=INK, pad=9)
    classes = ListedColormap((PAPER, *CURVE_COLOURS))
    for row, (page, true, predicted, curves) in zip(rows, columns, strict=True):
        extent = (row.depth[0], row.depth[-1], len(row.page.image), 0)
        page.imshow(row.page.image, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")
        for axes, mask in ((true, row.page.mask), (predicted, row.predicted)):
            axes.imshow(mask, cmap=classes, vmin=0, vmax=2, extent=extent, aspect="auto",
                        interpolation="nearest")  # fmt: skip
        page.set_ylabel(" / ".join(row.names), fontsize=12, color=INK)
        for axes in (page, true, predicted):
            axes.set_yticks([])

        depth = np.linspace(row.depth[0], row.depth[-1], POINTS)
        for curve in range(2):
            colour, real = CURVE_COLOURS[curve], resample(row.page.curves[curve])
            curves.plot(depth, real, color=colour, lw=6, alpha=0.28, solid_capstyle="round")
            if row.recovered[curve] is not None:
                curves.plot(depth, row.recovered[curve], color=colour, lw=1.5)
            curves.set_title(
                f"{row.names[curve]}  MAE {row.errors[curve]:.4f}",
                loc=("left", "right")[curve], fontsize=11, color=colour, pad=9,
            )  # fmt: skip
        curves.set(xlim=(depth[0], depth[-1]), ylim=(-0.06, 1.06), yticks=(0, 0.5, 1))
        curves.grid(color="#d9d5ca", lw=0.6)
        for axes in (page, true, predicted, curves):
            axes.spines[:].set_color("#b9b4a7")
            axes.tick_params(colors=INK, labelsize=8, color="#b9b4a7")
    for axes in columns[-1]:
        axes.set_xlabel("depth, ft", fontsize=9, color=INK)
    figure.savefig(path, dpi=110, facecolor="white")


# Okabe and Ito's colours for the five, greys and dashes for the rest: told apart by colour-blind eyes and in print.
FIVE_COLOURS = {"Dice": "#0072b2", "Tversky": "#009e73", "Lovász": "#d55e00", "Focal": "#cc79a7", "SCE": "#e69f00"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")


def _style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm."""
    compared = [one.name for one in ARMS.values() if one.group != "sensitivity"]
    place = compared.index(arm) if arm in compared else 0
    return FIVE_COLOURS.get(arm, ("#555555", "#888888", "#222222")[place % 3]), MARKERS[place % len(MARKERS)]


def _finish(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    for axes in panels:
        axes.grid(color="#d9d5ca", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_color("#b9b4a7")
        axes.tick_params(colors=INK, labelsize=9, color="#b9b4a7")
    figure.savefig(path, dpi=110, facecolor="white")


def draw_masks_against_curves(
    found: Mapping[str, Mapping[tuple[str, int], Outcome]], budgets: Sequence[int], path: Path
) -> None:
    """mIoU against MAE of every arm with intervals; a row for each budget, a column for each set of pages."""
    figure = Figure(figsize=(13, 5.2 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), len(found), squeeze=False)
    for row, steps in zip(panels, budgets, strict=True):
        for axes, (pages, outcomes) in zip(row, found.items(), strict=True):
            for (arm, budget), of in outcomes.items():
                if budget != steps or ARMS[arm].group == "sensitivity":
                    continue
                x, y, (colour, marker) = miou_interval(of), mae_interval(of), _style(arm)
                main = ARMS[arm].group == "main"
                axes.errorbar(
                    x.value, y.value,
                    xerr=[[x.value - x.low], [x.high - x.value]], yerr=[[y.value - y.low], [y.high - y.value]],
                    fmt=marker, ms=9 if main else 6, color=colour, mfc=colour if main else "white", lw=1.2 if main else 0.7,
                    label=arm, zorder=3 if main else 2,
                )  # fmt: skip
            axes.set_title(f"{pages} pages, {steps} steps", fontsize=11.5, color=INK)
            axes.set_xlabel("mIoU (right is better)", color=INK)
            axes.set_ylabel("MAE of the recovered curves (down is better)", color=INK)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=10)
    _finish(figure, panels.ravel(), path)


def draw_learning(results: Sequence[dict], path: Path) -> None:
    """mIoU and MAE on synthetic pages over the steps of the longest runs of the first seed."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for result in results:
        arm, points = result["run"]["arm"], np.array(result.get("learning", []))  # a run that failed has none
        if not len(points) or ARMS[arm].group == "sensitivity":
            continue
        colour, marker = _style(arm)
        main = ARMS[arm].group == "main"
        for axes, column in zip(panels, (1, 2), strict=True):
            axes.plot(points[:, 0], points[:, column], color=colour, marker=marker, ms=5 if main else 3,
                      lw=2 if main else 0.9, ls="-" if main else "--", label=arm)  # fmt: skip
    for axes, name in zip(panels, ("mIoU", "MAE of the recovered curves"), strict=True):
        axes.set_xlabel("steps", color=INK)
        axes.set_ylabel(name, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=10)
    _finish(figure, panels, path)


def draw_regression(rows: Mapping[str, Sequence[dict[str, float]]], path: Path) -> None:
    """MAE of a curve against its longest gap, and against its IoU; a dot for each run and curve."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    names = {"longest_gap": "longest gap, columns (mean of the pages)", "miou": "IoU of the curve"}
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        for (pages, dots), colour, marker in zip(rows.items(), CURVE_COLOURS, "os", strict=True):
            axes.scatter([dot[name] for dot in dots], [dot["mae"] for dot in dots], s=16, color=colour, marker=marker,
                         alpha=0.6, lw=0, label=f"{pages} pages")  # fmt: skip
        axes.set_xlabel(label, color=INK)
        axes.set_ylabel("MAE of the curve", color=INK)
        if any(rows.values()):
            axes.set_yscale("log")
            axes.set_yticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
            axes.yaxis.set_minor_locator(NullLocator())
    panels[0].legend(frameon=False)
    _finish(figure, panels, path)


def draw_curves(probabilities: Mapping[str, np.ndarray], pages: PageSet, path: Path, page: int) -> None:
    """One page of ``pages`` and what every arm recovered from it; probabilities: arm to ``[pages, C, H, W]``."""
    image, track, curves = pages.pages.images[page, 0].numpy(), pages.tracks[page], pages.curves[page]
    panels = len(probabilities) + 1
    figure = Figure(figsize=(17, 3.1 * -(-panels // 4)), layout="constrained")
    grid = figure.subplots(-(-panels // 4), 4, squeeze=False).ravel()
    for axes in grid[panels:]:
        axes.set_axis_off()
    grid[0].imshow(image, cmap="gray", vmin=0, vmax=255, aspect="auto")
    grid[0].set_title("the page", fontsize=11, color=INK)
    grid[0].set(xticks=(), yticks=())
    depth = np.linspace(0, track.width - 1, POINTS)
    for axes, (arm, likely) in zip(grid[1:], probabilities.items(), strict=False):
        found = [measure(likely[page], label, track, curves[label - 1]) for label in (1, 2)]
        for curve, colour, one in zip(curves, CURVE_COLOURS, found, strict=True):
            axes.plot(depth, resample(curve), color=colour, lw=5, alpha=0.28, solid_capstyle="round")
            if one.values is not None:
                axes.plot(depth, one.values, color=colour, lw=1.2)
        axes.set(xlim=(0, track.width - 1), ylim=(-0.06, 1.06), yticks=(0, 0.5, 1), xticks=())
        axes.set_title(f"{arm}: MAE {found[0].mae:.3f}, {found[1].mae:.3f}", fontsize=11, color=INK)
    _finish(figure, grid[1:panels], path)
