"""Loads the compiled libraries, and keeps the reason where one is missing or does not run."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _find(stem: str) -> Path | None:
    """``veerloss/<stem>.*``, a compiled library."""
    return next((p for p in sorted(_HERE.glob(f"{stem}.*")) if p.suffix in {".so", ".pyd", ".dylib"}), None)


def _load(stem: str) -> str | None:
    """Registers the operators of ``veerloss/<stem>.*``. Returns None, or why it could not."""
    path = _find(stem)
    if path is None:
        compiler = "CUDA compiler (nvcc)" if stem == "_C_cuda" else "C++ compiler"
        return (
            f"the compiled library veerloss/{stem} is not installed: veerloss was installed without a {compiler} or with "
            f"VEERLOSS_NATIVE=0; reinstall from source with a {compiler}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the compiled library {path.name} does not load beside torch {torch.__version__}: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return _load("_C_cuda")


#: Per device type: None where the compiled library serves it, else the reason.
native_missing: dict[str, str | None] = {"cpu": _load("_C"), "cuda": _load_cuda()}


def _ask_cuda(index: int) -> tuple[str | None, int, int]:
    """CUDA's error for the kernels of the library on a device, the version of CUDA that the driver is for, and that of the nvcc
    that built the library: see csrc/cuda/runnable.cu."""
    ask = ctypes.CDLL(str(_find("_C_cuda"))).veerloss_cuda_error
    ask.restype = ctypes.c_char_p
    driver, built_with = ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(index):
        error = ask(ctypes.byref(driver), ctypes.byref(built_with))
    return error and error.decode(), driver.value, built_with.value


def gpu_count() -> int:
    """Of those that torch can use: device_count() may count GPUs whose driver is too old for torch itself."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


#: Per device that has been asked.
_cuda_reasons: dict[int, str | None] = {}


def cuda_missing(index: int | None) -> str | None:
    """None where the CUDA library serves a device (None: the current one), else the reason.

    A library that loads need not run: its CUDA may be too new for the driver, and it may have no code for the device. That is
    asked on first use, for it initialises CUDA. Of devices that are not there, which fake tensors are on, nothing is asked.
    """
    if native_missing["cuda"] is not None:
        return native_missing["cuda"]
    if index is None:
        index = torch.cuda.current_device() if gpu_count() else 0
    if index not in _cuda_reasons:
        if index >= gpu_count():
            return None
        _cuda_reasons[index] = _describe(index, *_ask_cuda(index))
    return _cuda_reasons[index]


# torch.compile takes the result for a constant, as torch.compiler.assume_constant_result has it: calling that would import
# torch._dynamo, which takes longer than all else that is imported here.
cuda_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _describe(index: int, error: str | None, driver: int, built_with: int) -> str | None:
    if error is None:
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    has, needs = ((version // 1000, version % 1000 // 10) for version in (driver, built_with))
    advice = f"reinstall from source with TORCH_CUDA_ARCH_LIST={capability}"
    if has < needs:
        advice = "update the driver, or {} and nvcc {}.{} or older".format(advice, *has)
    return (
        "the compiled CUDA library does not run there: {}; it is built with CUDA {}.{}, the driver is for {}.{}, the GPU has "
        "compute capability {}; {}"
    ).format(error, *needs, *has, capability, advice)


def _find_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # what stands in its place is no module
        found = None
    return None if found else "triton is not installed"


_triton_reason = _find_triton()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing(device_type: str) -> str | None:
    """None where Triton kernels run on a device type, else the reason. Triton itself is imported when it is first used."""
    if device_type not in ("cuda", "meta") and not _interpreted:
        return f"Triton kernels do not run on device type {device_type!r} (but with TRITON_INTERPRET=1, slowly)"
    return _triton_reason
