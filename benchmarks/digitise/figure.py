"""The figure: page, true mask, predicted mask, recovered against real curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from .pages import Page
from .recover import POINTS, resample

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
