// Scalar maths of the Lovász losses (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790): errors, their weights from integer
// counts, and keys that order errors as unsigned integers. bins.h has the maths of method "histogram".
//
// A segment has `total` foreground pixels. In descending order of errors, the weight of a pixel with `fg` foreground and `bg`
// background pixels before it is the increment of J(fg, bg) = 1 - (total - fg) / (total + bg) that the pixel makes. Subtracting
// two values of J loses that increment to rounding; the closed forms below do not.
#pragma once

#include <cmath>

#include "../layout.h"

namespace veerloss {

VEERLOSS_HD double jaccard_fg_weight(int64_t total, int64_t bg) {
  return 1.0 / static_cast<double>(total + bg);
}

VEERLOSS_HD double jaccard_bg_weight(int64_t total, int64_t fg, int64_t bg) {
  const double unions = static_cast<double>(total + bg);
  return static_cast<double>(total - fg) / (unions * (unions + 1.0));
}

// Either, with one division.
VEERLOSS_HD double jaccard_weight(int64_t total, int64_t fg, int64_t bg, bool foreground) {
  const double unions = static_cast<double>(total + bg);
  return (foreground ? 1.0 : static_cast<double>(total - fg)) / (foreground ? unions : unions * (unions + 1.0));
}

// Keys: unsigned integers in the order of the errors. The top bit is free and marks foreground.
//
// The bits of a float >= 0 are ordered as the float. They resolve errors near 0 but not near 1, where floats are 2^-24 apart:
// among a million pixels with rare foreground that changes ranks (7e-5 of the gradient at a foreground share of 0.001). Errors
// of probabilities above 1/2 are therefore ordered by the bits of 1 - error, which keeps full relative precision.
template <class T>
struct ErrorKey;

template <>
struct ErrorKey<float> {
  using Word = uint32_t;
  static constexpr Word foreground = 0x80000000u;
  static constexpr Word infinity = 0x7f800000u;  // this and above: NaN or infinite: an error without a rank
  static constexpr Word ignored = 0x7fffffffu;   // a pixel that does not count
  static constexpr Word half = 0x3f000000u;      // the bits of 0.5
};

template <>
struct ErrorKey<double> {
  using Word = uint64_t;
  static constexpr Word foreground = 0x8000000000000000ull;
  static constexpr Word infinity = 0x7ff0000000000000ull;
  static constexpr Word ignored = 0x7fffffffffffffffull;
  static constexpr Word half = 0x3fe0000000000000ull;
};

// The key of an error in [0, 1] from the error and its complement, each rounded once. NaN keeps its bits.
template <class T>
VEERLOSS_HD typename ErrorKey<T>::Word key_of_probability(T error, T complement) {
  using Key = ErrorKey<T>;
  using Word = typename Key::Word;
  const Word low = bit_cast<Word>(error), high = Key::half + Key::half - bit_cast<Word>(complement);
  return error > T(0.5) ? high : low & ~Key::foreground;
}

// The error of a key of key_of_probability.
template <class T>
VEERLOSS_HD double probability_of_key(typename ErrorKey<T>::Word key) {
  using Key = ErrorKey<T>;
  const bool high = key > Key::half;
  const double part = static_cast<double>(bit_cast<T>(high ? Key::half + Key::half - key : key));
  return high ? 1.0 - part : part;
}

// The key of any error >= 0, up to its sign.
template <class T>
VEERLOSS_HD typename ErrorKey<T>::Word key_of_error(T error) {
  return bit_cast<typename ErrorKey<T>::Word>(error) & ~ErrorKey<T>::foreground;  // a NaN may carry a sign
}

// ---- errors

// The error of a class from `exp`, its exp(x - max): 1 - p on foreground, p on background; and the complement of that error.
// Both p and 1 - p keep full relative precision: for a most probable class (exp = 1), 1 - p comes from the sum of the other
// exponentials, sumexp_excl_max; for all others p <= 1/2. inv_sumexp = 1 / (1 + sumexp_excl_max).
template <class T>
struct SoftmaxError {
  T error, complement;
};

template <class T>
VEERLOSS_HD SoftmaxError<T> softmax_error(T exp, T sumexp_excl_max, T inv_sumexp, bool foreground) {
  const T p = mul_rn(exp, inv_sumexp);
  const T not_p = exp == T(1) ? mul_rn(sumexp_excl_max, inv_sumexp) : T(1) - p;
  return {foreground ? not_p : p, foreground ? p : not_p};
}

// y - p up to its sign; the error is the absolute value.
template <class T>
VEERLOSS_HD T probability_error(T p, bool foreground) {
  return foreground ? T(1) - p : p;
}

// relu(1 - s x). NaN for an infinite logit.
template <class T>
VEERLOSS_HD T hinge_error(T x, bool foreground) {
  const T margin = T(1) - (foreground ? x : -x);
  return (margin <= T(0) ? T(0) : margin) + (x - x);
}

// dL/dp of a probability from its signed weight, whose sign assumes 0 < p < 1. Outside that interval |y - p| may slope the
// other way, and at y = p its slope counts as 0.
template <class T>
VEERLOSS_HD T sign_outside(T p, T weight) {
  const T magnitude = weight < T(0) ? -weight : weight;
  const T outside = p < T(0) ? -magnitude : (p > T(1) ? magnitude : weight);
  const bool exact = ((p == T(0)) & (weight > T(0))) | ((p == T(1)) & (weight < T(0)));
  return exact ? T(0) : outside;
}

}  // namespace veerloss
