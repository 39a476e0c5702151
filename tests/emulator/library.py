"""The CUDA kernels of csrc/cuda for the CPU (emulator.h), compiled: a library that registers their operators in a namespace of
its own. The fixture `backend` of conftest.py has tests run them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
#: The longest to compile first.
SOURCES = (
    *(
        CSRC / "cuda/lovasz" / name
        for name in (
            "histogram_gradient.cu",
            "histogram_count_softmax.cu",
            "histogram_count.cu",
            "exact.cu",
            "histogram_weigh.cu",
            "histogram_place.cu",
        )
    ),
    CSRC / "cuda/compound.cu",
    CSRC / "cuda/upsample.cu",
    *sorted((CSRC / "cuda").glob("region_*.cu")),
    *sorted((CSRC / "cuda").glob("focal_*.cu")),
    *sorted(path for stem in ("compound", "focal", "lovasz", "region") for path in (CSRC / "ops").glob(f"{stem}*.cpp")),
)
EMULATOR = (HERE / "emulator.cpp", HERE / "meter.cpp")
#: The builds, by the namespace of their operators, and how they compile the kernels: as they are; with the meter of meter.h;
#: with multiplications and additions fused wherever the compiler likes, as nvcc does.
NAMESPACE, METERED, FUSED = "veerloss_emulated", "veerloss_metered", "veerloss_fused"
KERNEL_FLAGS = {
    NAMESPACE: [],
    METERED: ["-DVEERLOSS_METERED", "-fsanitize=thread"],
    FUSED: ["-mfma", "-ffp-contract=fast"],
}
#: Where the library is built; git ignores it.
CACHE = ROOT / "build/emulator"


def cuda_headers() -> Path | None:
    """The include folder of the CUDA toolkit that nvcc belongs to."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(p) / "include" for p in places if p and (Path(p) / "include/cuda_fp16.h").exists()), None)


def build(folder: Path = CACHE, namespace: str = NAMESPACE, sources: Sequence[Path] = (*SOURCES, *EMULATOR)) -> Path:
    """An emulated library, compiled into ``folder``, from which a later call takes what has not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{HERE}", f"-isystem{torch_folder}/include", f"-isystem{cuda_headers()}"]
    headers = sorted(path for root in (CSRC, HERE) for path in root.rglob("*.*h") if CSRC / "cpu" not in path.parents)

    def key(*parts: str | Path) -> str:
        """A hash of strings and of files' contents."""
        contents = (part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts)
        return hashlib.sha256(b"\0".join(contents)).hexdigest()[:16]

    def cached(target: Path, command: list) -> Path:
        """``target``, made by a command that ends with the file to write."""
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, partial], check=True)
            partial.replace(target)  # at once: another process may build the same
        return target

    def compiled(source: Path) -> Path:
        mine = [*flags, f"-DVEERLOSS_EMULATED={namespace}"]
        if source.suffix == ".cu":
            mine += KERNEL_FLAGS[namespace]
        elif source.parent == HERE:
            mine += [flag for flag in KERNEL_FLAGS[namespace] if flag.startswith("-D")]
        target = folder / f"{source.stem}-{key(compiler, torch.__version__, *mine, *headers, source)}.o"
        return cached(target, [compiler, *mine, "-x", "c++", "-c", source, "-o"])

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    link = [compiler, "-shared", *objects, f"-L{torch_folder}/lib", "-ltorch_cpu", "-o"]
    return cached(folder / f"lib{namespace}-{key(*map(str, objects))}.so", link)
