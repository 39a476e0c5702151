"""Method "histogram" of the Lovász losses: weights from counts by error, without sorting. The specification of csrc/bins.h.

The weight of a pixel depends only on how many foreground and background pixels have a larger error. So errors are counted in
bins. A first count, in fixed cells, tells each cell's share of the loss's weight; the more it has, the more bins it gets. A
second count is in these bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _layout as layout


def cells(bounded: bool) -> int:
    """How many cells there are; `bounded` errors are at most 1."""
    return layout.BOUNDED_CELLS if bounded else layout.UNBOUNDED_CELLS


def cells_of(errors: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """The cell of each error, and where in the cell it is, of 2**15 positions. Any shape; int64."""
    errors = errors.float()
    mirrored = (errors > 0.5) & bounded
    bits = (torch.where(mirrored, 1 - errors, errors) + layout.CELL_OFFSET).view(torch.int32).long() - layout.CELL_ORIGIN
    wide = (bits >= layout.NARROW_END) & (not bounded)
    above = bits - layout.NARROW_END
    cell = torch.where(wide, layout.NARROW_CELLS + (above >> (layout.CELL_BITS + layout.WIDE_SHIFT)), bits >> layout.CELL_BITS)
    position = (torch.where(wide, above >> layout.WIDE_SHIFT, bits) >> layout.POSITION_SHIFT) % (1 << layout.POSITION_BITS)
    cell = torch.where(mirrored, cells(bounded) - 1 - cell, cell)
    position = torch.where(mirrored, (1 << layout.POSITION_BITS) - 1 - position, position)
    return cell.clamp(0, cells(bounded) - 1), position


def cell_edges(bounded: bool, device: torch.device | None = None) -> Tensor:
    """[cells + 1] float64: where each cell begins, and the last ends."""
    cell = torch.arange(layout.HALF_CELLS + 1 if bounded else cells(False) + 1, device=device)
    bits = torch.where(
        cell < layout.NARROW_CELLS,
        cell << layout.CELL_BITS,
        layout.NARROW_END + ((cell - layout.NARROW_CELLS) << (layout.CELL_BITS + layout.WIDE_SHIFT)),
    )
    edges = (bits + layout.CELL_ORIGIN).int().view(torch.float32).double().clamp(max=2.0**128) - layout.CELL_OFFSET
    return torch.cat([edges, 1 - edges[:-1].flip(0)]) if bounded else edges


@dataclass
class Bins:
    """Weights of the pixels in bins of errors, from the counts alone; [bins] float64, in the order of the counts."""

    fg: Tensor
    bg: Tensor
    step: Tensor  # of the Jaccard loss over the bin
    fg_bound: Tensor  # on the sum over its foreground of |this weight - exact weight|
    bg_bound: Tensor  # the same of its background

    @property
    def bound(self) -> Tensor:
        return self.fg_bound + self.bg_bound


def weigh(fg: Tensor, bg: Tensor, total: Tensor) -> Bins:
    """Weights from the counts of foreground and background in each bin, the smallest errors first.

    With G = `total` > 0 foreground pixels, and F, B foreground and background pixels in the bins of larger errors, any order of
    a bin's f and b pixels is a subgradient of the loss of the rounded errors. These weights are the mean of "foreground first"
    and "background first"; they add up to the step of the Jaccard loss over the bin.
    """
    f, b, total = fg.double(), bg.double(), total.double()
    left = total - (f.flip(0).cumsum(0).flip(0) - f)  # G - F
    first = total + (b.flip(0).cumsum(0).flip(0) - b)  # G + B
    last = first + b
    at_fg = (1 / first + 1 / last) / 2
    at_bg = (left + (left - f)) / 2 / (first * last)

    # Exact weights of the foreground are between 1 / first and 1 / last. That of the background pixel with j others of its bin
    # before it is between low and high, which have the same form:
    #   high(j) = left / ((first + j)(first + j + 1)),  low(j) = (left - f) / ((first + j)(first + j + 1)).
    # high is further from at_bg for j < turn, low for the others; their sums telescope.
    turn = (((1 + 4 * first * last).sqrt() - 1) / 2 - first + 1).floor()
    high = left * turn / (first * (first + turn)) - turn * at_bg
    low = (b - turn) * at_bg - (left - f) * (b - turn) / ((first + turn) * last)
    return Bins(at_fg, at_bg, f * at_fg + b * at_bg, f * b / (2 * first * last), high + low)


def allocate_bins(fg: Tensor, bg: Tensor, total: Tensor, bounded: bool) -> Tensor:
    """[cells] int64: the bins that each cell gets, from the counts in the cells.

    s bins divide the mean square error that a cell makes by s**2; the sum over the cells is least where s goes by the cube root
    of that error. Half of the bins are allocated for the error of the gradient, half for that of the loss.
    """
    result, edges, f, b = weigh(fg, bg, total.clamp(min=1)), cell_edges(bounded, fg.device), fg.double(), bg.double()
    error = (edges[:-1] + edges[1:]).clamp(max=2) / 2
    slope = error * (1 - error) if bounded else 1  # of the gradient of a logit, over the weight
    of_gradient = slope**2 * (result.fg_bound**2 / f.clamp(min=1) + result.bg_bound**2 / b.clamp(min=1))
    of_loss = (f * result.fg**2 + b * result.bg**2) * edges.diff() ** 2 / 12
    share = torch.zeros_like(f)
    for square in (of_gradient, of_loss):
        root = square.clamp(min=0) ** (1 / 3)
        share += root / root.sum() / 2 if root.sum() > 0 else 0
    return 1 + (share * layout.BIN_BUDGET * (1 - 1e-12)).long()


def segment(
    errors: Tensor, foreground: Tensor, bounded: bool, all_reduce: Callable[[Tensor, str], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment, by counts that `all_reduce(counts, "sum" or "max")` adds up over ranks.

    Args:
        errors: [P] of the valid pixels; they count as float32.
        foreground: [P] bool.
        bounded: errors are at most 1.

    Returns:
        (weights [P], loss, bound), float64. The bound is on the sum of |weight - exact weight| over the pixels of error > 0;
        the others have no influence on the loss and weight 0.
    """
    errors = errors.float()
    inside = errors > 0
    max_error = all_reduce(errors.max() if errors.numel() else errors.new_tensor(-1.0), "max").double()
    undefined = max_error - max_error  # NaN where an error is
    total = all_reduce(foreground.sum(), "sum")
    if total == 0:  # the largest error has the whole weight
        at_max_error = (errors == max_error).double()
        pixels = all_reduce(at_max_error.sum(), "sum")
        pixels = pixels.clamp(min=1)
        return torch.where(inside, at_max_error / pixels, 0.0), max_error.clamp(min=0), 2 * (1 - 1 / pixels) + undefined
    cell, position = cells_of(errors, bounded)

    def count(index: Tensor, size: int) -> list[Tensor]:
        return [all_reduce(index[inside & kind].bincount(minlength=size), "sum") for kind in (foreground, ~foreground)]

    bins = allocate_bins(*count(cell, cells(bounded)), total, bounded)
    before = bins.cumsum(0) - bins
    index = before[cell] + (position * bins[cell] >> layout.POSITION_BITS)
    fg, bg = count(index, int(bins.sum()))
    result = weigh(fg, bg, total)

    edges = cell_edges(bounded, errors.device)
    width = (edges.diff() / bins).repeat_interleave(bins)
    k = torch.arange(width.numel(), device=width.device)
    low = edges[:-1].repeat_interleave(bins) + width * (k - before.repeat_interleave(bins))
    high = torch.minimum(low + width, max_error)
    max_bin = (fg + bg).nonzero().max() if (fg + bg).any() else 0  # holds max_error, known exactly, and perhaps others
    loss = 0.0
    for counts, weight in ((fg, result.fg), (bg, result.bg)):
        # The mean error in a bin: the middle, moved by the slope of the counts between its neighbours in the cell.
        first = before.repeat_interleave(bins)
        last = first + bins.repeat_interleave(bins) - 1
        below, above = (k - 1).maximum(first), (k + 1).minimum(last)
        slope = (counts[above] - counts[below]) / (above - below).clamp(min=1)
        shift = torch.where(counts > 0, slope / counts.clamp(min=1) / 12, 0.0).clamp(-0.25, 0.25)
        mean = (low + high) / 2 + (high - low) * shift
        middle = (low + high)[max_bin] / 2
        mean[max_bin] = middle + (max_error - middle) / (fg + bg)[max_bin].clamp(min=1)
        loss = loss + (counts * weight * mean).sum()
    weights = torch.where(foreground, result.fg[index], result.bg[index])
    weights = torch.where(inside, weights, 0.0)
    if not bounded:  # bins are too wide for the loss to come from them
        loss = all_reduce((weights * errors).sum(), "sum")
    return weights, loss, result.bound.sum() + undefined
