// Sigmoid focal loss of elements, whose targets are class indices of pixels, or values of their own.
#pragma once

#include "../math/focal.h"
#include "../math/log1p.h"
#include "focal.cuh"
#include "registers.cuh"

namespace veerloss {

// ---- the loss of an element

// As exact as the type of the logits needs it; in the opmath type.
template <class In>
struct ElementMath {
  using T = opmath_t<In>;

  // Of float32 to some units in the last place: 2^x of the rounded product, and what rounding took away, e^rest = 1 + rest; 6
  // instructions, where expf takes 8. Of 16 bits as in the softmax, 2: rounding the logit has cost more.
  __device__ static T exp_neg(T x) {
    if constexpr (!std::is_same_v<In, float>) {
      return veerloss::exp_neg(x);
    } else {
      // -infinity less itself would be NaN.
      const float finite = max_or_nan(x, -1000.0f), power = finite * 1.44269504f;              // log2(e)
      const float rest = fma_rn(power, 1.90465421e-9f, fma_rn(power, -0.693147182f, finite));  // ln 2, in two parts
      const float e = exp2_of(power);
      return fma_rn(e, rest, e);
    }
  }
  __device__ static T log(T x) {
    using std::log;
    return log(x);
  }
  // Of 16 bits in 3 instructions less, and to 1.4e-6: a loss of such logits, in float32, is off by 4e-7 where all are near 0.
  __device__ static T log1p_unit(T x) {
    if constexpr (sizeof(In) == 2)
      return log1p_unit_short(x);
    else
      return veerloss::log1p_unit(x);
  }
  __device__ static T reciprocal(T x) { return reciprocal_of(x); }
};

// What a pass makes of an element: its loss, or the gradient of its logit. Kernels of both passes are one template, by what
// they get: FocalLoss or FocalGradient.
enum class Pass { forward, backward };
template <class Out>
constexpr Pass pass_of = std::is_same_v<Out, FocalGradient> ? Pass::backward : Pass::forward;

// Factors of positive and negative elements: alpha and 1 - alpha, in a backward pass times the gradient that comes in.
template <class T>
struct SigmoidFactors {
  T positive, negative;

  __device__ SigmoidFactors(const SigmoidFocalInput& input, T grad) : positive(grad), negative(grad) {
    if (!input.alpha) return;
    positive *= static_cast<T>(*input.alpha);
    negative *= static_cast<T>(1.0 - *input.alpha);
  }
  // Those of a class, which has an alpha of its own.
  __device__ SigmoidFactors of_class(const SigmoidFocalInput& input, T grad, int64_t c) const {
    if (!input.class_alpha) return *this;
    const T alpha = static_cast<const T*>(input.class_alpha)[c];
    return {grad * alpha, grad * (T(1) - alpha)};
  }

 private:
  __device__ SigmoidFactors(T positive_factor, T negative_factor) : positive(positive_factor), negative(negative_factor) {}
};

// By a target in [0, 1].
template <class In, Pass pass, bool square, class T>
__device__ inline T result_of_target(T x, T target, const SigmoidFactors<T>& factors, T gamma) {
  const auto term = sigmoid_focal<ElementMath<In>, square>(x, target, factors.positive, factors.negative, gamma);
  return pass == Pass::forward ? term.value : term.slope;
}

// By a class: whether it is that of the pixel. Where the label of a pixel is < 0 the result is without_class(label) instead.
template <class In, Pass pass, bool square, class T>
__device__ inline T result_of_label(T x, bool positive, const SigmoidFactors<T>& factors, T gamma) {
  const T factor = positive ? (pass == Pass::forward ? factors.positive : -factors.positive) : factors.negative;
  const auto term = sigmoid_focal_of_class<ElementMath<In>, square>(positive ? -x : x, factor, gamma);
  return pass == Pass::forward ? term.value : term.slope;
}
template <class T>
__device__ inline T without_class(int32_t label) {
  return label == label_bad ? static_cast<T>(not_a_number) : T(0);
}

// ---- elements that are neighbours in memory, by loads and stores of up to 16 bytes

// n elements of a type, in as few words as hold them.
template <class S, int n>
struct RunOf {
  static constexpr int bytes = n * static_cast<int>(sizeof(S)), word_bytes = bytes < 16 ? bytes : 16,
                       words = bytes / word_bytes;
  template <int size, class Type, class Larger>
  using At = std::conditional_t<word_bytes == size, Type, Larger>;
  using Word = At<1, uint8_t, At<2, uint16_t, At<4, uint32_t, At<8, uint2, uint4>>>>;

  __device__ static void load(S (&values)[n], const S* from) {
    Word run[words];
#pragma unroll
    for (int k = 0; k < words; ++k) run[k] = reinterpret_cast<const Word*>(from)[k];
    std::memcpy(values, run, bytes);
  }
  __device__ static void store(S* to, const S (&values)[n]) {
    Word run[words];
    std::memcpy(run, values, bytes);
#pragma unroll
    for (int k = 0; k < words; ++k) reinterpret_cast<Word*>(to)[k] = run[k];
  }
};

// Elements of 16 bits are converted in pairs: a word of two bfloat16 is two float32 by a shift and a mask, and one instruction
// rounds a pair.
template <class S>
__device__ inline float2 widen_pair(uint32_t pair) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return {bit_cast<float>(pair << 16), bit_cast<float>(pair & 0xffff0000u)};
  else
    return __half22float2(bit_cast<__half2>(pair));
}
template <class S>
__device__ inline uint32_t round_pair(float low, float high) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>)
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
  else
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
}

template <class S, int n>
constexpr bool in_pairs = (std::is_same_v<S, __nv_bfloat16> || std::is_same_v<S, __half>) && n % 2 == 0;

template <int n, class S, class T>
__device__ inline void load_run(T (&values)[n], const S* from) {
  if constexpr (in_pairs<S, n>) {
    uint32_t pairs[n / 2];
    RunOf<uint32_t, n / 2>::load(pairs, reinterpret_cast<const uint32_t*>(from));
#pragma unroll
    for (int k = 0; k < n; k += 2) {
      const float2 pair = widen_pair<S>(pairs[k / 2]);
      values[k] = pair.x;
      values[k + 1] = pair.y;
    }
  } else {
    S stored[n];
    RunOf<S, n>::load(stored, from);
#pragma unroll
    for (int k = 0; k < n; ++k) values[k] = convert<T>(stored[k]);
  }
}

template <int n, class S, class T>
__device__ inline void store_run(S* to, const T (&values)[n]) {
  if constexpr (in_pairs<S, n>) {
    uint32_t pairs[n / 2];
#pragma unroll
    for (int k = 0; k < n; k += 2) pairs[k / 2] = round_pair<S>(values[k], values[k + 1]);
    RunOf<uint32_t, n / 2>::store(reinterpret_cast<uint32_t*>(to), pairs);
  } else {
    S stored[n];
#pragma unroll
    for (int k = 0; k < n; ++k) stored[k] = convert<S>(values[k]);
    RunOf<S, n>::store(to, stored);
  }
}

// Elements of a run: 16 bytes of logits.
template <class In>
constexpr int run_length = 16 / static_cast<int>(sizeof(In));

inline bool is_aligned(const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

// ---- targets

// The value to ignore, as what targets are compared with before they are rounded: in 64 bits, or where these have no more,
// in 32.
class IgnoredValue {
 public:
  __device__ explicit IgnoredValue(const TargetRule& rule)
      : any_(rule.has_ignore),
        any_of_32_bits_(any_ && rule.ignore == static_cast<int32_t>(rule.ignore)),
        integer_(rule.ignore),
        number_(any_ ? static_cast<double>(rule.ignore) : not_a_number),  // which is equal to none
        number_of_32_bits_(
            static_cast<float>(static_cast<double>(static_cast<float>(number_)) == number_ ? number_ : not_a_number)) {}

  template <class S>
  __device__ bool is(S stored) const {
    if constexpr (std::is_same_v<S, double>)
      return stored == number_;
    else if constexpr (!std::is_integral_v<S>)
      return convert<float>(stored) == number_of_32_bits_;
    else if constexpr (sizeof(S) == 8)
      return any_ && stored == integer_;
    else
      return any_of_32_bits_ && static_cast<int32_t>(stored) == static_cast<int32_t>(integer_);
  }

 private:
  bool any_, any_of_32_bits_;
  int64_t integer_;
  double number_;
  float number_of_32_bits_;
};

template <class S, int n, class T>
__device__ inline void load_targets_of_type(T (&targets)[n], bool (&counts)[n], const char* from, const IgnoredValue& ignored) {
  // What is stored, in a type that holds it.
  using Stored = std::conditional_t<in_pairs<S, 2>, float, S>;
  Stored stored[n];
  load_run(stored, reinterpret_cast<const S*>(from));
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const T t = convert<T>(stored[k]);
    targets[k] = t >= T(0) && t <= T(1) ? t : static_cast<T>(not_a_number);
    counts[k] = !ignored.is(stored[k]);
  }
}

// Of n elements: NaN where the target is not in [0, 1]; and whether it counts.
template <int n, class T>
__device__ inline void load_targets(T (&targets)[n], bool (&counts)[n], const char* from, DType dtype,
                                    const IgnoredValue& ignored) {
  const auto load = [&](auto zero) { load_targets_of_type<decltype(zero)>(targets, counts, from, ignored); };
  switch (dtype) {
    case DType::f64: return load(double{});
    case DType::bf16: return load(__nv_bfloat16{});
    case DType::f16: return load(__half{});
    case DType::i64: return load(int64_t{});
    case DType::i32: return load(int32_t{});
    case DType::i16: return load(int16_t{});
    case DType::i8: return load(int8_t{});
    case DType::u8: return load(uint8_t{});
    default: return load(float{});
  }
}

// ---- launches

// Calls f with a value of the element type and whether gamma is 2.
template <class F>
void with_sigmoid_kernel(const SigmoidFocalInput& input, const F& f) {
  with_element_type(input.logits.dtype,
                    [&](auto zero) { with_flag(input.gamma == 2.0, [&](auto square) { f(zero, square); }); });
}

// Elements in one run of memory: focal_sigmoid_rows.cu. `grad_logits`: null in a forward pass. Forward returns the number of
// blocks that left a sum.

bool has_sigmoid_rows(const SigmoidFocalInput& input, Reduction reduction, const View* grad_logits);
int64_t launch_sigmoid_rows_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream);
void launch_sigmoid_rows_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream);

// Logits of low resolution: focal_sigmoid_low.cu.

int64_t launch_sigmoid_low_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream);
void launch_sigmoid_low_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream);

}  // namespace veerloss
