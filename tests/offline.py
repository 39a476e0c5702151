"""Compiles the Triton kernels for NVIDIA GPUs on a machine that has none:

    python tests/offline.py [--capability 90] [MODULE ...]

A module is one of MODULES below, "veerloss.triton.focal" say; without any, all are compiled. What its operators launch is
recorded, over the types, layouts, numbers of classes and options that change what a kernel does. A line per kernel and target
tells the shared memory in bytes, the registers per thread, and the bytes that it spills; the exit status is 1 where one does
not compile, or spills more than MAX_SPILLED. Pointers and integers count as multiples of 16, which most are.

Triton must not be in its interpreter here (TRITON_INTERPRET unset), and that is settled when it is imported: tests run this
file in a process of its own.
"""

from __future__ import annotations

import argparse
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

from veerloss._layout import Errors, Interpolation, Reduction

CAPABILITIES = (80, 90, 100)
#: Bytes per thread. The assembler gives up a few registers to fit one more group of threads, which costs next to nothing.
MAX_SPILLED = 64


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


def passes(name: str, stem: str, logits: torch.Tensor, **options) -> Iterator[tuple]:
    """What the forward operator of a loss launches, and the backward operator for it."""

    def call():
        x = logits.detach().requires_grad_()
        loss = getattr(torch.ops.veerloss_triton, f"{stem}_forward")(logits=x, **options)[0]
        torch.autograd.grad(loss, x, torch.ones((), dtype=loss.dtype).expand(loss.shape))

    return recorded(name, call)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def focal() -> Iterator[tuple]:
    for dtype, layout, gamma, classes in (
        (torch.float32, "NCHW", 2.0, 19),
        (torch.float32, "NCHW", 2.0, 2),
        (torch.float32, "channels_last", 1.5, 150),
        (torch.bfloat16, "NCHW", 2.0, 1000),
        (torch.float16, "channels_last", 0.0, 19),
        (torch.float64, "NCHW", 1.5, 150),
    ):
        x = torch.empty((2, classes, 64), dtype=dtype)
        x = x if layout == "NCHW" else channels_last(x)
        y, flat = torch.zeros((2, 64), dtype=torch.int64), x.flatten().reshape(1, 1, -1)
        alpha = torch.ones(classes, dtype=opmath_dtype(dtype))
        name = f"{dtype}, gamma {gamma}, {classes} classes {layout}"
        both = {"gamma": gamma, "factor": 1.0, "normalizer": None, "upcast_loss": False}
        softmax = both | {"alpha": 1.0, "ignore_index": 255}
        yield from passes(
            name, "softmax_focal", x, target=y, class_alpha=None, label_smoothing=0.0, reduction=Reduction.MEAN, **softmax
        )
        yield from passes(
            f"smoothed {name}", "softmax_focal", x, target=y.byte(), class_alpha=alpha, label_smoothing=0.1,
            reduction=Reduction.NONE, **softmax,
        )  # fmt: skip
        if layout == "NCHW":
            yield from passes(
                f"probabilities {name}", "softmax_focal", x, target=x, class_alpha=None, label_smoothing=0.0,
                reduction=Reduction.MEAN, **softmax,
            )  # fmt: skip
        yield from passes(
            f"index {name}", "sigmoid_focal", x, target=y, alpha=None, class_alpha=alpha, weight=None, ignore_index=255,
            background_index=254, reduction=Reduction.NONE, **both,
        )  # fmt: skip
        for kind, target, weight, ignore_index in (("", flat, None, None), ("uint8 weighted ", flat.byte(), flat, 255)):
            yield from passes(
                f"flat {kind}{name}", "sigmoid_focal", flat, target=target, alpha=0.25, class_alpha=None, weight=weight,
                ignore_index=ignore_index, background_index=None, reduction=Reduction.MEAN, **both,
            )  # fmt: skip


def focal_low() -> Iterator[tuple]:
    """Of logits of low resolution."""
    for dtype, classes in ((torch.float32, 19), (torch.float32, 128), (torch.bfloat16, 2), (torch.float64, 19)):
        x, y = torch.empty((2, classes, 8, 8), dtype=dtype), torch.zeros((2, 32, 32), dtype=torch.int64)
        both = {"target": y, "class_alpha": None, "gamma": 2.0, "ignore_index": 255, "factor": 1.0, "normalizer": None}
        both |= {"upcast_loss": False, "upsample": Interpolation.LINEAR}
        for reduction in (Reduction.MEAN, Reduction.NONE):
            name, common = f"{dtype}, {classes} classes, {reduction.name}", both | {"reduction": reduction}
            yield from passes(f"softmax {name}", "softmax_focal", x, alpha=1.0, label_smoothing=0.0, **common)
            weight = torch.ones((2, classes, 32, 32)) if reduction == Reduction.NONE else None
            yield from passes(f"sigmoid {name}", "sigmoid_focal", x, alpha=0.25, weight=weight, background_index=None, **common)


def lovasz_exact() -> Iterator[tuple]:
    for errors, dtype, classes in (
        (Errors.SOFTMAX, torch.float32, 19),
        (Errors.PROBABILITIES, torch.float32, 19),
        (Errors.HINGE, torch.float32, 1),
        (Errors.SOFTMAX, torch.float32, 2),
        (Errors.SOFTMAX, torch.float32, 150),
        (Errors.SOFTMAX, torch.float64, 19),
        (Errors.SOFTMAX, torch.bfloat16, 19),
        (Errors.PROBABILITIES, torch.float32, 2),
    ):
        x, target = torch.empty((2, classes, 4096), dtype=dtype), torch.zeros((2, 4096), dtype=torch.int64)
        if dtype == torch.bfloat16:
            x, target = channels_last(x), target.byte()
        yield from passes(
            f"{errors.name.lower()} {dtype} C={classes}", "lovasz_exact", x, target=target, errors=errors, per_image=False,
            selected=torch.ones(classes, dtype=torch.bool), present=True,
            class_weight=torch.ones(classes, dtype=opmath_dtype(dtype)), ignore_index=255, background_index=254,
            reduction=Reduction.MEAN, valid_pixels=None, keep_weights=True, upcast_loss=False,
        )  # fmt: skip


MODULES = {f"veerloss.triton.{f.__name__}": f for f in (focal, focal_low, lovasz_exact)}


def specializations_of(module: str) -> Iterator[tuple]:
    """Each kind once: what launches have in common, such as the sum of the partial sums, they share."""
    seen = set()
    for found in MODULES[module]():
        key = repr(found[1:])
        if key not in seen:
            seen.add(key)
            yield found


def main(modules: list[str], capabilities: list[int]) -> int:
    failures = 0
    for module in modules:
        for name, kernel, signature, constexprs, num_warps in specializations_of(module):
            for capability in capabilities:
                try:
                    compiled = compile_for(capability, kernel, signature, constexprs, num_warps)
                except Exception as error:
                    failures += 1
                    print(f"FAILED {name} sm_{capability}: {error}")
                    continue
                used = resources(compiled)
                spilled = used is not None and used[1] > MAX_SPILLED
                failures += spilled
                detail = "registers unknown" if used is None else f"registers {used[0]:3d}, spilled {used[1]}"
                print(f"{'SPILLS' if spilled else 'ok'} {name} sm_{capability}: shared {compiled.metadata.shared}, {detail}")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compiles Triton kernels for GPUs that need not be there.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(MODULES)}; default: all")
    parser.add_argument("--capability", type=int, action="append", help=f"90 for sm_90, say; default: {CAPABILITIES}")
    arguments = parser.parse_args()
    sys.exit(main(arguments.modules or [*MODULES], arguments.capability or CAPABILITIES))
