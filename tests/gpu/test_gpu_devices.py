"""A GPU that is not the current one; and whether the CUDA library runs on each."""

import pytest
import torch
from gpu_cases import LARGE, assert_near, assert_same, evaluate, inputs, needs_gpu, over_cases, over_sizes

from veerloss._extension import cuda_missing, native_missing

pytestmark = needs_gpu
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
OTHER = torch.device("cuda", 1)


def inputs_there(shape, seed=1):
    return [t.to(OTHER) for t in inputs(shape, seed)]


def evaluate_there(case, x, y):
    """(loss, gradient) on the other GPU, with the first one current."""
    with torch.cuda.device(0):
        found = evaluate(case, x, y)
        assert torch.cuda.current_device() == 0
    assert [t.device for t in found] == [OTHER, OTHER]
    return found


def test_the_native_library_runs_on_every_gpu_from_8_0_on():
    if native_missing["cuda"] is not None:
        pytest.skip(native_missing["cuda"])
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) >= (8, 0):
            assert cuda_missing(index) is None


@needs_two_gpus
@over_cases()
@over_sizes
def test_another_gpu(case, shape):
    expected = evaluate(case, *inputs(shape))
    found = evaluate_there(case, *inputs_there(shape))
    assert_same(case, [t.cpu() for t in found], [t.cpu() for t in expected])


@needs_two_gpus
@over_cases()
def test_graph_capture_and_replay_on_another_gpu(case):
    x, y = inputs_there(LARGE)
    stream = torch.cuda.Stream(OTHER)
    stream.wait_stream(torch.cuda.current_stream(OTHER))
    with torch.cuda.stream(stream):  # which makes its GPU current, until evaluate_there
        for _ in range(3):
            evaluate_there(case, x, y)
    torch.cuda.synchronize(OTHER)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = evaluate_there(case, x, y)
    for seed in (5, 6):
        new = inputs(LARGE, seed)
        expected = evaluate(case, *new)
        x.copy_(new[0])
        y.copy_(new[1])
        with torch.cuda.device(OTHER):
            graph.replay()
        torch.cuda.synchronize(OTHER)
        assert_near(found, expected)
