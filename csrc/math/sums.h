// Sums over classes.
#pragma once

#include "../platform.h"

namespace veerloss {

// So many classes are added up in T, and what they come to in float64. One float32 sum of 1,000 equal terms is off by 2e-5, of
// 250,000 by 4e-3; parts of 256 by 3e-6, of 32 by less than 1e-6, at no cost that can be measured for 150 or 1,000 classes.
constexpr int64_t classes_per_sum = 32;

// A sum of one pixel, class by class; of rows of pixels: SoftmaxTiles::end_part.
template <class T>
struct SumOfParts {
  double total = 0;

  // Before class c is added to `sum`.
  VEERLOSS_HD void before(int64_t c, T& sum) {
    if (c % classes_per_sum != 0) return;
    total += static_cast<double>(sum);
    sum = T(0);
  }
  // After all classes: the whole sum.
  VEERLOSS_HD void end(int64_t classes, T& sum) const {
    if (classes > classes_per_sum) sum = static_cast<T>(total + static_cast<double>(sum));
  }
};

}  // namespace veerloss
