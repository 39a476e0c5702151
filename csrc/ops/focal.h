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

// The gradient of the logits. `channels`: without reduction the loss is [N, C, P], else [N, P].
template <class Input>
Tensor focal_backward(const Op& op, void (*kernel)(const Input&, const FocalGradient&, Stream), const Input& input,
                      const Tensor& grad, const Tensor& logits, bool channels, int64_t reduction, const Tensor& scale) {
  const bool none = op.reduction(reduction) == Reduction::none;
  if (none && input.upsample)
    op.check(on_device(grad) &&
                 grad.numel() == input.geometry.images * input.geometry.pixels * (channels ? input.geometry.channels : 1) &&
                 dtype_of(grad).has_value() && grad.is_contiguous(),
             "grad", grad, "of the shape of the loss, contiguous");
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
          .grad = none ? loss_view_of(grad, input, channels) : element_view(grad),
          .scale = element_view(scale),
          .grad_logits = input.upsample ? *view_in_order(grad_logits, true) : view_of(grad_logits),
          .scratch = scratch.data_ptr()},
         device.stream());
  return grad_logits;
}

}  // namespace veerloss
