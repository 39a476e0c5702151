"""The emulator of tests/emulator, and what it says of the CUDA kernels beyond their results: they do not depend on the order in
which threads take turns, nor on which multiplications and additions are fused; how much memory they read and write."""

import ctypes
import functools
import json
import subprocess

import pytest
import sass
import torch
from emulator import library
from grid import labels, logits

import veerloss
from veerloss import ops
from veerloss._layout import TABLE, bin_count

SHAPE = (2, 19, 64, 128)


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """`emulated(namespace)`: from then on, backend="native" is that build of the emulated library."""

    def use(namespace):
        path = emulated_library(namespace)
        monkeypatch.setitem(ops.NAMESPACES, "native", namespace)
        return path

    return use


def sigmoid_dense(x, y, ignore_index=None, **options):
    target = torch.nn.functional.one_hot(y, x.size(1)).movedim(-1, 1).to(x.dtype)
    if ignore_index is not None:
        target[:, ignore_index] = ignore_index
    return veerloss.sigmoid_focal_loss(x, target.contiguous(), gamma=1.5, ignore_index=ignore_index, **options)


LOSSES = {
    "sigmoid focal, dense": sigmoid_dense,
    "sigmoid focal, index": functools.partial(veerloss.sigmoid_focal_loss, gamma=1.5),
    "softmax focal": functools.partial(veerloss.softmax_focal_loss, gamma=1.5),
    "lovasz exact": functools.partial(veerloss.lovasz_softmax_loss, method="exact"),
    "lovasz histogram": functools.partial(veerloss.lovasz_softmax_loss, method="histogram"),
    "dice": veerloss.dice_loss,
    "dice, squared": functools.partial(veerloss.dice_loss, squared=True),
    "dice, sigmoid": functools.partial(veerloss.dice_loss, activation="sigmoid"),
}
over_layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
over_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def forward_and_backward(loss, x, y, **options):
    """(loss, gradient)"""
    x = x.detach().requires_grad_()
    value = loss(x, y, backend="native", **options)
    return value.detach(), torch.autograd.grad(value, x)[0]


# ---- the order of threads


@over_losses
@over_layouts
@pytest.mark.parametrize("shape", [(2, 3, 37, 41), (1, 130, 24, 40)], ids=["3 classes", "130 classes"])
def test_the_order_of_threads_changes_no_bit(shape, layout, loss, emulated, monkeypatch):
    emulated(library.NAMESPACE)
    x, y = logits(shape).contiguous(memory_format=layout), labels(shape, shape[1])
    expected = forward_and_backward(loss, x, y, ignore_index=1)
    for seed in range(2):
        monkeypatch.setenv("VEERLOSS_EMULATOR_SEED", str(seed))
        found = forward_and_backward(loss, x, y, ignore_index=1)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 7), (2, 8, 40, 50), (1, 12, 100, 100), (2, 19, 50, 60), (1, 20, 60, 61), (2, 24, 30, 33)], ids=str
)
def test_rows_through_shared_memory_change_no_bit(shape, per_image, emulated):
    """Of method "histogram": classes that are neighbours go through shared memory, all pixels of a block at once or strips of
    them, of one image or of several."""
    emulated(library.NAMESPACE)
    x, y = logits(shape), labels(shape, shape[1])
    options = {"ignore_index": 1, "per_image": per_image}
    for dtype in (torch.float32, torch.float16):
        planes, rows = (
            forward_and_backward(LOSSES["lovasz histogram"], x.to(dtype).contiguous(memory_format=layout), y, **options)
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        assert planes[0].isfinite() and planes[1].count_nonzero() > 0
        assert torch.equal(rows[0], planes[0]) and torch.equal(rows[1], planes[1])


# ---- fused multiplications and additions


def two_classes(kind: str):
    """Logits whose errors lie within a rounding of the edges of cells, or anywhere."""
    generator = torch.Generator().manual_seed(3)
    n = 20_000
    if kind == "edges":
        octaves, steps = torch.randint(0, 7, (n,), generator=generator), torch.randint(64, 128, (n,), generator=generator)
        error = (steps / 128.0 * 0.5**octaves).double()
        difference = (error / (1 - error)).log()
    else:
        difference = 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    second = torch.randn(n, generator=generator)
    y = (torch.rand(n, generator=generator) < 0.1).long()
    return torch.stack([(second + difference).float(), second], 1), 1 - y


needs_fma = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs a CPU with FMA")


@needs_fma
@pytest.mark.parametrize("kind", ["edges", "anywhere"])
def test_counting_and_backward_find_the_same_bins(kind, emulated):
    """The weights of all pixels of a class add up to 1, if each pixel has the weight of the bin that it was counted in. (With
    errors that backward takes for one unit in the last place larger, they are off by 4e-3.)"""
    x, y = two_classes(kind)
    loss = functools.partial(veerloss.lovasz_softmax_loss, method="histogram", classes=[0], reduction="sum")
    for namespace in (library.NAMESPACE, library.FUSED):
        emulated(namespace)
        p = x.double().softmax(1)
        gradient = forward_and_backward(loss, x, y)[1][:, 0].double()
        weights = gradient.abs() / (p[:, 0] * p[:, 1])  # p_0 p_1 is the derivative of p_0
        assert weights.sum().item() == pytest.approx(1, abs=1e-5), namespace


@needs_fma
@over_losses
def test_fused_arithmetic_changes_little(loss, emulated):
    x, y = logits(SHAPE), labels(SHAPE, SHAPE[1])
    results = []
    for namespace in (library.NAMESPACE, library.FUSED):
        emulated(namespace)
        results.append(forward_and_backward(loss, x, y))
    (plain, plain_gradient), (fused, fused_gradient) = results
    # In some nothing of moment is left to the compiler.
    if loss not in (LOSSES["lovasz histogram"], LOSSES["dice"], LOSSES["dice, sigmoid"]):
        assert not torch.equal(fused_gradient, plain_gradient)  # something has been fused
    assert (fused - plain).abs() <= 1e-6 * plain
    assert (fused_gradient - plain_gradient).norm() <= 1e-5 * plain_gradient.norm()


# ---- memory


@pytest.fixture
def metered(emulated, tmp_path, monkeypatch):
    """`metered(loss, x, y)`: what the meter says of each launch of forward, and of backward; see emulator/meter.h."""

    def run(loss, x, y):
        library_path = emulated(library.METERED)
        symbols = subprocess.run(["nm", "-C", library_path], capture_output=True, text=True, check=True).stdout
        names = {int(line[:16], 16): line[19:] for line in symbols.splitlines() if line[:16].strip()}

        def launches(path):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            return [{**line, "kernel": sass.short_name(names[line["kernel"]])} for line in lines]

        x = x.detach().requires_grad_()
        monkeypatch.setenv("VEERLOSS_METER", str(tmp_path / "forward"))
        value = loss(x, y, backend="native")
        monkeypatch.setenv("VEERLOSS_METER", str(tmp_path / "backward"))
        value.backward()
        monkeypatch.delenv("VEERLOSS_METER")
        found = [launches(tmp_path / name) for name in ("forward", "backward")]
        for path in tmp_path.iterdir():
            path.unlink()
        print(*(launch for launches in found for launch in launches), sep="\n")
        return found

    return run


def total(launches, what: str) -> int:
    return sum(launch[what] for launch in launches)


def memory(x, y) -> tuple[int, int]:
    """The bytes of the logits, and of the target."""
    return x.numel() * x.element_size(), y.numel() * y.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layouts
def test_traffic_of_the_softmax_focal_loss(layout, dtype, metered):
    """Forward reads logits and target once; backward reads them again, and writes the gradient. What a warp asks for is used,
    but for the rest of the sectors of the labels' logits."""
    x, y = logits(SHAPE, dtype).contiguous(memory_format=layout), labels(SHAPE, SHAPE[1])
    forward, backward = metered(LOSSES["softmax focal"], x, y)
    of_logits, of_target = memory(x, y)
    small = 1024  # options, and the sums of blocks
    assert of_logits + of_target <= total(forward, "read") <= of_logits + of_target + small
    assert total(forward, "written") <= small
    assert of_logits + of_target <= total(backward, "read") <= of_logits + of_target + small
    assert of_logits <= total(backward, "written") <= of_logits + small
    label_logits = 32 * y.numel()
    assert 32 * total(forward, "sectors") <= of_logits + of_target + label_logits + 8 * small
    for launches in (forward, backward):  # as counted: 0.06 turns more than without conflicts, of rows of 19 classes
        assert total(launches, "conflicts") <= 0.07 * total(launches, "shared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layouts
@pytest.mark.parametrize("kind", ["dense", "index"])
def test_traffic_of_the_sigmoid_focal_loss(kind, layout, dtype, metered):
    """Forward reads logits and target once; backward reads them again, and writes the gradient: 16 bytes at a time, and nothing
    that is not used. Labels of NCHW are read by halves of sectors; in bfloat16 twice, each time for half of the classes."""
    x, y = logits(SHAPE, dtype).contiguous(memory_format=layout), labels(SHAPE, SHAPE[1])
    loss, target = veerloss.sigmoid_focal_loss, y
    if kind == "dense":
        target = torch.nn.functional.one_hot(y, SHAPE[1]).movedim(-1, 1).to(dtype).contiguous(memory_format=layout)
    forward, backward = metered(loss, x, target)
    of_logits, of_target = memory(x, target)
    planes = kind == "index" and layout == torch.contiguous_format
    again = of_target if planes and dtype == torch.bfloat16 else 0
    small = 1024  # options, and the sums of blocks
    assert of_logits + of_target <= total(forward, "read") <= of_logits + of_target + again + small
    assert total(forward, "written") <= small
    assert of_logits + of_target <= total(backward, "read") <= of_logits + of_target + again + small
    assert of_logits <= total(backward, "written") <= of_logits + small
    for launches, passes in ((forward, 1), (backward, 2)):
        sectors = passes * of_logits + (1 + planes) * (of_target + again)
        assert sectors <= 32 * total(launches, "sectors") <= sectors + 64 * small
        requests = (passes * of_logits + of_target + again) / (32 * 16)
        assert requests / 2 <= total(launches, "requests") <= requests + small


@over_layouts
def test_traffic_of_the_histogram_method(layout, metered):
    """Each count reads logits and target once, and so does backward, which writes the gradient; beside them tables, counts and
    weights, whose size is that of the bins. What a warp asks for is used, but for the rest of the sectors of the labels'
    logits."""
    x, y = logits(SHAPE).contiguous(memory_format=layout), labels(SHAPE, SHAPE[1])
    forward, (backward,) = metered(LOSSES["lovasz histogram"], x, y)
    of_logits, of_target = memory(x, y)
    bins = bin_count(SHAPE[1])
    of_bins = SHAPE[1] * (8 * TABLE + 2 * 4 * bins + 16 * -(-bins // 512)) + 1024  # and a few values of each segment
    counts = [launch for launch in forward if "lovasz_count_softmax_kernel" in launch["kernel"]]
    assert 2 <= len(counts) <= 3 and len(forward) <= 3 * len(counts)
    for launch in (*counts, backward):
        assert of_logits + of_target <= launch["read"] <= of_logits + of_target + of_bins
    assert all(launch["written"] <= of_bins for launch in forward)
    assert backward["written"] == of_logits
    assert sum(launch["read"] for launch in forward) <= len(counts) * (of_logits + of_target + 2 * of_bins)
    label_logits = 32 * y.numel()
    for launch in counts:
        assert 32 * launch["sectors"] <= of_logits + of_target + label_logits + 2 * launch["blocks"] * of_bins


@over_layouts
def test_traffic_of_many_classes(layout, metered):
    """More than registers hold: each count reads the logits twice, the second time in parts, and the softmax of every pixel;
    backward once."""
    shape = (2, 40, 32, 64)
    x, y = logits(shape).contiguous(memory_format=layout), labels(shape, shape[1])
    forward, (backward,) = metered(LOSSES["lovasz histogram"], x, y)
    of_logits, of_target = memory(x, y)
    of_softmax = 8 * y.numel()
    of_bins = shape[1] * (8 * TABLE + 2 * 4 * bin_count(shape[1])) + 1024
    statistics = [launch for launch in forward if "lovasz_statistics_parts_kernel" in launch["kernel"]]
    counts = [launch for launch in forward if "lovasz_count_softmax_kernel" in launch["kernel"]]
    assert len(statistics) == len(counts) >= 2
    for launch in statistics:
        assert of_logits <= 32 * launch["sectors"] <= of_logits + 2 * of_softmax + 1024 * launch["blocks"]
    for launch in counts:
        assert of_logits <= launch["read"] <= of_logits + of_target + of_softmax + of_bins
    assert of_logits <= backward["read"] <= of_logits + of_target + of_bins
    assert backward["written"] == of_logits


@pytest.mark.parametrize("classes", [3, 19, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layouts
def test_backward_of_the_histogram_method_is_coalesced(layout, dtype, classes, metered):
    """Warps ask for whole sectors of logits and gradient, also where classes are neighbours: all pixels of a block at once, or
    strips of them (24 classes). Of a pixel's label one sector of its logit and one of its weight; blocks load the bins."""
    shape = (2, classes, 64, 128)
    x, y = logits(shape, dtype).contiguous(memory_format=layout), labels(shape, classes)
    _, (backward,) = metered(LOSSES["lovasz histogram"], x, y)
    of_logits, of_target = memory(x, y)
    of_bins = classes * (8 * TABLE + 4 * bin_count(classes)) + 1024
    asked_for = 2 * of_logits + of_target + 2 * 32 * y.numel() + backward["blocks"] * of_bins
    assert 32 * backward["sectors"] <= asked_for
    assert "lovasz_gradient_kernel" in backward["kernel"]


@pytest.mark.parametrize("classes", [19, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_layouts
def test_traffic_of_the_region_losses(layout, dtype, classes, metered):
    """As that of the softmax focal loss. Of a label one sector of its logit; blocks add up a few words of each class."""
    shape = (2, classes, 64, 128)
    x, y = logits(shape, dtype).contiguous(memory_format=layout), labels(shape, classes)
    (sums, weigh), (backward,) = metered(LOSSES["dice"], x, y)
    of_logits, of_target = memory(x, y)
    of_words = 1024 + 64 * classes
    assert of_logits + of_target <= sums["read"] <= of_logits + of_target + of_words
    assert sums["written"] + weigh["read"] + weigh["written"] <= 3 * of_words
    assert of_logits + of_target <= backward["read"] <= of_logits + of_target + of_words
    assert backward["written"] == of_logits
    label_logits = 32 * y.numel()
    for launch, passes in ((sums, 1), (backward, 2)):
        assert 32 * launch["sectors"] <= passes * of_logits + of_target + label_logits + 8 * launch["blocks"] * of_words


def test_traffic_of_the_exact_method(metered):
    """In multiples of the logits, as counted at SHAPE; at the least 2 and 1. With its sort, of what lies above the least error
    of foreground; without that it would be 9 and 8."""
    x, y = logits(SHAPE), labels(SHAPE, SHAPE[1])
    found = metered(LOSSES["lovasz exact"], x, y)
    for launches, (read, written) in zip(found, ((6.1, 4.3), (2.1, 1.01)), strict=True):
        assert total(launches, "read") <= read * memory(x, y)[0]
        assert total(launches, "written") <= written * memory(x, y)[0]


# ---- the emulator itself

EXAMPLE = """
#include "../../csrc/cuda/device.cuh"
using namespace veerloss;

__global__ void strided(const float* from, float* to, int stride) {
  __shared__ float shared[32 * 32];
  const int t = static_cast<int>(threadIdx.x);
  shared[t * stride] = from[t * stride];
  __syncthreads();
  to[t] = shared[t * stride];
}
__global__ void atomics(int* counts, int different) {
  __shared__ int shared[32];
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = 0;
  __syncthreads();
  atomicAdd(&shared[t % different], 1);
  __syncthreads();
  if (shared[t]) atomicAdd(counts + t % different, shared[t]);
}
__global__ void not_atomic(int* counts) {
  const int before = counts[0];
  atomicAdd(&counts[1], 1);
  counts[0] = before + 1;
}
__global__ void first_come(int* order, int* next) {
  order[atomicAdd(next, 1)] = static_cast<int>(threadIdx.x);
}
extern "C" __attribute__((visibility("default"))) void run(int which, void* a, void* b, int number) {
  const Launch warp{.blocks = 1, .threads = 32, .stream = nullptr};
  if (which == 0) launch(strided, warp, static_cast<const float*>(a), static_cast<float*>(b), number);
  if (which == 1) launch(atomics, warp, static_cast<int*>(a), number);
  if (which == 2) launch(not_atomic, warp, static_cast<int*>(a));
  if (which == 3) launch(first_come, warp, static_cast<int*>(a), static_cast<int*>(b));
}
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Compiled as the kernels are."""
    if library.cuda_headers() is None:
        pytest.skip("needs the headers of a CUDA toolkit")
    folder = tmp_path_factory.mktemp("example")
    (folder / "example.cu").write_text(EXAMPLE.replace("../../csrc", str(library.CSRC)))
    return ctypes.CDLL(str(library.build(folder, library.METERED, [folder / "example.cu", *library.EMULATOR]))).run


@pytest.fixture
def meter(example, tmp_path, monkeypatch):
    def run(which, a, b, number=0):
        monkeypatch.setenv("VEERLOSS_METER", str(tmp_path / "meter"))
        example(which, ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(b.data_ptr()), number)
        return json.loads((tmp_path / "meter").read_text().splitlines()[-1])

    return run


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (3, 0), (8, 7), (32, 31)])
def test_the_meter_of_strided_memory(stride, conflicts, meter):
    aligned = torch.zeros(32 * 32 + 32 + 8)
    start = -(aligned.data_ptr() // 4) % 8
    memory, to = aligned[start : start + 32 * 32], torch.zeros(32)
    found = meter(0, memory, to, stride)
    sectors = min(32, 4 * stride)
    assert (found["blocks"], found["threads"]) == (1, 32)
    assert found["read"] == 32 * sectors
    assert found["written"] in (128, 160)  # if it does not begin with a sector
    assert found["requests"] == 2 and found["sectors"] == sectors + found["written"] // 32
    assert found["shared"] == 2 and found["conflicts"] == 2 * conflicts
    assert found["atomics"] == found["global_atomics"] == 0


@pytest.mark.parametrize("different", [1, 4, 32])
def test_the_meter_of_atomics(different, meter):
    counts = torch.zeros(32, dtype=torch.int32)
    found = meter(1, counts, counts, different)
    assert counts.sum() == 32
    assert found["atomics"] == 1 and found["atomic_turns"] == 32 // different
    assert found["global_atomics"] == 1 and found["global_atomic_turns"] == 1
    assert found["shared"] == 2 and found["conflicts"] == 0


def test_threads_take_turns_at_atomics(meter, monkeypatch):
    counts, order = torch.zeros(2, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    meter(2, counts, counts)
    meter(3, order, torch.zeros(1, dtype=torch.int32))
    assert counts.tolist() == [32, 32] and order.tolist() in (list(range(32)), list(range(31, -1, -1)))
    orders = set()
    for seed in range(3):
        monkeypatch.setenv("VEERLOSS_EMULATOR_SEED", str(seed))
        counts.zero_()
        meter(2, counts, counts)
        assert counts[0] < 32 and counts[1] == 32
        meter(3, order, torch.zeros(1, dtype=torch.int32))
        assert sorted(order.tolist()) == list(range(32))
        orders.add(tuple(order.tolist()))
    assert len(orders) == 3
