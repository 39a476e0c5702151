"""Fused Focal, Lovász, region and compound losses for PyTorch."""

from ._version import __version__
from .compound import CompoundLoss, compound_loss
from .focal import SigmoidFocalLoss, SoftmaxFocalLoss, sigmoid_focal_loss, softmax_focal_loss
from .lovasz import LovaszHingeLoss, LovaszSoftmaxLoss, lovasz_hinge_loss, lovasz_softmax_loss
from .patching import patch, unpatch
from .region import DiceLoss, JaccardLoss, TverskyLoss, dice_loss, jaccard_loss, tversky_loss

__all__ = [
    "CompoundLoss",
    "DiceLoss",
    "JaccardLoss",
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "TverskyLoss",
    "__version__",
    "compound_loss",
    "dice_loss",
    "jaccard_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "patch",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "tversky_loss",
    "unpatch",
]
