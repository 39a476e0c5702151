"""The steps of method "histogram" as operators, against the reference and between libraries."""

import math

import pytest
import torch
from grid import labels, logits, over_histogram_kernels
from samples import bins_before, rare_foreground

from veerloss import _histogram, _layout, ops
from veerloss._layout import COARSE_BINS, Errors, Reduction, bin_count
from veerloss.reference import histogram


def kinds():
    """(errors, logits or probabilities, target): a batch of each, with ignored pixels."""
    x, target = logits((2, 3, 700)), labels((2, 3, 700), 3, ignore_index=255)
    yield Errors.SOFTMAX, x, target
    yield Errors.PROBABILITIES, x.softmax(1), target
    yield Errors.HINGE, x[:, :1], torch.where(target == 2, 1, target)


def steps(operators, x, target, errors, *, per_image=False, ignore_index=None):
    """The steps that look at the pixels, and that of their weights, with what all tests here have in common."""
    batch = {
        "logits": x, "target": target, "errors": errors, "per_image": per_image, "ignore_index": ignore_index,
        "background_index": None,
    }  # fmt: skip
    segments = (x.size(0) if per_image else 1, x.size(1))

    def count(table=None, *, sampled=False, segment_mask=None, find_largest=True):
        bins = COARSE_BINS if table is None else bin_count(x.size(1))
        counts = torch.zeros((*segments, 2, bins), dtype=torch.int32)
        largest = torch.zeros(segments, dtype=torch.int32)
        operators.lovasz_histogram_count(
            counts=counts, largest=largest, table=table, segment_mask=segment_mask, sampled=sampled, find_largest=find_largest,
            **batch,
        )  # fmt: skip
        return counts, largest

    def weigh(counts, largest, table, *, present=False, reduction=Reduction.NONE, again=(None, None, None)):
        """`again`: (recounted_mask, recounts, recounted_table)."""
        return operators.lovasz_histogram_weigh(
            logits=x, counts=counts, recounted_mask=again[0], recounts=again[1], recounted_table=again[2], largest=largest,
            table=table, selected=None, present=present, class_weight=None, errors=errors, per_image=per_image,
            reduction=reduction, upcast_loss=True,
        )  # fmt: skip

    def sum_(**kept):
        return operators.lovasz_histogram_sum(**kept, **batch)

    def backward(grad, *, reduction=Reduction.NONE, **kept):
        return operators.lovasz_histogram_backward(grad=grad, reduction=reduction, **kept, **batch)

    return count, weigh, sum_, backward


def place(operators, counts, errors, *, counted_table=None, sampled=False):
    return operators.lovasz_histogram_place(
        counts=counts, counted_table=counted_table, errors=errors, sampled=sampled, bins=bin_count(counts.size(1))
    )


def errors_of_class(x, target, errors, c) -> tuple[torch.Tensor, torch.Tensor]:
    """([pixels], whether they are foreground) of all images."""
    if errors == Errors.HINGE:
        foreground = (target == 1).flatten()
        return torch.relu(1 - torch.where(foreground, 1.0, -1.0) * x[:, 0].flatten()), foreground
    x, foreground = x.movedim(1, 0).flatten(1), (target == c).flatten()
    if errors == Errors.PROBABILITIES:
        return torch.where(foreground, 1 - x[c], x[c]).abs(), foreground
    others = torch.cat([x[:c], x[c + 1 :]]).logsumexp(0) - x[c]
    return torch.where(foreground, others, -others).sigmoid(), foreground  # 1 - p has all its digits


@over_histogram_kernels
@pytest.mark.parametrize("errors", Errors)
@pytest.mark.parametrize("sampled", [False, True], ids=["all", "sampled"])
@pytest.mark.parametrize("share", [0.3, 0.005])
def test_steps_are_those_of_the_reference(share, sampled, errors, backend):
    """In float64: counts, the table of a sample or of all pixels, counts by it, a better table, weights and bounds."""
    operators = ops.operators(backend)
    generator = torch.Generator().manual_seed(0)
    pixels = 20_000
    target = (torch.rand(1, pixels, generator=generator) < share).long()
    x = logits((1, 3, pixels), torch.float64, scale=3.0)
    x = x.softmax(1) if errors == Errors.PROBABILITIES else x[:, :1] if errors == Errors.HINGE else x
    count, weigh, _, _ = steps(operators, x, target, errors)
    softmax, bins, c = errors == Errors.SOFTMAX, bin_count(x.size(1)), min(1, x.size(1) - 1)
    error, foreground = errors_of_class(x, target, errors, c)
    coordinate = histogram.coordinates(error, errors)
    slot = torch.arange(pixels)
    part = slot // _layout.SAMPLE_RUN * _layout.SAMPLE_STEP + slot % _layout.SAMPLE_RUN if sampled else slot
    part = part[part < pixels]

    def assert_counts_of(counts, table: histogram.Table, part) -> None:
        """Those of the reference's table, but for the last digit of a coordinate; without the background of bin 0."""
        found = table.bin_of(coordinate[part])
        if not softmax:
            found = torch.where(error[part] > 0, found.clamp(min=1), 0)
        fg, bg = (found[kind].bincount(minlength=table.bins) for kind in (foreground[part], ~foreground[part]))
        assert counts[0, c, 0, 0] == len(part)
        assert counts[0, c, 1].sum() == fg.sum()
        moved = (counts[0, c, 1] - fg).abs().sum() + (counts[0, c, 0] - bg)[1:].abs().sum()
        assert moved <= 2e-4 * pixels and (fg + bg).count_nonzero() > 20

    def assert_placed(table, counts, counted: histogram.Table, sampled) -> None:
        bg, fg = counts[0, c].long()
        expected = histogram.place(fg, bg, counted, errors, sampled, bins).pairs
        torch.testing.assert_close(table[0, c, 0], expected[0], rtol=3e-7, atol=0)
        assert (bins_before(table[0, c]) - bins_before(expected)).abs().max() <= 2  # sums and roots in other digits
        assert bins_before(table[0, c])[-1] == bins - 1

    coarse, _ = count(sampled=sampled)
    assert_counts_of(coarse, histogram.Table.coarse(), part)
    table = place(operators, coarse, errors, sampled=sampled)
    assert_placed(table, coarse, histogram.Table.coarse(), sampled)
    assert torch.equal(table, place(operators, coarse.long(), errors, sampled=sampled))
    counts, largest = count(table)
    counted = histogram.Table(table[0, c], bins)
    assert_counts_of(counts, counted, slot)
    assert_placed(place(operators, counts, errors, counted_table=table), counts, counted, False)
    _, _, weights, bounds, _, _ = weigh(counts, largest, table)
    bg, fg = counts[0, c].double()
    bg[0] = pixels - bg[1:].sum() - fg.sum() if softmax else 0  # below the window
    expected = histogram.weigh(fg, bg, fg.sum(), lowest_fg_first=softmax)
    if not softmax:
        expected.fg[0] = expected.bg[0] = expected.fg_bound[0] = expected.bg_bound[0] = 0
    torch.testing.assert_close(weights[0, c], torch.stack([expected.bg, -expected.fg]), rtol=1e-12, atol=0)
    torch.testing.assert_close(bounds[0, c], expected.bound.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_steps_are_those_of_the_native_library(per_image, backend):
    """The same counts, tables within some bins, and the same weights, sums and gradients from the same tables.

    (The exponentials of the two differ in the last place: in other inputs than these a pixel may change its bin.)
    """
    both = ops.operators(backend), torch.ops.veerloss
    for errors, x, target in kinds():
        (count, weigh, sum_, backward), native = (
            steps(operators, x, target, errors, per_image=per_image, ignore_index=255) for operators in both
        )
        mask = torch.ones((2 if per_image else 1, x.size(1)), dtype=torch.bool)
        mask[0, -1] = x.size(1) == 1
        # The sample of the CPU is of the pixels that are not ignored, that of the others of all: here of none that is.
        y = target.where(target != 255, 1)
        (sample, *_), (native_sample, *_) = (steps(operators, x, y, errors, per_image=per_image) for operators in both)
        found, expected = (count(sampled=True, segment_mask=mask)[0] for count in (sample, native_sample))
        torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=0)
        expected, expected_largest = native[0]()
        found, largest = count()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        largest, expected_largest = (_histogram.largest_errors(found, errors) for found in (largest, expected_largest))
        # A unit in the last place of coordinates up to 16: log2 differs by that.
        torch.testing.assert_close(largest, expected_largest, rtol=1e-6, atol=0)
        found_table, table = (place(o, expected, errors) for o in both)
        torch.testing.assert_close(found_table[..., 0, :], table[..., 0, :])
        assert (bins_before(found_table) - bins_before(table)).abs().max() <= 2
        counts, largest = native[0](table)
        torch.testing.assert_close(count(table)[0], counts, rtol=0, atol=0)
        for given_counts in (counts, counts.long()):
            expected = native[1](given_counts, largest, table)
            found = weigh(given_counts, largest, table)
            torch.testing.assert_close(found[:5], expected[:5])
            found_table, better_table = found[5], expected[5]
            torch.testing.assert_close(found_table[..., 0, :], better_table[..., 0, :])
        _, scale, weights, bounds, _, _ = expected
        kept = {"table": table, "weights": weights}
        if errors != Errors.SOFTMAX:
            units = torch.full_like(bounds, 2.0**40)
            sums = sum_(units=units, **kept), native[2](units=units, **kept)
            torch.testing.assert_close(sums[0].double(), sums[1].double(), rtol=1e-6, atol=0)
        grad = torch.linspace(-1, 2, scale.numel()).reshape(scale.shape)
        gradients = [f(grad, scale=scale, **kept) for f in (backward, native[3])]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("classes", [33, 150])
def test_many_classes(classes, backend):
    """More than a block holds at once. In float64: the sums of many float32 exponentials differ by some units in the last
    place, which moves a few of these pixels across the edges of bins."""
    shape, errors = (1, classes, 100), Errors.SOFTMAX
    x, target = logits(shape, torch.float64), labels(shape, classes, ignore_index=255)
    (count, _, _, backward), native = (
        steps(operators, x, target, errors, ignore_index=255) for operators in (ops.operators(backend), torch.ops.veerloss)
    )
    table = place(torch.ops.veerloss, native[0]()[0], errors)
    counts, largest = native[0](table)
    torch.testing.assert_close(count(table)[0], counts, rtol=0, atol=0)
    _, scale, weights, *_ = native[1](counts, largest, table, reduction=Reduction.MEAN)
    kept = {"table": table, "weights": weights, "scale": scale, "reduction": Reduction.MEAN}
    torch.testing.assert_close(backward(x.new_ones(()), **kept), native[3](x.new_ones(()), **kept))


@over_histogram_kernels
@pytest.mark.parametrize(("pixels", "doubts"), [(20_000, [True, True]), (400_000, [True, False])], ids=str)
def test_a_sample_has_doubts(pixels, doubts, backend):
    """What the sample alone would have given is far off, and its own counts say so; those of all pixels, if these are many,
    say that it is near."""
    operators, errors = ops.operators(backend), Errors.SOFTMAX
    count, weigh, _, _ = steps(operators, *rare_foreground(pixels), errors)
    for sampled, doubt in zip((True, False), doubts, strict=True):
        table = place(operators, count(sampled=sampled)[0], errors, sampled=sampled)
        *_, needs_rebin, better_table = weigh(*count(table), table, present=True, reduction=Reduction.MEAN)
        assert needs_rebin[0, 1] == doubt
        assert torch.equal(better_table[0, 1], table[0, 1]) != doubt


@over_histogram_kernels
@pytest.mark.parametrize("errors", Errors)
def test_without_foreground_the_largest_errors_have_the_weight(errors, backend):
    """They alone are in the last bin of the better table."""
    operators, target = ops.operators(backend), torch.zeros((1, 500), dtype=torch.long)
    x = logits((1, 2, 500), torch.float64)
    x = x.softmax(1) if errors == Errors.PROBABILITIES else x[:, 1:] if errors == Errors.HINGE else x
    x[0, :, :3] = x[0, :, (x[0, -1] - x[0, 0] if errors == Errors.SOFTMAX else x[0, -1]).argmax()].unsqueeze(1)
    count, weigh, _, _ = steps(operators, x, target, errors)
    error, _ = errors_of_class(x, target, errors, x.size(1) - 1)
    pixels = int((error == error.max()).sum())
    assert 3 <= pixels <= 4
    table = place(operators, count()[0], errors)
    counts, largest = count(table)
    *_, needs_rebin, better_table = weigh(counts, largest, table)
    assert needs_rebin[0, -1]
    recounts, _ = count(better_table, segment_mask=needs_rebin)
    below = 0 if errors == Errors.SOFTMAX else int((error > 0).sum()) - pixels  # which a softmax does not count
    assert recounts[0, -1, 0, -1] == pixels and recounts[0, -1, 0, 1:-1].sum() == below
    _, _, weights, bounds, _, used = weigh(counts, largest, table, again=(needs_rebin, recounts, better_table))
    assert torch.equal(used[needs_rebin], better_table[needs_rebin])
    assert weights[0, -1, 0, -1].item() == pytest.approx(1 / pixels) and weights[0, -1].count_nonzero() == 1
    assert bounds[0, -1].item() == pytest.approx(2 * (1 - 1 / pixels))


@over_histogram_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_of_many_classes(dtype, backend):
    """Their tiles are shorter than a run of the sample."""
    x, target = logits((1, 300, 70), dtype), labels((1, 300, 70), 300)
    count, *_ = steps(ops.operators(backend), x, target, Errors.SOFTMAX)
    counts, _ = count(sampled=True)
    run = _layout.SAMPLE_RUN
    assert (counts[..., 0, 0] == run).all()
    assert torch.equal(counts[0, :, 1].sum(1), target[0, :run].bincount(minlength=300))
    assert (counts[..., 1:].sum((2, 3)) == run).all()  # none is below the coarse window


@over_histogram_kernels
@pytest.mark.parametrize("mask", [[False, True, False], [False, False, False]], ids=str)
def test_segments_outside_the_mask_are_left_alone(mask, backend):
    """But for the number of pixels."""
    operators, errors, mask = ops.operators(backend), Errors.SOFTMAX, torch.tensor([mask])
    count, *_ = steps(operators, logits((2, 3, 500)), labels((2, 3, 500), 3), errors)
    table = place(operators, count()[0], errors)
    (every, every_largest), (counts, largest) = count(table), count(table, segment_mask=mask)
    assert torch.equal(counts[mask], every[mask]) and (every[:, :, 0, 0] == 1000).all()
    counts[:, :, 0, 0] = 0
    assert (counts[~mask] == 0).all() and (every[~mask][:, 1].sum(1) > 0).all()
    assert torch.equal(largest, torch.where(mask, every_largest, 0)) and (every_largest != 0).all()


@over_histogram_kernels
@pytest.mark.parametrize("errors", Errors)
def test_largest_errors_are_found_where_they_are_asked_for(errors, backend):
    """As keys that order errors as unsigned integers; NaN is the largest of them, and is always found."""
    ((x, target),) = ((x, y) for e, x, y in kinds() if e == errors)
    x[0, -1, 3], target[0, 3] = math.nan, 0
    x[1, -1, 5], target[1, 5] = (30.0 if errors != Errors.PROBABILITIES else 3.0), 0
    count, *_ = steps(ops.operators(backend), x, target, errors, per_image=True, ignore_index=255)
    _, largest = count()
    found = _histogram.largest_errors(largest, errors)
    assert found[0, -1].isnan() and largest[0, -1] == -1
    assert not found[1].isnan().any()
    if errors != Errors.SOFTMAX:
        expected = 31.0 if errors == Errors.HINGE else 3.0
        assert expected <= found[1, -1] <= expected * (1 + 3e-5)
    _, largest = count(find_largest=False)
    assert largest[0, -1] == -1 and (largest[1] == 0).all()
