"""The instrument, as a static figure: where each loss puts its gradient, by confidence, by rank, and as a map over a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .figure import CURVE_COLOURS, FIVE_COLOURS, INK, PAPER
from .gradients import FIVE, focal_ratio, push
from .snapshot import Snapshot

DASHES = {"Dice": "-", "Tversky": "--", "Lovász": "-", "Focal": "-", "SCE": "-"}  # the region losses are alike
STYLES = {name: (FIVE_COLOURS[name], dash) for name, dash in DASHES.items()} | {"CE": ("#77736a", ":")}
GAMMAS = {0.5: ":", 1.0: "--", 2.0: "-", 5.0: "-."}
CONFIDENCES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)  # ticks
LEAST, MOST = 1e-2, 1e2  # of the maps, in means of the page


def confidence_of(snapshot: Snapshot) -> np.ndarray:
    """The target's probability, [H * W]."""
    logits, target = snapshot.tensors()
    return logits.softmax(1).gather(1, target[:, None]).flatten().numpy()


def pushes(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """By loss, how hard it pushes each pixel: the sum over classes of |dL/d logit|, [H, W], divided by its mean."""
    found = {name: push(name, *snapshot.tensors())[0].numpy() for name in (*FIVE, "CE")}
    return {name: pushed / pushed.mean() for name, pushed in found.items()}


def by_confidence(pushed: np.ndarray, confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of ``pushed`` [H, W] over the pixels whose ``confidence`` [H * W] lies between two ``edges`` [B + 1]: [B].

    NaN where there are fewer than 5 of them.
    """
    place = np.searchsorted(edges, confidence) - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    count = np.bincount(place[inside], minlength=len(edges) - 1)
    total = np.bincount(place[inside], pushed.ravel()[inside], minlength=len(edges) - 1)
    return np.where(count >= 5, total / np.maximum(count, 1), np.nan)


def by_rank(pushed: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Share of the gradient on the 1, 2, ... pixels of the largest errors, [H * W]."""
    worst_first = confidence.argsort(kind="stable")
    return pushed.ravel()[worst_first].cumsum() / pushed.sum()


def draw(snapshot: Path, out: Path) -> None:
    """Write the figure of the npz ``snapshot`` (see :meth:`Snapshot.read`) to ``out``, a PNG."""
    of = Snapshot.read(snapshot)
    pushed, confidence = pushes(of), confidence_of(of)
    figure = Figure(figsize=(14, 12.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, rect=(0.006, 0.006, 0.988, 0.988))
    charts, maps = figure.subfigures(2, 1, height_ratios=(1, 1.42))
    factors, confident, ranked = charts.subplots(1, 3)
    _draw_factors(factors)
    _draw_confidence(confident, pushed, confidence)
    _draw_ranks(ranked, pushed, confidence)
    _draw_maps(maps, of, pushed)
    figure.savefig(out, dpi=110, facecolor="white")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color("#b9b4a7")
    axes.tick_params(labelcolor=INK, labelsize=9, color="#b9b4a7")
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)


def _by_log_odds(axes: Axes) -> None:
    axes.set_xscale("logit")
    axes.set(xlim=(0.005, 0.9995), xlabel="confidence: probability of the target's class")
    axes.set_xticks(CONFIDENCES, [f"{p:g}" for p in CONFIDENCES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e6e2d8", lw=0.6)


def _draw_factors(axes: Axes) -> None:
    p = torch.linspace(-6, 8, 400, dtype=torch.float64).sigmoid()
    for gamma, dash in GAMMAS.items():
        axes.plot(p, focal_ratio(p, gamma)[1], color=STYLES["Focal"][0], ls=dash, lw=1.8, label=f"gradient, γ = {gamma:g}")
    axes.plot(p, focal_ratio(p, 2.0)[0], color=STYLES["CE"][0], ls="-", lw=1.2, label="loss, γ = 2")
    _by_log_odds(axes)
    axes.set(yscale="log", ylim=(1e-5, 3), ylabel="focal / cross-entropy")
    _style(axes, "a   What focal keeps of a pixel")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="lower left")


def _draw_confidence(axes: Axes, pushed: dict[str, np.ndarray], confidence: np.ndarray) -> None:
    log_odds = np.linspace(-6, 8, 29)
    edges, middle = (1 / (1 + np.exp(-x)) for x in (log_odds, (log_odds[1:] + log_odds[:-1]) / 2))
    for name, (colour, dash) in STYLES.items():
        axes.plot(middle, by_confidence(pushed[name], confidence, edges), color=colour, ls=dash, lw=1.8, label=name)
    _by_log_odds(axes)
    axes.set(yscale="log", ylabel="gradient of a pixel, in means of the page")
    _style(axes, "b   By confidence")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="lower left")


def _draw_ranks(axes: Axes, pushed: dict[str, np.ndarray], confidence: np.ndarray) -> None:
    rank = np.arange(1, len(confidence) + 1) / len(confidence)
    for name, (colour, dash) in STYLES.items():
        axes.plot(rank, by_rank(pushed[name], confidence), color=colour, ls=dash, lw=1.8, label=name)
    axes.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.01), xlabel="pixels, those of the largest error first",
             ylabel="share of the gradient")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.xaxis.set_major_locator(LogLocator())
    axes.grid(color="#e6e2d8", lw=0.6)
    _style(axes, "c   By rank of the error")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left")


def _draw_maps(figure: Figure, of: Snapshot, pushed: dict[str, np.ndarray]) -> None:
    panels = figure.subplots(2, 4)
    classes = ListedColormap((PAPER, *CURVE_COLOURS))
    page, target, prediction, *others = panels.flat
    page.imshow(of.image, cmap="gray", vmin=0, vmax=1)
    for axes, mask in ((target, of.target), (prediction, of.logits.argmax(0))):
        axes.imshow(mask, cmap=classes, vmin=0, vmax=2, interpolation="nearest")
    for axes, name in zip(others, FIVE, strict=True):
        shown = axes.imshow(pushed[name], cmap="magma", norm=LogNorm(LEAST, MOST, clip=True), interpolation="nearest")
    heads = ("d   Page", "Target", "Prediction", *(f"{name}, gradient" for name in FIVE))
    for axes, head in zip(panels.flat, heads, strict=True):
        _style(axes, head)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    bar = figure.colorbar(shown, ax=panels, location="bottom", fraction=0.04, shrink=0.6, aspect=50, extend="both",
                          format=FuncFormatter(lambda share, _: f"{share:g}"))  # fmt: skip
    bar.set_label("|dL/d logits| of a pixel, in means of the page", fontsize=10, color=INK)
    bar.ax.tick_params(labelcolor=INK, labelsize=9, color="#b9b4a7")
    bar.outline.set_visible(False)
