"""What the four loss modules share: they keep a function's keyword arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LossModule(nn.Module):
    """Keeps the options as attributes. Tensors are buffers, so that they move with the module and are saved with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {n: f"Tensor{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for n, v in self.options().items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
