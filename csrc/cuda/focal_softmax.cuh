// Softmax focal loss of a pixel, from its softmax.
#pragma once

#include "../math/focal.h"
#include "focal.cuh"
#include "registers.cuh"

namespace veerloss {

template <class T>
struct DeviceMath {
  __device__ static T exp_neg(T x) { return veerloss::exp_neg(x); }
  __device__ static T log(T x) {
    using std::log;
    return log(x);
  }
};

// With respect to log_p; q is the sum of the other probabilities. (The branch is the same for all pixels.)
template <class T>
__device__ inline ValueAndSlope<T> focal_term(T log_p, T q, T alpha, T gamma) {
  return gamma == T(2) ? softmax_focal<DeviceMath<T>, true>(log_p, q, alpha, gamma)
                       : softmax_focal<DeviceMath<T>, false>(log_p, q, alpha, gamma);
}

// The logarithm of the sum of all exponentials.
template <class T>
__device__ inline T log_sumexp(const Softmax<T>& softmax) {
  using std::log1p;
  return log1p(softmax.sumexp_excl_max);
}

template <class T>
__device__ inline T alpha_of(const SoftmaxFocalInput& input, int64_t c) {
  return input.class_alpha ? static_cast<const T*>(input.class_alpha)[c] : static_cast<T>(input.alpha);
}

// Whether every class has a share of the target.
inline bool is_soft(const SoftmaxFocalInput& input) {
  return input.class_probabilities || input.label_smoothing > 0;
}

// The label of a pixel; class probabilities have none, and all of their pixels count.
__device__ inline int32_t label_of_pixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel) {
  return input.class_probabilities ? 0 : load_label(input.target, input.rule, image, pixel);
}

// What the loss of a pixel depends on where its target is one class. Of a pixel without a class it is of no use.
template <class T>
struct LabelTerm {
  T q;  // the sum of the other probabilities: of a most probable class from the other exponentials, for 1 - p would cancel
  ValueAndSlope<T> loss;

  // exp: the exponential of the class, `top` if it is a most probable one.
  __device__ static T q_of(T sumexp_excl_max, T inv_sumexp, T exp, bool top) {
    using std::fma;
    return top ? sumexp_excl_max * inv_sumexp : fma(-exp, inv_sumexp, T(1));
  }
  __device__ LabelTerm(T alpha, T gamma, T log_p, T q) : q(q), loss(focal_term(log_p, q, alpha, gamma)) {}
  __device__ LabelTerm(T alpha, T gamma, const Softmax<T>& softmax, T inv_sumexp, T logit) {
    const T d = logit - softmax.max_logit;
    q = q_of(softmax.sumexp_excl_max, inv_sumexp, exp_neg(d), d == T(0));
    loss = focal_term(d - log_sumexp(softmax), q, alpha, gamma);
  }
  __device__ LabelTerm(const SoftmaxFocalInput& input, const Softmax<T>& softmax, T inv_sumexp, T logit, int32_t label)
      : LabelTerm(alpha_of<T>(input, label), static_cast<T>(input.gamma), softmax, inv_sumexp, logit) {}
};

// The logit of the label, which the softmax overwrites: a second load, from L1, takes the place of a selection for each class.
template <class Pointer>
__device__ inline auto label_logit(Pointer pixel, int32_t label) {
  pixel.skip(label);
  return pixel.load();
}

// The gradient of the classes of a part of a pixel, of which the label is the class `label`. Both values are computed before
// one is taken: nvcc then selects, where it would branch for each class.
template <class Range, class Pointer, class T>
__device__ inline void store_gradient(Pointer& to, const T (&exps)[Range::most], int classes, int32_t label, bool counts,
                                      T others, T own) {
#pragma unroll
  for (int c = 0; c < Range::most; ++c, ++to) {
    const T other = others * exps[c], value = c == label ? own : other;
    if (Range::has(c, classes)) to.store(counts ? value : T(0));
  }
}

// ---- soft targets: class probabilities, or labels with smoothing. Every class has a share of the target,
// smoothing / C + (1 - smoothing) t_c, and the loss is the sum over classes of share_c FL_c.

template <class T>
struct SoftTerm {
  T exp, p;
  ValueAndSlope<T> loss;
};

template <class In>
class SoftPixel {
  using T = opmath_t<In>;

 public:
  __device__ SoftPixel(const SoftmaxFocalInput& input, const ClassPointer<In>& logits, int64_t image, int64_t pixel,
                       int32_t label)
      : input_(input),
        logits_(logits),
        classes_(static_cast<int>(input.geometry.channels)),
        label_(label),
        target_(ptr_offset(input.target, image, 0, pixel)),
        softmax_(softmax_of_many(logits_, classes_)),
        inv_sumexp_(softmax_.inv_sumexp()),
        log_sumexp_(log_sumexp(softmax_)) {}

  // Calls f(c, SoftTerm).
  template <class F>
  __device__ void for_each_class(const F& f) const {
    using std::fma;
    const T smoothing = static_cast<T>(input_.label_smoothing), gamma = static_cast<T>(input_.gamma);
    const T least_share = smoothing / static_cast<T>(classes_);
    ClassPointer<In> logit = logits_;
    for (int c = 0; c < classes_; ++c, ++logit) {
      const T d = logit.load() - softmax_.max_logit, exp = exp_neg(d), p = exp * inv_sumexp_;
      const T q = exp == T(1) ? q_of_max() : fma(-exp, inv_sumexp_, T(1));
      const T weight = alpha_of<T>(input_, c) * (least_share + (T(1) - smoothing) * target(c));
      const bool absent = exp == T(0) && weight == T(0);  // a class that is masked out, and no part of the target
      f(c, SoftTerm<T>{exp, p, focal_term(absent ? T(0) : d - log_sumexp_, q, weight, gamma)});
    }
  }

  // 1 - p of a most probable class.
  __device__ T q_of_max() const { return softmax_.sumexp_excl_max * inv_sumexp_; }

 private:
  // NaN where it is negative or not finite.
  __device__ T target(int c) const {
    if (!input_.class_probabilities) return label_ == c ? T(1) : T(0);
    const T t = load_element<T>(input_.target.data, input_.target.dtype, target_ + c * input_.target.stride_channel);
    return t >= T(0) && t <= std::numeric_limits<T>::max() ? t : static_cast<T>(not_a_number);
  }

  const SoftmaxFocalInput& input_;
  const ClassPointer<In> logits_;
  const int classes_;
  const int32_t label_;
  const int64_t target_;  // where the target of class 0 is
  const Softmax<T> softmax_;
  const T inv_sumexp_, log_sumexp_;
};

// Slopes of the most probable classes (exponential 1), and of the others.
template <class T>
struct SlopeSums {
  T top = 0, low = 0;
  SumOfParts<T> top_parts, low_parts;

  __device__ void add(int c, const SoftTerm<T>& term) {
    top_parts.before(c, top);
    low_parts.before(c, low);
    top += term.exp == T(1) ? term.loss.slope : T(0);
    low += term.exp == T(1) ? T(0) : term.loss.slope;
  }
  __device__ void end(int classes) {
    top_parts.end(classes, top);
    low_parts.end(classes, low);
  }
};

// ---- passes over the pixels

// Blocks on a multiprocessor: 64 registers, or 80 for more than 20 classes, which spilled 8 bytes on sm_80; float64 needs up to
// 120.
template <class In, class Range>
constexpr int focal_min_blocks = std::is_same_v<In, double> ? 1
                                 : Range::most > 20         ? 3
                                                            : 4;

// With four loads for each class, whose addresses and weights take registers too.
template <class In, class Range>
constexpr int low_focal_min_blocks = Range::most > 20 ? 2 : 3;

// The loss of a pixel as it counts; without reduction it is stored.
template <class T>
__device__ inline double counted_loss(const FocalLoss& out, int64_t image, int64_t pixel, int32_t label, T loss) {
  loss = label == label_bad ? static_cast<T>(not_a_number) : label < 0 ? T(0) : loss;
  if (out.reduction == Reduction::none)
    store_element(out.loss.data, out.loss.dtype, ptr_offset(out.loss, image, 0, pixel), static_cast<double>(loss));
  return static_cast<double>(loss);
}

// The gradient of the loss of each pixel.
template <class T>
class FocalIncoming {
 public:
  __device__ explicit FocalIncoming(const FocalGradient& out) : per_pixel_(out.reduction == Reduction::none) {
    if (!per_pixel_) of_sum_ = gradient_of_sum<T>(out);
  }
  __device__ T operator()(const FocalGradient& out, int64_t image, int64_t pixel, int32_t label) const {
    if (label == label_bad) return static_cast<T>(not_a_number);
    if (!per_pixel_) return of_sum_;
    return load_element<T>(out.grad.data, out.grad.dtype, ptr_offset(out.grad, image, 0, pixel));
  }

 private:
  const bool per_pixel_;
  T of_sum_ = 0;
};

// ---- pixels that the warps of a block share: focal_shared.cu. These return whether they did.

bool launch_shared_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const FocalTiles& tiles,
                           const FocalPartials& partials, Stream stream);
bool launch_shared_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream);

// ---- logits of low resolution: focal_softmax_low.cu

void launch_low_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const FocalTiles& tiles,
                        const FocalPartials& partials, Stream stream);
void launch_low_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream);

}  // namespace veerloss
