// What the passes of the region losses share: probabilities and targets of elements, and how a segment's sums are added up.
#pragma once

#include "focal_sigmoid.cuh"
#include "lovasz/coordinates.cuh"

namespace veerloss {

// ---- probabilities

// The exponential of a region loss: p and its sums are rounded to the last digits of float32 in any case.
struct RegionExp {
  template <class T>
  static __device__ T of(T logit, T max_logit) {
    return exp_neg(logit - max_logit);
  }
};

// Calls f with a std::integral_constant.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::softmax: return f(std::integral_constant<Activation, Activation::softmax>{});
    case Activation::sigmoid: return f(std::integral_constant<Activation, Activation::sigmoid>{});
    case Activation::none: return f(std::integral_constant<Activation, Activation::none>{});
  }
}

// A probability whose class is independent of others, and its derivative.
template <class T>
struct ElementProbability {
  T p, slope;
};

template <class In, Activation activation, class T = opmath_t<In>>
__device__ inline ElementProbability<T> probability_of(T x) {
  static_assert(activation != Activation::softmax);
  if constexpr (activation == Activation::none) return {x, T(1)};
  const auto terms = sigmoid_terms<ElementMath<In>>(x);
  return {terms.p, terms.p * terms.not_p};
}

// p in [0, 1] but for rounding. NaN is not.
template <class T>
__device__ inline bool is_probability(T p) {
  return p >= T(-region_slack) && p <= T(1.0 + region_slack);
}

// ---- units of sums (math/region.h): unsigned, for a sum that holds a NaN may wrap around

using RegionUnits = unsigned long long;

__device__ inline RegionUnits units_of(double value) {
  return static_cast<RegionUnits>(region_units(value));
}
constexpr int region_bits = 52;  // of the units of 1

// Of p = exp * inv_sumexp <= 1, or of its square. In float32 a multiplication by the power of two more and a conversion to 64
// bits round as region_units does, and take the place of a conversion to float64 and an addition there.
template <bool squared, class T>
__device__ inline RegionUnits units_of_softmax(T exp, T inv_sumexp) {
  if constexpr (squared || std::is_same_v<T, double>) {
    const auto p = static_cast<double>(mul_rn(exp, inv_sumexp));
    return units_of(squared ? mul_rn(p, p) : p);
  } else {
    const float units = exp * (inv_sumexp * 0x1p52f);
#if defined(VEERLOSS_EMULATED)
    return static_cast<RegionUnits>(std::llrint(units));
#else
    return static_cast<RegionUnits>(__float2ll_rn(units));
#endif
  }
}

// ---- targets

// Of an element: whether it counts, its value in [0, 1]. One out of range counts as 1, and makes the segment's loss NaN.
template <class T>
struct RegionTarget {
  bool counts, bad;
  T value;
};

template <class T, bool dense>
class RegionTargets {
 public:
  __device__ RegionTargets(const RegionInput& in, int64_t c)
      : in_(in),
        class_(c),
        foreground_(static_cast<int32_t>(in.batch.foreground(c))),
        ignored_(static_cast<T>(in.ignored_value ? *in.ignored_value : not_a_number)) {}

  __device__ RegionTarget<T> operator()(int64_t image, int64_t pixel) const {
    if constexpr (dense) {
      const View& values = in_.values;
      const T value = load_element<T>(values.data, values.dtype, ptr_offset(values, image, class_, pixel));
      const bool good = value >= T(0) && value <= T(1);
      return {value != ignored_, !good, good ? value : T(1)};
    } else {
      const int32_t label = load_label(in_.batch.target, in_.batch.rule, image, pixel);
      return {label != label_ignored, label == label_bad, label == foreground_ || label == label_bad ? T(1) : T(0)};
    }
  }

 private:
  const RegionInput& in_;
  const int64_t class_;
  const int32_t foreground_;
  const T ignored_;
};

// ---- sums of a segment

// Words of RegionLayout.
struct RegionWords {
  RegionUnits of[RegionLayout::words] = {};

  __device__ void add_units(int word, RegionUnits units) {
    of[word] += static_cast<RegionUnits>(region_high(static_cast<int64_t>(units)));
    of[word + 1] += static_cast<RegionUnits>(region_low(static_cast<int64_t>(units)));
  }
  __device__ RegionWords operator+(const RegionWords& other) const {
    RegionWords sum;
#pragma unroll
    for (int k = 0; k < RegionLayout::words; ++k) sum.of[k] = of[k] + other.of[k];
    return sum;
  }
};

// To a word in memory, in any order.
__device__ inline void add_to_word(int64_t* word, RegionUnits units) {
  if (units) atomicAdd(reinterpret_cast<RegionUnits*>(word), units);
}

// Of the pixels of a thread, less than 2^11 of them.
struct RegionTotals {
  RegionUnits intersection = 0, predicted = 0, expected = 0;
  int32_t pixels = 0;
  bool bad = false;

  template <class T>
  __device__ void add(T p, const RegionTarget<T>& target, bool squared) {
    bad |= target.bad || !is_probability(p);
    ++pixels;
    const auto wide = static_cast<double>(p), t = static_cast<double>(target.value);
    intersection += units_of(mul_rn(wide, t));
    predicted += units_of(squared ? mul_rn(wide, wide) : wide);
    expected += units_of(squared ? mul_rn(t, t) : t);
  }

  // Adds those of all threads of a block to the words of a segment.
  template <int threads>
  __device__ void add_block(int64_t* sums) const {
    __shared__ RegionWords scratch[threads];
    RegionWords words;
    words.add_units(RegionLayout::intersection, intersection);
    words.add_units(RegionLayout::predicted, predicted);
    words.add_units(RegionLayout::expected, expected);
    words.of[RegionLayout::pixels] = static_cast<RegionUnits>(pixels);
    words.of[RegionLayout::bad_parts] = bad;
    words = block_sum<threads>(words, scratch);
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int k = 0; k < RegionLayout::words; ++k) add_to_word(sums + k, words.of[k]);
  }
};

// Pixels of a softmax of few or some hundred classes with class indices: region_sum_softmax.cu. Whether it did.
bool launch_region_sum_softmax(const RegionSums& args);

}  // namespace veerloss
