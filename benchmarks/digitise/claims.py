"""What is said of Focal, Dice and Lovász losses on thin curves, measured: twelve claims, each with a verdict.

The claims are those of a published comparison of five losses on well logs (J. Imaging 2023, 9(7):136) and the text around it.
Eleven sentences; the first says two things and is split here: that focal multiplies by (1 - p)^gamma, and that easy pixels
then go to about 0. No verdict is written down: each claim is a conjunction of parts, each part a comparison of measured
numbers, and the verdict follows from how many parts hold (`verdict`). Losses are those of `arms`, in float64.

All numbers are of one page of two curves of 1 to 3 px (97.5% background) and of made-up predictions for it (`gradients`):
logits that grow with the distance to the edge of a class, plus noise, a stretch of missed curve and a false one, at three
stages of training. Gradients are those by the logits unless they are called weights: these are |dL/dp|, before the softmax.

One file, because a claim is read beside its measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion
from scipy.stats import spearmanr
from torch import Tensor

import veerloss

from . import arms, pages
from .gradients import FIVE, Scene, focal_ratio, gradient, loss_of, lovasz_weights, mean_iou, push, scene, signed_distance

DEFAULT_ALPHA = 0.25  # of the foreground: Lin et al., ICCV 2017, the default of torchvision and of detectron2's RetinaNet
Numbers = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """A claim and what was found.

    verdict: "holds", "half true", "false" or "open"; measured: the numbers in a sentence or two; shown_by: the test, and the
    panel of the instrument, that show it; numbers: all that was measured.
    """

    claim: str
    verdict: str
    measured: str
    shown_by: str
    numbers: Numbers


def verdict(parts: Sequence[bool]) -> str:
    """Of the parts of a claim: "holds" if all do, "false" if none does, "half true" if some do; "open" without any."""
    if not parts:
        return "open"
    return "holds" if all(parts) else "half true" if any(parts) else "false"


# ------------------------------------------------------------------ what is measured, claim by claim


def factor(_: Scene) -> Numbers:
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    loss, slope = focal_ratio(p, arms.GAMMA)
    at = {"loss_at_99": loss[989], "gradient_at_99": slope[989], "gradient_most": slope.max(), "p_most": p[slope.argmax()]}
    return {"error": (loss / (1 - p) ** arms.GAMMA - 1).abs().max().item()} | {key: x.item() for key, x in at.items()}


def easy(of: Scene) -> Numbers:
    """Shares of the page's gradient that lie on pixels of p >= 0.9, the largest of the stages."""
    shares = {"Focal": [], "CE": [], "SCE": []}
    for stage, logits in of.logits.items():
        is_easy = of.confidence(stage) >= 0.9
        for name, found in shares.items():
            pushed = push(name, logits, of.target)
            found.append((pushed[is_easy].sum() / pushed.sum()).item())
    slope = focal_ratio(torch.tensor([0.99], dtype=torch.float64), arms.GAMMA)[1]
    return {"gradient_at_99": slope.item()} | {f"share_{name.lower()}": max(found) for name, found in shares.items()}


def unsure(_: Scene) -> Numbers:
    loss, slope = focal_ratio(torch.tensor([0.5], dtype=torch.float64), arms.GAMMA)
    return {"loss": loss.item(), "gradient": slope.item()}


def kinds(_: Scene) -> Numbers:
    """The same logits under every naming of the classes: background for curve, curve for background, curve for curve."""
    x = torch.randn(64, pages.CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def seen(order: Sequence[int], alpha: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses [P] where the class at ``order[0]`` is the target, gradients [P, C] in the order of ``x``."""
        back = torch.tensor(order).argsort()

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return veerloss.softmax_focal_loss(z, y, alpha=alpha, gamma=arms.GAMMA, reduction="none")

        z, y = x[:, back], torch.full((len(x),), order[0])
        return loss(z, y), gradient(lambda z, y: loss(z, y).sum(), z, y)[:, list(order)]

    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    plain = [seen(order, None) for order in orders]
    apart = max((a - b).abs().max().item() for other in plain[1:] for a, b in zip(other, plain[0], strict=True))
    alpha = torch.tensor([1 - DEFAULT_ALPHA, DEFAULT_ALPHA, DEFAULT_ALPHA], dtype=torch.float64)
    false_positive, false_negative = (seen(order, alpha)[1].abs().sum().item() for order in ((0, 1, 2), (1, 0, 2)))
    return {"difference": apart, "ratio_with_alpha": false_positive / false_negative}


def wrong(of: Scene) -> Numbers:
    """What focal keeps of CE's gradient, over misclassified pixels with correct labels, and over those of them that look easy,
    p >= 0.9, when the label is flipped to what the network says; then 1% of all labels flipped at random, and the share of the
    gradient on these."""
    logits, p = of.latest, of.latest.softmax(1)
    said = p.argmax(1)
    missed = said != of.target
    looks_easy = missed & (p.amax(1) >= 0.9)

    def kept(target: Tensor, pixels: Tensor) -> float:
        return (push("Focal", logits, target)[pixels].sum() / push("CE", logits, target)[pixels].sum()).item()

    random = torch.Generator().manual_seed(0)
    flipped = torch.rand(of.target.shape, generator=random) < 0.01
    noisy = torch.where(flipped, (of.target + torch.randint(1, 3, of.target.shape, generator=random)) % 3, of.target)
    pushes = {name: push(name, logits, noisy) for name in ("Focal", "CE")}
    shares = {f"noise_{name.lower()}": (pushed[flipped].sum() / pushed.sum()).item() for name, pushed in pushes.items()}
    loss, slope = focal_ratio(torch.tensor([0.01, 0.5], dtype=torch.float64), arms.GAMMA)
    return {
        "loss_at_01": loss[0].item(), "gradient_at_01": slope[0].item(), "gradient_least": slope[1].item(),
        "correct": kept(of.target, missed), "flipped": kept(said, looks_easy),
    } | shares  # fmt: skip


def rank(_: Scene) -> Numbers:
    """Weights of 2,000 pixels of one class, 5% foreground, before and after their errors are changed."""
    random = np.random.default_rng(0)
    errors = random.permutation(np.linspace(0.001, 0.999, 2000))
    labels = random.random(2000) < 0.05

    def weights(e: np.ndarray, fg: np.ndarray) -> Tensor:
        p = torch.from_numpy(np.where(fg, 1 - e, e)).reshape(1, 1, -1)
        target = torch.from_numpy(np.where(fg, 0, 1)).reshape(1, -1)

        def loss(p: Tensor, y: Tensor) -> Tensor:
            return veerloss.lovasz_softmax_loss(p, y, from_logits=False, background_index=1)

        return gradient(loss, p, target).abs().flatten()

    before = weights(errors, labels)
    monotone = (errors**3, np.sqrt(errors), np.expm1(4 * errors) / np.expm1(4), 0.4 + 0.2 * errors)

    def change(after: Tensor) -> float:
        return ((after - before).norm() / before.norm()).item()

    return {
        "monotone": max(change(weights(e, labels)) for e in monotone),
        "reordered": change(weights(random.permutation(errors), labels)),
        "relabelled": change(weights(errors, random.permutation(labels))),
    }


def confident(of: Scene) -> Numbers:
    """Of the weights of correct pixels of p >= 0.9: the share that is exactly 0, in their own class's list (foreground) and of
    background in the curves' lists. And what of the weight arrives at the logits."""
    own, others, arrives = [], [], []
    for stage, logits in of.logits.items():
        sure = of.confidence(stage)[0] >= 0.9
        weights = lovasz_weights(logits, of.target)[0]
        own += [weights[c][sure & (of.target[0] == c)] == 0 for c in range(pages.CLASSES)]
        others += [weights[c][sure & (of.target[0] == 0)] == 0 for c in (1, 2)]
        paper = sure & (of.target[0] == 0)
        pushed = pages.CLASSES * push("Lovász", logits, of.target)[0]  # the loss is a mean over classes
        arrives.append((pushed[paper].sum() / weights.sum(0)[paper].sum()).item())
    zero = {"own": torch.cat(own), "others": torch.cat(others)}
    return {f"zero_{key}": found.double().mean().item() for key, found in zero.items()} | {"at_logits": max(arrives)}


def smeared(of: Scene) -> Numbers:
    """Distinct values of dL/dp, the most and the least of the classes and stages."""
    from monai.losses import DiceLoss  # the loss of the arm, whose softmax is inside

    found = {"dice": [], "lovasz": []}
    for logits in of.logits.values():
        dice = gradient(DiceLoss(to_onehot_y=True), logits.softmax(1), of.target[:, None])[0]
        for name, weights in (("dice", dice), ("lovasz", lovasz_weights(logits, of.target)[0])):
            found[name] += [len(w.unique()) for w in weights]
    prior = torch.bincount(of.target.flatten()).double().log()[:, None, None] + 0.1 * of.latest
    untrained = [len(w.unique()) for w in lovasz_weights(prior, of.target)[0][1:]]
    return {
        "dice_least": min(found["dice"]), "dice_most": max(found["dice"]), "pixels": of.target.numel(),
        "lovasz_least": min(found["lovasz"]), "lovasz_most": max(found["lovasz"]), "lovasz_untrained": max(untrained),
    }  # fmt: skip


def stroke(width: int | None, height: int = 96, length: int = 128) -> np.ndarray:
    """A mask [height, length]: a curve ``width`` px thick, or for None a disc of radius 24."""
    row, column = np.mgrid[:height, :length]
    if width is None:
        return (row - height / 2) ** 2 + (column - length / 2) ** 2 <= 24**2
    centre = np.round(height / 2 + 12 * np.sin(column * 2 * np.pi / length))
    return (row >= centre - (width - 1) // 2) & (row <= centre + width // 2)


def boundary(_: Scene) -> Numbers:
    """Mean gradient on the boundary, the pixels of both kinds that touch the other; beside the rest of the page, and, of the
    foreground alone, beside its interior, which only a curve of 3 px or more has. Two classes, three seeds of noise."""
    numbers: Numbers = {}
    for name in ("Lovász", "Focal", "CE"):
        for width in (1, 2, 3, None):
            mask = stroke(width)
            inner = binary_erosion(mask, border_value=1)
            edge = (mask & ~inner) | (~mask & binary_dilation(mask))
            pushed = np.zeros(mask.shape)
            for seed in range(3):
                logit = np.clip(signed_distance(mask), -6, 6) + np.random.default_rng(seed).standard_normal(mask.shape)
                logits = torch.from_numpy(np.stack([-logit / 2, logit / 2]))[None]
                pushed += push(name, logits, torch.from_numpy(mask.astype(np.int64))[None])[0].numpy() / 3
            key = f"{name.lower().replace('á', 'a')}_{f'{width}px' if width else 'blob'}"
            numbers[f"push_{key}"] = pushed[edge].mean()
            numbers[f"page_{key}"] = pushed[edge].mean() / pushed[~edge].mean()
            if inner.any():
                numbers[f"inside_{key}"] = pushed[edge & mask].mean() / pushed[inner].mean()
    return {key: float(x) for key, x in numbers.items()}


def perturbed(mask: np.ndarray, seed: int) -> np.ndarray:
    """A mask with one kind of error, more or less of it: shifted, a gap, thickened, specks, the curves confused."""
    random, kind = np.random.default_rng(seed), seed % 5
    length = random.integers(1, 120)
    start = random.integers(0, mask.shape[1] - length)
    stretch = np.zeros(mask.shape, dtype=bool)
    stretch[:, start : start + length] = True
    if kind == 0:
        return np.roll(mask, random.integers(0, 4), axis=0)
    if kind == 1:
        return np.where(stretch & (mask == random.integers(1, 3)), 0, mask)
    if kind == 2:
        thick = binary_dilation(mask > 0, iterations=random.integers(1, 4)) & (random.random(mask.shape) < random.random())
        return np.where(thick & (mask == 0), random.integers(1, 3), mask)
    if kind == 3:
        specks = random.random(mask.shape) < random.uniform(0, 0.03)
        return np.where(specks, random.integers(0, 3, mask.shape), mask)
    return np.where(stretch, np.array([0, 2, 1])[mask], mask)


def candidates(of: Scene, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels to flip: up to 600, a third wrong, a third correct curve, a third correct paper; and the 200 next to flip."""
    p = of.logits[stage].softmax(1)[0].flatten(1).numpy()
    labels, said, margin = of.mask.ravel(), p.argmax(0), np.diff(np.sort(p, axis=0)[-2:], axis=0)[0]
    random = np.random.default_rng(0)
    groups = (said != labels, (said == labels) & (labels > 0), (said == labels) & (labels == 0))
    picked = [random.choice(np.flatnonzero(group), min(200, group.sum()), replace=False) for group in groups]
    return np.concatenate(picked), margin.argsort()[:200]


def flip(of: Scene, stage: str, pixels: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The gain of the mean IoU when the prediction of one pixel flips, to the label where it is wrong and else to the class
    that comes second, by recounting; and by arm the gain that its gradient foretells."""
    p = of.logits[stage].softmax(1)[0].flatten(1).numpy()
    labels, said = of.mask.ravel().astype(int), p.argmax(0)
    to = np.where(said == labels, p.argsort(0)[-2], labels)[pixels]
    base, gain = mean_iou(said, labels), []
    for pixel, label in zip(pixels, to, strict=True):
        flipped = said.copy()
        flipped[pixel] = label
        gain.append(mean_iou(flipped, labels) - base)
    foretold = {}
    for name in FIVE:
        # dL/dz of the class c that it flips to, over its p, is the slope of L on the way from p to certainty of c
        slope = gradient(loss_of(name), of.logits[stage], of.target)[0].flatten(1).numpy()
        foretold[name] = -slope[to, pixels] / p[to, pixels]
    return np.array(gain), foretold


def alignment(of: Scene) -> Numbers:
    """Spearman's correlation of loss and 1 - mean IoU over 60 perturbed masks, each predicted with log-odds of about 4, or
    ("varied") from 1.5 to 6; and of the gain of a flipped pixel and what the gradient foretells of it, the mean of the stages:
    of pixels of all kinds, and of those next to flip."""
    lost, losses, varied = [], {name: [] for name in FIVE}, []
    for seed in range(60):
        mask, random = perturbed(of.mask, seed), np.random.default_rng(seed)
        noise = torch.from_numpy(0.3 * random.standard_normal((1, pages.CLASSES, *mask.shape)))
        sure = torch.from_numpy(mask == np.arange(pages.CLASSES)[:, None, None])
        logits = 4.0 * sure + noise
        lost.append(1 - mean_iou(logits.argmax(1)[0].numpy(), of.mask))
        for name in FIVE:
            losses[name].append(loss_of(name)(logits, of.target).item())
        varied.append(loss_of("Lovász")(random.uniform(1.5, 6) * sure + noise, of.target).item())
    numbers = {f"masks_{name.lower()}": spearmanr(losses[name], lost)[0] for name in FIVE}
    numbers["varied_lovász"] = spearmanr(varied, lost)[0]
    picked = [candidates(of, stage) for stage in of.logits]
    for key, pixels in zip(("flips", "next"), zip(*picked, strict=True), strict=True):
        flipped = [flip(of, stage, these) for stage, these in zip(of.logits, pixels, strict=True)]
        for name in FIVE:
            numbers[f"{key}_{name.lower()}"] = np.mean([spearmanr(foretold[name], gain)[0] for gain, foretold in flipped])
        numbers[f"{key}_gains"] = max(len(np.unique(gain.round(12))) for gain, _ in flipped)
    return {key.replace("á", "a"): float(x) for key, x in numbers.items()}


def axes(of: Scene) -> Numbers:
    """Cosine of the change from CE's gradient to focal's and to Lovász's: as it is, and of their parts across CE's alone,
    which do not depend on how large each loss is."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return ((a * b).sum() / (a.norm() * b.norm())).item()

    found = {"raw": [], "across": []}
    for logits in of.logits.values():
        ce, focal, lovasz = (gradient(loss_of(name), logits, of.target) for name in ("CE", "Focal", "Lovász"))
        across = [g - (g * ce).sum() / (ce * ce).sum() * ce for g in (focal, lovasz)]
        found["raw"].append(cosine(focal - ce, lovasz - ce))
        found["across"].append(cosine(*across))
    of_stages = (("first", lambda x: x[0]), ("last", lambda x: x[-1]), ("size", lambda x: max(map(abs, x))))
    return {f"{kind}_{key}": pick(x) for kind, x in found.items() for key, pick in of_stages}


def continuity(runs: Sequence[dict]) -> Numbers:
    """Least squares of the MAE on longest gap and mean IoU, all in standard deviations, rows taken as independent.

    runs: one dict per run and curve: "mae", "longest_gap", "miou"; with a "curve" or other group the means of each group are
    taken off first. Empty, and so open, for fewer than 8 rows or where one of the three, or gap and IoU together, do not vary.
    """
    rows = np.array([[run["longest_gap"], run["miou"], run["mae"]] for run in runs], dtype=float).reshape(-1, 3)
    if not np.isfinite(rows).all():
        raise ValueError("runs must hold finite numbers under mae, longest_gap and miou")
    groups = np.array([run.get("curve", 0) for run in runs])
    for group in np.unique(groups):
        rows[groups == group] -= rows[groups == group].mean(0)
    free = len(rows) - 2 - len(np.unique(groups))
    spread = rows.std(0) if len(rows) else np.zeros(3)
    if len(rows) < 8 or free < 1 or spread.min() < 1e-12 or abs(np.corrcoef(rows[:, :2].T)[0, 1]) > 0.999:
        return {}
    x, y = (rows / spread)[:, :2], rows[:, 2] / spread[2]
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    left = ((y - x @ slopes) ** 2).sum()
    error = np.sqrt(left / free * np.linalg.inv(x.T @ x)[0, 0])
    return {
        "rows": len(rows), "gap": slopes[0], "iou": slopes[1], "gap_errors": slopes[0] / max(error, 1e-12),
        "explained_by_iou": np.corrcoef(x[:, 1], y)[0, 1] ** 2, "explained_by_both": 1 - left / len(rows),
    }  # fmt: skip


# ------------------------------------------------------------------ the claims


@dataclass(frozen=True)
class Test:
    """How a claim is tested. parts: of the numbers, what must hold; measured: a format of the numbers."""

    __test__ = False  # no test of pytest's

    claim: str
    find: Callable[..., Numbers]
    parts: Callable[[Numbers], tuple[bool, ...]]
    measured: str
    shown_by: str

    def judge(self, numbers: Numbers) -> Claim:
        shown_by = f"tests/test_claims.py::{self.shown_by}"
        if not numbers:
            return Claim(self.claim, verdict(()), "Needs the trained runs of the study.", shown_by, {})
        numbers = {key: float(x) for key, x in numbers.items()}
        return Claim(self.claim, verdict(self.parts(numbers)), self.measured.format(**numbers), shown_by, numbers)


TESTS: dict[str, Test] = {
    "factor": Test(
        "Focal multiplies a pixel's loss by (1 - p)^gamma.",
        factor,
        lambda n: (n["error"] < 1e-9,),
        "To {error:.0e}; {loss_at_99:.1e} at p 0.99, gamma 2. The gradient's factor is another: {gradient_at_99:.1e} there, "
        "and above 1 for hard pixels, {gradient_most:.2f} at p {p_most:.2f}.",
        "test_focal_factor; instrument, panel a",
    ),
    "easy": Test(
        "Easy pixels go to about 0.",
        easy,
        lambda n: (n["gradient_at_99"] < 1e-3, n["share_focal"] < 0.01),
        "At p 0.99 a pixel keeps {gradient_at_99:.1e} of its gradient. All pixels of p 0.9 and more together hold at most "
        "{share_focal:.2%} of the page's, with cross-entropy {share_ce:.0%}, label-smoothed {share_sce:.0%}.",
        "test_easy_pixels; instrument, panel b",
    ),
    "unsure": Test(
        "An unsure pixel keeps almost all of its weight under focal.",
        unsure,
        lambda n: (n["loss"] >= 0.9, n["gradient"] >= 0.9),
        "At p 0.5 and gamma 2 it keeps {loss:.0%} of the loss and {gradient:.1%} of the gradient.",
        "test_unsure_pixel; instrument, panel a",
    ),
    "kinds": Test(
        "Focal has no preference between the two kinds of error.",
        kinds,
        lambda n: (n["difference"] < 1e-12, abs(n["ratio_with_alpha"] - 1) < 0.1),
        "Without alpha loss and gradient are the same whichever classes are confused, to within {difference:.1g}. With the "
        "usual alpha of 0.25 a false positive pulls {ratio_with_alpha:.2f} times as hard as a false negative.",
        "test_kinds_of_error",
    ),
    "wrong": Test(
        "Focal under-weights a wrong pixel that looks easy.",
        wrong,
        lambda n: (n["correct"] < 0.5, n["flipped"] < 0.5),
        "With correct labels a wrong pixel has p below 0.5, and keeps {correct:.0%} of the gradient ({loss_at_01:.0%} of the "
        "loss at p 0.01); with labels flipped to what the network says, {flipped:.1%} where it is sure. Of 1% labels flipped "
        "at random the share of the gradient goes from {noise_ce:.0%} to {noise_focal:.0%}.",
        "test_wrong_pixel",
    ),
    "rank": Test(
        "Lovász weights come from rank.",
        rank,
        lambda n: (n["monotone"] < 1e-12 and n["reordered"] > 0.1,),
        "A monotone change of the errors changes the weights by {monotone:.1g}, another order by {reordered:.0%}, other "
        "labels at the same ranks by {relabelled:.0%}.",
        "test_lovasz_rank; instrument, panel c",
    ),
    "confident": Test(
        "Under Lovász a confident correct pixel still carries its rank's charge.",
        confident,
        lambda n: (n["zero_own"] == 0, n["zero_others"] == 0),
        "Exactly 0 weigh {zero_own:.0%} of confident pixels in the list of their own class, and {zero_others:.0%} of "
        "confident paper in the curves' lists, where it ranks below the last pixel of the curve. Of what paper weighs "
        "{at_logits:.1%} at most arrives at the logits.",
        "test_confident_pixel",
    ),
    "smeared": Test(
        "Dice is smeared: every pixel is charged through one ratio.",
        smeared,
        lambda n: (n["dice_least"] == n["dice_most"] == 2 < n["lovasz_most"],),
        "dL/dp of Dice has {dice_most:.0f} values in each class. Lovász has {lovasz_least:.0f} to {lovasz_most:.0f}, of "
        "{pixels:.0f} pixels, and before training, when paper ranks below every curve, {lovasz_untrained:.0f} in a curve's.",
        "test_dice_is_smeared",
    ),
    "boundary": Test(
        "Under Lovász boundary pixels get a larger, sharper push on thin curves.",
        boundary,
        lambda n: (
            n["push_lovasz_1px"] > n["push_lovasz_2px"] > n["push_lovasz_3px"] > 1.5 * n["push_lovasz_blob"],
            all(n[f"page_lovasz_{width}px"] > 1.1 * n[f"page_ce_{width}px"] for width in (1, 2, 3)),
            n["inside_lovasz_3px"] > 1.1 * n["inside_ce_3px"],
        ),
        "A boundary pixel gets {push_lovasz_1px:.1e} at 1 px, {push_lovasz_3px:.1e} at 3 px, {push_lovasz_blob:.1e} on a "
        "blob, and {page_lovasz_1px:.0f}, {page_lovasz_3px:.0f} and {page_lovasz_blob:.0f} times what the rest of the page "
        "gets (cross-entropy {page_ce_1px:.0f}, {page_ce_3px:.0f}, {page_ce_blob:.0f}). But curves of 1 and 2 px have no "
        "interior, and at 3 px the edge gets {inside_lovasz_3px:.2f} times the push inside, with cross-entropy "
        "{inside_ce_3px:.2f}.",
        "test_boundary; instrument, panel d",
    ),
    "alignment": Test(
        "The gradient of Lovász is aligned with IoU.",
        alignment,
        lambda n: (n["masks_lovasz"] >= 0.95, n["flips_lovasz"] >= 0.95),
        "Over perturbed masks the loss has a rank correlation with 1 - mean IoU of {masks_lovasz:.3f} ({varied_lovasz:.2f} "
        "where confidence varies too; Dice {masks_dice:.2f}, focal {masks_focal:.2f}). What the gradient foretells of one "
        "flipped pixel correlates with its gain at {flips_lovasz:.2f}, Dice's at {flips_dice:.2f}; among the pixels next to "
        "flip {next_lovasz:.2f} and {next_dice:.2f}.",
        "test_alignment",
    ),
    "axes": Test(
        "Focal (difficulty) and Lovász (alignment with the metric) are orthogonal axes.",
        axes,
        lambda n: (n["raw_size"] < 0.1, n["across_size"] < 0.1),
        "The cosine between what they change of cross-entropy's gradient goes from {raw_first:.2f} early to {raw_last:.2f} "
        "late in training; that of the parts across this gradient from {across_first:.2f} to {across_last:.2f}.",
        "test_axes",
    ),
    "continuity": Test(
        "The deliverable rewards continuity.",
        continuity,
        lambda n: (n["gap"] > 0 and n["gap_errors"] > 2, n["gap"] > abs(n["iou"])),
        "Over {rows:.0f} curves a standard deviation of the longest gap costs {gap:.2f} of the MAE ({gap_errors:.1f} standard"
        " errors), one of mean IoU {iou:.2f}; IoU alone explains {explained_by_iou:.0%} of the MAE, both "
        "{explained_by_both:.0%}.",
        "test_continuity",
    ),
}


def measure_continuity(runs: Sequence[dict]) -> Claim:
    """The claim that takes trained runs, by itself; ``runs`` as for :func:`continuity`."""
    return TESTS["continuity"].judge(continuity(runs))


def measure(runs: Sequence[dict] | None = None, of: Scene | None = None) -> list[Claim]:
    """The claims, judged. runs: of trained networks, as :func:`continuity` takes them; without them its claim is open.
    of: where to measure, instead of the made-up predictions."""
    of = of or scene()
    return [measure_continuity(runs or ()) if key == "continuity" else test.judge(test.find(of)) for key, test in TESTS.items()]
