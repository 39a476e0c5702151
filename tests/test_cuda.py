"""The CUDA kernels and their library, as far as a machine without a GPU can tell. What nvcc makes of them is counted in
test_counts.py; emulated, they run with the other backends; on a GPU, in tests/gpu."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator import library

import veerloss

ROOT = Path(__file__).parents[1]
LIBRARY = next(Path(veerloss.__file__).parent.glob("_C_cuda.*"), None)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


def run(*command, **env) -> str:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **env}, capture_output=True, text=True, timeout=1200, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout + done.stderr


@needs_nvcc
def test_where_nvcc_is_the_emulated_kernels_are_tested():
    """Else tests of the backend "emulated" are skipped."""
    assert library.cuda_headers() is not None


@needs_nvcc
def test_the_cuda_library_is_built_and_needs_only_torch():
    assert LIBRARY is not None, "nvcc is here, and setup.py has not built veerloss/_C_cuda"
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", LIBRARY)))
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed
    assert not [name for name in needed if "cudart" in name or "cublas" in name]
    undefined = run("nm", "-D", "--undefined-only", LIBRARY)
    assert "aoti_torch_get_current_cuda_stream" in undefined
    assert not re.findall(r" U (cuda[A-Z]\w+|_ZN\w*c10\w*|_ZN2at\w*)", undefined)  # the stable ABI alone, cudart linked in


TRACE = """
import torch, veerloss
from torch._subclasses.fake_tensor import FakeTensorMode
from veerloss import *

def gradient(node, grads):
    # The backward nodes one by one: autograd's engine asks the driver for a device, which is not there.
    while node is not None and type(node).__name__ != "AccumulateGrad":
        result = getattr(node, "apply", node)(*grads)
        result = result if isinstance(result, tuple) else (result,)
        node, grads = node.next_functions[0][0], result[:1]
    return grads[0]

losses = {
    "sigmoid focal": lambda x, y: sigmoid_focal_loss(x, y, alpha=0.25),
    "softmax focal": lambda x, y: softmax_focal_loss(x, y),
    "lovasz softmax, exact": lambda x, y: lovasz_softmax_loss(x, y, method="exact"),
    "lovasz softmax, histogram": lambda x, y: lovasz_softmax_loss(x, y, method="histogram", classes=[0, 2]),
    "lovasz hinge, exact": lambda x, y: lovasz_hinge_loss(x[:, 0], y.clamp(max=1), method="exact"),
    "lovasz hinge, histogram": lambda x, y: lovasz_hinge_loss(x[:, 0], y.clamp(max=1), method="histogram"),
    "dice": lambda x, y: dice_loss(x, y),
}
for name, loss in losses.items():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 3, 8, 8, device="cuda", requires_grad=True)
        y = torch.zeros(2, 8, 8, dtype=torch.long, device="cuda")
        graphs = []
        torch._dynamo.reset()
        torch.compile(loss, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)(x, y)
        ops = [str(node.target) for node in graphs[0].graph.nodes if "veerloss" in str(node.target)]
        value = loss(x, y)
        grad = gradient(value.grad_fn, (torch.ones_like(value), *[None] * 5))
        assert value.device.type == "cuda" and grad.shape == x.shape and grad.device == x.device
        print(name, ops)
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch: make test with the newest release")
def test_fake_cuda_tensors_trace_every_loss():
    """The library loads beside a CUDA build of torch without a GPU; losses trace under the front end of torch.compile."""
    assert veerloss._extension.native_missing["cuda"] is None, veerloss._extension.native_missing["cuda"]
    for name in (
        "sigmoid_focal_forward",
        "sigmoid_focal_backward",
        "softmax_focal_forward",
        "softmax_focal_backward",
        "lovasz_exact_forward",
        "lovasz_exact_backward",
        "lovasz_histogram_count",
        "lovasz_histogram_backward",
        "region_sum",
        "region_weigh",
        "region_backward",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"veerloss::{name}", "CUDA")
    lines = run(sys.executable, "-c", TRACE, TRITON_INTERPRET="0").splitlines()
    traced = [line for line in lines if "_forward" in line]
    assert len(traced) == 7
    assert all("veerloss." in line for line in traced)


@pytest.mark.skipif(torch.version.cuda is not None, reason="beside a CUDA build the library loads")
def test_reason_without_cuda():
    assert "is not a CUDA build" in veerloss._extension.native_missing["cuda"]
