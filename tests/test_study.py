"""The study of losses: its table of arms, its runner, what it makes of the results. Tiny pages of a synthetic well."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("lasio", "matplotlib", "monai", "scipy", "tqdm"):
    pytest.importorskip(name)

from benchmarks.digitise import outcomes, report, study, well  # noqa: E402
from benchmarks.digitise.arms import ARMS, Arm  # noqa: E402
from benchmarks.digitise.snapshot import Snapshot  # noqa: E402

TINY = study.Scale("tiny", 64, 96, 32, 4, batch=1, budgets=(2, 3), seeds=2, training=3, synthetic=2, real=3, groups=("main",))
ROOT = Path(__file__).resolve().parents[1]


def synthetic_well():
    depth = 1000 + 0.5 * np.arange(200)
    phase = np.arange(len(well.CURVES))[:, None]
    return well.Well(depth, np.sin(depth / (7 + phase)) + np.sin(depth / (23 + phase)))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    drawn = study.to_draw(TINY, synthetic_well())
    paths = {}
    for name, what in drawn.items():
        paths[name] = folder / f"{name}.npz"
        study.save_pages(paths[name], [study._draw(one, TINY, 0.5) for one in what])
    return paths


@pytest.fixture
def worker(paths):
    """This process as a worker of the study."""
    threads = torch.get_num_threads()
    study.start_worker(paths, 1)
    yield
    torch.set_num_threads(threads)
    study._sets.clear()


def run_of(arm, seed=0, steps=2):
    return study.Run(arm, ARMS[arm].settings, seed, steps, TINY)


# ---------------------------------------------------------------------- arms


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_an_arm_and_its_peer_are_one_loss(arm):
    """Value and gradient: to float32's accuracy, and a factor where the peer's mean is over something else."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 12, 12))
    found = []
    for loss in filter(None, (arm.loss, arm.peer)):
        for done in (0.0, 0.9):
            logits = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
            value = loss(logits, target, done)
            value.backward()
            assert value.shape == () and value.isfinite() and logits.grad.abs().sum() > 0
            found.append((value.detach(), logits.grad))
    if arm.peer:
        for (value, gradient), (theirs, their_gradient) in zip(found[:2], found[2:], strict=True):
            factor = 3 if arm.name == "Focal" else 1  # kornia's mean is over classes too
            torch.testing.assert_close(factor * theirs, value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(factor * their_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_half_and_half_changes_at_half_time():
    arm, logits = ARMS["CE then Lovász"], torch.randn(1, 3, 8, 8)
    target = torch.randint(0, 3, (1, 8, 8))
    for done, name in ((0.0, "CE"), (0.49, "CE"), (0.5, "Lovász"), (0.99, "Lovász")):
        assert arm.loss(logits, target, done) == ARMS[name].loss(logits, target, done)


def test_the_five_and_their_groups():
    assert [arm.name for arm in ARMS.values() if arm.group == "main"] == list(report.PUBLISHED)
    assert {arm.group for arm in ARMS.values()} == {"main", "extra", "sensitivity"}
    assert not [arm.name for arm in ARMS.values() if bool(arm.peer) != bool(arm.peer_name)]


# ---------------------------------------------------------------------- runs


def test_a_key_is_the_configuration():
    run = run_of("Dice")
    same = replace(run, scale=replace(TINY, name="other", budgets=(1,), seeds=9, groups=("extra",)))
    assert run.key == same.key
    changed = [
        replace(run, arm="Focal"), replace(run, settings="gamma 3"), replace(run, seed=1), replace(run, steps=9),
        replace(run, level=0.1), replace(run, version=0), replace(run, scale=replace(TINY, height=96)),
        replace(run, scale=replace(TINY, training=4)),
    ]  # fmt: skip
    assert len({run.key, *(other.key for other in changed)}) == len(changed) + 1


def test_runs_compare_arms_early():
    runs = study.runs_of(study.SCALES["cpu"])
    assert len(set(runs)) == len(runs) == len({run.key for run in runs})
    assert [run.arm for run in runs[:5]] == list(report.PUBLISHED) and {run.seed for run in runs[:10]} == {0}
    for group, count in (("main", 5 * 3 * 2), ("extra", 6 * 3 * 2), ("sensitivity", 5)):
        assert sum(ARMS[run.arm].group == group for run in runs) == count


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_page_that_the_network_cannot_halve(side):
    with pytest.raises(ValueError, match=f"{side} is 100, expected a multiple of 32"):
        replace(TINY, **{side: 100})


def test_pages_have_seeds_of_their_own():
    drawn = study.to_draw(TINY, synthetic_well())
    assert [len(what) for what in drawn.values()] == [3, 2, 3]
    pages = [study._draw(one, TINY, 0.5) for what in drawn.values() for one in what]
    assert len({page.image.tobytes() for page in pages}) == len(pages)
    again = study._draw(drawn["real"][2], TINY, 0.5)
    np.testing.assert_array_equal(again.image, pages[-1].image)
    np.testing.assert_array_equal(again.curves, study.real_values(synthetic_well(), TINY)[2])


def test_a_well_that_is_too_short():
    short = synthetic_well()
    short = well.Well(short.depth[:30], short.values[:, :30])
    with pytest.raises(well.WellUnavailable, match="30 rows with every curve, 0 windows: too few for 3 test pages"):
        study.to_draw(TINY, short)


def test_one_run(worker, tmp_path):
    run = run_of("Lovász", steps=8)
    result = study.execute(run, tmp_path, "cpu")
    assert study.kept([run], tmp_path)[run] == json.loads(json.dumps(result)), "what is kept is what was found"
    assert result["status"] == "done" and [step for step, *_ in result["learning"]] == list(range(1, 9))
    for name, pages in (("synthetic", 2), ("real", 3)):
        judged = result["sets"][name]
        assert np.shape(judged["confusion"]) == (pages, 3, 3) and np.sum(judged["confusion"]) == pages * 64 * 96
        for value in ("mae", "pchip", "coverage", "longest_gap"):
            assert np.shape(judged[value]) == (pages, 2)
    clock = result["clock"]
    assert 0 < clock["loss_share"] < 1 and clock["peer_ms"] > 0 and clock["step_ms"] > clock["loss_ms"]


def test_seeds_begin_alike_for_every_arm(worker, tmp_path, monkeypatch):
    """The same weights and the same pages in the same order, whatever the loss."""
    seen = {}
    for name in ("Dice", "Focal"):
        batches = seen.setdefault(name, [])

        def loss(logits, target, done, batches=batches):
            batches.append((logits.detach().clone(), target.clone()))
            return 0 * logits.sum()  # nothing is learned: the weights of later steps are the same too, but for their decay

        monkeypatch.setitem(ARMS, name, Arm(name, "main", "", loss))
        study.execute(study.Run(name, "", 0, 3, TINY), tmp_path, "cpu")
    for one, other in zip(seen["Dice"], seen["Focal"], strict=True):
        for first, second in zip(one, other, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_arm_that_diverges_is_kept_as_that(worker, tmp_path, monkeypatch):
    bad = Arm("Dice", "main", "", lambda logits, target, done: logits.sum() * (float("nan") if done > 0 else 1.0))
    monkeypatch.setitem(ARMS, "Dice", bad)
    run = run_of("Dice")
    result = study.execute(run, tmp_path, "cpu")
    assert result["status"] == "diverged" and "not finite at step 2 of 2" in result["message"] and "sets" not in result
    assert study.kept([run], tmp_path)[run]["status"] == "diverged"


def test_a_damaged_result_is_not_there(tmp_path):
    run = run_of("Dice")
    run.path(tmp_path).write_text('{"status": "do')
    assert study.kept([run], tmp_path) == {}


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory):
    """A study of the five arms in one worker, with an arm that does not exist among its runs."""
    folder = tmp_path_factory.mktemp("study")
    runs = study.runs_of(TINY)
    broken = study.Run("no such arm", "", 0, 2, TINY)
    results = dict(study.execute_all([broken, *runs], paths, folder, "cpu", 1))
    return folder, runs, broken, results


def test_a_run_that_fails_does_not_stop_the_others(finished):
    folder, runs, broken, results = finished
    assert results[broken]["status"] == "failed" and "no such arm" in results[broken]["message"]
    assert {results[run]["status"] for run in runs} == {"done"}
    assert set(study.kept([broken, *runs], folder)) == set(runs), "a failure is tried again, the rest is not"


def test_finished_runs_are_not_repeated(finished, paths, monkeypatch):
    folder, runs, _, results = finished
    asked = []
    monkeypatch.setattr(study, "execute_all", lambda left, *_: asked.extend(left) or iter(()))
    again = study.study(TINY, paths, folder, "cpu", 1)
    assert asked == [] and list(again) == runs
    assert again == {run: json.loads(json.dumps(results[run])) for run in runs}


def test_goes_on_after_a_kill(paths, tmp_path):
    """Killed after its first results; the same command computes the others alone, and no worker is left behind."""
    script = tmp_path / "go.py"
    script.write_text(
        "from pathlib import Path\n"
        "from benchmarks.digitise import study\n"
        f"scale = study.Scale(**{TINY.__dict__!r})\n"
        f"paths = {{name: Path(path) for name, path in { ({name: str(path) for name, path in paths.items()})!r}.items()}}\n"
        "if __name__ == '__main__':\n"
        f"    study.study(scale, paths, Path({str(tmp_path)!r}), 'cpu', 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    first = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.json"))) < 2:
            assert first.poll() is None and time.monotonic() < deadline, "no result came"
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    deadline = time.monotonic() + 60
    while any(_alive(int(child)) for child in children):
        assert time.monotonic() < deadline, "a worker outlives the study"
        time.sleep(0.05)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 2 <= len(before) < len(study.runs_of(TINY))
    subprocess.run([sys.executable, script], env=environment, check=True, stderr=subprocess.DEVNULL, timeout=300)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(after) == len(study.runs_of(TINY)) and before.items() <= after.items()


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "problem, code, words",
    [
        (KeyboardInterrupt(), 130, "interrupted; 0 of 71 runs are finished"),
        (BrokenProcessPool(), 1, "a worker was killed"),
        (well.WellUnavailable("no well here"), 1, "study: no well here"),
    ],
)
def test_what_an_interruption_says(monkeypatch, capsys, tmp_path, problem, code, words):
    def stop(*_):
        raise problem

    monkeypatch.setattr(study, "fetch_wheel", lambda: None)
    monkeypatch.setattr(study, "read_well", stop)
    assert study.main(["--scale=cpu", f"--folder={tmp_path}"]) == code
    assert words in capsys.readouterr().err


def test_quick_is_an_environment_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("QUICK", "1")
    options = study.parse([f"--folder={tmp_path}"])
    assert options.scale == "quick" and options.out == tmp_path, "a quick run does not overwrite the results"
    monkeypatch.setenv("QUICK", "0")
    assert study.parse([]).scale != "quick"
    with pytest.raises(SystemExit):
        study.parse(["--workers=-1"])


# ---------------------------------------------------------------------- outcomes


def outcome(rng, seeds=3, pages=40, shift=0.0):
    noise = rng.random((1, pages, 2)) * 0.1  # of the page: what pairing takes out
    mae = noise + shift * (0.9 + 0.2 * rng.random((1, pages, 1))) + 0.001 * rng.random((seeds, pages, 2))
    confusion = rng.integers(1, 50, (seeds, pages, 3, 3))
    return outcomes.Outcome(confusion, mae, mae, np.ones_like(mae), np.zeros_like(mae))


def test_intervals_hold_their_means():
    of = outcome(np.random.default_rng(0))
    for curve in (None, 0, 1):
        found = outcomes.mae_interval(of, curve)
        expected = of.mae.mean() if curve is None else of.mae[..., curve].mean()
        assert found.low < found.value < found.high and found.value == pytest.approx(expected)
        # of pages: their standard error, of seeds: far less
        error = of.mae.mean(axis=(0, 2)).std() if curve is None else of.mae[..., curve].mean(axis=0).std()
        assert found.high - found.low == pytest.approx(2 * 1.96 * error / np.sqrt(40), rel=0.15)
    found = outcomes.miou_interval(of)
    assert found.low < found.value < found.high


def test_paired_differences_see_what_single_intervals_do_not():
    one, other = outcome(np.random.default_rng(0)), outcome(np.random.default_rng(0), shift=0.005)
    single = outcomes.mae_interval(one), outcomes.mae_interval(other)
    assert single[0].high > single[1].low, "they overlap"
    miou, mae = outcomes.difference(other, one)
    assert 0.004 < mae.low < mae.value < mae.high < 0.006 and mae.value == pytest.approx(0.005, rel=0.05)
    assert (miou.value, miou.low, miou.high) == (0, 0, 0), "the same masks"
    assert outcomes.difference(one, outcome(np.random.default_rng(0), seeds=2)) is None


def test_regression_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    of = outcome(rng)
    gap, overlap = rng.random(of.mae.shape), of.page_ious()
    of = replace(
        of, longest_gap=gap, mae=0.3 * (gap - gap.mean()) / gap.std() - 0.1 * (overlap - overlap.mean()) / overlap.std()
    )
    found = outcomes.regress([of])
    assert found.n == of.mae.size and found.r2[0] == pytest.approx(1)
    assert found.slopes[0] / found.slopes[1] == pytest.approx(-3)
    assert found.r2[1] > 0.8 > 0.2 > found.r2[2]
    assert outcomes.regress([]) is None and outcomes.regress([replace(of, longest_gap=0 * gap)]) is None


def test_results_are_sorted_by_seed(finished):
    results = finished[-1]
    found = outcomes.outcomes(results.values(), "real")
    assert set(found) == {(arm, steps) for arm in report.PUBLISHED for steps in (2, 3)}, "without the one that failed"
    for (arm, steps), of in found.items():
        for seed in range(2):
            run = run_of(arm, seed, steps)
            np.testing.assert_array_equal(of.mae[seed], results[run]["sets"]["real"]["mae"])
    rows = outcomes.by_run_and_curve(results.values(), "real")
    assert len(rows) == 2 * (len(results) - 1) and all(0 <= row["miou"] <= 1 for row in rows)
    assert {row["curve"] for row in rows} == {0, 1}


# ---------------------------------------------------------------------- report


def test_report(finished, paths, tmp_path, monkeypatch):
    folder, _, _, results = finished
    sets = {name: study.load_pages(path) for name, path in paths.items()}
    lost = run_of("Focal", 1, 3)
    partly = {
        run: {**result, "status": "diverged", "message": "not finite"} if run == lost else result
        for run, result in results.items()
    }
    path = report.write_report(partly, TINY, folder, tmp_path, "cpu", sets, "Set beforehand.")
    text = path.read_text()
    assert "19 of 21 runs finished" in text and "| Focal | 1 | 3 | diverged | not finite |" in text
    assert "| no such arm | 0 | 2 | failed | KeyError" in text
    published = next(line for line in text.splitlines() if line.startswith("| Tversky | ") and line.count("|") == 6)
    assert published.endswith("| 0.0277 |  |"), "a cell without a measurement is empty"
    for picture in ("masks-and-curves", "learning", "regression", "curves"):
        assert f"(study-{picture}.png)" in text
        assert (tmp_path / f"study-{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_nothing(paths, tmp_path):
    """Every run diverged: still a report, with empty cells."""
    sets = {name: study.load_pages(path) for name, path in paths.items()}
    results = {
        run: {"run": asdict(run), "status": "diverged", "message": "at once", "learning": []} for run in study.runs_of(TINY)
    }
    text = report.write_report(results, TINY, tmp_path, tmp_path, "cpu", sets, "").read_text()
    assert "0 of 20 runs finished" in text and "| Dice |  |  | 0.0367 | 0.0774 |" in text


def test_snapshot_is_where_both_curves_are(paths, tmp_path):
    of = study.load_pages(paths["real"])
    place = np.arange(64 * 96).reshape(64, 96)
    logits = np.stack([place // 96, place % 96, np.zeros_like(place)]).astype(np.float16)
    Snapshot.of_page(logits, of, 1, (32, 40)).write(tmp_path / "snapshot.npz")
    found = Snapshot.read(tmp_path / "snapshot.npz")
    assert found.image.shape == found.target.shape == (32, 40) and found.logits.shape == (3, 32, 40)
    row, column = found.logits[:2, 0, 0].astype(int)
    mask = of.pages.masks[1].numpy()
    np.testing.assert_array_equal(found.target, mask[row : row + 32, column : column + 40])
    np.testing.assert_array_equal(found.logits, logits[:, row : row + 32, column : column + 40])
    least = min((found.target == label).sum() for label in (1, 2))
    boxes = np.lib.stride_tricks.sliding_window_view(mask, (32, 40))
    assert least == max(min((box == 1).sum(), (box == 2).sum()) for box in boxes.reshape(-1, 32, 40)) > 0


def test_conclusions_are_of_one_study(finished, tmp_path, monkeypatch):
    _, _, _, results = finished
    written = tmp_path / "conclusions.md"
    monkeypatch.setattr(report, "CONCLUSIONS", written)
    assert report.fingerprint(results) in report.conclusions(results)
    written.write_text(f"<!-- {report.fingerprint(results)} -->\nTake Tversky.\n")
    assert report.conclusions(results) == "Take Tversky."
    fewer = dict(list(results.items())[:-1])
    assert "Nobody has written conclusions" in report.conclusions(fewer)
