"""What every operator is called with in tests, by keyword: one list for all backends and devices."""

from __future__ import annotations

import torch
from grid import labels, logits

from veerloss._layout import (
    COARSE_BINS,
    MAGIC,
    REGION_WORDS,
    SAMPLE_RUN,
    SAMPLE_STEP,
    Activation,
    Errors,
    Form,
    Reduction,
    bin_count,
)
from veerloss.reference.histogram import cell_knots

FOCAL, LOVASZ = ("sigmoid_focal", "softmax_focal"), ("lovasz_exact", "lovasz_histogram")
HINGE = 3  # the first of the samples of LOVASZ that are hinges


def samples() -> dict[str, list[dict]]:
    """Of the forward operator of every family."""
    x, y, alpha = logits((2, 3, 10)), labels((2, 3, 10), 3), torch.tensor([0.2, 0.3, 0.5])
    dense = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
    focal = {
        "logits": x, "target": y, "class_alpha": None, "gamma": 2.0, "ignore_index": None, "reduction": Reduction.MEAN,
        "factor": 1.0, "normalizer": None, "upcast_loss": False,
    }  # fmt: skip
    sigmoid = focal | {"alpha": 0.25, "weight": None, "background_index": None}
    softmax = focal | {"alpha": 1.0, "label_smoothing": 0.0}
    each = {"gamma": 0.5, "class_alpha": alpha, "reduction": Reduction.NONE, "upcast_loss": True}
    scaled = {"reduction": Reduction.SUM, "factor": 0.5}
    lovasz = {
        "logits": x, "target": y, "selected": None, "present": True, "per_image": False, "class_weight": None,
        "ignore_index": None, "background_index": None, "errors": Errors.SOFTMAX, "reduction": Reduction.MEAN,
        "upcast_loss": False,
    }  # fmt: skip
    some = {"selected": torch.tensor([True, False, True]), "present": False, "class_weight": alpha, "ignore_index": 1}
    probabilities = {"logits": x.softmax(1), "target": y.masked_fill(y == 2, 3), "errors": Errors.PROBABILITIES}
    hinge = {"logits": x[:, :1], "target": y.clamp(max=1), "present": False, "errors": Errors.HINGE}
    lovasz = [
        lovasz,
        lovasz | some | {"per_image": True, "reduction": Reduction.NONE, "upcast_loss": True},
        lovasz | probabilities | {"per_image": True, "reduction": Reduction.SUM, "background_index": 3},
        lovasz | hinge | {"per_image": True, "ignore_index": 1},
        lovasz | hinge | {"reduction": Reduction.NONE},
    ]
    region = {
        "logits": x, "target": y, "activation": Activation.SOFTMAX, "squared": False, "per_image": False, "ignore_index": None,
        "background_index": None, "selected": None, "present": False, "class_weight": None, "alpha": 0.3, "beta": 0.7,
        "smooth_numerator": 1e-5, "smooth_denominator": 1e-5, "form": Form.LINEAR, "exponent": 1.0,
        "reduction": Reduction.MEAN, "upcast_loss": False,
    }  # fmt: skip
    compound = {
        "logits": x, "target": y, "focal": 0.7, "lovasz": 1.3, "region": 0.5, "alpha": None, "class_alpha": alpha, "gamma": 2.0,
        "label_smoothing": 0.0, "weighted_mean": False, "selected": None, "present": True, "region_selected": None,
        "region_present": False, "region_alpha": 0.3, "region_beta": 0.7, "smooth_numerator": 1e-5, "smooth_denominator": 1e-5,
        "form": Form.LINEAR, "exponent": 1.0, "errors": Errors.SOFTMAX, "per_image": False, "ignore_index": None,
        "histogram": True, "valid_pixels": None, "keep_weights": True, "upcast_loss": False,
    }  # fmt: skip
    return {
        "sigmoid_focal": [
            sigmoid | {"target": dense},
            sigmoid | each | {"alpha": None, "weight": dense, "ignore_index": 1},
            sigmoid | {"target": labels((2, 3, 10), 4), "background_index": 3, "ignore_index": 1},
            sigmoid | scaled | {"target": dense, "alpha": None, "normalizer": torch.tensor(3)},
        ],
        "softmax_focal": [
            softmax | {"ignore_index": -100},
            softmax | each | {"label_smoothing": 0.1},
            softmax | {"target": dense, "class_alpha": alpha, "label_smoothing": 0.1},
            softmax | scaled | {"alpha": 0.5, "gamma": 0.0, "ignore_index": 1, "normalizer": torch.tensor(3.0)},
        ],
        "lovasz_exact": [sample | {"valid_pixels": None, "keep_weights": True} for sample in lovasz],
        "lovasz_histogram": [sample | {"valid_pixels": None} for sample in lovasz],
        "region": [
            region | {"ignore_index": 1},
            region
            | some
            | {
                "target": dense,
                "ignore_index": None,
                "activation": Activation.SIGMOID,
                "squared": True,
                "reduction": Reduction.NONE,
                "per_image": True,
                "upcast_loss": True,
            },
            region
            | {
                "logits": x.softmax(1),
                "target": y.masked_fill(y == 2, 3),
                "activation": Activation.NONE,
                "background_index": 3,
                "form": Form.LOG,
                "exponent": 0.3,
            },
        ],
        "compound": [
            compound,
            compound | {"histogram": False, "per_image": True, "label_smoothing": 0.1, "upcast_loss": True},
            compound | {"lovasz": None, "class_alpha": None, "weighted_mean": True, "gamma": 0.0, "ignore_index": 1},
            compound | hinge | {"class_alpha": None, "alpha": 0.25, "histogram": False},
            compound | {"focal": None, "region": None, "region_selected": torch.tensor([True, False, True])},
        ],
    }


def names(arguments) -> list[str]:
    """Of arguments or results in a schema."""
    return [argument.name for argument in arguments]


def backward_arguments(operators, stem: str, arguments: dict) -> dict:
    """Of <stem>_backward: arguments and results of <stem>_forward."""
    forward, backward = (getattr(operators, f"{stem}_{direction}").default for direction in ("forward", "backward"))
    with torch.no_grad():
        results = forward(**arguments)
    known = {"upsample": None} | arguments | dict(zip(names(forward._schema.returns), results, strict=True))
    known["grad"] = torch.ones_like(results[0])
    return {name: known[name] for name in names(backward._schema.arguments)}


def valid(operators, operator: str) -> dict:
    """Of any operator, which takes them without complaint."""
    stem = next(stem for stem in samples() if operator.startswith(stem))
    arguments = samples()[stem][2 if operator == "lovasz_histogram_sum" else 0]  # there, probabilities
    if operator.endswith("_forward"):
        return arguments
    if operator.endswith("_backward"):
        return backward_arguments(operators, stem, arguments)
    if stem == "region":
        known = {"upsample": None} | arguments
        for step in ("sum", "weigh"):
            name = f"region_{step}"
            of_step = {argument: known[argument] for argument in names(getattr(operators, name).default._schema.arguments)}
            if name == operator:
                return of_step
            known["sums"] = getattr(operators, name)(**of_step)
    if stem == "compound" and operator != "compound_count":
        known = {"upsample": None} | arguments | sums_of_terms(1, 3)
        return {argument: known[argument] for argument in names(getattr(operators, operator).default._schema.arguments)}
    x = arguments["logits"]
    segments = (x.size(0) if arguments["per_image"] else 1, x.size(1))
    known = {"background_index": None, "class_weight": None, "reduction": Reduction.MEAN, "upsample": None} | arguments | {
        "table": None, "counted_table": None, "segment_mask": None, "sampled": False, "find_largest": True,
        "recounted_mask": None, "recounts": None, "recounted_table": None, "bins": bin_count(x.size(1)), "again": False,
    }  # fmt: skip

    def of(name: str) -> dict:
        return {argument: known[argument] for argument in names(getattr(operators, name).default._schema.arguments)}

    # The steps of method "histogram", each of which takes what those before it have made.
    for step in ("count", "place", "count", "weigh", "sum"):
        name = f"lovasz_histogram_{step}"
        if step == "count":  # which adds to these
            known["counts"] = torch.zeros(
                (*segments, 2, COARSE_BINS if known["table"] is None else known["bins"]), dtype=torch.int32
            )
            known["largest"] = torch.zeros(segments, dtype=torch.int32)
        if name == operator and (step != "count" or known["table"] is not None):
            break
        if operator == "compound_count" and step == "count" and known["table"] is not None:
            known |= sums_of_terms(*segments)
            break
        results = getattr(operators, name)(**of(name))
        results = results if isinstance(results, (tuple, list)) else (results,)
        known |= dict(zip(RESULTS[step], results, strict=True)) if step != "count" else {}
    return of(operator)


def sums_of_terms(rows: int, classes: int) -> dict:
    sums = torch.zeros((rows, classes, REGION_WORDS), dtype=torch.int64)
    return {"focal_sums": torch.zeros(3, dtype=torch.float64), "region_sums": sums}


RESULTS = {
    "place": ("table",),
    # Bounds do as units: float64 [rows, C].
    "weigh": ("loss", "scale", "weights", "units", "needs_rebin", "better_table"),
}


def strided(x: torch.Tensor) -> torch.Tensor:
    """Logits whose classes are neighbours in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rare_foreground(pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and target of which a sample has no foreground."""
    position = torch.arange(pixels) % SAMPLE_STEP
    assert SAMPLE_RUN < 500
    target = ((position >= 500) & (position < 505)).long()[None]
    return logits((1, 2, pixels), scale=0.25), target


def bins_before(pairs: torch.Tensor) -> torch.Tensor:
    """[..., CELLS]: how many bins tables [..., TABLE, 2] have given out up to the end of each cell."""
    scale, offset = pairs[..., 1:, :].double().unbind(-1)
    before = (cell_knots()[1:] * scale + (offset - MAGIC) - 1.5) / 4
    assert (before - before.round()).abs().max() <= 0.25  # an offset is a multiple of 1 or 1/2, of a quarter of a bin
    return before.round()
