// Operators of method "exact" of the Lovász losses; schemas in veerloss/ops.py.

#include <tuple>

#include "lovasz.h"

namespace veerloss {
namespace {

std::tuple<Tensor, Tensor, Tensor> lovasz_exact_forward(const Tensor& logits, const Tensor& target,
                                                        std::optional<Tensor> selected, bool present, bool per_image,
                                                        std::optional<Tensor> class_weight, std::optional<int64_t> ignore_index,
                                                        int64_t errors, int64_t reduction, bool keep_weights,
                                                        bool upcast_loss) {
  const Op op("lovasz_exact_forward");
  const LovaszBatch batch = lovasz_batch(op, logits, target, errors, per_image, ignore_index);
  const Device device(logits);
  const ScalarType type = opmath_type_of(logits);
  const LovaszLossTensors out(logits, batch, op.reduction(reduction), upcast_loss);
  const Tensor keys = write_once(empty(logits, {logits.size(1), logits.size(0), logits.size(2)}, type));
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_exact_scratch_bytes(batch));
  kernels::lovasz_exact_forward({.batch = batch,
                                 .selection = lovasz_selection(op, batch, selected, present),
                                 .out = out.output(op, batch, class_weight),
                                 .keys = keys.data_ptr(),
                                 .keep_weights = keep_weights,
                                 .scratch = scratch.data_ptr(),
                                 .stream = device.stream()});
  return {out.loss, out.scale, keep_weights ? keys : empty(logits, {0}, type)};
}

Tensor lovasz_exact_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale,
                             int64_t errors, bool per_image, int64_t reduction) {
  const Op op("lovasz_exact_backward");
  const LovaszBatch batch = lovasz_batch(op, logits, errors, per_image);
  const Device device(logits);
  const LovaszGradientTensors out(grad, logits);
  kernels::lovasz_exact_backward({.batch = batch,
                                  .weights = op.data<const void>("weights", weights, logits.numel(), opmath_of(batch),
                                                                 "the weights of a forward pass with keep_weights=True"),
                                  .out = out.output(op, batch, scale, reduction),
                                  .stream = device.stream()});
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("lovasz_exact_forward", TORCH_BOX(&lovasz_exact_forward));
  m.impl("lovasz_exact_backward", TORCH_BOX(&lovasz_exact_backward));
}

}  // namespace veerloss
