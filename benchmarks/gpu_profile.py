"""`python -m benchmarks.gpu_profile`: the time of each kernel of ours, on a GPU, at the sizes of benchmarks.gpu."""

import functools
import re
import statistics
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import veerloss

from . import gpu_timing, report
from .inputs import Inputs
from .model import CITY, HINGE, WIDE
from .throughput import forward_backward
from .timing import Step

HISTOGRAM = functools.partial(veerloss.lovasz_softmax_loss, method="histogram")
LOSSES = {
    "softmax_focal": veerloss.softmax_focal_loss,
    "sigmoid_focal": functools.partial(veerloss.sigmoid_focal_loss, alpha=0.25),
    "sigmoid_focal_index": functools.partial(veerloss.sigmoid_focal_loss, alpha=0.25),
    "dice": veerloss.dice_loss,
    "lovasz_softmax": HISTOGRAM,
    "lovasz_hinge": functools.partial(veerloss.lovasz_hinge_loss, method="histogram"),
    "compound": functools.partial(veerloss.compound_loss, focal=1.0, lovasz=1.0, dice=1.0, method="histogram"),
}


def steps() -> Iterator[tuple[str, Step]]:
    for dtype in (torch.float32, torch.bfloat16):
        for task, loss in LOSSES.items():
            inputs = Inputs(task, HINGE if task == "lovasz_hinge" else CITY, dtype=dtype)
            logits, target = inputs.make(device="cuda")
            yield str(inputs), forward_backward(loss, logits, target)
            if task in ("softmax_focal", "dice", "lovasz_softmax", "compound"):
                low = F.interpolate(logits.detach(), scale_factor=0.25, mode="bilinear").requires_grad_()
                yield f"{inputs}, upsample", forward_backward(functools.partial(loss, upsample="bilinear"), low, target)
    for task in ("softmax_focal", "dice", "lovasz_softmax"):
        inputs = Inputs(task, WIDE)
        yield str(inputs), forward_backward(LOSSES[task], *inputs.make(device="cuda"))
    exact = Inputs("lovasz_softmax", CITY)
    yield (
        f"{exact} exact",
        forward_backward(functools.partial(veerloss.lovasz_softmax_loss, method="exact"), *exact.make(device="cuda")),
    )


def kernels(step: Step, flush: torch.Tensor, calls: int = 5) -> dict[str, list[float]]:
    """Microseconds by the name of a kernel, in order of its first launch; what writes `flush` is not told apart."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            flush.zero_()
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"\(.*", "", re.sub(r"veerloss::|\(anonymous namespace\)::|void ", "", event.name))
            found.setdefault(name[:120], []).append(event.time_range.elapsed_us())
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser("benchmarks.gpu_profile", __doc__)
    parser.add_argument("--once", action="store_true", help="each step once, between start and stop of a profiler")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU that torch can use", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    clock, flush = gpu_timing.cold_clock(device), torch.empty(gpu_timing.FLUSHED, dtype=torch.uint8, device=device)
    for name, step in steps():
        if options.filter not in name:
            continue
        step()
        torch.cuda.synchronize()
        if options.once:
            torch.cuda.profiler.start()
            step()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            continue
        print(f"{name}: {1e6 * statistics.median(clock(step) for _ in range(15)):.0f} us", flush=True)
        for kernel, us in kernels(step, flush).items():
            print(f"  {len(us) / 5:5.1f} x {statistics.median(us):8.1f} us  {kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
