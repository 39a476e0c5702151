// Softmax focal loss in CUDA C++: one thread for each pixel. Forward reads the logits and the target once, backward reads them
// again and writes the gradient; nothing is kept between the two, and nothing waits for the host. A target out of range makes
// the loss NaN.

#include "focal_softmax.cuh"
#include "rows.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::Focal;

// What a kernel is compiled for, besides types: targets that are one class, logits in rows that go through shared memory, or
// soft targets.
enum class Variant { labels, labels_in_rows, soft };

// Calls f(image, pixel, logits, gradient) for the pixels of a thread; the last two point to the classes of the pixel.
// `grad_logits`: null in a forward pass.
template <class In, Variant variant, class F>
__device__ inline void for_each_pixel(const FocalTiles& tiles, const SoftmaxFocalInput& input, const View* grad_logits,
                                      const F& f) {
  constexpr int threads = Policy::threads;
  const auto [images, channels, pixels] = input.geometry;
  for (int64_t t = blockIdx.x; t < tiles.grid.blocks; t += tiles.blocks) {
    const auto tile = static_cast<uint32_t>(t);
    const auto at = thread_pixel<threads>(tiles.grid, images, pixels, 1, tile);
    if constexpr (variant == Variant::labels_in_rows) {
      VEERLOSS_DYNAMIC_SHARED(memory);
      const SharedRows<In, threads> rows(memory, static_cast<int>(channels));
      const PixelRun run = pixel_run<threads>(tiles.grid, images, pixels, tile);
      rows.load(input.logits, run);
      __syncthreads();
      const auto row = rows.row(static_cast<int>(threadIdx.x));
      if (at.pixel >= 0) f(at.image, at.pixel, row, row);
      __syncthreads();
      if (!grad_logits) continue;
      rows.store(*grad_logits, run);
      __syncthreads();
    } else if (at.pixel >= 0) {
      f(at.image, at.pixel, ClassPointer<In>(input.logits, at.image, at.pixel),
        ClassPointer<In>(grad_logits ? *grad_logits : input.logits, at.image, at.pixel));
    }
  }
}

// ---- forward

template <class In, class Range, Variant variant, class Pointer>
__device__ inline opmath_t<In> loss_of_pixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel, int32_t label,
                                             const Pointer& logits) {
  using T = opmath_t<In>;
  const auto classes = static_cast<int>(input.geometry.channels);
  if constexpr (variant == Variant::soft) {
    double loss = 0;  // the label's term is far larger than the others
    SoftPixel<In>(input, logits, image, pixel, label).for_each_class([&](int, const SoftTerm<T>& term) {
      loss += static_cast<double>(term.loss.value);
    });
    return static_cast<T>(loss);
  } else {
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

template <class In, class Range, Variant variant>
__global__ void __launch_bounds__(Policy::threads, focal_min_blocks<In, Range>)
    softmax_focal_forward_kernel(SoftmaxFocalInput input, FocalLoss out, FocalTiles tiles, FocalPartials partials) {
  using T = opmath_t<In>;
  double sum = 0;
  int32_t count = 0;
  for_each_pixel<In, variant>(tiles, input, nullptr, [&](int64_t image, int64_t pixel, const auto& logits, const auto&) {
    const int32_t label = label_of_pixel(input, image, pixel);
    sum += counted_loss(out, image, pixel, label, loss_of_pixel<In, Range, variant>(input, image, pixel, label, logits));
    count += label != label_ignored;
  });
  if (out.reduction != Reduction::none) partials.store(sum, count);
}

// ---- backward

// `to` points to the gradient; it may be where the logits are.
template <class In, class Range, Variant variant, class Pointer>
__device__ inline void gradient_of_pixel(const SoftmaxFocalInput& input, int64_t image, int64_t pixel, int32_t label,
                                         opmath_t<In> grad, Pointer logits, Pointer to) {
  using T = opmath_t<In>;
  const auto classes = static_cast<int>(input.geometry.channels);
  const bool counts = label != label_ignored;  // else the gradient is 0, whatever the logits hold
  if constexpr (variant == Variant::soft) {
    const SoftPixel<In> target(input, logits, image, pixel, label);
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
    const int32_t known = label < 0 ? 0 : label;
    const T logit = label_logit(logits, known);
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
      store_gradient<Range>(to, values, classes, label, counts, others, own);
    } else {
      const Softmax<T> softmax = softmax_of_many(logits, classes);
      const auto [others, own] = factors(softmax);
      constexpr int most = SomeClasses<In>::most;
      for (int first = 0; first < classes; first += most, logits.skip(most)) {
        T values[most];
        load_classes<SomeClasses<In>>(values, logits, classes - first);
        exponentials_in_place(values, softmax.max_logit);
        store_gradient<SomeClasses<In>>(to, values, classes - first, label - first, counts, others, own);
      }
    }
  }
}

template <class In, class Range, Variant variant>
__global__ void __launch_bounds__(Policy::threads, focal_min_blocks<In, Range>)
    softmax_focal_backward_kernel(SoftmaxFocalInput input, FocalGradient out, FocalTiles tiles) {
  using T = opmath_t<In>;
  const FocalIncoming<T> incoming(out);
  for_each_pixel<In, variant>(tiles, input, &out.grad_logits,
                              [&](int64_t image, int64_t pixel, const auto& logits, const auto& to) {
                                const int32_t label = label_of_pixel(input, image, pixel);
                                const T g = incoming(out, image, pixel, label);
                                gradient_of_pixel<In, Range, variant>(input, image, pixel, label, g, logits, to);
                              });
}

// ---- launches

// Calls f with the element type, the range of classes, the variant, and the shared memory that it takes. `rows`: logits, and
// gradient if there is one, have their classes in rows.
template <class F>
void with_kernel(const SoftmaxFocalInput& input, bool rows, const F& f) {
  with_element_type(input.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const auto call = [&](auto range, auto variant, int64_t shared_bytes) { f(zero, range, variant, shared_bytes); };
    using Labels = std::integral_constant<Variant, Variant::labels>;
    using LabelsInRows = std::integral_constant<Variant, Variant::labels_in_rows>;
    if (is_soft(input)) return call(ManyClasses{}, std::integral_constant<Variant, Variant::soft>{}, 0);
    with_class_range<In>(input.geometry.channels, [&](auto range) {
      if constexpr (range.most > 0 && !std::is_same_v<In, double>)
        if (rows)
          return call(range, LabelsInRows{}, shared_rows_bytes(Policy::threads, input.geometry.channels, sizeof(opmath_t<In>)));
      call(range, Labels{}, 0);
    });
  });
}

}  // namespace

namespace kernels {

int64_t softmax_focal_scratch_bytes(const SoftmaxFocalInput& input) {
  // Smaller tiles are more.
  return FocalPartials(nullptr, focal_tiles<Tuning::ClassParts::pixels>(input.geometry).blocks).bytes;
}

void softmax_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, Stream stream) {
  FocalTiles tiles = focal_tiles<Tuning::ClassParts::pixels>(input.geometry);
  FocalPartials partials(out.scratch, tiles.blocks);
  if (input.upsample) {
    tiles = focal_tiles<Policy::threads>(input.geometry);
    partials = FocalPartials(out.scratch, tiles.blocks);
    launch_low_forward(input, out, tiles, partials, stream);
  } else if (!launch_shared_forward(input, out, tiles, partials, stream)) {
    tiles = focal_tiles<Policy::threads>(input.geometry);
    partials = FocalPartials(out.scratch, tiles.blocks);
    const bool rows = has_rows(input.logits, input.geometry, tiles.grid);
    with_kernel(input, rows, [&](auto zero, auto range, auto variant, int64_t shared_bytes) {
      launch(softmax_focal_forward_kernel<decltype(zero), decltype(range), decltype(variant)::value>,
             {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream, .shared_bytes = shared_bytes}, input, out,
             tiles, partials);
    });
  }
  finish_focal_loss(out, tiles.blocks, stream);
}

void softmax_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream) {
  if (input.upsample) return launch_low_backward(input, out, stream);
  if (launch_shared_backward(input, out, stream)) return;
  const FocalTiles tiles = focal_tiles<Policy::threads>(input.geometry);
  const bool rows = has_rows(input.logits, input.geometry, tiles.grid) && has_rows(out.grad_logits, input.geometry, tiles.grid);
  with_kernel(input, rows, [&](auto zero, auto range, auto variant, int64_t shared_bytes) {
    launch(softmax_focal_backward_kernel<decltype(zero), decltype(range), decltype(variant)::value>,
           {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream, .shared_bytes = shared_bytes}, input, out,
           tiles);
  });
}

}  // namespace kernels
}  // namespace veerloss
