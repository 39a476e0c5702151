"""The report of the study: tables in Markdown, figures as PNG beside it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import veerloss

from .. import peers
from . import claims, recover
from .arms import ARMS, GAMMA, TVERSKY
from .figure import draw_curves, draw_learning, draw_masks_against_curves, draw_regression
from .gradients import Scene
from .instrument import draw as draw_instrument
from .instrument_page import build as build_instrument
from .outcomes import (
    Interval,
    Outcome,
    by_run_and_curve,
    difference,
    mae_interval,
    miou_interval,
    outcomes,
    regress,
)
from .snapshot import Snapshot
from .well import WELL_NAME

if TYPE_CHECKING:
    from .study import PageSet, Run, Scale

SETS = {"real": "pages of the real well", "synthetic": "synthetic pages"}
GROUPS = {"main": "the five", "extra": "extra arms", "sensitivity": "sensitivity"}

# VeerNet, J. Imaging 2023, 9(7):136, and its authors' pages; mean absolute errors of the two curves. Gamma, alpha, Tversky's
# weights, optimiser and learning rate are not stated, and other pages of the same source give Dice 0.11 and 0.12.
PUBLISHED: dict[str, tuple[float | None, float | None]] = {
    "Dice": (0.0367, 0.0774),
    "Tversky": (0.0277, None),
    "Lovász": (None, None),
    "Focal": (0.0405, 0.1027),
    "SCE": (None, None),
}
PUBLISHED_MIOU = 0.51  # the peak over all runs
CONCLUSIONS = Path(__file__).with_name("conclusions.md")  # written by hand for one run of the study, named in its first line


def fingerprint(results: dict[Run, dict]) -> str:
    """Of the configurations of the finished runs: which study a text of conclusions speaks of."""
    keys = sorted(run.key for run, result in results.items() if result["status"] == "done")
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:12]


def conclusions(results: dict[Run, dict]) -> str:
    if CONCLUSIONS.exists():
        first, _, text = CONCLUSIONS.read_text(encoding="utf-8").partition("\n")
        if fingerprint(results) in first:
            return text.strip()
    return f"Nobody has written conclusions for this run of the study ({fingerprint(results)}) yet."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(of: Interval, digits: int = 4) -> str:
    return f"{of.value:.{digits}f} ({of.low:.{digits}f} to {of.high:.{digits}f})"


def signed(of: Interval, digits: int = 4) -> str:
    return f"{of.value:+.{digits}f} ({of.low:+.{digits}f} to {of.high:+.{digits}f})"


def side_by_side(found: dict[tuple[str, int], Outcome], steps: int) -> str:
    rows = []
    for name, (one, two) in PUBLISHED.items():
        ours = found.get((name, steps))
        measured = [with_interval(mae_interval(ours, curve)) for curve in (0, 1)] if ours else ["", ""]
        rows.append([name, *measured, number(one), number(two)])
    return table(["loss", "ours, curve 1", "ours, curve 2", "published, curve 1", "published, curve 2"], rows)


def arms_table(found: dict[tuple[str, int], Outcome], steps: int, group: str) -> str:
    rows = []
    for arm in ARMS.values():
        of = found.get((arm.name, steps))
        if arm.group != group or of is None:
            continue
        overlap = of.ious()
        rows.append(
            [
                arm.name, with_interval(miou_interval(of), 3), *(f"{value:.3f}" for value in overlap),
                with_interval(mae_interval(of, 0)), with_interval(mae_interval(of, 1)), number(of.pchip.mean()),
                f"{of.coverage.mean():.1%}", f"{of.longest_gap.mean():.1f}", arm.settings,
            ]
        )  # fmt: skip
    head = ["arm", "mIoU", "bg", "c1", "c2", "MAE curve 1", "MAE curve 2", "MAE, PCHIP", "coverage", "longest gap", "settings"]
    return table(head, rows)


def rank_table(found: dict[tuple[str, int], Outcome], steps: int) -> str:
    """The five by MAE; paired differences from the one with the highest mIoU."""
    five = {arm.name: found[arm.name, steps] for arm in ARMS.values() if arm.group == "main" and (arm.name, steps) in found}
    if not five:
        return "No arm of the five finished."
    best = max(five, key=lambda name: five[name].ious().mean())
    rows = []
    for name, of in sorted(five.items(), key=lambda item: item[1].mae.mean()):
        against = difference(of, five[best]) if name != best else None
        rows.append(
            [name, number(of.ious().mean(), 3), number(of.mae.mean()), *map(signed, reversed(against))]
            if against
            else [name, number(of.ious().mean(), 3), number(of.mae.mean()), "", ""]
        )
    head = ["loss", "mIoU", "MAE, both curves", f"MAE against {best}'s", f"mIoU against {best}'s"]
    return table(head, rows)


def winner(found: dict[tuple[str, int], Outcome], steps: int) -> str:
    """Whether the best mask of the five brings the best curve."""
    five = {arm.name: found[arm.name, steps] for arm in ARMS.values() if arm.group == "main" and (arm.name, steps) in found}
    if not five:
        return "No arm of the five finished."
    mask = max(five, key=lambda name: five[name].ious().mean())
    curve = min(five, key=lambda name: five[name].mae.mean())
    if mask == curve:
        return f"At {steps} steps the winner of the mask, {mask}, wins the curve too."
    text = f"At {steps} steps the mask is won by {mask}, the curve by {curve}"
    against = difference(five[curve], five[mask])
    if against is None:
        return text + "."
    apart = against[1].high < 0
    return f"{text}: {signed(against[1])} in MAE, {'which is' if apart else 'which is not'} told apart by the interval."


def time_table(results: dict[Run, dict], steps: int) -> str:
    rows = []
    for arm in ARMS.values():
        clocks = [result["clock"] for run, result in results.items() if is_done(run, result, arm.name, steps)]
        if not clocks or arm.group == "sensitivity":
            continue
        mean = {name: None if clocks[0][name] is None else float(np.median([c[name] for c in clocks])) for name in clocks[0]}
        ratio = f"{mean['peer_ms'] / mean['loss_ms']:.1f}x" if mean["peer_ms"] else ""
        share = "" if mean["peer_share"] is None else f"{mean['peer_share']:.1%}"
        rows.append(
            [arm.name, f"{mean['step_ms']:.0f}", f"{mean['loss_ms']:.1f}", f"{mean['loss_share']:.1%}", arm.peer_name,
             number(mean["peer_ms"], 1), share, ratio]
        )  # fmt: skip
    head = ["arm", "step, ms", "loss, ms", "share", "peer", "its loss, ms", "share", "takes"]
    return table(head, rows)


def is_done(run: Run, result: dict, arm: str, steps: int) -> bool:
    return run.arm == arm and run.steps == steps and result["status"] == "done"


def whole_time(results: dict[Run, dict]) -> str:
    """Training time of all runs of arms with losses of ours, with them and with the peers' in their place."""
    ours = theirs = 0.0
    for run, result in results.items():
        if result["status"] == "done" and result["clock"]["peer_ms"] is not None:
            clock = result["clock"]
            ours += run.steps * clock["step_ms"] / 1e3
            theirs += run.steps * (clock["step_ms"] - clock["loss_ms"] + clock["peer_ms"]) / 1e3
    if not ours:
        return ""
    return (
        f"All steps of these arms together: {ours / 60:.1f} minutes of one process with our losses, {theirs / 60:.1f} with the "
        f"peers' in their place, {theirs / ours:.2f} times as long."
    )


def floors(sets: dict[str, PageSet]) -> str:
    rows = []
    for name, of in sets.items():
        pairs = list(zip(of.pages.masks.numpy(), of.curves, of.tracks, strict=True))
        lowest = [np.mean([recover.measure(m, label, t, c[label - 1]).mae for m, c, t in pairs]) for label in (1, 2)]
        rows.append([SETS[name], str(len(pairs)), f"{float(of.pages.prior()[0]):.1%}", *map(number, lowest)])
    return table(["pages", "number", "background", "floor, curve 1", "floor, curve 2"], rows)


def regression_text(results: dict[Run, dict], pages: str) -> str:
    fitted = regress(outcomes(results.values(), pages).values())
    if fitted is None:
        return f"On {SETS[pages]} nothing varies: no regression."
    (gap, overlap), (both, gap_alone, overlap_alone) = fitted.slopes, fitted.r2
    return (
        f"On {SETS[pages]}, {fitted.n:,} curves of all runs: R² {both:.2f} of both, {gap_alone:.2f} of the longest gap alone, "
        f"{overlap_alone:.2f} of the IoU alone; standardised slopes {gap:+.2f} and {overlap:+.2f}."
    )


def claims_table(measured: list[claims.Claim], page: Snapshot | None) -> str:
    """The twelve claims: their verdicts on made-up predictions, and the verdicts on the network's own, of ``page``."""
    head = ["claim", "verdict", "on a page", "measured", "shown by"]
    own = [""] * len(measured)
    if page:
        logits, target = page.tensors()
        scene = Scene(page.target, target, {"CE": logits})
        own = [claim.verdict if claim.numbers else "" for claim in claims.measure(of=scene)]
    rows = [[c.claim, c.verdict, other, c.measured, f"`{c.shown_by}`"] for c, other in zip(measured, own, strict=True)]
    return table(head, rows)


def measured_claims(results: dict[Run, dict]) -> list[claims.Claim]:
    """The twelve claims, the runs on both sets of pages among what is measured, each curve of each set by itself."""
    rows = [row | {"curve": f"{pages} {row['curve']}"} for pages in SETS for row in by_run_and_curve(results.values(), pages)]
    return claims.measure(rows)


def unfinished(results: dict[Run, dict]) -> str:
    bad = [(run, result) for run, result in results.items() if result["status"] != "done"]
    if not bad:
        return f"All {len(results)} runs finished."
    rows = [[run.arm, str(run.seed), str(run.steps), result["status"], result["message"]] for run, result in bad]
    return f"{len(results) - len(bad)} of {len(results)} runs finished.\n\n" + table(
        ["arm", "seed", "steps", "status", "why"], rows
    )


def machine(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, one thread a run"
    packages = ", ".join(f"{name} {peers.version(name)}" for name in peers.PEERS)
    return f"veerloss {veerloss.__version__}, torch {torch.__version__}, {packages}; {where}."


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_report(
    results: dict[Run, dict],
    scale: Scale,
    folder: Path,
    out: Path,
    device: str,
    sets: dict[str, PageSet],
    calibration: str,
    instrument: Path | None = None,
) -> Path:
    """Write study.md (study-gpu.md on a GPU) and its figures to ``out``, and to ``instrument`` the page with sliders.

    Returns the path of the text.
    """
    stem = "study-gpu" if scale.name == "gpu" else "study"
    out.mkdir(parents=True, exist_ok=True)
    short, long = scale.budgets[0], scale.budgets[-1]
    found = {pages: outcomes(results.values(), pages) for pages in SETS}

    draw_masks_against_curves(found, scale.budgets, out / f"{stem}-masks-and-curves.png")
    draw_learning([r for run, r in results.items() if run.seed == 0 and run.steps == long], out / f"{stem}-learning.png")
    draw_regression({pages: by_run_and_curve(results.values(), pages) for pages in SETS}, out / f"{stem}-regression.png")
    probabilities = shown(results, folder, long)
    typical = typical_page(found["real"], long, next(map(len, probabilities.values()), 1))
    draw_curves(probabilities, sets["real"], out / f"{stem}-curves.png", typical)

    page, measured = None, measured_claims(results)
    if path := logits_of("CE", results, folder, long):
        with np.load(path) as kept:
            page = Snapshot.of_page(kept["logits"][typical], sets["real"], typical)
        page.write(folder / f"{stem}-snapshot.npz")
        draw_instrument(folder / f"{stem}-snapshot.npz", out / f"{stem}-instrument.png")
        if instrument:
            build_instrument(folder / f"{stem}-snapshot.npz", instrument, measured)

    parts = [
        "# Five losses, carried through to the recovered curve",
        f"`make study`, scale {scale.name}: {scale.training} synthetic training pages of {scale.height} x {scale.width} px, "
        f"difficulty {level_of(results)}; {scale.batch} pages a step, {short} or {long} steps; {scale.seeds} seeds, each with "
        "the same initial weights and order of pages for every arm; a five-stage U-Net with a transformer, "
        f"{scale.channels} channels at the page's size. Tested on synthetic pages and on pages of {WELL_NAME}, of which no arm "
        f"has seen anything. {machine(device)}",
        calibration,
        unfinished(results),
        "Values are means over seeds and pages, in brackets the 95% intervals of a bootstrap over both; MAE is the mean "
        "absolute error of the recovered curve at 300 depths, as a share of the value range; a curve without a pixel counts as "
        "0.5; a longest gap is in columns. The floor is what the true mask itself recovers to.",
        floors({name: sets[name] for name in SETS}),
        "## What to do with this",
        conclusions(results),
        "## The published table and ours",
        f"Side by side, not to be merged: other pages, network, budget and test set. Ours is of real pages at {long} steps; "
        f"published: VeerNet (J. Imaging 2023, 9(7):136), whose peak mIoU over all runs is {PUBLISHED_MIOU}, and which does "
        "not state gamma, alpha or Tversky's weights. A cell without a measurement is empty.",
        side_by_side(found["real"], long),
        "## Does the mask's winner win the deliverable?",
        *(f"{SETS[pages].capitalize()}: {winner(of, steps)}" for pages, of in found.items() for steps in scale.budgets),
        f"![mIoU against MAE of every arm]({stem}-masks-and-curves.png)",
        *(
            part
            for pages, of in found.items()
            for part in (f"The five on {SETS[pages]}, {long} steps, by MAE:", rank_table(of, long))
        ),
        "## All arms",
    ]  # fmt: skip
    for pages, of in found.items():
        for steps in scale.budgets:
            for group in ("main", "extra"):
                if group in scale.groups:
                    parts += [f"### {SETS[pages].capitalize()}, {steps} steps, {GROUPS[group]}", arms_table(of, steps, group)]
    if "sensitivity" in scale.groups:
        parts += [
            "## Sensitivity to gamma and to Tversky's weights",
            f"Real pages, {long} steps, one seed: intervals are of the pages alone. Focal's gamma is otherwise {GAMMA:g}, "
            f"Tversky's weights are {TVERSKY[0]} and {TVERSKY[1]}; 0.5 and 0.5 would be Dice.",
            arms_table(found["real"], long, "sensitivity"),
        ]
    parts += [
        "## The curves",
        "A page of the real well (wide: the real curve, thin: the recovered one), seed 0, the long budget.",
        f"![Recovered curves of every arm]({stem}-curves.png)",
        "## Learning",
        f"![Learning curves]({stem}-learning.png)",
        "## What the error of a curve follows",
        *(regression_text(results, pages) for pages in SETS),
        f"![MAE against longest gap and IoU]({stem}-regression.png)",
        "## What the text claims",
        "Each verdict follows from measured numbers, as tests/test_claims.py shows. Measured on predictions made up for three "
        'stages of training; "on a page": on what the network trained with CE predicts for a crop of a real page.',
        claims_table(measured, page),
        f"![Where each loss puts its gradient]({stem}-instrument.png)" if page else "",
        "## Time",
        f"Medians over the steps of the runs with {long} steps; the peer's loss was timed in the place of ours every tenth "
        "step.",
        time_table(results, long),
        whole_time(results),
    ]
    path = out / f"{stem}.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def level_of(results: dict[Run, dict]) -> float:
    return next(iter(results)).level


def logits_of(arm: str, results: dict[Run, dict], folder: Path, steps: int) -> Path | None:
    """Where the kept logits of an arm's first seed lie, if that run finished."""
    for run, result in results.items():
        path = run.path(folder).with_suffix(".npz")
        if run.seed == 0 and is_done(run, result, arm, steps) and path.exists():
            return path
    return None


def typical_page(found: dict[tuple[str, int], Outcome], steps: int, count: int) -> int:
    """Of the first ``count`` pages the one whose error, the mean of all arms, is nearest to the mean of all pages."""
    errors = [of.mae.mean(axis=(0, 2)) for (_, budget), of in found.items() if budget == steps]
    if not errors:
        return 0
    of_pages = np.mean(errors, axis=0)
    return int(np.abs(of_pages[:count] - of_pages.mean()).argmin())


def shown(results: dict[Run, dict], folder: Path, steps: int) -> dict[str, np.ndarray]:
    """Arm to its probabilities on the kept real pages, ``[pages, C, H, W]``: seed 0 at ``steps``."""
    found = {}
    for arm in ARMS.values():
        if arm.group != "sensitivity" and (path := logits_of(arm.name, results, folder, steps)):
            with np.load(path) as kept:
                found[arm.name] = arm.probabilities(torch.from_numpy(kept["logits"]).float()).numpy()
    return found
