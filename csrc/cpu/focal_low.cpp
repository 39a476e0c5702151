// Focal losses on the CPU of logits of low resolution (upsample.h). The gradient of the logits is small, a sixteenth of the
// full resolution at four times the size: of a reduced loss forward makes it on the way, up to a factor, and backward has but
// to scale it. So logits are blended, and exponentials taken, once.

#include "focal_sigmoid.h"
#include "focal_softmax.h"
#include "upsample.h"

namespace veerloss {
namespace {

// Calls compute(run, band, rows, load, square), which returns the TileGradient, for every tile of pixels.
template <class T, class Focal, class Input, class F>
void for_each_low_tile(Focal& focal, const Input& input, LowGradient<T>* gradient, const F& compute) {
  const LowLogits<T> logits(*input.upsample, input.logits);
  const auto& bands = logits.map.bands();
  const auto count = static_cast<int64_t>(bands.size());
  const int64_t width = logits.map.width();
  parallel_for(focal.g.images * count, [&](int64_t begin, int64_t end) {
    auto rows = focal.rows();
    UpsampledRows<T> upsampled(logits);
    std::optional<UpsampledGradient<T>> low;
    if (gradient) low.emplace(*gradient);
    for (int64_t k = begin; k < end; ++k) {
      const Band& band = bands[k % count];
      const int64_t image = k / count;
      if (low) low->begin_band(k);
      for (int64_t at = band.begin * width; at < band.end * width; at += focal.tile) {
        const Run run{image * focal.g.pixels + at, std::min(focal.tile, band.end * width - at)};
        const auto load = [&](T* out, int64_t stride, T* largest) {
          upsampled.load(image, at, run.count, out, stride, largest);
        };
        const TileGradient<T> tile =
            input.gamma == 2.0 ? compute(run, k, rows, load, std::true_type{}) : compute(run, k, rows, load, std::false_type{});
        if (low) low->add(image, at, run.count, tile.rows, focal.tile, tile.factor);
      }
      if (low) low->end_band();
    }
  });
  focal.raise_if_bad();
  if (gradient) gradient->store();
}

template <template <class T> class Focal, class Input>
void forward(const Input& input, const FocalLoss& out, const View& gradient) {
  with_opmath_type(input.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    Focal<T> focal(input);
    std::optional<LowGradient<T>> low;
    if (gradient.data) low.emplace(*input.upsample, gradient);
    std::vector<FocalPartial> partials(focal.g.images * static_cast<int64_t>(bands_of(*input.upsample).size()));
    for_each_low_tile<T>(
        focal, input, low ? &*low : nullptr, [&](Run run, int64_t band, auto& rows, const auto& load, auto square) {
          TileGradient<T> found{};
          const FocalPartial partial =
              focal.template forward_low<decltype(square)::value>(run, rows, load, out, low ? &found : nullptr);
          partials[band].sum += partial.sum;
          partials[band].valid += partial.valid;
          return found;
        });
    store_focal_loss(out, partials);
  });
}

template <template <class T> class Focal, class Input>
void backward(const Input& input, const FocalGradient& out) {
  with_opmath_type(input.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    Focal<T> focal(input);
    const IncomingGradient<T> incoming(out);
    LowGradient<T> low(*input.upsample, out.grad_logits);
    for_each_low_tile<T>(focal, input, &low, [&](Run run, int64_t, auto& rows, const auto& load, auto square) {
      return focal.template backward_low<decltype(square)::value>(run, rows, load, incoming);
    });
  });
}

}  // namespace

int64_t kernels::upsample_scratch_bytes(const Upsample&) {
  return 0;
}

void kernels::upsampled_focal_forward(const SigmoidFocalInput& input, const FocalLoss& out, const View& gradient) {
  forward<SigmoidFocal>(input, out, gradient);
}

void kernels::upsampled_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const View& gradient) {
  forward<SoftmaxFocal>(input, out, gradient);
}

void upsampled_focal_backward(const SigmoidFocalInput& input, const FocalGradient& out) {
  backward<SigmoidFocal>(input, out);
}

void upsampled_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out) {
  backward<SoftmaxFocal>(input, out);
}

}  // namespace veerloss
