"""Gradients of the losses, and something to take them of: a drawn page, and predictions made up for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

import veerloss

from . import arms, pages

FIVE = tuple(name for name, arm in arms.ARMS.items() if arm.group == "main")
SLOPES = {"early": 0.5, "middle": 1.0, "late": 2.0}  # of the logits by the distance to an edge, per pixel


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """An arm's loss as a function of logits and target alone."""
    return lambda logits, target: arms.ARMS[name].loss(logits, target, 0.0)


def gradient(loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, target: Tensor) -> Tensor:
    """dL/d inputs, of the shape of ``inputs``."""
    inputs = inputs.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(inputs, target), inputs)[0]


def push(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """How hard a loss pushes each pixel: the sum over classes of |dL/d logit|, [N, C, H, W] to [N, H, W]."""
    return gradient(loss_of(name), logits, target).abs().sum(1)


def focal_ratio(p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal over cross-entropy, of loss and of gradient, for the target's probabilities ``p`` [P] of two classes: [P], [P]."""
    logits, target = torch.stack([p.logit(), torch.zeros_like(p)], 1), torch.zeros(len(p), dtype=torch.long)

    def both(g: float) -> tuple[Tensor, Tensor]:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            return veerloss.softmax_focal_loss(x, y, gamma=g, reduction="none")

        return loss(logits, target), gradient(lambda x, y: loss(x, y).sum(), logits, target)[:, 0]

    focal, ce = both(gamma), both(0.0)
    return focal[0] / ce[0], focal[1] / ce[1]


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels to the edge of a mask [H, W]: positive inside, negative outside, half a pixel next to the edge."""
    return np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask))


def prediction(mask: np.ndarray, slope: float, seed: int = 0) -> Tensor:
    """Plausible logits [1, 3, H, W] for a page's mask [H, W]; see the module's docstring."""
    noise = np.random.default_rng(seed).standard_normal((pages.CLASSES, *mask.shape))
    logits = np.stack([np.clip(slope * signed_distance(mask == c), -6, 6) for c in range(pages.CLASSES)]) + noise
    logits[1, :, 60:72] -= 6 * slope  # missed
    logits[0, 50:56, 100:120] -= 4 * slope  # taken for curve 2
    logits[2, 50:56, 100:120] += 4 * slope
    return torch.from_numpy(logits)[None]


@dataclass(frozen=True)
class Scene:
    """The page that is measured on. mask: [H, W]; target: [1, H, W]; logits: by stage, [1, 3, H, W]."""

    mask: np.ndarray
    target: Tensor
    logits: dict[str, Tensor]

    @property
    def latest(self) -> Tensor:
        """Logits of the last stage."""
        return list(self.logits.values())[-1]

    def confidence(self, stage: str) -> Tensor:
        """The target's probability, [1, H, W]."""
        return self.logits[stage].softmax(1).gather(1, self.target[:, None])[:, 0]


def scene() -> Scene:
    turn = np.linspace(0, 3 * np.pi, pages.WIDTH)
    curves = np.stack([0.75 + 0.15 * np.sin(turn), 0.25 + 0.15 * np.cos(turn)])
    mask = pages.draw_page(curves, np.random.default_rng(0)).mask
    target = torch.from_numpy(mask.astype(np.int64))[None]
    return Scene(mask, target, {stage: prediction(mask, slope) for stage, slope in SLOPES.items()})


def mean_iou(predicted: np.ndarray, mask: np.ndarray) -> float:
    """Over the classes, all of which ``mask`` has."""
    pairs = [(predicted == c, mask == c) for c in range(pages.CLASSES)]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))


def lovasz_weights(logits: Tensor, target: Tensor) -> Tensor:
    """|dL/dp| of the sum of the classes' Lovász losses, [N, C, H, W]: each class's add up to 1."""

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return veerloss.lovasz_softmax_loss(p, y, from_logits=False, reduction="sum")

    return gradient(loss, logits.softmax(1), target).abs()
