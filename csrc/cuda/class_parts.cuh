// Pixels of many classes: a block has 32 pixels, and each of its warps a part of their classes in registers, so that a pass
// reads the logits once. The first warp puts the softmax together.
#pragma once

#include "registers.cuh"
#include "rows.cuh"

namespace veerloss {

using PartsPolicy = Tuning::ClassParts;

inline bool are_in_parts(int64_t classes, DType dtype) {
  return classes >= PartsPolicy::min_classes && classes <= PartsPolicy::max_classes && dtype != DType::f64;
}

// The classes of a warp: as many as the others have, or one more.
struct ClassPart {
  int first, count;

  __device__ ClassPart(int warp, int classes) {
    const int least = classes / PartsPolicy::warps, with_one_more = classes % PartsPolicy::warps;
    first = warp * least + (warp < with_one_more ? warp : with_one_more);
    count = least + (warp < with_one_more ? 1 : 0);
  }
};

// Calls f with the range of the numbers of classes of a warp.
template <class F>
void with_part_range(int64_t classes, const F& f) {
  constexpr int warps = PartsPolicy::warps;
  if (classes <= 8 * warps) return f(ClassRange<4, 8>{});
  if (classes <= 12 * warps) return f(ClassRange<8, 12>{});
  if (classes <= 20 * warps) return f(ClassRange<12, 20>{});
  f(ClassRange<20, 32>{});
}

// The softmaxes of all parts, in shared memory.
template <class T>
struct PartSoftmaxes {
  T max_logit[PartsPolicy::threads], sumexp_excl_max[PartsPolicy::threads];

  // That of a thread's part: exponentials are relative to finite_max(part_max).
  __device__ void put(T part_max, T part_sumexp_excl_max) {
    max_logit[threadIdx.x] = part_max;
    sumexp_excl_max[threadIdx.x] = part_sumexp_excl_max;
  }
  // Of a pixel, from its parts in their order. A barrier has to stand before.
  template <class Exp>
  __device__ Softmax<T> whole(int lane, const Exp& exp) const {
    SoftmaxOfParts<T> parts;
    for (int i = lane; i < PartsPolicy::threads; i += PartsPolicy::pixels) parts.add(max_logit[i], sumexp_excl_max[i], exp);
    return parts.softmax();
  }
};

// An exponential `Exp` of a Weights (gradient.cuh) as a function of one argument.
template <class Exp>
struct ExpOf {
  template <class T>
  __device__ T operator()(T x) const {
    return Exp::of(x, T(0));
  }
};

// Of a thread's part, from its logits, -infinity where a class is missing.
template <class Exp, int most, class T>
__device__ inline void put_softmax_of_part(PartSoftmaxes<T>& parts, const T (&logits)[most]) {
  const T part_max = max_of(logits), relative_to = finite_max(part_max);
  SumExclMax<T> sum;
#pragma unroll
  for (int c = 0; c < most; ++c) sum.add(Exp::of(logits[c], relative_to));
  parts.put(part_max, sum.sum);
}

}  // namespace veerloss
