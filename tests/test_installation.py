"""The build of setup.py; imports in fresh processes: the library absent, each instruction set, ``python -m veerloss``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import veerloss

PACKAGE = Path(veerloss.__file__).parent

#: Every loss, forward and backward, in a few types: a checksum that instruction sets agree on but for rounding.
CHECKSUM = """
import torch, veerloss
torch.manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x = torch.randn(2, 5, 37, 11).to(dtype).requires_grad_()
    y = torch.randint(0, 5, (2, 37, 11))
    loss = veerloss.softmax_focal_loss(x, y, gamma=1.5) + veerloss.softmax_focal_loss(x, y, label_smoothing=0.1)
    loss = loss + veerloss.sigmoid_focal_loss(x, y) + veerloss.sigmoid_focal_loss(x, torch.rand(x.shape), gamma=0.5)
    loss = loss + veerloss.lovasz_softmax_loss(x, y) + veerloss.lovasz_hinge_loss(x[:, 0], y.clamp(max=1))
    loss.backward()
    print(f"{loss.item()} {x.grad.double().norm().item()}")
"""


def python(*args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=300, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_instruction_sets_agree():
    """Of a machine that lacks one, the widest that it has runs in its place."""
    baseline, *others = (
        [float(word) for word in python("-c", CHECKSUM, VEERLOSS_CPU=target).split()]
        for target in ("baseline", "avx2", "avx512")
    )
    assert len(baseline) == 8
    for values in others:
        assert values == pytest.approx(baseline, rel=1e-3)


def test_without_the_library(tmp_path):
    """A pure-Python install: the reference works, and an explicit 'native' says why it does not."""
    shutil.copytree(PACKAGE, tmp_path / "veerloss", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    path = str(tmp_path)
    output = python("-m", "veerloss", PYTHONPATH=path)
    assert "reference  available" in output
    assert "native     not available: the compiled library veerloss/_C is not installed" in output
    code = """
import torch, veerloss
print(veerloss.__file__)
x = torch.randn(2, 3, 4, requires_grad=True)
y = torch.zeros(2, 4, dtype=torch.long)
veerloss.softmax_focal_loss(x, y).backward()
veerloss.lovasz_softmax_loss(x, y).backward()
try:
    veerloss.softmax_focal_loss(x, y, backend="native")
except RuntimeError as error:
    print(error)
"""
    output = python("-c", code, PYTHONPATH=path)
    assert str(tmp_path) in output
    assert "backend='native' cannot run on device 'cpu': the compiled library veerloss/_C is not installed" in output


def test_module_report():
    output = python("-m", "veerloss")
    assert f"veerloss {veerloss.__version__}" in output
    assert "cpu    native     available" in output and "cpu    reference  available" in output
    assert "triton     not available: " in output


def test_a_broken_library_keeps_its_reason(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "veerloss", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (tmp_path / "veerloss/_C.abi3.so").write_bytes(b"no library")
    output = python("-m", "veerloss", PYTHONPATH=str(tmp_path))
    assert "native     not available: the compiled library _C.abi3.so does not load beside torch" in output


@pytest.mark.parametrize("name", ["numpy", "triton", "setuptools"])
def test_needs_only_torch(name):
    python("-c", f"import sys; sys.modules[{name!r}] = None; import veerloss")


SETUP = Path(__file__).parents[1] / "setup.py"

#: setup.py where there is no ninja.
WITHOUT_NINJA = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name: None if name == "ninja" else which(name)
sys.modules["ninja"] = None
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def checkout(tmp_path):
    """setup.py with next to nothing to compile, and a CUDA toolkit whose nvcc fails."""
    files = {
        "setup.py": SETUP.read_text(),
        "veerloss/__init__.py": "",
        "csrc/shared.h": "",
        "csrc/ops/lovasz_a.cpp": '#include "../shared.h"',
        "csrc/ops/b.cpp": "",
        "csrc/cpu/folder/c.cpp": "",
        "csrc/cuda/folder/d.cu": "",
        "cuda/include/cuda_runtime_api.h": "",
        "cuda/bin/nvcc": "#!/bin/sh\nexit 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cuda/bin/nvcc").chmod(0o755)
    return tmp_path


def build(checkout: Path, *script: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_HOME": str(checkout / "cuda"), "TORCH_CUDA_ARCH_LIST": "8.0", "VEERLOSS_CUDA": "0", **env}
    command = [sys.executable, *(script or ["setup.py"]), "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=checkout)


def libraries(checkout: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (checkout / "veerloss").glob("_C*")}


def test_build_compiles_what_has_changed(checkout):
    def compiled(changed: str) -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*.o")}
        (checkout / changed).touch()
        done = build(checkout)
        assert done.returncode == 0, done.stdout + done.stderr
        return {path.stem for path in checkout.rglob("*.o") if path.stat().st_mtime_ns != before.get(path)}

    assert compiled("setup.py") == {"lovasz_a.cpp", "b.cpp", "c.cpp"}
    assert libraries(checkout) == {"_C"}
    assert compiled("setup.py") == set()
    assert compiled("csrc/cpu/folder/c.cpp") == {"c.cpp"}
    assert compiled("csrc/shared.h") == {"lovasz_a.cpp"}


def test_build_without_ninja(checkout):
    done = build(checkout, "-c", WITHOUT_NINJA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "veerloss: no ninja found" in done.stderr
    assert libraries(checkout) == {"_C"}
    (checkout / "csrc/ops/b.cpp").write_text("#error")
    assert build(checkout, "-c", WITHOUT_NINJA).returncode != 0


@pytest.mark.parametrize(
    "env, message, built",
    [
        ({"VEERLOSS_NATIVE": "0"}, "VEERLOSS_NATIVE=0: pure-Python install", set()),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler found: pure-Python install", set()),
        ({"VEERLOSS_CUDA": ""}, "no CUDA library: its sources do not compile", {"_C"}),
        ({"VEERLOSS_CUDA": "1"}, "compiling the CUDA library", None),
        ({"VEERLOSS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;hopper"}, "TORCH_CUDA_ARCH_LIST holds 'hopper'", None),
    ],
)
def test_build_says_what_it_leaves_out(checkout, env, message, built):
    done = build(checkout, **env)
    assert f"veerloss: {message}" in done.stderr
    assert (done.returncode == 0) == (built is not None), done.stdout + done.stderr
    assert built is None or libraries(checkout) == built
