"""Five losses, and some more, carried through to the recovered curve: ``make study``.

Trains the same network on the same hard synthetic pages with every arm of arms.py, several seeds and two budgets each;
judges the masks and the recovered curves on synthetic pages and on pages of a real well that no arm has seen; writes the
report. A finished run is kept and never repeated: after an interruption the same command goes on. A run's key is its
configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import veerloss

from . import recover
from .arms import ARMS
from .model import STRIDE, UNet
from .pages import CLASSES, Page, Track, draw_page
from .signals import synthetic_pair
from .train import Diverged, Pages, predict, train
from .well import CACHE, PAIRS, Well, WellUnavailable, fetch_wheel, read_las, read_well, windows

# Set before any arm was compared.
LEVEL = 1.0
CALIBRATION = (
    "The difficulty was set before any arm was compared, with an arm that is not one of the five (CE + Lovász, 360 steps, on "
    "training and test pages of its own): mIoU on synthetic and on real pages 0.60 and 0.57 at 0.9, 0.53 and 0.51 at 1.0; the "
    "published peak is 0.51."
)
VERSION = 1  # of what a run computes: part of its key, to be raised when pages, network, training or judging change
INSTRUMENT = Path(__file__).resolve().parents[2] / "docs" / "instrument.html"
RESULTS = Path(__file__).resolve().parents[1] / "results"
CHECKPOINTS = 8  # points of a learning curve
CURVE_PAGES = 16  # synthetic pages that a learning curve is measured on
SHOWN = 3  # real pages, one of each pair, whose predictions are kept for the figures


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    height, width: pixels of a page; samples: of the real well on a page; channels: of the network at the page's own size;
    batch: pages a step; budgets: steps, the short and the long one; seeds: of weights and order, counted from 0; training,
    synthetic, real: pages; groups: of arms.
    """

    name: str
    height: int
    width: int
    samples: int
    channels: int
    batch: int
    budgets: tuple[int, ...]
    seeds: int
    training: int
    synthetic: int
    real: int
    groups: tuple[str, ...] = ("main", "extra", "sensitivity")

    def __post_init__(self) -> None:
        for side in ("height", "width"):
            if getattr(self, side) % STRIDE or getattr(self, side) <= 0:
                raise ValueError(f"{side} is {getattr(self, side)}, expected a multiple of {STRIDE}, the stride of the network")


SCALES = {
    scale.name: scale
    for scale in (
        # 32 samples on 256 columns and 192 rows: 96.4% background on pages of the real well; 64 samples have 94.3%
        Scale("cpu", 192, 256, 32, 8, batch=4, budgets=(120, 360), seeds=3, training=1024, synthetic=64, real=96),
        Scale("gpu", 480, 640, 64, 16, batch=8, budgets=(500, 2000), seeds=5, training=4096, synthetic=128, real=192),
        Scale("quick", 128, 192, 32, 8, batch=4, budgets=(10, 30), seeds=1, training=64, synthetic=8, real=9),
    )
}


@dataclass(frozen=True)
class Run:
    """One training: all that its result depends on."""

    arm: str
    settings: str
    seed: int
    steps: int
    scale: Scale
    level: float = LEVEL
    version: int = VERSION

    @property
    def key(self) -> str:
        """Of the configuration alone; of the scale, not the budgets, seeds and groups that other runs make up."""
        told = asdict(self)
        for others in ("name", "budgets", "seeds", "groups"):
            del told["scale"][others]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, folder: Path) -> Path:
        return folder / f"{self.key}.json"


def runs_of(scale: Scale, level: float = LEVEL) -> list[Run]:
    """Every run of the study, the five arms first, a seed of all arms before the next: what is done at any time is comparable.

    Sensitivity arms have the long budget and the first seed alone.
    """
    runs = []
    for group in scale.groups:
        arms = [arm for arm in ARMS.values() if arm.group == group]
        once = group == "sensitivity"
        for seed in range(1 if once else scale.seeds):
            for steps in scale.budgets[-1:] if once else scale.budgets:
                runs += [Run(arm.name, arm.settings, seed, steps, scale, level) for arm in arms]
    return runs


# ---------------------------------------------------------------------- pages


@dataclass(frozen=True)
class Drawn:
    """What is to be drawn: values ``[2, width]``, or None for a synthetic pair of the page's own seed."""

    values: np.ndarray | None
    seed: np.random.SeedSequence


def _draw(what: Drawn, scale: Scale, level: float) -> Page:
    # a copy: draw_page spawns a generator, which the sequence counts
    rng = np.random.default_rng(np.random.SeedSequence(what.seed.entropy, spawn_key=what.seed.spawn_key))
    values = synthetic_pair(rng, scale.width) if what.values is None else what.values
    return draw_page(values, rng, level, scale.height)


def real_values(well: Well, scale: Scale) -> list[np.ndarray]:
    """Pairs of curves of windows spread over the whole well, the pairs in turn."""
    cut = windows(well, scale.samples, scale.samples, scale.width)
    if len(cut) * len(PAIRS) < scale.real:
        raise WellUnavailable(
            f"the well has {len(well.depth)} rows with every curve, {len(cut)} windows: too few for {scale.real} test pages"
        )
    place = np.linspace(0, len(cut) - 1, scale.real).round().astype(int)
    return [cut[at].values[2 * (i % len(PAIRS)) :][:2] for i, at in enumerate(place)]


def to_draw(scale: Scale, well: Well) -> dict[str, list[Drawn]]:
    """The pages of every set; each has its own seed, whatever the number of workers."""
    sets = np.random.SeedSequence(20230709).spawn(3)
    count = {"training": scale.training, "synthetic": scale.synthetic}
    drawn = {name: [Drawn(None, seed) for seed in of.spawn(count[name])] for name, of in zip(count, sets, strict=False)}
    values = real_values(well, scale)
    return {**drawn, "real": [Drawn(*both) for both in zip(values, sets[2].spawn(len(values)), strict=True)]}


def save_pages(path: Path, pages: Sequence[Page]) -> None:
    tensors = Pages.of(pages)
    skews = np.array([page.track.skew for page in pages])
    curves = np.stack([page.curves for page in pages]).astype(np.float32)
    _replace(path, lambda new: np.savez(new, images=tensors.images, masks=tensors.masks, curves=curves, skews=skews))


@dataclass(frozen=True)
class PageSet:
    """Pages of one set as kept: tensors, the curves that they show ``[P, 2, width]`` and their frames."""

    pages: Pages
    curves: np.ndarray
    tracks: list[Track]


def load_pages(path: Path) -> PageSet:
    with np.load(path) as kept:
        images, masks, curves, skews = (kept[name] for name in ("images", "masks", "curves", "skews"))
    tracks = [Track(*masks.shape[1:], float(skew)) for skew in skews]
    return PageSet(Pages(torch.from_numpy(images), torch.from_numpy(masks)), curves, tracks)


def _replace(path: Path, write) -> None:
    """Write a file that is there whole or not at all, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{os.getpid()}-{path.name}")
    with new.open("wb") as file:
        write(file)
    new.replace(path)


# ---------------------------------------------------------------------- one run, in a process of its own


def judge(probabilities: np.ndarray, of: PageSet) -> dict[str, list]:
    """Of every page ``[P, C, H, W]``: confusion ``[P][true][predicted]``, and what each curve came to ``[P][2]``."""
    found: dict[str, list] = {"confusion": [], "mae": [], "pchip": [], "coverage": [], "longest_gap": []}
    for likely, mask, curves, track in zip(probabilities, of.pages.masks.numpy(), of.curves, of.tracks, strict=True):
        pairs = CLASSES * mask.astype(np.int64) + likely.argmax(axis=0)
        found["confusion"].append(np.bincount(pairs.ravel(), minlength=CLASSES**2).reshape(CLASSES, CLASSES).tolist())
        measured = [recover.measure(likely, label, track, curves[label - 1]) for label in (1, 2)]
        for name in ("mae", "pchip", "coverage", "longest_gap"):
            found[name].append([getattr(curve, name) for curve in measured])
    return found


def first(of: PageSet, count: int) -> PageSet:
    return PageSet(Pages(of.pages.images[:count], of.pages.masks[:count]), of.curves[:count], of.tracks[:count])


_sets: dict[str, PageSet] = {}


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def start_worker(paths: dict[str, Path], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore")  # MONAI and the peers have a lot to say
    torch.set_num_threads(threads)
    _sets.update({name: load_pages(path) for name, path in paths.items()})


def execute(run: Run, folder: Path, device: str) -> dict:
    """Train, judge and keep the result: JSON, and what the figures need of SHOWN pages as npz beside it."""
    arm, begin, learning = ARMS[run.arm], time.perf_counter(), []
    torch.manual_seed(run.seed)
    validation = first(_sets["synthetic"], CURVE_PAGES)

    def after_step(step: int, model: UNet, loss: float) -> None:
        if step % max(1, run.steps // CHECKPOINTS) == 0 and run.seed == 0:
            found = judge(predict(model, validation.pages.images, arm.probabilities), validation)
            overlap = recover.iou(np.sum(found["confusion"], axis=0)).mean()
            learning.append([step, float(overlap), float(np.mean(found["mae"]))])

    result = {"run": asdict(run), "key": run.key, "status": "done", "message": ""}
    try:
        model, clock = train(
            _sets["training"].pages,
            arm.loss,
            steps=run.steps,
            batch=run.scale.batch,
            rng=np.random.default_rng(run.seed),
            width=run.scale.channels,
            device=device,
            other=arm.peer,
            after_step=after_step,
        )
    except Diverged as problem:
        result |= {"status": "diverged", "message": str(problem)}
    else:
        found = {name: predict(model, _sets[name].pages.images, arm.probabilities) for name in ("synthetic", "real")}
        result["sets"] = {name: judge(probabilities, _sets[name]) for name, probabilities in found.items()}
        result["clock"] = {
            "step_ms": 1e3 * float(np.median(clock.step)),
            "loss_ms": clock.own()[0],
            "loss_share": clock.own()[1],
            "peer_ms": clock.other()[0] if arm.peer else None,
            "peer_share": clock.other()[1] if arm.peer else None,
        }
        logits = predict(model, _sets["real"].pages.images[:SHOWN], lambda logits: logits).astype(np.float16)
        _replace(run.path(folder).with_suffix(".npz"), lambda new: np.savez_compressed(new, logits=logits))
    result |= {"learning": learning, "seconds": time.perf_counter() - begin, "veerloss": veerloss.__version__}
    _replace(run.path(folder), lambda new: new.write(json.dumps(result).encode()))
    return result


# ---------------------------------------------------------------------- all runs


def kept(runs: Iterable[Run], folder: Path) -> dict[Run, dict]:
    """Results that are there already. One that cannot be read counts as not there: it was damaged from outside."""
    found = {}
    for run in runs:
        try:
            found[run] = json.loads(run.path(folder).read_text())
        except (OSError, ValueError):
            continue
    return found


def draw_missing(scale: Scale, well: Well, level: float, folder: Path, workers: int) -> dict[str, Path]:
    """Paths of the sets of pages; draws those that are not there."""
    told = {name: value for name, value in asdict(scale).items() if name in ("height", "width", "samples")}
    drawn = to_draw(scale, well)
    paths = {}
    for name, what in drawn.items():
        values = b"".join(one.values.tobytes() for one in what if one.values is not None)
        text = json.dumps([told, level, VERSION, name, len(what)]).encode() + values
        paths[name] = folder / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.npz"
    missing = [name for name, path in paths.items() if not path.exists()]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for name in missing:
            what = drawn[name]
            pages = pool.map(_draw, what, [scale] * len(what), [level] * len(what), chunksize=16)
            save_pages(paths[name], list(tqdm(pages, total=len(what), desc=f"drawing {name} pages", unit="page")))
    return paths


def execute_all(
    runs: Sequence[Run], paths: dict[str, Path], folder: Path, device: str, workers: int
) -> Iterator[tuple[Run, dict]]:
    """Results of ``runs`` as they come. A run that raises is "failed", and is not kept: the next time it is tried again.

    Raises BrokenProcessPool when a worker was killed.
    """
    threads = 1 if workers > 1 else torch.get_num_threads()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (paths, threads)) as pool:
        waiting: dict[Future, Run] = {pool.submit(execute, run, folder, device): run for run in runs}
        try:
            for future in as_completed(waiting):
                run = waiting[future]
                try:
                    yield run, future.result()
                except BrokenProcessPool:
                    raise
                except Exception as problem:
                    yield run, {"run": asdict(run), "status": "failed", "message": f"{type(problem).__name__}: {problem}"}
        except BaseException:
            workers = list((pool._processes or {}).values())  # Python 3.14 has pool.terminate_workers for this
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()
            raise


def study(scale: Scale, paths: dict[str, Path], folder: Path, device: str, workers: int) -> dict[Run, dict]:
    """Every result, those kept before and those computed now, on the sets of pages at ``paths``."""
    runs = runs_of(scale)
    results = kept(runs, folder)
    left = [run for run in runs if run not in results]
    total, done = sum(run.steps for run in runs), sum(run.steps for run in results)
    with tqdm(total=total, initial=done, desc=f"{len(runs)} runs", unit="step", smoothing=0) as bar:
        for run, result in execute_all(left, paths, folder, device, workers):
            results[run] = result
            bar.update(run.steps)
            if result["status"] != "done":
                bar.write(f"{run.arm}, seed {run.seed}, {run.steps} steps {result['status']}: {result['message']}")
    return {run: results[run] for run in runs}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = "quick" if os.environ.get("QUICK", "0") not in ("", "0") else "gpu" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digitise.study",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--scale", choices=sorted(SCALES), default=default, help="how large; QUICK=1 is --scale quick")
    parser.add_argument("--las", type=Path, help="a LAS file of your own with the curves of the well, to test on")
    parser.add_argument("--workers", type=int, help="runs side by side; by default one a core, on a GPU one")
    parser.add_argument("--folder", type=Path, default=CACHE / "study", help="where finished runs are kept")
    parser.add_argument("--out", type=Path, help="folder of the report; by default benchmarks/results, for quick --folder")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() and options.scale != "quick" else "cpu"
    options.workers = options.workers or (1 if options.device == "cuda" else cores)
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}, expected at least 1")
    options.instrument = None if options.out or options.scale != "cpu" else INSTRUMENT
    options.out = options.out or (options.folder if options.scale == "quick" else RESULTS)
    return options


def main(arguments: list[str] | None = None) -> int:
    options, begin = parse(arguments), time.perf_counter()
    scale = SCALES[options.scale]
    try:
        well = read_las(options.las) if options.las else read_well(fetch_wheel())
        paths = draw_missing(scale, well, LEVEL, options.folder, options.workers)
        results = study(scale, paths, options.folder, options.device, options.workers)
    except WellUnavailable as problem:
        print(f"study: {problem}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenProcessPool) as problem:
        what = "interrupted" if isinstance(problem, KeyboardInterrupt) else "a worker was killed (perhaps by lack of memory)"
        runs = runs_of(scale)
        finished = len(kept(runs, options.folder))
        print(
            f"\nstudy: {what}; {finished} of {len(runs)} runs are finished and kept in {options.folder}: "
            "the same command goes on with the others.",
            file=sys.stderr,
        )
        return 130 if isinstance(problem, KeyboardInterrupt) else 1
    from .report import write_report  # matplotlib, which the workers do not need

    sets = {name: load_pages(path) for name, path in paths.items()}
    written = write_report(results, scale, options.folder, options.out, options.device, sets, CALIBRATION, options.instrument)
    print(f"{written}\n{time.perf_counter() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
