"""The scalar maths of the focal losses, as in csrc/math/focal.h and csrc/cpu/simd/vecmath.h.

Logarithms are spelled out for float32: the hardware's are fast but lose digits near 1, which are the confident pixels.
"""

import triton
import triton.language as tl

from ._math import LN2_HIGH, LN2_LOW, exp_neg

# Lowest power first, ln(1 + x) / x: on [sqrt(1/2) - 1, sqrt(2) - 1] as in csrc/cpu/simd/vecmath.h, on [0, 1] as in
# csrc/math/log1p.h.
LOG1P_NEAR_0 = tl.constexpr((
    0.999999999, -0.499999885, 0.333333453, -0.250015791, 0.200009394, -0.166083694, 0.141996501, -0.132660314, 0.128066104,
    -0.0745118623,
))  # fmt: skip
LOG1P_UNIT = tl.constexpr((
    0.999999995, -0.499998926, 0.333297105, -0.249516163, 0.196632743, -0.152696671, 0.105436238, -0.0563736128, 0.0195425273,
    -0.00317605702,
))  # fmt: skip
ROOT_HALF_BITS = tl.constexpr(0x3F3504F3)  # of float32 sqrt(1/2)


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    result = tl.full(x.shape, coefficients[9], x.dtype)
    for k in tl.static_range(9):
        result = result * x + coefficients[8 - k]
    return result


@triton.jit
def log(x):
    """ln x for normal x > 0; infinity gives NaN."""
    if x.dtype == tl.float64:
        return tl.log(x) + (x - x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - ROOT_HALF_BITS) >> 23
        n = exponent.to(tl.float32)
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        return n * LN2_HIGH + (f * polynomial(f, LOG1P_NEAR_0) + n * LN2_LOW) + (x - x)


@triton.jit
def log1p_unit(x):
    """ln(1 + x) for 0 <= x <= 1."""
    if x.dtype == tl.float64:
        u = 1.0 + x
        lost = u == 1.0  # else u - 1 is exact, and x / (u - 1) mends what rounding to u moved
        return tl.where(lost, x, tl.log(u) * (x / tl.where(lost, 1.0, u - 1.0)))
    else:
        return x * polynomial(x, LOG1P_UNIT)


@triton.jit
def log_sumexp(sumexp_excl_max):
    """ln(1 + sumexp_excl_max), of a sum >= 0: the logarithm of a softmax's sum, relative to the largest logit."""
    small = sumexp_excl_max <= 1.0
    return tl.where(small, log1p_unit(tl.where(small, sumexp_excl_max, 0.0)), log(1.0 + sumexp_excl_max))


@triton.jit
def focusing(q, gamma, FOCUS: tl.constexpr):
    """q^gamma and its derivative; FOCUS is gamma where that is 0 or 2, which need no logarithm, else None."""
    if FOCUS == 2:
        return q * q, q + q
    elif FOCUS == 0:
        return tl.full(q.shape, 1.0, q.dtype), tl.zeros(q.shape, q.dtype)
    else:
        positive = (q <= 0.0) == 0  # true for NaN, which has to stay NaN
        safe = tl.where(positive, q, 1.0)
        power = exp_neg(gamma * log(safe))
        return tl.where(positive, power, tl.where(gamma > 0.0, 0.0, 1.0)), tl.where(positive, gamma * power / safe, 0.0)


@triton.jit
def sigmoid_focal(x, t, alpha_positive, alpha_negative, gamma, FOCUS: tl.constexpr):
    """Value and derivative of the binary loss of logit x and target t in [0, 1]."""
    s = 1.0 - t
    magnitude = tl.abs(x)
    e = exp_neg(-magnitude)
    r = 1.0 / (1.0 + e)
    negative = x < 0.0
    p = tl.where(negative, e * r, r)
    not_p = tl.where(negative, r, e * r)  # without the cancellation of 1 - p
    high = tl.where(negative, 0.0, x)
    bce = s * high + t * (magnitude - high) + log1p_unit(e) + (x - x)  # infinite x: NaN
    alpha = alpha_positive * t + alpha_negative * s
    value, slope = focusing(s * p + t * not_p, gamma, FOCUS)
    dq = p * not_p * (s - t)
    return alpha * value * bce, alpha * (value * (s * p - t * not_p) + slope * dq * bce)


@triton.jit
def softmax_focal(log_p, q, alpha, gamma, FOCUS: tl.constexpr):
    """Value, and derivative with respect to log_p; q is the sum of the other probabilities."""
    value, slope = focusing(q, gamma, FOCUS)
    p = 1.0 - q
    p_log_p = tl.where(p > 0.0, p * log_p, 0.0)  # a logit of -inf on the class: p = 0, log_p = -inf
    return -alpha * value * log_p, -alpha * (value - slope * p_log_p)
