"""``apex.contrib.focal_loss.focal_loss``, on every device.

Values are apex's: the sum over all elements divided by ``num_positives_sum``, float32 for logits of every type but float64.
Classes from ``num_real_classes`` on are padding, with no loss and a gradient of 0. A target of -1 is background, -2 is ignored.
Different on purpose:

- there is no fast-math tail; 0 < gamma < 1 gives no NaN in the gradient of a confident logit;
- a target that is no real class, -1 or -2 is an error;
- nothing to count: 0, whatever ``num_positives_sum`` is;
- the gradient is computed in the backward pass, and can be asked for more than once.

Slower, in plain PyTorch: ``label_smoothing`` > 0 (apex smooths the target of the cross-entropy alone, not that of alpha and of
the modulating factor). Padding costs a copy of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._focal import cross_entropy_elements, float32_loss, index_sigmoid, one_hot, power, to_opmath

PEER = "apex"
DISTRIBUTION = "apex"
VERSIONS = ">=0.1,<1"
REPLACES = {"apex.contrib.focal_loss.focal_loss:focal_loss": "focal_loss"}

__all__ = ["focal_loss"]

_BACKGROUND, _IGNORED = -1, -2


def focal_loss(
    cls_output: Tensor,
    cls_targets_at_level: Tensor,
    num_positives_sum: Tensor,
    num_real_classes: int,
    alpha: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Focal loss of each class against the rest, summed and divided by the number of positives.

    Args:
        cls_output: logits [\\*, C], channels last, C >= ``num_real_classes``.
        cls_targets_at_level: integers [\\*]: a class in [0, num_real_classes), -1 for background, -2 for ignored.
        num_positives_sum: divisor, a tensor of one element.
        num_real_classes: how many of the C classes are not padding.
        alpha: weight of positives in [0, 1], 1 - alpha being that of negatives.
        gamma: focusing exponent, >= 0.
        label_smoothing: in [0, 1]: cross-entropy with the targets 1 - label_smoothing / 2 and label_smoothing / 2.

    Returns:
        A 0-d tensor, float32 (float64 for float64 logits).

    Raises:
        ValueError: an argument is out of range, or the shapes do not fit.
        IndexError: cls_targets_at_level holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).
    """
    if cls_output.dim() < 2 or cls_targets_at_level.shape != cls_output.shape[:-1]:
        raise ValueError(
            "cls_targets_at_level must have the shape of cls_output without its last dimension, "
            f"{list(cls_output.shape[:-1])}, got {list(cls_targets_at_level.shape)}"
        )
    if not 0 < num_real_classes <= cls_output.size(-1):
        raise ValueError(f"num_real_classes must be in [1, {cls_output.size(-1)}], got {num_real_classes}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    logits = cls_output.reshape(-1, cls_output.size(-1))[:, :num_real_classes]
    labels = cls_targets_at_level.reshape(-1)
    if label_smoothing > 0:
        loss = _smoothed(logits, labels, alpha, gamma, label_smoothing / 2)
        return loss / torch.where((labels != _IGNORED).any(), num_positives_sum.reshape(()), 1)
    with float32_loss(cls_output):
        return index_sigmoid(
            logits,
            labels,
            background=_BACKGROUND,
            ignore_index=_IGNORED,
            alpha=alpha,
            gamma=gamma,
            normalizer=num_positives_sum,
        )


def _smoothed(logits: Tensor, labels: Tensor, alpha: float, gamma: float, off: float) -> Tensor:
    """The sum with the target ``off`` of the cross-entropy of negatives and 1 - off of positives."""
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = labels[(labels < _IGNORED) | (labels >= logits.size(1))]
        if len(bad):
            raise IndexError(f"cls_targets_at_level holds {bad[0].item()}, expected a class in [0, {logits.size(1)}), -1 or -2")
    x = to_opmath(logits)
    valid = (labels != _IGNORED).unsqueeze(1)
    x = torch.where(valid, x, torch.zeros_like(x))
    t = one_hot(labels, logits.size(1)).to(x.dtype)
    factor = (alpha * t + (1 - alpha) * (1 - t)) * power(torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t, gamma)
    loss = factor * cross_entropy_elements(x, off + t * (1 - 2 * off))
    return torch.where(valid, loss, torch.zeros_like(loss)).sum()
