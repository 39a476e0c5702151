"""The kernels of the focal losses of logits of low resolution: images [N, C, h, w], interpolated as in csrc/math/upsample.h.

Forward, a tile is a run of pixels of a row of full resolution, whose logits are blends of four. Backward, a program has a tile
of pixels of low resolution, goes over all pixels of full resolution that lie between them and their neighbours, and keeps their
gradient in registers: nothing is added up outside, at the price of the pixels between two tiles, which both compute.
"""

import triton
import triton.language as tl

from ._focal_kernels import (
    block_softmax,
    exponentials,
    focal_labels,
    incoming,
    label_terms,
    sigmoid_elements,
    store_partials,
)
from ._tiles import ptr_offset

# An axis: (low, full, step, offset, unit), as UpsampleAxis: pixel i lies at (i * step + offset) / unit, not below 0.


@triton.jit
def blend(axis, i, T: tl.constexpr):
    """The first of the two pixels of low resolution that pixels i lie between, and the weight of the second."""
    low = axis[0]
    at = tl.maximum(i * axis[2] + axis[3], 0)
    first = at // axis[4]
    weight = (at - first * axis[4]).to(T) / tl.full((), axis[4], T)
    outer = first > low - 2
    first = tl.where(outer, tl.maximum(low - 2, 0), first)
    return first, tl.where(outer, tl.where(low > 1, 1.0, 0.0).to(T), weight)


@triton.jit
def first_from(axis, first):
    """The least pixel whose `first` is at least this one; past the last one if there is none."""
    step = tl.maximum(axis[2], 1)
    i = tl.maximum((first * axis[4] - axis[3] + step - 1) // step, 0)
    i = tl.where(first <= 0, 0, tl.where(axis[2] == 0, axis[1], tl.minimum(i, axis[1])))
    return tl.where(first > axis[0] - 2, axis[1], i)


@triton.jit
def blended_logits(logits, strides, n, c, row, x, inside, x_axis, y_axis, classes, OUTSIDE: tl.constexpr, T: tl.constexpr):
    """Of classes c [BLOCK_C, 1] and pixels x [1, BLOCK_P] of a row: OUTSIDE beyond the last class."""
    y, v = blend(y_axis, row, T)
    first, u = blend(x_axis, x, T)
    inside = inside & (c < classes)
    at = logits + n * strides[0] + c * strides[1] + y * strides[2] + first * strides[3]
    right = tl.where(x_axis[0] > 1, strides[3], 0)
    down = tl.where(y_axis[0] > 1, strides[2], 0)
    upper = tl.load(at, mask=inside, other=0.0).to(T) * ((1.0 - v) * (1.0 - u))
    upper += tl.load(at + right, mask=inside, other=0.0).to(T) * ((1.0 - v) * u)
    lower = tl.load(at + down, mask=inside, other=0.0).to(T) * (v * (1.0 - u))
    lower += tl.load(at + down + right, mask=inside, other=0.0).to(T) * (v * u)
    return tl.where(c < classes, upper + lower, OUTSIDE)


@triton.jit
def run_of_tile(tile, x_axis, y_axis, class_tiles, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """(image, classes [BLOCK_C, 1], row, pixels of the row [1, BLOCK_P])"""
    across = (x_axis[1] + BLOCK_P - 1) // BLOCK_P
    run = tile // class_tiles
    c = (tile % class_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    x = (run % across).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    row = (run // across).to(tl.int64)
    return row // y_axis[1], c.to(tl.int64), row % y_axis[1], x


# ---- the elements of a run: what they add to the loss, or their gradient


@triton.jit
def sigmoid_run(
    logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index,
    background_index, n, c, row, x, x_axis, y_axis, classes, ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    FOCUS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    in_row = x < x_axis[1]
    values = blended_logits(logits, logits_strides, n, c, row, x, in_row, x_axis, y_axis, classes, 0.0, T)
    return sigmoid_elements(
        values, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index, background_index, n, c,
        row * x_axis[1] + x, (c < classes) & in_row, in_row, classes, ONE_HOT, HAS_ALPHA, FOCUS, T,
    )  # fmt: skip


@triton.jit
def softmax_run(
    logits, logits_strides, target, target_strides, class_alpha, alpha, gamma, ignore_index, n, c, row, x, x_axis, y_axis,
    classes, FOCUS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(loss, gradient of each class [BLOCK_C, BLOCK_P], valid, bad)"""
    in_row = x < x_axis[1]
    p = row * x_axis[1] + x
    label, valid, bad = focal_labels(target, target_strides, n, p, in_row, ignore_index, None, classes)
    values = blended_logits(logits, logits_strides, n, c, row, x, in_row, x_axis, y_axis, classes, float("-inf"), T)
    values = tl.where(valid, values, 0.0)
    max_logit, sumexp_excl_max = block_softmax(values)
    sumexp_excl_max = sumexp_excl_max + (max_logit - max_logit)  # NaN for infinities
    of_label = tl.sum(tl.where(c == label, values, 0.0), 0)[None, :]
    value, slope, q = label_terms(of_label - max_logit, label, class_alpha, alpha, gamma, sumexp_excl_max, FOCUS, T)
    p_of_class = exponentials(values, max_logit) / (1.0 + sumexp_excl_max)
    gradient = slope * tl.where(c == label, q, -p_of_class)
    return tl.where(bad, float("nan"), tl.where(valid, value, 0.0)), tl.where(valid, gradient, 0.0), valid, bad


# ---- forward


@triton.jit
def sigmoid_focal_low_forward_kernel(
    logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha: tl.float64, gamma: tl.float64,
    ignore_index, background_index, out, out_strides, partials, tiles, class_tiles, classes, x_axis, y_axis,
    ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, c, row, x = run_of_tile(tile, x_axis, y_axis, class_tiles, BLOCK_C, BLOCK_P)
        value, _slope, valid = sigmoid_run(
            logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma, ignore_index,
            background_index, n, c, row, x, x_axis, y_axis, classes, ONE_HOT, HAS_ALPHA, FOCUS, T,
        )  # fmt: skip
        if out is not None:
            at = ptr_offset(out_strides, n, c, row * x_axis[1] + x)
            tl.store(out + at, value, mask=(c < classes) & (x < x_axis[1]))
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        store_partials(partials, total, count)


@triton.jit
def softmax_focal_low_forward_kernel(
    logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64, gamma: tl.float64, ignore_index, out,
    out_strides, partials, tiles, classes, x_axis, y_axis, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int64)
    tile = tl.program_id(0)
    while tile < tiles:
        n, c, row, x = run_of_tile(tile, x_axis, y_axis, 1, BLOCK_C, BLOCK_P)
        value, _gradient, valid, _bad = softmax_run(
            logits, logits_strides, target, target_strides, class_alpha, alpha, gamma, ignore_index, n, c, row, x, x_axis,
            y_axis, classes, FOCUS, T,
        )  # fmt: skip
        if out is not None:
            tl.store(out + ptr_offset(out_strides, n, 0, row * x_axis[1] + x), value, mask=x < x_axis[1])
        else:
            total += tl.sum(value.to(tl.float64))
            count += tl.sum(valid.to(tl.int32))
        tile += tl.num_programs(0)
    if out is None:
        store_partials(partials, total, count)


# ---- backward: LOW_Y x LOW_X pixels of low resolution


@triton.jit
def low_tile(tile, x_axis, y_axis, class_tiles, BLOCK_C: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr):
    """(image, classes [BLOCK_C, 1], the tile's first row and first column)"""
    across = (x_axis[0] + LOW_X - 1) // LOW_X
    down = (y_axis[0] + LOW_Y - 1) // LOW_Y
    place = tile // class_tiles
    c = (tile % class_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    column = (place % across).to(tl.int64) * LOW_X
    row = (place // across).to(tl.int64)
    return row // down, c.to(tl.int64), row % down * LOW_Y, column


@triton.jit
def share(axis, i, low, T: tl.constexpr):
    """What pixel i adds to pixel `low` of low resolution, of what it adds to all."""
    first, weight = blend(axis, i, T)
    return tl.where(first == low, 1.0 - weight, 0.0) + tl.where((first + 1 == low) & (axis[0] > 1), weight, 0.0)


@triton.jit
def add_run(sums, gradient, row, x, first_row, first_column, x_axis, y_axis, LOW_Y: tl.constexpr, LOW_X: tl.constexpr):
    """sums [BLOCK_C, LOW_Y * LOW_X] of the tile, with the gradients of a run."""
    q = tl.arange(0, LOW_Y * LOW_X)[None, :]
    of_row = share(y_axis, row, first_row + q // LOW_X, sums.dtype)
    for k in tl.static_range(LOW_X):
        column = tl.sum(gradient * share(x_axis, x, first_column + k, sums.dtype), 1)[:, None]
        sums += tl.where(q % LOW_X == k, column * of_row, 0.0)
    return sums


@triton.jit
def store_sums(
    out, strides, sums, n, c, first_row, first_column, x_axis, y_axis, classes, LOW_Y: tl.constexpr, LOW_X: tl.constexpr
):
    q = tl.arange(0, LOW_Y * LOW_X)[None, :]
    row = first_row + q // LOW_X
    column = first_column + q % LOW_X
    at = n * strides[0] + c * strides[1] + row * strides[2] + column * strides[3]
    tl.store(out + at, sums, mask=(c < classes) & (row < y_axis[0]) & (column < x_axis[0]))


@triton.jit
def sigmoid_focal_low_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha,
    alpha: tl.float64, gamma: tl.float64, ignore_index, background_index, out, out_strides, class_tiles, classes, x_axis,
    y_axis, ONE_HOT: tl.constexpr, HAS_ALPHA: tl.constexpr, FOCUS: tl.constexpr, T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr,
):  # fmt: skip
    n, c, first_row, first_column = low_tile(tl.program_id(0), x_axis, y_axis, class_tiles, BLOCK_C, LOW_Y, LOW_X)
    sums = tl.zeros((BLOCK_C, LOW_Y * LOW_X), T)
    row = first_from(y_axis, first_row - 1)
    last_row = first_from(y_axis, first_row + LOW_Y)
    end = first_from(x_axis, first_column + LOW_X)
    while row < last_row:
        begin = first_from(x_axis, first_column - 1)
        while begin < end:
            x = begin + tl.arange(0, BLOCK_P)[None, :]
            _value, slope, valid = sigmoid_run(
                logits, logits_strides, target, target_strides, weight, weight_strides, class_alpha, alpha, gamma,
                ignore_index, background_index, n, c, row, x, x_axis, y_axis, classes, ONE_HOT, HAS_ALPHA, FOCUS, T,
            )  # fmt: skip
            inside = (c < classes) & (x < end)
            g = incoming(grad, grad_strides, scale, n, c, row * x_axis[1] + x, inside, T)
            g = tl.where(valid & inside, g * slope, 0.0)
            sums = add_run(sums, g, row, x, first_row, first_column, x_axis, y_axis, LOW_Y, LOW_X)
            begin += BLOCK_P
        row += 1
    store_sums(out, out_strides, sums, n, c, first_row, first_column, x_axis, y_axis, classes, LOW_Y, LOW_X)


@triton.jit
def softmax_focal_low_backward_kernel(
    grad, grad_strides, scale, logits, logits_strides, target, target_strides, class_alpha, alpha: tl.float64,
    gamma: tl.float64, ignore_index, out, out_strides, classes, x_axis, y_axis, FOCUS: tl.constexpr, T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr,
):  # fmt: skip
    n, c, first_row, first_column = low_tile(tl.program_id(0), x_axis, y_axis, 1, BLOCK_C, LOW_Y, LOW_X)
    sums = tl.zeros((BLOCK_C, LOW_Y * LOW_X), T)
    row = first_from(y_axis, first_row - 1)
    last_row = first_from(y_axis, first_row + LOW_Y)
    end = first_from(x_axis, first_column + LOW_X)
    while row < last_row:
        begin = first_from(x_axis, first_column - 1)
        while begin < end:
            x = begin + tl.arange(0, BLOCK_P)[None, :]
            _value, gradient, valid, bad = softmax_run(
                logits, logits_strides, target, target_strides, class_alpha, alpha, gamma, ignore_index, n, c, row, x, x_axis,
                y_axis, classes, FOCUS, T,
            )  # fmt: skip
            g = incoming(grad, grad_strides, scale, n, 0, row * x_axis[1] + x, x < end, T)
            g = tl.where(bad, float("nan"), g)
            g = tl.where(valid & (c < classes) & (x < end), g * gradient, 0.0)
            sums = add_run(sums, g, row, x, first_row, first_column, x_axis, y_axis, LOW_Y, LOW_X)
            begin += BLOCK_P
        row += 1
    store_sums(out, out_strides, sums, n, c, first_row, first_column, x_axis, y_axis, classes, LOW_Y, LOW_X)
