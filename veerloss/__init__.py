"""Fused Focal and Lovász losses for PyTorch."""

from ._version import __version__
from .focal import SigmoidFocalLoss, SoftmaxFocalLoss, sigmoid_focal_loss, softmax_focal_loss
from .lovasz import LovaszHingeLoss, LovaszSoftmaxLoss, lovasz_hinge_loss, lovasz_softmax_loss
from .patching import patch, unpatch

__all__ = [
    "LovaszHingeLoss",
    "LovaszSoftmaxLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "__version__",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "patch",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "unpatch",
]
