"""Draw a raster page and its class mask from two curves.

A page is grey, 1 is white paper, and has as many columns as the curves have values.  Depth runs
along the columns, one sample per column; the value runs up the rows.  Curve 1 is a solid stroke,
curve 2 a dashed one, as on paper logs; nothing else tells them apart.  The mask runs through the
gaps of the dashes, since the curve does.

Where the strokes cross, a pixel belongs to both curves but has one class.  Draw order decides:
curve 1 is drawn last and takes the pixel, and curve 2 has a hole there that the recovery bridges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

HEIGHT, WIDTH = 128, 192  # pixels of a page of the demo
CLASSES = 3  # background, curve 1, curve 2
STEEPEST = math.tan(math.radians(1))  # skew of a page, rows per column
REACH = 3  # columns; no stroke of 3 px reaches further from its centreline


@dataclass(frozen=True)
class Track:
    """The frame of a page, in which rows are values.  Known to the recovery, as it is once the corners
    of a track have been marked on a scan; finding them is another task.

    height, width: pixels; skew: rows per column, positive downhill, 0 at the middle of the page.
    """

    height: int
    width: int
    skew: float = 0.0

    def __post_init__(self) -> None:
        if self.height < 4 * self.margin:
            raise ValueError(f"height is {self.height}, expected at least {4 * self.margin} rows for a width of {self.width}")

    @property
    def margin(self) -> int:
        """Rows kept free above 1 and below 0: room for skew and stroke."""
        return max(10, math.ceil(STEEPEST * self.width / 2) + 4)

    def drift(self) -> np.ndarray:
        """Rows by which skew moves each column: ``[width]``."""
        return self.skew * (np.arange(self.width) - (self.width - 1) / 2)

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Row of the centreline in every column, fractional: ``[..., width]`` to ``[..., width]``."""
        return self.margin + (1 - values) * (self.height - 1 - 2 * self.margin) + self.drift()

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`rows`."""
        return 1 - (rows - self.drift() - self.margin) / (self.height - 1 - 2 * self.margin)


@dataclass(frozen=True)
class Page:
    """A drawn page.

    image: ``[height, width]`` float32 in [0, 1]; mask: ``[height, width]`` uint8 classes;
    curves: ``[2, width]`` the values drawn, in [0, 1]; track: where they lie.
    """

    image: np.ndarray
    mask: np.ndarray
    curves: np.ndarray
    track: Track


def _distance(rows: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every pixel to the polyline ``rows[width]`` and the arc length of the nearest
    point on it, both ``[height, width]`` in pixels; exact up to a distance of ``REACH``."""
    width = len(rows)
    step = np.diff(rows)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(1.0, step))])
    rows, arc = np.pad(rows, REACH, mode="edge"), np.pad(arc, REACH, mode="edge")
    pixel = np.arange(height, dtype=np.float32)[:, None]
    nearest = np.full((height, width), np.inf, dtype=np.float32)
    along = np.zeros((height, width), dtype=np.float32)
    for k in range(-REACH, REACH):  # the segment from column c + k to c + k + 1
        left = slice(k + REACH, k + REACH + width)
        right = slice(k + REACH + 1, k + REACH + 1 + width)
        start, rise = rows[left].astype(np.float32), (rows[right] - rows[left]).astype(np.float32)
        below = pixel - start
        t = ((below * rise - k) / (1 + rise * rise)).clip(0, 1)
        squared = (k + t) ** 2 + (t * rise - below) ** 2
        closer = squared < nearest
        nearest = np.where(closer, squared, nearest)
        length = (arc[right] - arc[left]).astype(np.float32)
        along = np.where(closer, arc[left].astype(np.float32) + t * length, along)
    return np.sqrt(nearest), along


def smooth_noise(rng: np.random.Generator, scale: float, width: int) -> np.ndarray:
    """Noise of unit variance along the columns, correlated over ``scale`` columns: ``[width]``."""
    noise = gaussian_filter1d(rng.standard_normal(width), scale, mode="wrap")
    return noise / (noise.std() + 1e-9)


def _grid(rng: np.random.Generator, track: Track, difficulty: float) -> np.ndarray:
    """Ink of the printed grid, ``[height, width]`` in [0, 1]: jittered lines, every fifth bold."""
    row, column = np.arange(track.height)[:, None], np.arange(track.width)[None, :]
    pitch, shade = rng.uniform(9, 15), rng.uniform(0.15, 0.45) * (1 + 0.5 * difficulty)
    ink = np.zeros((track.height, track.width))
    across = column + track.skew * (row - track.height / 2)
    for position, size in ((row - track.drift(), track.height), (across, track.width)):
        lines = np.arange(rng.uniform(0, pitch), size, pitch)
        bold = np.arange(len(lines)) % 5 == rng.integers(5)
        lines = lines + rng.normal(0, 0.5 + difficulty, len(lines))
        for line, heavy in zip(lines, bold, strict=True):
            stroke = (1.0 + 0.5 * heavy - np.abs(position - line)).clip(0, 1)
            ink = np.maximum(ink, stroke * shade * (1.4 if heavy else 1.0))
    return ink.clip(0, 1)


@dataclass(frozen=True)
class Wear:
    """What age and handling do to a page.

    fade, breaks: ``[2, width]``, shares of each curve's ink; smudge: ``[height, width]``, share of the
    light that is left; bleed, blur: standard deviations in pixels, of the ink (one a curve) and of the
    scan; grain: standard deviation beside the scanner's.
    """

    fade: np.ndarray
    breaks: np.ndarray
    smudge: np.ndarray
    bleed: np.ndarray
    blur: float
    grain: float


def _wear(rng: np.random.Generator, track: Track, difficulty: float) -> Wear:
    fade = [(0.5 + 0.5 * smooth_noise(rng, 20, track.width)).clip(0, 1) for _ in range(2)]
    breaks = np.ones((2, track.width))
    for curve in breaks:
        for _ in range(rng.poisson(5 * difficulty * track.width / WIDTH)):
            start = rng.integers(track.width)
            curve[start : start + rng.integers(3, 13)] = 0
    smudge = np.ones((track.height, track.width))
    row, column = np.arange(track.height)[:, None], np.arange(track.width)[None, :]
    area = track.height * track.width / (HEIGHT * WIDTH)
    for _ in range(rng.poisson(4 * difficulty * area)):
        height, width = rng.uniform(2, 12), rng.uniform(4, 30)
        middle = rng.uniform(0, track.height), rng.uniform(0, track.width)
        distance = ((row - middle[0]) / height) ** 2 + ((column - middle[1]) / width) ** 2
        smudge *= 1 - rng.uniform(0.1, 0.5) * np.exp(-distance)
    return Wear(
        fade=1 - 0.8 * difficulty * np.stack(fade),
        breaks=breaks,
        smudge=smudge,
        bleed=difficulty * rng.uniform(0, 1, 2),
        blur=0.6 * difficulty,
        grain=0.1 * difficulty,
    )


def draw_page(curves: np.ndarray, rng: np.random.Generator, difficulty: float = 0.0, height: int = HEIGHT) -> Page:
    """Draw ``curves[2, width]``, values in [0, 1], on ``height`` rows; the same generator state gives the same page.

    difficulty: from 0, a clean page, to 1: strokes fade, break and bleed, the grid is darker and less
    even, paper is smudged, grain and blur grow.  It changes the image alone: the mask is that of the
    curves at any difficulty.
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}, expected a number from 0 to 1")
    width = curves.shape[1]
    wear = _wear(rng.spawn(1)[0], Track(height, width), difficulty) if difficulty > 0 else None  # leaves the state as it is
    track = Track(height, width, float(np.tan(np.radians(rng.uniform(-1, 1)))))
    mask = np.zeros((height, width), dtype=np.uint8)
    paper = rng.uniform(0.84, 0.97)
    stains = gaussian_filter(rng.standard_normal((-(-height // 8), -(-width // 8))), 1.5)
    paper = paper + 0.02 * stains.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    clear = 1 - _grid(rng, track, difficulty)  # share of the light that the ink lets through
    for label in (2, 1):  # curve 1 last: it wins the crossings
        distance, along = _distance(track.rows(curves[label - 1]), height)
        stroke = (rng.uniform(1.0, 2.4) + 0.3 * smooth_noise(rng, 8, width)).clip(1, 3)
        ink = (stroke / 2 + 0.5 - distance).clip(0, 1)
        if label == 2:
            period, duty = rng.uniform(7, 11), rng.uniform(0.55, 0.7)
            ink = ink * ((along + rng.uniform(0, period)) % period < duty * period)
        dark, creep = rng.uniform(0.7, 0.95) + 0.06 * smooth_noise(rng, 5, width), rng.uniform(0.3, 0.6)
        if wear:
            ink, dark = ink * wear.breaks[label - 1], dark * wear.fade[label - 1]
            creep += wear.bleed[label - 1]
        bled = 1.25 * gaussian_filter(ink, creep)  # wet ink creeps, edges soften
        clear = clear * (1 - (bled * dark).clip(0, 0.97))
        mask[distance <= stroke / 2] = label
    grain = rng.normal(0, rng.uniform(0.02, 0.05), (height, width))
    light, optics = paper * clear, rng.uniform(0.25, 0.5)  # the scanner's
    if wear:
        light, optics = light * wear.smudge, optics + wear.blur
        grain = np.hypot(1, wear.grain / grain.std()) * grain
    image = gaussian_filter(light, optics) + grain
    specks = rng.random((height, width)) < 5e-4
    image[specks] *= 0.4
    return Page(image.clip(0, 1).astype(np.float32), mask, curves, track)


def augment(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A training pair out of a real window: ``values[n, width]`` to ``[2, width]`` in [0, 1].

    Two different curves, each flipped in value, shrunk and moved at random, both flipped in depth.
    """
    pair = values[rng.permutation(len(values))[:2]]
    for curve in range(2):
        if rng.random() < 0.5:
            pair[curve] = 1 - pair[curve]
        scale = rng.uniform(0.5, 1)
        pair[curve] = pair[curve] * scale + rng.uniform(0, 1 - scale)
    return pair[:, ::-1].copy() if rng.random() < 0.5 else pair
