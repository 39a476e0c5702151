"""Method "histogram" of the Lovász losses: weights from counts by error, without sorting. What csrc/math/bins.h computes.

The weight of a pixel depends only on how many foreground and background pixels have a larger error. So errors are counted in
bins. A first count, in coarse bins, tells the window of a segment's errors, and how much each part of it is worth; the more,
the more bins it gets. A second count is in these bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _layout as layout
from .._layout import Errors

# The window: csrc/math/bins.h says why.
TAIL_PIXELS, TAIL_REACH, SAMPLE_MARGIN, MARGIN = 8, 2.5, 1 / 16, 1 / 128
#: The share of the bins that goes by the error of the loss; the others go by that of the gradient.
LOSS_SHARE = 0.2
#: Of the iteration for how much square error is worth a bin.
WORTH_STEPS = 4


# ------------------------------------------------------------------ coordinates


def is_folded(errors: int) -> bool:
    return errors != Errors.HINGE


def coordinates(error: Tensor, errors: int) -> Tensor:
    """float32: monotone in the errors, which it tells apart near 0 and near 1 as well as in between; -inf for 0, NaN for what
    is not finite."""
    found = error.log2()
    if is_folded(errors):
        least = 2.0**-52 if errors == Errors.SOFTMAX else 2.0**-24
        high = -1 - (1 - error).clamp(min=least).log2()
        found = torch.where(error > 1, layout.PAST_ONE + found, torch.where(error > 0.5, high, 1 + found))
    return torch.where(error.isfinite(), found, torch.nan).float()


def errors_of(coordinate: Tensor, folded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The errors of coordinates, and their first and second derivatives."""
    power = torch.exp2(-coordinate.abs() - 1 if folded else coordinate)
    first = math.log(2) * power
    second = math.log(2) * first
    high = (coordinate > 0) & folded
    return torch.where(high, 1 - power, power), first, torch.where(high, -second, second)


# ------------------------------------------------------------------ tables


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c, rounded once: the product of two is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


@dataclass
class Table:
    """Of a segment: [CELLS + 1, 2] float32, which finds the bin of a coordinate."""

    pairs: Tensor
    bins: int

    @staticmethod
    def coarse(device: torch.device | None = None) -> Table:
        reach = torch.tensor([0.5 / layout.COARSE_REACH, 0.5], device=device)
        knots = cell_knots(device)
        return Table(torch.cat([reach[None], cell_pairs((layout.COARSE_BINS - 1) * knots)]), layout.COARSE_BINS)

    def bin_of(self, coordinate: Tensor) -> Tensor:
        position = fma(coordinate.nan_to_num(0.0, posinf=1e30, neginf=-1e30), *self.pairs[0]).clamp(0, 1)
        scale = torch.tensor(8.0 * layout.CELLS - 0.75, device=position.device)
        magic = torch.tensor(layout.MAGIC, device=position.device)
        cell = (fma(position, scale, magic).view(torch.int32) & 8 * layout.CELLS - 8) >> 3
        pair = self.pairs[1 + cell.long()]
        quarters = fma(position, pair[..., 0], pair[..., 1]).view(torch.int32)
        return ((quarters & 4 * layout.MAX_BINS - 4) >> 2).long()

    def coordinate_at(self, position: Tensor) -> Tensor:
        scale, offset = self.pairs[0].double()
        return (position - offset) / scale

    def bin_at(self, coordinate: Tensor) -> Tensor:
        """Of bins as real numbers, bin k being [k, k + 1]; [0, bins]."""
        scale, offset = self.pairs[0].double()
        position = (coordinate * scale + offset).clamp(0, 1)
        knots = cell_knots(coordinate.device)
        cell = torch.searchsorted(knots[1:-1].contiguous(), position, right=True)
        pair = self.pairs[1 + cell].double()
        bins = (position * pair[..., 0] + (pair[..., 1] - layout.MAGIC) + 0.5) / 4
        return torch.where(position == 1, float(self.bins), bins)

    def edges(self) -> Tensor:
        """[bins] float64: where bins 1, 2, ... begin, and the last one, and the window, ends."""
        knots, pairs = cell_knots(self.pairs.device), self.pairs[1:].double()
        begin = (knots[:-1] * pairs[:, 0] + (pairs[:, 1] - layout.MAGIC) + 0.5) / 4
        k = torch.arange(1, self.bins, device=begin.device).double()
        scale, offset = pairs[torch.searchsorted(begin, k, right=True) - 1].unbind(1)
        position = (4 * k - 0.5 - (offset - layout.MAGIC)) / scale
        return self.coordinate_at(torch.cat([position, position.new_ones(1)]))


def cell_knots(device: torch.device | None = None) -> Tensor:
    """[CELLS + 1] float64: the positions at which cells begin, and the last ends."""
    k = torch.arange(layout.CELLS + 1, dtype=torch.float64, device=device)
    return ((8 * k - 0.5) / (8 * layout.CELLS - 0.75)).clamp(0, 1)


def cell_pairs(bins_before: Tensor) -> Tensor:
    """[CELLS, 2] of cells before which so many bins [CELLS + 1] have been given out."""
    knots = cell_knots(bins_before.device)
    scale = (4 * bins_before.diff() / knots.diff()).float()
    offset = (layout.MAGIC + 4 * bins_before[:-1] + 1.5 - scale.double() * knots[:-1]).float()
    return torch.stack([scale, offset], 1)


# ------------------------------------------------------------------ weights


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


def weigh(fg: Tensor, bg: Tensor, total: Tensor, lowest_fg_first: bool = False) -> Bins:
    """Weights from the counts of foreground and background in each bin, the smallest errors first.

    With G = `total` > 0 foreground pixels, and F, B foreground and background pixels in the bins of larger errors, any order of
    a bin's f and b pixels is a subgradient of the loss of the rounded errors. These weights are the mean of "foreground first"
    and "background first"; they add up to the step of the Jaccard loss over the bin. The lowest bin may be foreground first.
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
    fg_bound, bg_bound = f * b / (2 * first * last), high + low
    if lowest_fg_first:
        at_fg[0], at_bg[0] = 1 / first[0], 0
        fg_bound[0] = bg_bound[0] = f[0] * b[0] / (first[0] * last[0])
    return Bins(at_fg, at_bg, f * at_fg + b * at_bg, fg_bound, bg_bound)


def squared_bounds(result: Bins, fg: Tensor, bg: Tensor) -> Tensor:
    """What binning changes of weights at most, as a sum of squares over the pixels of a bin that share it evenly."""
    of_fg, of_bg = (bound**2 / torch.where(n > 0, n, 1.0) for bound, n in ((result.fg_bound, fg), (result.bg_bound, bg)))
    return of_fg + of_bg


def weigh_segment(fg: Tensor, bg: Tensor, total: Tensor, softmax: bool) -> Bins:
    """`weigh`, where bin 0 is the one below the window of a softmax, or of errors that are 0."""
    result = weigh(fg, bg, total, lowest_fg_first=softmax)
    if not softmax:
        for values in (result.fg, result.bg, result.fg_bound, result.bg_bound):
            values[0] = 0
    return result


# ------------------------------------------------------------------ placing


def window(fg: Tensor, bg: Tensor, table: Table, softmax: bool, sampled: bool) -> Tensor:
    """[2]: the (scale, offset) of a segment's window, from counts in the bins of `table`."""
    edge = table.edges()
    counted = torch.where(torch.arange(table.bins, device=fg.device) > 0, fg + bg, 0)
    any_foreground = bool((fg[1:] > 0).any())
    bounding = torch.where(counted > 0, fg if softmax and any_foreground else counted, 0).nonzero()
    if len(bounding) == 0:
        return window_pair(edge.new_tensor(-1.0), edge.new_tensor(1.0))
    least, largest = int(bounding[0]), int(counted.nonzero()[-1])
    low, high = edge[least - 1], edge[largest]
    width = high - low
    if sampled:
        before = fg[1:].cumsum(0) - fg[1:]
        last = ((fg[1:] > 0) & (before < TAIL_PIXELS) & softmax).nonzero()
        tail = max(least, 1 + int(last[-1])) if len(last) else least
        low = low - TAIL_REACH * (edge[tail - 1] - low)
    if softmax and fg[0] > 0:
        low = low - width / 8
    low = low - (SAMPLE_MARGIN / 2 if sampled else MARGIN) * width
    return window_pair(low, high + (SAMPLE_MARGIN if sampled else MARGIN) * width)


def window_pair(low: Tensor, high: Tensor) -> Tensor:
    least = max(low.abs().item(), high.abs().item(), 1.0) * 2.0**-17
    if high - low < least:
        low = (low + high - least) / 2
        high = low + least
    scale = (1 / (high - low)).float()
    return torch.stack([scale, (-low * scale.double()).float()])


def place(fg: Tensor, bg: Tensor, table: Table, errors: int, sampled: bool, bins: int) -> Table:
    """A table of `bins` bins from the counts in those of another.

    s bins divide the mean square error that a cell makes by s**2; the sum over the cells is least where s goes by the cube root
    of that error: of the gradient for most of the bins, of the loss for some. Where bins have less than a pixel, they divide
    the square error of the gradient by s, and s goes by the square root of the error per pixel.
    """
    softmax, folded = errors == Errors.SOFTMAX, is_folded(errors)
    pair = window(fg, bg, table, softmax, sampled)
    knots = cell_knots(fg.device)
    at = Table(pair[None], bins).coordinate_at(knots)
    where = table.bin_at(at).clamp(1, table.bins)

    def in_cells(counts: Tensor) -> Tensor:
        below = torch.cat([counts.new_zeros(2), counts[1:].cumsum(0)]).double()  # of bins 0, 1, ..., all; without bin 0
        k = where.long().clamp(max=table.bins - 1)
        found = (below[k] + (where - k) * (below[k + 1] - below[k])).diff()
        if sampled:
            ends = torch.cat([found[:1], found, found[-1:]])
            found = (ends[:-2] + 2 * found + ends[2:]) / 4 + 0.25
        return found

    f, b = in_cells(fg), in_cells(bg)
    total = f.sum() + (0 if sampled else fg[0])
    result = weigh(f, b, total.clamp(min=1))
    error, first, _ = errors_of((at[1:] + at[:-1]) / 2, folded)
    slope = error * (1 - error) if softmax else 1  # of the gradient of a logit, over the weight
    of_gradient = slope**2 * squared_bounds(result, f, b)
    of_loss = (f * result.fg**2 + b * result.bg**2) * (first * at.diff()) ** 2
    of_gradient, of_loss = (torch.where(f + b > 0, square.clamp(min=0), 0.0) for square in (of_gradient, of_loss))
    gradient, worth = torch.zeros_like(of_gradient), 1.0
    has_gradient = bool(of_gradient.max() > 0)
    if has_gradient:
        for step in range(WORTH_STEPS + 1):
            square = of_gradient / of_gradient.max() * worth
            gradient = torch.maximum(square ** (1 / 3), (square / (f + b).clamp(min=1)).sqrt())
            if step < WORTH_STEPS:
                worth *= (bins / gradient.sum().item()) ** 2.5
        gradient = gradient / gradient.sum()
    loss = of_loss ** (1 / 3)
    loss = loss / loss.sum() if loss.sum() > 0 else torch.full_like(loss, 1 / layout.CELLS)
    share = (1 - LOSS_SHARE) * gradient + LOSS_SHARE * loss if has_gradient else loss
    before = torch.arange(1, layout.CELLS + 1, device=fg.device) + share.cumsum(0) * (bins - 1 - layout.CELLS)
    before = torch.cat([before.new_zeros(1), (before + 0.5).floor().clamp(max=bins - 1)])
    before[-1] = bins - 1
    return Table(torch.cat([pair[None], cell_pairs(before)]), bins)


def deviates(fg: Tensor, bg: Tensor, total: Tensor, table: Table, errors: int) -> bool:
    """Whether the errors of binning, estimated from the counts in a table, ask for bins that are placed by these counts."""
    softmax, f, b = errors == Errors.SOFTMAX, fg.double(), bg.double()
    result, edge = weigh_segment(fg, bg, total, softmax), table.edges()
    at = torch.cat([edge[:1], (edge[1:] + edge[:-1]) / 2])  # bin 0, which has no width here, and the others
    error, first, _ = errors_of(at, is_folded(errors))
    slope = error * (1 - error) if softmax else torch.ones_like(error)
    squares = f * result.fg**2 + b * result.bg**2
    gradient = (slope**2 * squared_bounds(result, f, b)).sum() / (slope**2 * squares).sum()
    width = torch.cat([torch.zeros_like(edge[:1]), edge.diff()])
    loss = (squares * (first * width) ** 2).sum() / 12
    return bool(gradient.sqrt() > layout.GRADIENT_TOLERANCE or loss.sqrt() > layout.LOSS_TOLERANCE)


# ------------------------------------------------------------------ a segment


def segment(
    error: Tensor, foreground: Tensor, errors: int, bins: int, all_reduce: Callable[[Tensor, str], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One segment, by counts that `all_reduce(counts, "sum" or "max")` adds up over ranks.

    Args:
        error: [P] of the valid pixels.
        foreground: [P] bool.
        errors: which errors they are.
        bins: how many.

    Returns:
        (weights [P], loss, bound), float64. The bound is on the sum of |weight - exact weight| over the pixels of error > 0;
        the others have no influence on the loss and weight 0.
    """
    softmax, folded = errors == Errors.SOFTMAX, is_folded(errors)
    inside = error > 0
    largest = all_reduce(error.max() if error.numel() else error.new_tensor(-1.0), "max").double()
    undefined = largest - largest  # NaN where an error is
    total = all_reduce(foreground.sum(), "sum")
    if total == 0:  # the largest error has the whole weight
        at_largest = (error == largest).double()
        pixels = all_reduce(at_largest.sum(), "sum").clamp(min=1)
        return torch.where(inside, at_largest / pixels, 0.0), largest.clamp(min=0), 2 * (1 - 1 / pixels) + undefined
    coordinate = coordinates(error, errors)

    def count(table: Table) -> tuple[Tensor, Tensor, Tensor]:
        found = table.bin_of(coordinate)
        if not softmax:  # bin 0 holds errors of exactly 0 alone
            found = torch.where(inside, found.clamp(min=1), 0)
        fg, bg = (all_reduce(found[kind].bincount(minlength=table.bins), "sum") for kind in (foreground, ~foreground))
        return found, fg, bg

    table = Table.coarse(error.device)
    _, fg, bg = count(table)
    table = place(fg, bg, table, errors, False, bins)
    found, fg, bg = count(table)
    if deviates(fg, bg, total, table, errors):
        table = place(fg, bg, table, errors, False, bins)
        found, fg, bg = count(table)
    result = weigh_segment(fg, bg, total, softmax)
    edge = table.edges()
    width, middle = edge.diff(), (edge[1:] + edge[:-1]) / 2
    value, first, second = errors_of(middle, folded)
    beside = lambda x: torch.cat([x[:1], x, x[-1:]])  # noqa: E731
    loss = torch.zeros_like(largest)
    for counts, weight in ((fg, result.fg), (bg, result.bg)):
        # The mean error in a bin, by the second-order expansion of error and density about its middle.
        n = counts[1:].double()
        density = beside(n / width)
        at = torch.cat([middle[:1] - width[:1], middle, middle[-1:] + width[-1:]])
        rise = (density[2:] - density[:-2]) / (at[2:] - at[:-2]) * width**2
        rise = torch.minimum(torch.maximum(rise, -3 * n), 3 * n)
        loss = loss + (weight[1:] * (n * (value + width**2 / 24 * second) + first * rise * width / 12)).sum()
    if softmax:
        loss = loss + fg[0] * result.fg[0] * errors_of(edge[:1], folded)[0][0]
    weights = torch.where(foreground, result.fg[found], result.bg[found])
    weights = torch.where(inside, weights, 0.0)
    if not softmax:
        loss = all_reduce((weights * error.double()).sum(), "sum")
    return weights, loss + undefined, result.bound.sum() + undefined
