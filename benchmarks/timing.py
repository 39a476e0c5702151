"""Interleaved timing: a round runs every contestant once, so drift and neighbours hit all alike."""

import math
import statistics
import time
from collections.abc import Callable

import torch

from .peers import problem

Step = Callable[[], object]


def wall(step: Step, min_seconds: float = 0.0) -> float:
    """Seconds of one call, the mean of as many as it takes to fill `min_seconds`."""
    _synchronize()
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < min_seconds:
        step()
        calls += 1
    _synchronize()
    return (time.perf_counter() - start) / calls


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(
    steps: dict[str, Step],
    *,
    min_rounds: int,
    budget: float = math.inf,
    deadline: float = math.inf,
    max_rounds: float = math.inf,
    seconds_each: float = math.inf,
    clock: Callable[[Step], float] = wall,
    warm_up: Callable[[str, Step], object] = lambda name, step: step(),
) -> dict[str, list | str]:
    """Seconds per call of each step, A B C A B C ..., or the reason why a step cannot run.

    After one `warm_up` of each: `min_rounds`, then more, up to `max_rounds`, within `budget` seconds and before `deadline`, by
    time.perf_counter(); a step that has run for `seconds_each` sits these out.
    """
    results: dict[str, list | str] = {}
    for name, step in steps.items():
        try:
            warm_up(name, step)
            results[name] = []
        except Exception as error:  # a peer that cannot take this input is a result, not a crash
            results[name] = problem(error)
    deadline, done = min(deadline, time.perf_counter() + budget), 0
    while done < min_rounds or (done < max_rounds and time.perf_counter() < deadline):
        for name, seconds in results.items():
            if isinstance(seconds, list) and (done < min_rounds or sum(seconds) < seconds_each):
                try:
                    seconds.append(clock(steps[name]))
                except Exception as error:
                    results[name] = problem(error)
        done += 1
    return results


def summary(seconds: list[float] | str) -> dict:
    """What a row says of a step: {"status"} and, where it ran, {"rounds", "median_ms", "p20_ms", "p80_ms"}."""
    if isinstance(seconds, str):
        return {"status": seconds}
    ms = [1e3 * s for s in seconds]
    p20, *_, p80 = statistics.quantiles(ms, n=5, method="inclusive")
    return {"status": "ok", "rounds": len(ms), "median_ms": statistics.median(ms), "p20_ms": p20, "p80_ms": p80}


def copy_step(nbytes: int, device: torch.device | str = "cpu") -> Step:
    """`copy_` between two buffers of `nbytes` that are already mapped: moves 2 * nbytes."""
    source = torch.ones(nbytes // 4, device=device)
    sink = torch.zeros_like(source)
    return lambda: sink.copy_(source)
