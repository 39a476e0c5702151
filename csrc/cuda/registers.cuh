// The softmax of a pixel in registers: one thread has all classes of a pixel, and reads each logit once.
//
// On sm_90 a class of float32 takes 10 instructions all told: the load, two to step the pointer, one for the maximum, three for
// the exponential (subtract, multiply, ex2), three for the sum. bfloat16 and float16 take one more, the conversion.
//
// Where pixels are contiguous (NCHW), a warp reads a class of 32 pixels, 128 bytes of float32, at a time. Where classes are
// (channels_last, points [P, C]), each of its loads would touch 32 rows: rows.cuh takes them through shared memory.
#pragma once

#include "softmax.cuh"

namespace veerloss {

// The numbers of classes [least, most] that a kernel template is compiled for. Only classes from `least` on may be missing.
template <int least_, int most_>
struct ClassRange {
  static constexpr int least = least_, most = most_;
  // Whether a pixel of `classes` has class c < most: known to the compiler for all but a few.
  __device__ static bool has(int c, int classes) { return c < least || c < classes; }
};

// More classes than registers hold: kernels read SomeClasses at a time.
using ManyClasses = ClassRange<0, 0>;
template <class In>
using SomeClasses = ClassRange<0, std::is_same_v<In, double> ? 8 : 16>;

// Calls f with the ClassRange of a number of classes > 0. At most 7 of 32 registers and 3 of 24 are for no class. Twice as many
// registers for each class of float64: 8 classes.
template <class In, class F>
void with_class_range(int64_t classes, const F& f) {
  if (classes <= 4) return f(ClassRange<1, 4>{});
  if (classes <= 8) return f(ClassRange<5, 8>{});
  if constexpr (!std::is_same_v<In, double>) {
    if (classes <= 12) return f(ClassRange<9, 12>{});
    if (classes <= 16) return f(ClassRange<13, 16>{});
    if (classes <= 20) return f(ClassRange<17, 20>{});
    if (classes <= 24) return f(ClassRange<21, 24>{});
    if (classes <= 32) return f(ClassRange<25, 32>{});
  }
  f(ManyClasses{});
}

// The classes of a pixel in memory: points to the first, and steps to the next by bytes. An addition for each class takes the
// place of the three 64-bit multiplications of an index.
template <class In>
class ClassPointer {
 public:
  using Element = In;

  __device__ ClassPointer(const View& view, int64_t image, int64_t pixel)
      : at_(view.data + ptr_offset(view, image, 0, pixel) * static_cast<int64_t>(sizeof(In))),
        step_(view.stride_channel * static_cast<int64_t>(sizeof(In))) {}

  __device__ void operator++() { at_ += step_; }
  __device__ void skip(int classes) { at_ += classes * step_; }
  // What kernels read does not change while they run: it may come by the read-only path.
  __device__ opmath_t<In> load() const {
#if defined(VEERLOSS_EMULATED)
    return convert<opmath_t<In>>(*reinterpret_cast<const In*>(at_));
#else
    return convert<opmath_t<In>>(__ldg(reinterpret_cast<const In*>(at_)));
#endif
  }
  __device__ void store(opmath_t<In> value) const { *reinterpret_cast<In*>(at_) = convert<In>(value); }

 private:
  char* at_;
  int64_t step_;
};

// All loads of a pixel are under way at once. Classes that are missing get the value `missing`: of logits -infinity, whose
// exponential is 0, so that no later step has to ask. `pixel` is a ClassPointer or a SharedRow (rows.cuh).
template <class Range, class Pointer, class T>
__device__ inline void load_classes(T (&values)[Range::most], Pointer pixel, int classes,
                                    T missing = -std::numeric_limits<T>::infinity()) {
#pragma unroll
  for (int c = 0; c < Range::most; ++c, ++pixel) values[c] = Range::has(c, classes) ? pixel.load() : missing;
}

// ---- the softmax

// The smaller and the larger of two numbers; NaN if either is. One instruction in float32.
__device__ inline float min_or_nan(float a, float b) {
#if defined(VEERLOSS_EMULATED)
  return b != b || b < a ? b : a;
#else
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}
__device__ inline float max_or_nan(float a, float b) {
#if defined(VEERLOSS_EMULATED)
  return b != b || b > a ? b : a;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}
__device__ inline double min_or_nan(double a, double b) {
  return b != b || b < a ? b : a;
}
__device__ inline double max_or_nan(double a, double b) {
  return b != b || b > a ? b : a;
}

// 2^x, one instruction; 0 below the smallest normal number.
__device__ inline float exp2_of(float x) {
#if defined(VEERLOSS_EMULATED)
  return exp2f(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1 / x of a normal number. In float32 one instruction, to a unit in the last place; a division that rounds takes 8.
__device__ inline float reciprocal_of(float x) {
#if defined(VEERLOSS_EMULATED)
  return 1.0f / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}
__device__ inline double reciprocal_of(double x) {
  return 1.0 / x;
}

// exp(x) for x <= 0; exactly 1 for 0, and 0 below the smallest normal number. In float32 two instructions, accurate to the
// rounding of x log2(e), some |x| / 2^24: no more than rounding a logit, or x - log(sum), to float32 costs.
__device__ inline float exp_neg(float x) {
  return exp2_of(x * 1.44269504f);  // log2(e)
}
__device__ inline double exp_neg(double x) {
  return exp(x);
}

// What the softmax takes exponentials with: exp_neg, or in some more instructions one that is accurate to two units in the last
// place.
struct FastExp {
  template <class T>
  __device__ T operator()(T x) const {
    return exp_neg(x);
  }
};
struct AccurateExp {
  template <class T>
  __device__ T operator()(T x) const {
    using std::exp;
    return exp(x);
  }
};

// The sum of exponentials without one of the largest: of each new one and the largest so far, the smaller is added. NaN if one
// is NaN.
template <class T>
struct SumExclMax {
  T largest = T(0), sum = T(0);

  __device__ void add(T exp) {
    sum = add_rn(sum, min_or_nan(largest, exp));
    largest = max_or_nan(largest, exp);
  }
};

template <int most, class T>
__device__ inline T max_of(const T (&values)[most]) {
  T largest = values[0];
#pragma unroll
  for (int c = 1; c < most; ++c) largest = max_or_nan(largest, values[c]);
  return largest;
}

// Turns logits into exponentials exp(logit - max_logit). Returns their sum without one of the largest.
template <int most, class T, class Exp = FastExp>
__device__ inline T exponentials_in_place(T (&values)[most], T max_logit, const Exp& exp = {}) {
  SumExclMax<T> sum;
#pragma unroll
  for (int c = 0; c < most; ++c) {
    values[c] = exp(values[c] - max_logit);
    sum.add(values[c]);
  }
  return sum.sum;
}

// Turns the logits of a pixel, -infinity where a class is missing, into exponentials.
template <int most, class T, class Exp = FastExp>
__device__ inline Softmax<T> softmax_in_place(T (&values)[most], const Exp& exp = {}) {
  const T max_logit = max_of(values);
  return {max_logit, exponentials_in_place(values, max_logit, exp)};
}

// The largest logit of classes that may all be masked out, as what their exponentials are relative to.
template <class T>
__device__ inline T finite_max(T max_logit) {
  return max_logit == -std::numeric_limits<T>::infinity() ? T(0) : max_logit;
}

// The softmax of many classes from those of parts of them.
template <class T>
struct SoftmaxOfParts {
  T max_logit = -std::numeric_limits<T>::infinity();
  double sumexp_excl_max = 0;  // of thousands of parts, perhaps

  // The sum of a part's exponentials exp(logit - finite_max(part_max)) without one of the largest.
  template <class Exp = FastExp>
  __device__ void add(T part_max, T part_sumexp_excl_max, const Exp& exp = {}) {
    const double part = part_sumexp_excl_max, before = sumexp_excl_max;
    const bool above = part_max > max_logit;
    const T low = above ? max_logit : part_max;
    max_logit = above ? part_max : max_logit;
    sumexp_excl_max =
        (above ? part : before) + (1.0 + (above ? before : part)) * static_cast<double>(exp(low - finite_max(max_logit)));
  }
  __device__ Softmax<T> softmax() const {
    return {max_logit, static_cast<T>(sumexp_excl_max) + (max_logit - max_logit)};  // NaN of an infinity
  }
};

// The softmax of any number of classes, in one read.
template <class Pointer, class Exp = FastExp>
__device__ inline auto softmax_of_many(Pointer pixel, int classes, const Exp& exp = {}) {
  using In = typename Pointer::Element;
  constexpr int most = SomeClasses<In>::most;
  SoftmaxOfParts<opmath_t<In>> parts;
  for (int left = classes; left > 0; left -= most, pixel.skip(most)) {
    opmath_t<In> values[most];
    load_classes<SomeClasses<In>>(values, pixel, left);
    const auto part_max = max_of(values);
    parts.add(part_max, exponentials_in_place(values, finite_max(part_max), exp), exp);
  }
  return parts.softmax();
}

}  // namespace veerloss
