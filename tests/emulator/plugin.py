"""pytest plugin: ``backend="native"`` runs the CUDA kernels of csrc/cuda, emulated on the CPU (emulator.h).

With ``tests`` on PYTHONPATH, ``python -m pytest -p emulator.plugin tests/test_lovasz.py tests/test_histogram.py`` puts the
tests of the Lovász losses to them; test_cuda.py does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from veerloss import ops

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAMESPACE = "veerloss_emulated"

#: Parts of the names of tests that are left out.
LEFT_OUT = (
    *("million", "131072", "200001", "large_segments", "nothing_of", "70_001", "65_536", "70001", "65536"),  # minutes each
    *("test_histogram.py::test_softmax_grid[(70", "test_histogram.py::test_softmax_grid[(1, 150"),  # tables of many segments
    *("threads", "out_of_range", "backward_checks"),  # what only the CPU does
    "reference",  # no kernels
    "torch.float16",  # as torch.bfloat16
)


def cuda_headers() -> Path | None:
    """The include folder of the CUDA toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(p) / "include" for p in places if p and (Path(p) / "include/cuda_fp16.h").exists()), None)


def build(folder: Path) -> Path:
    """The emulated library, compiled into `folder`."""
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-fPIC", "-w", "-DVEERLOSS_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{HERE}", f"-isystem{torch_folder}/include", f"-isystem{cuda_headers()}"]
    sources = [CSRC / "cuda/lovasz.cu", CSRC / "cuda/lovasz_histogram.cu", CSRC / "cuda/ops.cpp", HERE / "emulator.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([os.environ.get("CXX", "c++"), *flags, "-x", "c++", "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert not any([process.wait() for process in running]), "the emulated kernels do not compile"
    library = folder / "libveerloss_emulated.so"
    link = [os.environ.get("CXX", "c++"), "-shared", *objects, "-o", library, f"-L{torch_folder}/lib", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    return library


def pytest_collection_modifyitems(config, items) -> None:
    left_out = [item for item in items if any(name in item.nodeid for name in LEFT_OUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_configure(config) -> None:
    ops.define(NAMESPACE)
    with tempfile.TemporaryDirectory() as folder:
        torch.ops.load_library(str(build(Path(folder))))
    ops.NAMESPACES["native"] = NAMESPACE
