"""The losses that are compared: ours, the peers' released code, and plain transcriptions.

Every task maps names to `loss(logits, target) -> 0-d tensor`. A peer is imported by the first call
of its loss, which raises `Missing` where it is not installed.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import veerloss

Loss = Callable[[Tensor, Tensor], Tensor]
SMP = "segmentation-models-pytorch"
MONAI = "monai"
PEERS = (SMP, "kornia", MONAI, "torchvision")
ALPHA, GAMMA = 0.25, 2.0
#: Contestants that bars and tables speak of.
OURS, HISTOGRAM, EXACT = "veerloss", "veerloss histogram", "veerloss exact"
ONE_BY_ONE, LOVASZ_ALONE = "veerloss, one by one", "veerloss, Lovász alone"
CROSS_ENTROPY, BERMAN = "torch cross_entropy", "Berman's formula"


# ------------------------------------------------------------------ transcriptions


def lovasz_extension(errors: Tensor, fg: Tensor) -> Tensor:
    """Algorithm 1 of Berman et al., arXiv 1705.08790, for one segment: errors [P], fg [P] (0, 1).

    Weights are differences of neighbouring Jaccard losses in the type of `errors`; that
    subtraction is what costs float32 its gradient on large images.
    """
    errors, order = errors.sort(descending=True)
    fg = fg[order]
    total = fg.sum()
    jaccard = 1 - (total - fg.cumsum(0)) / (total + (1 - fg).cumsum(0))
    return errors @ jaccard.diff(prepend=jaccard.new_zeros(1))


def berman_softmax(logits: Tensor, target: Tensor) -> Tensor:
    """Lovász-Softmax over the batch, mean of the present classes: [N, C, *], [N, *] -> []."""
    wide = torch.promote_types(logits.dtype, torch.float32)  # counts overflow 16-bit floats
    probs = logits.to(wide).softmax(1)
    losses = []
    for c in target.unique().tolist():
        fg = (target == c).to(wide)
        losses.append(lovasz_extension((fg - probs[:, c]).abs().flatten(), fg.flatten()))
    return torch.stack(losses).mean()


def berman_hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Binary Lovász hinge, mean of the images: [N, *], [N, *] in {0, 1} -> []."""
    fg = target.to(logits.dtype)
    errors = F.relu(1 - logits * (2 * fg - 1))
    pairs = zip(errors.flatten(1), fg.flatten(1), strict=True)
    return torch.stack([lovasz_extension(e, y) for e, y in pairs]).mean()


def sigmoid_focal_formula(logits: Tensor, target: Tensor, gamma: float = GAMMA) -> Tensor:
    """The focal loss as most code writes it, on dense float targets: [*], [*] -> []."""
    p = logits.sigmoid()
    p_t = torch.where(target > 0.5, p, 1 - p)
    alpha_t = torch.where(target > 0.5, ALPHA, 1 - ALPHA)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (alpha_t * (1 - p_t) ** gamma * bce).mean()


def softmax_focal_formula(logits: Tensor, target: Tensor, gamma: float = GAMMA) -> Tensor:
    """The focal loss people write on top of cross_entropy: [N, C, *], [N, *] -> []."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ((1 - torch.exp(-ce)) ** gamma * ce).mean()


# ------------------------------------------------------------------ installed peers


def version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def declare_torchvision_operators() -> None:
    """Let a CUDA build of torchvision be imported beside a CPU build of torch.

    Its C++ library cannot load there, and the import then stops at fakes for operators that nobody
    declared. Its losses are plain Python, so two empty declarations are enough to reach them.
    """
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*") if spec else ():
        try:
            torch.ops.load_library(str(library))
        except OSError:
            for name in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", schema)


class Missing(Exception):
    """A peer that cannot be had here; the message is the reason that the tables show."""


class Lazy:
    """A loss that is imported, or compiled, when it is first called."""

    def __init__(self, load: Callable[[], Loss]) -> None:
        self.load = functools.cache(load)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.load()(logits, target)


def _peer(package: str, module: str, make: Callable[..., Loss]) -> Lazy:
    """`make(module)` is the loss of an installed package."""

    def load() -> Loss:
        if version(package) == "not installed":
            raise Missing("not installed")
        if package not in ("kornia", MONAI):  # the others import torchvision
            declare_torchvision_operators()
        return make(importlib.import_module(module))

    return Lazy(load)


def _smp(mode: str, **options) -> Lazy:
    return _peer(SMP, "segmentation_models_pytorch.losses", lambda losses: losses.LovaszLoss(mode, **options))


def _kornia(make: Callable[..., Loss]) -> Lazy:
    return _peer("kornia", "kornia.losses", make)


def compiled(loss: Loss | Lazy) -> Lazy:
    """Fixed shapes are the compiler's best case; it runs in the warm-up, never while timing."""
    load = loss.load if isinstance(loss, Lazy) else lambda: loss
    return Lazy(lambda: torch.compile(load(), dynamic=False))


def torchvision_focal(alpha: float) -> Lazy:
    """alpha < 0: none."""
    options = {"alpha": alpha, "gamma": GAMMA, "reduction": "mean"}
    return _peer("torchvision", "torchvision.ops", lambda ops: functools.partial(ops.sigmoid_focal_loss, **options))


_torchvision_focal = torchvision_focal(ALPHA)


# ------------------------------------------------------------------ tasks


def _methods(loss: Callable[..., Tensor]) -> dict[str, Loss]:
    return {HISTOGRAM: functools.partial(loss, method="histogram"), EXACT: functools.partial(loss, method="exact")}


def lovasz_softmax() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *]. kornia averages images too; cross_entropy is another loss, and the price to meet."""
    return {
        **_methods(veerloss.lovasz_softmax_loss),
        CROSS_ENTROPY: F.cross_entropy,
        SMP: _smp("multiclass"),
        BERMAN: berman_softmax,
        "kornia": _kornia(lambda losses: losses.lovasz_softmax_loss),
    }


def lovasz_hinge() -> dict[str, Loss]:
    """logits [N, *], target [N, *] in {0, 1}; all of them score each image and average."""
    return {
        **_methods(veerloss.lovasz_hinge_loss),
        SMP: _smp("binary", per_image=True),
        BERMAN: berman_hinge,
        "kornia": _kornia(lambda losses: lambda x, t: losses.lovasz_hinge_loss(x[:, None], t)),
    }


def softmax_focal() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *]; kornia's mean is over classes too."""
    options = {"alpha": None, "gamma": GAMMA, "reduction": "mean"}
    return {
        OURS: functools.partial(veerloss.softmax_focal_loss, gamma=GAMMA),
        CROSS_ENTROPY: F.cross_entropy,
        "kornia": _kornia(lambda losses: functools.partial(losses.focal_loss, **options)),
        "plain formula": softmax_focal_formula,
        "plain formula, torch.compile": compiled(softmax_focal_formula),
    }


def sigmoid_focal() -> dict[str, Loss]:
    """logits [*], target [*] of the same shape and type."""
    losses = {
        OURS: functools.partial(veerloss.sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA),
        "torchvision": _torchvision_focal,
        "torchvision, torch.compile": compiled(_torchvision_focal),
        "plain formula": sigmoid_focal_formula,
    }
    if version("torchvision") == "not installed":
        losses["plain formula, torch.compile"] = compiled(sigmoid_focal_formula)
    return losses


def sigmoid_focal_index() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *] class indices: peers must build the one-hot tensor."""

    def through_one_hot(dense: Loss, logits: Tensor, target: Tensor) -> Tensor:
        hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1)
        return dense(logits, hot.to(logits.dtype))

    torchvision = Lazy(lambda: functools.partial(through_one_hot, _torchvision_focal.load()))
    return {
        OURS: functools.partial(veerloss.sigmoid_focal_loss, alpha=ALPHA, gamma=GAMMA),
        "one_hot + torchvision": torchvision,
        "one_hot + torchvision, torch.compile": compiled(torchvision),
        "one_hot + plain formula": functools.partial(through_one_hot, sigmoid_focal_formula),
    }


def dice() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *]; sums over the batch, all classes. SMP leaves out classes without target pixels."""

    def monai(losses) -> Loss:
        loss = losses.DiceLoss(softmax=True, to_onehot_y=True, batch=True)
        return lambda logits, target: loss(logits, target[:, None])

    return {
        OURS: veerloss.dice_loss,
        CROSS_ENTROPY: F.cross_entropy,
        MONAI: _peer(MONAI, "monai.losses", monai),
        SMP: _peer(SMP, "segmentation_models_pytorch.losses", lambda losses: losses.DiceLoss("multiclass")),
    }


def dice_cross_entropy() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *]; the sum of two terms, each as in its own task."""

    def monai(losses) -> Loss:
        loss = losses.DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
        return lambda logits, target: loss(logits, target[:, None])

    def smp(losses) -> Loss:
        dice = losses.DiceLoss("multiclass")
        return lambda logits, target: dice(logits, target) + F.cross_entropy(logits, target)

    return {
        OURS: functools.partial(veerloss.compound_loss, cross_entropy=1.0, dice=1.0),
        CROSS_ENTROPY: F.cross_entropy,
        MONAI: _peer(MONAI, "monai.losses", monai),
        f"{SMP} + torch": _peer(SMP, "segmentation_models_pytorch.losses", smp),
    }


def compound() -> dict[str, Loss]:
    """logits [N, C, *], target [N, *]; focal, Lovász and Dice. The others are ours: what one pass for all of them gains, and
    what they cost beside the dearest."""
    lovasz = functools.partial(veerloss.lovasz_softmax_loss, method="histogram")

    def one_by_one(logits: Tensor, target: Tensor) -> Tensor:
        return veerloss.softmax_focal_loss(logits, target) + lovasz(logits, target) + veerloss.dice_loss(logits, target)

    return {
        OURS: functools.partial(veerloss.compound_loss, focal=1.0, lovasz=1.0, dice=1.0, method="histogram"),
        CROSS_ENTROPY: F.cross_entropy,
        ONE_BY_ONE: one_by_one,
        LOVASZ_ALONE: lovasz,
    }


TASKS: dict[str, Callable[[], dict[str, Loss]]] = {
    task.__name__: task
    for task in (
        lovasz_softmax,
        lovasz_hinge,
        softmax_focal,
        sigmoid_focal,
        sigmoid_focal_index,
        dice,
        dice_cross_entropy,
        compound,
    )
}


def problem(error: Exception) -> str:
    """What a table says of a loss that raised: "not installed", or the type of the error."""
    return str(error) if isinstance(error, Missing) else f"fails: {type(error).__name__}"
