"""One self-contained page on which the gradients of five losses can be turned: ``docs/instrument.html``.

    python -m benchmarks.digitise.instrument_page [--snapshot SNAPSHOT] [--out OUT]

The page embeds a snapshot (a crop of a page, its target, the logits of a network) and recomputes every gradient in the
browser, in float64. What it shows at six settings of its sliders is computed here as well, by veerloss and MONAI through
``arms.py``, and embedded: the page compares the two and says by how much they differ.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import veerloss
from veerloss.reference.lovasz import lovasz_weights

from . import arms
from .pages import CLASSES
from .snapshot import Snapshot
from .well import CACHE

HERE = Path(__file__).parent
TEMPLATE = HERE / "instrument_page.html"
SNAPSHOT = CACHE / "study" / "study-snapshot.npz"  # of `make study`
OUT = HERE.parents[1] / "docs" / "instrument.html"
PLACEHOLDER = "@DATA@"

#: Of the plot by confidence: edges in log(p_t / (1 - p_t)). No binary fraction, on which differences of float16 logits may lie.
CONFIDENCE_EDGES = np.linspace(-8, 8, 33) + 0.01
RANK_BINS = 28  # of the plot by rank, evenly in the logarithm


@dataclass(frozen=True)
class Setting:
    """Where the sliders stand.

    gamma: of focal; fp, fn: Tversky's weights of false positives and false negatives; confidence: factor of the logits;
    width: pixels by which the curves of the target are wider than drawn, see :func:`widen`.
    """

    gamma: float = arms.GAMMA
    fp: float = arms.TVERSKY[0]
    fn: float = arms.TVERSKY[1]
    confidence: float = 1.0
    width: int = 0


#: Where page and library are compared: the defaults, and the ends and the middle of every slider.
CHECKED = (
    Setting(),
    Setting(gamma=0.0, fp=0.5, fn=0.5, confidence=0.25, width=-1),
    Setting(gamma=5.0, fp=0.7, fn=0.3, confidence=4.0, width=3),
    Setting(gamma=0.5, fp=0.1, fn=0.9, confidence=2.0, width=1),
    Setting(gamma=1.0, fp=1.0, fn=0.0, confidence=0.5, width=2),
    Setting(gamma=3.5, fp=0.0, fn=1.0, confidence=1.5, width=0),
)

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(setting: Setting) -> dict[str, Loss]:
    """The five losses of the page; each takes logits ``[1, C, H, W]`` and a target ``[1, H, W]``."""
    return {
        "Dice": arms.dice,
        "Tversky": lambda logits, target: arms.tversky(logits, target, (setting.fp, setting.fn)),
        "Lovász": arms.lovasz,
        "Focal": lambda logits, target: arms.focal(logits, target, gamma=setting.gamma),
        "SCE": arms.sce,
    }


# ------------------------------------------------------------------ what the page computes too


def disc(width: int) -> list[tuple[int, int]]:
    """Steps (rows, columns) to the pixels of a disc of diameter ``width + 1`` pixels; for an odd ``width`` its centre is half
    a pixel below and to the right."""
    low, centre = -(width // 2), (width % 2) / 2
    reach = range(low, low + width + 1)
    return [(y, x) for y in reach for x in reach if 4 * ((y - centre) ** 2 + (x - centre) ** 2) <= (width + 1) ** 2]


def widen(target: np.ndarray, width: int) -> np.ndarray:
    """The target ``[H, W]`` with curves that are ``width`` pixels wider than drawn, from -1.

    Wider: each curve is dilated with :func:`disc`; where both come to lie, curve 1 is on top, as on the page. Narrower: the
    lowest pixel of every vertical run of a curve goes, unless it is the run's only one.
    """
    if width < 0:
        above, below = np.pad(target, ((1, 0), (0, 0)))[:-1], np.pad(target, ((0, 1), (0, 0)))[1:]
        return np.where((target == above) & (target != below), 0, target)
    result = np.zeros_like(target)
    rows, columns = target.shape
    for label in (2, 1):
        padded = np.pad(target == label, width)
        for y, x in disc(width):
            result[padded[width - y : width - y + rows, width - x : width - x + columns]] = label
    return result


def regions(target: np.ndarray) -> dict[str, np.ndarray]:
    """Masks ``[H, W]``: curve and background are all pixels; edge are those of both with one of another class above, below,
    to the left or to the right."""
    edge = np.zeros(target.shape, dtype=bool)
    down, across = target[1:] != target[:-1], target[:, 1:] != target[:, :-1]
    for near, far, step in ((edge[1:], edge[:-1], down), (edge[:, 1:], edge[:, :-1], across)):
        near |= step
        far |= step
    return {"curve": target > 0, "edge": edge, "background": target == 0}


def rank_edges(pixels: int) -> list[int]:
    """Bins of ranks, even in the logarithm: bin k holds the ranks from edge k on and below edge k + 1. The first rank is 1."""
    edges = np.round((pixels + 1) ** np.linspace(0, 1, RANK_BINS + 1)).astype(int)
    return np.unique(edges).tolist()


def distinct_slopes(name: str, setting: Setting, probabilities: Tensor, target: Tensor) -> list[int] | None:
    """How many values dL/dp has over the pixels, per class; ``[C, H, W]``, ``[H, W]``. None for losses of each pixel by itself.

    That of Lovász is its weight: positive on other pixels, negative on those of the class.
    """
    if name in ("Focal", "SCE"):
        return None
    classes = torch.arange(CLASSES)[:, None]
    foreground = target.flatten() == classes
    p = probabilities.flatten(1)
    if name == "Lovász":
        others = torch.stack([p[classes.flatten() != label].sum(0) for label in range(CLASSES)])
        weights = lovasz_weights(torch.where(foreground, others, p), foreground, torch.ones_like(foreground))
        slopes = torch.where(foreground, -weights, weights) * foreground.any(1, keepdim=True)
    else:
        from monai.losses import DiceLoss, TverskyLoss

        loss = DiceLoss() if name == "Dice" else TverskyLoss(alpha=setting.fp, beta=setting.fn)
        leaf = p[None].clone().requires_grad_()
        (slopes,) = torch.autograd.grad(loss(leaf, foreground[None].to(p.dtype)), leaf)
        slopes = slopes[0]
    return [len(torch.unique(row)) for row in slopes]


def numbers(snapshot: Snapshot, setting: Setting) -> dict[str, dict]:
    """What the page has to show at a setting, by the library, in float64; for each loss:

    value; l1: the sum of |dL/dlogits|; curve, edge, background: their shares of it; projection: the sum of the gradient
    times cos(0), cos(1), ... in the order [C, H, W]; pixel, gradient: where it is largest, and the C values there;
    by_confidence, by_rank: mean |gradient| of a bin's pixels, in multiples of the mean over all, None for empty bins;
    distinct: see :func:`distinct_slopes`.
    """
    labels = widen(snapshot.target, setting.width)
    target = torch.from_numpy(labels).long()
    logits = torch.from_numpy(snapshot.logits).double() * setting.confidence
    masks = {name: torch.from_numpy(mask).flatten() for name, mask in regions(labels).items()}
    p = logits.softmax(0)
    hot = target == torch.arange(CLASSES)[:, None, None]
    p_t, others = (torch.where(mask, p, 0).sum(0).flatten() for mask in (hot, ~hot))
    confidence = torch.bucketize((p_t / others).log(), torch.from_numpy(CONFIDENCE_EDGES)[1:-1], right=True)
    rank = torch.empty_like(confidence)
    edges = torch.tensor(rank_edges(target.numel()))
    rank[others.argsort(descending=True, stable=True)] = torch.bucketize(torch.arange(len(rank)) + 1, edges[1:-1], right=True)
    wave = torch.arange(logits.numel(), dtype=torch.float64).cos()

    result = {}
    for name, loss in losses(setting).items():
        leaf = logits[None].clone().requires_grad_()
        value = loss(leaf, target[None])
        gradient = torch.autograd.grad(value, leaf)[0].flatten(2)[0]
        size = gradient.abs().sum(0)
        l1, pixel = size.sum(), int(size.argmax())
        result[name] = {
            "value": value.item(),
            "l1": l1.item(),
            **{region: (size[mask].sum() / l1).item() for region, mask in masks.items()},
            "projection": (gradient.flatten() * wave).sum().item(),
            "pixel": pixel,
            "gradient": gradient[:, pixel].tolist(),
            "by_confidence": _means(size / size.mean(), confidence, len(CONFIDENCE_EDGES) - 1),
            "by_rank": _means(size / size.mean(), rank, len(edges) - 1),
            "distinct": distinct_slopes(name, setting, p, target),
        }
    return result


def _means(values: Tensor, bins: Tensor, count: int) -> list[float | None]:
    pixels = torch.bincount(bins, minlength=count)
    sums = torch.bincount(bins, values, minlength=count)
    return [float(f"{total / n:.12g}") if n else None for total, n in zip(sums.tolist(), pixels.tolist(), strict=True)]


# ------------------------------------------------------------------ the page


def page_data(snapshot: Snapshot, claims: Sequence | None) -> dict:
    """All that the page knows, ready for JSON; arrays as base64 of little-endian float16 and of uint8."""
    return {
        "version": veerloss.__version__,
        "shape": snapshot.logits.shape,
        "image": _base64((255 * snapshot.image).round().astype(np.uint8)),
        "target": _base64(snapshot.target),
        "logits": _base64(snapshot.logits.astype("<f2")),
        "smoothing": arms.SMOOTHING,
        "defaults": asdict(Setting()),
        "confidence_edges": CONFIDENCE_EDGES.tolist(),
        "rank_edges": rank_edges(snapshot.target.size),
        "checks": [{"setting": asdict(setting), "losses": numbers(snapshot, setting)} for setting in CHECKED],
        "claims": claims
        and [{key: str(getattr(row, key)) for key in ("claim", "verdict", "measured", "shown_by")} for row in claims],
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def build(snapshot: Path, out: Path, claims: Sequence | None) -> None:
    """Write the page of a snapshot to ``out``.

    claims: as `claims.measure` finds them, of which claim, verdict, measured and shown_by are shown; None leaves them out.
    """
    data = json.dumps(page_data(Snapshot.read(snapshot), claims), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACEHOLDER)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(before + data.replace("<", "\\u003c") + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digitise.instrument_page", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--snapshot", type=Path, default=SNAPSHOT, help="npz of image, target and logits")
    parser.add_argument("--out", type=Path, default=OUT, help="the page")
    options = parser.parse_args(arguments)
    if not options.snapshot.exists():
        parser.error(f"there is no snapshot {options.snapshot}; `make study` makes one")
    from .claims import measure  # takes scipy, and seconds

    build(options.snapshot, options.out, measure())
    print(f"{options.out}: {options.out.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
