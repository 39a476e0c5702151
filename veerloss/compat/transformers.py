"""``transformers.loss.loss_for_object_detection.sigmoid_focal_loss``, of the DETR family; and the loss of
SegformerForSemanticSegmentation, while it is trained, from its logits as they are.

Values of the focal loss are those of transformers: the mean over dimension 1, the queries, summed over the rest and divided by
``num_boxes``. Different on purpose:

- 0 < gamma < 1: no NaN in the gradient of a confident logit;
- targets of any integer type and bool are taken too; the loss has the type of the inputs;
- no queries: 0, not NaN;
- alpha > 1, a target outside [0, 1] and a negative gamma are errors.

The functions of this name in MaskFormer and Grounding DINO, which transformers has besides, are not replaced.

Slower, in plain PyTorch: targets that require a gradient.

SegFormer upsamples its logits to the size of the labels for cross-entropy alone. With ``veerloss.patch`` that is
``softmax_focal_loss(logits, labels, gamma=0, upsample="bilinear")``: the same value but for rounding, and 0, not NaN, where all
labels are ignored. Evaluation, and a single label, are as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..focal import softmax_focal_loss
from ._focal import check_same_shape, dense_sigmoid

PEER = "transformers"
DISTRIBUTION = "transformers"
VERSIONS = ">=4.46,<6"
REPLACES = {"transformers.loss.loss_for_object_detection:sigmoid_focal_loss": "sigmoid_focal_loss"}

METHODS = {"transformers.models.segformer.modeling_segformer:SegformerForSemanticSegmentation.forward": "segformer_forward"}

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


def segformer_forward(original: Callable) -> Callable:
    """``SegformerForSemanticSegmentation.forward``: in training mode its loss takes the logits at their own resolution."""

    @functools.wraps(original)
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, *args: Any, **options: Any) -> Any:
        if labels is None or not self.training or self.config.num_labels < 2:
            return original(self, pixel_values, labels, *args, **options)
        outputs = original(self, pixel_values, None, *args, **options)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
        ignored = self.config.semantic_loss_ignore_index
        loss = softmax_focal_loss(logits, labels, gamma=0.0, ignore_index=ignored, upsample="bilinear")
        return (loss, *outputs) if isinstance(outputs, tuple) else type(outputs)(loss=loss, **outputs)

    return forward
