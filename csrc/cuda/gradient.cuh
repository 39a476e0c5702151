// The gradient of the logits for losses that give every error a weight: the Lovász losses by either method.
//
// A `Weights<T>` is made from the arguments of a backward pass. Its weights are signed, d(loss of the segment)/dp of a pixel,
// or d(loss)/dx of a probability or a hinge:
//
//   static constexpr bool reads_label   whether it uses labels; if not, the target is not read
//   Exp                                 the exponential that its softmax is made of
//   Type                                T
//   Term, term(segment, factor)         what it needs of a segment, from what its weights are multiplied by: FactorTerm
//   of_pixel(batch, image, pixel, first, label, softmax)(k, logit, term)  of class first + k of a pixel, times the factor
//   of_segment<errors>(batch, segment, c)(index, is_foreground, x)  of a pixel, by its index in the batch, in a class; the
//                                       factor is yet to come
//   focal                               FocalSlopes of a compound loss (terms.cuh), if it has any
//   static constexpr bool at_full_size  true of weights that are stored for each pixel: never of logits of low resolution
//
// The weight is multiplied by the derivative of p.
#pragma once

#include "gradient_parts.cuh"
#include "upsample.cuh"

namespace veerloss {

// The gradient of each class of a pixel, g, from its logits in registers, -infinity where a class is missing. `logits`: the
// same, of any class; terms: of the classes.
template <class Range, class Weights, class Pointer, class T>
__device__ inline void gradients_in_place(T (&g)[Range::most], const Weights& weights, const typename Weights::Term* terms,
                                          const SegmentBatch& batch, int64_t image, int64_t pixel, int32_t label,
                                          const Pointer& logits) {
  const auto classes = static_cast<int>(batch.classes());
  T exps[Range::most];
  Softmax<T> softmax{max_of(g), T(0)};
  SumExclMax<T> sum;
#pragma unroll
  for (int c = 0; c < Range::most; ++c) {
    exps[c] = Weights::Exp::of(g[c], softmax.max_logit);
    sum.add(exps[c]);
  }
  softmax.sumexp_excl_max = sum.sum;
  const T inv_sumexp = softmax.inv_sumexp();
  const auto weigh = weights.of_pixel(batch, image, pixel, 0, label, softmax);
  SoftmaxGradient<T> gradient{};
#pragma unroll
  for (int c = 0; c < Range::most; ++c) {
    if (!Range::has(c, classes)) continue;
    g[c] = weigh(c, g[c], terms[c]);
    gradient.add(exps[c], g[c]);
  }
  gradient.end(softmax.sumexp_excl_max, inv_sumexp);
  if constexpr (has_focal<Weights>) {
    const FocalSlope<T> focal = weights.focal(softmax, inv_sumexp, logits, label);
#pragma unroll
    for (int c = 0; c < Range::most; ++c) g[c] = gradient(exps[c], g[c], inv_sumexp, focal, c == label);
  } else {
#pragma unroll
    for (int c = 0; c < Range::most; ++c) g[c] = gradient(exps[c], g[c], inv_sumexp);
  }
}

// One thread for each pixel, its classes in registers, or for ManyClasses read four times, all but the first from the caches.
// (One block at the least: without it ptxas holds the last to 32 registers, and spills some.)
template <class In, class Range, class Weights>
__global__ void __launch_bounds__(Tuning::Gradient::threads, 1)
    softmax_gradient_kernel(SegmentBatch batch, Weights weights, SegmentGradient out, PixelGrid grid) {
  using T = opmath_t<In>;
  const auto [images, classes, pixels] = batch.geometry;
  const auto [image, pixel, channel] = thread_pixel<Tuning::Gradient::threads>(grid, images, pixels);
  __shared__ typename Weights::Term terms[Range::most > 0 ? Range::most : 1];
  if constexpr (Range::most > 0) {
    load_terms<Tuning::Gradient::threads>(terms, weights, out, batch.segment(image, 0), static_cast<int>(classes));
    __syncthreads();
  }
  if (pixel < 0) return;
  int32_t label = label_ignored;
  if constexpr (Weights::reads_label) label = load_label(batch.target, batch.rule, image, pixel);
  if constexpr (Range::most > 0) {
    const auto count = static_cast<int>(classes);
    const ClassPointer<In> logits(batch.logits, image, pixel);
    T g[Range::most];
    load_classes<Range>(g, logits, count);
    gradients_in_place<Range>(g, weights, terms, batch, image, pixel, label, logits);
    ClassPointer<In> to(out.grad_logits, image, pixel);
#pragma unroll
    for (int c = 0; c < Range::most; ++c, ++to)
      if (Range::has(c, count)) to.store(g[c]);
  } else {
    SoftmaxGradient<T> gradient{};
    const auto focal_of = [&](const Softmax<T>& softmax, T inv_sumexp) {
      if constexpr (has_focal<Weights>)
        return weights.focal(softmax, inv_sumexp, ClassPointer<In>(batch.logits, image, pixel), label);
      else
        return nullptr;
    };
    const auto gradient_of = [&](int c, T exp, T g, T inv_sumexp, const auto& focal) {
      if constexpr (has_focal<Weights>)
        return gradient(exp, g, inv_sumexp, focal, c == label);
      else
        return gradient(exp, g, inv_sumexp);
    };
    const Softmax<T> softmax = statistics_of_pixel<In, typename Weights::Exp>(batch.logits, classes, image, pixel);
    const T inv_sumexp = softmax.inv_sumexp();
    const auto weight = weights.of_pixel(batch, image, pixel, 0, label, softmax);
    const SegmentFactor<T> factor(out);
    const auto weigh = [&](int c, T logit) {
      const int64_t segment = batch.segment(image, c);
      return weight(c, logit, weights.term(segment, factor(segment)));
    };
    SumOfParts<T> parts;
    ClassPointer<In> at(batch.logits, image, pixel);
    for (int c = 0; c < classes; ++c, ++at) {
      const T logit = at.load();
      parts.before(c, gradient.others);
      gradient.add(Weights::Exp::of(logit, softmax.max_logit), weigh(c, logit));
    }
    parts.end(classes, gradient.others);
    gradient.end(softmax.sumexp_excl_max, inv_sumexp);
    at = ClassPointer<In>(batch.logits, image, pixel);
    ClassPointer<In> to(out.grad_logits, image, pixel);
    const auto focal = focal_of(softmax, inv_sumexp);
    for (int c = 0; c < classes; ++c, ++at, ++to) {
      const T logit = at.load();
      to.store(gradient_of(c, Weights::Exp::of(logit, softmax.max_logit), weigh(c, logit), inv_sumexp, focal));
    }
  }
}

// For probabilities or a hinge, whose classes are independent: a block has pixels of one.
template <class In, Errors errors, bool plain, class Weights>
__global__ void __launch_bounds__(Tuning::Gradient::threads)
    elementwise_gradient_kernel(SegmentBatch batch, Weights weights, SegmentGradient out, Chunks chunks) {
  using T = opmath_t<In>;
  const auto [first_image, part, c] = image_part(chunks.chunks, batch.classes());
  const int64_t segment = batch.segment(batch.per_image ? first_image : 0, c);
  const T factor = SegmentFactor<T>(out)(segment);
  const auto weigh = weights.template of_segment<errors>(batch, segment, c);
  const ClassPixels<In, plain> pixels(batch, chunks, first_image, c);
  const int32_t foreground = errors == Errors::hinge ? 1 : static_cast<int32_t>(c);
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  for (uint32_t j = begin + threadIdx.x; j < end; j += Tuning::Gradient::threads) {
    const auto at = pixels.at(j);
    int32_t label = label_ignored;
    if constexpr (Weights::reads_label) label = pixels.label(at);
    const T x = pixels.load(at);
    T g = Weights::reads_label && label < 0 ? T(0) : weigh(pixels.index(at), label == foreground, x);
    if (errors == Errors::probabilities) g = sign_outside(x, g);
    g = factor == T(0) ? T(0) : g * factor;  // of a segment that takes no part, whatever it holds
    pixels.store(out.grad_logits, at, g);
  }
}

// Logits of low resolution: a block has a tile of pixels, and leaves what it adds to those of low resolution.
template <class In, class Range, class Weights>
__global__ void __launch_bounds__(LowTile::threads, LowPolicy::min_blocks<Range>)
    low_gradient_kernel(SegmentBatch batch, LowLogits low, Weights weights, SegmentGradient out, LowTiles tiles) {
  using T = opmath_t<In>;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ typename Weights::Term terms[Range::most];
  const auto classes = static_cast<int>(batch.classes());
  const auto of_image = static_cast<uint32_t>(tiles.of_image());
  const uint32_t image = blockIdx.x / of_image;
  load_terms<LowTile::threads>(terms, weights, out, batch.segment(image, 0), classes);
  __syncthreads();
  LowTile tile(tiles, low, memory);
  tile.begin(static_cast<int>(blockIdx.x % of_image));
  T g[Range::most] = {};
  if (tile.has_pixel()) {
    const int64_t pixel = tile.pixel();
    int32_t label = label_ignored;
    if constexpr (Weights::reads_label) label = load_label(batch.target, batch.rule, image, pixel);
    if (!Weights::reads_label || label >= 0) {
      const auto logits = tile.template logits<In>(image);
      load_near<Range>(g, logits, 0, classes);
      gradients_in_place<Range>(g, weights, terms, batch, image, pixel, label, logits);
    }
  }
  tile.reduce(g, classes, static_cast<float*>(out.scratch) + static_cast<int64_t>(blockIdx.x) * classes * tiles.lows());
}

template <class In, class Weights>
void launch_low_gradient(const SegmentBatch& batch, const Weights& weights, const SegmentGradient& out, Stream stream) {
  with_low_range<In>(batch, [&](auto range) {
    const LowLogits low = LowLogits::of(batch.logits, *batch.upsample, In{});
    const LowTiles tiles(low);
    launch(low_gradient_kernel<In, decltype(range), Weights>,
           {.blocks = batch.geometry.images * tiles.of_image(),
            .threads = LowTile::threads,
            .stream = stream,
            .shared_bytes = LowTile::shared_bytes(tiles)},
           batch, low, weights, out, tiles);
    add_up_tiles(batch.geometry, *batch.upsample, out.grad_logits, tiles, static_cast<const float*>(out.scratch), stream);
  });
}

// Of a softmax of any number of classes, class by class.
template <class In, class Weights>
void launch_gradient_of_many(const SegmentBatch& batch, const Weights& weights, const SegmentGradient& out, Stream stream) {
  constexpr int threads = Tuning::Gradient::threads;
  const PixelGrid grid = pixel_grid<threads>(batch.geometry.images, batch.geometry.pixels);
  launch(softmax_gradient_kernel<In, ManyClasses, Weights>, {.blocks = grid.blocks, .threads = threads, .stream = stream},
         batch, weights, out, grid);
}

template <class In, class Weights>
void launch_softmax_gradient(const SegmentBatch& batch, const Weights& weights, const SegmentGradient& out, Stream stream) {
  constexpr int threads = Tuning::Gradient::threads;
  const auto [images, classes, pixels] = batch.geometry;
  if constexpr (!is_at_full_size<Weights>)
    if (batch.upsample) return launch_low_gradient<In>(batch, weights, out, stream);
  if (launch_gradient_in_parts<In>(batch, weights, out, stream)) return;
  with_class_range<In>(classes, [&](auto range) {
    if constexpr (decltype(range)::most == 0) return launch_gradient_of_many<In>(batch, weights, out, stream);
    const PixelGrid grid = pixel_grid<threads>(images, pixels, !batch.per_image);  // a block has the terms of one row
    launch(softmax_gradient_kernel<In, decltype(range), Weights>, {.blocks = grid.blocks, .threads = threads, .stream = stream},
           batch, weights, out, grid);
  });
}

// Args: a struct of kernels.h with members `batch`, `out` (a SegmentGradient) and `stream`, besides what Weights<T> is made
// from.
template <template <class T> class Weights, class Args>
void launch_gradient(const Args& args) {
  using Policy = Tuning::Gradient;
  const SegmentBatch& batch = args.batch;
  with_element_type(batch.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    using W = Weights<opmath_t<In>>;
    if (batch.errors == Errors::softmax) return launch_softmax_gradient<In>(batch, W(args), args.out, args.stream);
    if (batch.upsample) throw std::runtime_error("veerloss: on a GPU upsample is for a softmax");
    const Chunks chunks = class_chunks(batch, Policy::threads, Policy::most_tiles);
    const bool plain = is_plain(batch, chunks) && are_near(args.out.grad_logits);
    const Launch shape{
        .blocks = chunks.images * chunks.chunks * batch.classes(), .threads = Policy::threads, .stream = args.stream};
    with_elementwise(batch, plain, [&](auto errors, auto is_plain) {
      launch(elementwise_gradient_kernel<In, decltype(errors)::value, decltype(is_plain)::value, W>, shape, batch, W(args),
             args.out, chunks);
    });
  });
}

// The same with the terms of a compound loss: of a softmax. Few classes have no kernel of their own, to compile less: large
// batches of them go by shared memory (lovasz/histogram_gradient.cu).
template <template <class T> class Weights, class Args>
void launch_gradient_with_terms(const Args& args) {
  const SegmentBatch& batch = args.batch;
  check_terms(batch, args.terms.focal);
  with_element_type(batch.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const Weights<opmath_t<In>> weights(args);
    if constexpr (!is_at_full_size<Weights<opmath_t<In>>>)
      if (batch.upsample) return launch_low_gradient<In>(batch, weights, args.out, args.stream);
    if (!launch_gradient_in_parts<In>(batch, weights, args.out, args.stream))
      launch_gradient_of_many<In>(batch, weights, args.out, args.stream);
  });
}

}  // namespace veerloss
