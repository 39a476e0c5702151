// What the operators of both focal losses share: outputs, and the checks of what they have in common.
#pragma once

#include <tuple>

#include "device.h"
#include "upsample.h"

namespace veerloss {

constexpr const char* expected_class_alpha = "[C], contiguous, float32 or for float64 logits float64";

inline DType opmath_of(const Tensor& logits) {
  return dtype_of(logits) == DType::f64 ? DType::f64 : DType::f32;
}

// Without reduction, of a loss or its gradient: [N, C, P] or [N, P], or of the shape of a target of full resolution.
template <class Input>
View loss_view_of(const Tensor& loss, const Input& input, bool channels) {
  return input.upsample ? *view_in_order(loss, channels) : view_of(loss);
}

// (loss, scale); `loss` is of the shape that the reduction asks for.
template <class Kernel, class Input>
std::tuple<Tensor, Tensor> focal_forward(const Op& op, const Kernel& kernel, const Input& input, const Tensor& logits,
                                         Tensor loss, Reduction reduction, double factor,
                                         const std::optional<Tensor>& normalizer, int64_t scratch_bytes) {
  if (normalizer)
    op.check(on_device(*normalizer) && normalizer->numel() == 1 && dtype_of(*normalizer).has_value(), "normalizer", *normalizer,
             "one element");
  const Device device(logits);
  const Tensor scale = empty(logits, {}, opmath_type_of(logits)), scratch = scratch_memory(logits, scratch_bytes);
  kernel(input,
         {.reduction = reduction,
          .factor = factor,
          .normalizer = normalizer ? element_view(*normalizer) : View{},
          .loss = reduction == Reduction::none ? loss_view_of(loss, input, loss.dim() == logits.dim()) : element_view(loss),
          .scale = element_view(scale),
          .scratch = scratch.data_ptr()},
         device.stream());
  return {loss, scale};
}

#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
// (loss, scale, gradient) of logits of low resolution, where the forward pass makes the gradient, up to scale, in the opmath
// type.
template <class Input>
std::tuple<Tensor, Tensor, Tensor> upsampled_focal_forward(const Op& op, const Input& input, const Tensor& logits,
                                                           int64_t reduction, double factor,
                                                           const std::optional<Tensor>& normalizer, bool upcast_loss,
                                                           bool keep_gradient) {
  const Reduction r = op.reduction(reduction);
  op.check(r != Reduction::none, "reduction", reduction, "1 (mean) or 2 (sum)");
  const Tensor gradient = empty(logits, keep_gradient ? shape_of(logits) : std::vector<int64_t>{0}, opmath_type_of(logits));
  const View view = keep_gradient ? *view_in_order(gradient, true) : View{};
  const auto kernel = [&](const Input& in, const FocalLoss& out, Stream) { kernels::upsampled_focal_forward(in, out, view); };
  const auto [loss, scale] =
      focal_forward(op, kernel, input, logits, empty(logits, {}, loss_type(logits, upcast_loss)), r, factor, normalizer, 0);
  return {loss, scale, gradient};
}
#endif

// The gradient of the logits. `channels`: without reduction the loss is [N, C, P], else [N, P].
template <class Input>
Tensor focal_backward(const Op& op, void (*kernel)(const Input&, const FocalGradient&, Stream), const Input& input,
                      const Tensor& grad, const Tensor& logits, bool channels, int64_t reduction, const Tensor& scale) {
  const bool none = op.reduction(reduction) == Reduction::none;
  // Of a loss of many values the gradient comes in any strides.
  const Tensor in_order = none && input.upsample && !view_in_order(grad, channels) ? torch::stable::contiguous(grad) : grad;
  if (none && input.upsample)
    op.check(on_device(grad) &&
                 grad.numel() == input.geometry.images * input.geometry.pixels * (channels ? input.geometry.channels : 1) &&
                 view_in_order(in_order, channels).has_value(),
             "grad", grad, "of the shape of the loss");
  else if (none)
    op.check_like("grad", grad, logits, channels);
  else
    op.check(on_device(grad) && grad.numel() == 1 && dtype_of(grad).has_value(), "grad", grad, "of the shape of the loss: []");
  op.check(on_device(scale) && scale.numel() == 1 && dtype_of(scale).has_value(), "scale", scale,
           "the scale of the forward pass");
  const Device device(logits);
  const Tensor grad_logits = write_once(empty_as(logits)), scratch = upsample_scratch(logits, input.upsample);
  kernel(input,
         {.reduction = static_cast<Reduction>(reduction),
          .grad = none ? loss_view_of(in_order, input, channels) : element_view(grad),
          .scale = element_view(scale),
          .grad_logits = input.upsample ? *view_in_order(grad_logits, true) : view_of(grad_logits),
          .scratch = scratch.data_ptr()},
         device.stream());
  return grad_logits;
}

}  // namespace veerloss
