// The gradient of the logits for losses that give every error a weight: the Lovász losses by either method.
//
// A `Weights<T>` is made from the arguments of a backward pass, and tells a kernel
//
//   static constexpr bool reads_label                         whether it uses the label; if not, the target is not read
//   Exp                                                       the exponential that its softmax is made of
//   T operator()(batch, image, pixel, c, label, x, softmax)   the signed weight d(loss of the segment)/dp of a pixel in class
//   c,
//                                                             of logit x; the last argument only of a softmax
//
// The weight is multiplied by the incoming gradient and the scale of the segment, and by the derivative of p.
#pragma once

#include "gradient_parts.cuh"

namespace veerloss {

// One thread for each pixel, its classes in registers, or for ManyClasses read four times, all but the first from the caches.
// (One block at the least: without it ptxas holds the last to 32 registers, and spills some.)
template <class In, class Range, class Weights>
__global__ void __launch_bounds__(Tuning::Gradient::threads, 1)
    softmax_gradient_kernel(LovaszBatch batch, Weights weights, LovaszGradient out, PixelGrid grid) {
  using T = opmath_t<In>;
  const auto [images, classes, pixels] = batch.geometry;
  const auto [image, pixel, channel] = thread_pixel<Tuning::Gradient::threads>(grid, images, pixels);
  if (pixel < 0) return;
  const SegmentFactor<T> factor(out);
  int32_t label = label_ignored;
  if constexpr (Weights::reads_label) label = load_label(batch.target, batch.rule, image, pixel);
  SoftmaxGradient<T> gradient{};
  const auto weigh = [&](int64_t c, T logit, const Softmax<T>& softmax) {
    return weights(batch, image, pixel, c, label, logit, softmax) * factor(batch.segment(image, c));
  };
  if constexpr (Range::most > 0) {
    const auto count = static_cast<int>(classes);
    T g[Range::most], exps[Range::most];
    load_classes<Range>(g, ClassPointer<In>(batch.logits, image, pixel), count);
    Softmax<T> softmax{max_of(g), T(0)};
    SumExclMax<T> sum;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      exps[c] = Weights::Exp::of(g[c], softmax.max_logit);
      sum.add(exps[c]);
    }
    softmax.sumexp_excl_max = sum.sum;
    const T inv_sumexp = softmax.inv_sumexp();
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      if (!Range::has(c, count)) continue;
      g[c] = weigh(c, g[c], softmax);
      gradient.add(exps[c], g[c]);
    }
    gradient.end(softmax.sumexp_excl_max, inv_sumexp);
    ClassPointer<In> to(out.grad_logits, image, pixel);
#pragma unroll
    for (int c = 0; c < Range::most; ++c, ++to)
      if (Range::has(c, count)) to.store(gradient(exps[c], g[c], inv_sumexp));
  } else {
    const Softmax<T> softmax = statistics_of_pixel<In, typename Weights::Exp>(batch.logits, classes, image, pixel);
    const T inv_sumexp = softmax.inv_sumexp();
    SumOfParts<T> parts;
    ClassPointer<In> at(batch.logits, image, pixel);
    for (int64_t c = 0; c < classes; ++c, ++at) {
      const T logit = at.load();
      parts.before(c, gradient.others);
      gradient.add(Weights::Exp::of(logit, softmax.max_logit), weigh(c, logit, softmax));
    }
    parts.end(classes, gradient.others);
    gradient.end(softmax.sumexp_excl_max, inv_sumexp);
    at = ClassPointer<In>(batch.logits, image, pixel);
    ClassPointer<In> to(out.grad_logits, image, pixel);
    for (int64_t c = 0; c < classes; ++c, ++at, ++to) {
      const T logit = at.load();
      to.store(gradient(Weights::Exp::of(logit, softmax.max_logit), weigh(c, logit, softmax), inv_sumexp));
    }
  }
}

// For probabilities or a hinge, whose classes are independent: one thread for each element.
template <class In, class Weights>
__global__ void __launch_bounds__(Tuning::Gradient::threads)
    elementwise_gradient_kernel(LovaszBatch batch, Weights weights, LovaszGradient out, PixelGrid grid) {
  using T = opmath_t<In>;
  const auto [images, classes, pixels] = batch.geometry;
  const auto [image, pixel, c] = thread_pixel<Tuning::Gradient::threads>(grid, images, pixels, classes);
  if (pixel < 0) return;
  int32_t label = label_ignored;
  if constexpr (Weights::reads_label) label = load_label(batch.target, batch.rule, image, pixel);
  const T x = load<In>(batch.logits, image, c, pixel);
  T g = weights(batch, image, pixel, c, label, x);
  if (batch.errors == Errors::probabilities) g = sign_outside(x, g);
  const T factor = SegmentFactor<T>(out)(batch.segment(image, c));  // 0 where the segment takes no part, whatever it holds
  store<In>(out.grad_logits, image, c, pixel, factor == T(0) ? T(0) : g * factor);
}

// Args: a struct of kernels.h with members `batch`, `out` (a LovaszGradient) and `stream`, besides what Weights<T> is made
// from.
template <template <class T> class Weights, class Args>
void launch_gradient(const Args& args) {
  using Policy = Tuning::Gradient;
  const auto [images, classes, pixels] = args.batch.geometry;
  const PixelGrid grid = pixel_grid<Policy::threads>(images, pixels);
  with_element_type(args.batch.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    using W = Weights<opmath_t<In>>;
    const auto run = [&](auto kernel, int64_t blocks) {
      launch(kernel, {.blocks = blocks, .threads = Policy::threads, .stream = args.stream}, args.batch, W(args), args.out,
             grid);
    };
    if (args.batch.errors != Errors::softmax)
      run(elementwise_gradient_kernel<In, W>, grid.blocks * classes);
    else if (!launch_gradient_in_parts<In>(args.batch, W(args), args.out, args.stream))
      with_class_range<In>(classes, [&](auto range) { run(softmax_gradient_kernel<In, decltype(range), W>, grid.blocks); });
  });
}

}  // namespace veerloss
