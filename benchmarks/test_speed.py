"""`pytest benchmarks --benchmark-only`: forward, and forward + backward, of ours and of the peers, in pytest-benchmark.

A group has one input, and everything that takes it. A contestant runs to its end before the next one does: where a machine has
other work, take the ratios of `python -m benchmarks`, whose rounds interleave. `--benchmark-autosave` and `--benchmark-compare`
set commits beside each other. QUICK=1 in the environment: small inputs. DEVICE=cuda: on a GPU.
"""

import os

import pytest
import torch

from . import peers, throughput
from .inputs import Inputs

pytest.importorskip("pytest_benchmark")

QUICK, DEVICE = os.environ.get("QUICK", "") not in ("", "0"), os.environ.get("DEVICE", "cpu")
CASES = [
    pytest.param(inputs, name, passes, id=f"{inputs} {name} {passes}")
    for inputs in throughput.workloads(QUICK)
    for name in peers.TASKS[inputs.task]()
    for passes in ("forward", "forward + backward")
]


@pytest.fixture(scope="module")
def made():
    """The last inputs that were made, which the next case mostly has too."""
    last: dict[Inputs, tuple[torch.Tensor, torch.Tensor]] = {}

    def make(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs not in last:
            last.clear()
            last[inputs] = inputs.make(device=DEVICE)
        return last[inputs]

    return make


@pytest.mark.parametrize(("inputs", "name", "passes"), CASES)
def test_speed(inputs, name, passes, made, benchmark):
    logits, target = made(inputs)
    loss = peers.TASKS[inputs.task]()[name]
    step = throughput.forward_backward(loss, logits, target)
    if passes == "forward":

        def step() -> None:
            with torch.no_grad():
                loss(logits, target)

    def synchronized() -> None:
        step()
        if logits.is_cuda:
            torch.cuda.synchronize()

    try:
        synchronized()
    except Exception as error:  # of a peer that is missing, or does not take this input
        pytest.skip(peers.problem(error))
    benchmark.group = f"{inputs}, {passes}"
    benchmark.extra_info.update(contestant=name, torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(synchronized, rounds=3 if QUICK else 10, warmup_rounds=1)
