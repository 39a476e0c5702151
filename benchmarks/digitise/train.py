"""Train the network with softmax focal + Lovász-Softmax and clock the loss within the step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import veerloss

from .model import UNet
from .pages import CLASSES, HEIGHT, WIDTH, Page

LEARNING_RATE = 4e-3
REFERENCE_EVERY = 10  # steps between two timings of the reference


@dataclass
class Clock:
    """Seconds per step: whole step, our loss in it, and now and then the reference instead.

    "Loss" is forward and backward down to the gradient of the logits.
    """

    step: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    with_reference: list[tuple[float, float]] = field(default_factory=list)  # (step, loss)

    def ours(self) -> tuple[float, float]:
        """Median milliseconds of the loss, median share of the step in it."""
        shares = [loss / step for step, loss in zip(self.step, self.loss, strict=True)]
        return 1e3 * median(self.loss), median(shares)

    def reference(self) -> tuple[float, float]:
        """As :meth:`ours`, for steps in which the reference had taken the place of our loss."""
        times = self.with_reference
        return 1e3 * median(loss for _, loss in times), median(loss / step for step, loss in times)


def objective(logits: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """Focal loss per curve pixel plus Lovász-Softmax; ``[N, C, H, W]``, ``[N, H, W]`` to a scalar.

    Focal is divided by the number of curve pixels, as RetinaNet divides by its positives: over all
    pixels the paper would make it vanish beside the Lovász term.
    """
    curve_pixels = (target > 0).sum().clamp_min(1)
    focal = veerloss.softmax_focal_loss(logits, target, gamma=2.0, normalizer=curve_pixels, backend=backend)
    return focal + veerloss.lovasz_softmax_loss(logits, target, backend=backend)


def backend() -> str:
    """Which backend "auto" is here: the compiled kernels, or the reference where there are none."""
    try:
        objective(torch.zeros(1, CLASSES, 1), torch.zeros(1, 1, dtype=torch.long), "native")
    except RuntimeError:
        return "reference only"
    return "native"


def _clocked(logits: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor, float]:
    """Loss, its gradient on the logits and the seconds both took; the network is left out."""
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    loss = objective(leaf, target, backend)
    loss.backward()
    return loss.detach(), leaf.grad, time.perf_counter() - start


def train(pages: Sequence[Page], *, steps: int, batch: int, rng: np.random.Generator) -> tuple[UNet, Clock]:
    """Train a fresh network on ``pages`` for at least two steps, the first of which is not clocked.

    The initial weights come from torch's own generator, the order of the pages from ``rng``.
    """
    images = torch.from_numpy(np.stack([page.image for page in pages]))[:, None]
    masks = torch.from_numpy(np.stack([page.mask for page in pages]))
    prior = torch.bincount(masks.flatten(), minlength=CLASSES) / masks.numel()
    # channels_last: network 166 ms instead of 207 a step, 8 pages on two CPU cores
    model = UNet(prior, (HEIGHT, WIDTH)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)

    clock, order = Clock(), np.empty(0, dtype=np.int64)
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for step in bar:
            while len(order) < batch:  # every page once before any page again
                order = np.concatenate([order, rng.permutation(len(pages))])
            chosen, order = order[:batch], order[batch:]
            begin = time.perf_counter()
            target = masks[chosen].long()
            logits = model(images[chosen])
            loss, gradient, loss_seconds = _clocked(logits, target, "auto")
            logits.backward(gradient)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step_seconds = time.perf_counter() - begin
            if step == 0:  # warming up, ours and the reference alike, is not part of any figure
                _clocked(logits, target, "reference")
                continue
            clock.step.append(step_seconds)
            clock.loss.append(loss_seconds)
            if step % REFERENCE_EVERY == 1:
                reference_seconds = _clocked(logits, target, "reference")[2]
                rest = step_seconds - loss_seconds
                clock.with_reference.append((rest + reference_seconds, reference_seconds))
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model, clock


@torch.no_grad()
def predict(model: UNet, pages: Sequence[Page], batch: int = 16) -> np.ndarray:
    """Class probabilities, ``[len(pages), CLASSES, HEIGHT, WIDTH]`` float32."""
    model.eval()
    images = torch.from_numpy(np.stack([page.image for page in pages]))[:, None]
    return torch.cat([model(part).softmax(dim=1) for part in images.split(batch)]).numpy()
