"""The Triton kernels compiled for GPUs that are not there. In the interpreter they run with the other backends."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# In a process of its own: Triton decides on its interpreter when it is imported. For one GPU, as each takes as long again;
# `python tests/offline.py` compiles for three.
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("module", ["focal", "focal_low", "lovasz_exact"])
def test_compiles_for_a_gpu_without_spilling(module):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, ROOT / "tests/offline.py", "--capability", "90", f"veerloss.triton.{module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert len(done.stdout.splitlines()) > 5 and all("sm_90" in line for line in done.stdout.splitlines())
