// Sigmoid focal loss of logits of low resolution (upsample.cuh). Threads have pixels, and go over classes.

#include "focal_sigmoid.cuh"
#include "upsample.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::Focal;

// Classes whose losses are summed in their type, and whose gradients a tile reduces at once.
constexpr int classes_at_once = 4 * LowPolicy::quads;

// The elements of a pixel.
template <class In, bool has_labels, bool square, Pass pass>
class SigmoidPixel {
  using T = opmath_t<In>;

 public:
  // grad: that of the sum of the losses.
  __device__ SigmoidPixel(const SigmoidFocalInput& input, T grad)
      : input_(input),
        gamma_(static_cast<T>(input.gamma)),
        grad_(grad),
        factors_(input, grad),
        ignored_(input.rule),
        target_size_(size_of(input.target.dtype)) {}

  __device__ void begin(int64_t image, int64_t pixel) {
    if constexpr (has_labels)
      label_ = load_label(input_.target, input_.rule, image, pixel);
    else
      target_ = input_.target.data + ptr_offset(input_.target, image, 0, pixel) * target_size_;
  }

  // The loss of an element, or the gradient of its logit; `count` is one more if the element counts.
  __device__ T operator()(int c, T logit, int32_t& count) const {
    const auto factors = factors_.of_class(input_, grad_, c);
    if constexpr (has_labels) {
      count += label_ != label_ignored;
      const T result = result_of_label<In, pass, square>(logit, label_ == c, factors, gamma_);
      return label_ >= 0 ? result : without_class<T>(label_);
    } else {
      T target[1];
      bool counts[1];
      load_targets(target, counts, target_ + c * input_.target.stride_channel * target_size_, input_.target.dtype, ignored_);
      count += counts[0];
      return counts[0] ? result_of_target<In, pass, square>(logit, target[0], factors, gamma_) : T(0);
    }
  }

 private:
  const SigmoidFocalInput& input_;
  const T gamma_, grad_;
  const SigmoidFactors<T> factors_;
  const IgnoredValue ignored_;
  const int64_t target_size_;
  const char* target_ = nullptr;
  int32_t label_ = 0;
};

template <class In, bool has_labels, bool square>
__global__ void __launch_bounds__(Policy::threads, 4)
    sigmoid_focal_low_forward_kernel(SigmoidFocalInput input, LowLogits low, FocalTiles tiles, FocalPartials partials) {
  using T = opmath_t<In>;
  SigmoidPixel<In, has_labels, square, Pass::forward> element(input, T(1));
  const auto [images, channels, pixels] = input.geometry;
  const auto classes = static_cast<int>(channels);
  double sum = 0;
  int32_t count = 0;
  for (int64_t t = blockIdx.x; t < tiles.grid.blocks; t += tiles.blocks) {
    const auto [image, pixel, none] = thread_pixel<Policy::threads>(tiles.grid, images, pixels, 1, static_cast<uint32_t>(t));
    if (pixel < 0) continue;
    element.begin(image, pixel);
    const auto logits = BlendedClasses<In>::at(low, image, static_cast<int32_t>(pixel));
    VEERLOSS_NO_UNROLL
    for (int first = 0; first < classes; first += classes_at_once) {
      T of_some = 0;
#pragma unroll
      for (int k = 0; k < classes_at_once; ++k)
        if (first + k < classes) of_some += element(first + k, logits.load(first + k), count);
      sum += static_cast<double>(of_some);
    }
  }
  partials.store(sum, count);
}

// A block has a tile.
template <class In, bool has_labels, bool square>
__global__ void __launch_bounds__(LowTile::threads, 2)
    sigmoid_focal_low_backward_kernel(SigmoidFocalInput input, LowLogits low, FocalGradient out, LowTiles tiles,
                                      float* partials) {
  using T = opmath_t<In>;
  VEERLOSS_DYNAMIC_SHARED(memory);
  SigmoidPixel<In, has_labels, square, Pass::backward> element(input, gradient_of_sum<T>(out));
  const auto classes = static_cast<int>(input.geometry.channels);
  const auto of_image = static_cast<uint32_t>(tiles.of_image());
  const uint32_t image = blockIdx.x / of_image;
  LowTile tile(tiles, low, memory);
  tile.begin(static_cast<int>(blockIdx.x % of_image));
  const bool has_pixel = tile.has_pixel();
  if (has_pixel) element.begin(image, tile.pixel());
  const auto logits = tile.template logits<In>(image);
  float* const to = partials + static_cast<int64_t>(blockIdx.x) * classes * tiles.lows();
  int32_t count = 0;
  VEERLOSS_NO_UNROLL
  for (int first = 0; first < classes; first += classes_at_once) {
    T values[classes_at_once] = {};
    if (has_pixel) {
#pragma unroll
      for (int k = 0; k < classes_at_once; ++k)
        if (first + k < classes) values[k] = element(first + k, logits.load(first + k), count);
    }
    tile.reduce(values, classes - first, to + first * tiles.lows());
  }
}

// Calls f with the element type, whether targets are labels, and whether gamma is 2.
template <class F>
void with_low_kernel(const SigmoidFocalInput& input, Reduction reduction, const F& f) {
  if (input.weight.data || reduction == Reduction::none || !is_low(input.logits, *input.upsample))
    throw std::runtime_error("veerloss: on a GPU upsample is for images, larger sizes, a loss without weight that is reduced");
  with_sigmoid_kernel(input, [&](auto zero, auto square) {
    if constexpr (std::is_same_v<decltype(zero), double>)
      throw std::runtime_error("veerloss: on a GPU upsample is not for float64");
    else
      with_flag(input.class_indices, [&](auto has_labels) { f(zero, has_labels, square); });
  });
}

}  // namespace

int64_t launch_sigmoid_low_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream) {
  const FocalTiles tiles = focal_tiles<Policy::threads>(input.geometry);
  with_low_kernel(input, out.reduction, [&](auto zero, auto has_labels, auto square) {
    launch(sigmoid_focal_low_forward_kernel<decltype(zero), decltype(has_labels)::value, decltype(square)::value>,
           {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream}, input,
           LowLogits::of(input.logits, *input.upsample, zero), tiles, FocalPartials(out.scratch, tiles.blocks));
  });
  return tiles.blocks;
}

void launch_sigmoid_low_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream) {
  with_low_kernel(input, out.reduction, [&](auto zero, auto has_labels, auto square) {
    const LowLogits low = LowLogits::of(input.logits, *input.upsample, zero);
    const LowTiles tiles(low);
    auto* const partials = static_cast<float*>(out.scratch);
    launch(sigmoid_focal_low_backward_kernel<decltype(zero), decltype(has_labels)::value, decltype(square)::value>,
           {.blocks = input.geometry.images * tiles.of_image(),
            .threads = LowTile::threads,
            .stream = stream,
            .shared_bytes = LowTile::shared_bytes(tiles)},
           input, low, out, tiles, partials);
    add_up_tiles(input.geometry, *input.upsample, out.grad_logits, tiles, partials, stream);
  });
}

}  // namespace veerloss
