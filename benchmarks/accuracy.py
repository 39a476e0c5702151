"""Relative L2 error of gradients: ours and the peers' in float32 against float64.

The truth is the same float32 logits widened to float64 and run through veerloss's reference. For
the Lovász losses Berman's formula in float64 stands in the table too (up to 4M logits): it
subtracts where the reference counts, so that the two agreeing makes either a truth.
"""

import functools
from collections.abc import Callable
from math import isfinite

from torch import Tensor

import veerloss

from . import peers
from .inputs import Inputs


def gradient(loss: peers.Loss, logits: Tensor, target: Tensor) -> Tensor:
    """d loss / d logits, at a copy of `logits` (any shape)."""
    leaf = logits.detach().clone().requires_grad_()
    loss(leaf, target).backward()
    return leaf.grad


def error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in L2, evaluated in float64; NaN stays NaN."""
    return float((found.double() - truth).norm() / truth.norm())


def lovasz_workloads(quick: bool) -> list[Inputs]:
    """About 1M pixels in every segment."""
    side = 64 if quick else 1024
    softmax = functools.partial(Inputs, "lovasz_softmax")
    two, many = (1, 2, side, side), (1, 19, side, side)
    return [
        softmax(two, fg_share=0.3),
        softmax(two, fg_share=0.01),
        softmax(two, fg_share=0.001),
        softmax(two, "trained", fg_share=0.3),
        softmax(many),
        softmax(many, "trained"),
        Inputs("lovasz_hinge", (1, side, side), fg_share=0.3),
    ]


def lovasz(inputs: Inputs) -> list[dict]:
    """One row per contestant."""
    logits, target = inputs.make()
    ours = {
        "lovasz_softmax": veerloss.lovasz_softmax_loss,
        "lovasz_hinge": veerloss.lovasz_hinge_loss,
    }[inputs.task]
    reference = functools.partial(ours, method="exact", backend="reference")
    truth = gradient(reference, logits.double(), target)
    losses = peers.TASKS[inputs.task]()
    losses.pop("torch cross_entropy", None)  # another loss: the price to meet, in the tables of time
    rows = [_row(inputs, name, loss, logits, target, truth) for name, loss in losses.items()]
    if logits.numel() < 1 << 22:  # the witness costs as much as the truth: small inputs only
        berman, wide = losses["Berman's formula"], logits.double()
        rows.append(_row(inputs, "Berman's formula, float64", berman, wide, target, truth))
    return rows


def focal_workloads(quick: bool) -> list[tuple[Inputs, float]]:
    """Inputs and gamma. Scale 30 saturates most pixels: formulas lose digits or become NaN."""
    side = 32 if quick else 256
    return [
        (Inputs(task, (2, 19, side, side), scale=scale), gamma)
        for task in ("softmax_focal", "sigmoid_focal")
        for scale, gamma in ((1.0, 2.0), (8.0, 2.0), (30.0, 2.0), (8.0, 0.5), (30.0, 0.5))
    ]


def focal(inputs: Inputs, gamma: float) -> list[dict]:
    """Ours, the float32 reference (the yardstick: ours may err twice as much), the formula."""
    logits, target = inputs.make()
    softmax = inputs.task == "softmax_focal"
    ours = veerloss.softmax_focal_loss if softmax else veerloss.sigmoid_focal_loss
    formula = peers.softmax_focal_formula if softmax else peers.sigmoid_focal_formula
    ours = functools.partial(ours, gamma=gamma, alpha=None if softmax else peers.ALPHA)
    reference = functools.partial(ours, backend="reference")
    wide = target if softmax else target.double()
    truth = gradient(reference, logits.double(), wide)
    losses = {
        "veerloss": ours,
        "veerloss reference, float32": reference,
        "plain formula": functools.partial(formula, gamma=gamma),
    }
    return [
        _row(inputs, name, loss, logits, target, truth, f" x{inputs.scale:g}, gamma {gamma:g}") for name, loss in losses.items()
    ]


def _row(
    inputs: Inputs,
    name: str,
    loss: peers.Loss,
    logits: Tensor,
    target: Tensor,
    truth: Tensor,
    note: str = "",
) -> dict:
    binary = inputs.task == "lovasz_hinge" or inputs.shape[1] == 2
    note = note or (f" foreground {inputs.fg_share:g}" if binary else "")
    row = {"workload": f"{inputs}{note}", "contestant": name}
    try:
        found = gradient(loss, logits, target)
    except Exception as problem:
        return row | {"status": peers.problem(problem)}
    value = error(found, truth)
    zeros = float(((found == 0) & (truth != 0)).double().mean())
    return row | {"status": "ok", "error": value if isfinite(value) else None, "lost": zeros}


def run(*, quick: bool, only: str, log) -> list[dict]:
    """Rows {"workload", "contestant", "status", "error" (None for NaN), "lost"}.

    `lost` is the share of gradient entries that are exactly 0 where the truth is not.
    """
    jobs: list[tuple[Inputs, Callable[[], list[dict]]]] = [
        *((i, functools.partial(lovasz, i)) for i in lovasz_workloads(quick)),
        *((i, functools.partial(focal, i, gamma)) for i, gamma in focal_workloads(quick)),
    ]
    rows = []
    for inputs, job in jobs:
        if only in str(inputs):
            log(f"accuracy: {inputs}")
            rows += job()
    return rows
