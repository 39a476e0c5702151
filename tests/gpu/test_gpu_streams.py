"""Streams, CUDA graphs, the same bits in every run, torch.compile, and the operators as PyTorch sees them."""

import math

import pytest
import torch
from gpu_cases import (
    CASES,
    LARGE,
    SMALL,
    assert_near,
    assert_same,
    evaluate,
    inputs,
    loss_of,
    needs_gpu,
    of_backend,
    over_cases,
    over_sizes,
)
from samples import HINGE, samples, strided
from torch.library import opcheck

from veerloss.ops import NAMESPACES

pytestmark = needs_gpu


@over_cases()
def test_same_bits_every_time(case):
    """Of the histogram method; the others to rounding."""
    x, y = inputs(LARGE)
    expected = evaluate(case, x, y)
    for _ in range(3):
        assert_same(case, evaluate(case, x, y), expected)


@over_cases()
def test_another_stream(case):
    """Logits that come late on it, so that a kernel on any other stream would read NaN."""
    x, y = inputs(LARGE)
    expected = evaluate(case, x, y)
    late = torch.full_like(x, math.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = evaluate(case, late, y)
    stream.synchronize()
    assert_same(case, found, expected)


@over_cases()
def test_graph_capture_and_replay(case):
    x, y = inputs(LARGE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            evaluate(case, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = evaluate(case, x, y)
    for seed in (5, 6):
        new = inputs(LARGE, seed)
        expected = evaluate(case, *new)
        x.copy_(new[0])
        y.copy_(new[1])
        graph.replay()
        torch.cuda.synchronize()
        assert_near(found, expected)


@over_cases()
@over_sizes
def test_no_synchronisation(case, shape):
    x, y = inputs(shape)
    evaluate(case, x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(case, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@over_cases()
def test_compile_whole_graph(case):
    torch._dynamo.reset()
    x, y = inputs(SMALL)
    x.requires_grad_()
    results = []
    function = lambda v: CASES[case](2 * v, y)  # noqa: E731
    for run in (function, torch.compile(function, fullgraph=True, dynamic=False)):
        loss = run(x)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    assert_near(results[1], results[0])


#: Of the samples of each operator one with many options.
SAMPLES = {
    "sigmoid_focal": ("sigmoid_focal", 1),
    "softmax_focal": ("softmax_focal", 1),
    "lovasz_softmax": ("lovasz_exact", 1),
    "lovasz_hinge": ("lovasz_exact", HINGE),
    "lovasz_histogram": ("lovasz_histogram", 1),
    "region": ("region", 1),
    "compound": ("compound", 0),
}
OPERATORS = [
    of_backend(backend, loss_of(name), namespace, name)
    for backend, namespace in NAMESPACES.items()
    for name in SAMPLES
    if backend != "triton" or name not in ("lovasz_histogram", "region", "compound")
]


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize(("space", "name"), OPERATORS)
def test_opcheck(space, name, layout):
    stem, number = SAMPLES[name]
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in samples()[stem][number].items()}
    arguments["logits"] = layout(arguments["logits"]).requires_grad_()
    opcheck(getattr(getattr(torch.ops, space), f"{stem}_forward").default, (), arguments)
