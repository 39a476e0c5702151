// Operators of the focal losses; schemas in veerloss/ops.py.

#include <tuple>

#include "device.h"

namespace veerloss {
namespace {

constexpr const char* expected_class_alpha = "[C], contiguous, float32 or for float64 logits float64";

DType opmath_of(const Tensor& logits) {
  return dtype_of(logits) == DType::f64 ? DType::f64 : DType::f32;
}

SigmoidFocalInput sigmoid_input(const Op& op, const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                                const std::optional<Tensor>& class_alpha, double gamma, const std::optional<Tensor>& weight,
                                std::optional<int64_t> ignore_index, std::optional<int64_t> background_index) {
  op.check_logits(logits);
  const bool class_indices = target.dim() == 2;
  op.check_like("target", target, logits, !class_indices);
  if (weight) op.check_like("weight", *weight, logits, true);
  const Geometry geometry = geometry_of(logits);
  return {.logits = view_of(logits),
          .target = view_of(target),
          .weight = weight ? view_of(*weight) : View{},
          .geometry = geometry,
          .rule = {class_indices ? geometry.channels : 1, ignore_index.has_value(), ignore_index.value_or(0),
                   background_index.has_value(), background_index.value_or(0)},
          .class_indices = class_indices,
          .alpha = alpha,
          .class_alpha =
              op.data<const void>("class_alpha", class_alpha, geometry.channels, opmath_of(logits), expected_class_alpha),
          .gamma = gamma};
}

SoftmaxFocalInput softmax_input(const Op& op, const Tensor& logits, const Tensor& target, double alpha,
                                const std::optional<Tensor>& class_alpha, double gamma, double label_smoothing,
                                std::optional<int64_t> ignore_index) {
  op.check_logits(logits);
  const bool class_probabilities = target.dim() == 3;
  op.check_like("target", target, logits, class_probabilities);
  const Geometry geometry = geometry_of(logits);
  return {.logits = view_of(logits),
          .target = view_of(target),
          .geometry = geometry,
          .rule = {geometry.channels, ignore_index.has_value(), ignore_index.value_or(0)},
          .class_probabilities = class_probabilities,
          .alpha = alpha,
          .class_alpha =
              op.data<const void>("class_alpha", class_alpha, geometry.channels, opmath_of(logits), expected_class_alpha),
          .gamma = gamma,
          .label_smoothing = label_smoothing};
}

// (loss, scale); `loss` is of the shape that the reduction asks for.
template <class Input>
std::tuple<Tensor, Tensor> forward(const Op& op, void (*kernel)(const Input&, const FocalLoss&, Stream), const Input& input,
                                   const Tensor& logits, Tensor loss, Reduction reduction, double factor,
                                   const std::optional<Tensor>& normalizer) {
  if (normalizer)
    op.check(on_device(*normalizer) && normalizer->numel() == 1 && dtype_of(*normalizer).has_value(), "normalizer", *normalizer,
             "one element");
  const Device device(logits);
  const Tensor scale = empty(logits, {}, opmath_type_of(logits));
  kernel(input,
         {.reduction = reduction,
          .factor = factor,
          .normalizer = normalizer ? element_view(*normalizer) : View{},
          .loss = reduction == Reduction::none ? view_of(loss) : element_view(loss),
          .scale = element_view(scale)},
         device.stream());
  return {loss, scale};
}

// The gradient of the logits. `channels`: without reduction the loss is [N, C, P], else [N, P].
template <class Input>
Tensor backward(const Op& op, void (*kernel)(const Input&, const FocalGradient&, Stream), const Input& input,
                const Tensor& grad, const Tensor& logits, bool channels, int64_t reduction, const Tensor& scale) {
  const bool none = op.reduction(reduction) == Reduction::none;
  if (none)
    op.check_like("grad", grad, logits, channels);
  else
    op.check(on_device(grad) && grad.numel() == 1 && dtype_of(grad).has_value(), "grad", grad, "of the shape of the loss: []");
  op.check(on_device(scale) && scale.numel() == 1 && dtype_of(scale).has_value(), "scale", scale,
           "the scale of the forward pass");
  const Device device(logits);
  const Tensor grad_logits = write_once(empty_as(logits));
  kernel(input,
         {.reduction = static_cast<Reduction>(reduction),
          .grad = none ? view_of(grad) : element_view(grad),
          .scale = element_view(scale),
          .grad_logits = view_of(grad_logits)},
         device.stream());
  return grad_logits;
}

std::tuple<Tensor, Tensor> sigmoid_focal_forward(const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                                                 std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                                 int64_t reduction, double factor, std::optional<Tensor> normalizer,
                                                 bool upcast_loss) {
  const Op op("sigmoid_focal_forward");
  const auto input = sigmoid_input(op, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index);
  const ScalarType type = loss_type(logits, upcast_loss);
  const Reduction r = op.reduction(reduction);
  const Tensor loss = r != Reduction::none ? empty(logits, {}, type)
                      : upcast_loss        ? write_once(empty(logits, shape_of(logits), type))
                                           : write_once(empty_as(logits));
  return forward(op, kernels::sigmoid_focal_forward, input, logits, loss, r, factor, normalizer);
}

Tensor sigmoid_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                              std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                              std::optional<int64_t> ignore_index, std::optional<int64_t> background_index, int64_t reduction,
                              const Tensor& scale) {
  const Op op("sigmoid_focal_backward");
  const auto input = sigmoid_input(op, logits, target, alpha, class_alpha, gamma, weight, ignore_index, background_index);
  return backward(op, kernels::sigmoid_focal_backward, input, grad, logits, true, reduction, scale);
}

std::tuple<Tensor, Tensor> softmax_focal_forward(const Tensor& logits, const Tensor& target, double alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                                                 std::optional<int64_t> ignore_index, int64_t reduction, double factor,
                                                 std::optional<Tensor> normalizer, bool upcast_loss) {
  const Op op("softmax_focal_forward");
  const auto input = softmax_input(op, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index);
  const ScalarType type = loss_type(logits, upcast_loss);
  const Reduction r = op.reduction(reduction);
  const Tensor loss = r == Reduction::none ? empty(logits, {logits.size(0), logits.size(2)}, type) : empty(logits, {}, type);
  return forward(op, kernels::softmax_focal_forward, input, logits, loss, r, factor, normalizer);
}

Tensor softmax_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, double alpha,
                              std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                              std::optional<int64_t> ignore_index, int64_t reduction, const Tensor& scale) {
  const Op op("softmax_focal_backward");
  const auto input = softmax_input(op, logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index);
  return backward(op, kernels::softmax_focal_backward, input, grad, logits, false, reduction, scale);
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("sigmoid_focal_forward", TORCH_BOX(&sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward", TORCH_BOX(&sigmoid_focal_backward));
  m.impl("softmax_focal_forward", TORCH_BOX(&softmax_focal_forward));
  m.impl("softmax_focal_backward", TORCH_BOX(&softmax_focal_backward));
}

}  // namespace veerloss
