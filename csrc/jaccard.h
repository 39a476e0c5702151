// The scalar maths of the Lovasz losses (Berman, Triki, Blaschko, CVPR 2018, arXiv 1705.08790): weights from integer counts, and the
// order of errors as the order of unsigned integers.
//
// A segment has `total` foreground pixels. Sorted by error, descending, a pixel with `fg` foreground and `bg` background pixels
// before it takes the step of J(fg, bg) = 1 - (total - fg) / (total + bg) that adding it makes. Subtracting two such values loses the
// step to rounding; the closed forms below do not.
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

// An error is >= 0, so its bits order like an unsigned integer and leave the sign bit free: that bit marks foreground.
template <class T>
struct ErrorKey;

template <>
struct ErrorKey<float> {
  using Word = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Word foreground = 0x80000000u;
  static constexpr Word infinity = 0x7f800000u;  // this and above: not an error one can rank
  static constexpr Word ignored = 0x7fffffffu;   // a pixel that takes no part
};

template <>
struct ErrorKey<double> {
  using Word = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Word foreground = 0x8000000000000000ull;
  static constexpr Word infinity = 0x7ff0000000000000ull;
  static constexpr Word ignored = 0x7fffffffffffffffull;
};

}  // namespace veerloss
