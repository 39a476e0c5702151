// Operators of the sigmoid focal loss; schemas in veerloss/_schemas.py.

#include "focal.h"

namespace veerloss {
namespace {

SigmoidFocalInput sigmoid_input(const Op& op, const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                                const std::optional<Tensor>& class_alpha, double gamma, const std::optional<Tensor>& weight,
                                std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                std::optional<int64_t> interpolation) {
  const bool class_indices = target.dim() != logits.dim();
  std::optional<Upsample> upsample;
  if (interpolation) {
    upsample = upsample_of(op, logits, target, !class_indices, *interpolation);
    if (weight)
      op.check(shape_of(*weight) == full_shape(logits, target) && view_in_order(*weight, true), "weight", *weight,
               "[N, C, *] of the pixels of target, in order");
  } else {
    op.check_logits(logits);
    op.check_like("target", target, logits, !class_indices);
    if (weight) op.check_like("weight", *weight, logits, true);
  }
  const Geometry geometry = upsample ? geometry_of(*upsample) : geometry_of(logits);
  return {.logits = upsample ? *view_in_order(logits, true) : view_of(logits),
          .target = upsample ? *view_in_order(target, !class_indices) : view_of(target),
          .weight = !weight    ? View{}
                    : upsample ? *view_in_order(*weight, true)
                               : view_of(*weight),
          .geometry = geometry,
          .rule = {class_indices ? geometry.channels : 1, ignore_index.has_value(), ignore_index.value_or(0),
                   background_index.has_value(), background_index.value_or(0)},
          .class_indices = class_indices,
          .alpha = alpha,
          .class_alpha =
              op.data<const void>("class_alpha", class_alpha, geometry.channels, opmath_of(logits), expected_class_alpha),
          .gamma = gamma,
          .upsample = upsample};
}

std::tuple<Tensor, Tensor> sigmoid_focal_forward(const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                                                 std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                                 int64_t reduction, double factor, std::optional<Tensor> normalizer,
                                                 bool upcast_loss, std::optional<int64_t> upsample) {
  const Op op("sigmoid_focal_forward");
  const auto input =
      sigmoid_input(op, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index, upsample);
  const ScalarType type = loss_type(logits, upcast_loss);
  const Reduction r = op.reduction(reduction);
  const Tensor loss = r != Reduction::none ? empty(logits, {}, type)
                      : upsample           ? write_once(empty(logits, full_shape(logits, target), type))
                      : upcast_loss        ? write_once(empty(logits, shape_of(logits), type))
                                           : write_once(empty_as(logits));
  return focal_forward(op, kernels::sigmoid_focal_forward, input, logits, loss, r, factor, normalizer,
                       kernels::sigmoid_focal_scratch_bytes(input));
}

Tensor sigmoid_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                              std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                              std::optional<int64_t> ignore_index, std::optional<int64_t> background_index, int64_t reduction,
                              const Tensor& scale, std::optional<int64_t> upsample) {
  const Op op("sigmoid_focal_backward");
  const auto input =
      sigmoid_input(op, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index, upsample);
  return focal_backward(op, kernels::sigmoid_focal_backward, input, grad, logits, true, reduction, scale);
}

#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
std::tuple<Tensor, Tensor, Tensor> upsampled_sigmoid_focal_forward(
    const Tensor& logits, const Tensor& target, std::optional<double> alpha, std::optional<Tensor> class_alpha, double gamma,
    std::optional<Tensor> weight, std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
    int64_t reduction, double factor, std::optional<Tensor> normalizer, bool upcast_loss, bool keep_gradient,
    int64_t upsample) {
  const Op op("upsampled_sigmoid_focal_forward");
  const auto input =
      sigmoid_input(op, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index, upsample);
  return upsampled_focal_forward(op, input, logits, reduction, factor, normalizer, upcast_loss, keep_gradient);
}
#endif

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("sigmoid_focal_forward", TORCH_BOX(&sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward", TORCH_BOX(&sigmoid_focal_backward));
#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
  m.impl("upsampled_sigmoid_focal_forward", TORCH_BOX(&upsampled_sigmoid_focal_forward));
#endif
}

}  // namespace veerloss
