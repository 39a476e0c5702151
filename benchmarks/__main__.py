"""`python -m benchmarks`: measure everything and write benchmarks/results/cpu.{json,md} and cpu-scaling.png."""

import argparse
import json
import shlex
import sys
import time
import warnings
from pathlib import Path

import torch

from . import accuracy, memory, report, scaling, throughput

PARTS = {"throughput": throughput.run, "scaling": scaling.run, "accuracy": accuracy.run, "memory": memory.run}
RESULTS = Path(__file__).parent / "results" / "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts; the exit status is 0 whatever the numbers say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny inputs: does everything run?")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--filter", default="", help="only inputs whose name contains this text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output",
        type=Path,
        help="path without suffix for .json and .md; a partial run writes nothing without it",
    )
    options = parser.parse_args(arguments)
    partial = options.quick or options.only or options.filter
    output = options.output or (None if partial else RESULTS)

    torch.set_num_threads(options.threads)
    memory.THREADS = options.threads
    warnings.filterwarnings("ignore", module=r"(kornia|timm|torchvision|torch)\b")
    command = shlex.join(["python", "-m", "benchmarks", *(arguments or sys.argv[1:])])
    start = time.perf_counter()
    results: dict = {"machine": report.machine(command, 0.0)}
    for name, part in PARTS.items():
        if options.only in (None, name):
            results[name] = part(quick=options.quick, only=options.filter, log=_log)
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = [] if options.quick else report.bars(results)
    text = report.markdown(results)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
        if results.get("scaling"):
            scaling.plot(results["scaling"], output.with_name(f"{output.name}-scaling.png"))
    print(text)
    return 0


def _log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
