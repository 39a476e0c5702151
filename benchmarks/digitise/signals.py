"""Synthetic signals that look like logs: what the study trains on, so that all of the real well is left for testing.

A log steps at the boundaries of beds, drifts with compaction, and is smoothed by a tool longer than its samples; two logs of
one hole see the same beds.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d

from .pages import augment, smooth_noise


def synthetic_pair(rng: np.random.Generator, width: int) -> np.ndarray:
    """Two curves ``[2, width]`` with values in [0, 1]; the same generator state gives the same pair."""
    edges = np.cumsum(rng.exponential(rng.uniform(12, 60), size=width)) < np.arange(1, width + 1)[:, None]
    bed = edges.sum(axis=1)  # index of the bed of every column
    pair = []
    for _ in range(2):
        beds = rng.standard_normal(bed[-1] + 1)[bed]
        tool = gaussian_filter1d(beds, rng.uniform(3, 9), mode="nearest")
        drift, texture = rng.uniform(0.2, 1.0), rng.uniform(0.05, 0.3)
        curve = tool + drift * smooth_noise(rng, width / 6, width) + texture * smooth_noise(rng, rng.uniform(3, 8), width)
        low, high = np.percentile(curve, (2, 98))  # a printed track's scale, as of a window of the real well
        pair.append(((curve - low) / (high - low)).clip(0, 1))
    return augment(np.stack(pair), rng)
