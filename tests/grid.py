"""The shapes, types and layouts that every loss is tested on, and why each is there."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

#: [N, C, *]
SHAPES = [
    (1, 2, 1),  # one pixel
    (3, 2),  # a classifier: no pixels, the batch is the row
    (4, 1, 7),  # one class
    (2, 3, 17),  # below every vector length, and odd
    (1, 19, 64),  # a whole number of vectors
    (2, 5, 31, 33),  # tiles that end inside an image
    (70, 3, 2, 2),  # tiles that span many images
    (2, 4, 3, 5, 7),  # volumes
    (1, 2, 1025),  # one more than the longest tile
    (1, 150, 257),  # short tiles
]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory in different ways."""
    found = {"contiguous": x.contiguous()}
    if x.dim() > 1:
        found["channels_last"] = x.movedim(1, -1).contiguous().movedim(-1, 1)
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        found["every other pixel"] = wide[..., ::2]
    return found


def labels(shape: tuple[int, ...], classes: int, *, ignore_index: int | None = None, seed: int = 0) -> Tensor:
    """int64 class indices [N, *] for logits of ``shape``; every fifth pixel ignored if asked for."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, shape[:1] + shape[2:], generator=generator)
    if ignore_index is not None:
        target.view(-1)[::5] = ignore_index
    return target


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, scale: float = 2.0, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
