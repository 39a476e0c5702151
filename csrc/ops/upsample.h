// Operators whose logits may be of lower resolution than their target: then both have their spatial dimensions, [N, C, h, w]
// and [N, H, W], or of volumes one more.
#pragma once

#include <vector>

#include "device.h"

namespace veerloss {

// [images, channels, pixels], or without channels [images, pixels], of a tensor whose pixels are in order, a stride apart.
inline std::optional<View> view_in_order(const Tensor& t, bool channels) {
  const auto dtype = dtype_of(t);
  const int64_t dim = t.dim(), first = channels ? 2 : 1;
  if (!dtype || dim <= first) return std::nullopt;
  // A size of 1 has no step.
  int64_t stride = 1, inside = 1;
  for (int64_t d = dim - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (inside == 1) stride = t.stride(d);
    if (t.stride(d) != stride * inside) return std::nullopt;
    inside *= t.size(d);
  }
  return View{static_cast<char*>(t.data_ptr()), *dtype, t.stride(0), channels ? t.stride(1) : 0, stride};
}

// Where `target` (with channels: of values) has another size than the logits.
inline Upsample upsample_of(const Op& op, const Tensor& logits, const Tensor& target, bool channels, int64_t mode) {
  op.check(mode >= 0 && mode <= 2, "upsample", mode, "0 (nearest), 1 (linear) or 2 (linear with align_corners)");
  const auto dtype = dtype_of(logits);
  const int64_t dim = logits.dim(), spatial = dim - 2, first = channels ? 2 : 1;
  op.check(on_device(logits) && (dim == 4 || dim == 5) && dtype && *dtype <= DType::f16 && view_in_order(logits, true),
           "logits", logits, "[N, C, h, w] or [N, C, d, h, w], its pixels in order, float32, float64, bfloat16 or float16");
  op.check(on_device(target) && target.get_device_index() == logits.get_device_index() && target.dim() == first + spatial &&
               target.size(0) == logits.size(0) && (!channels || target.size(1) == logits.size(1)) &&
               view_in_order(target, channels),
           "target", target, "of the images of logits, its pixels in order");
  Upsample found;
  found.low = {logits.size(0), logits.size(1), 1};
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t low = logits.size(2 + d), full = target.size(first + d);
    op.check(low > 0 || full == 0, "logits", logits, "of at least one pixel");
    auto& axis = found.axes[3 - spatial + d];
    axis = static_cast<Interpolation>(mode) == Interpolation::nearest
               ? UpsampleAxis::nearest(low, full)
               : UpsampleAxis::linear(low, full, static_cast<Interpolation>(mode) == Interpolation::linear_aligned);
    found.low.pixels *= low;
  }
  return found;
}

// [N, C, *] of the pixels of a target that has channels, or not.
inline std::vector<int64_t> full_shape(const Tensor& logits, const Tensor& target) {
  std::vector<int64_t> shape = shape_of(target);
  if (target.dim() != logits.dim()) shape.insert(shape.begin() + 1, logits.size(1));
  return shape;
}

// Memory for a backward pass.
inline Tensor upsample_scratch(const Tensor& logits, const std::optional<Upsample>& upsample) {
  return scratch_memory(logits, upsample ? kernels::upsample_scratch_bytes(*upsample) : 0);
}

// The geometry of the target.
inline Geometry geometry_of(const Upsample& upsample) {
  Geometry g = upsample.low;
  g.pixels = 1;
  for (const auto& axis : upsample.axes) g.pixels *= axis.full;
  return g;
}

}  // namespace veerloss
