// Softmax focal loss of logits of low resolution (upsample.cuh), with hard labels.

#include "focal_softmax.cuh"
#include "upsample.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::Focal;

template <class In, class Range>
__global__ void __launch_bounds__(Policy::threads, low_focal_min_blocks<In, Range>)
    softmax_focal_low_forward_kernel(SoftmaxFocalInput input, LowLogits low, FocalLoss out, FocalTiles tiles,
                                     FocalPartials partials) {
  using T = opmath_t<In>;
  const auto [images, channels, pixels] = input.geometry;
  const auto classes = static_cast<int>(channels);
  double sum = 0;
  int32_t count = 0;
  for (int64_t t = blockIdx.x; t < tiles.grid.blocks; t += tiles.blocks) {
    const auto [image, pixel, none] = thread_pixel<Policy::threads>(tiles.grid, images, pixels, 1, static_cast<uint32_t>(t));
    if (pixel < 0) continue;
    const int32_t label = load_label(input.target, input.rule, image, pixel), known = label < 0 ? 0 : label;
    const auto logits = BlendedClasses<In>::at(low, image, static_cast<int32_t>(pixel));
    T values[Range::most];
    load_near<Range>(values, logits, 0, classes);
    const Softmax<T> softmax = softmax_in_place(values);
    const LabelTerm<T> term(input, softmax, softmax.inv_sumexp(), logits.load(known), known);
    sum += counted_loss(out, image, pixel, label, term.loss.value);
    count += label != label_ignored;
  }
  if (out.reduction != Reduction::none) partials.store(sum, count);
}

// A block has a tile.
template <class In, class Range>
__global__ void __launch_bounds__(LowTile::threads, Range::most > 20 ? 1 : 2)  // none of which spills
    softmax_focal_low_backward_kernel(SoftmaxFocalInput input, LowLogits low, FocalGradient out, LowTiles tiles,
                                      float* partials) {
  using T = opmath_t<In>;
  VEERLOSS_DYNAMIC_SHARED(memory);
  const FocalIncoming<T> incoming(out);
  const auto classes = static_cast<int>(input.geometry.channels);
  const auto of_image = static_cast<uint32_t>(tiles.of_image());
  const uint32_t image = blockIdx.x / of_image;
  LowTile tile(tiles, low, memory);
  tile.begin(static_cast<int>(blockIdx.x % of_image));
  T values[Range::most] = {};
  if (tile.has_pixel()) {
    const int64_t pixel = tile.pixel();
    const int32_t label = load_label(input.target, input.rule, image, pixel), known = label < 0 ? 0 : label;
    if (label != label_ignored) {  // else the gradient is 0, whatever the logits hold
      const auto logits = tile.template logits<In>(image);
      load_near<Range>(values, logits, 0, classes);
      const Softmax<T> softmax = softmax_in_place(values);
      const T inv_sumexp = softmax.inv_sumexp();
      const LabelTerm<T> term(input, softmax, inv_sumexp, logits.load(known), known);
      const T g = incoming(out, image, pixel, label) * term.loss.slope, others = -g * inv_sumexp, own = g * term.q;
#pragma unroll
      for (int c = 0; c < Range::most; ++c) {
        const T other = others * values[c];
        values[c] = c == label ? own : other;
      }
    }
  }
  tile.reduce(values, classes, partials + static_cast<int64_t>(blockIdx.x) * classes * tiles.lows());
}

// Calls f with the element type and the range of classes.
template <class F>
void with_kernel(const SoftmaxFocalInput& input, const F& f) {
  if (is_soft(input) || !is_low(input.logits, *input.upsample))
    throw std::runtime_error("veerloss: on a GPU upsample is for images, class indices without smoothing and larger sizes");
  with_element_type(input.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    with_class_range<In>(input.geometry.channels, [&](auto range) {
      if constexpr (range.most > 0 && !std::is_same_v<In, double>)
        f(zero, range);
      else
        throw std::runtime_error("veerloss: on a GPU upsample is for 32 classes at most, not of float64");
    });
  });
}

}  // namespace

void launch_low_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const FocalTiles& tiles,
                        const FocalPartials& partials, Stream stream) {
  with_kernel(input, [&](auto zero, auto range) {
    launch(softmax_focal_low_forward_kernel<decltype(zero), decltype(range)>,
           {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream}, input,
           LowLogits::of(input.logits, *input.upsample, zero), out, tiles, partials);
  });
}

void launch_low_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream) {
  with_kernel(input, [&](auto zero, auto range) {
    const LowLogits low = LowLogits::of(input.logits, *input.upsample, zero);
    const LowTiles tiles(low);
    auto* const partials = static_cast<float*>(out.scratch);
    launch(softmax_focal_low_backward_kernel<decltype(zero), decltype(range)>,
           {.blocks = input.geometry.images * tiles.of_image(),
            .threads = LowTile::threads,
            .stream = stream,
            .shared_bytes = LowTile::shared_bytes(tiles)},
           input, low, out, tiles, partials);
    add_up_tiles(input.geometry, *input.upsample, out.grad_logits, tiles, partials, stream);
  });
}

}  // namespace veerloss
