"""Method "histogram" of the Lovász losses: its accuracy, its certificate, and when it is taken. What it shares with
"exact" (accuracy, edges, reductions, classes) is in test_lovasz.py."""

import pytest
import torch
from budget import SLACK, check_loss, evaluate
from grid import KINDS, labels, layouts, logits, lovasz_case, over_histogram, over_histogram_kernels
from hypothesis import given
from hypothesis import strategies as st
from samples import rare_foreground

from veerloss import _histogram, lovasz, lovasz_hinge_loss, lovasz_softmax_loss, ops
from veerloss.lovasz import AUTO_HISTOGRAM_FROM

over_kinds = pytest.mark.parametrize("kind", KINDS)


# ---- accuracy where bins are few for the pixels


@over_histogram_kernels
@pytest.mark.parametrize("pixels", [1023, 65_536, 70_001])
def test_counts_of_16_bits_do_not_overflow(pixels, backend):
    """All of a kind alike, in one bin, past what a thread's counters hold."""
    x, target = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, pixels).contiguous(), torch.zeros(1, pixels).long()
    target[0, ::30] = 1
    options = {"method": "histogram", "backend": backend, "slack": SLACK["histogram"]}
    check_loss(lovasz_softmax_loss, x, target, **options)
    check_loss(lovasz_hinge_loss, x[:, 0], target, **options)


#: KiB of shared memory that a block of a GPU may have: an H100, an A100, GPUs for graphics.
SHARED_KIB = (227, 163, 99)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("kib", SHARED_KIB)
@pytest.mark.parametrize("classes", [8, 12, 16, 19, 23, 26, 33, 64, 65, 97, 161, 257])
def test_softmax_numbers_of_classes(classes, kib, backend, monkeypatch):
    """Classes are in registers, of one thread or of several, and in groups where shared memory is small; pixels in
    rows where their classes lie next to each other. (256 pixels in all: as exact as the exact method.)"""
    monkeypatch.setenv("VEERLOSS_EMULATOR_SHARED", str(kib))
    shape = (2, classes, 8, 16)
    target = labels(shape, min(classes, 40), ignore_index=255)
    target[target == 5] = 7  # an absent class
    options = {"ignore_index": 255, "method": "histogram", "backend": backend, "slack": SLACK["histogram"]}
    check_loss(lovasz_softmax_loss, layouts(logits(shape)), target, **options)


def assert_near_exact(loss, x, target, backend: str, **options) -> None:
    """Against the exact method in float64: the loss to 1e-6, relative where it is above 1, the gradient to 1e-3."""
    found, gradient = evaluate(loss, x, target, method="histogram", backend=backend, **options)
    truth, exact = evaluate(loss, x.double(), target, method="exact", backend="reference", **options)
    assert abs(found.item() - truth.item()) <= 1e-6 * max(truth.item(), 1)
    assert (gradient.double() - exact).norm() <= 1e-3 * exact.norm()


@over_kinds
@pytest.mark.parametrize("foreground", [0.3, 0.01, 1e-3])
def test_large_segments(foreground, kind):
    """Where bins are placed by a sample; rare foreground, of which it has a few pixels, gets them placed again."""
    shape = (2, 2, 400, 500)
    target = (torch.rand(2, 400, 500, generator=torch.Generator().manual_seed(0)) < foreground).long()
    assert target.numel() > _histogram.SAMPLED_FROM and target[0].numel() > _histogram.SAMPLED_IMAGE
    loss, x, options = lovasz_case(kind, logits(shape, scale=1.0 if kind == "probabilities" else 2.0))
    if kind == "hinge":
        options["per_image"] = False
    assert_near_exact(loss, x, target, "native", **options)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@over_kinds
def test_bins_are_placed_again_as_natively(kind, backend, monkeypatch):
    """Those that a sample without foreground gives are far off. (So few pixels do not come near the exact method.) In float64,
    whose coordinates are the same float32 numbers."""
    monkeypatch.setattr(_histogram, "SAMPLED_FROM", 1 << 12)
    monkeypatch.setattr(_histogram, "SAMPLED_IMAGE", 1 << 10)
    x, target = rare_foreground(20_000)
    loss, x, options = lovasz_case(kind, x.double())
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


@over_histogram
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


@over_histogram_kernels
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


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_auto_takes_exact_of_triton(backend, monkeypatch):
    """Which has no "histogram", however large the segments are."""
    monkeypatch.setattr(lovasz, "AUTO_HISTOGRAM_FROM", 1000)
    x, target = logits((1, 2, 3000)), labels((1, 2, 3000), 2)
    for loss, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
        found, certificate = loss(value, target, return_certificate=True, backend=backend)
        assert (certificate == 0).all()
        torch.testing.assert_close(found, loss(value, target, method="exact", backend="native"))
        _, certificate = loss(value, target, return_certificate=True, backend="native")
        assert (certificate > 0).all()


def test_triton_has_no_histogram():
    x, target = logits((1, 2, 200)), labels((1, 2, 200), 2)
    for loss, value in ((lovasz_softmax_loss, x), (lovasz_hinge_loss, x[:, 0])):
        with pytest.raises(
            RuntimeError, match=r"backend='triton' cannot run .*: method 'histogram', which process_group needs too, has no"
        ):
            loss(value, target, method="histogram", backend="triton")
    assert not hasattr(ops.operators("triton"), "lovasz_histogram_forward")


def test_nothing_of_the_logits_size_is_kept():
    """Neither saved for backward, besides the inputs, nor made in between."""
    x, target = logits((1, 3, 1 << 20)).requires_grad_(), labels((1, 3, 1 << 20), 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel() * t.element_size()), t)[1], lambda t: t):
        lovasz_softmax_loss(x, target, method="histogram")
    sizes = sorted(saved)
    assert sizes[-2:] == sorted([x.numel() * 4, target.numel() * 8])
    assert sum(sizes[:-2]) < 0.05 * x.numel() * 4
