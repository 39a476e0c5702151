"""From class probabilities, or a mask, back to numbers: centreline, scale, spline, 300 points.

>>> mask = np.zeros((128, 192), dtype=np.uint8)
>>> mask[64] = 1  # a straight curve, a row below the middle
>>> recover(mask, label=1, track=Track(128, 192)).round(3)[:3]
array([0.495, 0.495, 0.495])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline, PchipInterpolator

from .pages import Track

POINTS = 300
EMPTY_ERROR = 0.5  # what a curve without a single pixel counts as in the mean absolute error


def resample(curve: np.ndarray) -> np.ndarray:
    """The real curve ``[width]`` at the ``POINTS`` depths where recovery is judged."""
    columns = np.arange(len(curve))
    return np.interp(np.linspace(0, columns[-1], POINTS), columns, curve)


def centreline(probabilities: np.ndarray, label: int) -> np.ndarray:
    """Row of curve ``label`` in every column, ``[width]``; NaN where it has no pixel.

    probabilities: ``[C, height, width]``, or a mask of classes ``[height, width]``.  The row is the mean
    of those of the pixels whose likeliest class is ``label``, weighted by their probability.
    """
    if probabilities.ndim == 2:
        weight = (probabilities == label).astype(float)
    elif probabilities.ndim == 3 and 0 <= label < len(probabilities):
        weight = probabilities[label] * (probabilities.argmax(axis=0) == label)
    else:
        shape = probabilities.shape
        raise ValueError(f"probabilities have the shape {shape}, expected [C, height, width] with C > {label}, or a mask")
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


def recover(probabilities: np.ndarray, label: int, track: Track, spline: str = "cubic") -> np.ndarray | None:
    """Values of curve ``label`` at ``POINTS`` depths along the page, or None if it has no pixel.

    probabilities: as for :func:`centreline`; track: the frame of the page, which gives the values.  A
    spline, "cubic" or (monotone between the columns, and so without overshoot) "pchip", bridges the
    columns that have no pixel; beyond the outermost the end value holds.
    """
    size = (track.height, track.width)
    if probabilities.shape[-2:] != size:
        raise ValueError(f"probabilities have the shape {probabilities.shape}, expected {size} in the end, the track's")
    return interpolate(centreline(probabilities, label), track, spline)


def interpolate(rows: np.ndarray, track: Track, spline: str = "cubic") -> np.ndarray | None:
    """:func:`recover` from a centreline ``[width]``."""
    if spline not in SPLINES:
        raise ValueError(f"spline is {spline!r}, expected one of {sorted(SPLINES)}")
    seen = np.flatnonzero(np.isfinite(rows))
    if not len(seen):
        return None
    values = track.values(rows)[seen]
    depths = np.linspace(0, len(rows) - 1, POINTS).clip(seen[0], seen[-1])
    if len(seen) == 1:
        return np.full(POINTS, values[0]).clip(0, 1)
    return SPLINES[spline](seen, values)(depths).clip(0, 1)  # clipped: the track ends at 0 and 1


def error(recovered: np.ndarray | None, curve: np.ndarray) -> float:
    """Mean absolute error against the real ``curve[width]``, as a share of the value range."""
    if recovered is None:
        return EMPTY_ERROR
    return float(np.abs(recovered - resample(curve)).mean())


@dataclass(frozen=True)
class Measured:
    """What one curve of one page came to.

    mae: mean absolute error with the cubic spline, pchip: with PCHIP, shares of the value range;
    coverage: share of the columns with a pixel; longest_gap: columns of the longest run without one;
    values: ``[POINTS]`` recovered with the cubic spline, or None.
    """

    mae: float
    pchip: float
    coverage: float
    longest_gap: int
    values: np.ndarray | None


def measure(probabilities: np.ndarray, label: int, track: Track, curve: np.ndarray) -> Measured:
    """Curve ``label`` of ``probabilities[C, height, width]`` against the real ``curve[width]``."""
    rows = centreline(probabilities, label)
    cubic, pchip = (interpolate(rows, track, spline) for spline in SPLINES)
    return Measured(error(cubic, curve), error(pchip, curve), coverage(rows), longest_gap(rows), cubic)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class, ``[C]``, out of pixel counts ``[true, predicted]``."""
    hit = np.diag(confusion)
    return hit / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1) - hit, 1)
