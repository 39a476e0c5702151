"""Interleaved timing: a round runs every contestant once, so drift and neighbours hit all alike."""

import statistics
import time
from collections.abc import Callable

import torch

from .peers import problem

Step = Callable[[], object]


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and spread in milliseconds: {"median", "p20", "p80"}."""
    ms = sorted(1e3 * s for s in seconds)
    p20, *_, p80 = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 2
    return {"median": statistics.median(ms), "p20": p20, "p80": p80}


def interleave(steps: dict[str, Step], *, least: int, budget: float) -> dict[str, list | str]:
    """Seconds per call of each step, A B C A B C ..., or the reason why a step cannot run.

    After one call of each to warm up: `least` rounds, then more while they fit in `budget` seconds.
    """
    results: dict[str, list | str] = {}
    for name, step in steps.items():
        try:
            step()
            results[name] = []
        except Exception as error:  # a peer that cannot take this input is a result, not a crash
            results[name] = problem(error)
    running = [name for name in steps if results[name] == []]
    start = time.perf_counter()
    done = 0
    while done < least or time.perf_counter() - start < budget:
        for name in running:
            results[name].append(_clock(steps[name]))
        done += 1
    return results


def _clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def copy_step(nbytes: int) -> Step:
    """`copy_` between two buffers of `nbytes` that are already mapped: moves 2 * nbytes."""
    source = torch.ones(nbytes // 4)
    sink = torch.zeros_like(source)
    return lambda: sink.copy_(source)
