"""The benchmarks compare like with like, survive what is missing, and measure what they say."""

import json
import sys
import time

import pytest
import torch

from benchmarks import accuracy, coming_from, gpu, gpu_report, gpu_timing, memory, peers, scaling, suite, timing
from benchmarks.__main__ import main
from benchmarks.inputs import Inputs

# One image with every class present, where all conventions for averaging differ by a factor only.
SMALL = {task: Inputs(task, (1, 24, 24) if task == "lovasz_hinge" else (1, 5, 24, 24)) for task in peers.TASKS}
CONTESTANTS = [
    (task, name)
    for task, losses in peers.TASKS.items()
    for name in losses()
    if "compile" not in name and name != "torch cross_entropy"
]


@pytest.mark.parametrize(("task", "name"), CONTESTANTS)
def test_contestants_compute_one_loss(task, name):
    """Every gradient points the way of the first contestant's, ours."""
    losses = peers.TASKS[task]()
    logits, target = SMALL[task].make()
    ours = accuracy.gradient(next(iter(losses.values())), logits, target)
    try:
        theirs = accuracy.gradient(losses[name], logits, target)
    except peers.Missing as missing:
        pytest.skip(str(missing))
    # 1e-3: the peers' float32 Jaccard differences are off by about 1e-5 at this size.
    torch.testing.assert_close(theirs / theirs.norm(), ours / ours.norm(), atol=1e-3, rtol=0)


def test_coming_from_runs(capsys):
    """Of what needs no peer."""
    assert coming_from.main(["--quick", "--filter", "lovasz_losses"]) == 0
    assert capsys.readouterr().out.count("| lovasz_losses | lovasz_softmax |") == 3
    assert len(coming_from.bars(True)) == 5
    for case in coming_from.CASES[:3]:
        logits, target = coming_from.made(case.inputs, True)
        ours, theirs = (accuracy.gradient(case.loss(side), logits, target) for side in ("ours", "theirs"))
        torch.testing.assert_close(ours, theirs, atol=1e-3 * ours.abs().max().item(), rtol=1e-2)


def test_a_peer_that_cannot_run_is_a_result():
    """A missing package and an exception become words in the table; the others are timed."""

    def broken():
        raise RuntimeError

    missing = peers._peer("no-such-distribution", "no_such_module", lambda module: module)
    steps = {"missing": lambda: missing(None, None), "broken": broken, "works": lambda: None}
    results = timing.interleave(steps, min_rounds=3, budget=0.0)
    assert results["missing"] == "not installed"
    assert results["broken"] == "fails: RuntimeError"
    assert len(results["works"]) == 3


def test_rounds_are_interleaved():
    """A B A B, after one warm-up of each."""
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timing.interleave(steps, min_rounds=2, budget=0.0)
    assert "".join(calls) == "ababab"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("copies", [0, 3])
def test_memory_sees_what_is_touched(monkeypatch, copies):
    """A loss that fills `copies` buffers as large as the logits is charged for just these."""

    def hungry(logits, target):
        held = [torch.full_like(logits, 1.0) for _ in range(copies)]
        return (logits * 0.0).sum() + 0.0 * len(held)

    monkeypatch.setitem(peers.TASKS, "softmax_focal", lambda: {"hungry": hungry})
    monkeypatch.setattr(memory, "THREADS", torch.get_num_threads())
    # The peak is in the forward pass: the buffers and `logits * 0.0`, as large as the gradient.
    extra = memory.child("softmax_focal", "hungry", 512)
    assert extra == pytest.approx(copies, abs=0.1)


def test_quick_run_writes_json_and_markdown(tmp_path):
    """One filtered part from the command line to both files; partial runs need --output."""
    output = tmp_path / "cpu"
    arguments = ["--quick", "--only", "throughput", "--filter", "softmax_focal [2, 5"]
    threads = torch.get_num_threads()
    try:
        assert main([*arguments, "--threads", str(threads), "--output", str(output)]) == 0
    finally:
        torch.set_num_threads(threads)
    results = json.loads(output.with_suffix(".json").read_text())
    rows = results["throughput"]
    assert rows[0]["contestant"] == "veerloss"
    assert rows[0]["status"] == "ok"
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["p20_ms"] <= rows[0]["median_ms"] <= rows[0]["p80_ms"]
    assert "| veerloss |" in output.with_suffix(".md").read_text()


def test_scaling_runs_and_draws(tmp_path):
    """A row for every size and contestant, and the plot."""
    threads = torch.get_num_threads()
    try:
        main(["--quick", "--only", "scaling", "--threads", str(threads), "--output", str(tmp_path / "cpu")])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "cpu.json").read_text())["scaling"]
    assert len(rows) == len(scaling.sides(True)) * len(scaling.CONTESTANTS)
    assert all(row["ns"] > 0 for row in rows)
    assert (tmp_path / "cpu-scaling.png").stat().st_size > 1000


def test_accuracy_suite_runs_and_draws(tmp_path):
    """On the smallest size of every kind of case."""
    assert suite.main(["--most", "1e3", "--filter", "t", "--output", str(tmp_path / "accuracy")]) == 0
    results = json.loads((tmp_path / "accuracy.json").read_text())
    ours = [row for row in results["rows"] if row["contestant"] == "histogram"]
    assert {row["case"] for row in ours} >= {"hinge, trained, rare class 0.01", "ties, logits in steps of 1/4"}
    for row in ours:
        assert row["distance"] <= row["certificate"] + 1e-9
        assert row["l2"] <= 1e-3 and row["loss"] <= 1e-5
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert "| hinge, trained" in (tmp_path / "accuracy.md").read_text()


def test_suite_s_truth_of_ties_is_a_mean_of_orders():
    """Among equal errors every pixel of a kind has one weight, and they add up to the group's step."""
    errors = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.1], dtype=torch.float64)
    foreground = torch.tensor([True, False, False, False, True])
    weights = suite.exact_weights(errors, foreground, ties=True)
    assert weights[2] == weights[3] and weights.sum().item() == pytest.approx(1.0)
    first, last = (suite.exact_weights(errors + e * foreground.double(), foreground, ties=False) for e in (1e-6, -1e-6))
    assert weights[0].item() == pytest.approx((first[0] + last[0]).item() / 2)


def test_gpu_benchmark_runs_on_the_cpu(tmp_path):
    """Every case, with what needs a GPU or is missing as words; a verdict for every bar."""
    assert gpu.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu.test")]) == 0
    results = json.loads((tmp_path / "gpu.test.json").read_text())
    assert results["left_out"] == []
    assert {row["workload"] for row in results["rows"]} == {str(case) for case in gpu.cases(True)}
    status = {(row["task"], row["contestant"]): row["status"] for row in results["rows"]}
    assert status["softmax_focal", "veerloss, native"] == "ok"
    assert status["lovasz_softmax", "veerloss histogram, native"] == "ok"
    assert status["lovasz_hinge", gpu_report.SORT] == "no GPU or no nvcc"
    assert all(row["over veerloss"] == 1 for row in results["rows"] if row["contestant"] == "veerloss, native")
    text = (tmp_path / "gpu.test.md").read_text()
    assert all(bar["bar"] in text for bar in results["bars"])


def test_gpu_contestants():
    """Ours runs on each backend of the device, and says why where it cannot; peers run compiled too, but for another loss."""
    names = list(gpu.contestants("lovasz_softmax", torch.device("cuda")))
    assert names[:3] == ["veerloss histogram, native", "veerloss exact, native", "veerloss exact, triton"]
    assert {"kornia", "kornia, torch.compile", "torch cross_entropy"} <= set(names)
    assert "torch cross_entropy, torch.compile" not in names
    found = gpu.contestants("lovasz_softmax", torch.device("xpu"))
    with pytest.raises(peers.Missing, match="'xpu'"):
        found["veerloss exact, native"](torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))


def test_gpu_benchmark_has_a_time_to_end():
    """What does not fit is named; a contestant that takes longer is stopped."""
    device = torch.device("cpu")
    run = gpu.Run(device, True, time.perf_counter() - 1)
    rows, left_out = gpu.run_all(run)
    assert rows == [] and len(left_out) == len(gpu.cases(True))
    with pytest.raises(peers.Missing, match="no time left"), gpu_timing.at_most(0.05):
        try:
            time.sleep(5)
        except peers.Missing as alarm:
            raise RuntimeError("of the compiler") from alarm


def test_gpu_bars():
    """The worst case of a bar decides, and a contestant that is missing meets no bar."""

    def row(case, contestant, **more):
        common = {"workload": case, "task": "softmax_focal", "shape": [1], "small": False, "dtype": "float32"}
        return common | {"contestant": contestant} | more

    rows = [
        row("a", "veerloss", auto="veerloss", floor_share=0.9, extra_ratio=0.01),
        row("a", "plain formula, torch.compile", **{"over veerloss": 2.0}),
        row("b", "veerloss", auto="veerloss", floor_share=0.8, extra_ratio=0.02),
        row("b", "plain formula, torch.compile", **{"over veerloss": 0.5}),
    ]
    found = {bar["bar"]: (bar["met"], bar["measured"]) for bar in gpu_report.bars(rows)}
    assert found["float32, softmax_focal: at least 85% of the floor"] == (False, "80% (veerloss, b)")
    slower = found["float32, softmax_focal: at most 1x the time of a compiled peer"]
    assert slower == (False, "2.00x (plain formula, torch.compile, b)")
    assert found["float32, focal: extra memory at most 0.05x the logits"] == (True, "0.020x (veerloss, b)")
    assert found["float32, Lovász exact: at most 1.5x the time of one radix sort"] == (None, "not measured")
