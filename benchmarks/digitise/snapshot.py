"""What a trained network makes of a crop of a page: what the instrument, the figure and the page, shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .pages import CLASSES

if TYPE_CHECKING:
    from .study import PageSet

SIZE = (96, 128)  # rows and columns


@dataclass(frozen=True)
class Snapshot:
    """image: ``[H, W]`` float in [0, 1]; target: ``[H, W]`` uint8 classes; logits: ``[CLASSES, H, W]`` float16."""

    image: np.ndarray
    target: np.ndarray
    logits: np.ndarray

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Logits ``[1, CLASSES, H, W]`` float64 and target ``[1, H, W]`` int64."""
        return torch.from_numpy(self.logits).double()[None], torch.from_numpy(self.target).long()[None]

    @staticmethod
    def read(path: Path) -> Snapshot:
        """An npz of image, target and logits of any float type; ValueError, with what is wrong, for one that is no snapshot."""
        with np.load(path) as file:
            missing = [key for key in ("image", "target", "logits") if key not in file]
            if missing:
                raise ValueError(f"{path} has no {' and no '.join(missing)}; a snapshot has image, target and logits")
            image, target, logits = file["image"], file["target"], file["logits"]
        if image.ndim != 2 or min(image.shape) < 2:
            raise ValueError(f"image of {path} has shape {list(image.shape)}, expected [H, W] of at least 2 pixels a side")
        if target.shape != image.shape:
            raise ValueError(f"target of {path} has shape {list(target.shape)}, expected that of image, {list(image.shape)}")
        if logits.shape != (CLASSES, *image.shape):
            raise ValueError(f"logits of {path} have shape {list(logits.shape)}, expected {[CLASSES, *image.shape]}")
        if not np.issubdtype(image.dtype, np.floating) or not (0 <= image.min() <= image.max() <= 1):
            raise ValueError(f"image of {path} is {image.dtype} from {image.min()} to {image.max()}, expected floats in [0, 1]")
        if not np.issubdtype(target.dtype, np.integer) or target.min() < 0 or target.max() >= CLASSES or not target.any():
            values = np.unique(target)[:6].tolist()
            raise ValueError(f"target of {path} has values {values}, expected classes 0 to {CLASSES - 1}, a curve among them")
        with np.errstate(over="ignore"):
            half = logits.astype(np.float16)
        if not np.issubdtype(logits.dtype, np.floating) or not np.isfinite(half).all():
            raise ValueError(f"logits of {path} are {logits.dtype}, not all of them finite floats within the range of float16")
        return Snapshot(image, target.astype(np.uint8), half)

    @staticmethod
    def of_page(logits: np.ndarray, of: PageSet, page: int, size: tuple[int, int] = SIZE) -> Snapshot:
        """The crop of a page that shows most of the curve that it shows least of. logits: ``[CLASSES, height, width]``."""
        mask = of.pages.masks[page].numpy()
        counts = [_box_sums(mask == label, size) for label in range(1, CLASSES)]
        row, column = np.unravel_index(np.minimum(*counts).argmax(), counts[0].shape)
        crop = (slice(row, row + size[0]), slice(column, column + size[1]))
        image = (of.pages.images[page, 0].numpy()[crop] / 255).astype(np.float32)
        return Snapshot(image, mask[crop], logits[(slice(None), *crop)])

    def write(self, path: Path) -> None:
        np.savez_compressed(path, image=self.image, target=self.target, logits=self.logits)


def _box_sums(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels in every box of ``size`` that lies within ``mask[H, W]``, by its first pixel; a box no larger than the mask."""
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = (min(one, side) for one, side in zip(size, mask.shape, strict=True))
    return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
