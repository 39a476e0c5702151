"""Method "histogram": its weights, its certificate, and the passes that place its bins. What it shares with "exact" (edges,
reductions, classes) is in test_lovasz.py."""

import pytest
import torch
from budget import check_loss
from grid import DTYPES, SHAPES, labels, layouts, logits
from hypothesis import given
from hypothesis import strategies as st

from veerloss import _histogram, lovasz_hinge_loss, lovasz_softmax_loss
from veerloss.reference import histogram
from veerloss.reference.lovasz import lovasz_weights

#: A pixel whose error is rounded across the edge of a bin moves the loss by its weight times the width of a bin.
BIN = 1e-6


# ---- against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_grid(shape, dtype):
    target = labels(shape, shape[1], ignore_index=255)
    for x in layouts(logits(shape, dtype)).values():
        for options in ({}, {"classes": "all", "per_image": True}):
            check_loss(lovasz_softmax_loss, x, target, ignore_index=255, method="histogram", slack=BIN, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 31, 33), (70, 2, 2)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 2.0, 1e3])
def test_hinge_grid(shape, dtype, scale):
    target = labels((shape[0], 2, *shape[1:]), 2)
    target.view(-1)[::5] = 255
    wide = logits((*shape[:-1], 2 * shape[-1]), dtype, scale=scale)
    for x in (logits(shape, dtype, scale=scale), wide[..., ::2]):
        for per_image in (True, False):
            check_loss(lovasz_hinge_loss, x, target, per_image=per_image, ignore_index=255, method="histogram", slack=BIN)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("classes", ["present", "all", [1], (4, 0, 3)], ids=str)
def test_options(classes, reduction, per_image):
    """Class 4 is absent, and one image is all ignored."""
    shape = (3, 5, 9, 7)
    target = labels(shape, 4, ignore_index=-1)
    target[1] = -1
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])
    options = {"classes": classes, "reduction": reduction, "per_image": per_image, "class_weight": weight, "ignore_index": -1}
    check_loss(lovasz_softmax_loss, logits(shape), target, method="histogram", **options)
    p = logits(shape).softmax(1)
    check_loss(lovasz_softmax_loss, p, target, method="histogram", from_logits=False, **options)


@pytest.mark.parametrize("pixels", [1023, 65_536, 70_001])
def test_counts_of_16_bits_do_not_overflow(pixels):
    """All pixels alike, in one bin, past what a thread's counters hold."""
    x = torch.zeros(1, 2, pixels)
    target = (torch.arange(pixels) % 3 == 0).long()[None]
    check_loss(lovasz_softmax_loss, x, target, method="histogram")
    check_loss(lovasz_hinge_loss, x[:, 0], target, method="histogram")


def _errors(loss, x, target, **options):
    """Against the exact method in float64: loss error, relative where above 1; relative gradient error; certificate."""
    results = []
    for value, how in ((x, "histogram"), (x.double(), "exact")):
        value = value.clone().requires_grad_()
        result, certificate = loss(value, target, method=how, return_certificate=True, **options)
        results.append((result.item(), torch.autograd.grad(result, value)[0].double(), certificate))
    (found, gradient, certificate), (truth, exact, _) = results
    return abs(found - truth) / max(truth, 1), ((gradient - exact).norm() / exact.norm()).item(), certificate


@pytest.mark.parametrize("foreground", [0.3, 0.01, 1e-3])
@pytest.mark.parametrize("kind", ["softmax", "probabilities", "hinge"])
def test_large_segments(kind, foreground):
    """Where bins are placed by a sample; rare foreground, of which it has a few pixels, makes them be placed again."""
    shape = (2, 2, 400, 500)
    target = (torch.rand(2, 400, 500, generator=torch.Generator().manual_seed(0)) < foreground).long()
    assert target.numel() > _histogram.SAMPLED_FROM and target[0].numel() > _histogram.SAMPLED_IMAGE
    x = logits(shape)
    if kind == "hinge":
        error, gradient, _ = _errors(lovasz_hinge_loss, x[:, 0], target, per_image=False)
    else:
        x = x if kind == "softmax" else (x / 2).softmax(1)
        error, gradient, _ = _errors(lovasz_softmax_loss, x, target, from_logits=kind == "softmax")
    assert error <= 1e-6 and gradient <= 1e-3


def test_doubtful_bins_are_placed_again():
    """What the sample alone would have given is far off, and its own counts say so."""
    target = torch.zeros(1, 400_000, dtype=torch.long)
    target[0, ::200] = 1
    x = logits((1, 2, 400_000), scale=0.25)
    ops = torch.ops.veerloss
    count = lambda table, sampled: ops.lovasz_histogram_count(x, target, table, None, 0, False, None, sampled)  # noqa: E731
    doubts = []
    for sampled in (True, False):
        table = ops.lovasz_histogram_place(count(None, sampled)[0], None, 0)
        counts, largest = count(table, False)
        *_, doubtful = ops.lovasz_histogram_weigh(x, counts, largest, table, None, True, None, 0, False, 1, False)
        doubts.append(doubtful[0, 1].item())
    assert doubts == [True, False]
    assert _errors(lovasz_softmax_loss, x, target)[1] <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_of_many_classes(dtype):
    """Their tiles are shorter than a run of the sample."""
    x, target = logits((1, 300, 70), dtype), labels((1, 300, 70), 300)
    counts, _ = torch.ops.veerloss.lovasz_histogram_count(x, target, None, None, 0, False, None, True)
    assert (counts.sum((2, 3)) == 64).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["softmax", "probabilities", "hinge"])
def test_ignored_pixels_may_hold_anything(kind, bad):
    x, target = logits((1, 2, 50)), labels((1, 2, 50), 2)
    target[0, 7] = 255
    x[0, :, 7] = bad
    if kind == "hinge":
        losses = [lovasz_hinge_loss(x[:, 0], target, ignore_index=255, method=m) for m in ("histogram", "exact")]
    else:
        x = x if kind == "softmax" else x.sigmoid().where(target != 255, bad)
        losses = [
            lovasz_softmax_loss(x, target, ignore_index=255, from_logits=kind == "softmax", method=m)
            for m in ("histogram", "exact")
        ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_gradient_of_probabilities_with_a_negative_factor():
    """At 0, at 1, and outside, where the slope of |y - p| is told from the sign of the weight."""
    p = torch.tensor([[[0.0, 1.0, 0.52, 0.41, -0.25, 1.37], [1.0, 0.0, 0.48, 0.44, 1.22, -0.33]]])
    target = torch.tensor([[0, 0, 1, 1, 0, 1]])
    gradients = []
    for method in ("histogram", "exact"):
        value = p.clone().requires_grad_()
        weight = torch.tensor([1.0, -2.0])
        loss = 1 - lovasz_softmax_loss(value, target, from_logits=False, method=method, class_weight=weight)
        gradients.append(torch.autograd.grad(loss, value)[0])
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-6)


# ---- the pieces


def test_cells_cover_every_error():
    for bounded in (True, False):
        edges = histogram.cell_edges(bounded)
        assert edges[0] == 0 and (edges.diff() > 0).all() and edges[-1] >= (1 if bounded else 3.4e38)
        values = torch.cat([edges[:-1], edges[1:] * (1 - 1e-6), torch.logspace(-12, 0 if bounded else 38, 999)])
        values = values[(values > 0) & (values <= (1 if bounded else 3.4e38))].float()
        cell, position = histogram.cells_of(values, bounded)
        assert (cell >= 0).all() and (cell < histogram.cells(bounded)).all()
        rounding = 2e-7 * (values.double() + histogram.OFFSET)
        assert (values.double() >= edges[cell] - rounding).all() and (values.double() <= edges[cell + 1] + rounding).all()
        ascending = values.sort().values
        cell, position = histogram.cells_of(ascending, bounded)
        assert ((cell << histogram.POSITION_BITS) + position).diff().min() >= 0


@pytest.mark.parametrize("errors", [_histogram.SOFTMAX, _histogram.HINGE])
def test_kernel_and_reference_place_the_same_bins(errors):
    bounded = errors == _histogram.SOFTMAX
    cells, bins = _histogram.cells_and_bins(errors)
    assert cells == histogram.cells(bounded)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (1, 3, 2, 1 + cells), generator=generator, dtype=torch.int32)
    counts *= torch.rand(counts.shape, generator=generator) < 0.1
    table = torch.ops.veerloss.lovasz_histogram_place(counts, None, errors)
    for c in range(3):
        bg, fg = counts[0, c].long()
        expected = histogram.place(fg[1:], bg[1:], fg.sum(), bounded)
        assert ((table[0, c] >> 16) - expected).abs().max() <= 1  # sums in another order
        assert (table[0, c] & 0xFFFF).equal((1 + (table[0, c] >> 16).cumsum(0) - (table[0, c] >> 16)).int())
        assert 1 + (table[0, c] >> 16).sum() <= bins


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


@given(
    st.integers(1, 4000), st.integers(2, 4), st.integers(0, 2**31), st.sampled_from([1e-3, 0.3, 3.0, 30.0]),
    st.sampled_from(["softmax", "probabilities", "hinge"]), st.booleans(),
)  # fmt: skip
def test_certificate_bounds_the_distance_of_the_weights(pixels, classes, seed, scale, kind, ties):
    """The gradient of probabilities and of the hinge is the weights themselves; that of a softmax differs by less."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, classes, pixels, generator=generator) * scale
    x = (x * 4 / scale).round() * scale / 4 if ties else x
    target = torch.randint(0, classes, (1, pixels), generator=generator)
    target.view(-1)[0] = 1
    if kind == "hinge":
        x, loss, options = x[:, 0], lovasz_hinge_loss, {}
        target = target.clamp(max=1)
    else:
        loss, options = lovasz_softmax_loss, {"classes": [1], "from_logits": kind == "softmax"}
        x = x if kind == "softmax" else x.softmax(1)
    for backend in ("native", "reference"):
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


def test_certificate_of_the_exact_method_is_0():
    x, target = logits((2, 3, 50)), labels((2, 3, 50), 3)
    for per_image, shape in ((False, (3,)), (True, (2, 3))):
        for how in ("exact", "histogram"):
            loss, certificate = lovasz_softmax_loss(x, target, per_image=per_image, method=how, return_certificate=True)
            assert certificate.shape == shape and certificate.dtype == torch.float64
            assert loss.shape == ()
            if how == "exact":
                assert (certificate == 0).all()
    x, target = logits((2, 3, 5000)), labels((2, 3, 5000), 3)
    _, certificate = lovasz_softmax_loss(x, target, method="histogram", return_certificate=True)
    assert (certificate > 1e-6).all() and (certificate < 1e-2).all()
    _, certificate = lovasz_hinge_loss(x[:, 0], target.clamp(max=1), method="histogram", return_certificate=True)
    assert certificate.shape == (2,)
    _, certificate = lovasz_hinge_loss(
        x[:, 0], target.clamp(max=1), method="histogram", per_image=False, return_certificate=True
    )
    assert certificate.shape == ()


# ---- determinism, tails, choice


@pytest.mark.parametrize("kind", ["softmax", "hinge"])
def test_same_bits_for_any_number_of_threads_and_any_run(kind):
    x, target = logits((2, 3, 200_000)), labels((2, 3, 200_000), 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            value = (x if kind == "softmax" else x[:, 0]).clone().requires_grad_()
            if kind == "softmax":
                loss = lovasz_softmax_loss(value, target, method="histogram")
            else:
                loss = lovasz_hinge_loss(value, target, method="histogram", per_image=False)
            results.append((loss.detach(), torch.autograd.grad(loss, value)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("outlier", [50.0, 6e4, 1e9, 1e30])
def test_hinge_keeps_its_tail(outlier):
    """A single far pixel neither loses its own loss nor takes the others' bins."""
    x, target = logits((1, 100_000)), labels((1, 2, 100_000), 2)
    x[0, 5] = outlier if target[0, 5] == 0 else -outlier
    error, gradient, _ = _errors(lovasz_hinge_loss, x, target)
    assert error <= 1e-6 and gradient <= 1e-3


def test_auto_takes_histogram_for_large_segments():
    from veerloss.lovasz import AUTO_HISTOGRAM_FROM

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


@pytest.mark.parametrize("name", ["table", "weights", "tops", "scale"])
def test_backward_checks_what_it_is_given(name):
    x, target = logits((2, 3, 10)), labels((2, 3, 10), 3)
    ops = torch.ops.veerloss
    _, scale, table, weights, tops, _ = ops.lovasz_histogram_forward(x, target, None, True, False, None, None, 0, 1, False)
    given = {"table": table, "weights": weights, "tops": tops, "scale": scale}
    ops.lovasz_histogram_backward(torch.ones(()), x, target, *given.values(), 0, False, None, 1)
    wild = {**given, "table": torch.full_like(table, -1)}
    with pytest.raises(
        (ValueError, RuntimeError), match="lie within the bins"
    ):  # of which type depends on the version of torch
        ops.lovasz_histogram_backward(torch.ones(()), x, target, *wild.values(), 0, False, None, 1)
    given[name] = given[name].flatten()[:-1].clone()
    with pytest.raises((ValueError, RuntimeError), match="expected"):
        ops.lovasz_histogram_backward(torch.ones(()), x, target, *given.values(), 0, False, None, 1)
