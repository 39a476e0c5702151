// The gradient of a softmax from the gradients of its probabilities; and the kernel that has pixels of many classes in parts
// (class_parts.cuh), where a thread has them all in gradient.cuh.
#pragma once

#include "class_parts.cuh"
#include "lovasz/coordinates.cuh"
#include "terms.cuh"

namespace veerloss {

// What a segment's weights are multiplied by: the incoming gradient and the scale of the segment.
template <class T>
class SegmentFactor {
 public:
  __device__ explicit SegmentFactor(const SegmentGradient& out)
      : out_(out), per_segment_(out.reduction == Reduction::none), grad_(per_segment_ ? T(0) : load_grad(0)) {}
  __device__ T operator()(int64_t segment) const {
    const T grad = per_segment_ ? load_grad(segment) : grad_;
    return static_cast<const T*>(out_.scale)[segment] * grad;
  }

 private:
  __device__ T load_grad(int64_t i) const { return static_cast<T>(load_element(out_.grad, out_.grad_dtype, i)); }

  const SegmentGradient& out_;
  const bool per_segment_;
  const T grad_;
};

// For a Weights (gradient.cuh) that needs no more of a segment.
template <class T>
struct FactorTerm {
  using Type = T;
  using Term = T;
  __device__ static T term(int64_t, T factor) { return factor; }
};

// The terms of the classes of a row, for all pixels of a block. A barrier has to stand before they are used.
template <int threads, class Weights>
__device__ inline void load_terms(typename Weights::Term* terms, const Weights& weights, const SegmentGradient& out,
                                  int64_t first_segment, int classes) {
  const SegmentFactor<typename Weights::Type> factor(out);
  VEERLOSS_NO_UNROLL
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += threads)
    terms[c] = weights.term(first_segment + c, factor(first_segment + c));
}

// The gradient of softmax from the gradients g of the probabilities: p_j (g_j - sum_c p_c g_c). The g of a most probable class
// is the pivot: relative to it, the sum has no large term that cancels. Where all g are 0 so is the gradient: an ignored pixel
// may hold NaN.
template <class T>
struct SoftmaxGradient {
  T pivot, others, mean;  // {} is that of no class
  bool any_weight;

  __device__ void add(T exp, T g) {
    others += exp == T(1) ? pivot : exp * g;
    pivot = exp == T(1) ? g : pivot;
    any_weight |= g != T(0);
  }
  // What another part of the classes came to.
  __device__ void add(const SoftmaxGradient& part, bool has_top) {
    others += has_top ? part.others + pivot : part.others;
    pivot = has_top ? part.pivot : pivot;
    any_weight |= part.any_weight;
  }
  __device__ void end(T sumexp_excl_max, T inv_sumexp) { mean = (others - pivot * sumexp_excl_max) * inv_sumexp; }
  __device__ T operator()(T exp, T g, T inv_sumexp) const {
    return any_weight ? exp * inv_sumexp * ((g - pivot) - mean) : T(0);
  }
  // With a focal term: s joins the mean but for the label, where s - p s would cancel.
  __device__ T operator()(T exp, T g, T inv_sumexp, const FocalSlope<T>& focal, bool is_label) const {
    const T value = exp * inv_sumexp * ((g - pivot) - (is_label ? mean : mean + focal.others));
    return any_weight || focal.others != T(0) ? is_label ? value + focal.own : value : T(0);
  }
};

// Whether the pixels of a Weights have a focal term.
template <class Weights>
constexpr bool has_focal = requires(const Weights& weights) { weights.focal; };

// What the warps of a block tell each other.
template <class T, class Term>
struct GradientExchange {
  PartSoftmaxes<T> parts;
  SoftmaxGradient<T> part_gradient[PartsPolicy::threads];
  bool has_top[PartsPolicy::threads];
  // Of each pixel.
  Softmax<T> softmax[PartsPolicy::pixels];
  SoftmaxGradient<T> gradient[PartsPolicy::pixels];
  int32_t label[PartsPolicy::pixels];
  Term terms[PartsPolicy::max_classes];
};

// `in_rows`: logits and their gradient have the classes of a pixel next to each other (rows.cuh).
template <class In, class Range, class Weights, bool in_rows>
__global__ void __launch_bounds__(PartsPolicy::threads, 2)
    softmax_gradient_parts_kernel(SegmentBatch batch, Weights weights, SegmentGradient out, PixelGrid grid) {
  using T = opmath_t<In>;
  constexpr int pixels_of_block = PartsPolicy::pixels;
  __shared__ GradientExchange<T, typename Weights::Term> exchange;
  __shared__ FocalSlope<T> focal[has_focal<Weights> ? pixels_of_block : 1];
  VEERLOSS_DYNAMIC_SHARED(memory);
  const auto [images, classes, pixels] = batch.geometry;
  const int lane = static_cast<int>(threadIdx.x) % pixels_of_block, warp = static_cast<int>(threadIdx.x) / pixels_of_block;
  const ClassPart part(warp, static_cast<int>(classes));
  const auto at = thread_pixel<pixels_of_block>(grid, images, pixels, 1, blockIdx.x, static_cast<uint32_t>(lane));
  const int64_t pixel = at.pixel < 0 ? 0 : at.pixel;  // a thread without one has another's, and stores nothing
  const SharedRows<In, PartsPolicy::threads> rows(memory, static_cast<int>(classes));
  load_terms<PartsPolicy::threads>(exchange.terms, weights, out, batch.segment(at.image, 0), static_cast<int>(classes));
  const PixelRun run = pixel_run<pixels_of_block>(grid, images, pixels, blockIdx.x);
  if constexpr (in_rows) {
    rows.load(batch.logits, run);
    __syncthreads();
  }
  const auto classes_in = [&](const View& view) {
    auto pointer = [&] {
      if constexpr (in_rows)
        return rows.row(at.pixel < 0 ? 0 : lane);
      else
        return ClassPointer<In>(view, at.image, pixel);
    }();
    pointer.skip(part.first);
    return pointer;
  };

  T logits[Range::most], g[Range::most];
  load_classes<Range>(logits, classes_in(batch.logits), part.count);
  put_softmax_of_part<typename Weights::Exp>(exchange.parts, logits);
  __syncthreads();
  if (warp == 0) {
    exchange.softmax[lane] = exchange.parts.whole(lane, ExpOf<typename Weights::Exp>{});
    if constexpr (Weights::reads_label)
      exchange.label[lane] = load_label(batch.target, batch.rule, at.image, pixel);
    else
      exchange.label[lane] = label_ignored;
    if constexpr (has_focal<Weights>)
      focal[lane] = weights.focal(exchange.softmax[lane], exchange.softmax[lane].inv_sumexp(), classes_in(batch.logits),
                                  exchange.label[lane]);
  }
  __syncthreads();

  const Softmax<T> softmax = exchange.softmax[lane];
  const int32_t label = exchange.label[lane];
  const T inv_sumexp = softmax.inv_sumexp();
  const auto weigh = weights.of_pixel(batch, at.image, pixel, part.first, label, softmax);
  const auto* const terms = exchange.terms + part.first;
  SoftmaxGradient<T> gradient{};
  bool has_top = false;
#pragma unroll
  for (int k = 0; k < Range::most; ++k) {
    if (!Range::has(k, part.count)) continue;
    g[k] = weigh(k, logits[k], terms[k]);
    logits[k] = Weights::Exp::of(logits[k], softmax.max_logit);
    has_top |= logits[k] == T(1);
    gradient.add(logits[k], g[k]);
  }
  exchange.part_gradient[threadIdx.x] = gradient;
  exchange.has_top[threadIdx.x] = has_top;
  __syncthreads();
  if (warp == 0) {
    SoftmaxGradient<T> whole{};
    for (int i = lane; i < PartsPolicy::threads; i += pixels_of_block)
      whole.add(exchange.part_gradient[i], exchange.has_top[i]);
    whole.end(softmax.sumexp_excl_max, inv_sumexp);
    exchange.gradient[lane] = whole;
  }
  __syncthreads();
  gradient = exchange.gradient[lane];
  if (at.pixel >= 0) {
    auto to = classes_in(out.grad_logits);
#pragma unroll
    for (int k = 0; k < Range::most; ++k, ++to) {
      if (!Range::has(k, part.count)) continue;
      if constexpr (has_focal<Weights>)
        to.store(gradient(logits[k], g[k], inv_sumexp, focal[lane], k == label - part.first));
      else
        to.store(gradient(logits[k], g[k], inv_sumexp));
    }
  }
  if constexpr (in_rows) {
    __syncthreads();
    rows.store(out.grad_logits, run);
  }
}

// Whether it was launched.
template <class In, class Weights>
bool launch_gradient_in_parts(const SegmentBatch& batch, const Weights& weights, const SegmentGradient& out, Stream stream) {
  const auto [images, classes, pixels] = batch.geometry;
  if (!are_in_parts(classes, batch.logits.dtype)) return false;
  if constexpr (!std::is_same_v<In, double>) {
    const PixelGrid grid = pixel_grid<PartsPolicy::pixels>(images, pixels, !batch.per_image);  // a block has one row's terms
    const bool rows = has_rows(batch.logits, batch.geometry, grid) && has_rows(out.grad_logits, batch.geometry, grid);
    with_part_range(classes, [&](auto range) {
      with_flag(rows, [&](auto in_rows) {
        launch(softmax_gradient_parts_kernel<In, decltype(range), Weights, decltype(in_rows)::value>,
               {.blocks = grid.blocks,
                .threads = PartsPolicy::threads,
                .stream = stream,
                .shared_bytes = rows ? shared_rows_bytes(PartsPolicy::pixels, classes, sizeof(opmath_t<In>)) : 0},
               batch, weights, out, grid);
      });
    });
  }
  return true;
}

}  // namespace veerloss
