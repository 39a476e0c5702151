// Operators of the region losses: their steps, which veerloss/ops.py puts together; schemas in
// veerloss/_schemas.py.

#include <tuple>

#include "lovasz.h"

namespace veerloss {
namespace {

Activation activation_of(const Op& op, int64_t value) {
  op.check(value >= 0 && value <= 2, "activation", value, "0 (softmax), 1 (sigmoid) or 2 (none)");
  return static_cast<Activation>(value);
}

RegionInput region_input(const Op& op, const Tensor& logits, const Tensor& target, int64_t activation, bool squared,
                         bool per_image, std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                         std::optional<int64_t> interpolation) {
  const Activation kind = activation_of(op, activation);
  const Errors errors = kind == Activation::softmax ? Errors::softmax : Errors::probabilities;
  const bool dense = target.dim() == logits.dim();
  const auto batch = [&] {
    const auto code = static_cast<int64_t>(errors);
    return interpolation ? segment_batch_of_low(op, logits, target, dense, code, per_image, *interpolation)
                         : segment_batch(op, logits, code, per_image);
  };
  RegionInput in{.batch = batch(), .activation = kind, .dense = dense, .values = {}, .ignored_value = {}, .squared = squared};
  SegmentBatch& b = in.batch;
  if (!interpolation) op.check_like("target", target, logits, dense);
  const View of_target = interpolation ? *view_in_order(target, dense) : view_of(target);
  if (dense) {
    in.values = of_target;
    if (ignore_index) in.ignored_value = static_cast<double>(*ignore_index);
    return in;
  }
  b.mask = b.classes() == 1 && kind != Activation::softmax && !background_index;
  b.target = of_target;
  b.rule = {b.mask ? 2 : b.classes(), ignore_index.has_value(), ignore_index.value_or(0), background_index.has_value(),
            background_index.value_or(0)};
  return in;
}

const int64_t* sums_data(const Op& op, const Tensor& sums, const SegmentBatch& b) {
  return op.data<const int64_t>("sums", sums, b.segments() * RegionLayout::words, DType::i64,
                                "[rows, C, 8] int64, contiguous, of region_sum");
}

Tensor region_sum(const Tensor& logits, const Tensor& target, int64_t activation, bool squared, bool per_image,
                  std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                  std::optional<int64_t> upsample) {
  const Op op("region_sum");
  const RegionInput in =
      region_input(op, logits, target, activation, squared, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const Tensor sums = zeros(logits, {in.batch.rows(), in.batch.classes(), RegionLayout::words}, ScalarType::Long);
  kernels::region_sum({.input = in, .sums = static_cast<int64_t*>(sums.data_ptr()), .stream = device.stream()});
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> region_weigh(const Tensor& logits, const Tensor& sums, std::optional<Tensor> selected,
                                                bool present, bool per_image, std::optional<Tensor> class_weight, double alpha,
                                                double beta, double smooth_numerator, double smooth_denominator, int64_t form,
                                                double exponent, int64_t reduction, bool upcast_loss) {
  const Op op("region_weigh");
  const SegmentBatch b = segment_batch(op, logits, static_cast<int64_t>(Errors::probabilities), per_image);
  op.check(form >= 0 && form <= 2, "form", form, "0 (linear), 1 (log) or 2 (log_cosh)");
  const Device device(logits);
  const SegmentLossTensors out(logits, b, op.reduction(reduction), upcast_loss);
  const Tensor coefficients = empty(logits, {b.rows(), b.classes(), 2}, ScalarType::Double);
  kernels::region_weigh({.batch = b,
                         .selection = segment_selection(op, b, selected, present),
                         .sums = sums_data(op, sums, b),
                         .rule = {alpha, beta, smooth_numerator, smooth_denominator, static_cast<Form>(form), exponent},
                         .out = out.output(op, b, class_weight),
                         .coefficients = static_cast<double*>(coefficients.data_ptr()),
                         .stream = device.stream()});
  return {out.loss, out.scale, coefficients};
}

Tensor region_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, int64_t activation, bool squared,
                       bool per_image, std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                       int64_t reduction, const Tensor& scale, const Tensor& coefficients, std::optional<int64_t> upsample) {
  const Op op("region_backward");
  const RegionInput in =
      region_input(op, logits, target, activation, squared, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const SegmentGradientTensors out(grad, logits, in.batch);
  kernels::region_backward({.input = in,
                            .coefficients = op.data<const double>("coefficients", coefficients, 2 * in.batch.segments(),
                                                                  DType::f64, "the coefficients of the forward pass"),
                            .out = out.output(op, in.batch, scale, reduction),
                            .stream = device.stream()});
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("region_sum", TORCH_BOX(&region_sum));
  m.impl("region_weigh", TORCH_BOX(&region_weigh));
  m.impl("region_backward", TORCH_BOX(&region_backward));
}

}  // namespace veerloss
