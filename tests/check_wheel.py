"""`python tests/check_wheel.py WHEEL` installs it where there is nothing but torch, and runs losses there: for `make wheel`."""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

CODE = """
import sys, torch, veerloss
assert sys.prefix in veerloss.__file__, veerloss.__file__
x = torch.randn(2, 3, 8, 8, requires_grad=True)
y = torch.randint(3, (2, 16, 16))
for loss in (veerloss.softmax_focal_loss, veerloss.lovasz_softmax_loss, veerloss.dice_loss):
    loss(x, y, upsample="bilinear", backend="native").backward()
assert x.grad.isfinite().all() and x.grad.any()
print("veerloss", veerloss.__version__, "beside torch", torch.__version__)
"""


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin", "python")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
        subprocess.run(command, check=True)
        # torch is that of this environment. As a path, not a site, it does not bring the editable install along.
        env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
        subprocess.run([python, "-c", CODE], check=True, env=env, cwd=folder)
        subprocess.run([python, "-m", "veerloss"], check=True, env=env, cwd=folder)


if __name__ == "__main__":
    main(sys.argv[1])
