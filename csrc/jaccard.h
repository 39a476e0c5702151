// The scalar maths of the Lovasz losses (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790): weights from integer counts,
// and the order of errors as the order of unsigned integers.
//
// A segment has `total` foreground pixels. Sorted by error, descending, a pixel with `fg` foreground and `bg` background pixels
// before it takes the step of J(fg, bg) = 1 - (total - fg) / (total + bg) that adding it makes. Subtracting two such values
// loses the step to rounding; the closed forms below do not.
#pragma once

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

}  // namespace veerloss
