"""Everything once, and small: what `make gpu` runs under compute-sanitizer."""

import torch
from gpu_cases import evaluate, needs_gpu, out_of_range, over_cases, over_histogram_backends
from grid import labels, layouts, logits

pytestmark = needs_gpu


@over_cases()
def test_sanitizer(case):
    for shape, dtype in (((2, 3, 37), torch.float32), ((1, 5, 1030), torch.bfloat16), ((70, 2, 2, 2), torch.float32)):
        x, y = logits(shape, dtype), labels(shape, shape[1], ignore_index=255 if "focal-softmax" in case else None)
        options = {"ignore_index": 255} if "focal-softmax" in case else {}
        for value in layouts(x.cuda()).values():
            loss, gradient = evaluate(case, value, y.cuda(), **options)
            assert loss.cpu().isfinite() and gradient.cpu().isfinite().all()


@over_cases()
def test_sanitizer_of_a_target_out_of_range(case, monkeypatch):
    monkeypatch.delenv("VEERLOSS_CHECK", raising=False)
    for value in (-1, 255, 2**40):
        x, call = out_of_range(case, value)
        loss = call()
        torch.autograd.grad(loss, x)
        assert loss.cpu().isnan()


@over_histogram_backends
def test_sanitizer_of_lovasz_bins_from_a_sample(backend):
    """One class is rare: its bins are placed again."""
    x, y = logits((1, 2, 300_000), scale=0.25), torch.zeros(1, 300_000, dtype=torch.long)
    y[0, ::200] = 1
    loss, gradient = evaluate(f"lovasz-softmax-{backend}-histogram", x.cuda(), y.cuda())
    assert loss.cpu().isfinite() and gradient.cpu().isfinite().all()
