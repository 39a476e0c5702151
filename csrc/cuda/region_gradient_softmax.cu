// The gradient of region losses of a softmax with class indices and without squares: one thread for each pixel, its classes in
// registers. A block has two numbers of each class in shared memory, dL/dp of foreground and of background.

#include "region_gradient.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::RegionGradientSoftmax;

// The gradients of the probabilities of a row's classes; 0 of classes that are missing.
template <class Range, class T>
struct RowTerms {
  T foreground[Range::most], background[Range::most];

  // From all threads, with a barrier. Whether any is not 0: else so is the gradient, whatever the logits hold.
  __device__ bool load(const RegionBackward& args, int64_t first_segment, int classes) {
    const SegmentFactor<T> factor(args.out);
    for (int c = static_cast<int>(threadIdx.x); c < Range::most; c += Policy::threads) {
      RegionLabelTerm<T> term{};
      if (c < classes) term = RegionLabelTerm<T>(args.coefficients, first_segment + c, factor(first_segment + c));
      foreground[c] = term.foreground;
      background[c] = term.background;
    }
    __syncthreads();
    bool any = false;
    for (int c = 0; c < classes; ++c) any |= foreground[c] != T(0) || background[c] != T(0);
    return any;
  }
};

// Turns the logits of a pixel, -infinity where a class is missing, into their gradients: p_j (g_j - sum_c p_c g_c). As
// SoftmaxGradient in two steps: the g of a most probable class is the pivot, and all others are relative to it. label_logit:
// that of the label's class; of background it is of no use.
template <class Range, class T>
__device__ inline void gradients_in_place(T (&values)[Range::most], const RowTerms<Range, T>& terms, int32_t label,
                                          T label_logit, int classes) {
  const T max_logit = max_of(values);
  T g[Range::most], sum = T(0), pivot = T(0);
#pragma unroll
  for (int c = 0; c < Range::most; ++c) {
    g[c] = terms.background[c];
    pivot = values[c] == max_logit ? g[c] : pivot;
    values[c] = exp_neg(values[c] - max_logit);
    sum += values[c];
  }
  const T foreground = terms.foreground[label < classes ? label : 0];
  pivot = label < classes && label_logit == max_logit ? foreground : pivot;
  T mean = T(0);
#pragma unroll
  for (int c = 0; c < Range::most; ++c) {
    g[c] = (c == label ? foreground : g[c]) - pivot;
    mean += values[c] * g[c];
  }
  const T inv_sumexp = T(1) / sum;
  mean *= inv_sumexp;
#pragma unroll
  for (int c = 0; c < Range::most; ++c) values[c] *= inv_sumexp * (g[c] - mean);
}

// in_rows: by way of shared memory (rows.cuh).
template <class In, class Range, bool in_rows>
__global__ void __launch_bounds__(Policy::threads, Policy::min_blocks<In, Range>)
    region_gradient_softmax_kernel(RegionBackward args, Chunks chunks) {
  using T = opmath_t<In>;
  constexpr int threads = Policy::threads;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ RowTerms<Range, T> terms;
  const SegmentBatch& b = args.input.batch;
  const auto classes = static_cast<int>(b.classes());
  const auto [first_image, chunk, none] = image_part(chunks.chunks);
  const bool any = terms.load(args, b.segment(b.per_image ? first_image : 0, 0), classes);
  const SharedRows<In, threads> rows(memory, classes);
  const BlockPixels<true> pixels{chunks, first_image};
  const auto begin = static_cast<uint32_t>(chunks.begin(chunk)), end = static_cast<uint32_t>(chunks.end(chunk));
  VEERLOSS_NO_UNROLL
  for (uint32_t tile = begin; tile < end; tile += threads) {
    const uint32_t j = tile + threadIdx.x;
    const bool has_pixel = j < end;
    const uint32_t image = has_pixel ? pixels.image(j) : 0, pixel = has_pixel ? static_cast<uint32_t>(pixels.pixel(j)) : 0;
    const PixelRun run{first_image, tile, static_cast<int>(end - tile < threads ? end - tile : threads)};
    if constexpr (in_rows) {
      rows.load(b.logits, run);
      __syncthreads();
    }
    if (has_pixel) {
      const int32_t label = any ? load_integer_label(b.target, b.rule, image, pixel) : label_ignored;
      const auto classes_in = [&](const View& view) {
        if constexpr (in_rows)
          return rows.row(static_cast<int>(threadIdx.x));
        else
          return NearClasses<In>(view, image, pixel);
      };
      T values[Range::most] = {};
      if (label >= 0) {
        const auto logits = classes_in(b.logits);
        load_near<Range>(values, logits, 0, classes);
        gradients_in_place<Range>(values, terms, label, logits.load(label < classes ? label : 0), classes);  // in L1
      }
      auto to = classes_in(args.out.grad_logits);
#pragma unroll
      for (int c = 0; c < Range::most; ++c)
        if (Range::has(c, classes)) to.store(c, values[c]);
    }
    if constexpr (in_rows) {
      __syncthreads();
      rows.store(args.out.grad_logits, run);
      __syncthreads();
    }
  }
}

}  // namespace

bool launch_region_gradient_softmax(const RegionBackward& args) {
  const RegionInput& in = args.input;
  const SegmentBatch& b = in.batch;
  const View &logits = b.logits, &grad = args.out.grad_logits;
  if (b.upsample || !is_integer(b.target.dtype) || !are_near(logits) || !are_near(grad)) return false;
  bool launched = false;
  with_element_type(logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    with_class_range<In>(b.classes(), [&](auto range) {
      using Range = decltype(range);
      if constexpr (Range::most > 0) {
        constexpr int threads = Policy::threads;
        const Chunks chunks =
            chunks_of(b, threads, Policy::most_tiles, multiprocessors() * Policy::min_blocks<In, Range>, 1, false);
        const int64_t bytes = shared_rows_bytes(threads, b.classes(), sizeof(opmath_t<In>));
        const bool rows = has_rows(logits, b.geometry, chunks.flat) && has_rows(grad, b.geometry, chunks.flat);
        with_flag(rows, [&](auto in_rows) {
          launch(region_gradient_softmax_kernel<In, Range, decltype(in_rows)::value>,
                 {.blocks = chunks.images * chunks.chunks,
                  .threads = threads,
                  .stream = args.stream,
                  .shared_bytes = rows ? bytes : 0},
                 args, chunks);
        });
        launched = true;
      }
    });
  });
  return launched;
}

}  // namespace veerloss
