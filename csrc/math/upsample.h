// Where pixels of full resolution lie among those of low resolution: the geometry of torch.nn.functional.interpolate with a
// size.
//
// A position is a fraction of integers, so that index and weight are exact to the rounding of one division, for any size: in
// float32 the position of pixel 2000 would be off by 1e-4 of a pixel, and so would the weights.
#pragma once

#include <cstdint>

#include "../platform.h"

namespace veerloss {

// One axis. The position of pixel i is (i * step + offset) / unit, not below 0. Int: of low * full * 2.
template <class Int>
struct UpsampleAxisOf {
  Int low = 1, full = 1;
  Int step = 0, offset = 0, unit = 1;
  bool is_nearest = false;

  // Half-pixel centres, or with align_corners the corners on each other.
  static UpsampleAxisOf linear(Int low, Int full, bool align_corners) {
    if (align_corners) return {low, full, full > 1 ? low - 1 : 0, 0, full > 1 ? full - 1 : 1};
    return {low, full, 2 * low, low - full, 2 * full};
  }
  // PyTorch's mode "nearest".
  static UpsampleAxisOf nearest(Int low, Int full) { return {low, full, low, 0, full, true}; }

  // The pixel `first`, and with the weight that is returned first + 1. The last pixel is first of no pair, but second of the
  // one before; where there is but one the weight is 0, and there is no other to read. quotient(n) = n / unit.
  template <class T, class Quotient>
  VEERLOSS_HD T blend(Int i, Int& first, const Quotient& quotient) const {
    T weight = T(0);
    if (is_nearest) {
      // PyTorch's index is computed in float32, whatever the type of the input.
      first = static_cast<Int>(static_cast<float>(i) * (static_cast<float>(low) / static_cast<float>(full)));
    } else {
      const Int at = i * step + offset > 0 ? i * step + offset : 0;
      first = quotient(at);
      weight = static_cast<T>(at - first * unit) / static_cast<T>(unit);
    }
    if (first > low - 2) {
      first = low > 1 ? low - 2 : 0;
      weight = low > 1 ? T(1) : T(0);
    }
    return weight;
  }
  template <class T>
  VEERLOSS_HD T blend(Int i, Int& first) const {
    return blend<T>(i, first, [this](Int n) { return n / unit; });
  }
};

using UpsampleAxis = UpsampleAxisOf<int64_t>;

}  // namespace veerloss
