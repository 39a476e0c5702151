"""The network: a small U-Net with a transformer at the bottleneck, after VeerNet (J. Imaging 2023, 9(7):136)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

STAGES = 5  # each halves both sides of the page
DEEP = 128  # channels of the bottleneck, and of no stage more
STRIDE = 2**STAGES  # pixels of a side of the page that become one token


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
    width: channels at the page's own size, a multiple of 4; each stage doubles them, up to ``DEEP``.
    """

    def __init__(self, prior: Tensor, size: tuple[int, int], width: int = 8) -> None:
        super().__init__()
        if any(side % STRIDE or not side for side in size):
            raise ValueError(f"size is {size}, expected multiples of {STRIDE}, the stride of the network's bottleneck")
        if width < 4 or width % 4 or width > DEEP:
            raise ValueError(f"width is {width}, expected a multiple of 4 from 4 to {DEEP}")
        widths = [min(width << stage, DEEP) for stage in range(STAGES)] + [DEEP]
        pairs = list(pairwise(widths))
        self.stem = _block(1, width)
        self.down = nn.ModuleList(_block(wide, narrow, stride=2) for wide, narrow in pairs)
        self.place = nn.Parameter(0.02 * torch.randn(1, size[0] // STRIDE * (size[1] // STRIDE), DEEP))
        layer = nn.TransformerEncoderLayer(
            DEEP, nhead=4, dim_feedforward=2 * DEEP, dropout=0.0, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.up = nn.ModuleList(_block(wide + narrow, wide) for wide, narrow in reversed(pairs))
        self.head = nn.Conv2d(width, len(prior), 1)
        with torch.no_grad():
            self.head.bias.copy_(prior.clamp_min(1e-6).log())

    def forward(self, pages: Tensor) -> Tensor:
        x = self.stem(1 - pages)  # ink is the signal, paper is zero
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        tokens = x.flatten(2).transpose(1, 2)  # [N, H / STRIDE * W / STRIDE, DEEP]
        x = self.transformer(tokens + self.place).transpose(1, 2).reshape(x.shape)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2), skip], dim=1))
        return self.head(x)
