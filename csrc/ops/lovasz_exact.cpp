// Operators of method "exact" of the Lovász losses; schemas in veerloss/_schemas.py.

#include <tuple>

#include "lovasz.h"

namespace veerloss {
namespace {

std::tuple<Tensor, Tensor, Tensor> lovasz_exact_forward(const Tensor& logits, const Tensor& target,
                                                        std::optional<Tensor> selected, bool present, bool per_image,
                                                        std::optional<Tensor> class_weight, std::optional<int64_t> ignore_index,
                                                        std::optional<int64_t> background_index, int64_t errors,
                                                        int64_t reduction, std::optional<int64_t> valid_pixels,
                                                        bool keep_weights, bool upcast_loss, std::optional<int64_t> upsample) {
  const Op op("lovasz_exact_forward");
  const SegmentBatch batch = segment_batch(op, logits, target, errors, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const SegmentLossTensors out(logits, batch, op.reduction(reduction), upcast_loss);
  const Tensor keys = exact_keys(op, batch, logits, valid_pixels);
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_exact_scratch_bytes(batch));
  kernels::lovasz_exact_forward({.batch = batch,
                                 .selection = segment_selection(op, batch, selected, present),
                                 .out = out.output(op, batch, class_weight),
                                 .keys = keys.data_ptr(),
                                 .valid_pixels = valid_pixels,
                                 .keep_weights = keep_weights,
                                 .terms = {},
                                 .scratch = scratch.data_ptr(),
                                 .stream = device.stream()});
  return {out.loss, out.scale, keep_weights ? keys : empty(logits, {0}, opmath_type_of(logits))};
}

Tensor lovasz_exact_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& weights,
                             const Tensor& scale, int64_t errors, bool per_image, std::optional<int64_t> ignore_index,
                             std::optional<int64_t> valid_pixels, int64_t reduction, std::optional<int64_t> upsample) {
  const Op op("lovasz_exact_backward");
  // That a label is background has no part in which pixels count.
  const SegmentBatch batch = segment_batch(op, logits, target, errors, per_image, ignore_index, std::nullopt, upsample);
  const Device device(logits);
  const SegmentGradientTensors out(grad, logits, batch);
  kernels::lovasz_exact_backward({.batch = batch,
                                  .weights = exact_weights(op, batch, logits, weights, valid_pixels),
                                  .valid_pixels = valid_pixels,
                                  .out = out.output(op, batch, scale, reduction),
                                  .terms = {},
                                  .stream = device.stream()});
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("lovasz_exact_forward", TORCH_BOX(&lovasz_exact_forward));
  m.impl("lovasz_exact_backward", TORCH_BOX(&lovasz_exact_backward));
}

}  // namespace veerloss
