"""`python -m benchmarks.compare COMMIT`: this tree against a commit, both built beside the installed torch, in turns.

Two builds of the same operators cannot share a process, so a round is a process of either, in which its losses are timed for a
while. Medians over the rounds, and their ratio, one line for each input.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import peers, report, throughput, timing
from .inputs import Inputs

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def time_ours(quick: bool) -> dict[str, float]:
    """Median milliseconds of each of ours, by input and name, in this process."""
    found = {}
    for inputs in workloads(quick):
        logits, target = inputs.make()
        steps = {
            f"{inputs}: {name}": throughput.forward_backward(loss, logits, target)
            for name, loss in losses_of(inputs.task).items()
            if name in (peers.OURS, peers.HISTOGRAM, peers.EXACT)
        }
        times = timing.interleave(steps, min_rounds=3, budget=0.0 if quick else 0.5)
        found |= {name: timing.summary(seconds).get("median_ms") for name, seconds in times.items()}
    return found


def losses_of(task: str) -> dict[str, peers.Loss]:
    try:
        return peers.TASKS[task]()
    except AttributeError:  # the commit has no such loss
        return {}


def workloads(quick: bool) -> list[Inputs]:
    return [inputs for inputs in throughput.workloads(quick) if inputs.plain]


def build(commit: str, tree: Path) -> None:
    """A worktree of the commit, with its CPU library."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, env=os.environ | {"VEERLOSS_CUDA": "0"}, capture_output=True)


def one_round(tree: Path, quick: bool) -> dict[str, float]:
    """The losses of a tree by the benchmark of this one."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import veerloss; sys.path[0] = sys.argv[2]; "
        "from benchmarks import compare; print(json.dumps(compare.time_ours(sys.argv[3] == '1')))"
    )
    command = [sys.executable, "-c", code, str(tree), str(ROOT), "1" if quick else "0"]
    done = subprocess.run(command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round: does it run?")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        report.log(f"building {options.commit}")
        build(options.commit, base)
        try:
            times: dict[str, dict[str, list[float]]] = {"base": {}, "here": {}}
            for k in range(1 if options.quick else ROUNDS):
                for side, tree in (("base", base), ("here", ROOT)):
                    report.log(f"round {k + 1}: {side}")
                    for name, ms in one_round(tree, options.quick).items():
                        times[side].setdefault(name, []).append(ms)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=ROOT, check=True)
    rows = []
    for name, here in times["here"].items():
        if name in times["base"]:
            now, before = statistics.median(here), statistics.median(times["base"][name])
            rows.append([name, f"{before:.2f}", f"{now:.2f}", f"{now / before:.2f}x"])
    print("\n".join(report.table(("input: ours", f"{options.commit}, ms", "here, ms", "here / base"), rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
