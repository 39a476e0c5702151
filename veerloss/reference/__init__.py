"""The specification: each loss in plain, differentiable PyTorch, for any float type, device and number of derivatives.

Readable beside the papers rather than fast. The kernels are tested against these functions in float64, and
``backend="reference"`` runs them. They take the arguments of the public functions and trust them to be valid.
"""

from .focal import sigmoid_focal_loss, softmax_focal_loss
from .lovasz import lovasz_hinge_loss, lovasz_softmax_loss
from .region import tversky_loss

__all__ = ["lovasz_hinge_loss", "lovasz_softmax_loss", "sigmoid_focal_loss", "softmax_focal_loss", "tversky_loss"]
