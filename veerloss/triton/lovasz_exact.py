"""Lovász losses as Triton kernels, method "exact". Formulas have the names of csrc/math/jaccard.h, which explains them.

    keys      a pass over the logits: errors to keys, integers in the order of the errors
    sort      torch.sort, by descending keys
    rank      sorted pixels: how much foreground there is in each tile of them
    weigh     sorted pixels: ranks to weights, back to the pixels' places, and the sums of the loss
    backward  a pass over the logits

Nothing here waits for the GPU, and results have the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import opmath_dtype
from . import _tuning
from ._constants import PROBABILITIES, SOFTMAX
from ._launch import as_bytes, check_data, next_power_of_2, on_device, opmath_t
from ._lovasz import Tiles, reduce_segments
from ._math import key_bits
from ._tiles import (
    BAD,
    IGNORED,
    accumulate_gradient,
    error_and_complement,
    is_foreground,
    load_labels,
    load_logits,
    load_softmax,
    load_values,
    mean_gradient,
    pixels_of_tile,
    ptr_offset,
    segment_factor,
    sign_outside,
    softmax_gradient,
)

# ---- scalar maths


@triton.jit
def jaccard_fg_weight(total, bg):
    return 1.0 / (total + bg).to(tl.float64)


@triton.jit
def jaccard_bg_weight(total, fg, bg):
    unions = (total + bg).to(tl.float64)
    return (total - fg).to(tl.float64) / (unions * (unions + 1.0))


@triton.jit
def key_of_probability(error, complement):
    """The key of an error in [0, 1] from it and its complement: above 1/2, 1 - error has the digits."""
    one = 2 * key_bits(tl.full((), 0.5, error.dtype))
    return tl.where(error > 0.5, one - key_bits(complement), key_bits(error))


@triton.jit
def error_of_key(key, T: tl.constexpr, PROBABILITY: tl.constexpr):
    """In float64; `PROBABILITY` for keys of key_of_probability."""
    if PROBABILITY:
        half = key_bits(tl.full((), 0.5, T))
        part = tl.where(key > half, 2 * half - key, key).to(T, bitcast=True).to(tl.float64)
        return tl.where(key > half, 1.0 - part, part)
    else:
        return key.to(T, bitcast=True).to(tl.float64)


@triton.jit
def mark_key(key, foreground):
    """A stored key with the foreground in its lowest bit, the others moving up by one."""
    return (key << 1) | foreground


@triton.jit
def key_of_marked(word):
    """The error's key, -1 of an ignored pixel, from what mark_key makes of a stored one."""
    if word.dtype == tl.int64:
        return ((word >> 1) & 0x7FFFFFFFFFFFFFFF) - 1
    else:
        return ((word >> 1) & 0x7FFFFFFF) - 1


# ---- kernels


@triton.jit(do_not_specialize=["image_tiles", "batch_pixels", "ignore_index", "background_index"])
def lovasz_exact_keys_kernel(
    logits, logits_strides, target, target_strides, ignore_index, background_index, keys, labels, pixels, image_tiles,
    batch_pixels,
    T: tl.constexpr, ERRORS: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Logits to stored keys [C, N, P], the larger the error the larger: 0 of ignored pixels, else the error's key + 1, of
    infinity where the error is NaN or infinite. And labels [N, P], from which all classes find their foreground again."""
    n, p, inside = pixels_of_tile(tl.program_id(0), pixels, image_tiles, BLOCK_P)
    label = load_labels(target, target_strides, n, p, inside, ignore_index, background_index, ERRORS, CLASSES)
    tl.store(labels + n * pixels + p, label, mask=inside)
    softmax = load_softmax(logits, logits_strides, n, p, inside, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    infinity = key_bits(tl.full((), float("inf"), T))
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        values = load_values(logits, logits_strides, n, c, p, inside, softmax, T, ERRORS, CLASSES)
        foreground = is_foreground(label[None, :], c[:, None], ERRORS)
        error, complement = error_and_complement(values, foreground, softmax, ERRORS)
        key = key_of_probability(error, complement) if ERRORS == SOFTMAX else key_bits(error)
        key = tl.where((label == BAD)[None, :], infinity, tl.minimum(key, infinity)) + 1
        key = tl.where((label == IGNORED)[None, :], 0, key)
        offset = ptr_offset((pixels, batch_pixels, 1), n, c[:, None], p[None, :])
        tl.store(keys + offset, key, mask=(c < CLASSES)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tiles", "rows"])
def lovasz_exact_rank_kernel(
    sorted_keys, order, labels, counts, length, tiles, rows, ERRORS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Marks the foreground among sorted keys, and counts it in each tile. The mark has no part in the sort: equal errors rank
    in the order of their pixels."""
    tile, segment = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    key = tl.load(sorted_keys + segment * length + at, mask=inside, other=0)
    pixel = tl.load(order + segment * length + at, mask=inside, other=0)
    label = tl.load(labels + segment % rows * length + pixel, mask=inside, other=IGNORED)
    foreground = is_foreground(label, segment // rows, ERRORS).to(tl.int32)
    tl.store(sorted_keys + segment * length + at, mark_key(key, foreground), mask=inside)
    tl.store(counts + segment * tiles + tile, tl.sum(foreground.to(tl.int64)))


@triton.jit(do_not_specialize=["tiles", "rows", "classes"])
def lovasz_exact_weigh_kernel(
    marked, order, counts, selected, weights, losses, takes_part, length, tiles, rows, classes,
    T: tl.constexpr, ERRORS: tl.constexpr, PRESENT: tl.constexpr, KEEP_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorted keys to weights at the places of their pixels, and to the sum of weight times error of each tile, in `losses`.

    `counts`: the foreground up to the end of each tile. Weights are zero on entry: a program that has none but these,
    behind the last foreground pixel as most are, ends at once.
    """
    tile, segment = (tl.program_id(0) % tiles).to(tl.int64), (tl.program_id(0) // tiles).to(tl.int64)
    c, row = segment // rows, segment % rows
    total = tl.load(counts + segment * tiles + tiles - 1)
    before = tl.load(counts + segment * tiles + tile - 1, mask=tile > 0, other=0)
    infinity = key_bits(tl.full((), float("inf"), T))
    max_key = key_of_marked(tl.load(marked + segment * length))
    part = max_key >= 0  # a valid pixel
    if PRESENT:
        part = part & (total > 0)
    if selected is not None:
        part = part & (tl.load(selected + c) != 0)
    tl.store(takes_part + row * classes + c, part.to(tl.int8), mask=tile == 0)

    loss = tl.zeros((), tl.float64)
    invalid = max_key >= infinity
    if part & ((before < total) | invalid | ((total == 0) & (tile == 0))):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        word = tl.load(marked + segment * length + at, mask=inside, other=0)
        key = key_of_marked(word)
        foreground = (word & 1).to(tl.int64)
        fg = before + tl.cumsum(foreground, 0) - foreground
        bg = at - fg
        some = tl.maximum(total, 1)
        weight = tl.where(foreground == 1, jaccard_fg_weight(some, bg), jaccard_bg_weight(some, fg, bg))
        # Without foreground the first of the largest errors has it all.
        weight = tl.where(total == 0, tl.where(at == 0, 1.0, 0.0), weight)
        error = error_of_key(tl.maximum(key, 0), T, ERRORS == SOFTMAX)
        # Errors of 0 change no other weight, and their slope is 0 as that of relu is.
        weight = tl.where(key > 0, weight, 0.0)
        loss = tl.sum(tl.where(key > 0, weight * error, 0.0))
        if KEEP_WEIGHTS:
            weight = tl.where(invalid & (key >= 0), float("nan"), weight)
            pixel = tl.load(order + segment * length + at, mask=inside, other=0)
            signed = tl.where(foreground == 1, -weight, weight).to(T)
            tl.store(weights + segment * length + pixel, signed, mask=inside & (weight != 0.0))
    loss = tl.where(part & invalid, float("nan"), loss)
    tl.store(losses + (row * classes + c) * tiles + tile, loss)


@triton.jit(do_not_specialize=["image_tiles", "batch_pixels"])
def lovasz_exact_backward_kernel(
    grad, logits, logits_strides, weights, scale, out, out_strides, pixels, image_tiles, batch_pixels,
    T: tl.constexpr, ERRORS: tl.constexpr, PER_IMAGE: tl.constexpr, REDUCTION: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits or probabilities from the signed weights [C, N, P]."""
    n, p, inside = pixels_of_tile(tl.program_id(0), pixels, image_tiles, BLOCK_P)
    row = n if PER_IMAGE else n * 0
    softmax = load_softmax(logits, logits_strides, n, p, inside, T, ERRORS, CLASSES, BLOCK_C, BLOCK_P)
    pivot = tl.zeros((BLOCK_P,), T)
    others = tl.zeros((BLOCK_P,), tl.float64 if CLASSES > BLOCK_C else T)
    weighted = tl.zeros((BLOCK_P,), tl.int32)
    if ERRORS == SOFTMAX:
        for first in range(0, CLASSES, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            used = c < CLASSES
            exp = load_values(logits, logits_strides, n, c, p, inside, softmax, T, ERRORS, CLASSES)
            offset = ptr_offset((pixels, batch_pixels, 1), n, c[:, None], p[None, :])
            g = tl.load(weights + offset, mask=used[:, None] & inside[None, :], other=0.0)
            g *= segment_factor(grad, scale, row * CLASSES + c, used, T, REDUCTION)[:, None]
            pivot, others, weighted = accumulate_gradient(exp, g, c, pivot, others, weighted)
    mean = mean_gradient(softmax, pivot, others)
    for first in range(0, CLASSES, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        used = c < CLASSES
        mask = used[:, None] & inside[None, :]
        g = tl.load(weights + ptr_offset((pixels, batch_pixels, 1), n, c[:, None], p[None, :]), mask=mask, other=0.0)
        if ERRORS == PROBABILITIES:  # by the weight's sign: before the factor's
            g = sign_outside(load_logits(logits, logits_strides, n, c[:, None], p[None, :], inside[None, :], CLASSES, T), g)
        g *= segment_factor(grad, scale, row * CLASSES + c, used, T, REDUCTION)[:, None]
        if ERRORS == SOFTMAX:
            exp = load_values(logits, logits_strides, n, c, p, inside, softmax, T, ERRORS, CLASSES)
            g = softmax_gradient(exp, g, softmax, pivot, mean, weighted)
        tl.store(out + ptr_offset(out_strides, n, c[:, None], p[None, :]), g, mask=mask)


# ---- operators


def lovasz_exact_forward(
    *, logits, target, selected, present, per_image, class_weight, ignore_index, background_index, errors, reduction,
    valid_pixels, keep_weights, upcast_loss,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if valid_pixels is not None:
        raise ValueError(f"veerloss: valid_pixels must be None for Triton kernels, got {valid_pixels}")
    t = Tiles(logits, errors, per_image)
    target_arguments = t.target(target, ignore_index, background_index)
    n, c, p = logits.shape
    check_data("selected", selected, logits, (c,), torch.bool, torch.uint8)
    dtype = opmath_dtype(logits)
    losses = logits.new_zeros((t.rows, c), dtype=torch.float64)
    takes_part = logits.new_zeros((t.rows, c), dtype=torch.int8)
    weights_shape = (c, n, p) if keep_weights else (0,)
    if t.programs == 0:
        weights = logits.new_zeros(weights_shape, dtype=dtype)
    else:
        with on_device(logits):
            keys = logits.new_empty((c, t.rows, t.length), dtype=torch.int64 if dtype == torch.float64 else torch.int32)
            labels = logits.new_empty((n, p), dtype=torch.int32)
            lovasz_exact_keys_kernel[(t.programs,)](
                **t.arguments, **target_arguments, keys=keys, labels=labels, batch_pixels=n * p
            )
            sorted_keys, order = keys.sort(dim=-1, descending=True, stable=True)
            del keys  # before weights are allocated
            block = max(min(next_power_of_2(t.length), _tuning.MAX_RANKS), _tuning.MIN_RANKS)
            tiles = triton.cdiv(t.length, block)
            counts = logits.new_empty((c * t.rows, tiles), dtype=torch.int64)
            grid = (c * t.rows * tiles,)
            lovasz_exact_rank_kernel[grid](
                sorted_keys=sorted_keys, order=order, labels=labels, counts=counts, length=t.length, tiles=tiles, rows=t.rows,
                ERRORS=errors, BLOCK=block,
            )  # fmt: skip
            weights = logits.new_zeros(weights_shape, dtype=dtype)
            tile_losses = logits.new_empty((t.rows, c, tiles), dtype=torch.float64)
            lovasz_exact_weigh_kernel[grid](
                marked=sorted_keys, order=order, counts=counts.cumsum(1), selected=as_bytes(selected), weights=weights,
                losses=tile_losses, takes_part=takes_part, length=t.length, tiles=tiles, rows=t.rows, classes=c,
                T=opmath_t(logits), ERRORS=errors, PRESENT=present, KEEP_WEIGHTS=keep_weights, BLOCK=block,
            )  # fmt: skip
            losses = tile_losses.sum(-1)
    loss, scale = reduce_segments(logits, losses, takes_part, class_weight, errors, per_image, reduction, upcast_loss)
    return loss, scale, weights


def lovasz_exact_backward(
    *, grad, logits, target, weights, scale, errors, per_image, ignore_index, valid_pixels, reduction
) -> Tensor:  # the weights depend on the target already
    t = Tiles(logits, errors, per_image)
    n, c, p = logits.shape
    check_data("weights", weights, logits, (c, n, p), opmath_dtype(logits))
    grad_logits, gradient_arguments = t.gradient(grad, scale, reduction)
    if t.programs > 0:
        with on_device(logits):
            lovasz_exact_backward_kernel[(t.programs,)](
                **t.arguments, **gradient_arguments, weights=weights, batch_pixels=n * p, PER_IMAGE=per_image
            )
    return grad_logits
