"""`python -m benchmarks.gpu`: forward + backward on a GPU against the peers; writes benchmarks/results/<gpu>.json and .md.

A contestant's time is the median over interleaved rounds, by the GPU's own clock, of one forward + backward with its data out
of the cache. The GPU is kept busy until the host has issued its work, so that the host's time shows only where a contestant
waits for the GPU, or takes longer than that to issue. Small inputs are the other way round: the time by the clock on the wall,
as one call follows the other.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import json
import math
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import veerloss
from veerloss._arguments import missing_reason

from . import peers, report
from .inputs import Inputs
from .throughput import floor_bytes, forward_backward
from .timing import Step, quantiles

ROOT = Path(__file__).parent
F32, BF16 = torch.float32, torch.bfloat16
COPY, SORT = "copy between two buffers on the GPU", "one CUB radix sort, 32-bit keys and values"
CROSS_ENTROPY = "torch cross_entropy"  # another loss, and the price to meet
NO_TIME = "no time left"
OURS, HISTOGRAM, EXACT = "veerloss", "veerloss histogram", "veerloss exact"
#: Where Lovász has two kernels, the first is the one that backend="auto" takes.
BACKENDS = ("native", "triton")

FLUSHED = 256 << 20  # bytes written before each step; several times the cache of any GPU
HEAD_START = 6_000_000  # cycles, about three milliseconds, for the host to issue a step in
COPIED = 1 << 30  # bytes of each buffer of COPY
SECONDS_EACH, FEWEST, MOST = 0.4, 3, 25  # time for the rounds of a contestant, and their number
POSITIVES = 0.01  # of the dense targets, as in detection


# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Case:
    """`compiled`: "no" leaves out the contestants under torch.compile, "only" the peers that are not."""

    inputs: Inputs
    compiled: str = "no"
    small: bool = False

    def __str__(self) -> str:
        task, dtype = self.inputs.task, str(self.inputs.dtype).removeprefix("torch.")
        return f"{task} {list(self.inputs.shape)} {dtype}" + (", compiled peers" if self.compiled == "only" else "")


CITY, TALL, WIDE = (8, 19, 512, 1024), (2, 19, 1024, 2048), (4, 150, 512, 512)
BINARY, DETECTION, SMALL = (16, 1, 1024, 1024), (64, 91, 76725), (2, 4, 64, 64)
FOCAL = ("sigmoid_focal", "softmax_focal", "sigmoid_focal_index")


def cases(quick: bool) -> list[Case]:
    """What matters most comes first, for what comes last may find no time left. `quick`: tiny images."""

    def case(task: str, shape: tuple[int, ...], dtype: torch.dtype = F32, compiled: str | None = None) -> Case:
        small = shape == SMALL
        if quick:
            shape = tuple(min(n, 8) for n in shape)
        if task == "lovasz_hinge":
            shape = shape[:1] + shape[2:]
        # The compiler unrolls the classes of a Lovász peer: minutes where they are many.
        return Case(Inputs(task, shape, dtype=dtype), compiled or ("yes" if task in FOCAL else "no"), small)

    return [
        case("lovasz_softmax", CITY),
        *(case(task, CITY) for task in FOCAL),
        case("sigmoid_focal", DETECTION),
        case("lovasz_hinge", BINARY),
        *(case(task, SMALL) for task in ("lovasz_softmax", "lovasz_hinge", "softmax_focal", "sigmoid_focal")),
        case("lovasz_softmax", CITY, BF16),
        *(case(task, CITY, BF16) for task in FOCAL),
        case("sigmoid_focal", DETECTION, BF16),
        case("lovasz_hinge", BINARY, BF16),
        case("lovasz_softmax", WIDE),
        case("softmax_focal", WIDE),
        case("sigmoid_focal_index", WIDE),
        case("lovasz_softmax", WIDE, BF16),
        case("softmax_focal", WIDE, BF16),
        case("lovasz_softmax", CITY, compiled="only"),
        case("sigmoid_focal", BINARY),
        case("lovasz_softmax", TALL),
        case("softmax_focal", TALL),
        case("lovasz_softmax", TALL, BF16),
        case("softmax_focal", TALL, BF16),
        case("sigmoid_focal", BINARY, BF16),
        case("sigmoid_focal_index", WIDE, BF16),
        case("lovasz_hinge", BINARY, compiled="only"),
    ]


def make(inputs: Inputs, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal logits, a leaf, and the task's target, both made on `device`."""
    g = torch.Generator(device).manual_seed(0)
    shape = inputs.shape
    logits = torch.randn(shape, generator=g, device=device, dtype=inputs.dtype).requires_grad_()
    if inputs.task == "sigmoid_focal":
        return logits, (torch.rand(shape, generator=g, device=device) < POSITIVES).to(inputs.dtype)
    if inputs.task == "lovasz_hinge":
        return logits, (torch.rand(shape, generator=g, device=device) < inputs.fg_share).long()
    return logits, torch.randint(shape[1], shape[:1] + shape[2:], generator=g, device=device)


def _own(function: Callable, loss: str, backend: str, device: torch.device, **options) -> peers.Lazy:
    """Our function on one backend and no other."""

    def load() -> peers.Loss:
        if backend == "triton" and device.type == "cpu":  # Triton's interpreter can, which says nothing of speed
            raise peers.Missing("cannot run on cpu")
        if missing_reason(backend, device, loss) is not None:
            raise peers.Missing("not installed" if backend == "triton" else "not built")
        return functools.partial(function, backend=backend, **options)

    return peers.Lazy(load)


def contestants(task: str, device: torch.device) -> dict[str, peers.Loss]:
    """Ours first, then the peers, each as it is and, but for another loss, under torch.compile."""
    theirs = {name: loss for name, loss in peers.TASKS[task]().items() if not name.startswith(OURS)}
    if task in FOCAL:
        function, options = veerloss.sigmoid_focal_loss, {"alpha": peers.ALPHA, "gamma": peers.GAMMA}
        if task == "softmax_focal":
            function, options = veerloss.softmax_focal_loss, {"gamma": peers.GAMMA}
        backend = "triton" if device.type == "cuda" else "native"
        return {OURS: _own(function, "focal", backend, device, **options), **_with_compiled(theirs)}
    function = veerloss.lovasz_softmax_loss if task == "lovasz_softmax" else veerloss.lovasz_hinge_loss
    ours = {
        f"{OURS} {method}, {backend}": _own(function, "lovasz", backend, device, method=method)
        for backend in BACKENDS
        for method in ("histogram", "exact")
    }
    return {**ours, **_with_compiled(theirs)}


def _with_compiled(losses: dict[str, peers.Loss]) -> dict[str, peers.Loss]:
    found = {}
    for name, loss in losses.items():
        found[name] = loss
        if "compile" not in name and name != CROSS_ENTROPY:
            found.setdefault(f"{name}, torch.compile", peers._compiled(loss))
    return found


# ------------------------------------------------------------------ clocks


class GpuClock:
    """Seconds and bytes of a step, as the GPU and its allocator see them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, step: Step) -> int:
        """The most bytes that a step has at one time, beyond what there was."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class CpuClock:
    """The same on a CPU, where no memory is measured: so that the code can run without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def peak(self, step: Step) -> None:
        step()

    def wait(self) -> None: ...

    def clear(self) -> None:
        gc.collect()


Clock = GpuClock | CpuClock


def wall(clock: Clock, step: Step, calls: int) -> float:
    """Seconds of one call among many."""
    clock.wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    clock.wait()
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises peers.Missing in what runs for longer, such as a compilation; in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_) -> None:
        raise peers.Missing(NO_TIME)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Sort:
    """sort.cu, built beside everything else that happens at the start."""

    def __init__(self, device: torch.device) -> None:
        self.process, self.library = None, None
        if device.type != "cuda" or shutil.which("nvcc") is None:
            return
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        source, self.path = ROOT / "sort.cu", ROOT.parent / "build" / f"sort-{arch}.so"
        if not self.path.exists() or self.path.stat().st_mtime < source.stat().st_mtime:
            self.path.parent.mkdir(exist_ok=True)
            flags = ["-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
            self.process = subprocess.Popen(["nvcc", *flags, "-o", str(self.path), str(source)])

    def step(self, count: int, device: torch.device) -> Step:
        """Sorts `count` pairs."""
        if self.library is None:
            if self.process and self.process.wait():
                raise peers.Missing("nvcc fails")
            if not hasattr(self, "path"):
                raise peers.Missing("no nvcc" if device.type == "cuda" else f"cannot run on {device.type}")
            self.library = ctypes.CDLL(str(self.path))
        keys = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)
        values = torch.arange(count, dtype=torch.int32, device=device)
        tensors = [keys, torch.empty_like(keys), values, torch.empty_like(values)]
        arrays = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        size = ctypes.c_size_t(0)

        def sort(temporary: int | None) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointer = ctypes.c_void_p(temporary)
            error = self.library.sort_pairs(pointer, ctypes.byref(size), *arrays, ctypes.c_int64(count), stream)
            if error:
                raise RuntimeError(f"CUDA error {error}")

        sort(None)
        tensors.append(torch.empty(size.value, dtype=torch.uint8, device=device))
        return lambda: sort(tensors[-1].data_ptr())


# ------------------------------------------------------------------ measuring


@dataclass
class Run:
    """What the cases of one run share."""

    device: torch.device
    quick: bool
    deadline: float
    clock: Clock
    sort: Sort

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()


def steps(case: Case, run: Run, logits: Tensor, target: Tensor) -> dict[str, Step]:
    losses = contestants(case.inputs.task, run.device)
    compiled = "no" if run.quick else case.compiled
    if compiled == "no":
        losses = {name: loss for name, loss in losses.items() if "compile" not in name}
    elif compiled == "only":
        losses = {name: loss for name, loss in losses.items() if "compile" in name or name.startswith(OURS)}
    return {name: forward_backward(loss, logits, target) for name, loss in losses.items()}


def warm_up(step: Step, run: Run, logits: Tensor) -> dict:
    """{"status"}, and with "ok" the "seconds" of a call and the bytes "extra" to the gradient."""
    try:
        with at_most(run.left):
            step()  # compiles
            logits.grad = None
            peak = run.clock.peak(step)
        extra = None if peak is None else peak - logits.nbytes
        return {"status": "ok", "seconds": run.clock(step), "extra": extra}
    except Exception as error:  # a contestant that cannot run is a result
        logits.grad = None
        # The compiler may wrap the alarm in an error of its own.
        status, failed = NO_TIME if run.left <= 0 else peers.problem(error), not isinstance(error, peers.Missing)
    if failed:  # for lack of memory, perhaps; not in the handler, where the traceback holds the tensors
        run.clock.clear()
    return {"status": status}


def measure(case: Case, run: Run) -> list[dict]:
    """A row for each contestant, for the copy and for the sort."""
    logits, target = make(case.inputs, run.device)
    timed = steps(case, run, logits, target)
    found = {name: warm_up(step, run, logits) for name, step in timed.items()}
    logits.grad = None
    if not case.small:
        source = torch.zeros(1 << 20 if run.quick else COPIED, dtype=torch.uint8, device=run.device)
        timed[COPY] = functools.partial(torch.empty_like(source).copy_, source)
        timed[COPY]()
        found[COPY] = {"status": "ok", "seconds": run.clock(timed[COPY])}
        if case.inputs.task not in FOCAL:
            try:
                timed[SORT] = run.sort.step(logits.numel(), run.device)
                timed[SORT]()
                found[SORT] = {"status": "ok", "seconds": run.clock(timed[SORT])}
            except Exception as error:
                found[SORT] = {"status": peers.problem(error)}
    times = rounds(case, run, {name: timed[name] for name, row in found.items() if row["status"] == "ok"}, found)

    common = {"case": str(case), "task": case.inputs.task, "shape": list(case.inputs.shape), "small": case.small}
    common["dtype"] = str(case.inputs.dtype).removeprefix("torch.")
    rows, floor, floor_ms = [], floor_bytes(logits, target), None
    if not case.small and isinstance(times[COPY], list):
        floor_ms = quantiles(times[COPY])["median"] * floor / (2 * source.nbytes)
    for name, row in found.items():
        row = {**common, "contestant": name, "status": row["status"], "extra": row.get("extra")}
        if isinstance(times.get(name), str):
            row["status"] = times[name]
        elif name in times:
            row |= {f"{key}_ms": value for key, value in quantiles(times[name]).items()} | {"rounds": len(times[name])}
            moved = {COPY: 2 * source.nbytes, SORT: None}.get(name, floor) if not case.small else None
            if moved:
                row["gb_s"] = 1e-6 * moved / row["median_ms"]
            if floor_ms and name not in (COPY, SORT):
                row["floor_share"] = floor_ms / row["median_ms"]
            if row["extra"] is not None:
                row["extra_ratio"] = row["extra"] / logits.nbytes
        rows.append(row)
    for family in (OURS,) if case.inputs.task in FOCAL else (HISTOGRAM, EXACT):
        ours = own_row(rows, family)
        for row in rows:
            if ours and "median_ms" in row and row["contestant"] != COPY:
                row.setdefault("ratios", {})[family] = row["median_ms"] / ours["median_ms"]
    return rows


def rounds(case: Case, run: Run, timed: dict[str, Step], found: dict[str, dict]) -> dict[str, list | str]:
    """Seconds of every call, A B C A B C; the slow take part in the first rounds only."""
    count = {}
    for name in timed:
        fit = int(SECONDS_EACH / max(found[name]["seconds"], 1e-6))
        count[name] = 2 if run.quick else max(FEWEST, min(MOST, fit))
    times: dict[str, list | str] = {name: [] for name in timed}
    for number in range(max(count.values(), default=0)):
        if number > 0 and run.left <= 0:
            break
        for name, step in timed.items():
            if number < count[name] and isinstance(times[name], list):
                try:
                    if case.small:
                        calls = max(1, min(100, int(0.02 / max(found[name]["seconds"], 1e-6))))
                        seconds = wall(run.clock, step, 1 if run.quick else calls)
                    else:
                        seconds = run.clock(step)
                    times[name].append(seconds)
                except Exception as error:
                    times[name] = peers.problem(error)
    return times


def own_row(rows: list[dict], family: str) -> dict | None:
    """The row of ours that backend="auto" would give."""
    return next((row for row in rows if row["contestant"].startswith(family) and "median_ms" in row), None)


def add_kernels(case: Case, run: Run, rows: list[dict]) -> None:
    """To the rows of a small case: kernels in a call, and their time on the GPU. A profiler slows what comes after it."""
    logits, target = make(case.inputs, run.device)
    timed = steps(case, run, logits, target)
    for row in rows:
        if row["status"] != "ok" or "compile" in row["contestant"]:  # its code is gone
            continue
        step, calls = timed[row["contestant"]], 5
        try:
            step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(calls):
                    step()
                run.clock.wait()
            events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            if events:
                row["kernels"] = len(events) / calls
                row["gpu_ms"] = 1e-3 * sum(e.time_range.elapsed_us() for e in events) / calls
        except Exception as error:  # a profiler that may not look is no reason to lose the times
            _log(f"{row['contestant']}: no kernels, {type(error).__name__}")


def run_all(run: Run, only: str) -> tuple[list[dict], list[str]]:
    """(rows, what was left out and why)"""
    rows, left_out, small = [], [], []
    for case in cases(run.quick):
        if only not in str(case):
            continue
        if run.left <= 0:
            left_out.append(f"{case}: {NO_TIME}")
            continue
        _log(str(case))
        try:
            found = measure(case, run)
            rows += found
            if case.small:
                small.append((case, found))
        except Exception as error:
            left_out.append(f"{case}: {peers.problem(error)}")
            _log(f"{case}: {error}")
        torch.compiler.reset()  # the compiled code of one shape is of no use to the next
        run.clock.clear()
    if run.device.type == "cuda":
        for case, found in small:
            try:
                add_kernels(case, run, found)
            except Exception as error:
                left_out.append(f"kernels of {case}: {peers.problem(error)}")
    return rows, left_out


# ------------------------------------------------------------------ verdicts


def verdicts(rows: list[dict]) -> list[dict]:
    """{"bar", "measured", "met"}: the worst case of each bar; `met` is None where nothing was measured."""
    by_case: dict[str, list[dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    found = []

    def bar(what: str, values: list[tuple[float, str]], limit: float, style: str, *, least: bool = False) -> None:
        if not values:
            found.append({"bar": what, "measured": "not measured", "met": None})
            return
        value, where = min(values) if least else max(values)
        met = value >= limit if least else value <= limit
        found.append({"bar": what, "measured": f"{style.format(value)} ({where})", "met": met})

    def collect(
        dtype: str, tasks: tuple[str, ...], family: str, of: Callable, *, small: bool = False
    ) -> list[tuple[float, str]]:
        """`of(ours, row)` wherever it is a number, over the rows of all cases; `row` may be ours."""
        values = []
        for case, case_rows in by_case.items():
            first, ours = case_rows[0], own_row(case_rows, family)
            if ours and (first["dtype"], first["small"]) == (dtype, small) and first["task"] in tasks:
                for row in case_rows:
                    value = of(ours, row)
                    if value is not None and not math.isnan(value):
                        values.append((value, case if row is ours else f"{row['contestant']}, {case}"))
        return values

    def own(key: str) -> Callable:
        return lambda ours, row: ours.get(key) if row is ours else None

    def over(match: Callable[[str], bool]) -> Callable:
        """Our time over that of the contestants whose name matches."""
        return lambda ours, row: (
            ours["median_ms"] / row["median_ms"] if "median_ms" in row and match(row["contestant"]) else None
        )

    def slower(peer: str) -> Callable:
        """Of the large images of the city alone: how many times longer it takes."""
        city = list(CITY)
        return lambda ours, row: (
            row["median_ms"] / ours["median_ms"]
            if row["contestant"] == peer and "median_ms" in row and row["shape"] == city
            else None
        )

    softmax, lovasz = ("lovasz_softmax",), ("lovasz_softmax", "lovasz_hinge")
    percent, times = "{:.0%}", "{:.2f}x"
    for dtype in ("float32", "bfloat16"):
        for task in FOCAL:
            values = collect(dtype, (task,), OURS, own("floor_share"))
            bar(f"{task}, {dtype}: at least 85% of the floor", values, 0.85, percent, least=True)
        for task in FOCAL:
            values = collect(dtype, (task,), OURS, over(lambda name: "compile" in name))
            bar(f"{task}, {dtype}: at most 1x the time of a compiled peer", values, 1.0, times)
        values = collect(dtype, lovasz, HISTOGRAM, own("floor_share"))
        bar(f"Lovász histogram, {dtype}: at least 50% of the floor", values, 0.5, percent, least=True)
        values = collect(dtype, softmax, HISTOGRAM, over(lambda name: name == CROSS_ENTROPY))
        bar(f"Lovász histogram, {dtype}: at most 1.5x the time of cross_entropy", values, 1.5, times)
        for peer in ("segmentation-models-pytorch", "Berman's formula"):
            values = collect(dtype, softmax, HISTOGRAM, slower(peer))
            bar(f"{peer}, {dtype}, {list(CITY)}: at least 50x the time of histogram", values, 50.0, times, least=True)
        values = collect(dtype, lovasz, EXACT, over(lambda name: name == SORT))
        bar(f"Lovász exact, {dtype}: at most 1.5x the time of one radix sort", values, 1.5, times)
        for what, tasks, family, limit in (
            ("focal", FOCAL, OURS, 0.05),
            ("Lovász histogram", lovasz, HISTOGRAM, 0.05),
            ("Lovász exact", lovasz, EXACT, 4.0),
        ):
            values = collect(dtype, tasks, family, own("extra_ratio"))
            bar(f"{what}, {dtype}: extra memory at most {limit:g}x the logits", values, limit, "{:.3f}x")
    is_peer = lambda name: not name.startswith((OURS, CROSS_ENTROPY))  # noqa: E731
    for what, tasks, family in (("focal", FOCAL, OURS), ("Lovász exact", lovasz, EXACT)):
        values = collect("float32", tasks, family, over(is_peer), small=True)
        bar(f"{what}, {list(SMALL)}: at most 1/3 of the time of a peer", values, 1 / 3, times)
    return found


# ------------------------------------------------------------------ report


def machine(device: torch.device, command: str) -> dict:
    """What the numbers depend on."""
    driver = name = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    return {
        "gpu": name or device.type,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {"veerloss": veerloss.__version__, **{n: peers.version(n) for n in ("torch", "triton", *peers.PEERS)}},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
    }


def markdown(results: dict) -> str:
    about, rows = results["machine"], results["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    copies = [row["gb_s"] for row in rows if row["contestant"] == COPY and "gb_s" in row] or [0.0]
    lines = [
        f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}. {versions}, Python {about['python']}. "
        f"{about['date']}, {about['seconds']} s, `{about['command']}`.",
        "",
        "## Bars",
        "",
        *_table(("bar", "measured", "verdict"), [(v["bar"], v["measured"], _verdict(v["met"])) for v in results["verdicts"]]),
        "## Forward + backward",
        "",
        __doc__.split("\n", 2)[2].strip().replace("\n", " "),
        "",
        "The floor is two reads and one write of the logits and two reads of the target (the backward pass needs it again), at "
        f"the bandwidth, read and written, of a copy in the same rounds, {min(copies):.0f} to {max(copies):.0f} GB/s. GB/s are "
        "these bytes over the time, extra MB the peak beyond the gradient, the last columns the time over that of ours.",
        "",
    ]
    large = [row for row in rows if not row["small"]]
    for tasks, families in (
        (("lovasz_softmax", "lovasz_hinge"), (HISTOGRAM, EXACT)),
        (FOCAL, (OURS,)),
    ):
        header = ("inputs", "loss", "ms (20th to 80th percentile)", "GB/s", "of the floor", "extra MB")
        header += tuple(f"over {family.removeprefix('veerloss ')}" for family in families)
        cells = [_cells(row, families) for row in large if row["task"] in tasks]
        lines += _table(header, cells)
    small = [row for row in rows if row["small"]]
    lines += [
        "## Small inputs",
        "",
        "Where it goes: what is not time on the GPU is the host's, which issues the kernels.",
        "",
        *_table(("inputs", "loss", "us", "kernels", "us on the GPU", "over ours"), [_small_cells(row) for row in small]),
    ]
    if results["left_out"]:
        lines += ["## Left out", "", *(f"- {line}" for line in results["left_out"]), ""]
    return "\n".join(lines)


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[met]


def _table(header: tuple[str, ...], rows: list) -> list[str]:
    """With what repeats in the first column left blank."""
    lines, before = [report.line(header), report.line(["---"] * len(header))], None
    for first, *rest in rows:
        cells = ["" if first == before else first, *rest]
        lines.append(report.line([*cells, *[""] * (len(header) - len(cells))]))
        before = first
    return [*lines, ""]


def _cells(row: dict, families: tuple[str, ...]) -> list[str]:
    if "median_ms" not in row:
        return [row["case"], row["contestant"], row["status"]]
    return [
        row["case"],
        row["contestant"],
        f"{row['median_ms']:.3f} ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})",
        f"{row['gb_s']:.0f}" if "gb_s" in row else "",
        f"{row['floor_share']:.0%}" if "floor_share" in row else "",
        f"{row['extra'] / 1e6:.1f}" if row["extra"] is not None else "",
        *(f"{row['ratios'][family]:.2f}x" if family in row.get("ratios", {}) else "" for family in families),
    ]


def _small_cells(row: dict) -> list[str]:
    if "median_ms" not in row:
        return [row["case"], row["contestant"], row["status"]]
    ratios = row.get("ratios", {})
    ratio = ratios.get(EXACT, ratios.get(OURS))  # "auto" takes exact for small segments
    return [
        row["case"],
        row["contestant"],
        f"{1e3 * row['median_ms']:.0f}",
        f"{row['kernels']:.0f}" if "kernels" in row else "",
        f"{1e3 * row['gpu_ms']:.0f}" if "gpu_ms" in row else "",
        f"{ratio:.2f}x" if ratio else "",
    ]


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit status is 0 whatever the numbers say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny inputs, nothing compiled: does everything run?")
    parser.add_argument("--device", default="cuda", help="cpu runs the same code, to test it")
    parser.add_argument("--seconds", type=float, default=240.0, help="for the whole run; what does not fit is left out")
    parser.add_argument("--filter", default="", help="only inputs whose name contains this text")
    parser.add_argument("--output", type=Path, help="path without suffix; a partial run writes nothing without it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --device cpu --quick tests the code without one", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", module=r"(kornia|timm|torchvision|torch)\b")
    start = time.perf_counter()
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    results = {"machine": machine(device, command)}
    clock = GpuClock(device) if device.type == "cuda" else CpuClock(device)
    run = Run(device, options.quick, start + options.seconds, clock, Sort(device))
    results["rows"], results["left_out"] = run_all(run, options.filter)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["verdicts"] = verdicts(results["rows"])
    text = markdown(results)
    name = re.sub(r"[^a-z0-9]+", "-", results["machine"]["gpu"].lower()).strip("-")
    whole = device.type == "cuda" and not (options.quick or options.filter)
    output = options.output or (ROOT / "results" / name if whole else None)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(f"{output.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        output.with_name(f"{output.name}.md").write_text(text)
    print(text)
    for verdict in results["verdicts"]:
        print(f"{_verdict(verdict['met']).strip('*'):13}{verdict['bar']}: {verdict['measured']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
