"""The arms of the study: which losses are compared, with which hyperparameters. Fixed before any of them was run.

A loss takes logits ``[N, C, H, W]``, a target ``[N, H, W]`` and the share of the training that is done, from 0 to 1, and
returns a scalar. ``peer`` is the same loss as people have it today, for time alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import veerloss

from .. import peers

ArmLoss = Callable[[Tensor, Tensor, float], Tensor]

GAMMA = 2.0  # of every focal loss: Lin et al., ICCV 2017, table 1
SMOOTHING = 0.1  # of SCE: label smoothing as in Szegedy et al., CVPR 2016
TVERSKY = (0.3, 0.7)  # weights of false positives and false negatives: Salehi et al., MLMI 2017
SENSITIVITY_GAMMA = (0.5, 1.0, 5.0)
SENSITIVITY_TVERSKY = ((0.1, 0.9), (0.7, 0.3))  # (0.5, 0.5) is Dice


@dataclass(frozen=True)
class Arm:
    """One loss to train with.

    group: "main" (the five of the published comparison), "extra", or "sensitivity"; settings: the hyperparameters, for the
    report; binary: each logit is a sigmoid of its own, not one of a softmax.
    """

    name: str
    group: str
    settings: str
    loss: ArmLoss
    peer: ArmLoss | None = None
    peer_name: str = ""
    binary: bool = False

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same: the activation that the loss takes for granted."""
        return logits.sigmoid() if self.binary else logits.softmax(1)


def _always(loss: Callable[[Tensor, Tensor], Tensor]) -> ArmLoss:
    """A loss that is the same from the first step to the last."""
    return lambda logits, target, done: loss(logits, target)


def _sum(*losses: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, target: sum(loss(logits, target) for loss in losses)


def _then(first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor], Tensor]) -> ArmLoss:
    """``first`` for half of the steps, then ``second``."""
    return lambda logits, target, done: (first if done < 0.5 else second)(logits, target)


@functools.cache
def _monai(name: str, **options: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A region loss of MONAI with the softmax of all classes, background included, an image at a time: its defaults."""
    try:
        import monai.losses  # takes seconds to import
    except ImportError as error:
        raise peers.Missing("not installed: pip install monai") from error
    loss = getattr(monai.losses, name)(softmax=True, to_onehot_y=True, **options)
    return lambda logits, target: loss(logits, target[:, None])


dice = functools.partial(veerloss.dice_loss, per_image=True)  # as MONAI's, background included


def tversky(logits: Tensor, target: Tensor, weights: tuple[float, float] = TVERSKY) -> Tensor:
    """The same; weights of false positives and false negatives."""
    return veerloss.tversky_loss(logits, target, alpha=weights[0], beta=weights[1], per_image=True)


focal = functools.partial(veerloss.softmax_focal_loss, gamma=GAMMA)
lovasz = veerloss.lovasz_softmax_loss
sce = functools.partial(veerloss.softmax_focal_loss, gamma=0.0, label_smoothing=SMOOTHING)
cross_entropy = functools.partial(veerloss.softmax_focal_loss, gamma=0.0)
one_vs_rest = functools.partial(veerloss.sigmoid_focal_loss, alpha=None, gamma=GAMMA)


_torchvision_focal = peers.torchvision_focal(alpha=-1.0)


def focal_per_positive(logits: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """Focal loss divided by the pixels of curves, as RetinaNet divides by its positives: over all pixels the paper would
    make it vanish beside a region loss."""
    return focal(logits, target, normalizer=(target > 0).sum().clamp_min(1), backend=backend)


def focal_and_lovasz(logits: Tensor, target: Tensor, backend: str = "auto") -> Tensor:
    """What the demo trains with."""
    return focal_per_positive(logits, target, backend) + lovasz(logits, target, backend=backend)


def _peer_one_vs_rest(logits: Tensor, target: Tensor) -> Tensor:
    hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    return _torchvision_focal(logits, hot)


def _peer_focal_per_positive(logits: Tensor, target: Tensor) -> Tensor:
    # kornia's mean is over classes too: as many times smaller, at the same cost
    return peers.softmax_focal()["kornia"](logits, target) * target.numel() * logits.shape[1] / (target > 0).sum().clamp_min(1)


def _peer_dice(logits: Tensor, target: Tensor) -> Tensor:
    return _monai("DiceLoss")(logits, target)


def _peer_tversky(logits: Tensor, target: Tensor) -> Tensor:
    return _monai("TverskyLoss", alpha=TVERSKY[0], beta=TVERSKY[1])(logits, target)


def _peer_lovasz(logits: Tensor, target: Tensor) -> Tensor:
    return peers.lovasz_softmax()[peers.SMP](logits, target)


def _peer_focal(logits: Tensor, target: Tensor) -> Tensor:
    return peers.softmax_focal()["kornia"](logits, target)


_peer_sce = functools.partial(F.cross_entropy, label_smoothing=SMOOTHING)
_SMP, _KORNIA, _MONAI, _TORCH = peers.SMP, "kornia", "monai", "torch cross_entropy"


def _main() -> list[Arm]:
    return [
        Arm("Dice", "main", "an image at a time, with background", _always(dice), _always(_peer_dice), _MONAI),
        Arm("Tversky", "main", _tversky_settings(TVERSKY), _always(tversky), _always(_peer_tversky), _MONAI),
        Arm("Lovász", "main", "present classes, over the batch", _always(lovasz), _always(_peer_lovasz), _SMP),
        Arm("Focal", "main", f"gamma {GAMMA:g}, no alpha, mean over pixels", _always(focal), _always(_peer_focal), _KORNIA),
        Arm("SCE", "main", f"label smoothing {SMOOTHING}", _always(sce), _always(_peer_sce), _TORCH),
    ]


def _extra() -> list[Arm]:
    ce, peer_ce = cross_entropy, F.cross_entropy
    positives, peer_positives = focal_per_positive, _peer_focal_per_positive
    sums = {
        "CE + Lovász": ("equal weights", _sum(ce, lovasz), _sum(peer_ce, _peer_lovasz), _TORCH),
        "Focal + Lovász": (f"gamma {GAMMA:g}, per positives; equal weights", focal_and_lovasz,
                           _sum(peer_positives, _peer_lovasz), _KORNIA),
    }  # fmt: skip
    return [
        Arm("CE", "extra", "", _always(ce), _always(peer_ce), _TORCH),
        *(
            Arm(name, "extra", settings, _always(ours), _always(theirs), f"{peer} + {_SMP}")
            for name, (settings, ours, theirs, peer) in sums.items()
        ),
        Arm("CE then Lovász", "extra", "half of the steps each", _then(ce, lovasz), _then(peer_ce, _peer_lovasz),
            f"{_TORCH}, {_SMP}"),
        Arm("Sigmoid focal", "extra", f"one-vs-rest, gamma {GAMMA:g}, no alpha", _always(one_vs_rest),
            _always(_peer_one_vs_rest), "torchvision", binary=True),
        Arm("Focal per positives", "extra", f"gamma {GAMMA:g}, over the pixels of curves", _always(positives),
            _always(peer_positives), _KORNIA),
    ]  # fmt: skip


def _sensitivity() -> list[Arm]:
    focals = {gamma: functools.partial(veerloss.softmax_focal_loss, gamma=gamma) for gamma in SENSITIVITY_GAMMA}
    tverskys = {weights: functools.partial(tversky, weights=weights) for weights in SENSITIVITY_TVERSKY}
    return [
        *(Arm(f"Focal, gamma {gamma:g}", "sensitivity", f"gamma {gamma:g}", _always(loss)) for gamma, loss in focals.items()),
        *(
            Arm(f"Tversky, {weights[0]}/{weights[1]}", "sensitivity", _tversky_settings(weights), _always(loss))
            for weights, loss in tverskys.items()
        ),
    ]


def _tversky_settings(weights: tuple[float, float]) -> str:
    return f"false positives {weights[0]}, false negatives {weights[1]}; as Dice"


ARMS: dict[str, Arm] = {arm.name: arm for arm in (*_main(), *_extra(), *_sensitivity())}
