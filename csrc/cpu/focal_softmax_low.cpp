// Softmax focal loss on the CPU of logits of low resolution (upsample.h), with hard labels. The gradient of the logits is
// small, a sixteenth of the full resolution at four times the size: forward makes it on the way, up to a factor, and backward
// has but to scale it. So logits are blended, and exponentials taken, once.

#include "focal_softmax.h"
#include "upsample.h"

namespace veerloss {
namespace {

template <class T>
void forward(const SoftmaxFocalInput& input, const FocalLoss& out, const View& gradient) {
  SoftmaxFocal<T> focal(input);
  const Geometry& g = focal.g;
  const LowLogits<T> logits(*input.upsample, input.logits);
  std::optional<LowGradient<T>> low_gradient;
  if (gradient.data) low_gradient.emplace(*input.upsample, gradient);
  const auto& bands = logits.map.bands();
  const auto count = static_cast<int64_t>(bands.size());
  std::vector<FocalPartial> partials(g.images * count);
  parallel_for(g.images * count, [&](int64_t begin, int64_t end) {
    SoftmaxTile<T> t = focal.rows();
    UpsampledRows<T> rows(logits);
    std::optional<UpsampledGradient<T>> low;
    if (low_gradient) low.emplace(*low_gradient);
    for (int64_t k = begin; k < end; ++k) {
      const Band& band = bands[k % count];
      const int64_t image = k / count, width = logits.map.width();
      if (low) low->begin_band(k);
      for (int64_t at = band.begin * width; at < band.end * width; at += focal.tile) {
        const Run run{image * g.pixels + at, std::min(focal.tile, band.end * width - at)};
        const auto load = [&] { rows.load(image, at, run.count, t.logits, focal.tile, t.rows.max_logit); };
        const FocalPartial partial = input.gamma == 2.0 ? focal.template forward_with<true>(run, t, load, low.has_value())
                                                        : focal.template forward_with<false>(run, t, load, low.has_value());
        partials[k].sum += partial.sum;
        partials[k].valid += partial.valid;
        if (low) low->add(image, at, run.count, t.exps, focal.tile, t.grad);
      }
      if (low) low->end_band();
    }
  });
  focal.raise_if_bad();
  if (low_gradient) low_gradient->store();
  store_focal_loss(out, partials);
}

}  // namespace

int64_t kernels::upsample_scratch_bytes(const Upsample&) {
  return 0;
}

void kernels::upsampled_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const View& gradient) {
  with_opmath_type(input.logits.dtype, [&](auto zero) { forward<decltype(zero)>(input, out, gradient); });
}

}  // namespace veerloss
