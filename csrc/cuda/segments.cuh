// What the methods "exact" and "histogram" share on a GPU: the loss of a batch from those of its segments, and the gradient of
// the logits from the weights of the errors.
#pragma once

#include "../bins.h"
#include "pixels.cuh"

namespace veerloss {

// ---- the loss of a batch

constexpr int finish_threads = 256;

// One block. in_mean: [rows], the segments of each row that take part.
template <class T>
__global__ void __launch_bounds__(finish_threads)
    lovasz_finish_kernel(const SegmentResult* results, const int32_t* in_mean, int64_t rows, int64_t classes,
                         Selection selection, LossOutput out) {
  __shared__ double scratch[finish_threads];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < rows * classes; i += finish_threads) {
    const SegmentResult result = results[i];
    const int64_t row = i / classes, c = i % classes;
    double factor = result.takes_part ? 1.0 : 0.0;
    if (result.takes_part && selection.class_weight)
      factor = static_cast<double>(static_cast<const T*>(selection.class_weight)[c]);
    if (result.takes_part && selection.mean) factor /= static_cast<double>(in_mean[row]) * static_cast<double>(rows);
    const double value = result.takes_part ? factor * result.loss : 0.0;
    sum += value;
    static_cast<T*>(out.scale)[i] = static_cast<T>(factor);
    if (!out.reduce) store_value(out.loss, out.loss_dtype, i, value);
    if (out.bounds) out.bounds[i] = result.takes_part ? result.bound : 0.0;
    if (out.doubtful)
      out.doubtful[i] = result.takes_part && (result.gradient_deviation > gradient_tolerance ||
                                              result.loss_deviation > loss_tolerance * sqrt(static_cast<double>(in_mean[row])));
  }
  sum = block_sum<finish_threads>(sum, scratch);
  if (threadIdx.x == 0 && out.reduce) store_value(out.loss, out.loss_dtype, 0, sum);
}

// Whether a segment takes part. `bad`: a target was out of range, which makes the loss NaN whatever the segment holds.
__device__ inline bool takes_part(const Selection& selection, int64_t c, bool has_valid, bool has_foreground, bool bad) {
  if (selection.selected && !selection.selected[c]) return false;
  return bad || (has_valid && (!selection.present || has_foreground));
}

// ---- the gradient
//
// A `Weights` gives the signed weight dL/dp of the error of a pixel in a class: see StoredWeights and BinWeights. Two reads of
// the logits where the classes of a pixel fit in registers, else three, the last ones from the caches.

constexpr int gradient_threads = 256;

// What a segment's weights are multiplied with.
template <class T>
class FactorOf {
 public:
  __device__ explicit FactorOf(const Factors& f)
      : f_(f), one_(f.one ? static_cast<T>(load_value(f.grad, f.grad_dtype, 0)) : T(0)) {}
  __device__ T operator()(int64_t segment) const {
    const T grad = f_.one ? one_ : static_cast<T>(load_value(f_.grad, f_.grad_dtype, segment));
    return static_cast<const T*>(f_.scale)[segment] * grad;
  }

 private:
  const Factors& f_;
  const T one_;
};

// The gradient of softmax: p_j (g_j - sum_c p_c g_c). The g of a most probable class is the pivot: taken relative to it, the
// sum has no large term that cancels. Where all g are 0 so is the gradient: an ignored pixel may hold NaN.
template <class T>
struct SoftmaxGradient {
  T pivot = 0, others = 0, mean = 0;
  bool weighted = false;

  __device__ void add(T e, T g) {
    others += e == T(1) ? pivot : e * g;
    pivot = e == T(1) ? g : pivot;
    weighted |= g != T(0);
  }
  __device__ void end(T rest, T inverse_sum) { mean = (others - pivot * rest) * inverse_sum; }
  __device__ T operator()(T e, T g, T inverse_sum) const { return weighted ? e * inverse_sum * ((g - pivot) - mean) : T(0); }
};

// `most`: as many classes as registers are set aside for, 0 for any number of them. A thread has one pixel.
template <class In, int most, class Weights>
__global__ void __launch_bounds__(gradient_threads)
    lovasz_softmax_backward_kernel(Batch b, Factors factors, Weights weights, View out, PixelGrid grid) {
  using T = Arithmetic<In>;
  const auto [image, pixel, channel] = pixel_place(grid, b.g.images, b.g.pixels, gradient_threads);
  if (pixel < 0) return;
  const FactorOf<T> factor_of(factors);
  const int64_t classes = b.g.channels;
  const int32_t label = load_label(b, image, pixel);
  SoftmaxGradient<T> gradient;
  const auto weigh = [&](int64_t c, T e, const Softmax<T>& softmax, T inverse_sum) {
    const auto error = softmax_error(e, softmax.rest, inverse_sum, label == c);
    return weights(b, image, pixel, c, label, error.error) * factor_of(b.segment(image, c));
  };
  if constexpr (most > 0) {
    T e[most], g[most];
#pragma unroll
    for (int c = 0; c < most; ++c) e[c] = c < classes ? load_logit<In>(b, image, c, pixel) : T(0);
    Softmax<T> softmax{e[0], T(0)};
#pragma unroll
    for (int c = 1; c < most; ++c)
      if (c < classes) softmax.maximum = e[c] > softmax.maximum ? e[c] : softmax.maximum;
    T ones = T(0);
#pragma unroll
    for (int c = 0; c < most; ++c) {
      if (c >= classes) continue;
      e[c] = softmax(e[c]);
      softmax.add(e[c], ones);
    }
    softmax.end(ones);
    const T inverse_sum = softmax.inverse_sum();
#pragma unroll
    for (int c = 0; c < most; ++c) {
      if (c >= classes) continue;
      g[c] = weigh(c, e[c], softmax, inverse_sum);
      gradient.add(e[c], g[c]);
    }
    gradient.end(softmax.rest, inverse_sum);
#pragma unroll
    for (int c = 0; c < most; ++c)
      if (c < classes) store_gradient<In>(out, image, c, pixel, gradient(e[c], g[c], inverse_sum));
  } else {
    const Softmax<T> softmax = softmax_of<In>(b, image, pixel);
    const T inverse_sum = softmax.inverse_sum();
    for (int64_t c = 0; c < classes; ++c) {
      const T e = softmax(load_logit<In>(b, image, c, pixel));
      gradient.add(e, weigh(c, e, softmax, inverse_sum));
    }
    gradient.end(softmax.rest, inverse_sum);
    for (int64_t c = 0; c < classes; ++c) {
      const T e = softmax(load_logit<In>(b, image, c, pixel));
      store_gradient<In>(out, image, c, pixel, gradient(e, weigh(c, e, softmax, inverse_sum), inverse_sum));
    }
  }
}

// Of a hinge or of probabilities, where classes do not meet.
template <class In, class Weights>
__global__ void __launch_bounds__(gradient_threads)
    lovasz_direct_backward_kernel(Batch b, Factors factors, Weights weights, View out, PixelGrid grid) {
  using T = Arithmetic<In>;
  const auto [image, pixel, c] = pixel_place(grid, b.g.images, b.g.pixels, gradient_threads, b.g.channels);
  if (pixel < 0) return;
  const int32_t label = load_label(b, image, pixel);
  const bool foreground = label == b.foreground(c);
  const T x = load_logit<In>(b, image, c, pixel);
  const bool hinge = b.errors == Errors::hinge;
  const T difference = hinge ? hinge_error(x, foreground) : probability_error(x, foreground);
  T g = weights(b, image, pixel, c, label, difference < T(0) ? -difference : difference);
  if (!hinge) g = sign_outside(x, g);
  const T factor = FactorOf<T>(factors)(b.segment(image, c));  // 0 where the segment takes no part, whatever it holds
  store_gradient<In>(out, image, c, pixel, factor == T(0) ? T(0) : g * factor);
}

template <class Weights>
void launch_gradient(const Batch& b, const Factors& factors, const Weights& weights, const View& out, cudaStream_t stream) {
  const PixelGrid grid = pixel_grid(b, b.g.pixels, gradient_threads);
  with_element_type(b.x.dtype, [&](auto zero) {
    using In = decltype(zero);
    if constexpr (std::is_same_v<Arithmetic<In>, typename Weights::Value>) {
      const auto run = [&](auto kernel, int64_t count) {
        launch(kernel, count, gradient_threads, 0, stream, b, factors, weights, out, grid);
      };
      if (b.errors != Errors::softmax)
        run(lovasz_direct_backward_kernel<In, Weights>, grid.blocks * b.g.channels);
      else if (b.g.channels <= 8)
        run(lovasz_softmax_backward_kernel<In, 8, Weights>, grid.blocks);
      else if (b.g.channels <= 24 && sizeof(Arithmetic<In>) == 4)  // of doubles they spill
        run(lovasz_softmax_backward_kernel<In, 24, Weights>, grid.blocks);
      else
        run(lovasz_softmax_backward_kernel<In, 0, Weights>, grid.blocks);
    }
  });
}

}  // namespace veerloss
