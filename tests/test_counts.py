"""Budgets of the CUDA kernels, in instructions, registers and shared memory: counted in machine code (sass.py), so no GPU is
needed. A kernel that misses its budget shows as a failure with what it executes instead."""

import re
import shutil
from dataclasses import dataclass

import pytest
import sass

CUDA = sass.CSRC / "cuda"
pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(sass.tool("nvdisasm") is None, reason="needs nvdisasm, of the CUDA toolkit or of Triton"),
]


@dataclass(frozen=True)
class Budget:
    source: str  # in csrc/cuda
    kernel: str  # a regular expression, which has to match the whole name, see sass.short_name
    elements: int  # classes times pixels that an iteration of the main loop is for
    instructions: float  # an element, at most, on the longest way through an iteration, on sm_90
    bar: str  # where that number comes from
    wide_multiplies: int | None = None  # in an iteration; by default fewer than elements: none for each
    warps: int = 1  # on a multiprocessor, of 64, at least
    dynamic_shared: int = 0  # bytes that a block is launched with
    static_shared: int = 48 * 1024  # bytes, at most

    def __str__(self) -> str:
        return self.kernel.replace("\\", "")


#: At [8, 19, 512, 1024] the memory of an H100 takes as long as 44 instructions an element in a forward pass of float32 and 83
#: in a backward pass, of bfloat16 24 and 43 (132 multiprocessors of 4 instructions a cycle at 1.75 GHz, 3 TB/s). Kernels issue
#: some 60 to 75% of that: of float32 forward 30.
MEMORY = "memory takes as long"
BFLOAT16 = "float32's, and 6 to convert"
#: What was counted when the line was written. Not a bar: a change that adds to it should say why.
COUNTED = "as counted, rounded up"


def focal(kernel: str, dtype: str, variant: int, instructions: float, bar: str) -> Budget:
    name = rf"softmax_focal_{kernel}_kernel<{dtype}, ClassRange<17, 20>, \(Variant\){variant}>"
    return Budget("focal_softmax.cu", name, 19, instructions, bar, warps=32)


#: Of all classes, and of none that is not there; of one image or more, not as one sequence.
COUNT, GRADIENT = "lovasz/histogram_count.cu", "lovasz/histogram_gradient.cu"
#: Tables and counts, or weights, of 19 classes.
SHARED = 19 * (129 * 8 + 4 * 1920)
BUDGETS = [
    focal("forward", "float", 0, 30, MEMORY),
    focal("backward", "float", 0, 40, MEMORY),
    focal("forward", "__nv_bfloat16", 0, 36, BFLOAT16),
    focal("backward", "__nv_bfloat16", 0, 46, BFLOAT16),
    focal("forward", "float", 1, 36, COUNTED),  # through shared memory
    focal("backward", "float", 1, 52, COUNTED),
    # 150 classes: the way of the first warp, which has the targets; the other seven have some 270 instructions less.
    Budget(
        "focal_shared.cu", r"softmax_focal_shared_backward_kernel<float, ClassRange<12, 20>, false>", 19, 50, COUNTED, warps=32
    ),
    Budget("focal_shared.cu", r"softmax_focal_shared_forward_kernel<float, ClassRange<12, 20>>", 19, 46, COUNTED, warps=32),
    Budget(
        COUNT, r"lovasz_count_softmax_kernel<float, ClassRange<17, 20>, false, false>", 19, 45, MEMORY, warps=32,
        dynamic_shared=SHARED,
    ),
    Budget(
        COUNT, r"lovasz_count_softmax_kernel<__nv_bfloat16, ClassRange<17, 20>, false, false>", 19, 45, MEMORY, warps=32,
        dynamic_shared=SHARED,
    ),
    # The aim is 36: the longest way has a label of every type, a class that is missing, and a pivot for confident pixels.
    Budget(
        GRADIENT, r"lovasz_gradient_kernel<float, ClassRange<17, 20>, false>", 19, 44, COUNTED, warps=24, dynamic_shared=SHARED
    ),
    Budget(
        GRADIENT, r"lovasz_gradient_kernel<__nv_bfloat16, ClassRange<17, 20>, false>", 19, 47, COUNTED, warps=24,
        dynamic_shared=SHARED,
    ),
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budget(budget):
    source = CUDA / budget.source
    found = [kernel for kernel in sass.kernels(source, 90) if re.fullmatch(budget.kernel, kernel.name)]
    assert found, f"no kernel of {source.name} has such a name: " + ", ".join(k.name for k in sass.kernels(source, 90))
    wide = budget.elements - 1 if budget.wide_multiplies is None else budget.wide_multiplies
    for kernel in found:
        warps = kernel.warps(budget.dynamic_shared)
        per_element = len(kernel.iteration) / budget.elements
        report = (
            f"{kernel.name} on sm_{kernel.arch}: {per_element:.1f} instructions an element of {budget.instructions} "
            f"({budget.bar}), {kernel.wide_multiplies} wide multiplies of {wide}, {warps} warps of {budget.warps} "
            f"({kernel.registers} registers), {kernel.shared_bytes} bytes of static shared memory of {budget.static_shared}\n"
            f"{sass.histogram(kernel.iteration)}"
        )
        print(report)
        assert per_element <= budget.instructions, report
        assert kernel.wide_multiplies <= wide, report
        assert warps >= budget.warps, report
        assert kernel.shared_bytes <= budget.static_shared, report


#: Bytes that a thread may spill, by kernel: of 5 to 12 classes, and on sm_100 of one class at a time, outside of the loop over
#: pixels.
SPILLS = {"lovasz_count_softmax_kernel": 40, "lovasz_count_classes_kernel": 4}


def spills_of(kernel) -> int:
    return next((count for name, count in SPILLS.items() if kernel.name.startswith(name)), 0)


#: Bytes of code: 128 KiB are what the instruction cache of a multiprocessor holds.
CODE_BYTES = 128 * 1024


@pytest.mark.parametrize("arch", sass.PTX)
@pytest.mark.parametrize("source", sorted(CUDA.rglob("*.cu")), ids=lambda path: path.name)
def test_nothing_spills_and_code_fits_the_cache(source, arch):
    found = sass.kernels(source, arch, listed=False)
    assert found
    for kernel in found:
        print(f"{kernel.registers:>4} registers {kernel.spilled:>3} spilled {kernel.code_bytes:>7} bytes  {kernel.name}")
        assert kernel.registers > 0 and kernel.threads >= 32 and kernel.warps() > 0
    spilled = {kernel.name: kernel.spilled for kernel in found if kernel.spilled > spills_of(kernel)}
    assert not spilled, f"bytes spilled on sm_{arch}: {spilled}"
    # (Weighing bins is float64, which takes much code on sm_120; it goes over bins, not pixels.)
    pixels = [kernel for kernel in found if "lovasz_weigh_kernel" not in kernel.name]
    large = {kernel.name: kernel.code_bytes for kernel in pixels if kernel.code_bytes > CODE_BYTES}
    assert not large, f"bytes of code on sm_{arch}: {large}"


# ---- the counting itself

EXAMPLE = """
__global__ void by_index(float* x, const float* y, long long stride, const int* at, int n) {
  for (int i = threadIdx.x; i < n; ++i) x[at[i] * stride] = y[at[i] * stride] + 1.0f;
}
__global__ void by_pointer(float* x, const float* y, long long stride, int n) {
  for (int i = threadIdx.x; i < n; ++i, x += stride, y += stride) {
    float sum = *y;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = sum * sum + 1.0f;
    *x = sum;
  }
}
__global__ void __launch_bounds__(96) in_a_switch(float* x, int kind, int n) {
  switch (kind) {
    case 0: *x = *x * *x + 1.0f; break;
    case 1: *x = __expf(*x) * 2.0f; break;
    case 2: *x = *x / 3.0f; break;
    case 5:
#pragma unroll 1
      for (int k = 0; k < n; ++k) __syncthreads();
      break;
    default: *x = rsqrtf(*x);
  }
}
__global__ void __launch_bounds__(256) shared() {
  __shared__ double values[1000];
  for (double& value : values) value += threadIdx.x;
  asm volatile("" ::"l"(values) : "memory");
}
"""


def test_counting(tmp_path):
    source = tmp_path / "example.cu"
    source.write_text(EXAMPLE)
    found = {kernel.name: kernel for kernel in sass.kernels(source, 90)}
    assert set(found) == {"by_index", "by_pointer", "in_a_switch", "shared"}
    by_index, by_pointer, in_a_switch, shared = (found[n] for n in ("by_index", "by_pointer", "in_a_switch", "shared"))
    assert by_index.wide_multiplies > 0 and by_pointer.wide_multiplies == 0
    opcodes = [i.opcode for i in by_pointer.iteration]
    copies = opcodes.count("LDG.E")  # nvcc unrolls
    assert copies and opcodes.count("FFMA") == 8 * copies and opcodes.count("STG.E") == copies
    assert len(by_pointer.iteration) < len(by_pointer.instructions) <= by_pointer.code_bytes / 16
    assert f"{8 * copies} FFMA" in sass.histogram(by_pointer.iteration)
    assert in_a_switch.threads == 96 and in_a_switch.warps() == 63
    assert len(in_a_switch.flow.loops()) == 1 and any(i.opcode.startswith("BAR.SYNC") for i in in_a_switch.iteration)
    assert shared.shared_bytes == 8000
    assert shared.warps() == 64 and shared.warps(dynamic_shared=100 * 1024) == 16


def test_the_longest_way():
    """Of two sides the longer; a jump backwards to code that was moved out of the way is no loop."""
    text = """
        /*0000*/                   MOV R0, 0x1 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
    .L_x_1:
        /*0020*/                   FADD R0, R0, 1 ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
        /*0040*/                   FMUL R0, R0, R0 ;
        /*0050*/                   BRA `(.L_x_4) ;
    .L_x_3:
        /*0060*/                   FFMA R0, R0, R0, R0 ;
        /*0070*/                   FFMA R0, R0, R0, R0 ;
        /*0080*/                   FFMA R0, R0, R0, R0 ;
    .L_x_4:
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
    .L_x_2:
        /*00b0*/                   MOV R0, 0x2 ;
        /*00c0*/                   BRA `(.L_x_1) ;
    .L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
    """
    kernel = sass.Kernel("k", 90, 32, 0, 0, 256, 0, re.sub(r"^    (?=\.L)", "", text, flags=re.MULTILINE))
    assert len(kernel.instructions) == 13 and len(kernel.flow.loops()) == 1
    assert kernel.flow.size(kernel.main_loop) == 8
    assert [i.opcode for i in kernel.iteration] == ["FADD", "BRA", "FFMA", "FFMA", "FFMA", "BRA"]
