"""`python -m benchmarks.gpu`: forward + backward on a GPU against the peers; writes benchmarks/results/<gpu>.json and .md."""

import dataclasses
import functools
import gc
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from veerloss._arguments import missing_reason

from . import gpu_report, gpu_timing, model, peers, report, throughput, timing
from .gpu_report import CITY, FOCAL, SMALL, SORT
from .gpu_timing import NO_TIME
from .inputs import Inputs
from .model import HINGE, WIDE
from .peers import EXACT, HISTOGRAM, OURS

F32, BF16 = torch.float32, torch.bfloat16
TALL, DETECTION = (2, 19, 1024, 2048), (64, 91, 76725)
BINARY, SMALL_HINGE = (16, 1, 1024, 1024), (2, 64, 64)

COPIED = 1 << 30  # bytes of each buffer of COPY
SECONDS_EACH, MIN_ROUNDS, MAX_ROUNDS = 0.4, 3, 25  # time for the rounds of a contestant, and their number
SECONDS_SMALL = 0.02  # of calls that make one time of a small input


# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Case:
    """`compiled`: which peers run, those that are not under torch.compile (False), those that are (True)."""

    inputs: Inputs
    compiled: tuple[bool, ...]
    small: bool = False

    def __str__(self) -> str:
        return f"{self.inputs}{', compiled peers' if self.compiled == (True,) else ''}"


def cases(quick: bool) -> list[Case]:
    """What matters most comes first, for what comes last may find no time left. `quick`: tiny images, nothing compiled."""

    def case(task: str, shape: tuple[int, ...], dtype: torch.dtype = F32, compiled: tuple[bool, ...] = (False,)) -> Case:
        small = shape in (SMALL, SMALL_HINGE)
        if quick:
            shape, compiled = tuple(min(n, 8) for n in shape), (False,)
        return Case(Inputs(task, shape, dtype=dtype), compiled, small)

    first = [("lovasz_softmax", CITY), *((task, CITY) for task in FOCAL), ("sigmoid_focal", DETECTION), ("lovasz_hinge", HINGE)]
    small = [("lovasz_softmax", SMALL), ("lovasz_hinge", SMALL_HINGE), ("softmax_focal", SMALL), ("sigmoid_focal", SMALL)]
    wide = [("lovasz_softmax", WIDE), ("softmax_focal", WIDE), ("sigmoid_focal_index", WIDE)]
    regions = [(task, CITY) for task in gpu_report.REGION]
    tall = [("sigmoid_focal", BINARY), ("lovasz_softmax", TALL), ("softmax_focal", TALL)]
    order = (
        (first, F32), (regions, F32), (small, F32), (first, BF16), (regions, BF16), (wide, F32), (wide, BF16), (tall, F32),
        (tall, BF16),
    )  # fmt: skip
    found = [
        case(task, shape, dtype, (False, True) if task in FOCAL else (False,))
        for listed, dtype in order
        for task, shape in listed
    ]
    # The compiler unrolls the classes of a Lovász peer: minutes where they are many.
    late = [case("lovasz_hinge", HINGE, compiled=(True,)), case("lovasz_softmax", CITY, compiled=(True,))]
    return found if quick else found + late


def contestants(task: str, device: torch.device) -> dict[str, peers.Loss]:
    """Ours on each of the device's backends, then the peers, each as it is and, but for another loss, under torch.compile."""
    kind = {"softmax_focal": "softmax focal", "dice": "region", "dice_cross_entropy": "compound", "compound": "compound"}.get(
        task, "sigmoid focal" if task in FOCAL else "lovasz"
    )
    # The first is the one that backend="auto" takes.
    backends = ("native",) if device.type == "cpu" else ("native", "triton")

    def load(backend: str, loss: Callable) -> peers.Loss:
        reason = missing_reason(backend, device, kind)
        if reason is not None:
            raise peers.Missing(reason)
        return functools.partial(loss, backend=backend)

    found = {}
    for name, loss in peers.TASKS[task]().items():
        if name in (peers.ONE_BY_ONE, peers.LOVASZ_ALONE):
            found[name] = loss
        elif name.startswith(OURS):
            ours = ("native",) if name == HISTOGRAM or task in gpu_report.REGION else backends  # of which Triton has no kernels
            found |= {f"{name}, {b}": peers.Lazy(functools.partial(load, b, loss)) for b in ours}
        else:
            found[name] = loss
            if name != peers.CROSS_ENTROPY and "compile" not in name:
                found.setdefault(f"{name}, torch.compile", peers.compiled(loss))
    return found


# ------------------------------------------------------------------ measuring


@dataclass
class Run:
    """What the cases of one run share."""

    device: torch.device
    quick: bool
    deadline: float
    clock: Callable[[timing.Step], float] = timing.wall
    nvcc: subprocess.Popen | None = None
    gpu: model.Gpu | None = None

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()


def steps(case: Case, device: torch.device) -> tuple[dict[str, timing.Step], torch.Tensor, torch.Tensor]:
    """(steps of the losses, logits, target)"""
    logits, target = case.inputs.make(device=device)
    found = {
        name: throughput.forward_backward(loss, logits, target)
        for name, loss in contestants(case.inputs.task, device).items()
        if name.startswith(OURS) or ("compile" in name) in case.compiled
    }
    return found, logits, target


def measure(case: Case, run: Run) -> list[dict]:
    """A row for each contestant, for the sort and for the copy."""
    inputs, clock, extra = case.inputs, run.clock, {}
    timed, logits, target = steps(case, run.device)
    losses, copied = set(timed), 1 << 20 if run.quick else COPIED
    if case.small:
        clock, copied = functools.partial(timing.wall, min_seconds=0.0 if run.quick else SECONDS_SMALL), 0
    elif inputs.task in gpu_report.LOVASZ:
        sort = functools.cache(lambda: gpu_timing.sort_step(run.nvcc, logits.numel(), run.device))
        timed[SORT] = lambda: sort()()

    def warm_up(name: str, step: timing.Step) -> None:
        with gpu_timing.at_most(run.left):
            step()  # compiles
        if run.device.type == "cuda" and name in losses and not case.small:
            extra[name] = gpu_timing.extra_bytes(step)

    rounds = {"min_rounds": 2, "max_rounds": 2} if run.quick else {"min_rounds": MIN_ROUNDS, "max_rounds": MAX_ROUNDS}
    rounds |= {"deadline": run.deadline, "seconds_each": SECONDS_EACH, "clock": clock, "warm_up": warm_up}
    moved = throughput.floor_bytes(logits, target)
    rows, copy = throughput.measure(inputs, timed, moved=moved, copied=copied, device=run.device, **rounds)
    dtype = str(inputs.dtype).removeprefix("torch.")
    common = {"workload": str(case), "task": inputs.task, "shape": list(inputs.shape), "dtype": dtype, "small": case.small}
    for row in rows:
        row |= common
        if "floor_share" in row:
            row["gb_s"] = row["floor_share"] * row["copy_gb_s"]
            if run.gpu:
                row |= model.beside(row, dataclasses.replace(run.gpu, gb_s=row["copy_gb_s"]))
        if row["contestant"] in extra:
            nbytes = extra[row["contestant"]]
            row |= {"extra_mb": nbytes / 1e6, "extra_ratio": nbytes / logits.nbytes}
    for family in (HISTOGRAM, EXACT) if inputs.task in gpu_report.LOVASZ else (OURS,):
        auto = next((row for row in rows if row["contestant"].startswith(family) and row["status"] == "ok"), None)
        if auto:
            auto["auto"] = family
            throughput.add_ratios(rows, auto, f"over {family}")
    return [*rows, copy | common] if copied else rows


def run_all(run: Run, only: str = "") -> tuple[list[dict], list[str]]:
    """(rows, what was left out and why)"""
    rows, left_out, small = [], [], []
    for case in cases(run.quick):
        if only not in str(case):
            continue
        if run.left <= 0:
            left_out.append(f"{case}: {NO_TIME}")
            continue
        report.log(str(case))
        try:
            found = measure(case, run)
            rows += found
            small += [(case, found)] if case.small else []
        except Exception as error:
            left_out.append(f"{case}: {peers.problem(error)}")
            report.log(f"{case}: {error}")
        torch.compiler.reset()  # the compiled code of one shape is of no use to the next
        gc.collect()
        torch.cuda.empty_cache()
    for case, found in small if run.device.type == "cuda" else ():  # last: a profiler slows what comes after it
        try:
            add_kernels(case, run, found)
        except Exception as error:
            left_out.append(f"kernels of {case}: {peers.problem(error)}")
    return rows, left_out


def add_kernels(case: Case, run: Run, rows: list[dict]) -> None:
    timed, *_ = steps(case, run.device)
    for row in rows:
        if row["status"] == "ok" and "compile" not in row["contestant"]:  # its code is gone
            row |= gpu_timing.kernels(timed[row["contestant"]])


def main(arguments: list[str] | None = None) -> int:
    """The exit status is 0 whatever the numbers say."""
    parser = report.parser("benchmarks.gpu", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, nothing compiled: does everything run?")
    parser.add_argument("--device", default="cuda", help="cpu runs the same code, to test it")
    parser.add_argument("--seconds", type=float, default=240.0, help="for the whole run; what does not fit is left out")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --device cpu --quick tests the code without one", file=sys.stderr)
        return 1
    start = time.perf_counter()
    results = {"machine": report.machine("benchmarks.gpu", arguments, device)}
    run = Run(device, options.quick, start + options.seconds, nvcc=gpu_timing.compile_sort(device))
    if device.type == "cuda":
        run.clock, run.gpu = gpu_timing.cold_clock(device), gpu_timing.gpu_of(device)
        results["gpu"] = dataclasses.asdict(run.gpu)
    results["rows"], results["left_out"] = run_all(run, options.filter)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = gpu_report.bars(results["rows"])
    output = options.output
    if output is None and device.type == "cuda" and not (options.quick or options.filter):
        name = re.sub(r"[^a-z0-9]+", "-", results["machine"]["gpu"].lower()).strip("-")
        output = Path(__file__).parent / "results" / name
    report.save(results, gpu_report.markdown(results), output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
