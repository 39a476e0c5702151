"""Relative L2 error of gradients: ours and the peers' in float32 against float64.

The truth is the same float32 logits widened to float64 and run through veerloss's reference. For
the Lovász losses Berman's formula in float64 stands in the table too (up to 4M logits): it
subtracts where the reference counts, so that the two agreeing makes either a truth.
"""

import functools
from math import isfinite, prod

from torch import Tensor

from . import peers
from .inputs import Inputs, Job

WITNESS = f"{peers.BERMAN}, float64"


def gradient(loss: peers.Loss, logits: Tensor, target: Tensor) -> Tensor:
    """d loss / d logits, at a copy of `logits` (any shape)."""
    leaf = logits.detach().clone().requires_grad_()
    loss(leaf, target).backward()
    return leaf.grad


def error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in L2, evaluated in float64; NaN stays NaN."""
    return float((found.double() - truth).norm() / truth.norm())


def measure(inputs: Inputs, losses: dict[str, peers.Loss], reference: peers.Loss, note: str = "") -> list[dict]:
    """Rows {"workload", "contestant", "status", "error" (None for NaN), "lost"}, one per loss.

    `lost` is the share of gradient entries that are exactly 0 where the truth is not.
    """
    logits, target = inputs.make()
    wide = logits.double()
    truth = gradient(reference, wide, target.double() if target.is_floating_point() else target)
    rows = []
    for name, loss in losses.items():
        row = {"workload": f"{inputs}{note}", "contestant": name}
        try:
            found = gradient(loss, wide if name == WITNESS else logits, target)
            value, lost = error(found, truth), float(((found == 0) & (truth != 0)).double().mean())
            row |= {"status": "ok", "error": value if isfinite(value) else None, "lost": lost}
        except Exception as problem:
            row["status"] = peers.problem(problem)
        rows.append(row)
    return rows


def lovasz(inputs: Inputs) -> list[dict]:
    losses = peers.TASKS[inputs.task]()
    losses.pop(peers.CROSS_ENTROPY, None)  # another loss: the price to meet, in the tables of time
    if prod(inputs.shape) < 1 << 22:  # the witness costs as much as the truth: small inputs only
        losses[WITNESS] = losses[peers.BERMAN]
    binary = inputs.task == "lovasz_hinge" or inputs.shape[1] == 2
    reference = functools.partial(losses[peers.EXACT], backend="reference")
    return measure(inputs, losses, reference, f" foreground {inputs.fg_share:g}" if binary else "")


def focal(inputs: Inputs, gamma: float) -> list[dict]:
    """Ours, the float32 reference (the yardstick: ours may err twice as much), the formula."""
    losses = peers.TASKS[inputs.task]()
    ours, formula = (functools.partial(losses[name], gamma=gamma) for name in (peers.OURS, "plain formula"))
    reference = functools.partial(ours, backend="reference")
    losses = {peers.OURS: ours, "veerloss reference, float32": reference, "plain formula": formula}
    return measure(inputs, losses, reference, f" x{inputs.scale:g}, gamma {gamma:g}")


def jobs(quick: bool) -> list[Job]:
    """Lovász: about 1M pixels in every segment. Focal: scale 30 saturates most pixels: formulas lose digits or become NaN."""
    side, focal_side = (64, 32) if quick else (1024, 256)
    two, many = (1, 2, side, side), (1, 19, side, side)
    over_lovasz = [
        *(Inputs("lovasz_softmax", two, fg_share=share) for share in (0.3, 0.01, 0.001)),
        Inputs("lovasz_softmax", two, "trained", fg_share=0.3),
        Inputs("lovasz_softmax", many),
        Inputs("lovasz_softmax", many, "trained"),
        Inputs("lovasz_hinge", (1, side, side), fg_share=0.3),
    ]
    over_focal = [
        (Inputs(task, (2, 19, focal_side, focal_side), scale=scale), gamma)
        for task in ("softmax_focal", "sigmoid_focal")
        for scale, gamma in ((1.0, 2.0), (8.0, 2.0), (30.0, 2.0), (8.0, 0.5), (30.0, 0.5))
    ]
    return [
        *((inputs, functools.partial(lovasz, inputs)) for inputs in over_lovasz),
        *((inputs, functools.partial(focal, inputs, gamma)) for inputs, gamma in over_focal),
    ]
