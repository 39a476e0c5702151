// exp, log, log1p and half-precision conversions as straight-line code that a compiler turns into vector instructions.
//
// Polynomials of reduced arguments, no tables, no branches: selects only. NaN stays NaN. Largest relative error against float64
// over the domains given, in units in the last place of T: exp_neg 1, log 1, log1p_unit 1.
#pragma once

#include "../../math/log1p.h"

namespace veerloss {

// The logarithms are x times the polynomial through ln(1 + x) / x at the Chebyshev nodes of [0, 1] (math/log1p.h) and of
// [sqrt(1/2) - 1, sqrt(2) - 1] (`_near_0`), lowest power first; the comment is the largest relative error. The series of atanh
// has half the terms, and a division, which costs more than all of these.
template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Int = int32_t;
  using UInt = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Int bias = 127;
  static constexpr float round_shift = 12582912.0f;           // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693359375f;             // 9 bits, so that n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440054690583e-4f;  // ln 2 - ln2_high
  static constexpr float exp_min = -87.33654475f;             // ln 2^-126
  static constexpr int exp_terms = 7;                         // 0.3466^8 / 8! = 5e-9
  static constexpr float log1p_over_x_near_0[] = {0.999999999f, -0.499999885f, 0.333333453f, -0.250015791f,
                                                  0.200009394f, -0.166083694f, 0.141996501f, -0.132660314f,
                                                  0.128066104f, -0.0745118623f};  // 5.0e-9
};

template <>
struct FloatFormat<double> {
  using Int = int64_t;
  using UInt = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Int bias = 1023;
  static constexpr double round_shift = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693147180369123816490;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_min = -708.39641853226408;  // ln 2^-1022
  static constexpr int exp_terms = 13;                    // 0.3466^14 / 14! = 4e-18
  static constexpr double log1p_over_x_near_0[] = {1.0,
                                                   -0.500000000000000412,
                                                   0.333333333333327426,
                                                   -0.24999999999974419,
                                                   0.200000000001490382,
                                                   -0.166666666713845099,
                                                   0.142857142733977839,
                                                   -0.124999996014686354,
                                                   0.111111114189064345,
                                                   -0.100000182242854621,
                                                   0.0909091797308768219,
                                                   -0.0833285078323713338,
                                                   0.0769159854322756901,
                                                   -0.0715026212823573468,
                                                   0.0668429617719637049,
                                                   -0.061900598300090451,
                                                   0.0566669063569649559,
                                                   -0.0570761221260552053,
                                                   0.0652589937253437072,
                                                   -0.0592414997745332448,
                                                   0.0254899118004055761};  // 9.0e-18
};

template <class T, int terms>
struct InverseFactorials {
  T of[terms + 1];
  constexpr InverseFactorials() : of() {
    double factorial = 1;
    for (int k = 0; k <= terms; ++k) {
      factorial *= k > 0 ? k : 1;
      of[k] = static_cast<T>(1 / factorial);
    }
  }
};

template <class T>
struct VecMath {
  using F = FloatFormat<T>;
  using Int = typename F::Int;
  using UInt = typename F::UInt;
  static constexpr InverseFactorials<T, F::exp_terms> inverse_factorial{};

  // e^x for x <= 0. Results below the smallest normal number are 0.
  static VEERLOSS_HD T exp_neg(T x) {
    const T clamped = x < F::exp_min ? F::exp_min : x;
    const T shifted = clamped * T(1.44269504088896340736) + F::round_shift;
    const T n = shifted - F::round_shift;
    const T r = (clamped - n * F::ln2_high) - n * F::ln2_low;
    T sum = inverse_factorial.of[F::exp_terms];
#pragma GCC unroll 16
    for (int k = F::exp_terms - 1; k >= 0; --k) sum = sum * r + inverse_factorial.of[k];
    const UInt exponent = bit_cast<UInt>(shifted) - bit_cast<UInt>(F::round_shift) + static_cast<UInt>(F::bias);
    const T result = sum * bit_cast<T>(static_cast<UInt>(exponent << F::mantissa_bits));
    return x < F::exp_min ? T(0) : result;
  }

  // ln x for normal x > 0; infinity gives NaN.
  static VEERLOSS_HD T log(T x) {
    const Parts parts = split(x);
    const T f = parts.f;
    return parts.n * F::ln2_high + (f * polynomial(F::log1p_over_x_near_0, f) + parts.n * F::ln2_low) + (x - x);
  }

  // log2 x, likewise; exact for powers of 2.
  static VEERLOSS_HD T log2(T x) {
    const Parts parts = split(x);
    const T f = parts.f;
    return parts.n + f * polynomial(F::log1p_over_x_near_0, f) * T(1.44269504088896340736) + (x - x);
  }

  // ln(1 + x) for 0 <= x <= 1.
  static VEERLOSS_HD T log1p_unit(T x) { return veerloss::log1p_unit(x); }

  static VEERLOSS_HD T reciprocal(T x) { return T(1) / x; }

 private:
  // x = 2^n (1 + f).
  struct Parts {
    T n, f;
  };
  static VEERLOSS_HD Parts split(T x) {
    const UInt root_half = bit_cast<UInt>(T(0.70710678118654752440));
    const UInt bits = bit_cast<UInt>(x);
    const Int exponent = static_cast<Int>(bits - root_half) >> F::mantissa_bits;
    const T m = bit_cast<T>(static_cast<UInt>(bits - (static_cast<UInt>(exponent) << F::mantissa_bits)));
    // An integer becomes a float through the mantissa of round_shift: AVX2 has no conversion from 64-bit integers.
    const T n = bit_cast<T>(bit_cast<UInt>(F::round_shift) + static_cast<UInt>(exponent)) - F::round_shift;
    return {n, m - T(1)};
  }

  template <int terms>
  static VEERLOSS_HD T polynomial(const T (&coefficients)[terms], T x) {
    T sum = coefficients[terms - 1];
#pragma GCC unroll 24
    for (int k = terms - 2; k >= 0; --k) sum = sum * x + coefficients[k];
    return sum;
  }
};

// bfloat16 and IEEE half as their 16 bits. Narrowing rounds to nearest even and keeps NaN.
VEERLOSS_HD float bfloat16_to_float(uint16_t h) {
  return bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

VEERLOSS_HD uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(f != f ? 0x7fc0u : rounded);
}

VEERLOSS_HD float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + ((magnitude >= 0x7c00u ? 224u : 112u) << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bit_cast<float>((magnitude < 0x400u ? subnormal : normal) | sign);
}

VEERLOSS_HD uint16_t float_to_half(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a number below 2^-14 rounded to a multiple of 2^-24, the spacing of subnormal halves.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and above round to infinity
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | sign);
}

}  // namespace veerloss
