"""Focal losses as Triton kernels: the formulas of csrc/focal.h, tiles of [classes, pixels], one read of the logits per pass.

Forward is two launches: tiles, of which each program adds its own into a float64 partial sum, and one program that adds the
partial sums in order. Backward is one launch. Nothing is kept but the inputs, nothing waits for the host, and no atomics: the
same inputs give the same bits. A target out of range makes its element NaN; nothing is read out of bounds for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import arithmetic_dtype
from ._focal_math import log_of_sum, sigmoid_focal, softmax_focal
from ._launch import MAX_PROGRAMS, arithmetic, as_bytes, check_shape, next_power_of_2, on_device, strides
from ._math import exp_neg

# ---- tiles


@triton.jit
def widened(x, T: tl.constexpr):
    """What was loaded, in the type T: of bfloat16 by way of float32, for Triton's interpreter converts it to that only."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(T)


@triton.jit
def tile_at(tile, C, P, CLASS_TILES, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, classes [BLOCK_C, 1] and pixels [1, BLOCK_P] of a tile, in 64 bits. Tiles of the same pixels are neighbours."""
    pixel_tiles = (P + BLOCK_P - 1) // BLOCK_P
    block = tile // CLASS_TILES
    c = (tile % CLASS_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    p = (block % pixel_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    return (block // pixel_tiles).to(tl.int64), c.to(tl.int64), p


@triton.jit
def place(strides, n, c, p):
    return n * strides[0] + c * strides[1] + p * strides[2]


@triton.jit
def labels_at(target, offsets, inside, ignore_index, C):
    """Labels in 64 bits (0 where there is none to use), which pixels count, and which of these are out of range."""
    label = tl.load(target + offsets, mask=inside, other=0).to(tl.int64)
    valid = inside
    if ignore_index is not None:
        valid = valid & (label != ignore_index)
    bad = valid & ((label < 0) | (label >= C))
    return tl.where(valid & (bad == 0), label, 0), valid, bad


@triton.jit
def incoming(grad, grad_strides, scale, n, c, p, inside, T: tl.constexpr):
    """The gradient that reaches each element; `scale` is None where the loss has a value for each."""
    if scale is None:
        return widened(tl.load(grad + place(grad_strides, n, c, p), mask=inside, other=0.0), T)
    else:
        return widened(tl.load(grad), T) * tl.load(scale)


@triton.jit
def sigmoid_at(
    logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index, n, c, p,
    inside, C, P, ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Value and derivative of the elements of a tile, 0 where they do not count, and which count."""
    if ONE_HOT:
        label, valid, bad = labels_at(target, n * target_strides[0] + p * target_strides[2], p < P, ignore_index, C)
        valid = valid & inside
        t = (c == label).to(T)
    else:
        stored = tl.load(target + place(target_strides, n, c, p), mask=inside, other=0)
        valid = inside
        if ignore_index is not None:  # compared before it is rounded to T, or wrapped to the type of the target
            if stored.dtype.is_floating():
                valid = valid & (widened(stored, tl.float64) != tl.full((), ignore_index, tl.int64).to(tl.float64))
            else:
                valid = valid & (stored.to(tl.int64) != ignore_index)
        t = widened(stored, T)
        bad = (t < 0.0) | (t > 1.0)
    t = tl.where(bad, float("nan"), t)
    # Of what does not count, too: a load is a vector only where its mask does not depend on data.
    x = tl.where(valid, tl.load(logits + place(logits_strides, n, c, p), mask=inside, other=0.0).to(T), 0.0)
    if class_alpha is not None:
        alpha_positive = tl.load(class_alpha + c, mask=c < C, other=0.0)
        alpha_negative = 1.0 - alpha_positive
    elif HAS_ALPHA:
        alpha_positive = tl.full((), alpha, tl.float64).to(T)
        alpha_negative = (1.0 - tl.full((), alpha, tl.float64)).to(T)
    else:
        alpha_positive = tl.full((), 1.0, T)
        alpha_negative = alpha_positive
    value, slope = sigmoid_focal(x, t, alpha_positive, alpha_negative, tl.full((), gamma, T), FOCUS)
    if weight is not None:
        w = widened(tl.load(weight + place(weight_strides, n, c, p), mask=inside, other=0), T)
        value = w * value
        slope = w * slope
    return tl.where(valid, value, 0.0), tl.where(valid, slope, 0.0), valid


@triton.jit
def sigmoid_focal_forward_kernel(
    logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha: tl.float64, gamma: tl.float64,
    ignore_index, out, out_strides, partials, tiles, C, P, CLASS_TILES, ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`out` takes the loss of each element, or is None, and `partials` [2, programs] takes sums and counts."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, c, p = tile_at(tile, C, P, CLASS_TILES, BLOCK_C, BLOCK_P)
        inside = (c < C) & (p < P)
        value, _s, valid = sigmoid_at(
            logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index,
            n, c, p, inside, C, P, ONE_HOT, HAS_ALPHA, FOCUS, T,
        )  # fmt: skip
        if out is not None:
            tl.store(out + place(out_strides, n, c, p), value, mask=inside)
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        tl.store(partials + tl.program_id(0), total)
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), count.to(tl.float64))


@triton.jit
def sigmoid_focal_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha,
    alpha: tl.float64, gamma: tl.float64, ignore_index, out, out_strides, C, P, CLASS_TILES, ONE_HOT: tl.constexpr,
    HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, c, p = tile_at(tl.program_id(0), C, P, CLASS_TILES, BLOCK_C, BLOCK_P)
    inside = (c < C) & (p < P)
    _v, slope, valid = sigmoid_at(
        logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index,
        n, c, p, inside, C, P, ONE_HOT, HAS_ALPHA, FOCUS, T,
    )  # fmt: skip
    g = incoming(grad, grad_strides, scale, n, c, p, inside, T)
    tl.store(out + place(out_strides, n, c, p), tl.where(valid, g * slope, 0.0), mask=inside)


# ---- softmax: a tile has all classes of its pixels, in one block [BLOCK_C, BLOCK_P] or, of many classes, block by block. The
# number of BLOCKS is known to the compiler: the loops over one block are one round or none, and the later passes load what it
# sees is in registers already.


@triton.jit
def classes_at(logits, logits_strides, k, n, p, valid, C, P, BLOCK_C: tl.constexpr, T: tl.constexpr):
    """Classes [BLOCK_C, 1] and their logits; -inf beyond the last class, and 0 in pixels that do not count."""
    c = (k * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]).to(tl.int64)
    x = tl.load(logits + place(logits_strides, n, c, p), mask=(p < P) & (c < C), other=0.0).to(T)
    return c, tl.where(c < C, tl.where(valid, x, 0.0), float("-inf"))


@triton.jit
def exponentials(x, largest):
    return exp_neg(x - tl.where(largest == float("-inf"), 0.0, largest))  # nothing but masked classes: zeros


@triton.jit
def block_softmax(x):
    """The largest logit of each pixel, and the sum of the exponentials relative to it, less 1 for the largest itself: that one
    is 1 exactly, so 1 - p of it is rest / (1 + rest), where 1 - p would lose its digits. -1 where all classes are masked."""
    largest = tl.max(x, 0)[None, :]
    e = exponentials(x, largest)
    ones = tl.sum(tl.where(e == 1.0, 1.0, 0.0), 0)
    return largest, (tl.sum(tl.where(e == 1.0, 0.0, e), 0) + (ones - 1.0))[None, :]


@triton.jit
def softmax_of(logits, logits_strides, n, p, valid, C, P, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr):
    """As block_softmax, of all classes."""
    _c, x = classes_at(logits, logits_strides, 0, n, p, valid, C, P, BLOCK_C, T)
    largest, rest = block_softmax(x)
    for k in range(1, BLOCKS):
        _c, x = classes_at(logits, logits_strides, k, n, p, valid, C, P, BLOCK_C, T)
        new, new_rest = block_softmax(x)
        above = new > largest
        low = tl.where(above, largest, new)
        low_rest = tl.where(above, rest, new_rest)
        largest = tl.where(above, new, largest)
        rest = tl.where(above, new_rest, rest) + (1.0 + low_rest) * exponentials(low, largest)
    return largest, rest + (largest - largest)  # NaN for infinities


@triton.jit
def label_terms(
    logits, logits_strides, n, p, valid, label, class_alpha, alpha, gamma, largest, rest, FOCUS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Loss of each pixel, its slope and q, the sum of the other probabilities. A most probable class takes q from the sum of
    the others: subtracting from 1 would lose its digits."""
    d = tl.load(logits + place(logits_strides, n, label, p), mask=valid, other=0.0).to(T) - largest
    inverse_sum = 1.0 / (1.0 + rest)
    q = tl.where(d == 0.0, rest * inverse_sum, 1.0 - exp_neg(d) * inverse_sum)
    a = tl.full((), alpha, T)
    if class_alpha is not None:
        a = tl.load(class_alpha + label)
    value, slope = softmax_focal(d - log_of_sum(rest), q, a, tl.full((), gamma, T), FOCUS)
    return value, slope, q


@triton.jit
def smooth_terms(
    x, c, label, class_alpha, alpha, gamma, smoothing, largest, rest, C, FOCUS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """With label smoothing: exponential, loss and slope of each class, whose share of the target is smoothing / C, and
    1 - smoothing more for the label."""
    smoothing = tl.full((), smoothing, T)
    share = smoothing / tl.full((), C, T)
    a = tl.full((), alpha, T)
    if class_alpha is not None:
        a = tl.load(class_alpha + c, mask=c < C, other=0.0)
    e = exponentials(x, largest)
    inverse_sum = 1.0 / (1.0 + rest)
    q = tl.where(e == 1.0, rest * inverse_sum, 1.0 - e * inverse_sum)
    a = a * tl.where(c == label, share + (1.0 - smoothing), share)
    value, slope = softmax_focal((x - largest) - log_of_sum(rest), q, a, tl.full((), gamma, T), FOCUS)
    return e, tl.where(c < C, value, 0.0), tl.where(c < C, slope, 0.0)


@triton.jit
def softmax_focal_forward_kernel(
    logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64, gamma: tl.float64, smoothing: tl.float64,
    ignore_index, out, out_strides, partials, tiles, C, P, SMOOTH: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`out` takes the loss of each pixel, or is None, and `partials` [2, programs] takes sums and counts."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, _c, p = tile_at(tile, C, P, 1, BLOCK_C, BLOCK_P)
        target_place = n * target_strides[0] + p * target_strides[2]
        label, valid, bad = labels_at(target, target_place, p < P, ignore_index, C)
        largest, rest = softmax_of(logits, logits_strides, n, p, valid, C, P, BLOCK_C, BLOCKS, T)
        if SMOOTH:
            value = tl.zeros((1, BLOCK_P), tl.float64)  # thousands of terms, alike in size
            for k in range(BLOCKS):
                c, x = classes_at(logits, logits_strides, k, n, p, valid, C, P, BLOCK_C, T)
                _e, values, _s = smooth_terms(x, c, label, class_alpha, alpha, gamma, smoothing, largest, rest, C, FOCUS, T)
                value += tl.sum(values.to(tl.float64), 0)[None, :]
        else:
            value, _s, _q = label_terms(
                logits, logits_strides, n, p, valid, label, class_alpha, alpha, gamma, largest, rest, FOCUS, T
            )
        value = tl.where(bad, float("nan"), tl.where(valid, value.to(T), 0.0))
        if out is not None:
            tl.store(out + n * out_strides[0] + p * out_strides[2], value, mask=p < P)
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        tl.store(partials + tl.program_id(0), total)
        tl.store(partials + tl.num_programs(0) + tl.program_id(0), count.to(tl.float64))


@triton.jit
def softmax_focal_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64,
    gamma: tl.float64, smoothing: tl.float64, ignore_index, out, out_strides, C, P, SMOOTH: tl.constexpr,
    FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n, _c, p = tile_at(tl.program_id(0), C, P, 1, BLOCK_C, BLOCK_P)
    target_place = n * target_strides[0] + p * target_strides[2]
    label, valid, bad = labels_at(target, target_place, p < P, ignore_index, C)
    largest, rest = softmax_of(logits, logits_strides, n, p, valid, C, P, BLOCK_C, BLOCKS, T)
    inverse_sum = 1.0 / (1.0 + rest)
    g = tl.where(bad, float("nan"), incoming(grad, grad_strides, scale, n, 0, p, p < P, T))
    if SMOOTH:
        # The gradient of class c is slope_c - p_c (sum of all slopes). A confident pixel has p near 1 and one slope that
        # counts: then slope - p slope is q slope, which keeps the digits that the subtraction loses. So the slopes of the most
        # probable classes (exponential 1), `top`, are added apart from the others, `low`.
        top = tl.zeros((1, BLOCK_P), T)
        low = tl.zeros((1, BLOCK_P), T)
        for k in range(BLOCKS):
            c, x = classes_at(logits, logits_strides, k, n, p, valid, C, P, BLOCK_C, T)
            e, _v, slope = smooth_terms(x, c, label, class_alpha, alpha, gamma, smoothing, largest, rest, C, FOCUS, T)
            top += tl.sum(tl.where(e == 1.0, slope, 0.0), 0)[None, :]
            low += tl.sum(tl.where(e == 1.0, 0.0, slope), 0)[None, :]
    else:
        _v, slope, q = label_terms(
            logits, logits_strides, n, p, valid, label, class_alpha, alpha, gamma, largest, rest, FOCUS, T
        )
        g = g * slope
    for k in range(BLOCKS):
        c, x = classes_at(logits, logits_strides, k, n, p, valid, C, P, BLOCK_C, T)
        if SMOOTH:
            e, _v, slope = smooth_terms(x, c, label, class_alpha, alpha, gamma, smoothing, largest, rest, C, FOCUS, T)
            alone = (e == 1.0) & (slope == top)
            kept = tl.where(alone, slope * rest * inverse_sum, slope - e * inverse_sum * top)
            value = g * (kept - e * inverse_sum * low)
        else:
            value = tl.where(c == label, g * q, -g * (exponentials(x, largest) * inverse_sum))
        tl.store(out + place(out_strides, n, c, p), tl.where(valid, value, 0.0), mask=(c < C) & (p < P))


# ---- the sum of all tiles, and launches


@triton.jit
def finish_kernel(partials, programs, normalizer, factor: tl.float64, loss, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """From partial sums and counts to the loss, and the factor that the sum was multiplied with: one program."""
    totals = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.float64)
    i = tl.arange(0, BLOCK)
    first = 0
    while first < programs:
        totals += tl.load(partials + i, mask=i < programs, other=0.0)
        counts += tl.load(partials + programs + i, mask=i < programs, other=0.0)
        i += BLOCK
        first += BLOCK
    count = tl.sum(counts)
    if MEAN:
        multiplier = tl.where(count > 0.0, 1.0 / tl.maximum(count, 1.0), 0.0)
    else:
        multiplier = tl.full((), factor, tl.float64)
        if normalizer is not None:
            multiplier = multiplier / widened(tl.load(normalizer), tl.float64)
    value = tl.where(count > 0.0, tl.sum(totals) * multiplier, 0.0)  # nothing counts: 0, whatever the normalizer
    tl.store(loss, value.to(scale.dtype.element_ty))
    tl.store(scale, multiplier)


NONE, MEAN = 0, 1  # of ops.py, which imports this module when an operator runs


def as_one_image(logits: Tensor, *others: Tensor | None) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(images, pixels, strides of each tensor). All pixels are one image where every tensor has them in one row: channels_last,
    one image, one pixel in each."""
    images, _, pixels = logits.shape
    views = [(0, 0, 0) if t is None or t.dim() == 0 else strides(t) for t in (logits, *others)]
    if pixels == 1:
        return 1, images, [(0, c, n) for n, c, _ in views]
    if images == 1 or all(n == p * pixels for n, _, p in views):
        return 1, images * pixels, [(0, c, p) for _, c, p in views]
    return images, pixels, views


#: Elements of a tile and warps. Not measured yet. Sigmoid: 8 elements for each thread, two vectors of 16 bytes. Softmax holds a
#: tile in registers, 16 elements for each thread.
SIGMOID_TILE, SIGMOID_WARPS = 1024, 4
SOFTMAX_TILE, SOFTMAX_WARPS = 4096, 8


def blocks(elements: int, classes: int, pixels: int, view: tuple[int, int, int], most: int, least_pixels: int) -> dict:
    """BLOCK_C and BLOCK_P, of about `elements`: all classes where these are contiguous; else `most` of them, for runs of at
    least `least_pixels`."""
    if view[1] == 1 and view[2] != 1:
        most, least_pixels = elements, 1
    block_c = min(next_power_of_2(classes), most)
    block_p = min(next_power_of_2(pixels), max(elements // block_c, least_pixels))
    return {"BLOCK_C": block_c, "BLOCK_P": block_p}


def reduced(logits: Tensor, tiles: int, reduction: int, factor: float, normalizer: Tensor | None, loss: Tensor, launch):
    """The loss and the scale, from launch(programs, partials)."""
    if reduction == NONE:
        if tiles:
            launch(tiles, None)
        return loss, logits.new_full((), factor, dtype=arithmetic_dtype(logits))
    programs = min(tiles, MAX_PROGRAMS)
    partials = logits.new_empty((2, programs), dtype=torch.float64)
    if programs:
        launch(programs, partials)
    scale = logits.new_empty((), dtype=arithmetic_dtype(logits))
    normalizer = None if normalizer is None else as_bytes(normalizer)
    finish_kernel[(1,)](partials, programs, normalizer, factor, loss, scale, MEAN=reduction == MEAN, BLOCK=1024)
    return loss, scale


def loss_type(logits: Tensor, wide: bool) -> torch.dtype:
    return arithmetic_dtype(logits) if wide else logits.dtype


def focus(gamma: float) -> int | None:
    return int(gamma) if gamma in (0.0, 2.0) else None


class Sigmoid:
    """What the two sigmoid kernels have in common: their checked arguments, and their tiles."""

    def __init__(self, logits, target, alpha, class_alpha, gamma, weight, ignore_index, *others: Tensor | None) -> None:
        one_hot = target.dim() == 2
        check_shape("a target", target, (logits.shape[0], logits.shape[2]) if one_hot else logits.shape, logits)
        if weight is not None:
            check_shape("a weight", weight, logits.shape, logits)
        check_class_alpha(class_alpha, logits)
        T = arithmetic(logits)
        target, weight = as_bytes(target), None if weight is None else as_bytes(weight)
        classes = logits.shape[1]
        images, pixels, (x, t, w, *self.other_strides) = as_one_image(logits, target, weight, *others)
        elements = SIGMOID_TILE if tl.float32 == T else SIGMOID_TILE // 2
        self.options = {**blocks(elements, classes, pixels, x, 8, 1), "num_warps": SIGMOID_WARPS}
        class_tiles = triton.cdiv(classes, self.options["BLOCK_C"])
        self.tiles = images * triton.cdiv(pixels, self.options["BLOCK_P"]) * class_tiles
        self.options |= {"ONE_HOT": one_hot, "HAS_ALPHA": alpha is not None, "FOCUS": focus(gamma), "T": T}
        self.inputs = (logits, x, target, t, weight, w, class_alpha, alpha or 0.0, gamma, ignore_index)
        self.sizes = (classes, pixels, class_tiles)


class Softmax:
    """What the two softmax kernels have in common: their checked arguments, and their tiles."""

    def __init__(self, logits, target, alpha, class_alpha, gamma, smoothing, ignore_index, *others: Tensor | None) -> None:
        check_shape("a target", target, (logits.shape[0], logits.shape[2]), logits)
        check_class_alpha(class_alpha, logits)
        T = arithmetic(logits)
        classes = logits.shape[1]
        images, pixels, (x, t, *self.other_strides) = as_one_image(logits, target, *others)
        # One block up to 512 classes, in runs of 16 pixels, half a cache line; of more classes all is read once more.
        elements, most = (SOFTMAX_TILE, 512) if tl.float32 == T else (SOFTMAX_TILE // 2, 128)
        self.options = blocks(elements, classes, pixels, x, most if classes <= most else 64, 16)
        self.options["num_warps"] = SOFTMAX_WARPS
        self.options["BLOCKS"] = triton.cdiv(classes, self.options["BLOCK_C"])
        self.tiles = images * triton.cdiv(pixels, self.options["BLOCK_P"])
        self.options |= {"SMOOTH": smoothing > 0, "FOCUS": focus(gamma), "T": T}
        self.inputs = (logits, x, target, t, class_alpha, alpha, gamma, smoothing, ignore_index)
        self.sizes = (classes, pixels)


def check_class_alpha(class_alpha: Tensor | None, logits: Tensor) -> None:
    if class_alpha is not None:
        check_shape("class_alpha", class_alpha, logits.shape[1:2], logits)
        if class_alpha.dtype != arithmetic_dtype(logits) or not class_alpha.is_contiguous():
            raise ValueError("veerloss: expected class_alpha contiguous, in the arithmetic type")


def forward(kernel, call, logits, reduction, factor, normalizer, loss):
    def launch(programs: int, partials: Tensor | None) -> None:
        out = loss if partials is None else None
        kernel[(programs,)](*call.inputs, out, call.other_strides[0], partials, call.tiles, *call.sizes, **call.options)

    with on_device(logits):
        return reduced(logits, call.tiles, reduction, factor, normalizer, loss, launch)


def backward(kernel, call, grad, scale, logits, out):
    grad_strides, out_strides = call.other_strides
    if call.tiles:
        with on_device(logits):
            kernel[(call.tiles,)](grad, grad_strides, scale, *call.inputs, out, out_strides, *call.sizes, **call.options)
    return out


def sigmoid_focal_forward(
    logits, target, alpha, class_alpha, gamma, weight, ignore_index, reduction, factor, normalizer, wide
):  # fmt: skip
    dtype = loss_type(logits, wide)
    if reduction != NONE:
        loss = logits.new_empty((), dtype=dtype)
    else:
        loss = logits.new_empty(logits.shape, dtype=dtype) if wide else torch.empty_like(logits)
    call = Sigmoid(logits, target, alpha, class_alpha, gamma, weight, ignore_index, loss)
    return forward(sigmoid_focal_forward_kernel, call, logits, reduction, factor, normalizer, loss)


def sigmoid_focal_backward(
    grad, logits, target, alpha, class_alpha, gamma, weight, ignore_index, reduction, scale
):  # fmt: skip
    check_shape("a gradient", grad, logits.shape if reduction == NONE else (), logits)
    out = torch.empty_like(logits)
    call = Sigmoid(logits, target, alpha, class_alpha, gamma, weight, ignore_index, grad, out)
    return backward(sigmoid_focal_backward_kernel, call, grad, None if reduction == NONE else scale, logits, out)


def softmax_focal_forward(
    logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, reduction, factor, normalizer, wide
):  # fmt: skip
    shape = (logits.shape[0], logits.shape[2]) if reduction == NONE else ()
    loss = logits.new_empty(shape, dtype=loss_type(logits, wide))
    call = Softmax(logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, loss)
    return forward(softmax_focal_forward_kernel, call, logits, reduction, factor, normalizer, loss)


def softmax_focal_backward(
    grad, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, reduction, scale
):  # fmt: skip
    check_shape("a gradient", grad, (logits.shape[0], logits.shape[2]) if reduction == NONE else (), logits)
    out = torch.empty_like(logits)
    call = Softmax(logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, grad, out)
    return backward(softmax_focal_backward_kernel, call, grad, None if reduction == NONE else scale, logits, out)
