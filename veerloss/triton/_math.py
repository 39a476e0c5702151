"""Scalar maths that all kernels share."""

import triton
import triton.language as tl

# The ln 2 of float32 arithmetic, in two parts: the first has 9 bits, so that its product with an exponent is exact.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440054690583e-4)


@triton.jit
def widen(x, T: tl.constexpr):
    """What was loaded, in the type T: of bfloat16 by way of float32, because Triton's interpreter converts it to no other."""
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(T)


@triton.jit
def reciprocal(x):
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.div_rn(1.0, x)  # "/" is not rounded correctly in float32


@triton.jit
def key_bits(x):
    """The bits of |x|: integers of the same order."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exp_neg(x):
    """e^x for x <= 0 to one unit in the last place, as VecMath::exp_neg in csrc/cpu/simd/vecmath.h. tl.exp has fewer digits."""
    if x.dtype == tl.float64:
        exp_min = tl.full((), -708.39641853226408, tl.float64)  # ln 2^-1022
        clamped = tl.where(x < exp_min, exp_min, x)
        shifted = clamped * 1.44269504088896340736 + 6755399441055744.0  # 1.5 * 2^52 rounds to an integer
        n = shifted - 6755399441055744.0
        r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
        y = r * (1 / 6227020800) + 1 / 479001600
        y = ((y * r + 1 / 39916800) * r + 1 / 3628800) * r + 1 / 362880
        y = ((y * r + 1 / 40320) * r + 1 / 5040) * r + 1 / 720
        y = ((y * r + 1 / 120) * r + 1 / 24) * r + 1 / 6
        y = ((y * r + 0.5) * r + 1.0) * r + 1.0
        power = (shifted.to(tl.int64, bitcast=True) - 0x4338000000000000 + 1023) << 52
        return tl.where(x < exp_min, 0.0, y * power.to(tl.float64, bitcast=True))
    else:
        exp_min = tl.full((), -87.33654475, tl.float32)  # ln 2^-126
        clamped = tl.where(x < exp_min, exp_min, x)
        shifted = clamped * 1.44269504088896340736 + 12582912.0  # 1.5 * 2^23
        n = shifted - 12582912.0
        r = (clamped - n * LN2_HIGH) - n * LN2_LOW
        y = ((r * (1 / 5040) + 1 / 720) * r + 1 / 120) * r + 1 / 24
        y = (((y * r + 1 / 6) * r + 0.5) * r + 1.0) * r + 1.0
        power = (shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127) << 23
        return tl.where(x < exp_min, 0.0, y * power.to(tl.float32, bitcast=True))
