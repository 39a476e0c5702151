"""``torchvision.ops.sigmoid_focal_loss``.

Values are torchvision's. Different on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit;
- targets of any integer type and bool are taken too, and of a type other than that of the inputs; the loss has the type of the
  inputs;
- "mean" of no elements is 0, not NaN;
- a target outside [0, 1] and a negative gamma are errors.

Slower, in plain PyTorch: targets that require a gradient, and a function compiled by ``torch.jit.script``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._focal import check_reduction, check_same_shape, dense_sigmoid, reduced, sigmoid_elements, to_opmath, weighted_by_alpha

PEER = "torchvision"
DISTRIBUTION = "torchvision"
VERSIONS = ">=0.8,<1"
REPLACES = {"torchvision.ops.focal_loss:sigmoid_focal_loss": "sigmoid_focal_loss"}

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Focal loss of each logit.

    Args:
        inputs: logits of any shape.
        targets: the shape of ``inputs``, in [0, 1].
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives; -1 for no weights.
        gamma: focusing exponent, >= 0.
        reduction: "none", "mean" (over all elements) or "sum".

    Raises:
        ValueError: alpha, gamma, reduction or the shape of targets is not as above.
    """
    if not (0 <= alpha <= 1) and alpha != -1:
        raise ValueError(f"Invalid alpha: expected a value in [0, 1], or -1 for none, got {alpha}")
    if not torch.jit.is_scripting():
        check_reduction(reduction)
        check_same_shape(inputs, targets, "targets inputs")
        return dense_sigmoid(inputs, targets, alpha, gamma, reduction)
    if reduction != "none" and reduction != "mean" and reduction != "sum":
        raise ValueError(f"Invalid reduction: expected 'none', 'mean' or 'sum', got {reduction}")
    x, t = to_opmath(inputs), to_opmath(targets)
    loss = weighted_by_alpha(sigmoid_elements(x, t, gamma), t, alpha)
    return reduced(loss, reduction).to(inputs.dtype)
