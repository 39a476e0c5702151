"""Sigmoid focal loss in detectron2's convention: class indices, K = background, -1 = ignored.

detectron2 has no loss of its own here. Its RetinaNet and FCOS drop the ignored anchors, build a one-hot of the rest, and call
``fvcore.nn.sigmoid_focal_loss_jit`` on that; projects copy the same lines::

    valid = gt_classes >= 0
    one_hot = F.one_hot(gt_classes[valid], num_classes=K + 1)[:, :-1]
    loss = sigmoid_focal_loss_jit(logits[valid], one_hot.to(logits.dtype), alpha=a, gamma=g, reduction="sum") / normalizer

becomes, without the two copies of the logits and the one-hot::

    loss = veerloss.compat.detectron2.sigmoid_focal_loss(logits, gt_classes, alpha=a, gamma=g, normalizer=normalizer)

with the same value, float32 too. The only function here; nothing in detectron2 has this signature, so that there is nothing to
patch. What is one line elsewhere, fvcore's function on a one-hot, is in ``veerloss.compat.fvcore``.
"""

from __future__ import annotations

from torch import Tensor

from ._focal import check_reduction, float32_loss, index_sigmoid

PEER = "detectron2"
DISTRIBUTION = "detectron2"
VERSIONS = ">=0.1,<1"
REPLACES: dict[str, str] = {}

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_loss(
    pred_logits: Tensor,
    gt_classes: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "sum",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Focal loss of K classes against the rest, from class indices.

    Args:
        pred_logits: [R, K], or [N, R, K].
        gt_classes: integers, the shape of ``pred_logits`` without K: a class, K for background, or -1 for ignored.
        alpha: weight of positives, 1 - alpha being that of negatives; < 0 for no weights.
        gamma: focusing exponent, >= 0.
        reduction: "sum", "none" (the shape of ``pred_logits``, 0 where ignored), or "mean" over the elements that count.
        normalizer: divisor of the sum, such as the number of foreground anchors: a number > 0 or a tensor of one element.

    Returns:
        A float32 tensor (float64 for float64 logits).

    Raises:
        ValueError: an argument is out of range, or the shapes do not fit.
        IndexError: gt_classes holds another value (on a GPU only with VEERLOSS_CHECK=1 in the environment).

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, 80, requires_grad=True)
        >>> loss = sigmoid_focal_loss(logits, torch.tensor([3, 80, -1, 0]), normalizer=2)
    """
    check_reduction(reduction)
    if pred_logits.dim() < 2 or gt_classes.shape != pred_logits.shape[:-1]:
        raise ValueError(
            f"gt_classes must have the shape of pred_logits without its last dimension, {list(pred_logits.shape[:-1])}, "
            f"got {list(gt_classes.shape)}"
        )
    if normalizer is not None:
        if reduction != "sum":
            raise ValueError(f"normalizer divides the sum, got reduction={reduction!r}")
        reduction = "mean"
    num_classes = pred_logits.size(-1)
    with float32_loss(pred_logits):
        loss = index_sigmoid(
            pred_logits.reshape(-1, num_classes), gt_classes.reshape(-1), background=num_classes, ignore_index=-1,
            alpha=None if alpha < 0 else alpha, gamma=gamma, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    return loss.reshape(pred_logits.shape) if reduction == "none" else loss
