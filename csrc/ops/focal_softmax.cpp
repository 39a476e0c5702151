// Operators of the softmax focal loss; schemas in veerloss/_schemas.py.

#include "focal.h"
#include "upsample.h"

namespace veerloss {
namespace {

SoftmaxFocalInput softmax_input(const Op& op, const Tensor& logits, const Tensor& target, double alpha,
                                const std::optional<Tensor>& class_alpha, double gamma, double label_smoothing,
                                std::optional<int64_t> ignore_index, std::optional<int64_t> interpolation) {
  const bool class_probabilities = target.dim() == logits.dim();
  std::optional<Upsample> upsample;
  if (interpolation) {
    upsample = upsample_of(op, logits, target, class_probabilities, *interpolation);
  } else {
    op.check_logits(logits);
    op.check_like("target", target, logits, class_probabilities);
  }
  op.check(logits.size(1) > 0, "logits", logits, "[N, C, P] with at least one class");
  const Geometry geometry = upsample ? geometry_of(*upsample) : geometry_of(logits);
  return {.logits = upsample ? *view_in_order(logits, true) : view_of(logits),
          .target = upsample ? *view_in_order(target, class_probabilities) : view_of(target),
          .geometry = geometry,
          .rule = {geometry.channels, ignore_index.has_value(), ignore_index.value_or(0)},
          .class_probabilities = class_probabilities,
          .alpha = alpha,
          .class_alpha =
              op.data<const void>("class_alpha", class_alpha, geometry.channels, opmath_of(logits), expected_class_alpha),
          .gamma = gamma,
          .label_smoothing = label_smoothing,
          .upsample = upsample};
}

std::tuple<Tensor, Tensor> softmax_focal_forward(const Tensor& logits, const Tensor& target, double alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                                                 std::optional<int64_t> ignore_index, int64_t reduction, double factor,
                                                 std::optional<Tensor> normalizer, bool upcast_loss,
                                                 std::optional<int64_t> upsample) {
  const Op op("softmax_focal_forward");
  const auto input = softmax_input(op, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, upsample);
  const ScalarType type = loss_type(logits, upcast_loss);
  const Reduction r = op.reduction(reduction);
  std::vector<int64_t> shape;
  if (r == Reduction::none) {
    shape = shape_of(target);
    if (input.class_probabilities) shape.erase(shape.begin() + 1);
  }
  const Tensor loss = empty(logits, shape, type);
  return focal_forward(op, kernels::softmax_focal_forward, input, logits, loss, r, factor, normalizer,
                       kernels::softmax_focal_scratch_bytes(input));
}

Tensor softmax_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, double alpha,
                              std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                              std::optional<int64_t> ignore_index, int64_t reduction, const Tensor& scale,
                              std::optional<int64_t> upsample) {
  const Op op("softmax_focal_backward");
  const auto input = softmax_input(op, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, upsample);
  return focal_backward(op, kernels::softmax_focal_backward, input, grad, logits, false, reduction, scale);
}

#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
std::tuple<Tensor, Tensor, Tensor> upsampled_softmax_focal_forward(const Tensor& logits, const Tensor& target, double alpha,
                                                                   std::optional<Tensor> class_alpha, double gamma,
                                                                   double label_smoothing, std::optional<int64_t> ignore_index,
                                                                   int64_t reduction, double factor,
                                                                   std::optional<Tensor> normalizer, bool upcast_loss,
                                                                   bool keep_gradient, int64_t upsample) {
  const Op op("upsampled_softmax_focal_forward");
  const auto input = softmax_input(op, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index, upsample);
  return upsampled_focal_forward(op, input, logits, reduction, factor, normalizer, upcast_loss, keep_gradient);
}
#endif

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("softmax_focal_forward", TORCH_BOX(&softmax_focal_forward));
  m.impl("softmax_focal_backward", TORCH_BOX(&softmax_focal_backward));
#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
  m.impl("upsampled_softmax_focal_forward", TORCH_BOX(&upsampled_softmax_focal_forward));
#endif
}

}  // namespace veerloss
