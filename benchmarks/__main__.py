"""`python -m benchmarks`: measure everything and write benchmarks/results/cpu.{json,md} and cpu-scaling.png."""

import gc
import sys
import time
from pathlib import Path

import torch

from . import accuracy, memory, report, scaling, step, throughput

PARTS = {"throughput": throughput, "step": step, "scaling": scaling, "accuracy": accuracy, "memory": memory}
RESULTS = Path(__file__).parent / "results" / "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts; the exit status is 0 whatever the numbers say."""
    parser = report.parser("benchmarks", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny inputs: does everything run?")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--budget", type=float, help="seconds of the rounds that are timed, beside the least number of them")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    partial = options.quick or options.only or options.filter
    output = options.output or (None if partial else RESULTS)

    torch.set_num_threads(options.threads)
    memory.THREADS = options.threads
    throughput.BUDGET = options.budget
    start = time.perf_counter()
    results: dict = {"machine": report.machine("benchmarks", arguments)}
    for name, part in PARTS.items():
        if options.only not in (None, name):
            continue
        results[name] = []
        for inputs, job in part.jobs(options.quick):
            if options.filter in str(inputs):
                report.log(f"{name}: {inputs}")
                results[name] += job()
                torch.compiler.reset()  # one shape's compiled code is of no use to the next one
                gc.collect()
    results["machine"]["seconds"] = round(time.perf_counter() - start)
    results["bars"] = [] if options.quick else report.bars(results)
    report.save(results, report.markdown(results), output)
    if output and results.get("scaling"):
        scaling.plot(results["scaling"], output.with_name(f"{output.name}-scaling.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
