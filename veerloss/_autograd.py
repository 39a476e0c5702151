"""Autograd of the operators, read off their schemas.

Every argument of a ``<stem>_backward`` operator but ``grad`` is an argument or a result of ``<stem>_forward`` of the same name:
what is saved between the two, and how the backward operator is called, follows from the names alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SavedByName:
    """``setup_context`` and ``backward`` of the operators ``<stem>_forward`` and ``<stem>_backward`` of a namespace.

    The first result of the forward operator is the loss; the others are not differentiable. The only gradient is that of the
    argument ``logits``. Names become positions here, once: in every training step keywords would cost 6 us, of 160 for a
    forward and backward pass of a few pixels.
    """

    def __init__(self, namespace: str, stem: str) -> None:
        operators = getattr(torch.ops, namespace)
        forward = getattr(operators, f"{stem}_forward").default._schema
        self._backward = getattr(operators, f"{stem}_backward").default
        inputs = [argument.name for argument in forward.arguments]
        known = [*inputs, *(result.name for result in forward.returns)]
        _, *wanted = self._backward._schema.arguments  # the first is grad
        unknown = {argument.name for argument in wanted} - {*known}
        if unknown:
            raise ValueError(f"{stem}_backward: {sorted(unknown)} are neither arguments nor results of {stem}_forward")
        tensors = [argument.name for argument in wanted if "Tensor" in str(argument.type)]
        options = [argument.name for argument in wanted if argument.name not in tensors]
        # Among the arguments and results of forward, and then among what was saved, tensors first.
        self._tensors, self._options = ([known.index(name) for name in names] for names in (tensors, options))
        self._saved = [[*tensors, *options].index(argument.name) for argument in wanted]
        self._before, self._after = inputs.index("logits"), len(inputs) - inputs.index("logits") - 1

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        values = (*inputs, *output)
        ctx.save_for_backward(*[values[i] for i in self._tensors])
        ctx.options = [values[i] for i in self._options]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else backward would be given zeros as large as the weights

    def backward(self, ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = (*ctx.saved_tensors, *ctx.options)
        grad_logits = None if grad is None else self._backward(grad, *[saved[i] for i in self._saved])
        return *(None,) * self._before, grad_logits, *(None,) * self._after


def no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "veerloss: the kernels have no second derivative; use backend='reference' for it (the focal losses are twice "
        "differentiable there, the Lovász losses are piecewise linear in their errors)"
    )


def register(namespace: str, stem: str) -> None:
    """Autograd of ``<stem>_forward``, and a clear error from that of ``<stem>_backward``."""
    saved = SavedByName(namespace, stem)
    torch.library.register_autograd(f"{namespace}::{stem}_forward", saved.backward, setup_context=saved.setup_context)
    torch.library.register_autograd(f"{namespace}::{stem}_backward", no_second_derivative)


def by_name(schema: torch.FunctionSchema, function: Callable) -> Callable:
    """``function``, which takes keywords, as the positional kernel of an operator."""
    names = [argument.name for argument in schema.arguments]

    def kernel(*args, **kwargs):
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    return kernel
