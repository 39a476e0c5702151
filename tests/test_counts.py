"""The instructions of the CUDA kernels, which benchmarks/model.py turns into times, and budgets of registers and shared memory:
counted in machine code (sass.py), so no GPU is needed. A failure shows what a kernel executes."""

import re
import shutil
from dataclasses import dataclass

import pytest
import sass

from benchmarks.model import INSTRUCTIONS

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
    counted: str  # the name of its instructions in benchmarks.model
    wide_multiplies: int | None = None  # in an iteration, at most; by default fewer than elements: none for each
    whole: bool = False  # count the way through the kernel, which has no loop over pixels
    loop: str | None = None  # an opcode of the loop over pixels, where another loop is larger
    inner: int = 1  # iterations of the loop inside the main loop
    warps: int = 1  # on a multiprocessor, of 64, at least
    dynamic_shared: int = 0  # bytes that a block is launched with
    static_shared: int = 48 * 1024  # bytes, at most

    @property
    def instructions(self) -> float:
        return INSTRUCTIONS[self.counted]["__nv_bfloat16" in self.kernel]

    def __str__(self) -> str:
        return self.kernel.replace("\\", "")


def focal(step: str, dtype: str, variant: int = 0, kind: str = "") -> Budget:
    name = rf"softmax_focal_{step}_kernel<{dtype}, ClassRange<17, 20>, \(Variant\){variant}>"
    return Budget("focal_softmax.cu", name, 19, f"softmax focal {step}{kind}", warps=32)


def low(dtype: str) -> list[Budget]:
    """Logits of low resolution: forward a loop over pixels, backward one for each thread of a tile."""
    names = {step: f"softmax_focal_low_{step}_kernel<{dtype}, ClassRange<17, 20>>" for step in ("forward", "backward")}
    return [
        Budget("focal_softmax_low.cu", names["forward"], 19, "softmax focal forward, low", warps=24),
        Budget("focal_softmax_low.cu", names["backward"], 19, "softmax focal backward, low", whole=True, warps=24),
        # 24 classes, and the first 8 of a tile.
        Budget(
            "focal_sigmoid_low.cu", f"sigmoid_focal_low_forward_kernel<{dtype}, true, true>", 24,
            "sigmoid focal forward, labels, low", wide_multiplies=27, inner=3, warps=40,
        ),
        Budget(
            "focal_sigmoid_low.cu", f"sigmoid_focal_low_backward_kernel<{dtype}, true, true>", 8,
            "sigmoid focal backward, labels, low", wide_multiplies=22, whole=True, warps=24,
        ),
        region(dtype, 4, kind=", low", warps=20, dynamic_shared=19 * 8 * (128 + 8)),
        count(dtype, 3, ", low", warps=16, dynamic_shared=SHARED),
        count(dtype, 3, "compound", low=", low", warps=16, dynamic_shared=SHARED + 2 * 8 * 512),
    ]  # fmt: skip


def focal_shared(step: str, dtype: str) -> Budget:
    """150 classes: the way of the first warp, which has the targets; the other seven have some 270 instructions less."""
    name = rf"softmax_focal_shared_{step}_kernel<{dtype}, ClassRange<12, 20>{', false' if step == 'backward' else ''}>"
    return Budget("focal_shared.cu", name, 19, f"softmax focal {step}, shared", warps=32)


def sigmoid(step: str, dtype: str) -> list[Budget]:
    """The longest way has targets of 16 bits, or labels of all types. Of elements in rows, a tile has 32 for each thread; of
    others, a thread goes over 19 classes."""
    n, out = 4 if dtype == "float" else 8, {"forward": "FocalLoss", "backward": "FocalGradient"}[step]
    rows, planes = (f"sigmoid_focal_{name}_kernel<{dtype}, " for name in ("rows", "planes"))
    in_rows = {"elements": 32, "inner": 32 // n, "wide_multiplies": 5, "warps": 32}  # of these one in the inner loop
    return [
        Budget("focal_sigmoid_rows.cu", rf"{rows}\(Targets\)0, true, {out}>", counted=f"sigmoid focal {step}", **in_rows),
        Budget(
            "focal_sigmoid_rows.cu", rf"{rows}\(Targets\)2, true, {out}>", counted=f"sigmoid focal {step}, labels in rows",
            **in_rows,
        ),
        Budget(
            "focal_sigmoid.cu", rf"{planes}{n}, true, true, {out}>", 19 * n, f"sigmoid focal {step}, labels", inner=19,
            warps=32 if dtype == "float" else 24,
        ),
    ]  # fmt: skip


def region(dtype: str, variant: int = 0, classes: str = "17, 20", kind: str = "", **options) -> Budget:
    name = rf"region_sum_softmax_kernel<{dtype}, ClassRange<{classes}>, \(Source\){variant}, false>"
    return Budget("region_sum_softmax.cu", name, 19, f"region forward{kind}", **options)


def region_backward(dtype: str, in_rows: bool = False) -> Budget:
    name = f"region_gradient_softmax_kernel<{dtype}, ClassRange<17, 20>, {str(in_rows).lower()}>"
    kind = ", classes in rows" if in_rows else ""
    return Budget("region_gradient_softmax.cu", name, 19, f"region backward{kind}", warps=32 if dtype == "float" else 24)


#: Of all classes, and of none that is not there; of one image or more, not as one sequence.
COUNT, GRADIENT, EXACT = (f"lovasz/{name}.cu" for name in ("histogram_count_softmax", "histogram_gradient", "exact"))
#: Tables and counts, or weights, of 19 classes.
SHARED = 19 * (129 * 8 + 4 * 1920)


def count(dtype: str, source: int, kind: str, low: str = "", **options) -> Budget:
    counted, focal = (f"compound count{low}", "true") if kind == "compound" else (f"histogram count{kind}", "false")
    flat = str(source > 0).lower()
    name = rf"lovasz_count_softmax_kernel<{dtype}, ClassRange<17, 20>, \(Source\){source}, false, {flat}, {focal}>"
    return Budget(COUNT, name, 19, counted, **options)


def budgets(dtype: str) -> list[Budget]:
    in_registers, shared = f"{dtype}, ClassRange<17, 20>", {"dynamic_shared": SHARED}
    return [
        *(budget for step in ("forward", "backward") for budget in sigmoid(step, dtype)),
        *(focal(step, dtype) for step in ("forward", "backward")),
        *(focal_shared(step, dtype) for step in ("forward", "backward")),
        region(dtype, warps=20, dynamic_shared=19 * 8 * (128 + 8)),
        region_backward(dtype),
        # Of 150 classes, 19 of a thread.
        region(dtype, 2, "12, 20", ", many classes", wide_multiplies=30, warps=16, dynamic_shared=150 * 8 * (32 + 8)),
        Budget(
            "region_gradient.cu",
            f"softmax_gradient_parts_kernel<{dtype}, ClassRange<12, 20>, RegionLabelWeights<float>, false>",
            19,
            "region backward, many classes",
            whole=True,
            warps=24,
        ),
        *(
            Budget(
                "region_sum.cu",
                rf"region_sum_classes_kernel<{dtype}, \(Activation\)1, {dense}>",
                1,
                f"region forward, sigmoid{kind}",
                7,
                warps=48,
            )
            for kind, dense in (("", "false"), (", dense", "true"))
        ),
        *(
            Budget(
                "region_gradient.cu",
                rf"region_gradient_classes_kernel<{dtype}, \(Activation\)1, {dense}>",
                1,
                f"region backward, sigmoid{kind}",
                12,
                warps=48,
            )
            for kind, dense in (("", "false"), (", dense", "true"))
        ),
        count(dtype, 0, "", warps=32, **shared),
        # The longest way has a label of every type, a class that is missing, and a pivot for confident pixels.
        Budget(
            GRADIENT,
            rf"lovasz_gradient_kernel<{in_registers}, \(Pixels\)0, false>",
            19,
            "histogram backward",
            warps=24,
            **shared,
        ),
        # With a focal term, of any gamma.
        count(dtype, 0, "compound", warps=32, dynamic_shared=SHARED + 1024 * 16),
        Budget(
            GRADIENT, rf"lovasz_gradient_kernel<{in_registers}, \(Pixels\)0, true>", 19, "compound backward", warps=24, **shared
        ),
        # One class, of a pixel for each thread: the index of a pixel takes some multiplications.
        Budget(
            "lovasz/histogram_count.cu",
            rf"lovasz_count_classes_kernel<{dtype}, \(Errors\)2, true>",
            1,
            "histogram count, hinge",
            7,
            loop="ATOMS",
        ),
        Budget(GRADIENT, rf"lovasz_sum_kernel<{dtype}, \(Errors\)2, true>", 1, "histogram sum, hinge", 2),
        Budget(
            GRADIENT,
            rf"elementwise_gradient_kernel<{dtype}, \(Errors\)2, true, BinWeights<float>>",
            1,
            "histogram backward, hinge",
            5,
        ),
        Budget(EXACT, rf"lovasz_keys_kernel<{dtype}, \(Errors\)0, ClassRange<17, 20>>", 19, "exact keys", whole=True),
        Budget(EXACT, rf"lovasz_keys_kernel<{dtype}, \(Errors\)2, ClassRange<0, 0>>", 16, "exact keys, hinge"),
        Budget(EXACT, f"softmax_gradient_kernel<{in_registers}, StoredWeights<float>>", 19, "exact backward", whole=True),
        Budget(
            EXACT,
            rf"elementwise_gradient_kernel<{dtype}, \(Errors\)2, true, StoredWeights<float>>",
            1,
            "exact backward, hinge",
            5,
        ),
    ]


BUDGETS = [
    *budgets("float"),
    *budgets("__nv_bfloat16"),
    *low("float"),
    *low("__nv_bfloat16"),
    *(focal(step, "float", 1, ", classes in rows") for step in ("forward", "backward")),
    region("float", 1, kind=", classes in rows", warps=20, dynamic_shared=19 * 8 * (128 + 8) + 128 * 19 * 4),
    region_backward("float", in_rows=True),
    # Rows of 512 pixels, and of 19 words.
    count("float", 1, ", classes in rows", warps=16, dynamic_shared=SHARED + 512 * 19 * 4),
    # Of 150 classes, 19 of a block.
    count("float", 2, ", softmax stored", wide_multiplies=30, warps=32, dynamic_shared=SHARED),
    # 150 classes.
    Budget(
        GRADIENT,
        "softmax_gradient_parts_kernel<float, ClassRange<12, 20>, BinWeights<float>, false>",
        19,
        "histogram backward, many classes",
        whole=True,
        warps=16,
    ),
    Budget(
        EXACT,
        "softmax_gradient_parts_kernel<float, ClassRange<12, 20>, StoredWeights<float>, false>",
        19,
        "exact backward, many classes",
        whole=True,
        warps=16,
    ),
    Budget(
        "lovasz/histogram_count.cu",
        "lovasz_statistics_parts_kernel<float, ClassRange<12, 20>, false>",
        19,
        "histogram statistics, many classes",
        whole=True,
        warps=48,
    ),
    Budget(
        GRADIENT,
        r"lovasz_gradient_kernel<float, ClassRange<17, 20>, \(Pixels\)2, false>",
        19,
        "histogram backward, classes in rows",
        warps=24,
        dynamic_shared=SHARED + 4 * 19 * 768,
    ),
    Budget(EXACT, "lovasz_digits_kernel<float>", 4, "exact digits"),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_budget(budget):
    source = CUDA / budget.source
    found = [kernel for kernel in sass.kernels(source, 90) if re.fullmatch(budget.kernel, kernel.name)]
    assert found, f"no kernel of {source.name} has such a name: " + ", ".join(k.name for k in sass.kernels(source, 90))
    wide = budget.elements - 1 if budget.wide_multiplies is None else budget.wide_multiplies
    for kernel in found:
        warps = kernel.warps(budget.dynamic_shared)
        executed = kernel.way if budget.whole else kernel.iteration
        executed = kernel.iteration_with(budget.loop) if budget.loop else executed
        if budget.inner > 1:
            executed += kernel.inner_iteration * (budget.inner - 1)
        per_element = len(executed) / budget.elements
        report = (
            f"{kernel.name} on sm_{kernel.arch}: {per_element:.1f} instructions an element of {budget.instructions} in "
            f"benchmarks/model.py, {kernel.wide_multiplies} wide multiplies of {wide}, {warps} warps of {budget.warps} "
            f"({kernel.registers} registers), {kernel.shared_bytes} bytes of static shared memory of {budget.static_shared}\n"
            f"{sass.histogram(executed)}"
        )
        print(report)
        # Versions of nvcc may differ. What needs clearly less deserves a new number there.
        assert 0.95 * budget.instructions - 0.1 <= per_element <= 1.01 * budget.instructions + 0.1, report
        assert kernel.wide_multiplies <= wide, report
        assert warps >= budget.warps, report
        assert kernel.shared_bytes <= budget.static_shared, report


@pytest.mark.parametrize("step", ["count", "backward"])
def test_a_focal_term_costs_a_seventh_at_most(step):
    for ours, lovasz in zip(INSTRUCTIONS[f"compound {step}"], INSTRUCTIONS[f"histogram {step}"], strict=True):
        assert ours <= 1.15 * lovasz


#: Bytes of code: 128 KiB are what the instruction cache of a multiprocessor holds.
CODE_BYTES = 128 * 1024


# (Of sm_89 ptxas makes what it makes of sm_86: the same registers in each of 896 kernels.)
@pytest.mark.parametrize("arch", [arch for arch in sass.PTX if arch != 89])
@pytest.mark.parametrize("source", sorted(CUDA.rglob("*.cu")), ids=lambda path: path.name)
def test_nothing_spills_and_code_fits_the_cache(source, arch):
    found = sass.kernels(source, arch, listed=False)
    assert found
    for kernel in found:
        print(f"{kernel.registers:>4} registers {kernel.spilled:>3} spilled {kernel.code_bytes:>7} bytes  {kernel.name}")
        assert kernel.registers > 0 and kernel.threads >= 32 and kernel.warps() > 0
    spilled = {kernel.name: kernel.spilled for kernel in found if kernel.spilled}
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
