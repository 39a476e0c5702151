"""Logits of lower resolution than the target on a GPU: against the interpolated ones in float64, and that nothing waits."""

import functools

import pytest
import torch
import torch.nn.functional as F
from budget import GRADIENT_SLACK, SLACK, assert_within_budget, evaluate
from gpu_cases import TERMS, needs_gpu, of_backend
from grid import labels, layouts, logits

from veerloss import compound_loss, dice_loss, lovasz_softmax_loss, sigmoid_focal_loss, softmax_focal_loss

pytestmark = needs_gpu

LOSSES = {
    "softmax focal": (softmax_focal_loss, 0.0),
    "softmax focal, each": (functools.partial(softmax_focal_loss, reduction="none"), 0.0),
    "sigmoid focal": (functools.partial(sigmoid_focal_loss, alpha=0.25), 0.0),
    "sigmoid focal, each": (functools.partial(sigmoid_focal_loss, reduction="none"), 0.0),  # interpolated first
    "lovasz histogram": (functools.partial(lovasz_softmax_loss, method="histogram"), SLACK["histogram"]),
    "region": (dice_loss, 0.0),
    "compound": (functools.partial(compound_loss, **TERMS, method="histogram"), SLACK["histogram"]),
}
over_losses = pytest.mark.parametrize("name", [of_backend("native", name.partition(",")[0], name) for name in LOSSES])
SIZES = [((2, 3, 4, 5), (16, 20)), ((1, 19, 33, 47), (132, 188)), ((2, 8, 13, 11), (47, 41)), ((1, 24, 2, 2), (61, 67))]


@over_losses
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_grid(shape, size, dtype, align_corners, name):
    loss, slack = LOSSES[name]
    target = labels((shape[0], shape[1], *size), shape[1], ignore_index=255)
    x = logits(shape, dtype)

    def full(value):
        up = functools.partial(F.interpolate, size=size, mode="bilinear", align_corners=align_corners)
        return evaluate(lambda v: loss(up(v), target, ignore_index=255, backend="reference"), value)

    reference, truth = full(x.float()), full(x.double())
    options = {"upsample": "bilinear", "align_corners": align_corners, "ignore_index": 255, "backend": "native"}
    for layout, value in layouts(x.cuda()).items():
        found = [t.cpu() for t in evaluate(loss, value, target.cuda(), **options)]
        assert_within_budget(found[0], reference[0], truth[0], f"{layout}: loss", slack)
        assert_within_budget(found[1], reference[1], truth[1], f"{layout}: gradient", GRADIENT_SLACK * slack)


@pytest.fixture
def large():
    x = logits((2, 19, 64, 128)).cuda()
    return x, labels((2, 19, 256, 512), 19, ignore_index=255).cuda()


@over_losses
def test_same_bits_every_time_and_no_synchronisation(name, large):
    loss = functools.partial(LOSSES[name][0], upsample="bilinear", ignore_index=255, backend="native")
    expected = evaluate(loss, *large)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [evaluate(loss, *large) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for result in found for a, b in zip(result, expected, strict=True))


@over_losses
def test_graph_capture_and_replay(name, large):
    loss = functools.partial(LOSSES[name][0], upsample="bilinear", ignore_index=255, backend="native")
    x, y = large
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            evaluate(loss, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(loss, x, y)
    x.copy_(logits((2, 19, 64, 128), seed=5).cuda())
    expected = evaluate(loss, x, y)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", [of_backend("native", n.partition(",")[0], n) for n in LOSSES if n != "sigmoid focal, each"])
def test_memory(name, large):
    """Less than half of the logits at full size, of which interpolation takes two."""
    x, y = large
    loss = functools.partial(LOSSES[name][0], upsample="bilinear", ignore_index=255, backend="native")
    evaluate(loss, x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    evaluate(loss, x, y)
    assert torch.cuda.max_memory_allocated() - before < 0.5 * 4 * 2 * 19 * 256 * 512
