// The scalar maths of the Lovasz losses (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790): errors, weights from integer
// counts, and the order of errors as the order of unsigned integers. Bins of errors: bins.h.
//
// A segment has `total` foreground pixels. Sorted by error, descending, a pixel with `fg` foreground and `bg` background pixels
// before it takes the step of J(fg, bg) = 1 - (total - fg) / (total + bg) that adding it makes. Subtracting two such values
// loses the step to rounding; the closed forms below do not.
#pragma once

#include <cmath>

#include "platform.h"

namespace veerloss {

VEERLOSS_HD double jaccard_fg_weight(int64_t total, int64_t bg) {
  return 1.0 / static_cast<double>(total + bg);
}

VEERLOSS_HD double jaccard_bg_weight(int64_t total, int64_t fg, int64_t bg) {
  const double unions = static_cast<double>(total + bg);
  return static_cast<double>(total - fg) / (unions * (unions + 1.0));
}

// Errors as unsigned integers of the same order, the top bit left free: there it marks foreground.
//
// The bits of a float >= 0 are such integers. They resolve an error near 0 but not one near 1, where 2^-24 apart is equal:
// among a million pixels with a rare foreground that moves ranks (7e-5 of the gradient at a foreground share of 0.001). So the
// errors of probabilities above 1/2 are ranked by the bits of 1 - error, which is a probability too and known to all its
// digits.
template <class T>
struct ErrorKey;

template <>
struct ErrorKey<float> {
  using Word = uint32_t;
  static constexpr Word foreground = 0x80000000u;
  static constexpr Word infinity = 0x7f800000u;  // this and above: NaN or infinite, not an error one can rank
  static constexpr Word ignored = 0x7fffffffu;   // a pixel that takes no part
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

// The key of an error in [0, 1] from it and its complement, both rounded once. NaN keeps its bits.
template <class T>
VEERLOSS_HD typename ErrorKey<T>::Word key_of_probability(T error, T complement) {
  using Key = ErrorKey<T>;
  using Word = typename Key::Word;
  const Word low = bit_cast<Word>(error), high = Key::half + Key::half - bit_cast<Word>(complement);
  return error > T(0.5) ? high : low & ~Key::foreground;
}

// The error of such a key.
template <class T>
VEERLOSS_HD double probability_of_key(typename ErrorKey<T>::Word key) {
  using Key = ErrorKey<T>;
  const bool high = key > Key::half;
  const double part = static_cast<double>(bit_cast<T>(high ? Key::half + Key::half - key : key));
  return high ? 1.0 - part : part;
}

// The key of any error >= 0: a hinge, or the distance to a probability that the caller computed.
template <class T>
VEERLOSS_HD typename ErrorKey<T>::Word key_of_error(T error) {
  return bit_cast<typename ErrorKey<T>::Word>(error) & ~ErrorKey<T>::foreground;  // a NaN may carry a sign
}

// ---- errors

enum class Errors : int64_t { softmax = 0, probabilities = 1, hinge = 2 };  // what logits are, as in _histogram.py

// The error of a class from its exponential exp(x - maximum), 1 - p on foreground and p on background, and its complement. Each
// of p and 1 - p is known to all its digits: 1 - p of a most probable class (exponential 1) from the sum of the others, `rest`,
// and else p <= 1/2. inverse_sum = 1 / (1 + rest).
template <class T>
struct SoftmaxError {
  T error, complement;
};

template <class T>
VEERLOSS_HD SoftmaxError<T> softmax_error(T exponential, T rest, T inverse_sum, bool foreground) {
  const T p = rounded_product(exponential, inverse_sum);
  const T not_p = exponential == T(1) ? rounded_product(rest, inverse_sum) : T(1) - p;
  return {foreground ? not_p : p, foreground ? p : not_p};
}

// |y - p|, but for its sign.
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

// dL/dp of a probability from its weight, which is signed as if it were inside (0, 1). The error |y - p| of one outside may
// slope the other way, and one that is right exactly has none.
template <class T>
VEERLOSS_HD T sign_outside(T p, T weight) {
  const T magnitude = weight < T(0) ? -weight : weight;
  const T outside = p < T(0) ? -magnitude : (p > T(1) ? magnitude : weight);
  const bool right = ((p == T(0)) & (weight > T(0))) | ((p == T(1)) & (weight < T(0)));
  return right ? T(0) : outside;
}

}  // namespace veerloss
