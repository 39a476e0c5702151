"""``MixLovaszCrossEntropy`` of SPVNAS and other projects on torchsparse: cross-entropy and Lovász-Softmax of points [P, C].

Values are theirs, which are Berman's and PyTorch's. Different on purpose:

- ``ignore_index`` takes no part in either term. There the Lovász term ignores nothing: to it such points are background of
  every class;
- everything ignored: 0, not NaN;
- ``veerloss.compat.lovasz_losses`` tells where Lovász losses differ.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..compound import compound_loss

PEER = "core"  # of the repository, from which it is used
DISTRIBUTION = None
VERSIONS = None
REPLACES = {"core.criterions:MixLovaszCrossEntropy": "MixLovaszCrossEntropy"}

__all__ = ["MixLovaszCrossEntropy"]


class MixLovaszCrossEntropy(nn.Module):
    """Cross-entropy plus Lovász-Softmax over the classes present, of logits [P, C] or [N, C, \\*] and class indices.

    Args:
        weight: [C], factor of each class in the cross-entropy, whose mean divides by the sum of the factors.
        ignore_index: label that takes no part. None: -100, which cross_entropy ignores.
    """

    def __init__(self, weight: Tensor | None = None, ignore_index: int | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = -100 if ignore_index is None else ignore_index

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return compound_loss(x, y, cross_entropy=1.0, lovasz=1.0, alpha=self.weight, ignore_index=self.ignore_index)
