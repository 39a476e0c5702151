"""The network: a small U-Net with a transformer at the bottleneck."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (8, 16, 32, 64)  # channels at full, 1/2, 1/4 and 1/8 of the page's size


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions with GroupNorm; only the first has the stride."""
    layers: list[nn.Module] = []
    for source, step in ((inputs, stride), (outputs, 1)):
        layers += [
            nn.Conv2d(source, outputs, 3, stride=step, padding=1, bias=False),
            nn.GroupNorm(outputs // 4, outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Grey pages ``[N, 1, H, W]`` in [0, 1] to logits ``[N, C, H, W]``; (H, W) is ``size``.

    prior: the share of each class among the pixels, ``[C]``.  The last bias starts at its
    logarithm, so that training does not spend its first steps on learning that paper is empty.
    """

    def __init__(self, prior: Tensor, size: tuple[int, int]) -> None:
        super().__init__()
        deep = WIDTHS[-1]
        if any(side % 8 for side in size):
            raise ValueError(f"both sides of a page must be multiples of 8, got {size}")
        self.stem = _block(1, WIDTHS[0])
        pairs = list(pairwise(WIDTHS))
        self.down = nn.ModuleList(_block(wide, narrow, stride=2) for wide, narrow in pairs)
        self.place = nn.Parameter(0.02 * torch.randn(1, size[0] // 8 * (size[1] // 8), deep))
        layer = nn.TransformerEncoderLayer(
            deep, nhead=4, dim_feedforward=2 * deep, dropout=0.0, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.up = nn.ModuleList(_block(wide + narrow, wide) for wide, narrow in reversed(pairs))
        self.head = nn.Conv2d(WIDTHS[0], len(prior), 1)
        with torch.no_grad():
            self.head.bias.copy_(prior.clamp_min(1e-6).log())

    def forward(self, pages: Tensor) -> Tensor:
        x = self.stem(1 - pages)  # ink is the signal, paper is zero
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        tokens = x.flatten(2).transpose(1, 2)  # [N, H/8 * W/8, 64]
        x = self.transformer(tokens + self.place).transpose(1, 2).reshape(x.shape)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2), skip], dim=1))
        return self.head(x)
