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

// The sum of exponentials, one at a time.
template <class T>
struct SumExp {
  T below_one = T(0);  // the sum of those below 1
  T ones = T(0);       // how many are 1: those of the largest logit

  __device__ void add(T exp) {
    below_one = add_rn(below_one, exp == T(1) ? T(0) : exp);
    ones += exp == T(1) ? T(1) : T(0);
  }
  __device__ T excl_max() const { return add_rn(below_one, ones - T(1)); }
};

// Reads the logits of a pixel twice, the second time from the cache. A single pass, which rescales the sum at every new
// maximum, would round more often and so rank more pixels wrongly.
template <class In>
__device__ inline Softmax<opmath_t<In>> softmax_of_pixel(const View& logits, int64_t classes, int64_t image, int64_t pixel) {
  using T = opmath_t<In>;
  Softmax<T> softmax{load<In>(logits, image, 0, pixel), T(0)};
  for (int64_t c = 1; c < classes; ++c) {
    const T logit = load<In>(logits, image, c, pixel);
    softmax.max_logit = logit > softmax.max_logit ? logit : softmax.max_logit;
  }
  SumExp<T> sum;
  SumOfParts<T> parts;
  for (int64_t c = 0; c < classes; ++c) {
    parts.before(c, sum.below_one);
    sum.add(softmax.exp_of(load<In>(logits, image, c, pixel)));
  }
  parts.end(classes, sum.below_one);
  softmax.sumexp_excl_max = sum.excl_max();
  return softmax;
}

// The same from logits in registers; `exps` receives their exponentials. Of both arrays only the first `classes` elements
// count.
template <int max_classes, class T>
__device__ inline Softmax<T> softmax_of_registers(const T (&logits)[max_classes], int64_t classes, T (&exps)[max_classes]) {
  Softmax<T> softmax{logits[0], T(0)};
#pragma unroll
  for (int c = 1; c < max_classes; ++c)
    if (c < classes) softmax.max_logit = logits[c] > softmax.max_logit ? logits[c] : softmax.max_logit;
  SumExp<T> sum;
#pragma unroll
  for (int c = 0; c < max_classes; ++c) {
    if (c >= classes) continue;
    exps[c] = softmax.exp_of(logits[c]);
    sum.add(exps[c]);
  }
  softmax.sumexp_excl_max = sum.excl_max();
  return softmax;
}

}  // namespace veerloss
