"""Method "histogram" of the Lovász losses: its steps, its certificate, and how it allocates its bins. What it shares with
"exact" (accuracy, edges, reductions, classes) is in test_lovasz.py."""

import pytest
import torch
from budget import check_loss, evaluate
from grid import KINDS, labels, logits, lovasz_case, over_lovasz_kernels
from hypothesis import given
from hypothesis import strategies as st

from veerloss import _histogram, _layout, lovasz_hinge_loss, lovasz_softmax_loss, ops
from veerloss._layout import Errors, Reduction, bin_count, cell_count, entry_bins, entry_first_bin
from veerloss.lovasz import AUTO_HISTOGRAM_FROM
from veerloss.reference import histogram
from veerloss.reference.lovasz import lovasz_weights

over_kinds = pytest.mark.parametrize("kind", KINDS)


# ---- accuracy where bins are few for the pixels


@over_lovasz_kernels
@pytest.mark.parametrize("pixels", [1023, 65_536, 70_001])
def test_counts_of_16_bits_do_not_overflow(pixels, backend):
    """All pixels alike, in one bin, past what a thread's counters hold."""
    x, target = torch.zeros(1, 2, pixels), (torch.arange(pixels) % 3 == 0).long()[None]
    check_loss(lovasz_softmax_loss, x, target, method="histogram", backend=backend)
    check_loss(lovasz_hinge_loss, x[:, 0], target, method="histogram", backend=backend)


def assert_near_exact(loss, x, target, backend: str, **options) -> None:
    """Against the exact method in float64: the loss to 1e-6, relative where it is above 1, the gradient to 1e-3."""
    found, gradient = evaluate(loss, x, target, method="histogram", backend=backend, **options)
    truth, exact = evaluate(loss, x.double(), target, method="exact", backend="reference", **options)
    assert abs(found.item() - truth.item()) <= 1e-6 * max(truth.item(), 1)
    assert (gradient.double() - exact).norm() <= 1e-3 * exact.norm()


@over_kinds
@pytest.mark.parametrize("foreground", [0.3, 0.01, 1e-3])
def test_large_segments(foreground, kind):
    """Where bins are allocated by a sample; rare foreground, of which it has a few pixels, gets them allocated again."""
    shape = (2, 2, 400, 500)
    target = (torch.rand(2, 400, 500, generator=torch.Generator().manual_seed(0)) < foreground).long()
    assert target.numel() > _histogram.SAMPLED_FROM and target[0].numel() > _histogram.SAMPLED_IMAGE
    loss, x, options = lovasz_case(kind, logits(shape, scale=1.0 if kind == "probabilities" else 2.0))
    if kind == "hinge":
        options["per_image"] = False
    assert_near_exact(loss, x, target, "native", **options)


def rare_foreground(pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target of which a sample has next to no foreground."""
    target = torch.zeros(1, pixels, dtype=torch.long)
    target[0, 100::200] = 1
    return logits((1, 2, pixels), scale=0.25), target


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
@over_kinds
def test_bins_are_allocated_again_as_natively(kind, backend, monkeypatch):
    """Those that a sample without foreground gives are far off. (So few pixels do not come near the exact method.)"""
    monkeypatch.setattr(_histogram, "SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_histogram, "SAMPLED_IMAGE", 1 << 10)
    x, target = rare_foreground(20_000)
    loss, x, options = lovasz_case(kind, x)
    result = evaluate(loss, x, target, method="histogram", backend=backend, **options)
    monkeypatch.setitem(ops.NAMESPACES, "native", "veerloss")
    expected = evaluate(loss, x, target, method="histogram", backend="native", **options)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "emulated"], indirect=True)
@pytest.mark.parametrize("outlier", [50.0, 6e4, 1e9, 1e30])
def test_hinge_keeps_its_tail(outlier, backend):
    """A single far pixel neither loses its own loss nor takes the others' bins."""
    x, target = logits((1, 100_000)), labels((1, 2, 100_000), 2)
    x[0, 5] = outlier if target[0, 5] == 0 else -outlier
    assert_near_exact(lovasz_hinge_loss, x, target, backend)


# ---- the steps, as operators


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

    def count(table=None, *, sampled=False, segment_mask=None):
        return operators.lovasz_histogram_count(table=table, segment_mask=segment_mask, sampled=sampled, **batch)

    def weigh(counts, max_error, table, *, present=False, reduction=Reduction.NONE):
        return operators.lovasz_histogram_weigh(
            logits=x, counts=counts, max_error=max_error, table=table, selected=None, present=present, class_weight=None,
            errors=errors, per_image=per_image, reduction=reduction, upcast_loss=True,
        )  # fmt: skip

    def sum_(**kept):
        return operators.lovasz_histogram_sum(**kept, **batch)

    def backward(grad, *, reduction=Reduction.NONE, **kept):
        return operators.lovasz_histogram_backward(grad=grad, reduction=reduction, **kept, **batch)

    return count, weigh, sum_, backward


def allocate_bins(operators, counts, errors, counted_table=None):
    return operators.lovasz_histogram_allocate_bins(counts=counts, counted_table=counted_table, errors=errors)


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_steps_are_those_of_the_native_library(per_image, backend):
    """The same counts, tables within a bin, and the same weights, sums and gradients from the same tables.

    (The exponentials of the two backends differ in the last place: in other inputs than these a pixel may change its bin.)
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
        options = {"sampled": True, "segment_mask": mask}
        torch.testing.assert_close(sample(**options), native_sample(**options), rtol=0, atol=0)
        expected = native[0]()
        torch.testing.assert_close(count(), expected, rtol=0, atol=0)
        bins, expected_bins = (entry_bins(allocate_bins(o, expected[0], errors)) for o in both)
        assert (bins - expected_bins).abs().max() <= 1
        assert torch.equal(bins, entry_bins(allocate_bins(both[0], expected[0].long(), errors)))
        table = allocate_bins(both[1], expected[0], errors)
        counts, max_error = native[0](table)
        torch.testing.assert_close(count(table), (counts, max_error), rtol=0, atol=0)
        again, expected_again = (entry_bins(allocate_bins(o, counts, errors, table)) for o in both)
        assert (again - expected_again).abs().max() <= 1
        for given_counts in (counts, counts.long()):
            expected = native[1](given_counts, max_error, table)
            torch.testing.assert_close(weigh(given_counts, max_error, table), expected)
        _, scale, weights, max_weight, bounds, _ = expected
        kept = {"table": table, "weights": weights, "max_weight": max_weight}
        if errors != Errors.SOFTMAX:
            units = torch.full_like(bounds, 2.0**40)
            sums = sum_(units=units, **kept), native[2](units=units, **kept)
            torch.testing.assert_close(sums[0].double(), sums[1].double(), rtol=1e-6, atol=0)
        grad = torch.linspace(-1, 2, scale.numel()).reshape(scale.shape)
        gradients = [f(grad, scale=scale, **kept) for f in (backward, native[3])]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
@pytest.mark.parametrize("classes", [33, 150])
def test_many_classes(classes, backend):
    """More than a tile of Triton's has. In float64: the sums of many float32 exponentials differ by some units in the last
    place, which moves a few of these pixels across the edges of bins."""
    shape, errors = (1, classes, 100), Errors.SOFTMAX
    x, target = logits(shape, torch.float64), labels(shape, classes, ignore_index=255)
    (count, _, _, backward), native = (
        steps(operators, x, target, errors, ignore_index=255) for operators in (ops.operators(backend), torch.ops.veerloss)
    )
    table = allocate_bins(torch.ops.veerloss, native[0]()[0], errors)
    counts, max_error = native[0](table)
    torch.testing.assert_close(count(table), (counts, max_error), rtol=0, atol=0)
    _, scale, weights, max_weight, _, _ = native[1](counts, max_error, table, reduction=Reduction.MEAN)
    kept = {"table": table, "weights": weights, "max_weight": max_weight, "scale": scale, "reduction": Reduction.MEAN}
    torch.testing.assert_close(backward(x.new_ones(()), **kept), native[3](x.new_ones(()), **kept))


@over_lovasz_kernels
@pytest.mark.parametrize(("pixels", "doubts"), [(20_000, [True, True]), (400_000, [True, False])], ids=str)
def test_a_sample_has_doubts(pixels, doubts, backend):
    """What the sample alone would have given is far off, and its own counts say so; those of all pixels, if these are many,
    say that it is near."""
    operators, errors = ops.operators(backend), Errors.SOFTMAX
    count, weigh, _, _ = steps(operators, *rare_foreground(pixels), errors)
    for sampled, doubt in zip((True, False), doubts, strict=True):
        table = allocate_bins(operators, count(sampled=sampled)[0], errors)
        *_, needs_rebin = weigh(*count(table), table, present=True, reduction=Reduction.MEAN)
        assert needs_rebin[0, 1] == doubt


@over_lovasz_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_of_many_classes(dtype, backend):
    """Their tiles are shorter than a run of the sample."""
    count, *_ = steps(ops.operators(backend), logits((1, 300, 70), dtype), labels((1, 300, 70), 300), Errors.SOFTMAX)
    counts, _ = count(sampled=True)
    assert (counts.sum((2, 3)) == _layout.SAMPLE_RUN).all()


@over_lovasz_kernels
@pytest.mark.parametrize("mask", [[False, True, False], [False, False, False]], ids=str)
def test_segments_outside_the_mask_are_left_alone(mask, backend):
    operators, errors, mask = ops.operators(backend), Errors.SOFTMAX, torch.tensor([mask])
    count, *_ = steps(operators, logits((2, 3, 500)), labels((2, 3, 500), 3), errors)
    table = allocate_bins(operators, count()[0], errors)
    every, _ = count(table)
    counts, max_error = count(table, segment_mask=mask)
    assert torch.equal(counts, torch.where(mask[..., None, None], every, 0))
    none = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    assert torch.equal(max_error[~mask], none.expand(int((~mask).sum()), 2))


@over_lovasz_kernels
@pytest.mark.parametrize("errors", [Errors.SOFTMAX, Errors.HINGE], ids=str)
def test_kernel_and_reference_allocate_the_same_bins(errors, backend):
    bounded, cells = errors == Errors.SOFTMAX, cell_count(errors)
    assert cells == histogram.cells(bounded)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (1, 3, 2, 1 + cells), generator=generator, dtype=torch.int32)
    counts *= torch.rand(counts.shape, generator=generator) < 0.1
    table = allocate_bins(ops.operators(backend), counts, errors)
    for c in range(3):
        bg, fg = counts[0, c].long()
        bins, first = entry_bins(table[0, c]), entry_first_bin(table[0, c])
        expected = histogram.allocate_bins(fg[1:], bg[1:], fg.sum(), bounded)
        assert (bins - expected).abs().max() <= 1  # sums in another order
        assert first.equal((1 + bins.cumsum(0) - bins).int())
        assert 1 + bins.sum() <= bin_count(errors)
        assert table[0, c].equal(_layout.pack_entry(first, bins))


# ---- the reference


def test_cells_cover_every_error():
    for bounded in (True, False):
        edges = histogram.cell_edges(bounded)
        assert edges[0] == 0 and (edges.diff() > 0).all() and edges[-1] >= (1 if bounded else 3.4e38)
        values = torch.cat([edges[:-1], edges[1:] * (1 - 1e-6), torch.logspace(-12, 0 if bounded else 38, 999)])
        values = values[(values > 0) & (values <= (1 if bounded else 3.4e38))].float()
        cell, position = histogram.cells_of(values, bounded)
        assert (cell >= 0).all() and (cell < histogram.cells(bounded)).all()
        rounding = 2e-7 * (values.double() + _layout.CELL_OFFSET)
        assert (values.double() >= edges[cell] - rounding).all() and (values.double() <= edges[cell + 1] + rounding).all()
        ascending = values.sort().values
        cell, position = histogram.cells_of(ascending, bounded)
        assert ((cell << _layout.POSITION_BITS) + position).diff().min() >= 0


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.floats(0.02, 0.98))
def test_weights_of_bins_add_up_and_are_bounded(pixels, bins, seed, share):
    """For any order of the pixels within bins the certificate holds, and the weights add up to the whole step."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, bins, (pixels,), generator=generator)
    foreground = torch.rand(pixels, generator=generator) < share
    foreground[0] = True
    fg, bg = (index[kind].bincount(minlength=bins) for kind in (foreground, ~foreground))
    result = histogram.weigh(fg, bg, foreground.sum())
    assert result.step.sum().item() == pytest.approx(1, abs=1e-12)
    used = torch.where(foreground, result.fg[index], result.bg[index])
    for within in (torch.rand(pixels, generator=generator), foreground * 0.5, ~foreground * 0.5):
        exact = lovasz_weights(index + within.double(), foreground, torch.ones_like(foreground))
        distance = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (used - exact).abs())
        assert (distance <= result.bound + 1e-12).all()


# ---- the certificate


def check_certificate(kind: str, x: torch.Tensor, target: torch.Tensor, backend: str) -> float:
    """It, which bounds the distance of the weights from the exact ones: the gradient of probabilities and of the hinge is these
    weights; that of a softmax differs by less."""
    loss, x, options = lovasz_case(kind, x)
    if kind != "hinge":
        options["classes"] = [1]
    gradients = []
    for method in ("histogram", "exact"):
        value = x.double().requires_grad_()
        result, certificate = loss(value, target, method=method, return_certificate=True, backend=backend, **options)
        gradients.append(torch.autograd.grad(result, value)[0].flatten())
        if method == "histogram":
            bound = certificate.sum().item()
    distance = (gradients[0] - gradients[1]).abs().sum().item()
    # |d p_c| <= p_c (1 - p_c) + sum over the others of p_c p_j = 2 p_c (1 - p_c) <= 1/2 in L1
    assert distance <= (0.5 if kind == "softmax" else 1.0) * bound + 1e-9
    return bound


@pytest.mark.parametrize("backend", ["native", "emulated", "reference"], indirect=True)  # in the interpreter: minutes
@given(
    st.integers(1, 4000), st.integers(2, 4), st.integers(0, 2**31), st.sampled_from([1e-3, 0.3, 3.0, 30.0]),
    st.sampled_from(KINDS), st.booleans(),
)  # fmt: skip
def test_certificate_bounds_the_distance_of_the_weights(backend, pixels, classes, seed, scale, kind, ties):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, classes, pixels, generator=generator) * scale
    x = (x * 4 / scale).round() * scale / 4 if ties else x
    target = torch.randint(0, classes, (1, pixels), generator=generator)
    target.view(-1)[0] = 1
    check_certificate(kind, x, target.clamp(max=1) if kind == "hinge" else target, backend)


@over_lovasz_kernels
@pytest.mark.parametrize("kind", ["softmax", "hinge"])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_certificate_of_some_cases(scale, kind, backend):
    assert check_certificate(kind, logits((1, 2, 3000), torch.float64, scale=scale), labels((1, 2, 3000), 2), backend) > 0


def test_certificate_of_the_exact_method_is_0():
    x, target = logits((2, 3, 50)), labels((2, 3, 50), 3)
    for per_image, shape in ((False, (3,)), (True, (2, 3))):
        for method in ("exact", "histogram"):
            loss, certificate = lovasz_softmax_loss(x, target, per_image=per_image, method=method, return_certificate=True)
            assert certificate.shape == shape and certificate.dtype == torch.float64
            assert loss.shape == ()
            if method == "exact":
                assert (certificate == 0).all()
    x, target = logits((2, 3, 5000)), labels((2, 3, 5000), 3)
    _, certificate = lovasz_softmax_loss(x, target, method="histogram", return_certificate=True)
    assert (certificate > 1e-6).all() and (certificate < 1e-2).all()
    binary = {"target": target.clamp(max=1), "method": "histogram", "return_certificate": True}
    _, certificate = lovasz_hinge_loss(x[:, 0], **binary)
    assert certificate.shape == (2,)
    _, certificate = lovasz_hinge_loss(x[:, 0], per_image=False, **binary)
    assert certificate.shape == ()


# ---- choice, memory


def test_auto_takes_histogram_for_large_segments():
    for pixels, expected in ((AUTO_HISTOGRAM_FROM - 1, "exact"), (AUTO_HISTOGRAM_FROM, "histogram")):
        x, target = logits((1, 2, pixels)), labels((1, 2, pixels), 2)
        for loss, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
            _, certificate = loss(value, target, return_certificate=True)
            assert (certificate > 0).all() == (expected == "histogram")


def test_nothing_of_the_logits_size_is_kept():
    """Neither saved for backward, besides the inputs, nor made in between."""
    x, target = logits((1, 3, 1 << 20)).requires_grad_(), labels((1, 3, 1 << 20), 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel() * t.element_size()), t)[1], lambda t: t):
        lovasz_softmax_loss(x, target, method="histogram")
    sizes = sorted(saved)
    assert sizes[-2:] == sorted([x.numel() * 4, target.numel() * 8])
    assert sum(sizes[:-2]) < 0.05 * x.numel() * 4
