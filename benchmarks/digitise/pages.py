"""Draw a raster page and its class mask from two curves.

A page is grey, 1 is white paper.  Depth runs along the columns, one sample per column; the value
runs up the rows.  Curve 1 is a solid stroke, curve 2 a dashed one, as on paper logs; nothing else
tells them apart.  The mask runs through the gaps of the dashes, since the curve does.

Where the strokes cross, a pixel belongs to both curves but has one class.  Draw order decides:
curve 1 is drawn last and takes the pixel, and curve 2 has a hole there that the recovery bridges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

HEIGHT, WIDTH = 128, 192  # pixels
MARGIN = 10  # rows kept free above 1 and below 0, room for skew and stroke
CLASSES = 3  # background, curve 1, curve 2
REACH = 3  # columns; no stroke of 3 px reaches further from its centreline


@dataclass(frozen=True)
class Page:
    """A drawn page.

    image: ``[HEIGHT, WIDTH]`` float32 in [0, 1]; mask: ``[HEIGHT, WIDTH]`` uint8 classes;
    curves: ``[2, WIDTH]`` the values drawn, in [0, 1]; skew: rows per column, positive downhill.
    """

    image: np.ndarray
    mask: np.ndarray
    curves: np.ndarray
    skew: float


def _drift(skew: float) -> np.ndarray:
    """Rows by which skew moves each column, zero at the middle of the page: ``[WIDTH]``."""
    return skew * (np.arange(WIDTH) - (WIDTH - 1) / 2)


def rows_from_values(values: np.ndarray, skew: float) -> np.ndarray:
    """Row of the centreline in every column, fractional: ``[..., WIDTH]`` to ``[..., WIDTH]``."""
    return MARGIN + (1 - values) * (HEIGHT - 1 - 2 * MARGIN) + _drift(skew)


def values_from_rows(rows: np.ndarray, skew: float) -> np.ndarray:
    """Inverse of :func:`rows_from_values`.

    It takes the page's frame and skew as known, as they are once the corners of a track have been
    marked on a scan; finding them is another task.
    """
    return 1 - (rows - _drift(skew) - MARGIN) / (HEIGHT - 1 - 2 * MARGIN)


def _distance(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every pixel to the polyline ``rows[WIDTH]`` and the arc length of the nearest
    point on it, both ``[HEIGHT, WIDTH]`` in pixels; exact up to a distance of ``REACH``."""
    step = np.diff(rows)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(1.0, step))])
    rows, arc = np.pad(rows, REACH, mode="edge"), np.pad(arc, REACH, mode="edge")
    pixel = np.arange(HEIGHT, dtype=np.float32)[:, None]
    nearest = np.full((HEIGHT, WIDTH), np.inf, dtype=np.float32)
    along = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    for k in range(-REACH, REACH):  # the segment from column c + k to c + k + 1
        left = slice(k + REACH, k + REACH + WIDTH)
        right = slice(k + REACH + 1, k + REACH + 1 + WIDTH)
        start, rise = rows[left].astype(np.float32), (rows[right] - rows[left]).astype(np.float32)
        below = pixel - start
        t = ((below * rise - k) / (1 + rise * rise)).clip(0, 1)
        squared = (k + t) ** 2 + (t * rise - below) ** 2
        closer = squared < nearest
        nearest = np.where(closer, squared, nearest)
        length = (arc[right] - arc[left]).astype(np.float32)
        along = np.where(closer, arc[left].astype(np.float32) + t * length, along)
    return np.sqrt(nearest), along


def _smooth_noise(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Noise of unit variance along the columns, correlated over ``scale`` columns: ``[WIDTH]``."""
    noise = gaussian_filter1d(rng.standard_normal(WIDTH), scale, mode="wrap")
    return noise / (noise.std() + 1e-9)


def _grid(rng: np.random.Generator, skew: float) -> np.ndarray:
    """Ink of the printed grid, ``[HEIGHT, WIDTH]`` in [0, 1]: jittered lines, every fifth bold."""
    row, column = np.arange(HEIGHT)[:, None], np.arange(WIDTH)[None, :]
    pitch, shade = rng.uniform(9, 15), rng.uniform(0.15, 0.45)
    ink = np.zeros((HEIGHT, WIDTH))
    tilted = ((row - _drift(skew), HEIGHT), (column + skew * (row - HEIGHT / 2), WIDTH))
    for position, size in tilted:
        lines = np.arange(rng.uniform(0, pitch), size, pitch)
        bold = np.arange(len(lines)) % 5 == rng.integers(5)
        lines = lines + rng.normal(0, 0.5, len(lines))
        for line, heavy in zip(lines, bold, strict=True):
            stroke = (1.0 + 0.5 * heavy - np.abs(position - line)).clip(0, 1)
            ink = np.maximum(ink, stroke * shade * (1.4 if heavy else 1.0))
    return ink.clip(0, 1)


@dataclass(frozen=True)
class Wear:
    """What age and handling do to a page.

    fade, breaks: ``[2, WIDTH]``, shares of each curve's ink; smudge: ``[HEIGHT, WIDTH]``, share of the
    light that is left; grain: standard deviation beside the scanner's; blur: standard deviation, pixels.
    """

    fade: np.ndarray
    breaks: np.ndarray
    smudge: np.ndarray
    grain: float
    blur: float


def _wear(rng: np.random.Generator, difficulty: float) -> Wear:
    fade = 1 - 0.75 * difficulty * np.stack([(0.5 + 0.5 * _smooth_noise(rng, 20)).clip(0, 1) for _ in range(2)])
    breaks = np.ones((2, WIDTH))
    for curve in breaks:
        for _ in range(rng.poisson(5 * difficulty)):
            start = rng.integers(WIDTH)
            curve[start : start + rng.integers(3, 13)] = 0
    smudge = np.ones((HEIGHT, WIDTH))
    row, column = np.arange(HEIGHT)[:, None], np.arange(WIDTH)[None, :]
    for _ in range(rng.poisson(4 * difficulty)):
        height, width = rng.uniform(2, 12), rng.uniform(4, 30)
        distance = ((row - rng.uniform(0, HEIGHT)) / height) ** 2 + ((column - rng.uniform(0, WIDTH)) / width) ** 2
        smudge *= 1 - rng.uniform(0.1, 0.5) * np.exp(-distance)
    return Wear(fade, breaks, smudge, grain=0.08 * difficulty, blur=0.6 * difficulty)


def draw_page(curves: np.ndarray, rng: np.random.Generator, difficulty: float = 0.0) -> Page:
    """Draw ``curves[2, WIDTH]``, values in [0, 1]; the same generator state gives the same page.

    difficulty: from 0, a clean page, to 1: strokes fade and break, paper is smudged, grain and blur
    grow.  It changes the image alone: the mask is that of the curves at any difficulty.
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}, expected a number from 0 to 1")
    wear = _wear(rng.spawn(1)[0], difficulty) if difficulty > 0 else None  # leaves the state as it is
    skew = np.tan(np.radians(rng.uniform(-1, 1)))
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    paper = rng.uniform(0.84, 0.97) + 0.02 * gaussian_filter(rng.standard_normal((HEIGHT // 8, WIDTH // 8)), 1.5).repeat(
        8, axis=0
    ).repeat(8, axis=1)
    clear = 1 - _grid(rng, skew)  # share of the light that the ink lets through
    for label in (2, 1):  # curve 1 last: it wins the crossings
        distance, along = _distance(rows_from_values(curves[label - 1], skew))
        width = (rng.uniform(1.0, 2.4) + 0.3 * _smooth_noise(rng, 8)).clip(1, 3)
        ink = (width / 2 + 0.5 - distance).clip(0, 1)
        if label == 2:
            period, duty = rng.uniform(7, 11), rng.uniform(0.55, 0.7)
            ink = ink * ((along + rng.uniform(0, period)) % period < duty * period)
        dark = rng.uniform(0.7, 0.95) + 0.06 * _smooth_noise(rng, 5)
        if wear:
            ink, dark = ink * wear.breaks[label - 1], dark * wear.fade[label - 1]
        bled = 1.25 * gaussian_filter(ink, rng.uniform(0.3, 0.6))  # wet ink creeps, edges soften
        clear = clear * (1 - (bled * dark).clip(0, 0.97))
        mask[distance <= width / 2] = label
    grain = rng.normal(0, rng.uniform(0.02, 0.05), (HEIGHT, WIDTH))
    light, optics = paper * clear, rng.uniform(0.25, 0.5)  # the scanner's
    if wear:
        light, optics = light * wear.smudge, optics + wear.blur
        grain = np.hypot(1, wear.grain / grain.std()) * grain
    image = gaussian_filter(light, optics) + grain
    specks = rng.random((HEIGHT, WIDTH)) < 5e-4
    image[specks] *= 0.4
    return Page(image.clip(0, 1).astype(np.float32), mask, curves, float(skew))


def augment(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A training pair out of a real window: ``values[n, WIDTH]`` to ``[2, WIDTH]`` in [0, 1].

    Two different curves, each flipped in value, shrunk and moved at random, both flipped in depth.
    """
    pair = values[rng.permutation(len(values))[:2]]
    for curve in range(2):
        if rng.random() < 0.5:
            pair[curve] = 1 - pair[curve]
        scale = rng.uniform(0.5, 1)
        pair[curve] = pair[curve] * scale + rng.uniform(0, 1 - scale)
    return pair[:, ::-1].copy() if rng.random() < 0.5 else pair
