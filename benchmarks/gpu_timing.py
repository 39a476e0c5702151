"""What `python -m benchmarks.gpu` asks of a GPU: the time of a step by its own clock, memory, kernels, a bare sort."""

import contextlib
import ctypes
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .model import Gpu
from .peers import Missing
from .timing import Step

NO_TIME = "no time left"
FLUSHED = 256 << 20  # bytes written before each step; several times the cache of any GPU
HEAD_START = 6_000_000  # cycles, about three milliseconds, for the host to issue a step in
PROFILED = 5  # calls
SORT_SOURCE = Path(__file__).with_name("sort.cu")
SORT_LIBRARY = SORT_SOURCE.parents[1] / "build" / "sort.so"


def cold_clock(device: torch.device) -> Callable[[Step], float]:
    """Seconds of a step between two events, its data out of the cache, the GPU kept busy until the host has issued it."""
    buffer = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def clock(step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def gpu_of(device: torch.device) -> Gpu:
    """The GPU as the model sees it; its clock from the time of so many cycles, at the best of some."""
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(HEAD_START)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return Gpu(torch.cuda.get_device_properties(device).multi_processor_count, 1e-6 * HEAD_START / min(times))


def extra_bytes(step: Step) -> int:
    """The most bytes that a step holds at one time, beyond those before it: the gradient of an earlier step is among these."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(step: Step) -> dict:
    """{"kernels", "gpu_ms"}: kernels and copies of a step, and their time; {} where the profiler sees none."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    gpu_ms = 1e-3 * sum(event.time_range.elapsed_us() for event in events) / PROFILED
    return {"kernels": len(events) / PROFILED, "gpu_ms": gpu_ms} if events else {}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Missing in what runs for longer, such as a compilation; in the main thread only."""

    def stop(*_) -> None:
        raise Missing(NO_TIME)

    deadline = time.perf_counter() + seconds
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    except Exception as error:
        if time.perf_counter() < deadline:
            raise
        raise Missing(NO_TIME) from error  # the compiler wraps the alarm in an error of its own
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_sort(device: torch.device) -> subprocess.Popen | None:
    """nvcc at work on sort.cu, beside everything else that happens at the start."""
    if device.type != "cuda" or shutil.which("nvcc") is None:
        return None
    SORT_LIBRARY.parent.mkdir(exist_ok=True)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    flags = ["-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC"]
    return subprocess.Popen(["nvcc", *flags, "-o", str(SORT_LIBRARY), str(SORT_SOURCE)])


def sort_step(nvcc: subprocess.Popen | None, count: int, device: torch.device) -> Step:
    """Sorts `count` pairs."""
    if nvcc is None or nvcc.wait():
        raise Missing("nvcc fails" if nvcc else "no GPU or no nvcc")
    sort_pairs, pointer = ctypes.CDLL(str(SORT_LIBRARY)).sort_pairs, ctypes.c_void_p
    sort_pairs.argtypes = [pointer, ctypes.POINTER(ctypes.c_size_t), *[pointer] * 4, ctypes.c_int64, pointer]
    keys = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=device)
    values = torch.arange(count, dtype=torch.int32, device=device)
    tensors = [keys, torch.empty_like(keys), values, torch.empty_like(values)]
    size = ctypes.c_size_t(0)

    def sort(temporary: int | None) -> None:
        pointers = (t.data_ptr() for t in tensors[:4])
        error = sort_pairs(temporary, ctypes.byref(size), *pointers, count, torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"CUDA error {error}")

    sort(None)
    tensors.append(torch.empty(size.value, dtype=torch.uint8, device=device))
    return lambda: sort(tensors[4].data_ptr())
