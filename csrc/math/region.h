// Region losses: functions of the Tversky index of a segment, from three sums over its pixels (veerloss/reference/region.py).
#pragma once

#include <cfloat>

#include "../layout.h"

namespace veerloss {

// Sums of values in [0, 1] in units of 2^-52, integers: the same whatever the order. The bits of 1 + value count these units
// from those of 1 on, which is how a loop over pixels rounds and adds them in two instructions.
constexpr double region_unit = 0x1p-52;

VEERLOSS_HD int64_t region_units(double value) {
  return bit_cast<int64_t>(1.0 + value) - bit_cast<int64_t>(1.0);
}

// What a segment's sums are in memory. Each of three sums has two words: 2^26 units, and the units that are left, of all parts
// that were added; up to 2^31 pixels of each of 2^6 ranks do not overflow either. Then the pixels that count, and how many
// parts had a value that is not in [0, 1], or NaN.
struct RegionLayout {
  enum { intersection = 0, predicted = 2, expected = 4, pixels = 6, bad_parts = 7, words = 8 };
  static constexpr int word_bits = 26;
};

VEERLOSS_HD int64_t region_high(int64_t units) {
  return units >> RegionLayout::word_bits;
}
VEERLOSS_HD int64_t region_low(int64_t units) {
  return units & ((int64_t{1} << RegionLayout::word_bits) - 1);
}
// A sum from its words. Those of other parts come to other words, but to the same integer, and this rounds once.
VEERLOSS_HD double region_total(const int64_t* words) {
  const int64_t low = words[1], carried = words[0] + region_high(low);
  // below 2^53 but for more than 2^26 pixels of 1, whose last bits are below the rounding of float64
  return (static_cast<double>(carried) * (1 << RegionLayout::word_bits) + static_cast<double>(region_low(low))) * region_unit;
}

// Probabilities that a caller computed may be off 0 or 1 by rounding, where units are twice or half as large. Others are bad.
constexpr double region_slack = 0x1p-16;

struct RegionRule {
  double alpha, beta;  // of false positives and false negatives
  double smooth_numerator, smooth_denominator;
  Form form;
  double exponent;
};

// The loss of a segment, and dL/dp = of_target * t + of_all * dS/dp.
struct RegionTerms {
  double value, of_target, of_all;
};

// The least index that form "log" takes the logarithm of.
constexpr double least_index = 1e-7;

VEERLOSS_HD RegionTerms region_terms(double i, double s, double t, const RegionRule& rule) {
  const double missed = rule.alpha * (s - i) + rule.beta * (t - i);
  const double whole = i + missed + rule.smooth_denominator;
  if (whole == 0.0) return {0.0, 0.0, 0.0};  // nothing to be found, and nothing was
  const double index = (i + rule.smooth_numerator) / whole;
  const double rest = (missed + (rule.smooth_denominator - rule.smooth_numerator)) / whole;
  double value, slope;  // of the index
  if (rule.form == Form::log_cosh) {
    const double half = sinh(0.5 * rest);
    value = log1p(2.0 * half * half);  // log cosh, with its digits where it is small
    slope = -tanh(rest);
  } else {
    const bool logarithm = rule.form == Form::log;
    const double base = logarithm ? -log(index < least_index ? least_index : index) : rest;
    slope = !logarithm ? -1.0 : index < least_index ? 0.0 : -1.0 / index;
    value = base;
    if (rule.exponent != 1.0) {
      value = base > 0.0 ? pow(base, rule.exponent) : 0.0 * base;  // NaN stays
      slope = base > 0.0 ? slope * rule.exponent * (value / base) : 0.0;
    }
  }
  return {value, slope * (1.0 - index * (1.0 - rule.alpha - rule.beta)) / whole, -slope * rule.alpha * index / whole};
}

// What a segment's sums come to.
struct RegionSegment {
  bool has_pixels, has_target;
  RegionTerms terms;

  VEERLOSS_HD RegionSegment(const int64_t* sums, const RegionRule& rule)
      : has_pixels(sums[RegionLayout::pixels] > 0), has_target(region_total(sums + RegionLayout::expected) > 0.0) {
    terms = region_terms(region_total(sums + RegionLayout::intersection), region_total(sums + RegionLayout::predicted),
                         region_total(sums + RegionLayout::expected), rule);
    if (sums[RegionLayout::bad_parts] == 0) return;
    const double nan = bit_cast<double>(int64_t{0x7ff8000000000000});
    terms = {nan, nan, nan};
  }
};

}  // namespace veerloss
