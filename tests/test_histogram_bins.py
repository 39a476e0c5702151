"""Coordinates, tables and weights of the bins of method "histogram": those of the reference, which test_histogram_steps.py
compares with the kernels'."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import bins_before

from veerloss import _layout
from veerloss._layout import COARSE_BINS, TABLE, Errors
from veerloss.reference import histogram
from veerloss.reference.lovasz import lovasz_weights


@pytest.mark.parametrize("kind", list(_layout.Errors), ids=str)
def test_coordinates_are_monotone_in_the_errors(kind):
    """And tell them apart: the error comes back from its coordinate, with the digits that float32 leaves this."""
    folded = histogram.is_folded(kind)
    small = torch.logspace(-38, 0, 5000, dtype=torch.float64)
    errors = torch.cat([small, 1 - small[small > 1e-15], 0.5 + torch.linspace(-1e-6, 1e-6, 201).double()])
    errors = torch.cat([errors, torch.logspace(0, 38, 5000, dtype=torch.float64)]).unique()
    errors = errors[(errors > 0) & (errors <= (1 if kind == _layout.Errors.SOFTMAX else math.inf))]
    found = histogram.coordinates(errors, kind)
    assert found.dtype == torch.float32 and (found.diff() >= 0).all()
    assert found.unique().numel() > 0.8 * errors.numel()
    # Of probabilities 1 - error counts as 2^-24 at least.
    inside = errors < (math.inf if not folded else 1 if kind == _layout.Errors.SOFTMAX else 1 - 2.0**-24)
    back, first, second = histogram.errors_of(found[inside].double(), folded)
    known = (torch.minimum(errors, 1 - errors) if folded else errors)[inside]
    # half a unit in the last place of the coordinate, and of 1 - error what float64 leaves it
    rounding = math.log(2) * 2.0**-24 * found[inside].abs().clamp(min=1).double() + 1e-12
    kept = rounding * known * 1.01 + (2.0**-52 if folded else 0)
    assert ((back - errors[inside]).abs() <= kept).all()
    step = 1e-4
    below, above = (histogram.errors_of(found[inside].double() + s, folded)[0] for s in (-step, step))
    smooth = (found[inside].abs() > step) & (known > 1e-4)
    torch.testing.assert_close(((above - below) / (2 * step))[smooth], first[smooth], rtol=1e-6, atol=0)
    bend = (above - 2 * back + below) / step**2
    torch.testing.assert_close(bend[smooth], second[smooth], rtol=1e-2, atol=1e-6 * errors[inside][smooth].max().item())
    special = histogram.coordinates(torch.tensor([0.0, math.inf, math.nan]), kind)
    assert special[0] == -math.inf and special[1:].isnan().all()


def test_coordinates_are_odd_in_the_foreground():
    """Foreground has the negative coordinate of background of the same probability."""
    p = torch.tensor([0.0625, 0.25, 0.375, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(
        histogram.coordinates(1 - p, _layout.Errors.SOFTMAX), -histogram.coordinates(p, _layout.Errors.SOFTMAX), rtol=0, atol=0
    )
    special = torch.tensor([0.5, 1.0, 2.0])
    found = histogram.coordinates(special, _layout.Errors.PROBABILITIES)
    assert found.tolist() == [0.0, 23.0, _layout.PAST_ONE + 1]


def check_table(table: histogram.Table) -> None:
    """A function that is monotone, and the edges that it is described by."""
    edges = table.edges()
    assert edges.shape == (table.bins,) and (edges.diff() > 0).all()
    low, high = table.coordinate_at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    width = high - low
    assert edges[0] > low and edges[-1] == high
    middles = torch.cat([(low + edges[0]).view(1) / 2, (edges[1:] + edges[:-1]) / 2])
    even = low + width * torch.linspace(-0.1, 1.1, 4001, dtype=torch.float64)
    x = torch.cat([middles, even]).float().sort().values
    found = table.bin_of(x)
    assert (found.diff() >= 0).all() and found[0] == 0 and found[-1] == table.bins - 1
    ends = torch.tensor([-math.inf, math.inf, -1e30, 1e30])
    assert table.bin_of(ends).tolist() == [0, table.bins - 1] * 2
    expected = torch.searchsorted(edges[:-1], x.double(), right=True)
    near = (x.double()[:, None] - edges[torch.stack([expected - 1, expected], 1).clamp(0, table.bins - 1)]).abs().amin(1)
    scale, offset = table.pairs[0].double().abs()
    rounding = 2.0**-23 * (1 + offset / scale / width + x.double().abs() / width) * width
    clear = near > rounding
    assert torch.equal(found[clear], expected[clear])
    assert clear.double().mean() > 0.5 or width < 0.25 * max(abs(low), abs(high), 1)  # next to none of float32's coordinates
    assert (found - expected).abs().max() <= 1
    at = table.bin_at(x.double())
    assert torch.equal(at[clear & (expected < table.bins - 1)].long(), expected[clear & (expected < table.bins - 1)])


def test_the_coarse_table():
    """16 bins to an octave."""
    table = histogram.Table.coarse()
    check_table(table)
    torch.testing.assert_close(table.edges().diff()[:-1].mean().item(), 1 / 16, rtol=2e-3, atol=0)


@given(
    st.integers(0, 2**31), st.sampled_from([1, 30, 3000, 10**6]), st.sampled_from([0.5, 0.01]), st.integers(1, COARSE_BINS),
    st.sampled_from(Errors), st.booleans(), st.sampled_from([1920, 3200, 8192]),
)  # fmt: skip
def test_tables_of_any_counts(seed, pixels, share, spread, errors, sampled, bins):
    """Twice: from counts in the coarse bins, and from counts in the bins of the first."""
    generator = torch.Generator().manual_seed(seed)
    counted = histogram.Table.coarse()
    for _ in range(2):
        reach = max(spread * counted.bins // COARSE_BINS, 1)
        first = int(torch.randint(0, counted.bins - reach + 1, (), generator=generator))
        fg, bg = torch.zeros((2, counted.bins), dtype=torch.long)
        for counts, n in ((fg, max(int(share * pixels), 1)), (bg, pixels)):
            index = first + (torch.rand(min(n, 4000), generator=generator) ** 2 * reach).long().clamp(max=reach - 1)
            counts += index.bincount(minlength=counted.bins) * -(-n // 4000)
        table = histogram.place(fg, bg, counted, errors, sampled, bins)
        check_table(table)
        before = torch.cat([torch.zeros(1).double(), bins_before(table.pairs)])
        assert before[-1] == bins - 1 and (before.diff() >= 1).all() and table.pairs.shape == (TABLE, 2)
        # The window has all foreground, and all errors above the least of it.
        edge = torch.cat([counted.edges()[:1] - 1, counted.edges()])
        kept = (fg if errors == Errors.SOFTMAX and fg[1:].any() else fg + bg)[1:].nonzero()
        if len(kept):
            low, high = table.coordinate_at(torch.tensor([0.0, 1.0], dtype=torch.float64))
            largest = (fg + bg)[1:].nonzero()[-1]
            assert low < edge[1 + kept[0]] and high > edge[2 + largest]
        counted = table


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.02, 0.98), st.booleans())
def test_weights_of_bins_add_up_and_are_bounded(pixels, bins, seed, share, lowest_fg_first):
    """For any order of the pixels within bins the certificate holds, and the weights add up to the whole step."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, bins, (pixels,), generator=generator)
    foreground = torch.rand(pixels, generator=generator) < share
    foreground[0] = True
    fg, bg = (index[kind].bincount(minlength=bins) for kind in (foreground, ~foreground))
    result = histogram.weigh(fg, bg, foreground.sum(), lowest_fg_first)
    assert result.step.sum().item() == pytest.approx(1, abs=1e-12)
    used = torch.where(foreground, result.fg[index], result.bg[index])
    assert not lowest_fg_first or result.bg[0] == 0
    for within in (torch.rand(pixels, generator=generator), foreground * 0.5, ~foreground * 0.5):
        exact = lovasz_weights(index + within.double(), foreground, torch.ones_like(foreground))
        distance = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (used - exact).abs())
        assert (distance <= result.bound + 1e-12).all()
