"""The twelve claims: what is measured, by another way where there is one; what turns each verdict; and the figure."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("matplotlib", "monai", "scipy"):
    pytest.importorskip(name)

import veerloss  # noqa: E402
from benchmarks.digitise import claims, gradients, instrument  # noqa: E402
from benchmarks.digitise.snapshot import Snapshot  # noqa: E402

EXPECTED = {
    "factor": "holds", "easy": "holds", "unsure": "false", "kinds": "half true", "wrong": "half true", "rank": "holds",
    "confident": "half true", "smeared": "holds", "boundary": "half true", "alignment": "half true", "axes": "false",
    "continuity": "open",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scene():
    return gradients.scene()


@pytest.fixture(scope="module")
def found():
    """The claims by the names of their tests."""
    return dict(zip(claims.TESTS, claims.measure(), strict=True))


def runs(gap=0.0, iou=0.0, noise=0.1, count=40, seed=0):
    """Made-up runs whose MAE depends on the longest gap and on the mean IoU as told."""
    random = np.random.default_rng(seed)
    x, y, rest = random.standard_normal((3, count))
    mae = 0.05 + 0.01 * (gap * x + iou * y + noise * rest)
    return [{"mae": m, "longest_gap": 20 + 5 * a, "miou": 0.6 + 0.1 * b} for a, b, m in zip(x, y, mae, strict=True)]


# ------------------------------------------------------------------ verdicts


def test_twelve_claims_each_with_its_verdict_numbers_and_proof(found):
    assert {key: claim.verdict for key, claim in found.items()} == EXPECTED
    assert len(EXPECTED) == 12
    for claim in found.values():
        assert claim.measured and "nan" not in claim.measured and "{" not in claim.measured
        file, test = claim.shown_by.split(";")[0].split("::")
        assert file == f"tests/{Path(__file__).name}" and callable(globals()[test])
        assert all(isinstance(x, float) and math.isfinite(x) for x in claim.numbers.values())


def test_the_same_numbers_every_time(found):
    assert claims.measure() == list(found.values())


@pytest.mark.parametrize(
    ("parts", "expected"),
    [((True,), "holds"), ((True, True), "holds"), ((True, False), "half true"), ((False, False), "false"), ((), "open")],
)
def test_verdict(parts, expected):
    assert claims.verdict(parts) == expected


@pytest.mark.parametrize(
    ("key", "changed", "expected"),
    [
        ("factor", {"error": 0.01}, "false"),
        ("easy", {"share_focal": 0.2}, "half true"),
        ("easy", {"share_focal": 0.2, "gradient_at_99": 0.5}, "false"),
        ("unsure", {"gradient": 0.95}, "half true"),
        ("unsure", {"gradient": 0.95, "loss": 0.95}, "holds"),
        ("kinds", {"ratio_with_alpha": 1.0}, "holds"),
        ("kinds", {"difference": 0.1}, "false"),
        ("wrong", {"correct": 0.1}, "holds"),
        ("wrong", {"flipped": 0.9}, "false"),
        ("rank", {"monotone": 0.01}, "false"),
        ("rank", {"reordered": 0.0}, "false"),
        ("confident", {"zero_others": 0.0}, "holds"),
        ("confident", {"zero_own": 0.1}, "false"),
        ("smeared", {"dice_most": 700.0}, "false"),
        ("smeared", {"lovasz_most": 2.0}, "false"),
        ("boundary", {"inside_lovasz_3px": 9.0}, "holds"),
        ("boundary", {"push_lovasz_blob": 1.0, "page_lovasz_2px": 1.0}, "false"),
        ("alignment", {"flips_lovasz": 0.99}, "holds"),
        ("alignment", {"masks_lovasz": 0.5}, "false"),
        ("axes", {"across_size": 0.05}, "half true"),
        ("axes", {"across_size": 0.05, "raw_size": 0.05}, "holds"),
    ],
)
def test_other_numbers_turn_the_verdict(found, key, changed, expected):
    numbers = found[key].numbers
    assert changed.keys() <= numbers.keys()
    assert claims.TESTS[key].judge(numbers | changed).verdict == expected != found[key].verdict


# ------------------------------------------------------------------ claim by claim


def test_focal_factor(found):
    """Against the closed form: d/dp of (1 - p)^g log p, times p (1 - p), over that of log p."""
    numbers = found["factor"].numbers
    assert numbers["loss_at_99"] == pytest.approx(1e-4, rel=1e-9)
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for gamma in (0.5, 2.0, 5.0):
        loss, slope = gradients.focal_ratio(p, gamma)
        torch.testing.assert_close(loss, (1 - p) ** gamma)
        torch.testing.assert_close(slope, (1 - p) ** gamma * (1 - gamma * p * p.log() / (1 - p)))
    assert numbers["gradient_at_99"] == pytest.approx(1e-4 * (1 - 2 * 99 * math.log(0.99)), rel=1e-6)
    assert 1.2 < numbers["gradient_most"] < 1.25 and 0.05 < numbers["p_most"] < 0.2


def test_easy_pixels(found, scene):
    """Against the closed form: the classes of a pixel get 2 (1 - p) / P of cross-entropy's gradient."""
    numbers, shares = found["easy"].numbers, []
    for stage in scene.logits:
        p = scene.confidence(stage).flatten()
        shares.append(((1 - p)[p >= 0.9].sum() / (1 - p).sum()).item())
    assert numbers["share_ce"] == pytest.approx(max(shares), rel=1e-9)
    assert numbers["share_focal"] < 0.005 < 0.05 < numbers["share_ce"] < 0.5 < numbers["share_sce"]


def test_unsure_pixel(found):
    numbers = found["unsure"].numbers
    assert numbers["loss"] == pytest.approx(0.25, rel=1e-12)
    assert numbers["gradient"] == pytest.approx(0.25 * (1 + 2 * math.log(2)), rel=1e-12)  # 60%


def test_kinds_of_error(found):
    assert found["kinds"].numbers["difference"] < 1e-12
    assert found["kinds"].numbers["ratio_with_alpha"] == pytest.approx(0.75 / 0.25, rel=1e-9)


def test_wrong_pixel(found, scene):
    numbers = found["wrong"].numbers
    assert numbers["loss_at_01"] == pytest.approx(0.99**2, rel=1e-9)
    p = scene.logits["late"].softmax(1)
    missed = p.argmax(1) != scene.target
    assert missed.sum() > 100 and scene.confidence("late")[missed].max() < 0.5
    assert numbers["gradient_least"] == pytest.approx(0.25 * (1 + 2 * math.log(2)), rel=1e-9)
    assert numbers["gradient_least"] < numbers["correct"], "no wrong pixel keeps less than that"
    assert numbers["flipped"] < 0.03, "at p 0.9 focal keeps 2.9% of the gradient"
    assert numbers["noise_focal"] > numbers["noise_ce"] + 0.05


def test_lovasz_rank(found):
    numbers = found["rank"].numbers
    assert numbers["monotone"] == 0
    assert numbers["reordered"] > 0.5 and numbers["relabelled"] > 0.1


def test_confident_pixel(found):
    """Two classes of four pixels, by hand: weights 1 / (G + B) of foreground, (G - F) / ((G + B)(G + B + 1)) of background."""
    p = torch.tensor([0.6, 0.5, 0.2, 0.1], dtype=torch.float64)  # of class 1, whose foreground is the first pixel
    logits, target = torch.stack([1 - p, p]).log()[None], torch.tensor([[1, 0, 0, 0]])
    weights = gradients.lovasz_weights(logits, target)[0]
    torch.testing.assert_close(weights[1], torch.tensor([1 / 2, 1 / 2, 0, 0], dtype=torch.float64))
    # class 0, whose foreground is the rest: its largest error, 0.5, comes before the 0.4 of the background
    torch.testing.assert_close(weights[0], torch.tensor([1 / 6, 1 / 3, 1 / 4, 1 / 4], dtype=torch.float64))
    numbers = found["confident"].numbers
    assert numbers["zero_own"] == 0 and 0.9 < numbers["zero_others"] < 1
    assert numbers["at_logits"] < 0.05


def test_dice_is_smeared(found, scene):
    """MONAI's loss of probabilities, whose gradient is counted, is the arm's of logits."""
    from monai.losses import DiceLoss

    logits = scene.logits["middle"]
    by_probabilities = DiceLoss(to_onehot_y=True)(logits.softmax(1), scene.target[:, None])
    torch.testing.assert_close(by_probabilities, gradients.loss_of("Dice")(logits, scene.target))
    numbers = found["smeared"].numbers
    assert numbers["dice_least"] == numbers["dice_most"] == numbers["lovasz_untrained"] == 2
    assert 100 < numbers["lovasz_least"] <= numbers["lovasz_most"] < numbers["pixels"] / 5


@pytest.mark.parametrize("width", [1, 2, 3])
def test_strokes_have_their_width(width):
    assert set(claims.stroke(width).sum(axis=0)) == {width}


def test_boundary(found):
    numbers = found["boundary"].numbers
    larger = [numbers[f"push_lovasz_{shape}"] for shape in ("1px", "2px", "3px", "blob")]
    assert larger == sorted(larger, reverse=True) and larger[0] > 3 * larger[-1]
    of_ce = [numbers[f"push_ce_{shape}"] for shape in ("1px", "2px", "3px", "blob")]
    assert max(of_ce) < 1.1 * min(of_ce), "cross-entropy knows no shapes"
    assert not {"inside_lovasz_1px", "inside_lovasz_2px"} & numbers.keys(), "thin curves are boundary all through"
    assert numbers["inside_lovasz_3px"] < numbers["inside_ce_3px"] and numbers["inside_lovasz_blob"] > 5


def test_alignment(found, scene):
    """Of a mask itself Lovász is 1 - mean IoU; and what a gradient foretells is what a small step of the loss does."""
    numbers = found["alignment"].numbers
    hard = torch.from_numpy(claims.perturbed(scene.mask, 4))
    one_hot = torch.nn.functional.one_hot(hard.long(), 3).movedim(-1, 0)[None].double()
    jaccard = 1 - gradients.mean_iou(hard.numpy(), scene.mask)
    loss = veerloss.lovasz_softmax_loss(one_hot, scene.target, from_logits=False)
    assert loss.item() == pytest.approx(jaccard, rel=1e-9) and jaccard > 0.01
    assert numbers["masks_lovasz"] > numbers["masks_dice"] > numbers["masks_focal"]
    assert numbers["flips_lovasz"] < numbers["flips_dice"] and numbers["next_lovasz"] > numbers["next_dice"]
    assert numbers["flips_gains"] <= 12, "a flipped pixel's IoU is charged through one ratio, too"


@pytest.mark.parametrize("arm", gradients.FIVE)
def test_what_a_gradient_foretells_is_a_small_step_of_the_loss(arm, scene):
    stage, step = "middle", 1e-6
    p = scene.logits[stage].softmax(1)
    said = p.argmax(1).flatten()
    labels = scene.target.flatten()
    for pixel in ((said != labels).nonzero()[0].item(), ((said == labels) & (labels > 0)).nonzero()[0].item()):
        gain, foretold = claims.flip(scene, stage, np.array([pixel]))
        row, column = divmod(pixel, scene.mask.shape[1])
        to = labels[pixel] if said[pixel] != labels[pixel] else p[0, :, row, column].argsort()[-2]
        moved = p.clone()
        moved[0, :, row, column] *= 1 - step
        moved[0, to, row, column] += step
        loss = gradients.loss_of(arm)
        slope = (loss(moved.log(), scene.target) - loss(p.log(), scene.target)).item() / step
        assert -foretold[arm][0] == pytest.approx(slope, rel=1e-3, abs=1e-8)
        flipped = said.clone()
        flipped[pixel] = to
        shape = scene.mask.shape
        before, after = (gradients.mean_iou(x.reshape(shape).numpy(), scene.mask) for x in (said, flipped))
        assert gain[0] == after - before != 0


def test_axes(found):
    numbers = found["axes"].numbers
    assert numbers["raw_last"] < numbers["raw_first"] < -0.1
    assert numbers["across_last"] < -0.5 and abs(numbers["across_first"]) < 0.2
    assert numbers["raw_size"] == -numbers["raw_last"]


@pytest.mark.parametrize(
    ("gap", "iou", "expected"), [(1, 0, "holds"), (1, -2, "half true"), (0, -1, "false"), (-1, 0, "false"), (1, -0.5, "holds")]
)
def test_continuity(gap, iou, expected):
    claim = claims.measure_continuity(runs(gap, iou))
    assert claim.verdict == expected
    assert claim.numbers["gap"] == pytest.approx(gap / math.hypot(gap, iou, 0.1), abs=0.2)
    assert claim.numbers["rows"] == 40


@pytest.mark.parametrize("few", [[], runs(1)[:7], [run | {"miou": 0.5} for run in runs(1)]])
def test_continuity_is_open_without_enough_to_tell(few):
    assert claims.measure_continuity(few).verdict == "open"


def test_continuity_within_curves():
    """Of a curve that is harder in all respects only what happens within it counts."""
    easy, hard = runs(0, -1, seed=1), runs(0, -1, seed=2)
    both = [run | {"curve": 1} for run in easy]
    both += [{"curve": 2, "mae": r["mae"] + 1, "longest_gap": r["longest_gap"] + 100, "miou": r["miou"]} for r in hard]
    assert claims.measure_continuity(both).verdict == "false"
    assert claims.measure_continuity([run | {"curve": 0} for run in both]).verdict == "holds"


def test_continuity_wants_finite_numbers():
    with pytest.raises(ValueError, match="finite numbers under mae, longest_gap and miou"):
        claims.measure_continuity([*runs(1), {"mae": math.nan, "longest_gap": 1, "miou": 0.5}])


# ------------------------------------------------------------------ the figure


@pytest.fixture
def snapshot(tmp_path):
    random = np.random.default_rng(0)
    target = np.zeros((24, 32), dtype=np.uint8)
    target[8], target[16] = 1, 2
    logits = 3 * (target == np.arange(3)[:, None, None]) + random.standard_normal((3, 24, 32))
    path = tmp_path / "snapshot.npz"
    np.savez(path, image=random.random((24, 32), dtype=np.float32), target=target, logits=logits.astype(np.float16))
    return path


def test_figure_is_drawn(snapshot, tmp_path):
    picture = tmp_path / "instrument.png"
    instrument.draw(snapshot, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000


def test_what_the_figure_shows(snapshot):
    of = Snapshot.read(snapshot)
    pushed, confidence = instrument.pushes(of), instrument.confidence_of(of)
    assert pushed.keys() == {*gradients.FIVE, "CE"} == instrument.STYLES.keys()
    ce = 2 * (1 - confidence)  # over classes, times the pixels
    np.testing.assert_allclose(pushed["CE"].ravel(), ce / ce.mean(), rtol=1e-9)
    for each in pushed.values():
        assert each.shape == (24, 32) and each.mean() == pytest.approx(1)
        share = instrument.by_rank(each, confidence)
        assert share[-1] == pytest.approx(1) and (np.diff(share) >= 0).all()
    first = ce.max() / ce.sum()
    assert instrument.by_rank(pushed["CE"], confidence)[0] == pytest.approx(first)


def test_mean_by_confidence():
    confidence = np.array([0.05] * 5 + [0.5] * 6 + [0.95] * 4)
    pushed = np.arange(15.0).reshape(3, 5)
    np.testing.assert_allclose(
        instrument.by_confidence(pushed, confidence, np.array([0.01, 0.1, 0.4, 0.6, 0.99])), [2, np.nan, 7.5, np.nan]
    )
