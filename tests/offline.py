"""Compiles Triton kernels for NVIDIA GPUs on a machine that has none: `python tests/offline.py veerloss.triton.focal ...`.

Each module named has a function `specializations()`, a generator of

    (name, kernel, signature, constexprs, num_warps)

where `kernel` is a @triton.jit function, `signature` has the types of its arguments by name ("*fp32", "i64", "fp64"; for a
tuple, a tuple of types and of numbers that count as constants, such as a stride of 1), and `constexprs` the values of the
others: constexpr ones, and those that are None. A line per kernel and target tells the shared memory in bytes, the registers
per thread, and the bytes that it spills; the exit status is 1 where one does not compile, or spills more than MOST_SPILLED.
Pointers and integers count as multiples of 16, which most are.

A module without that function is in RECORDED below: there its launches are recorded, with what they were called with.

Triton must not be in its interpreter here (TRITON_INTERPRET unset), and that is settled when it is imported: tests run this
file in a process of its own.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
#: Bytes per thread. The assembler gives up a few registers to fit one more group of threads, which costs next to nothing.
MOST_SPILLED = 64


def compile_for(capability: int, kernel, signature: dict[str, str | tuple], constexprs: dict, num_warps: int = 4):
    """The compiled kernel for sm_<capability>, as a launch with aligned pointers and sizes would compile it."""
    unpaired = {*signature, *constexprs} ^ set(kernel.arg_names)
    if unpaired or {*signature} & {*constexprs}:
        raise ValueError(f"{kernel.__name__}: arguments {sorted(unpaired)} have no type or value, or are not in the kernel")
    types, values, aligned = {}, {}, {}

    def enter(kind, path: tuple[int, ...]):
        if isinstance(kind, tuple):
            return tuple(enter(k, (*path, i)) for i, k in enumerate(kind))
        if not isinstance(kind, str):  # a number in a tuple: an argument known when it is compiled, as a stride of 1 is
            values[path] = kind
            return "constexpr"
        if kind.startswith("*") or kind in ("i32", "i64"):
            aligned[path] = [["tt.divisibility", 16]]
        return kind

    for i, name in enumerate(kernel.arg_names):
        if name in constexprs:
            values[i,] = constexprs[name]
        types[name] = "constexpr" if name in constexprs else enter(signature[name], (i,))
    source = ASTSource(kernel, types, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


def resources(compiled) -> tuple[int, int] | None:
    """(registers per thread, bytes that each thread spills), or None without an assembler. Triton comes with two, of which one
    knows the newer GPUs and versions of PTX."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    assemblers = [path for path in (folder / "ptxas", folder / "ptxas-blackwell") if path.exists()]
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    complaints = []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        for assembler in assemblers:
            command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                registers = re.search(r"Used (\d+) registers", done.stderr)[1]
                return int(registers), int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
            complaints.append(done.stderr)
    if complaints:
        raise RuntimeError(f"no assembler of Triton {triton.__version__} takes its PTX: {complaints}")
    return None


def recorded(name: str, call: Callable[[], object]) -> Iterator[tuple]:
    """The specializations that `call` launches. Nothing runs: its tensors are on the CPU, and their values do not matter."""
    launches = []
    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, **options: launches.append((kernel, args, options))
    try:
        call()
    finally:
        triton.runtime.jit.JITFunction.run = run
    for kernel, args, options in launches:
        warps = options.pop("num_warps", 4)
        signature, constexprs = {}, {}
        for parameter, value in {**dict(zip(kernel.arg_names, args, strict=False)), **options}.items():
            if parameter in ("grid", "warmup"):
                continue
            if value is None or kernel.params[kernel.arg_names.index(parameter)].is_constexpr:
                constexprs[parameter] = value
            else:
                signature[parameter] = kind_of(value)
                if signature[parameter] == 1:
                    constexprs[parameter] = signature.pop(parameter)
        yield f"{kernel.__name__} {name}", kernel, signature, constexprs, warps


def kind_of(value: object) -> str | tuple | int:
    """The type that Triton gives to an argument; integers that are 1 are constants."""
    if isinstance(value, tuple):
        return tuple(kind_of(v) for v in value)
    if isinstance(value, torch.Tensor):
        return (
            "*"
            + {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u"}[str(value.dtype)[6:].rstrip("0123456789")]
            + (str(value.dtype.itemsize * 8))
        )
    if isinstance(value, float):
        return "fp64"  # the kernels annotate them so
    return 1 if value == 1 else "i32" if abs(value) < 2**31 else "i64"


def focal() -> Iterator[tuple]:
    """Types, layouts, kinds of targets, gammas, numbers of classes: those that change what a kernel does."""
    from veerloss.triton import focal as kernels

    def passes(name, loss, x, *options, reduction=1):
        shape = () if reduction else x.shape if loss == "sigmoid" else (x.shape[0], x.shape[2])
        forward, backward = (getattr(kernels, f"{loss}_focal_{direction}") for direction in ("forward", "backward"))
        scale = torch.ones((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        grad = torch.ones((), dtype=x.dtype).expand(shape)
        yield from recorded(name, lambda: forward(x, *options, reduction, 1.0, None, False))
        yield from recorded(name, lambda: backward(grad, x, *options, reduction, scale))

    for dtype, layout, gamma, classes in (
        (torch.float32, "NCHW", 2.0, 19),
        (torch.float32, "channels_last", 1.5, 150),
        (torch.bfloat16, "NCHW", 2.0, 1000),
        (torch.float16, "channels_last", 0.0, 19),
        (torch.float64, "NCHW", 1.5, 150),
    ):
        x = torch.empty((2, classes, 64), dtype=dtype)
        x = x if layout == "NCHW" else x.transpose(1, 2).contiguous().transpose(1, 2)
        y = torch.zeros((2, 64), dtype=torch.int64)
        alpha = torch.ones(classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        name = f"{dtype}, gamma {gamma}, {classes} classes {layout}"
        yield from passes(name, "softmax", x, y, 1.0, None, gamma, 0.0, -100)
        yield from passes(f"smoothed {name}", "softmax", x, y.byte(), 1.0, alpha, gamma, 0.1, 255, reduction=0)
        yield from passes(f"index {name}", "sigmoid", x, y, None, alpha, gamma, None, 255, reduction=0)
        flat = x.flatten().reshape(1, 1, -1)
        yield from passes(f"flat {name}", "sigmoid", flat, flat, 0.25, None, gamma, None, None)
        yield from passes(f"flat uint8 weighted {name}", "sigmoid", flat, flat.byte(), 0.25, None, gamma, flat, 255)


RECORDED = {"veerloss.triton.focal": focal}


def specializations_of(module: str) -> Iterator[tuple]:
    """Each kind once: what launches have in common, such as the sum of the partial sums, they share."""
    seen = set()
    for found in (RECORDED[module] if module in RECORDED else importlib.import_module(module).specializations)():
        key = repr(found[1:])
        if key not in seen:
            seen.add(key)
            yield found


def main(modules: list[str]) -> int:
    failures = 0
    for module in modules:
        for name, kernel, signature, constexprs, num_warps in specializations_of(module):
            for capability in CAPABILITIES:
                try:
                    compiled = compile_for(capability, kernel, signature, constexprs, num_warps)
                except Exception as error:
                    failures += 1
                    print(f"FAILED {name} sm_{capability}: {error}")
                    continue
                used = resources(compiled)
                spilled = used is not None and used[1] > MOST_SPILLED
                failures += spilled
                detail = "registers unknown" if used is None else f"registers {used[0]:3d}, spilled {used[1]}"
                print(f"{'SPILLS' if spilled else 'ok'} {name} sm_{capability}: shared {compiled.metadata.shared}, {detail}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
