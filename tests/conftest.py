"""Fixtures of all tests but those of tests/gpu, which are run without this file."""

import functools
import os
from pathlib import Path

import torch

# Without a GPU, Triton kernels run in Triton's interpreter; veerloss looks when it is imported, and Triton when it is.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import pytest
from emulator import library
from filelock import FileLock
from grid import INTERPRETED_TILES, runs
from hypothesis import HealthCheck, settings
from peers.installed import MISSING

from veerloss import ops
from veerloss._arguments import missing_reason

# A first call may build caches; deadlines would make slow machines fail. The fixture `backend` does not change from example to
# example.
settings.register_profile(
    "veerloss", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("veerloss")

# Workers of pytest-xdist have a core each. (What numbers of threads change, tests with the fixture `threads` see.)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"tests/peers: {'left out, for want of ' + ', '.join(MISSING) if MISSING else 'collected'}"


#: The reference is held to itself in float64 by the tests of the others.
SLOW_BACKENDS = ("emulated", "triton", "reference")
#: What takes compilers, the emulator, networks, processes or browsers. With the kernels that are emulated or interpreted, that
#: is nine tenths of the time of all tests: `make test-all`.
SLOW = {
    "test_counts", "test_triton", "test_emulator", "test_cuda", "test_compound_gpu", "test_devices",
    "test_study", "test_digitise", "test_claims", "test_instrument_page",
    "test_benchmarks", "test_distributed", "test_patching",
}  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Marks what is slow. Takes out what slow backends do not run, and puts first what runs compilers for up to a minute: else
    one worker would end with them, and the others have nothing left."""
    kept, left_out = [], []
    for item in items:
        point = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        backend = point.pop("backend", None)
        run = backend is None or runs(
            backend, f"{item.module.__name__}.{item.originalname}", point, hasattr(item.obj, "hypothesis")
        )
        (kept if run else left_out).append(item)
        if backend in SLOW_BACKENDS or item.path.stem in SLOW or "inductor" in point.values():
            item.add_marker(pytest.mark.slow)
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=lambda item: item.path.stem not in ("test_counts", "test_cuda", "test_triton"))


@pytest.fixture(scope="session")
def emulated_library():
    """`emulated_library(namespace)`: the CUDA kernels of csrc/cuda for the CPU, in one of the builds of emulator/library.py,
    compiled by one of all workers, and loaded."""

    @functools.cache
    def load(namespace: str) -> Path:
        if library.cuda_headers() is None:
            pytest.skip("needs the headers of a CUDA toolkit")
        library.CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(library.CACHE / "lock"):
            path = library.build(namespace=namespace)
        ops.define(namespace)
        torch.ops.load_library(str(path))
        return path

    return load


@pytest.fixture
def backend(request, monkeypatch):
    """A backend of grid.py, by the name under which public functions and `ops.operators` find it until the test ends."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_library")(library.NAMESPACE)
        monkeypatch.setitem(ops.NAMESPACES, "native", library.NAMESPACE)
        return "native"
    if request.param == "triton":
        reason = missing_reason("triton", torch.device("cpu"), "lovasz")
        if reason is not None:
            pytest.skip(reason)
        for name, value in INTERPRETED_TILES.items():
            monkeypatch.setattr(f"veerloss.triton._tuning.{name}", value)
    return request.param


@pytest.fixture
def threads():
    """`for _ in threads(1, 2, 3)` goes over numbers of threads of torch; afterwards there are as many as before."""
    before = torch.get_num_threads()

    def over(*counts):
        for count in counts:
            torch.set_num_threads(count)
            yield count

    yield over
    torch.set_num_threads(before)
