// Softmax focal loss in CUDA C++: one thread for each pixel. Forward reads the logits and the target once, backward reads them
// again and writes the gradient; nothing is kept between the two, and nothing waits for the host. A target out of range makes
// the loss NaN.

#include "../math/focal.h"
#include "registers.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::Focal;

// The tiles of a pass, and among how many blocks they are dealt out.
struct Tiles {
  PixelGrid grid;
  uint32_t blocks;
};

// Calls f(image, pixel) for the pixels of a thread.
template <class F>
__device__ inline void for_each_pixel(const Tiles& tiles, const Geometry& g, const F& f) {
  for (int64_t tile = blockIdx.x; tile < tiles.grid.blocks; tile += tiles.blocks) {
    const auto at = thread_pixel<Policy::threads>(tiles.grid, g.images, g.pixels, 1, static_cast<uint32_t>(tile));
    if (at.pixel >= 0) f(at.image, at.pixel);
  }
}

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

// The label of a pixel; class probabilities have none, and all of their pixels count.
__device__ inline int32_t label_of_pixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel) {
  return input.class_probabilities ? 0 : load_label(input.target, input.rule, image, pixel);
}

// What the loss of a pixel depends on where its target is one class. Of a pixel without a class it is of no use.
template <class T>
struct LabelTerm {
  T q;  // the sum of the other probabilities: of a most probable class from the other exponentials, for 1 - p would cancel
  ValueAndSlope<T> loss;

  __device__ LabelTerm(const SoftmaxFocalInput& input, const Softmax<T>& softmax, T inv_sumexp, T logit, int32_t label) {
    using std::fma;
    const T d = logit - softmax.max_logit;
    q = d == T(0) ? softmax.sumexp_excl_max * inv_sumexp : fma(-exp_neg(d), inv_sumexp, T(1));
    loss = focal_term(d - log_sumexp(softmax), q, alpha_of<T>(input, label), static_cast<T>(input.gamma));
  }
};

// The logit of the label, which the softmax overwrites: a second load, from L1, takes the place of a selection for each class.
template <class In>
__device__ inline opmath_t<In> label_logit(ClassPointer<In> pixel, int32_t label) {
  pixel.skip(label);
  return pixel.load();
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
  __device__ SoftPixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel, int32_t label)
      : input_(input),
        logits_(input.logits, image, pixel),
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

// ---- forward

// Sums and counts of blocks, [blocks] each.
struct Partials {
  double *sums, *counts;

  Partials(void* memory, int64_t blocks) {
    ScratchArrays arrays(memory);
    sums = arrays.take<double>(blocks);
    counts = arrays.take<double>(blocks);
    bytes = arrays.bytes();
  }
  int64_t bytes;
};

template <class In, class Range, bool soft>
__device__ inline opmath_t<In> loss_of_pixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel, int32_t label) {
  using T = opmath_t<In>;
  const auto classes = static_cast<int>(input.geometry.channels);
  if constexpr (soft) {
    double loss = 0;  // the label's term is far larger than the others
    SoftPixel<In>(input, image, pixel, label).for_each_class([&](int, const SoftTerm<T>& term) {
      loss += static_cast<double>(term.loss.value);
    });
    return static_cast<T>(loss);
  } else {
    const ClassPointer<In> logits(input.logits, image, pixel);
    const int32_t known = label < 0 ? 0 : label;
    Softmax<T> softmax;
    if constexpr (Range::most > 0) {
      T values[Range::most];
      load_classes<Range>(values, logits, classes);
      softmax = softmax_in_place(values);
    } else {
      softmax = softmax_of_many(logits, classes);
    }
    return LabelTerm<T>(input, softmax, softmax.inv_sumexp(), label_logit(logits, known), known).loss.value;
  }
}

template <class In, class Range, bool soft>
__global__ void __launch_bounds__(Policy::threads, 1)
    softmax_focal_forward_kernel(SoftmaxFocalInput input, FocalLoss out, Tiles tiles, Partials partials) {
  using T = opmath_t<In>;
  constexpr int threads = Policy::threads;
  __shared__ double sums[threads];
  __shared__ int32_t counts[threads];
  double sum = 0;
  int32_t count = 0;
  for_each_pixel(tiles, input.geometry, [&](int64_t image, int64_t pixel) {
    const int32_t label = label_of_pixel(input, image, pixel);
    T loss = loss_of_pixel<In, Range, soft>(input, image, pixel, label);
    loss = label == label_bad ? static_cast<T>(not_a_number) : label < 0 ? T(0) : loss;
    if (out.reduction == Reduction::none)
      store_element(out.loss.data, out.loss.dtype, ptr_offset(out.loss, image, 0, pixel), static_cast<double>(loss));
    sum += static_cast<double>(loss);
    count += label != label_ignored;
  });
  if (out.reduction == Reduction::none) return;
  sum = block_sum<threads>(sum, sums);
  count = block_sum<threads>(count, counts);
  if (threadIdx.x == 0) {
    partials.sums[blockIdx.x] = sum;
    partials.counts[blockIdx.x] = count;
  }
}

// The loss, and what the sum was multiplied with: one block.
__global__ void __launch_bounds__(Policy::threads) focal_finish_kernel(FocalLoss out, Partials partials, int64_t blocks) {
  constexpr int threads = Policy::threads;
  __shared__ double scratch[threads];
  double sum = 0, count = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += threads) {
    sum += partials.sums[i];
    count += partials.counts[i];
  }
  sum = block_sum<threads>(sum, scratch);
  count = block_sum<threads>(count, scratch);
  if (threadIdx.x != 0) return;
  double scale = out.factor;
  if (out.normalizer.data) scale /= load_element(out.normalizer.data, out.normalizer.dtype, 0);
  if (out.reduction == Reduction::mean) scale = 1.0 / count;
  if (out.reduction != Reduction::none && count == 0.0) scale = 0.0;  // loss and gradient are 0, whatever the normaliser is
  if (out.reduction != Reduction::none) store_element(out.loss.data, out.loss.dtype, 0, sum * scale);
  store_element(out.scale.data, out.scale.dtype, 0, scale);
}

// ---- backward

template <class In, class Range, bool soft>
__device__ inline void gradient_of_pixel(const SoftmaxFocalInput& input, const View& grad_logits, int64_t image, int64_t pixel,
                                         int32_t label, opmath_t<In> grad) {
  using T = opmath_t<In>;
  const auto classes = static_cast<int>(input.geometry.channels);
  const bool counts = label != label_ignored;  // else the gradient is 0, whatever the logits hold
  ClassPointer<In> to(grad_logits, image, pixel);
  if constexpr (soft) {
    const SoftPixel<In> target(input, image, pixel, label);
    SlopeSums<T> sums;
    target.for_each_class([&](int c, const SoftTerm<T>& term) { sums.add(c, term); });
    sums.end(classes);
    // slope - p (top + low). A confident pixel has p near 1 and slope = top: there slope - p top is q slope, which keeps the
    // digits that the subtraction loses.
    target.for_each_class([&](int, const SoftTerm<T>& term) {
      const T slope = term.loss.slope;
      const T kept = term.exp == T(1) && slope == sums.top ? slope * target.q_of_max() : slope - term.p * sums.top;
      to.store(counts ? grad * (kept - term.p * sums.low) : T(0));
      ++to;
    });
  } else {
    ClassPointer<In> logits(input.logits, image, pixel);
    const int32_t known = label < 0 ? 0 : label;
    const T logit = label_logit(logits, known);
    // Both are computed before one is taken: nvcc then selects, where it would branch for each class.
    const auto store = [&](const auto& exps, auto range, int first, T others, T own) {
#pragma unroll
      for (int c = 0; c < range.most; ++c, ++to) {
        const T other = others * exps[c], value = first + c == label ? own : other;
        if (range.has(c, classes - first)) to.store(counts ? value : T(0));
      }
    };
    const auto factors = [&](const Softmax<T>& softmax) {
      const T inv_sumexp = softmax.inv_sumexp();
      const LabelTerm<T> term(input, softmax, inv_sumexp, logit, known);
      const T g = grad * term.loss.slope;
      return std::pair<T, T>{-g * inv_sumexp, g * term.q};
    };
    if constexpr (Range::most > 0) {
      T values[Range::most];
      load_classes<Range>(values, logits, classes);
      const auto [others, own] = factors(softmax_in_place(values));
      store(values, Range{}, 0, others, own);
    } else {
      const Softmax<T> softmax = softmax_of_many(logits, classes);
      const auto [others, own] = factors(softmax);
      constexpr int most = SomeClasses<In>::most;
      for (int first = 0; first < classes; first += most, logits.skip(most)) {
        T values[most];
        load_classes<SomeClasses<In>>(values, logits, classes - first);
        exponentials_in_place(values, softmax.max_logit);
        store(values, SomeClasses<In>{}, first, others, own);
      }
    }
  }
}

template <class In, class Range, bool soft>
__global__ void __launch_bounds__(Policy::threads, 1)
    softmax_focal_backward_kernel(SoftmaxFocalInput input, FocalGradient out, Tiles tiles) {
  using T = opmath_t<In>;
  const bool per_pixel = out.reduction == Reduction::none;
  T grad = 0;
  if (!per_pixel)
    grad = static_cast<T>(load_element(out.grad.data, out.grad.dtype, 0) * load_element(out.scale.data, out.scale.dtype, 0));
  for_each_pixel(tiles, input.geometry, [&](int64_t image, int64_t pixel) {
    const int32_t label = label_of_pixel(input, image, pixel);
    T g = grad;
    if (per_pixel) g = load_element<T>(out.grad.data, out.grad.dtype, ptr_offset(out.grad, image, 0, pixel));
    if (label == label_bad) g = static_cast<T>(not_a_number);
    gradient_of_pixel<In, Range, soft>(input, out.grad_logits, image, pixel, label, g);
  });
}

// ---- launches

Tiles tiles_of(const Geometry& g) {
  const PixelGrid grid = pixel_grid<Policy::threads>(g.images, g.pixels);
  return {grid, static_cast<uint32_t>(grid.blocks < Policy::max_blocks ? grid.blocks : Policy::max_blocks)};
}

// Calls f with the element type, the range of classes and whether the target is soft.
template <class F>
void with_kernel(const SoftmaxFocalInput& input, const F& f) {
  with_element_type(input.logits.dtype, [&](auto zero) {
    if (input.class_probabilities || input.label_smoothing > 0) return f(zero, ManyClasses{}, std::true_type{});
    with_class_range<decltype(zero)>(input.geometry.channels, [&](auto range) { f(zero, range, std::false_type{}); });
  });
}

}  // namespace

namespace kernels {

int64_t softmax_focal_scratch_bytes(const SoftmaxFocalInput& input) {
  return Partials(nullptr, tiles_of(input.geometry).blocks).bytes;
}

void softmax_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, Stream stream) {
  const Tiles tiles = tiles_of(input.geometry);
  const Partials partials(out.scratch, tiles.blocks);
  with_kernel(input, [&](auto zero, auto range, auto soft) {
    launch(softmax_focal_forward_kernel<decltype(zero), decltype(range), decltype(soft)::value>,
           {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream}, input, out, tiles, partials);
  });
  launch(focal_finish_kernel, {.blocks = 1, .threads = Policy::threads, .stream = stream}, out, partials,
         out.reduction == Reduction::none ? 0 : tiles.blocks);
}

void softmax_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream) {
  const Tiles tiles = tiles_of(input.geometry);
  with_kernel(input, [&](auto zero, auto range, auto soft) {
    launch(softmax_focal_backward_kernel<decltype(zero), decltype(range), decltype(soft)::value>,
           {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream}, input, out, tiles);
  });
}

}  // namespace kernels
}  // namespace veerloss
