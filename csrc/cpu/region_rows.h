// One class of a tile of pixels, as the loops of the region losses take it, and what they sum of it.
#pragma once

#include <atomic>

#include "../kernels.h"
#include "../math/focal.h"
#include "simd/vecmath.h"

namespace veerloss {

// One class of a tile. `label` and `foreground`, or `target` and `ignored`; `exps` and `inv_sumexp` of a softmax, else
// `values`.
template <class T>
struct RegionRow {
  Activation activation;
  bool squared;
  int64_t n;
  const T *values, *exps, *inv_sumexp;
  const int32_t* label;
  int32_t foreground;
  const T* target;
  T ignored;
};

// Sums of a row, in units (math/region.h); how many pixels count, and how many values are out of range.
struct RegionPart {
  int64_t intersection, predicted, expected, pixels, bad, bad_targets;

  // Threads add up integers: the same bits for any number of them.
  void add_to(std::atomic<int64_t>* words) const {
    const auto add = [words](int word, int64_t units) {
      words[word] += region_high(units);
      words[word + 1] += region_low(units);
    };
    add(RegionLayout::intersection, intersection);
    add(RegionLayout::predicted, predicted);
    add(RegionLayout::expected, expected);
    words[RegionLayout::pixels] += pixels;
    words[RegionLayout::bad_parts] += bad > 0;
  }
};

}  // namespace veerloss

#define VEERLOSS_TILES "region_tiles.h"
#include "simd/dispatch_isa.h"
