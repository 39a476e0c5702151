"""What the runs of the study came to: arrays by arm and budget, intervals, the regression."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .recover import iou

DRAWS = 4000  # of the bootstrap
LEVEL = 0.95  # of an interval


@dataclass(frozen=True)
class Interval:
    """A mean, and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """One arm at one budget on one set of pages, over the seeds that finished.

    confusion: ``[S, P, C, C]`` counts of pixels, true by predicted; mae, pchip, coverage, longest_gap: ``[S, P, 2]``.
    """

    confusion: np.ndarray
    mae: np.ndarray
    pchip: np.ndarray
    coverage: np.ndarray
    longest_gap: np.ndarray

    def ious(self) -> np.ndarray:
        """Per class, of all pages together, the mean over seeds: ``[C]``."""
        return np.mean([iou(seed.sum(axis=0)) for seed in self.confusion], axis=0)

    def page_ious(self) -> np.ndarray:
        """Of each curve on each page, ``[S, P, 2]``."""
        return np.array([[iou(page)[1:] for page in seed] for seed in self.confusion])


def outcomes(results: Iterable[dict], pages: str) -> dict[tuple[str, int], Outcome]:
    """(arm, steps) to what its finished runs came to on the set ``pages``, seeds in order."""
    found: dict[tuple[str, int], list[tuple[int, dict]]] = {}
    for result in results:
        if result["status"] == "done":
            run = result["run"]
            found.setdefault((run["arm"], run["steps"]), []).append((run["seed"], result["sets"][pages]))
    names = ("confusion", "mae", "pchip", "coverage", "longest_gap")
    return {
        key: Outcome(*(np.array([judged[name] for _, judged in sorted(runs, key=lambda run: run[0])]) for name in names))
        for key, runs in found.items()
    }


class Bootstrap:
    """Resamples of seeds and, independently, of pages. Arms with as many of both meet the same resamples, so that the
    difference of their ``means`` or ``mious`` is paired: by page, since they were judged on the same, and by seed."""

    def __init__(self, seeds: int, pages: int, draws: int = DRAWS) -> None:
        rng = np.random.default_rng(0)
        self.seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # [draws, S]
        self.pages = rng.multinomial(pages, np.full(pages, 1 / pages), size=draws) / pages  # [draws, P]

    def means(self, values: np.ndarray) -> np.ndarray:
        """Resampled means of ``values[S, P]``: ``[draws]``."""
        return np.einsum("ds,dp,sp->d", self.seeds, self.pages, values, optimize=True)

    def mious(self, confusion: np.ndarray) -> np.ndarray:
        """Resampled mean IoUs, of all pages together and then the mean over seeds: ``[draws]``."""
        pooled = np.einsum("dp,spij->dsij", self.pages, confusion, optimize=True)
        hit = np.diagonal(pooled, axis1=2, axis2=3)
        union = pooled.sum(axis=2) + pooled.sum(axis=3) - hit
        return np.einsum("ds,dsc->d", self.seeds, hit / np.maximum(union, 1e-12)) / confusion.shape[-1]


def interval(value: float, resampled: np.ndarray) -> Interval:
    """The percentile interval of ``LEVEL``."""
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(float(value), float(low), float(high))


def mae_interval(of: Outcome, curve: int | None = None) -> Interval:
    """Mean absolute error of one curve (0 or 1) or of both."""
    values = of.mae.mean(axis=2) if curve is None else of.mae[..., curve]
    return interval(values.mean(), Bootstrap(*values.shape).means(values))


def miou_interval(of: Outcome) -> Interval:
    return interval(of.ious().mean(), Bootstrap(*of.mae.shape[:2]).mious(of.confusion))


def difference(of: Outcome, other: Outcome) -> tuple[Interval, Interval] | None:
    """Paired differences of (mIoU, MAE), ``of`` minus ``other``; None where they have not the same number of seeds."""
    if of.mae.shape != other.mae.shape:
        return None
    draws = Bootstrap(*of.mae.shape[:2])
    miou = interval(of.ious().mean() - other.ious().mean(), draws.mious(of.confusion) - draws.mious(other.confusion))
    values, against = of.mae.mean(axis=2), other.mae.mean(axis=2)
    return miou, interval(values.mean() - against.mean(), draws.means(values - against))


@dataclass(frozen=True)
class Regression:
    """MAE of a curve on a page, by least squares on its longest gap and its IoU.

    slopes: standard deviations of MAE by one of (gap, IoU), both in the model; r2: explained by both, by the gap alone, by the
    IoU alone; n: curves.
    """

    slopes: tuple[float, float]
    r2: tuple[float, float, float]
    n: int


def regress(found: Iterable[Outcome]) -> Regression | None:
    """Over every curve of every page of every run; None where one of the three never varies."""
    rows = [(o.mae.ravel(), o.longest_gap.ravel(), o.page_ious().ravel()) for o in found]
    if not rows:
        return None
    y, *x = (np.concatenate(part) for part in zip(*rows, strict=True))
    spread = np.array([part.std() for part in (y, *x)])
    if not (spread > 0).all():
        return None
    y, *x = ((part - part.mean()) / part.std() for part in (y, *x))

    def fit(columns: list[np.ndarray]) -> tuple[np.ndarray, float]:
        slopes = np.linalg.lstsq(np.stack(columns, axis=1), y, rcond=None)[0]
        return slopes, 1 - float(np.mean((y - np.stack(columns, axis=1) @ slopes) ** 2))

    slopes, both = fit(x)
    return Regression((float(slopes[0]), float(slopes[1])), (both, fit(x[:1])[1], fit(x[1:])[1]), len(y))


def by_run_and_curve(results: Iterable[dict], pages: str) -> list[dict[str, float]]:
    """One row for each finished run and curve (0, 1), what claims.py regresses: its means of mae and longest_gap, its IoU."""
    rows = []
    for result in results:
        if result["status"] != "done":
            continue
        judged = result["sets"][pages]
        overlap = iou(np.sum(judged["confusion"], axis=0))
        mae, gap = np.mean(judged["mae"], axis=0), np.mean(judged["longest_gap"], axis=0)
        rows += [
            {"curve": c, "mae": float(mae[c]), "longest_gap": float(gap[c]), "miou": float(overlap[c + 1])} for c in (0, 1)
        ]
    return rows
