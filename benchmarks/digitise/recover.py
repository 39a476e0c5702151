"""From class probabilities back to numbers: centreline, scale, spline, 300 points."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import CubicSpline, PchipInterpolator

from .pages import values_from_rows

POINTS = 300
EMPTY_ERROR = 0.5  # what a curve without a single pixel counts as in the mean absolute error


def resample(curve: np.ndarray) -> np.ndarray:
    """The real curve ``[WIDTH]`` at the ``POINTS`` depths where recovery is judged."""
    columns = np.arange(len(curve))
    return np.interp(np.linspace(0, columns[-1], POINTS), columns, curve)


def centreline(probabilities: np.ndarray, label: int) -> np.ndarray:
    """Row of curve ``label`` in every column, ``[WIDTH]``; NaN where it has no pixel.

    probabilities: ``[C, HEIGHT, WIDTH]``; a one-hot mask does as well.  The row is the mean of those
    of the pixels whose likeliest class is ``label``, weighted by their probability.
    """
    weight = probabilities[label] * (probabilities.argmax(axis=0) == label)
    total = weight.sum(axis=0)
    seen = total > 0
    rows = np.full(total.shape, np.nan)
    rows[seen] = (weight * np.arange(len(weight))[:, None]).sum(axis=0)[seen] / total[seen]
    return rows


def coverage(rows: np.ndarray) -> float:
    """Share of the columns in which a centreline has a row."""
    return float(np.isfinite(rows).mean())


def longest_gap(rows: np.ndarray) -> int:
    """Columns of the longest run, ends included, in which a centreline has no row."""
    edges = np.flatnonzero(np.concatenate([[True], np.isfinite(rows), [True]]))
    return int(np.diff(edges).max() - 1)


SPLINES = {"cubic": CubicSpline, "pchip": PchipInterpolator}


def recover(probabilities: np.ndarray, label: int, skew: float, spline: str = "cubic") -> np.ndarray | None:
    """Values of curve ``label`` at ``POINTS`` depths along the page, or None if it has no pixel.

    probabilities: as for :func:`centreline`.  A spline, "cubic" or (monotone between the columns,
    and so without overshoot) "pchip", bridges the columns that have no pixel; beyond the outermost
    the end value holds.
    """
    if spline not in SPLINES:
        raise ValueError(f"spline is {spline!r}, expected one of {sorted(SPLINES)}")
    rows = centreline(probabilities, label)
    seen = np.flatnonzero(np.isfinite(rows))
    if not len(seen):
        return None
    values = values_from_rows(rows, skew)[seen]
    depths = np.linspace(0, len(rows) - 1, POINTS).clip(seen[0], seen[-1])
    if len(seen) == 1:
        return np.full(POINTS, values[0]).clip(0, 1)
    return SPLINES[spline](seen, values)(depths).clip(0, 1)  # clipped: the track ends at 0 and 1


def error(recovered: np.ndarray | None, curve: np.ndarray) -> float:
    """Mean absolute error against the real ``curve[WIDTH]``, as a share of the value range."""
    if recovered is None:
        return EMPTY_ERROR
    return float(np.abs(recovered - resample(curve)).mean())


def one_hot(mask: np.ndarray, classes: int) -> np.ndarray:
    """``[HEIGHT, WIDTH]`` classes to ``[classes, HEIGHT, WIDTH]`` probabilities of 0 and 1."""
    return (mask == np.arange(classes)[:, None, None]).astype(np.float32)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class, ``[C]``, out of pixel counts ``[true, predicted]``."""
    hit = np.diag(confusion)
    return hit / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1) - hit, 1)
