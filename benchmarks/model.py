"""What forward + backward should take on a GPU, from counts of what its kernels do: docs/performance-model.md has the tables.

`python -m benchmarks.gpu` prints it beside what was measured, so that a run tells at once where the counts miss something.
tests/test_counts.py counts the instructions again, tests/test_emulator.py the bytes.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from veerloss._layout import COARSE_BINS, SAMPLE_RUN, SAMPLE_STEP, TABLE, bin_count

from . import report
from .peers import EXACT, HISTOGRAM, OURS

SORT = "one CUB radix sort, 32-bit keys and values"

# ------------------------------------------------------------------ assumed, for no GPU has run the kernels yet

ISSUED = 0.7  # of the instructions that could issue; 0.6 to 0.75 are usual
LAUNCH_US = 2.0  # from the end of a kernel to where the next one is in full swing
CHAIN_CYCLES = 5.0  # of an instruction of a thread alone: 4 of an addition, 8 of one in float64

# ------------------------------------------------------------------ counted

DTYPES = ("float32", "bfloat16")
#: Instructions for each element in machine code for sm_90, by type of the logits: the longest way through an iteration of the
#: loop over pixels. Those of the sorts are from csrc/cuda/lovasz/exact.cu; tests/test_counts.py counts the others. After a
#: change `python -m benchmarks.model` brings the document up to date.
INSTRUCTIONS = {
    "sigmoid focal forward": (55.3, 46.0),
    "sigmoid focal backward": (60.4, 50.8),
    "sigmoid focal forward, labels": (37.2, 29.1),
    "sigmoid focal backward, labels": (41.9, 33.5),
    "sigmoid focal forward, labels in rows": (51.8, 44.8),
    "sigmoid focal backward, labels in rows": (57.6, 50.9),
    "softmax focal forward": (24.5, 25.6),
    "softmax focal backward": (34.4, 37.1),
    "softmax focal forward, classes in rows": (32.8, None),
    "softmax focal backward, classes in rows": (47.4, None),
    # Of low resolution. Backward, all that any thread of a tile of 12 x 32 pixels does, once: two of its twelve warps have the
    # sums of rows and columns, two thirds of it, which for each logit is some 12 of all.
    "softmax focal forward, low": (35.9, 40.3),
    "softmax focal backward, low": (112.6, 117.0),
    "sigmoid focal forward, labels, low": (70.1, 67.1),
    "sigmoid focal backward, labels, low": (186.5, 184.1),
    "region forward, low": (34.7, 39.1),
    "histogram count, low": (47.9, 52.2),
    "compound count, low": (52.4, 56.6),
    "softmax focal forward, shared": (41.2, 42.0),
    "softmax focal backward, shared": (47.8, 50.4),
    "region forward": (21.6, 22.7),
    "region backward": (26.5, 28.3),
    "region forward, classes in rows": (28.8, None),
    "region backward, classes in rows": (40.6, None),
    "region forward, many classes": (32.8, 33.9),
    "region backward, many classes": (59.7, 62.3),
    "region forward, sigmoid": (133, 130),
    "region backward, sigmoid": (114, 111),
    "region forward, sigmoid, dense": (95, 92),
    "region backward, sigmoid, dense": (93, 89),
    "histogram count": (34.6, 35.7),
    "histogram count, classes in rows": (41.4, None),
    "histogram count, softmax stored": (32.0, None),
    "histogram backward": (35.7, 38.1),
    "histogram backward, classes in rows": (53.7, None),
    "compound count": (38.7, 39.9),
    "compound backward": (40.8, 43.1),
    "histogram count, hinge": (110, 111),
    "histogram sum, hinge": (102, 103),
    "histogram backward, hinge": (102, 104),
    "histogram statistics, many classes": (29.0, None),
    "histogram backward, many classes": (85.3, None),
    "exact backward, many classes": (72.7, None),
    "exact keys": (69.3, 70.4),
    "exact keys, hinge": (31.5, 34.8),
    "exact digits": (28.2, 28.2),
    "exact sort, first digit": (115, 115),
    "exact sort": (91, 91),
    "exact weigh": (170, 170),
    "exact backward": (50.2, 52.7),
    "exact backward, hinge": (25.0, 25.0),
    "radix sort, a digit": (104, 104),
}
#: Instructions, one after another, of a thread in the kernels over bins of method "histogram": to place them, by one block for
#: each segment; for each bin to find out whether others are needed, by such a block, and how many it takes at a time; and to
#: weigh a bin.
PLACE, CHECK, CHECKED, WEIGH = 4400, 820, 512, 1062
#: Of random elements (inputs.py): those that are sorted, for their error is not below the least of foreground.
SORTED = {"lovasz_softmax": 0.07, "lovasz_hinge": 0.84}


@dataclass(frozen=True)
class Kernel:
    counted: str  # in INSTRUCTIONS
    logits: float = 0.0  # how often their bytes are read or written
    target: float = 0.0
    each: float = 0.0  # bytes of each element beside these
    share: float = 1.0  # of the elements, where it is not for all
    fewer: float = 0.0  # instructions of an element that most warps do not have, on average
    tables: float = 0.0  # bytes that a block, one on each multiprocessor, loads before its pixels or adds up after them


@dataclass(frozen=True)
class Step:
    """A forward + backward pass. `chain`: instructions, one after another, of kernels with a block for each segment."""

    kernels: tuple[Kernel, ...]
    launches: int
    chain: float = 0.0


def focal(name: str, kind: str = "", fewer: float = 0.0) -> Step:
    forward, backward = Kernel(f"{name} forward{kind}", 1, 1, fewer=fewer), Kernel(f"{name} backward{kind}", 2, 1, fewer=fewer)
    return Step((forward, backward), launches=4)


def histogram(classes: int, hinge: bool) -> Step:
    kind, bins = ", hinge" if hinge else "", bin_count(classes)
    tables = 8.0 * TABLE * classes
    count = Kernel(f"histogram count{kind}", 1, 1, tables=tables + 8.0 * bins * classes)  # counts are read and written
    sample = replace(count, share=SAMPLE_RUN / SAMPLE_STEP, tables=tables + 8.0 * COARSE_BINS * classes)
    backward = Kernel(f"histogram backward{kind}", 2, 1, tables=tables + 4.0 * bins * classes)
    sums = (Kernel(f"histogram sum{kind}", 1, 1),) if hinge else ()
    return Step((sample, count, *sums, backward), 35 if hinge else 10, PLACE + CHECK * math.ceil(bins / CHECKED) + WEIGH)


def compound(classes: int) -> Step:
    """Focal, Lovász and Dice. The region loss sums in a pass of its own; 25 launches put numbers of segments together."""
    step = histogram(classes, hinge=False)
    sample, _, _ = step.kernels
    _, count, backward = (replace(k, counted=k.counted.replace("histogram", "compound")) for k in step.kernels)
    return replace(step, kernels=(sample, count, Kernel("region forward", 1, 1), backward), launches=step.launches + 27)


def histogram_of_many(classes: int) -> Step:
    """Blocks of groups of 19 classes read the softmax of a pixel, 8 bytes, and its target."""
    groups, of_softmax = classes / 19, 8.0 / classes
    statistics = Kernel("histogram statistics, many classes", 1, each=of_softmax)
    count = Kernel(
        "histogram count, softmax stored", 1, groups, each=groups * of_softmax, tables=19 * 8.0 * (TABLE + bin_count(19))
    )
    backward = Kernel("histogram backward, many classes", 2, 1)
    sample = (replace(kernel, share=SAMPLE_RUN / SAMPLE_STEP) for kernel in (statistics, count))
    return Step((*sample, statistics, count, backward), 13, PLACE + CHECK * math.ceil(bin_count(classes) / CHECKED) + WEIGH)


def exact(task: str, elements: int) -> Step:
    kind, share = ", hinge" if task == "lovasz_hinge" else "", SORTED[task]
    sort = Kernel("exact sort", each=16, share=share)
    kernels = (
        Kernel(f"exact keys{kind}", 1, 1, each=4),
        Kernel("exact digits", each=4),
        Kernel("exact sort, first digit", each=4 + 8 * share + 4 * (1 - share)),
        sort,
        sort,
        Kernel("exact weigh", each=12, share=share),
        Kernel(f"exact backward{kind}", 2, each=4),
    )
    groups = max(1, round(18 * elements / (320 << 20)))  # of segments
    return Step(kernels, 6 + 6 * groups)


#: Of eight warps that share 150 classes, one has the targets: some 270 instructions of its 19 classes.
FOCAL_SHARED = focal("softmax focal", ", shared", fewer=270 / 19 * 7 / 8)
#: As many pairs as elements.
RADIX_SORT = Step((Kernel("radix sort, a digit", each=17),) * 4, launches=6)


def find(task: str, contestant: str, shape: tuple[int, ...]) -> Step | None:
    """None: not counted."""
    hinge = task == "lovasz_hinge"
    classes = 1 if hinge else shape[1]
    counted = hinge or 17 <= classes <= 20  # the range of classes that the kernels were counted for
    if contestant == SORT:
        return RADIX_SORT
    if task == "sigmoid_focal" and contestant == f"{OURS}, native":
        return focal("sigmoid focal")
    if task == "sigmoid_focal_index" and contestant == f"{OURS}, native":
        return focal("sigmoid focal", ", labels") if classes >= 17 else None
    if task == "softmax_focal" and contestant == f"{OURS}, native":
        return focal("softmax focal") if counted else FOCAL_SHARED if 136 < classes <= 160 else None
    if task == "dice" and contestant == f"{OURS}, native" and (counted or 136 < classes <= 160):
        kind = "" if counted else ", many classes"
        return Step((Kernel(f"region forward{kind}", 1, 1), Kernel(f"region backward{kind}", 2, 1)), launches=4)
    if task == "compound" and contestant == f"{OURS}, native" and counted:
        return compound(classes)
    if contestant == f"{HISTOGRAM}, native":
        return histogram(classes, hinge) if counted else histogram_of_many(classes) if 136 < classes <= 160 else None
    if contestant == f"{EXACT}, native" and counted:
        return exact(task, math.prod(shape))
    return None


# ------------------------------------------------------------------ time


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    ghz: float
    gb_s: float = 0.0  # of a copy, read and written
    issued: float = ISSUED


#: 80 GB, SXM: 0.9 of the bandwidth that NVIDIA names; the clock of an H100 is what it keeps up.
GPUS = {"H100": Gpu(132, 1.75, 3000.0), "A100": Gpu(108, 1.41, 1830.0)}


def bytes_of(task: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Of logits and target, as inputs.py makes them."""
    logits = math.prod(shape) * (4 if dtype == "float32" else 2)
    pixels = math.prod(shape) if task == "lovasz_hinge" else math.prod(shape) // shape[1]
    return logits, logits if task == "sigmoid_focal" else 8 * pixels


def floor_us(task: str, shape: tuple[int, ...], dtype: str, gpu: Gpu) -> float:
    """As throughput.floor_bytes."""
    logits, target = bytes_of(task, shape, dtype)
    return 1e-3 * (3 * logits + 2 * target) / gpu.gb_s


def spent(task: str, contestant: str, shape: tuple[int, ...], dtype: str, gpu: Gpu) -> dict[str, float]:
    """Microseconds by what bounds the kernels: each takes as long as its memory, or its instructions; and small steps. {} of
    what is not counted."""
    step = find(task, contestant, shape)
    counts = [INSTRUCTIONS[k.counted][DTYPES.index(dtype)] for k in step.kernels] if step and dtype in DTYPES else [None]
    if None in counts:
        return {}
    elements, (logits, target) = math.prod(shape), bytes_of(task, shape, dtype)
    instructions_a_us = gpu.issued * 4 * 32 * 1e3 * gpu.ghz * gpu.multiprocessors  # four warps issue in a cycle
    found = {"memory": 0.0, "instructions": 0.0}
    found["small steps"] = LAUNCH_US * step.launches + 1e-3 * CHAIN_CYCLES / gpu.ghz * step.chain
    for k, instructions in zip(step.kernels, counts, strict=True):
        memory = 1e-3 * k.share * (k.logits * logits + k.target * target + k.each * elements) / gpu.gb_s
        issue = k.share * elements * (instructions - k.fewer) / instructions_a_us
        found["memory" if memory >= issue else "instructions"] += max(memory, issue)
        found["small steps"] += 1e-3 * gpu.multiprocessors * k.tables / gpu.gb_s
    return found


def beside(row: dict, gpu: Gpu) -> dict:
    """What a row of gpu.py gets beside its measurement; {} of what is not counted."""
    us = spent(row["task"], row["contestant"], tuple(row["shape"]), row["dtype"], gpu)
    if not us:
        return {}
    total = sum(us.values())
    return {"predicted_us": total, "over_predicted": 1e3 * row["median_ms"] / total, "bound": max(us, key=us.get)}


# ------------------------------------------------------------------ the table of docs/performance-model.md

DOCUMENT = Path(__file__).parents[1] / "docs/performance-model.md"
CITY, WIDE, HINGE = (8, 19, 512, 1024), (4, 150, 512, 512), (16, 1024, 1024)
LISTED = [
    ("sigmoid_focal", f"{OURS}, native", CITY),
    ("sigmoid_focal_index", f"{OURS}, native", CITY),
    ("softmax_focal", f"{OURS}, native", CITY),
    ("softmax_focal", f"{OURS}, native", WIDE),
    ("dice", f"{OURS}, native", CITY),
    ("dice", f"{OURS}, native", WIDE),
    ("lovasz_softmax", f"{HISTOGRAM}, native", CITY),
    ("lovasz_softmax", f"{HISTOGRAM}, native", WIDE),
    ("compound", f"{OURS}, native", CITY),
    ("lovasz_hinge", f"{HISTOGRAM}, native", HINGE),
    ("lovasz_softmax", f"{EXACT}, native", CITY),
    ("lovasz_hinge", f"{EXACT}, native", HINGE),
]


def predicted_us(task: str, contestant: str, shape: tuple[int, ...], dtype: str, gpu: Gpu) -> float:
    return sum(spent(task, contestant, shape, dtype, gpu).values())


def table() -> list[str]:
    rows = []
    for (task, contestant, shape), dtype, (name, gpu) in itertools.product(LISTED, DTYPES, GPUS.items()):
        us, floor = spent(task, contestant, shape, dtype, gpu), floor_us(task, shape, dtype, gpu)
        if not us:
            continue
        least, most = (
            predicted_us(task, contestant, shape, dtype, replace(gpu, issued=issued)) for issued in (1.0, gpu.issued)
        )
        cells = [f"{task} {list(shape)} {dtype}", contestant.removesuffix(", native"), name]
        cells += [f"{t:.0f}" for t in (*us.values(), most, floor)] + [f"{floor / most:.0%} ({floor / least:.0%})"]
        if contestant.startswith(EXACT):
            cells.append(f"{most / predicted_us(task, SORT, shape, dtype, gpu):.2f}x")
        rows.append(cells)
    header = ("memory", "instructions", "small steps", "us", "floor, us", "of the floor (if all issue)", "over one sort")
    return report.table(("inputs", "loss", "GPU", *header), rows)


def with_table(text: str) -> str:
    """The document, its table as it is now."""
    return re.sub(r"^\| inputs \| loss \|.*?\n\n", lambda _: "\n".join([*table(), ""]), text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
