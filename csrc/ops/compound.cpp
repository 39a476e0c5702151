// Operators of the compound losses: the passes over pixels, which veerloss/_compound.py puts together; schemas in
// veerloss/_schemas.py.

#include <tuple>

#include "focal.h"
#include "lovasz_histogram.h"

namespace veerloss {
namespace {

FocalTerm focal_term(const Op& op, const SegmentBatch& b, std::optional<double> alpha, const std::optional<Tensor>& class_alpha,
                     double gamma, double label_smoothing) {
  op.check(b.errors != Errors::probabilities, "errors", static_cast<int64_t>(b.errors), "0 (softmax) or 2 (hinge)");
  return {.alpha = alpha,
          .class_alpha = op.data<const void>("class_alpha", class_alpha, b.classes(), opmath_of(b), expected_class_alpha),
          .gamma = gamma,
          .label_smoothing = label_smoothing};
}

TermSums term_sums(const Op& op, const SegmentBatch& b, const FocalTerm& focal, const std::optional<Tensor>& focal_sums,
                   const std::optional<Tensor>& region_sums) {
  return {.focal = focal,
          .focal_sums = op.data<double>("focal_sums", focal_sums, 3, DType::f64, "[3] float64, contiguous"),
          .region_sums = op.data<int64_t>("region_sums", region_sums, b.segments() * RegionLayout::words, DType::i64,
                                          "[rows, C, 8] int64, contiguous")};
}

void compound_count(Tensor counts, Tensor largest, std::optional<Tensor> focal_sums, std::optional<Tensor> region_sums,
                    const Tensor& logits, const Tensor& target, const Tensor& table, std::optional<Tensor> segment_mask,
                    std::optional<double> alpha, std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                    int64_t errors, bool per_image, std::optional<int64_t> ignore_index, bool find_largest,
                    std::optional<int64_t> upsample) {
  const Op op("compound_count");
  const SegmentBatch b = segment_batch(op, logits, target, errors, per_image, ignore_index, std::nullopt, upsample);
  const FocalTerm focal = focal_term(op, b, alpha, class_alpha, gamma, label_smoothing);
  const Device device(logits);
  const int64_t bins = bins_of(op, counts), segments = b.segments();
  LovaszHistogramCount args{
      .batch = b,
      .table = table_data(op, "table", table, segments, bins),
      .segment_mask = op.data<const bool>("segment_mask", segment_mask, segments, DType::u8, "[rows, C] bool, contiguous"),
      .sampled = false,
      .find_largest = find_largest,
      .bins = bins,
      .counts = op.data<int32_t>("counts", counts, 2 * segments * bins, DType::i32, "[rows, C, 2, bins] int32, contiguous"),
      .largest = op.data<uint32_t>("largest", largest, segments, DType::i32, "[rows, C] int32, contiguous"),
      .terms = term_sums(op, b, focal, focal_sums, region_sums),
      .scratch = nullptr,
      .stream = device.stream()};
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_histogram_scratch_bytes(args));
  args.scratch = scratch.data_ptr();
  kernels::lovasz_histogram_count(args);
}

std::tuple<Tensor, Tensor, Tensor> compound_exact(std::optional<Tensor> focal_sums, std::optional<Tensor> region_sums,
                                                  const Tensor& logits, const Tensor& target, std::optional<Tensor> selected,
                                                  bool present, std::optional<double> alpha, std::optional<Tensor> class_alpha,
                                                  double gamma, double label_smoothing, int64_t errors, bool per_image,
                                                  std::optional<int64_t> ignore_index, std::optional<int64_t> valid_pixels,
                                                  bool keep_weights, std::optional<int64_t> upsample) {
  const Op op("compound_exact");
  const SegmentBatch b = segment_batch(op, logits, target, errors, per_image, ignore_index, std::nullopt, upsample);
  const FocalTerm focal = focal_term(op, b, alpha, class_alpha, gamma, label_smoothing);
  const Device device(logits);
  const SegmentLossTensors out(logits, b, Reduction::mean, true);
  const Tensor keys = exact_keys(op, b, logits, valid_pixels);
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_exact_scratch_bytes(b));
  kernels::lovasz_exact_forward({.batch = b,
                                 .selection = segment_selection(op, b, selected, present),
                                 .out = out.output(op, b, std::nullopt),
                                 .keys = keys.data_ptr(),
                                 .valid_pixels = valid_pixels,
                                 .keep_weights = keep_weights,
                                 .terms = term_sums(op, b, focal, focal_sums, region_sums),
                                 .scratch = scratch.data_ptr(),
                                 .stream = device.stream()});
  return {out.loss, out.scale, keep_weights ? keys : empty(logits, {0}, opmath_type_of(logits))};
}

void compound_sum(std::optional<Tensor> focal_sums, std::optional<Tensor> region_sums, const Tensor& logits,
                  const Tensor& target, std::optional<double> alpha, std::optional<Tensor> class_alpha, double gamma,
                  double label_smoothing, int64_t errors, bool per_image, std::optional<int64_t> ignore_index,
                  std::optional<int64_t> upsample) {
  const Op op("compound_sum");
  const SegmentBatch b = segment_batch(op, logits, target, errors, per_image, ignore_index, std::nullopt, upsample);
  const FocalTerm focal = focal_term(op, b, alpha, class_alpha, gamma, label_smoothing);
  const Device device(logits);
  const Tensor scratch = scratch_memory(logits, kernels::compound_sum_scratch_bytes(b));
  kernels::compound_sum({.batch = b,
                         .terms = term_sums(op, b, focal, focal_sums, region_sums),
                         .scratch = scratch.data_ptr(),
                         .stream = device.stream()});
}

Tensor compound_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<double> focal,
                         std::optional<double> lovasz, std::optional<double> region, std::optional<double> alpha,
                         std::optional<Tensor> class_alpha, double gamma, double label_smoothing, int64_t errors,
                         bool per_image, std::optional<int64_t> ignore_index, bool histogram,
                         std::optional<int64_t> valid_pixels, const Tensor& scale, const Tensor& focal_scale,
                         const Tensor& region_weights, const Tensor& table, const Tensor& weights,
                         std::optional<int64_t> upsample) {
  const Op op("compound_backward");
  const SegmentBatch b = segment_batch(op, logits, target, errors, per_image, ignore_index, std::nullopt, upsample);
  const Device device(logits);
  // The weights of the bins of a softmax have those of the region loss.
  const bool in_bins = lovasz && histogram && b.errors == Errors::softmax;
  const SegmentGradientTensors out(grad, logits, b);
  TermGradients terms{.focal = focal_term(op, b, alpha, class_alpha, gamma, label_smoothing)};
  if (focal) terms.focal_scale = op.data<const void>("focal_scale", focal_scale, 1, opmath_of(b), "that of the forward pass");
  if (region && !in_bins)
    terms.region = op.data<const void>("region_weights", region_weights, 2 * b.segments(), opmath_of(b),
                                       "[rows, C, 2] of the forward pass");
  const SegmentGradient gradient = out.output(op, b, scale, static_cast<int64_t>(Reduction::mean));
  if (!lovasz) {
    kernels::compound_backward({.batch = b, .out = gradient, .terms = terms, .stream = device.stream()});
  } else if (histogram) {
    const int64_t bins = BinLayout::bins(b.classes());
    kernels::lovasz_histogram_backward({.batch = b,
                                        .bins = bins,
                                        .table = table_data(op, "table", table, b.segments(), bins),
                                        .weights = weights_data(op, b, weights),
                                        .out = gradient,
                                        .terms = terms,
                                        .stream = device.stream()});
  } else {
    kernels::lovasz_exact_backward({.batch = b,
                                    .weights = exact_weights(op, b, logits, weights, valid_pixels),
                                    .valid_pixels = valid_pixels,
                                    .out = gradient,
                                    .terms = terms,
                                    .stream = device.stream()});
  }
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("compound_count", TORCH_BOX(&compound_count));
  m.impl("compound_exact", TORCH_BOX(&compound_exact));
  m.impl("compound_sum", TORCH_BOX(&compound_sum));
  m.impl("compound_backward", TORCH_BOX(&compound_backward));
}

}  // namespace veerloss
