"""Peak resident memory of one forward + backward beyond the gradient, in multiples of the logits.

A loss may take scratch space outside PyTorch's allocator, so the operating system is asked, in a
fresh process per loss: its high-water mark VmHWM is reset, the loss runs once, and what the mark
has risen by, less the gradient's bytes, is the result. Linux only.

`python -m benchmarks.memory TASK NAME SIDE` is that process.
"""

import ctypes
import functools
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import peers
from .inputs import Inputs, Job

THREADS = 2
# A loss of nothing: its only new memory is the gradient, so its row shows the error of the method.
BASELINE = "nothing (error of the method)"


def workload(task: str, side: int) -> Inputs:
    """About 40 MB of float32 logits at side 512, on which the method errs by about 0.1 MB; with a Lovász loss 80 MB, with 1M
    pixels in a segment.

    Not below 32 MB: glibc keeps freed blocks smaller than that, and the mark would count them.
    """
    if task == "lovasz_hinge":
        return Inputs(task, (20, 2 * side, 2 * side))
    return Inputs(task, (1, 19, 2 * side, 2 * side) if task in ("lovasz_softmax", "compound") else (2, 19, side, side))


def _losses(task: str) -> dict:
    return {**peers.TASKS[task](), BASELINE: lambda logits, target: (logits * 0.0).sum()}


def _status(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1])


def child(task: str, name: str, side: int) -> float:
    """Extra peak over logits' bytes, measured in this process."""
    # A compiled loss needs its real shape to warm up.
    warm_side = side if "compile" in name else max(side // 8, 8)
    return extra_peak(_losses(task)[name], workload(task, warm_side).make, workload(task, side).make)


def extra_peak(loss: peers.Loss, make_small: Callable, make: Callable) -> float:
    """Peak beyond the gradient over logits' bytes, of `loss` on the inputs that `make` makes."""
    torch.set_num_threads(THREADS)
    # The first call maps code, starts threads and compiles; on small inputs: scratch that is kept for good counts below.
    logits, target = make_small()
    for _ in range(2):
        loss(logits, target).backward()
        logits.grad = None
    logits, target = make()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that the heap still holds would hide new ones

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = _status("VmRSS")
    loss(logits, target).backward()
    return (_status("VmHWM") - before - logits.grad.nbytes) / logits.nbytes


def measure(task: str, name: str, side: int) -> dict:
    """One row, from a child process; a child that dies is a row that says so."""
    row = {"workload": str(workload(task, side)), "contestant": name}
    command = [sys.executable, "-m", "benchmarks.memory", task, name, str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return row | {"status": f"fails: exit code {done.returncode}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def jobs(quick: bool) -> list[Job]:
    """Rows {"workload", "contestant", "status", "extra"} for every task and contestant."""
    side = 64 if quick else 512

    def job(task: str) -> list[dict]:
        return [measure(task, name, side) for name in list(_losses(task))[: 1 if quick else None]]

    return [(workload(task, side), functools.partial(job, task)) for task in peers.TASKS]


if __name__ == "__main__":
    try:
        result = {"status": "ok", "extra": child(sys.argv[1], sys.argv[2], int(sys.argv[3]))}
    except Exception as error:
        result = {"status": peers.problem(error)}
    print(json.dumps(result))
