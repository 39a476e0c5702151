"""``fvcore.nn``: sigmoid_focal_loss, sigmoid_focal_loss_star, and their ``_jit`` forms.

Values are fvcore's, and so is the type of the loss: float32 for logits of every type, float64 too. Different on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit;
- float64 logits are computed in float64, and the loss rounded; half-precision logits are not copied to float32;
- the ``_jit`` forms call the kernel like the others; ``torch.jit.script`` takes all;
- "mean" of no elements is 0, not NaN;
- an unknown reduction, which fvcore takes for "none", alpha > 1, a target outside [0, 1] and a negative gamma are errors;
- sigmoid_focal_loss_star leaves its arguments as they are; gamma must be > 0.

Slower, in plain PyTorch: sigmoid_focal_loss_star, targets that require a gradient, and a function compiled by
``torch.jit.script``. For class-index targets see ``veerloss.compat.detectron2``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._focal import (
    check_reduction,
    check_same_shape,
    dense_sigmoid,
    float32_loss,
    reduced,
    sigmoid_elements,
    weighted_by_alpha,
)

PEER = "fvcore"
DISTRIBUTION = "fvcore"
VERSIONS = ">=0.1.5,<0.2"
REPLACES = {
    "fvcore.nn.focal_loss:sigmoid_focal_loss": "sigmoid_focal_loss",
    "fvcore.nn.focal_loss:sigmoid_focal_loss_jit": "sigmoid_focal_loss_jit",
    "fvcore.nn.focal_loss:sigmoid_focal_loss_star": "sigmoid_focal_loss_star",
    "fvcore.nn.focal_loss:sigmoid_focal_loss_star_jit": "sigmoid_focal_loss_star_jit",
}

__all__ = ["sigmoid_focal_loss", "sigmoid_focal_loss_jit", "sigmoid_focal_loss_star", "sigmoid_focal_loss_star_jit"]


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 2, reduction: str = "none") -> Tensor:
    """Focal loss of each logit, float32.

    Args:
        inputs: logits of any shape.
        targets: the shape of ``inputs``, in [0, 1].
        alpha: weight of positives, 1 - alpha being that of negatives; < 0 for no weights.
        gamma: focusing exponent, >= 0.
        reduction: "none", "mean" (over all elements) or "sum".

    Raises:
        ValueError: an argument is out of range, or the shape of targets is not that of inputs.
    """
    if not torch.jit.is_scripting():
        check_reduction(reduction)
        check_same_shape(inputs, targets, "targets inputs")
        with float32_loss(inputs):
            return dense_sigmoid(inputs, targets, alpha, gamma, reduction).float()
    x, t = inputs.float(), targets.float()
    return reduced(weighted_by_alpha(sigmoid_elements(x, t, gamma), t, alpha), reduction)


def sigmoid_focal_loss_star(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 1, reduction: str = "none"
) -> Tensor:
    """FL* of each logit, -log(sigmoid(gamma x (2 t - 1))) / gamma (arXiv 1708.02002, appendix B with beta = 0), float32.

    Args as for ``sigmoid_focal_loss``; ``gamma`` > 0.
    """
    if not torch.jit.is_scripting():
        check_reduction(reduction)
        check_same_shape(inputs, targets, "targets inputs")
    if gamma <= 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    x, t = inputs.float(), targets.float()
    loss = -F.logsigmoid(gamma * x * (2 * t - 1)) / gamma
    return reduced(weighted_by_alpha(loss, t, alpha), reduction)


# Functions of their own, so that unpatching can tell them apart.


def sigmoid_focal_loss_jit(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """``sigmoid_focal_loss``."""
    return sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)


def sigmoid_focal_loss_star_jit(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 1, reduction: str = "none"
) -> Tensor:
    """``sigmoid_focal_loss_star``."""
    return sigmoid_focal_loss_star(inputs, targets, alpha, gamma, reduction)
