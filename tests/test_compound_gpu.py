"""Compound losses by the CUDA kernels, emulated: against the sum of the references of their terms in float64. What the kernels
of the CPU have too is in test_compound.py."""

import pytest
import torch
from budget import SLACK, check_loss, evaluate
from grid import METHODS, labels, layouts, logits, over_methods
from test_compound import ALL, TERMS

from veerloss import compound_loss
from veerloss.compound import not_fused

over_terms = pytest.mark.parametrize("terms", TERMS[:-1], ids=lambda terms: "+".join(terms))
#: Terms and method: in the passes of both methods, and in their own.
WAYS = [*((ALL, {"method": method}) for method in METHODS), ({"focal": 1.0, "dice": 0.5}, {})]
over_ways = pytest.mark.parametrize(("terms", "way"), WAYS, ids=[*METHODS, "without lovasz"])
pytestmark = pytest.mark.parametrize("backend", ["emulated"], indirect=True)


def check(x, y, terms, way, **options):
    check_loss(compound_loss, x, y, **terms, **way, slack=SLACK[way.get("method", "exact")], **options)


@over_terms
@over_methods
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "per image"])
def test_terms(per_image, method, terms, backend):
    shape = (2, 5, 21, 33)
    y = labels(shape, 4, ignore_index=255)  # class 4 is absent
    way = {"method": method} if "lovasz" in terms else {}
    check(layouts(logits(shape)), y, terms, way, per_image=per_image, ignore_index=255, backend=backend)


@over_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_types(dtype, terms, way, backend):
    shape = (2, 5, 21, 33)
    for scale in (0.5, 8.0):
        check(logits(shape, dtype, scale=scale), labels(shape, 5), terms, way, backend=backend)


@over_ways
@pytest.mark.parametrize("kib", [227, 99])
@pytest.mark.parametrize("classes", [1, 2, 8, 12, 16, 19, 23, 26, 33, 65, 161, 257])
def test_numbers_of_classes(classes, kib, terms, way, backend, monkeypatch):
    """In registers, of one thread or of several, in groups where shared memory is small, in rows; and more than that."""
    monkeypatch.setenv("VEERLOSS_EMULATOR_SHARED", str(kib))
    shape = (2, classes, 8, 16)
    y = labels(shape, min(classes, 40), ignore_index=255)
    check(layouts(logits(shape)), y, terms, way, ignore_index=255, backend=backend)


@over_ways
@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0},
        {"gamma": 0.5, "alpha": 0.3},
        {"gamma": 2.0, "alpha": torch.linspace(0.5, 1.5, 6)},
        {"gamma": 3.0, "alpha": torch.linspace(0.5, 1.5, 6)},
    ],
    ids=["gamma 0", "alpha", "alpha of classes", "gamma 3"],
)
def test_focal_options(options, terms, way, backend):
    shape = (2, 6, 17, 29)
    check(layouts(logits(shape)), labels(shape, 6, ignore_index=255), terms, way, ignore_index=255, backend=backend, **options)


@over_ways
def test_cross_entropy_divides_by_the_alpha_of_its_labels(terms, way, backend):
    shape = (2, 6, 17, 29)
    options = {"alpha": torch.linspace(0.5, 1.5, 6), "ignore_index": 255}
    terms = {name if name != "focal" else "cross_entropy": weight for name, weight in terms.items()}
    check(layouts(logits(shape)), labels(shape, 6, ignore_index=255), terms, way, backend=backend, **options)


@over_methods
def test_classes_of_each_term(method, backend):
    """A class that Lovász leaves out has the weights of the region loss alone, in all of its bins."""
    shape = (2, 5, 21, 33)
    options = {"lovasz_classes": [1, 3], "region_classes": [0, 1, 4], "method": method}
    check(layouts(logits(shape)), labels(shape, 5), ALL, options, backend=backend)


@over_methods
def test_the_lowest_bin_has_the_weight_of_the_region_loss(method, backend):
    """Of background: its weight for Lovász is 0."""
    shape = (1, 3, 40, 50)
    x, y = logits(shape, scale=6.0), labels(shape, 3)
    with_lovasz = evaluate(compound_loss, x, y, dice=1.0, lovasz=0.0, method=method, backend=backend)
    alone = evaluate(compound_loss, x, y, dice=1.0, backend=backend)
    torch.testing.assert_close(with_lovasz, alone, rtol=1e-5, atol=1e-9)


@over_ways
def test_confident_pixels_keep_their_digits(terms, way, backend):
    """Each class of each pixel, down to 1 - p of 1e-9."""
    x = torch.zeros(1, 4, 64)
    x[0, 0] = torch.linspace(0, 20, 64)
    y = (torch.arange(64) % 2)[None]
    terms = {"focal" if "focal" in terms else "cross_entropy": 1.0, **{name: 0.0 for name in terms if name != "focal"}}
    for gamma in (0.0, 1.5, 2.0):
        found = evaluate(compound_loss, x, y, gamma=gamma, **terms, **way, backend=backend)[1]
        truth = evaluate(compound_loss, x.double(), y, gamma=gamma, **terms, **way, backend="reference")[1]
        torch.testing.assert_close(found.double(), truth, rtol=2e-5, atol=0)


@over_ways
@pytest.mark.parametrize("classes", [3, 40, 300])
def test_ignored_pixels_may_hold_nan(classes, terms, way, backend):
    shape = (2, classes, 7, 11)
    x, y = logits(shape), labels(shape, classes, ignore_index=255)
    loss, gradient = evaluate(compound_loss, x, y, ignore_index=255, backend=backend, **terms, **way)
    x.movedim(1, -1)[y == 255] = torch.nan
    for layout in layouts(x).values():
        found = evaluate(compound_loss, layout, y, ignore_index=255, backend=backend, **terms, **way)
        torch.testing.assert_close(found, (loss, gradient), rtol=1e-5, atol=1e-8)
    nothing = evaluate(compound_loss, x, torch.full_like(y, 255), ignore_index=255, backend=backend, **terms, **way)
    assert nothing[0] == 0 and nothing[1].count_nonzero() == 0


@over_ways
@pytest.mark.parametrize("bad", ["target", "logit"])
def test_what_is_bad_makes_the_loss_nan(bad, terms, way, backend):
    shape = (2, 3, 7, 11)
    x, y = logits(shape), labels(shape, 3)
    if bad == "target":
        y[1, 3, 5] = 3
    else:
        x[1, 0, 3, 5] = torch.nan
    loss, parts = compound_loss(x, y, backend=backend, return_parts=True, **terms, **way)
    assert loss.isnan() and all(part.isnan() for part in parts.values())


@over_ways
@pytest.mark.parametrize("shape", [(2, 3, 37, 41), (1, 30, 24, 40)], ids=["3 classes", "30 classes"])
def test_the_order_of_threads_changes_no_bit(shape, terms, way, backend, monkeypatch):
    x, y = logits(shape), labels(shape, shape[1])
    expected = evaluate(compound_loss, x, y, ignore_index=1, backend=backend, **terms, **way)
    for seed in range(2):
        monkeypatch.setenv("VEERLOSS_EMULATOR_SEED", str(seed))
        found = evaluate(compound_loss, x, y, ignore_index=1, backend=backend, **terms, **way)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@over_ways
def test_what_no_kernel_fuses(terms, way, backend):
    """Kernels do not take what the choice of a backend leaves to the sum of the terms."""
    gpu, y = torch.device("cuda"), labels((2, 2, 8, 9), 2)
    assert not_fused(gpu, "softmax", 0.0) is None
    assert not_fused(torch.device("cpu"), "sigmoid", 0.1) is None
    for x, options in (
        (logits((2, 2, 8, 9)), {"activation": "softmax", "label_smoothing": 0.1}),
        (logits((2, 8, 9)), {"activation": "sigmoid", "label_smoothing": 0.0}),
    ):
        assert "activation='softmax' and label_smoothing=0" in not_fused(gpu, **options)
        with pytest.raises(RuntimeError, match="of a softmax, without label smoothing"):
            compound_loss(x, y, backend=backend, **terms, **way, **options)
