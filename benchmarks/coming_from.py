"""`python -m benchmarks.coming_from`: each peer's losses and ours under their names, in the shapes that its users have.

Time and memory, into benchmarks/results/coming-from.{json,md}. Needs the extra `peers`.

`python -m benchmarks.coming_from --child CASE SIDE` is the process whose memory is measured; SIDE is "theirs" or "ours".
"""

import functools
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import veerloss

from . import memory, peers, report, timing
from .throughput import forward_backward

RESULTS = Path(__file__).parent / "results" / "coming-from"
SIDES = ("theirs", "ours")


# ------------------------------------------------------------------ inputs


def labels(shape: tuple[int, ...], classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))


def images(small: bool) -> tuple[Tensor, Tensor]:
    side = 64 if small else 512
    return torch.randn(2, 19, side, side), labels((2, side, side), 19)


def points(small: bool) -> tuple[Tensor, Tensor]:
    count = 2_000 if small else 200_000
    return torch.randn(count, 20), labels((count,), 20)


def voxels(small: bool, valid: float = 0.02, grid: tuple[int, ...] = (256, 256, 32)) -> tuple[Tensor, Tensor]:
    """Of which 2% are valid."""
    shape = (1, 16, 16, 32) if small else (1, *grid)
    target = labels(shape, 20)
    target[torch.rand(shape, generator=torch.Generator().manual_seed(2)) >= valid] = 255
    return torch.randn(1, 20, *shape[1:]), target


def detection(small: bool) -> tuple[Tensor, Tensor]:
    """Class indices, of which 91 is background, as almost all are."""
    queries = 1_000 if small else 76_725
    target = labels((8, queries), 91)
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) > 0.01] = 91
    return torch.randn(8, queries, 91), target


def detection_one_hot(small: bool) -> tuple[Tensor, Tensor]:
    logits, target = detection(small)
    return logits, F.one_hot(target, 92)[..., :91].float()


def made(make: Callable, small: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits, target = make(small)
    return logits.requires_grad_(), target


# ------------------------------------------------------------------ losses


def berman(probas: Tensor, labels: Tensor, ignore: int | None = None) -> Tensor:
    """Of the classes present, as in the copies of the file: what is ignored is dropped first."""
    classes = probas.size(1)
    probas, labels = probas.movedim(1, -1).reshape(-1, classes), labels.reshape(-1)
    if ignore is not None:
        probas, labels = probas[labels != ignore], labels[labels != ignore]
    foregrounds = ((labels == c).float() for c in range(classes))
    losses = [peers.lovasz_extension((fg - probas[:, c]).abs(), fg) for c, fg in enumerate(foregrounds) if fg.any()]
    return torch.stack(losses).mean()


def through_one_hot(loss: Callable[[Tensor, Tensor], Tensor]) -> peers.Loss:
    """What a user of class indices does for a loss of dense targets."""
    return lambda x, t: loss(x, F.one_hot(t, x.size(-1) + 1)[..., :-1].to(x.dtype))


def of_probabilities(loss: Callable[[Tensor, Tensor], Tensor]) -> peers.Loss:
    return lambda x, t: loss(x.softmax(1), t)


def with_channel(loss: Callable[[Tensor, Tensor], Tensor]) -> peers.Loss:
    return lambda x, t: loss(x, t[:, None])


@dataclass(frozen=True)
class Case:
    """`build(module)` is the loss, from the peer's module or from ours of the same names."""

    peer: str
    what: str
    inputs: Callable
    module: str | SimpleNamespace
    build: Callable[..., peers.Loss]
    theirs: Callable[..., peers.Loss] | None = None  # if the peer is called in another way

    @property
    def name(self) -> str:
        return f"{self.peer} {self.what} {self.inputs.__name__}"

    def loss(self, side: str) -> peers.Loss:
        if side == "ours":
            return self.build(importlib.import_module(f"veerloss.compat.{self.peer}"))
        module = importlib.import_module(self.module) if isinstance(self.module, str) else self.module
        return (self.theirs or self.build)(module)


BERMAN = SimpleNamespace(lovasz_softmax=berman)
SMP, KORNIA, MONAI = "segmentation_models_pytorch.losses", "kornia.losses", "monai.losses"


def _lovasz(module) -> peers.Loss:
    return lambda x, t: module.lovasz_softmax(x.softmax(1), t, ignore=255)


CASES = [
    *(Case("lovasz_losses", "lovasz_softmax", inputs, BERMAN, _lovasz) for inputs in (images, points, voxels)),
    Case("segmentation_models_pytorch", "LovaszLoss", images, SMP, lambda m: m.LovaszLoss("multiclass")),
    Case("segmentation_models_pytorch", "FocalLoss", images, SMP, lambda m: m.FocalLoss("multiclass", alpha=0.25)),
    Case("kornia", "lovasz_softmax_loss", images, KORNIA, lambda m: m.lovasz_softmax_loss),
    Case("kornia", "focal_loss", images, KORNIA, lambda m: functools.partial(m.focal_loss, alpha=0.5, reduction="mean")),
    Case(
        "monai", "FocalLoss, softmax", images, MONAI,
        lambda m: with_channel(m.FocalLoss(to_onehot_y=True, use_softmax=True)),
    ),
    Case("pytorch_toolbelt", "LovaszLoss", images, "pytorch_toolbelt.losses", lambda m: of_probabilities(m.LovaszLoss())),
    Case(
        "torchvision", "sigmoid_focal_loss", detection_one_hot, "torchvision.ops",
        lambda m: functools.partial(m.sigmoid_focal_loss, reduction="sum"),
    ),
    Case(
        "fvcore", "sigmoid_focal_loss_jit", detection_one_hot, "fvcore.nn",
        lambda m: functools.partial(m.sigmoid_focal_loss_jit, alpha=0.25, gamma=2.0, reduction="sum"),
    ),
    Case(
        "transformers", "sigmoid_focal_loss", detection_one_hot, "transformers.loss.loss_for_object_detection",
        lambda m: functools.partial(m.sigmoid_focal_loss, num_boxes=100.0),
    ),
    Case(
        "detectron2", "sigmoid_focal_loss", detection, "fvcore.nn",
        lambda m: lambda x, t: m.sigmoid_focal_loss(x.flatten(0, 1), t.flatten(), reduction="sum"),
        lambda m: through_one_hot(functools.partial(m.sigmoid_focal_loss_jit, alpha=0.25, gamma=2.0, reduction="sum")),
    ),
]  # fmt: skip
VOXELS = 2  # of CASES: Berman's formula on voxels


# ------------------------------------------------------------------ rows


def child(case: Case, side: str) -> float:
    return memory.extra_peak(case.loss(side), lambda: made(case.inputs, True), lambda: made(case.inputs))


def extra(case: Case, side: str) -> float | str:
    """Extra peak memory in multiples of the logits, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.coming_from", "--child", case.name, side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else f"fails: exit code {done.returncode}"


def measure(case: Case, quick: bool) -> dict:
    logits, target = made(case.inputs, quick)
    row = {"peer": case.peer, "loss": case.what, "inputs": f"{case.inputs.__name__} {list(logits.shape)}"}
    steps = {side: forward_backward(case.loss(side), logits, target) for side in SIDES}
    timed = timing.interleave(steps, min_rounds=2 if quick else 5, budget=0.0 if quick else 5.0)
    for side, seconds in timed.items():
        row |= {f"{side} {key}": value for key, value in timing.summary(seconds).items()}
    if not quick:
        row |= {f"{side} extra": extra(case, side) for side in SIDES}
    return row


def bars(quick: bool) -> list[dict]:
    """What is asked of lovasz_softmax_loss where 3D projects use it, each against what runs in the same rounds."""
    loss = functools.partial(veerloss.lovasz_softmax_loss, ignore_index=255)
    formula, found = CASES[VOXELS].loss("theirs"), []

    def ms(**steps: timing.Step) -> SimpleNamespace:
        timed = timing.interleave(steps, min_rounds=2 if quick else 7, budget=0.0)
        return SimpleNamespace(**{name: timing.summary(seconds)["median_ms"] for name, seconds in timed.items()})

    for grid in ((240, 180, 32), (256, 256, 32)):
        x, y = made(functools.partial(voxels, grid=grid), quick)
        _, all_valid = made(functools.partial(voxels, valid=1.0, grid=grid), quick)
        steps = {"few": (loss, x, y), "all": (loss, x, all_valid), "berman": (formula, x, y)}
        took = ms(**{name: forward_backward(*step) for name, step in steps.items()})
        what = f"voxels {list(x.shape)} with 2% valid"
        found += [
            report.bar(f"{what}: Berman's formula takes >= 8x", took.berman / took.few, 8.0, "{:.1f}x", at_least=True),
            report.bar(f"{what}: <= 0.6x of the time of all valid", took.few / took.all, 0.6, "{:.2f}x"),
        ]
    x, y = made(points, quick)
    took = ms(ours=forward_backward(loss, x, y), cross_entropy=forward_backward(F.cross_entropy, x, y))
    what = f"points {list(x.shape)}: <= 2.5x of cross_entropy"
    return [*found, report.bar(what, took.ours / took.cross_entropy, 2.5, "{:.2f}x")]


def ratio(row: dict) -> str:
    return f"{row['theirs median_ms'] / row['ours median_ms']:.1f}x"


COLUMNS = {
    "ours, ms": "{ours median_ms:.1f}",
    "theirs, ms": "{theirs median_ms:.1f}",
    "theirs over ours": ratio,
    "extra memory, ours": "{ours extra:.2f}x",
    "theirs": "{theirs extra:.2f}x",
}
TEXT = """Forward + backward of the peer's loss and of the module of `veerloss.compat` that stands in for it: medians of \
interleaved rounds, and peak memory beyond the gradient in multiples of the logits. lovasz_losses: a transcription of Berman's \
formula, which its copies have. detectron2: class indices, of which the peer (fvcore) makes one-hot targets."""


def markdown(results: dict) -> str:
    def line(row: dict) -> list[str]:
        statuses = [row[f"{side} status"] for side in SIDES]
        found = (
            report.cells(row, COLUMNS.values()) if statuses == ["ok", "ok"] else [f"ours {statuses[1]}, theirs {statuses[0]}"]
        )
        return [row["peer"], row["loss"], row["inputs"], *found]

    table = report.table(("peer", "loss", "inputs", *COLUMNS), [line(row) for row in results["rows"]])
    return "\n".join([report.heading(results["machine"]), "", TEXT, "", *table, *report.bar_table(results["bars"])])


def main(arguments: list[str] | None = None) -> int:
    parser = report.parser("benchmarks.coming_from", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny inputs: does everything run?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "SIDE"), help="measure the memory of one loss")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    memory.THREADS = options.threads
    if options.child:
        name, side = options.child
        print(json.dumps(child(next(case for case in CASES if case.name == name), side)))
        return 0
    start = time.perf_counter()
    about = report.machine("benchmarks.coming_from", arguments)
    about["versions"] |= {name: peers.version(name) for name in ("monai", "fvcore", "pytorch-toolbelt", "transformers")}
    rows = []
    for case in CASES:
        if options.filter in case.name:
            report.log(case.name)
            rows.append(measure(case, options.quick))
            gc.collect()
    found = [] if options.filter else bars(options.quick)
    about["seconds"] = round(time.perf_counter() - start)
    results = {"machine": about, "rows": rows, "bars": found}
    output = options.output or (None if options.quick or options.filter else RESULTS)
    report.save(results, markdown(results), output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
