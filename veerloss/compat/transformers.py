"""``transformers.loss.loss_for_object_detection.sigmoid_focal_loss``, of the DETR family.

Values are those of transformers: the mean over dimension 1, the queries, summed over the rest and divided by ``num_boxes``.
Different on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit;
- targets of any integer type and bool are taken too; the loss has the type of the inputs;
- no queries: 0, not NaN;
- alpha > 1, a target outside [0, 1] and a negative gamma are errors.

The functions of this name in MaskFormer and Grounding DINO, which transformers has besides, are not replaced.

Slower, in plain PyTorch: targets that require a gradient.
"""

from __future__ import annotations

from torch import Tensor

from ._focal import check_same_shape, dense_sigmoid

PEER = "transformers"
DISTRIBUTION = "transformers"
VERSIONS = ">=4.46,<6"
REPLACES = {"transformers.loss.loss_for_object_detection:sigmoid_focal_loss": "sigmoid_focal_loss"}

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: float | Tensor, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """Focal loss of each logit: the mean over dimension 1, summed, divided by ``num_boxes``.

    Args:
        inputs: logits [N, Q, \\*].
        targets: the shape of ``inputs``, in [0, 1].
        num_boxes: divisor, a number or a tensor.
        alpha: weight of positives, 1 - alpha being that of negatives; < 0 for no weights.
        gamma: focusing exponent, >= 0.

    Raises:
        ValueError: an argument is out of range, or the shape of targets is not that of inputs.
        IndexError: inputs has no dimension 1.
    """
    check_same_shape(inputs, targets, "targets inputs")
    if inputs.dim() < 2:
        raise IndexError(f"inputs must have the shape [N, Q, *], got {list(inputs.shape)}")
    queries = max(inputs.size(1), 1)
    return dense_sigmoid(inputs, targets, alpha, gamma, "mean", normalizer=queries) / num_boxes
