// What the operators of both methods of the Lovász losses share: the arguments of the kernels from those of the operators.
#pragma once

#include <vector>

#include "device.h"
#include "upsample.h"

namespace veerloss {

constexpr int64_t max_segment = int64_t{1} << 31;  // "exact" keeps a pixel's index in 31 bits, "histogram" a count

// Images of one pixel fold into one image, unless each is a segment of its own.
inline SegmentBatch segment_batch(const Op& op, const Tensor& logits, int64_t errors, bool per_image) {
  op.check_logits(logits);
  op.check(logits.size(1) > 0, "logits", logits, "[N, C, P] with at least one class");
  const Errors kind = op.errors(errors);
  SegmentBatch b{view_of(logits), View{}, geometry_of(logits), TargetRule{}, kind, kind == Errors::hinge, per_image};
  if (per_image) b.geometry = {logits.size(0), logits.size(1), logits.size(2)};
  op.check(b.errors != Errors::hinge || logits.size(1) == 1, "logits", logits, "[N, 1, P] for a hinge");
  op.check(b.length() < max_segment, "logits", logits,
           "of less than 2^31 pixels in a segment (the batch, or an image with per_image)");
  return b;
}

// `values`: the target has values in place of class indices, which are not of the batch.
inline SegmentBatch segment_batch_of_low(const Op& op, const Tensor& logits, const Tensor& target, bool values, int64_t errors,
                                         bool per_image, int64_t interpolation) {
  const Upsample upsample = upsample_of(op, logits, target, values, interpolation);
  op.check(logits.size(1) > 0, "logits", logits, "[N, C, *] with at least one class");
  const Errors kind = op.errors(errors);
  SegmentBatch b{*view_in_order(logits, true), View{},   geometry_of(upsample), TargetRule{}, kind,
                 kind == Errors::hinge,        per_image};
  b.upsample = upsample;
  op.check(kind != Errors::hinge || logits.size(1) == 1, "logits", logits, "[N, 1, *] for a hinge");
  op.check(b.length() < max_segment, "target", target,
           "of less than 2^31 pixels in a segment (the batch, or an image with per_image)");
  return b;
}

inline SegmentBatch segment_batch(const Op& op, const Tensor& logits, const Tensor& target, int64_t errors, bool per_image,
                                  std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                  std::optional<int64_t> interpolation) {
  SegmentBatch b;
  if (interpolation) {
    b = segment_batch_of_low(op, logits, target, false, errors, per_image, *interpolation);
    b.target = *view_in_order(target, false);
  } else {
    b = segment_batch(op, logits, errors, per_image);
    op.check_like("target", target, logits, false);
    b.target = view_of(target);
  }
  b.rule = {b.errors == Errors::hinge ? 2 : b.classes(), ignore_index.has_value(), ignore_index.value_or(0),
            background_index.has_value(), background_index.value_or(0)};
  return b;
}

inline SegmentSelection segment_selection(const Op& op, const SegmentBatch& b, const std::optional<Tensor>& selected,
                                          bool present) {
  return {op.data<bool>("selected", selected, b.classes(), DType::u8, "[C] bool, contiguous"), present};
}

// Of method "exact".
inline void check_valid_pixels(const Op& op, const SegmentBatch& b, const Tensor& logits, std::optional<int64_t> valid_pixels) {
  if (!valid_pixels) return;
  const int64_t all = b.geometry.images * b.geometry.pixels;
  op.check(logits.is_cpu() && *valid_pixels >= 0 && *valid_pixels <= all, "valid_pixels", *valid_pixels,
           "the number of pixels that are not ignored, or on a GPU None");
}

// The type that kernels compute in.
inline DType opmath_of(const SegmentBatch& b) {
  return b.logits.dtype == DType::f64 ? DType::f64 : DType::f32;
}

// The keys of method "exact", which become weights; and these, of a forward pass.
inline Tensor exact_keys(const Op& op, const SegmentBatch& b, const Tensor& logits, std::optional<int64_t> valid_pixels) {
  check_valid_pixels(op, b, logits, valid_pixels);
  const ScalarType type = opmath_type_of(logits);
  const int64_t classes = b.classes(), images = logits.size(0),
                pixels = images > 0 ? b.geometry.images * b.geometry.pixels / images : 0;
  return write_once(valid_pixels ? empty(logits, {classes, *valid_pixels}, type)
                                 : empty(logits, {classes, images, pixels}, type));
}

inline const void* exact_weights(const Op& op, const SegmentBatch& b, const Tensor& logits, const Tensor& weights,
                                 std::optional<int64_t> valid_pixels) {
  check_valid_pixels(op, b, logits, valid_pixels);
  return op.data<const void>(
      "weights", weights, b.classes() * (valid_pixels ? *valid_pixels : b.geometry.images * b.geometry.pixels), opmath_of(b),
      "the weights of a forward pass that kept them: of logits that required a gradient, also where it was traced");
}

// One value per segment: [], [C], [N] or [N, C].
inline std::vector<int64_t> per_segment_shape(const SegmentBatch& b) {
  std::vector<int64_t> shape;
  if (b.per_image) shape.push_back(b.rows());
  if (b.errors != Errors::hinge) shape.push_back(b.classes());
  return shape;
}

struct SegmentLossTensors {
  Tensor loss, scale;

  SegmentLossTensors(const Tensor& logits, const SegmentBatch& b, Reduction reduction, bool upcast_loss)
      : loss(empty(logits, reduction == Reduction::none ? per_segment_shape(b) : std::vector<int64_t>{},
                   loss_type(logits, upcast_loss))),
        scale(empty(logits, per_segment_shape(b), opmath_type_of(logits))),
        reduction_(reduction) {}

  SegmentLoss output(const Op& op, const SegmentBatch& b, const std::optional<Tensor>& class_weight) const {
    const auto* weight = op.data<const void>("class_weight", class_weight, b.classes(), opmath_of(b),
                                             "[C], contiguous, float32 or for float64 logits float64");
    return {reduction_, weight, loss.data_ptr(), *dtype_of(loss), scale.data_ptr()};
  }

 private:
  Reduction reduction_;
};

// The incoming gradient, contiguous, and the gradient of the logits.
struct SegmentGradientTensors {
  Tensor grad, grad_logits, scratch;

  SegmentGradientTensors(const Tensor& grad_, const Tensor& logits, const SegmentBatch& b)
      : grad(torch::stable::contiguous(grad_)),
        grad_logits(write_once(empty_as(logits))),
        scratch(upsample_scratch(logits, b.upsample)) {}

  SegmentGradient output(const Op& op, const SegmentBatch& b, const Tensor& scale, int64_t reduction) const {
    const Reduction r = op.reduction(reduction);
    op.check(on_device(grad) && grad.numel() == (r == Reduction::none ? b.segments() : 1) && dtype_of(grad).has_value(), "grad",
             grad, "of the shape of the loss");
    return {r,
            grad.data_ptr(),
            *dtype_of(grad),
            op.data<const void>("scale", scale, b.segments(), opmath_of(b), "the scale of the forward pass"),
            b.upsample ? *view_in_order(grad_logits, true) : view_of(grad_logits),
            scratch.data_ptr()};
  }
};

}  // namespace veerloss
