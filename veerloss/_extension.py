"""Loads the compiled library, and keeps the reason where it is missing."""

from __future__ import annotations

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(stem: str) -> str | None:
    """Registers the operators of ``veerloss/<stem>.*``. Returns None, or why it could not."""
    paths = sorted(p for p in _HERE.glob(f"{stem}.*") if p.suffix in {".so", ".pyd", ".dylib"})
    if not paths:
        return (
            f"the compiled library veerloss/{stem} is not installed: veerloss was installed without a C++ compiler or with "
            "VEERLOSS_NATIVE=0; reinstall from source with a C++ compiler"
        )
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        return (
            f"the compiled library {paths[0].name} does not load beside torch {torch.__version__}: {error.__cause__ or error}"
        )
    return None


#: Per device type: None where the compiled library serves it, else the reason.
native_missing: dict[str, str | None] = {
    "cpu": _load("_C"),
    "cuda": "the CUDA kernels are not part of this version",
}
