"""``python -m veerloss``: versions, the backends that are available, and why any other is not; the peers that are installed,
and whether veerloss.patch can replace their losses."""

from __future__ import annotations

import platform

import torch

from . import __version__, patching
from ._arguments import BACKENDS, missing_reason
from ._extension import gpu_count


def main() -> None:
    print(f"veerloss {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    devices = [f"cuda:{i}" for i in range(gpu_count())]
    print(f"CUDA: {torch.version.cuda or 'not in this torch'}, {len(devices)} device(s)")
    for device in ["cpu", *(devices or ["cuda"])]:
        for backend in BACKENDS[1:]:
            reason = missing_reason(backend, torch.device(device), "lovasz")
            if device == "cuda" and reason is None:
                reason = "no CUDA device"
            print(f"  {device:6} {backend:10} {'available' if reason is None else f'not available: {reason}'}")
    found = {peer: patching.status(peer) for peer in patching.peers()}
    installed = {peer: status for peer, status in found.items() if status[0] is not None}
    print("Peers: " + ("" if installed else "none is installed"))
    for peer, (version, reason) in installed.items():
        print(f"  {peer} {version}: {'veerloss.patch can replace its losses' if reason is None else reason}")


if __name__ == "__main__":
    main()
