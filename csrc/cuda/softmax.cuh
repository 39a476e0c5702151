// The softmax of a pixel. All passes of a loss compute it with the same operations in the same order, and so the same bits.
#pragma once

#include <cmath>

#include "../math/sums.h"
#include "pixels.cuh"

namespace veerloss {

// What the exponentials exp(logit - max_logit) of the classes are normalised with. `sumexp_excl_max` is their sum without one
// of the largest, which is exactly 1: 1 - p of a most probable class is sumexp_excl_max / (1 + sumexp_excl_max), where the
// subtraction would lose the digits of a small result.
template <class T>
struct alignas(2 * sizeof(T)) Softmax {
  T max_logit, sumexp_excl_max;

  __device__ T exp_of(T logit) const {
    using std::exp;
    return exp(logit - max_logit);
  }
  __device__ T inv_sumexp() const { return T(1) / add_rn(T(1), sumexp_excl_max); }
};

}  // namespace veerloss
