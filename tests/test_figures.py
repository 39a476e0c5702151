"""The figures of README and docs are those of benchmarks/results, and these of the kernels as they stand."""

import pytest

from benchmarks import figures, report


@pytest.mark.parametrize("path", figures.DOCUMENTS, ids=lambda path: path.name)
def test_documents_have_the_figures_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert figures.filled(text) == text, "make figures"


def test_every_block_is_somewhere():
    text = "".join(path.read_text(encoding="utf-8") for path in figures.DOCUMENTS)
    assert {found[2] for found in figures.BLOCK.finditer(text)} == figures.BLOCKS.keys()


@pytest.mark.parametrize("name", figures.SOURCES)
def test_results_are_of_these_kernels(name):
    """Else measure again: `make bench`, or what the result names as its command; then `make figures`."""
    about = figures.results(name)["machine"]
    assert about.get("kernels") == report.kernels(), f"{name}.json is of other kernels: {about['command']}"


def test_the_readme_is_one_screen_or_three():
    assert len((figures.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_comments_do_not_change_what_kernels_are(tmp_path, monkeypatch):
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "benchmarks/report.py"))
    source, found = tmp_path / "csrc/cpu/a.h", []
    for text in ("int f();  // f\n", "// of f\nint  f();", "int g();"):
        source.write_text(text)
        found.append(report.kernels())
    assert found[0] == found[1] != found[2]
