"""Loads the compiled library, and keeps the reason where it is missing."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(stem: str) -> str | None:
    """Registers the operators of ``veerloss/<stem>.*``. Returns None, or why it could not."""
    paths = sorted(p for p in _HERE.glob(f"{stem}.*") if p.suffix in {".so", ".pyd", ".dylib"})
    if not paths:
        compiler = "CUDA compiler (nvcc)" if stem == "_C_cuda" else "C++ compiler"
        return (
            f"the compiled library veerloss/{stem} is not installed: veerloss was installed without a {compiler} or with "
            f"VEERLOSS_NATIVE=0; reinstall from source with a {compiler}"
        )
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        return (
            f"the compiled library {paths[0].name} does not load beside torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return _load("_C_cuda")


#: Per device type: None where the compiled library serves it, else the reason.
native_missing: dict[str, str | None] = {"cpu": _load("_C"), "cuda": _load_cuda()}


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
