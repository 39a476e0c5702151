"""Train the network with one loss, and clock that loss, and another in its place, within the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor

from .arms import ArmLoss
from .model import UNet
from .pages import CLASSES, Page

LEARNING_RATE = 4e-3
OTHER_EVERY = 10  # steps between two timings of the other loss


class Diverged(RuntimeError):
    """The loss or its gradient is not finite any more; the message says at which step."""


@dataclass
class Clock:
    """Seconds per step: whole step, the loss in it, and now and then the other loss instead.

    "Loss" is forward and backward down to the gradient of the logits.
    """

    step: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    with_other: list[tuple[float, float]] = field(default_factory=list)  # (step, loss)

    def own(self) -> tuple[float, float]:
        """Milliseconds of the loss, and its share of the step: medians."""
        shares = [loss / step for step, loss in zip(self.step, self.loss, strict=True)]
        return 1e3 * _middle(self.loss), _middle(shares)

    def other(self) -> tuple[float, float]:
        """As :meth:`own`, for steps in which the other loss had taken the place of the first."""
        return 1e3 * _middle([loss for _, loss in self.with_other]), _middle([loss / step for step, loss in self.with_other])


def _middle(values: Sequence[float]) -> float:
    """The mean of the medians of both halves of a training: a loss may change at half time."""
    half = len(values) // 2
    return (median(values[:half]) + median(values[half:])) / 2 if half else median(values)


@dataclass(frozen=True)
class Pages:
    """Pages as tensors: images ``[P, 1, H, W]`` and masks ``[P, H, W]``, both uint8, as a scanner delivers them."""

    images: Tensor
    masks: Tensor

    @classmethod
    def of(cls, pages: Sequence[Page]) -> Pages:
        images = np.stack([np.rint(255 * page.image).astype(np.uint8) for page in pages])[:, None]
        return cls(torch.from_numpy(images), torch.from_numpy(np.stack([page.mask for page in pages])))

    def __len__(self) -> int:
        return len(self.masks)

    def prior(self) -> Tensor:
        """Share of each class among the pixels, ``[CLASSES]``."""
        return torch.bincount(self.masks.flatten(), minlength=CLASSES) / self.masks.numel()


def images_to(device: torch.device, images: Tensor) -> Tensor:
    return images.to(device).float() / 255


def _clocked(loss: ArmLoss, logits: Tensor, target: Tensor, done: float) -> tuple[Tensor, Tensor, float]:
    """Loss, its gradient on the logits and the seconds both took; the network is left out."""
    leaf = logits.detach().requires_grad_()
    start = _now(logits.device)
    value = loss(leaf, target, done)
    value.backward()
    return value.detach(), leaf.grad, _now(logits.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    pages: Pages,
    loss: ArmLoss,
    *,
    steps: int,
    batch: int,
    rng: np.random.Generator,
    width: int = 8,
    device: str | torch.device = "cpu",
    other: ArmLoss | None = None,
    after_step: Callable[[int, UNet, float], None] | None = None,
) -> tuple[UNet, Clock]:
    """Train a fresh network on ``pages`` for at least two steps, the first of which is not clocked.

    The initial weights come from torch's own generator, the order of the pages from ``rng``. other: a
    loss to be clocked now and then in the place of ``loss``; it does not train. after_step: called with
    the number of steps done, the network and the loss. Raises Diverged.
    """
    device = torch.device(device)
    # channels_last: network 166 ms instead of 207 a step, 8 pages on two CPU cores
    model = UNet(pages.prior(), tuple(pages.masks.shape[1:]), width).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    clock, order = Clock(), np.empty(0, dtype=np.int64)
    for step in range(steps):
        while len(order) < batch:  # every page once before any page again
            order = np.concatenate([order, rng.permutation(len(pages))])
        chosen, order = torch.from_numpy(order[:batch]), order[batch:]
        begin, done = _now(device), step / steps
        target = pages.masks[chosen].to(device).long()
        logits = model(images_to(device, pages.images[chosen]))
        value, gradient, loss_seconds = _clocked(loss, logits, target, done)
        if not (value.isfinite() and gradient.isfinite().all()):
            raise Diverged(f"the loss or its gradient is not finite at step {step + 1} of {steps}")
        logits.backward(gradient)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step_seconds = _now(device) - begin
        if step == 0:  # warming up, one loss and the other alike, is not part of any figure
            if other:
                _clocked(other, logits, target, done)
        else:
            clock.step.append(step_seconds)
            clock.loss.append(loss_seconds)
            if other and step % OTHER_EVERY == 1:
                other_seconds = _clocked(other, logits, target, done)[2]
                clock.with_other.append((step_seconds - loss_seconds + other_seconds, other_seconds))
        if after_step:
            after_step(step + 1, model, value.item())
    return model, clock


@torch.no_grad()
def predict(
    model: UNet,
    images: Tensor,
    activation: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=1),
    batch: int = 16,
) -> np.ndarray:
    """Class probabilities ``[P, CLASSES, H, W]`` float32 of images ``[P, 1, H, W]`` uint8."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found = [activation(model(images_to(device, part))).cpu() for part in images.split(batch)]
    model.train(was_training)
    return torch.cat(found).numpy()
