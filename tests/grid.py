"""The shapes, types, layouts and backends that every loss is tested on, and why each is there.

Tests are written once and get their backend as a parameter, which the fixture `backend` of conftest.py sets up. Native kernels
and the reference run every point of a test's grid. Two backends are slow: "triton", interpreted on the CPU, whose time goes by
the operation; and "emulated", the CUDA kernels of csrc/cuda run thread by thread on the CPU, whose time goes by the pixel. What
they leave out, and why, is in `left_out` and `some_layouts` below, and nowhere else but where a test names its backends.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from veerloss import lovasz_hinge_loss, lovasz_softmax_loss

FOCAL_KERNELS = ("native", "triton", "emulated")
LOVASZ_KERNELS = ("native", "triton", "emulated")
HISTOGRAM_KERNELS = ("native", "emulated")  # of method "histogram" Triton has none
REGION_KERNELS = ("native", "emulated")
COMPOUND_KERNELS = ("native",)


def _over_backends(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", names, indirect=True)


over_focal_kernels = _over_backends(*FOCAL_KERNELS)
over_focal = _over_backends(*FOCAL_KERNELS, "reference")
over_lovasz_kernels = _over_backends(*LOVASZ_KERNELS)
over_histogram_kernels = _over_backends(*HISTOGRAM_KERNELS)
over_histogram = _over_backends(*HISTOGRAM_KERNELS, "reference")
over_region_kernels = _over_backends(*REGION_KERNELS)
over_region = _over_backends(*REGION_KERNELS, "reference")
over_compound_kernels = _over_backends(*COMPOUND_KERNELS)
over_compound = _over_backends(*COMPOUND_KERNELS, "reference")
over_lovasz = _over_backends(*LOVASZ_KERNELS, "reference")

METHODS = ("exact", "histogram")
over_methods = pytest.mark.parametrize("method", METHODS)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

#: [N, C, *]
SHAPES = [
    (1, 2, 1),  # one pixel
    (3, 2),  # a classifier: no pixels, the batch is the row
    (4, 1, 7),  # one class
    (2, 3, 17),  # below every vector length, and odd
    (1, 19, 64),  # a whole number of vectors
    (2, 5, 31, 33),  # tiles that end inside an image
    (70, 3, 2, 2),  # tiles that span many images
    (2, 4, 3, 5, 7),  # volumes
    (1, 2, 1025),  # one more than the longest tile
    (1, 150, 257),  # short tiles
]
#: Tiles that span some images: for a backend that is slow with 70.
FEW_IMAGES = (9, 3, 2, 2)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory in different ways."""
    found = {"contiguous": x.contiguous()}
    if x.dim() > 1:
        found["channels_last"] = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if x.dim() > 0:
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        found["every other pixel"] = wide[..., ::2]
    return found


def labels(shape: tuple[int, ...], classes: int, *, ignore_index: int | None = None, seed: int = 0) -> Tensor:
    """int64 class indices [N, *] for logits of ``shape``; every fifth pixel ignored if asked for."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, shape[:1] + shape[2:], generator=generator)
    if ignore_index is not None:
        target.view(-1)[::5] = ignore_index
    return target


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, scale: float = 2.0, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


#: What the errors of a Lovász loss may be of.
KINDS = ("softmax", "probabilities", "hinge")
over_kinds = pytest.mark.parametrize("kind", KINDS)


def lovasz_case(kind: str, x: Tensor) -> tuple[Callable, Tensor, dict]:
    """(loss, what it takes, its options) for logits [N, C, P]; the hinge has the first channel."""
    if kind == "hinge":
        return lovasz_hinge_loss, x[:, 0], {}
    return lovasz_softmax_loss, x.softmax(1) if kind == "probabilities" else x, {"from_logits": kind == "softmax"}


# ---- what slow backends run

#: Sizes of veerloss/triton/_tuning.py for the interpreter, which takes as long for a small array as for one of thousands.
INTERPRETED_TILES = {
    "SIGMOID_TILE": 1 << 14, "SOFTMAX_TILE": 1 << 14, "LOVASZ_TILE": 8192, "LOVASZ_MAX_PIXELS": 1024
}  # fmt: skip


def some_layouts(x: Tensor, backend: str, *, hinge: bool = False) -> dict[str, Tensor]:
    """All layouts (of binary logits [N, *] those that have no copy made of them), or of a slow backend some."""
    found = layouts(x)
    if hinge:
        found.pop("channels_last", None)
    if backend == "triton":
        if x.dim() > 1 and x.size(1) >= 19:  # each takes a second
            name = "every other pixel" if hinge else "channels_last"
            return {name: found[name]}
        # What differs is the conversion of a value that was loaded, which layouts do not change.
        if x.dtype in (torch.float16, torch.float64):
            return {"contiguous": found["contiguous"]}
    return found


def runs(backend: str, test: str, point: dict, examples: bool) -> bool:
    """Whether a backend runs a test, "module.function", with these parameters; `examples`: 60 times, by Hypothesis."""
    shape = point.get("shape") or (1,)
    if backend == "triton":
        # Programs have pixels of one image, and each takes as long as the first: a few images do as well as many.
        slow = examples or shape[0] > FEW_IMAGES[0] or point.get("pixels", 0) > 20_000
        none = point.get("method") == "histogram"
        return not slow and not none and _TRITON.get(test, _always)(**point)
    if backend == "emulated":
        # float16: the emulator converts it as bfloat16, by the functions of CUDA's own headers.
        slow = point.get("dtype") == torch.float16 or point.get("pixels", 0) > 65_537
        return not slow and _EMULATED.get(test, _always)(**point)
    return shape != FEW_IMAGES


def _always(**_) -> bool:
    return True


def _strided(layout, **_) -> bool:
    """Of opcheck, which runs an operator eight times, the harder layout."""
    return layout == "strided"


def _one_scale_of_other_types(scale, dtype, **_) -> bool:
    return scale == 2.0 or dtype == torch.float32


_FLOAT32 = torch.float32
#: What they run of tests that have more parameters than it takes to see each option, each type, each kind of layout once.
_TRITON = {
    # A kernel's arithmetic is in float32 or float64; types differ in how a value is loaded, which few shapes show.
    "test_focal.test_softmax_grid": lambda shape, dtype, **_: dtype == _FLOAT32 or shape in SHAPES[:5],
    "test_focal.test_softmax_numbers_of_classes": lambda classes, **_: classes in (1, 4, 20, 33, 161),
    "test_focal.test_softmax_rows_with_a_gap_between_images": lambda classes, pixels, **_: (classes, pixels) == (5, 1100),
    "test_focal.test_probabilities_grid": lambda shape, dtype, **_: (
        shape in SHAPES[2:5] if dtype == _FLOAT32 else shape == SHAPES[3]
    ),
    "test_focal.test_probabilities_options": lambda alpha, smoothing, gamma, reduction, **_: (
        gamma in (0.0, 0.5, 2.0) and reduction == "mean" and (smoothing > 0) == (alpha is not None)
    ),
    "test_focal.test_probabilities_at_gamma_0_are_cross_entropy": lambda shape, **_: shape == (7, 4),
    "test_focal.test_sigmoid_grid": lambda shape, kind, dtype, **_: (
        kind in ("soft", "index") and (dtype == _FLOAT32 or shape in [*SHAPES[:5], (5,)])
    ),
    "test_focal.test_sigmoid_layouts_of_logits_and_target": lambda kind, gamma, dtype, **_: (
        (kind, gamma, dtype) == ("index", 2.0, _FLOAT32)
    ),
    # There is a branch for gamma 0, one for 2 and one for the others; "sum" is "mean" but for the last launch.
    "test_focal.test_softmax_options": lambda alpha, smoothing, gamma, reduction, **_: (
        gamma in (0.0, 0.5, 2.0) and (reduction != "sum" or gamma == 2.0) and (smoothing < 1.0 or alpha is None)
    ),
    "test_focal.test_sigmoid_options": lambda kind, gamma, reduction, **_: (
        gamma in (0.0, 0.5, 2.0) and (reduction != "sum" or gamma == 2.0)
        if kind in ("soft", "index")
        else (gamma, reduction) == (2.0, "mean")
    ),
    "test_focal.test_softmax_confident_pixels_keep_their_digits": lambda gamma, **_: gamma in (0.0, 0.5, 2.0),
    "test_focal.test_gamma_0_is_cross_entropy": lambda shape, **_: shape == (3, 4, 5, 6),
    # Of one image the batch is the image.
    "test_lovasz.test_softmax_grid": lambda shape, options, dtype, **_: (
        (dtype == _FLOAT32 or shape == SHAPES[5]) and (options == {} or (shape[0] > 1 and len(shape) > 2))
    ),
    "test_lovasz.test_softmax_options": lambda classes, from_logits, weighted, reduction, **_: (
        (from_logits, weighted, reduction) in ((True, True, "none"), (True, False, "mean"), (False, True, "sum"))
        and classes != [1]
    ),
    "test_lovasz.test_equal_terms_of_many_classes": lambda classes, **_: classes == 1000,
    "test_lovasz.test_probabilities": lambda per_image, **_: not per_image,
    "test_lovasz.test_hinge_grid": lambda shape, scale, dtype, **_: (
        shape in ((1, 1), (2, 31, 33)) and _one_scale_of_other_types(scale, dtype)
    ),
    "test_lovasz.test_hinge_options": lambda reduction, **_: reduction != "sum",
    "test_lovasz.test_sort_sizes": lambda pixels, scale, dtype, **_: pixels > 1000 and scale == 3.0 and dtype == _FLOAT32,
    "test_lovasz_edges.test_every_nan_is_one": lambda bits, **_: bits in (0x7F800001, 0xFFFFFFFF),
    "test_lovasz_edges.test_all_ignored_is_zero_with_zero_gradient": lambda reduction, **_: reduction != "sum",
    "test_ops.test_opcheck": _strided,
}
_EMULATED = {
    # One-hot and bool targets are values, as soft ones are; the other types are loads, which few shapes show.
    "test_region.test_grid": lambda shape, dtype, kind, **_: (
        shape == SHAPES[5] or (dtype == _FLOAT32 and kind in ("index", "soft"))
    ),
    # The form and the reduction of a loss are arithmetic of segments, the same in C++ for the CPU.
    "test_region.test_forms": lambda smooth, kind, squared, form, **_: (
        smooth == 0.0 and (form == "linear" or (kind == "index" and not squared))
    ),
    "test_region.test_options": lambda classes, weighted, reduction, **_: (
        (weighted, reduction) in ((True, "none"), (False, "mean")) and classes != (4, 0, 3)
    ),
    # Tables of many segments take seconds.
    "test_lovasz.test_softmax_grid": lambda shape, method, **_: (
        shape not in ((70, 3, 2, 2), (1, 150, 257)) if method == "histogram" else shape != FEW_IMAGES
    ),
    "test_lovasz.test_equal_terms_of_many_classes": lambda classes, **_: classes == 1000,
    "test_lovasz.test_hinge_grid": lambda shape, scale, dtype, method, **_: (
        _one_scale_of_other_types(scale, dtype) and (shape != (70, 2, 2) or method == "exact" or scale == 2.0)
    ),
    "test_lovasz.test_softmax_options": lambda from_logits, weighted, method, **_: (
        weighted or (from_logits and method == "exact")
    ),
    "test_ops.test_opcheck": _strided,
}
