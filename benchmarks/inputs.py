"""Seeded logits and targets for every task."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a loss is run on.

    `kind` is "random" (normal logits times `scale`) or "trained" (8 on the target's class, 0
    elsewhere, plus unit noise; 5% of the pixels show a class drawn at random instead), because the
    work of sorting depends on how errors are spread. A binary "trained" logit is +4 or -4 plus
    noise. `fg_share` is the share of class 1 where there are two classes; one class is the foreground alone.
    """

    task: str
    shape: tuple[int, ...]
    kind: str = "random"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    fg_share: float = 0.3
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Contiguous float32 with random logits: the inputs that the bars speak of."""
        return (self.dtype, self.channels_last, self.kind) == (torch.float32, False, "random")

    def __str__(self) -> str:
        parts = [self.task, str(list(self.shape)), str(self.dtype).removeprefix("torch.")]
        if self.channels_last:
            parts.append("channels_last")
        parts.append(self.kind)
        return " ".join(parts)

    def make(self, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Logits of `shape` and dtype (a leaf that wants a gradient), and the task's target."""
        g = torch.Generator(device).manual_seed(seed)
        drawn = {"generator": g, "device": device}
        binary = self.task == "lovasz_hinge"
        pixels = self.shape if binary else (self.shape[0], *self.shape[2:])
        if binary or self.shape[1] <= 2:
            target = (torch.rand(pixels, **drawn) < self.fg_share).long()
        else:
            target = torch.randint(self.shape[1], pixels, **drawn)
        noise = torch.randn(self.shape, **drawn)
        logits = noise * self.scale
        if self.kind == "trained":
            wrong = torch.randint(2 if binary else self.shape[1], pixels, **drawn)
            shown = torch.where(torch.rand(pixels, **drawn) < 0.05, wrong, target)
            logits = 4.0 * (2 * shown - 1) + noise if binary else _peak(noise, shown)
        if self.task == "sigmoid_focal":
            dense = target[:, None]
            if self.shape[1] > 1:
                dense = torch.zeros(self.shape, device=device).scatter_(1, dense, 1.0)
            target = dense.to(self.dtype)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        logits = logits.to(self.dtype).contiguous(memory_format=layout)
        if self.task == "sigmoid_focal":
            target = target.contiguous(memory_format=layout)
        return logits.requires_grad_(), target


#: What is measured, and how: the rows of a workload.
Job = tuple[Inputs, Callable[[], list[dict]]]


def _peak(noise: Tensor, shown: Tensor) -> Tensor:
    return noise.scatter_add(1, shown[:, None], noise.new_full((), 8.0).expand_as(shown[:, None]))
