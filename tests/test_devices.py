"""Whether the CUDA library runs on a GPU, which `auto` asks before it chooses: with answers made up here, so that no GPU is
needed."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veerloss import __main__, _extension
from veerloss._arguments import choose_backend, missing_reason

ROOT = Path(__file__).parents[1]

#: What the library answers: CUDA's error, the CUDA of the driver, and that of nvcc.
RUNS = (None, 13000, 13000)
OLD_DRIVER = ("CUDA driver version is insufficient for CUDA runtime version", 12040, 13000)
NO_CODE = ("no kernel image is available for execution on the device", 13010, 13000)


@pytest.fixture
def gpus(monkeypatch):
    """`asked = gpus(answer, ...)`: so many GPUs, where the library answers this; which of them have been asked."""

    def pretend(*answers):
        asked = []
        monkeypatch.setitem(_extension.native_missing, "cuda", None)
        monkeypatch.setattr(_extension, "_triton_reason", None)
        monkeypatch.setattr(_extension, "_cuda_reasons", {})
        monkeypatch.setattr(_extension, "_ask_cuda", lambda index: asked.append(index) or answers[index])
        for module in (_extension, __main__):  # (torch.compile itself would ask torch.cuda)
            monkeypatch.setattr(module, "gpu_count", lambda: len(answers))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: len(answers) - 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
        return asked

    return pretend


def test_each_gpu_is_asked_once(gpus):
    asked = gpus(RUNS, OLD_DRIVER)
    for _ in range(2):
        for loss in ("sigmoid focal", "softmax focal", "lovasz"):
            assert choose_backend("auto", torch.device("cuda", 0), loss) == "native"
            assert choose_backend("auto", torch.device("cuda", 1), loss) == "triton"
    assert choose_backend("auto", torch.device("cuda"), "lovasz") == "triton"  # the current one, 1
    assert asked == [0, 1]


WHERE = "the GPU has compute capability 8.6"
REINSTALL = "reinstall from source with TORCH_CUDA_ARCH_LIST=8.6"
REASONS = {
    OLD_DRIVER: f"it is built with CUDA 13.0, the driver is for 12.4, {WHERE}; update the driver, or {REINSTALL} and nvcc 12.4 "
    "or older",
    NO_CODE: f"it is built with CUDA 13.0, the driver is for 13.1, {WHERE}; {REINSTALL}",
}


@pytest.mark.parametrize(("answer", "expected"), REASONS.items())
def test_native_is_an_error_with_the_reason(answer, expected, gpus):
    gpus(answer)
    with pytest.raises(RuntimeError) as error:
        choose_backend("native", torch.device("cuda", 0), "lovasz")
    there = "backend='native' cannot run on device 'cuda:0': the compiled CUDA library does not run there"
    assert str(error.value) == f"{there}: {answer[0]}; {expected}"


def test_without_triton_the_reference_runs(gpus, monkeypatch):
    gpus(NO_CODE)
    monkeypatch.setattr(_extension, "_triton_reason", "triton is not installed")
    assert choose_backend("auto", torch.device("cuda", 0), "lovasz") == "reference"


def test_a_library_that_does_not_load_is_not_asked(gpus, monkeypatch):
    asked = gpus(RUNS)
    monkeypatch.setitem(_extension.native_missing, "cuda", "no library")
    assert missing_reason("native", torch.device("cuda", 0), "lovasz") == "no library"
    assert not asked


def test_a_gpu_that_is_not_there_runs_everything(gpus):
    """Fake tensors may be on it. One that appears later is asked."""
    asked = gpus()
    assert choose_backend("auto", torch.device("cuda", 0), "lovasz") == "native"
    assert choose_backend("auto", torch.device("cuda"), "lovasz") == "native"
    assert not asked
    gpus(NO_CODE)
    assert choose_backend("auto", torch.device("cuda", 0), "lovasz") == "triton"


def test_a_compiled_graph_has_the_choice_as_a_constant(gpus):
    asked = gpus(RUNS, NO_CODE)

    def function(x, device):
        return x + {"native": 1, "triton": 2}[choose_backend("auto", device, "lovasz")]

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for index, added in ((0, 1), (1, 2)):
        assert compiled(torch.zeros(()), torch.device("cuda", index)) == added
    assert asked == [0, 1]


def test_importing_veerloss_imports_no_compiler_and_initialises_no_gpu():
    code = "import sys, torch, veerloss; print('torch._dynamo' in sys.modules, torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_the_report_names_each_gpu(gpus, capsys):
    gpus(RUNS, OLD_DRIVER)
    __main__.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.endswith("2 device(s)") for line in lines)
    assert "cuda:0 native available" in lines
    assert any(line.startswith("cuda:1 native not available: the compiled CUDA library does not run there") for line in lines)
    assert {"cuda:0 triton available", "cuda:1 triton available", "cuda:1 reference available"} <= set(lines)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_question(tmp_path, monkeypatch):
    """The library's function, with the device current. Without a driver it answers with CUDA's error."""
    source, built = ROOT / "csrc/cuda/runnable.cu", tmp_path / "_C_cuda.so"
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.run(["nvcc", *flags, source, "-o", built], check=True)
    monkeypatch.setattr(_extension, "_HERE", tmp_path)
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: devices.append(index) or contextlib.nullcontext())
    error, driver, built_with = _extension._ask_cuda(3)
    assert devices == [3] and built_with >= 12000
    if driver == 0:
        assert "driver" in error
    else:
        assert error is None or "kernel image" in error or "insufficient" in error
