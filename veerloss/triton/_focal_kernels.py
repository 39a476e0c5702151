"""The kernels of the focal losses: the formulas of csrc/math/focal.h, tiles of [classes, pixels], one read of the logits per
pass.

A target out of range makes its element NaN; nothing is read out of bounds for it.
"""

import triton
import triton.language as tl

from ._focal_math import log_sumexp, sigmoid_focal, softmax_focal
from ._math import exp_neg, widen
from ._tiles import load_logits, ptr_offset


@triton.jit
def incoming(grad, grad_strides, scale, n, c, p, inside, T: tl.constexpr):
    """The gradient that reaches each element; `scale` is None where the loss has a value for each."""
    if scale is None:
        return widen(tl.load(grad + ptr_offset(grad_strides, n, c, p), mask=inside, other=0.0), T)
    else:
        return widen(tl.load(grad), T) * tl.load(scale)


@triton.jit
def store_partials(partials, total, count):
    """Of one program: `partials` [2, programs] takes sums and counts."""
    tl.store(partials + tl.program_id(0), total)
    tl.store(partials + tl.num_programs(0) + tl.program_id(0), count.to(tl.float64))


@triton.jit
def tile_at(tile, classes, pixels, class_tiles, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """(image, classes [BLOCK_C, 1], pixels [1, BLOCK_P]) of a tile, in 64 bits. Tiles of the same pixels are neighbours."""
    image_tiles = (pixels + BLOCK_P - 1) // BLOCK_P
    pixel_tile = tile // class_tiles
    c = (tile % class_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    p = (pixel_tile % image_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    return (pixel_tile // image_tiles).to(tl.int64), c.to(tl.int64), p


@triton.jit
def focal_labels(target, strides, n, p, inside, ignore_index, background_index, classes):
    """(labels in 64 bits, background_index among them, 0 where there is none to use; which pixels count; which of these are out
    of range)

    load_labels of _tiles.py has codes, not flags: with these some kernels here take 20 more registers, or 6 more barriers.
    """
    label = tl.load(target + ptr_offset(strides, n, 0, p), mask=inside, other=0).to(tl.int64)
    valid = inside
    if ignore_index is not None:
        valid = valid & (label != ignore_index)
    bad = valid & ((label < 0) | (label >= classes))
    if background_index is not None:
        bad = bad & (label != background_index)
    return tl.where(valid & (bad == 0), label, 0), valid, bad


# ---- sigmoid


@triton.jit
def sigmoid_elements(
    x, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index, background_index, n, c, p,
    inside, has_pixel, classes, ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Value and derivative of the elements of a tile, of logits x, 0 where they do not count, and which count."""
    if ONE_HOT:
        label, valid, bad = focal_labels(target, target_strides, n, p, has_pixel, ignore_index, background_index, classes)
        valid = valid & inside
        t = (c == label).to(T)
    else:
        stored = tl.load(target + ptr_offset(target_strides, n, c, p), mask=inside, other=0)
        valid = inside
        if ignore_index is not None:  # compared before it is rounded to T, or wrapped to the type of the target
            if stored.dtype.is_floating():
                valid = valid & (widen(stored, tl.float64) != tl.full((), ignore_index, tl.int64).to(tl.float64))
            else:
                valid = valid & (stored.to(tl.int64) != ignore_index)
        t = widen(stored, T)
        bad = (t < 0.0) | (t > 1.0)
    t = tl.where(bad, float("nan"), t)
    x = tl.where(valid, x, 0.0)
    if class_alpha is not None:
        alpha_positive = tl.load(class_alpha + c, mask=c < classes, other=0.0)
        alpha_negative = 1.0 - alpha_positive
    elif HAS_ALPHA:
        alpha_positive = tl.full((), alpha, tl.float64).to(T)
        alpha_negative = (1.0 - tl.full((), alpha, tl.float64)).to(T)
    else:
        alpha_positive = tl.full((), 1.0, T)
        alpha_negative = alpha_positive
    value, slope = sigmoid_focal(x, t, alpha_positive, alpha_negative, tl.full((), gamma, T), FOCUS)
    if weight is not None:
        w = widen(tl.load(weight + ptr_offset(weight_strides, n, c, p), mask=inside, other=0), T)
        value = w * value
        slope = w * slope
    return tl.where(valid, value, 0.0), tl.where(valid, slope, 0.0), valid


@triton.jit
def sigmoid_focal_forward_kernel(
    logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha: tl.float64, gamma: tl.float64,
    ignore_index, background_index, out, out_strides, partials, tiles, class_tiles, classes, pixels, ONE_HOT: tl.constexpr,
    HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`out` takes the loss of each element; or it is None, and `partials` takes sums and counts."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, c, p = tile_at(tile, classes, pixels, class_tiles, BLOCK_C, BLOCK_P)
        inside = (c < classes) & (p < pixels)
        # Of what does not count, too: a load is a vector only where its mask does not depend on data.
        x = tl.load(logits + ptr_offset(logits_strides, n, c, p), mask=inside, other=0.0).to(T)
        value, _slope, valid = sigmoid_elements(
            x, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index, background_index,
            n, c, p, inside, p < pixels, classes, ONE_HOT, HAS_ALPHA, FOCUS, T,
        )  # fmt: skip
        if out is not None:
            tl.store(out + ptr_offset(out_strides, n, c, p), value, mask=inside)
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        store_partials(partials, total, count)


@triton.jit
def sigmoid_focal_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha,
    alpha: tl.float64, gamma: tl.float64, ignore_index, background_index, out, out_strides, class_tiles, classes, pixels,
    ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, c, p = tile_at(tl.program_id(0), classes, pixels, class_tiles, BLOCK_C, BLOCK_P)
    inside = (c < classes) & (p < pixels)
    # Of what does not count, too: a load is a vector only where its mask does not depend on data.
    x = tl.load(logits + ptr_offset(logits_strides, n, c, p), mask=inside, other=0.0).to(T)
    _value, slope, valid = sigmoid_elements(
        x, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index, background_index, n, c, p,
        inside, p < pixels, classes, ONE_HOT, HAS_ALPHA, FOCUS, T,
    )  # fmt: skip
    g = incoming(grad, grad_strides, scale, n, c, p, inside, T)
    tl.store(out + ptr_offset(out_strides, n, c, p), tl.where(valid, g * slope, 0.0), mask=inside)


# ---- softmax: a tile has all classes of its pixels, in one block [BLOCK_C, BLOCK_P] or, of many classes, block by block. The
# number of BLOCKS is known to the compiler: the loops over one block are one round or none, and the later passes load what it
# sees is in registers already. What belongs to a pixel is [1, BLOCK_P].


@triton.jit
def load_block(logits, strides, k, n, p, inside, valid, classes, BLOCK_C: tl.constexpr, T: tl.constexpr):
    """The classes [BLOCK_C, 1] of block k and their logits; 0 in pixels that do not count."""
    c = (k * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]).to(tl.int64)
    return c, tl.where(valid, load_logits(logits, strides, n, c, p, inside, classes, T), 0.0)


@triton.jit
def exponentials(x, max_logit):
    return exp_neg(x - tl.where(max_logit == float("-inf"), 0.0, max_logit))  # nothing but masked classes: zeros


@triton.jit
def block_softmax(x):
    """(max_logit, sumexp_excl_max) of the classes of a block: as load_softmax in _tiles.py. -1 where all classes are masked."""
    max_logit = tl.max(x, 0)[None, :]
    exp = exponentials(x, max_logit)
    ones = tl.sum(tl.where(exp == 1.0, 1.0, 0.0), 0)
    return max_logit, (tl.sum(tl.where(exp == 1.0, 0.0, exp), 0) + (ones - 1.0))[None, :]


@triton.jit
def softmax_sums(
    logits, strides, n, p, inside, valid, classes, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """As block_softmax, of all classes, in one read. Passes need not agree in every bit, as those of the Lovász losses have to
    (_tiles.py): the sum of a block needs no float64, those of thousands of blocks do."""
    _c, x = load_block(logits, strides, 0, n, p, inside, valid, classes, BLOCK_C, T)
    max_logit, sumexp_excl_max = block_softmax(x)
    if BLOCKS > 1:
        total = sumexp_excl_max.to(tl.float64)
        for k in range(1, BLOCKS):
            _c, x = load_block(logits, strides, k, n, p, inside, valid, classes, BLOCK_C, T)
            block_max, block_sumexp = block_softmax(x)
            above = block_max > max_logit
            low = tl.where(above, max_logit, block_max)
            high_sumexp = tl.where(above, block_sumexp.to(tl.float64), total)
            low_sumexp = tl.where(above, total, block_sumexp.to(tl.float64))
            max_logit = tl.where(above, block_max, max_logit)
            total = high_sumexp + (1.0 + low_sumexp) * exponentials(low, max_logit).to(tl.float64)
        sumexp_excl_max = total.to(T)
    return max_logit, sumexp_excl_max + (max_logit - max_logit)  # NaN for infinities


@triton.jit
def label_below_max(logits, strides, n, p, valid, label, max_logit, T: tl.constexpr):
    """The logit of the label less the largest one."""
    return tl.load(logits + ptr_offset(strides, n, label, p), mask=valid, other=0.0).to(T) - max_logit


@triton.jit
def label_terms(d, label, class_alpha, alpha, gamma, sumexp_excl_max, FOCUS: tl.constexpr, T: tl.constexpr):
    """Loss of each pixel whose label is d below the largest logit, its slope and q, the sum of the other probabilities. A most
    probable class takes q from the sum of the others: subtracting from 1 would lose its digits."""
    inv_sumexp = 1.0 / (1.0 + sumexp_excl_max)
    q = tl.where(d == 0.0, sumexp_excl_max * inv_sumexp, 1.0 - exp_neg(d) * inv_sumexp)
    a = tl.full((), alpha, T)
    if class_alpha is not None:
        a = tl.load(class_alpha + label)
    value, slope = softmax_focal(d - log_sumexp(sumexp_excl_max), q, a, tl.full((), gamma, T), FOCUS)
    return value, slope, q


@triton.jit
def soft_labels(inside, BLOCK_P: tl.constexpr):
    """As focal_labels, of class probabilities: every pixel counts."""
    return tl.zeros((1, BLOCK_P), tl.int64), inside, inside & (inside == 0)


@triton.jit
def soft_target(target, strides, label, n, c, p, inside, classes, PROBABILITIES: tl.constexpr, T: tl.constexpr):
    """What the target puts on each class of a block: NaN where it is negative or not finite."""
    if PROBABILITIES:
        t = widen(tl.load(target + ptr_offset(strides, n, c, p), mask=(c < classes) & inside, other=0.0), T)
        return tl.where((t >= 0.0) & (t < float("inf")), t, float("nan"))
    else:
        return tl.where(c == label, tl.full((), 1.0, T), tl.full((), 0.0, T))


@triton.jit
def soft_terms(
    x, c, t, class_alpha, alpha, gamma, smoothing, max_logit, sumexp_excl_max, classes, FOCUS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """With a soft target: exponential, loss and slope of each class, whose share of the target is smoothing / C, and
    1 - smoothing times t more."""
    smoothing = tl.full((), smoothing, T)
    share = smoothing / tl.full((), classes, T)
    a = tl.full((), alpha, T)
    if class_alpha is not None:
        a = tl.load(class_alpha + c, mask=c < classes, other=0.0)
    exp = exponentials(x, max_logit)
    inv_sumexp = 1.0 / (1.0 + sumexp_excl_max)
    q = tl.where(exp == 1.0, sumexp_excl_max * inv_sumexp, 1.0 - exp * inv_sumexp)
    a = a * (share + (1.0 - smoothing) * t)
    log_p = (x - max_logit) - log_sumexp(sumexp_excl_max)
    log_p = tl.where((exp == 0.0) & (a == 0.0), 0.0, log_p)  # a class that is masked out, and no part of the target
    value, slope = softmax_focal(log_p, q, a, tl.full((), gamma, T), FOCUS)
    return exp, tl.where(c < classes, value, 0.0), tl.where(c < classes, slope, 0.0)


@triton.jit
def softmax_focal_forward_kernel(
    logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64, gamma: tl.float64, smoothing: tl.float64,
    ignore_index, out, out_strides, partials, tiles, classes, pixels, SOFT: tl.constexpr, PROBABILITIES: tl.constexpr,
    FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`out` takes the loss of each pixel; or it is None, and `partials` takes sums and counts."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, _c, p = tile_at(tile, classes, pixels, 1, BLOCK_C, BLOCK_P)
        inside = p < pixels
        if PROBABILITIES:
            label, valid, bad = soft_labels(inside, BLOCK_P)
        else:
            label, valid, bad = focal_labels(target, target_strides, n, p, inside, ignore_index, None, classes)
        max_logit, sumexp_excl_max = softmax_sums(logits, logits_strides, n, p, inside, valid, classes, BLOCK_C, BLOCKS, T)
        if SOFT:
            value = tl.zeros((1, BLOCK_P), tl.float64)  # thousands of terms, alike in size
            for k in range(BLOCKS):
                c, x = load_block(logits, logits_strides, k, n, p, inside, valid, classes, BLOCK_C, T)
                t = soft_target(target, target_strides, label, n, c, p, inside, classes, PROBABILITIES, T)
                _exp, values, _slope = soft_terms(
                    x, c, t, class_alpha, alpha, gamma, smoothing, max_logit, sumexp_excl_max, classes, FOCUS, T
                )
                value += tl.sum(values.to(tl.float64), 0)[None, :]
        else:
            d = label_below_max(logits, logits_strides, n, p, valid, label, max_logit, T)
            value, _slope, _q = label_terms(d, label, class_alpha, alpha, gamma, sumexp_excl_max, FOCUS, T)
        value = tl.where(bad, float("nan"), tl.where(valid, value.to(T), 0.0))
        if out is not None:
            tl.store(out + ptr_offset(out_strides, n, 0, p), value, mask=inside)
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        store_partials(partials, total, count)


@triton.jit
def softmax_focal_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64,
    gamma: tl.float64, smoothing: tl.float64, ignore_index, out, out_strides, classes, pixels,
    SOFT: tl.constexpr, PROBABILITIES: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    n, _c, p = tile_at(tl.program_id(0), classes, pixels, 1, BLOCK_C, BLOCK_P)
    inside = p < pixels
    if PROBABILITIES:
        label, valid, bad = soft_labels(inside, BLOCK_P)
    else:
        label, valid, bad = focal_labels(target, target_strides, n, p, inside, ignore_index, None, classes)
    max_logit, sumexp_excl_max = softmax_sums(logits, logits_strides, n, p, inside, valid, classes, BLOCK_C, BLOCKS, T)
    inv_sumexp = 1.0 / (1.0 + sumexp_excl_max)
    g = tl.where(bad, float("nan"), incoming(grad, grad_strides, scale, n, 0, p, inside, T))
    if SOFT:
        # The gradient of class c is slope_c - p_c (sum of all slopes). A confident pixel has p near 1 and one slope that
        # counts: then slope - p slope is q slope, which keeps the digits that the subtraction loses. So the slopes of the most
        # probable classes (exponential 1) are added apart from the others.
        max_slopes = tl.zeros((1, BLOCK_P), tl.float64 if BLOCKS > 1 else T)
        other_slopes = tl.zeros((1, BLOCK_P), tl.float64 if BLOCKS > 1 else T)
        for k in range(BLOCKS):
            c, x = load_block(logits, logits_strides, k, n, p, inside, valid, classes, BLOCK_C, T)
            t = soft_target(target, target_strides, label, n, c, p, inside, classes, PROBABILITIES, T)
            exp, _value, slope = soft_terms(
                x, c, t, class_alpha, alpha, gamma, smoothing, max_logit, sumexp_excl_max, classes, FOCUS, T
            )
            max_slopes += tl.sum(tl.where(exp == 1.0, slope, 0.0), 0)[None, :]
            other_slopes += tl.sum(tl.where(exp == 1.0, 0.0, slope), 0)[None, :]
        max_slopes = max_slopes.to(T)
        other_slopes = other_slopes.to(T)
    else:
        d = label_below_max(logits, logits_strides, n, p, valid, label, max_logit, T)
        _value, slope, q = label_terms(d, label, class_alpha, alpha, gamma, sumexp_excl_max, FOCUS, T)
        g = g * slope
    for k in range(BLOCKS):
        c, x = load_block(logits, logits_strides, k, n, p, inside, valid, classes, BLOCK_C, T)
        if SOFT:
            t = soft_target(target, target_strides, label, n, c, p, inside, classes, PROBABILITIES, T)
            exp, _value, slope = soft_terms(
                x, c, t, class_alpha, alpha, gamma, smoothing, max_logit, sumexp_excl_max, classes, FOCUS, T
            )
            alone = (exp == 1.0) & (slope == max_slopes)
            kept = tl.where(alone, slope * sumexp_excl_max * inv_sumexp, slope - exp * inv_sumexp * max_slopes)
            value = g * (kept - exp * inv_sumexp * other_slopes)
        else:
            value = tl.where(c == label, g * q, -g * (exponentials(x, max_logit) * inv_sumexp))
        tl.store(out + ptr_offset(out_strides, n, c, p), tl.where(valid, value, 0.0), mask=(c < classes) & inside)


# ---- the sum of all tiles


@triton.jit
def focal_loss_kernel(partials, programs, normalizer, factor: tl.float64, loss, scale, MEAN: tl.constexpr, BLOCK: tl.constexpr):
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
        multiplier = 1.0 / tl.maximum(count, 1.0)
    else:
        multiplier = tl.full((), factor, tl.float64)
        if normalizer is not None:
            multiplier = multiplier / widen(tl.load(normalizer), tl.float64)
    multiplier = tl.where(count > 0.0, multiplier, 0.0)  # nothing counts: loss and gradient are 0, whatever the normalizer
    tl.store(loss, (tl.sum(totals) * multiplier).to(scale.dtype.element_ty))
    tl.store(scale, multiplier)
