"""The modules of the loss functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class LossModule(nn.Module):
    """The module of a function of logits and target, with the same keyword arguments.

    Arguments are attributes. Tensors among them are buffers, so that they move with the module and are saved with it.
    """

    function: ClassVar[Callable[..., Any]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, function: Callable | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if function is not None:  # else the class is derived from one that has a function
            cls.function = staticmethod(function)
            _, _, *options = inspect.signature(function).parameters.values()
            cls.__signature__ = inspect.Signature(options)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        try:
            bound = self.__signature__.bind(**options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        self._names = tuple(bound.arguments)
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.function(logits, target, **self.options())

    def extra_repr(self) -> str:
        shown = {n: f"Tensor{list(v.shape)}" if isinstance(v, Tensor) else repr(v) for n, v in self.options().items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
