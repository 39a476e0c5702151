// Operators of method "histogram" of the Lovász losses: its steps, which veerloss/_histogram.py puts together; schemas in
// veerloss/_schemas.py.

#include <tuple>

#include "lovasz_histogram.h"

namespace veerloss {
namespace {

void lovasz_histogram_count(Tensor counts, Tensor largest, const Tensor& logits, const Tensor& target,
                            std::optional<Tensor> table, std::optional<Tensor> segment_mask, int64_t errors, bool per_image,
                            std::optional<int64_t> ignore_index, std::optional<int64_t> background_index, bool sampled,
                            bool find_largest, std::optional<int64_t> upsample) {
  const Op op("lovasz_histogram_count");
  const SegmentBatch batch = segment_batch(op, logits, target, errors, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const int64_t bins = bins_of(op, counts), segments = batch.segments();
  op.check(table || bins == BinLayout::coarse_bins, "counts", counts,
           "of the bins of the coarse pass, where there is no table");
  LovaszHistogramCount args{
      .batch = batch,
      .table = table ? table_data(op, "table", *table, segments, bins) : nullptr,
      .segment_mask = op.data<const bool>("segment_mask", segment_mask, segments, DType::u8, "[rows, C] bool, contiguous"),
      .sampled = sampled,
      .find_largest = find_largest,
      .bins = bins,
      .counts = op.data<int32_t>("counts", counts, 2 * segments * bins, DType::i32, "[rows, C, 2, bins] int32, contiguous"),
      .largest = op.data<uint32_t>("largest", largest, segments, DType::i32, "[rows, C] int32, contiguous"),
      .terms = {},
      .scratch = nullptr,
      .stream = device.stream()};
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_histogram_scratch_bytes(args));
  args.scratch = scratch.data_ptr();
  kernels::lovasz_histogram_count(args);
}

Tensor lovasz_histogram_place(const Tensor& counts, std::optional<Tensor> counted_table, int64_t errors, bool sampled,
                              int64_t bins) {
  const Op op("lovasz_histogram_place");
  op.check(bins > BinLayout::table && bins <= BinLayout::max_bins, "bins", bins, "more than cells, and max_bins at the most");
  const Device device(counts);
  const int64_t counted_bins = bins_of(op, counts), segments = counts.size(0) * counts.size(1);
  op.check(counted_table || counted_bins == BinLayout::coarse_bins, "counts", counts,
           "of the bins of the coarse pass, where there is no table");
  const Tensor table = empty(counts, {counts.size(0), counts.size(1), BinLayout::table, 2}, ScalarType::Float);
  kernels::lovasz_histogram_place(
      {.errors = op.errors(errors),
       .segments = segments,
       .counts = counts_data(op, "counts", counts, segments, counted_bins),
       .counted_bins = counted_bins,
       .counted_table = counted_table ? table_data(op, "counted_table", *counted_table, segments, counted_bins) : nullptr,
       .sampled = sampled,
       .bins = bins,
       .table = static_cast<BinPair*>(table.data_ptr()),
       .stream = device.stream()});
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lovasz_histogram_weigh(
    const Tensor& logits, const Tensor& counts, std::optional<Tensor> recounted_mask, std::optional<Tensor> recounts,
    std::optional<Tensor> recounted_table, const Tensor& largest, const Tensor& table, std::optional<Tensor> selected,
    bool present, std::optional<Tensor> class_weight, int64_t errors, bool per_image, int64_t reduction, bool upcast_loss,
    bool again) {
  const Op op("lovasz_histogram_weigh");
  const SegmentBatch batch = segment_batch(op, logits, errors, per_image);
  const Device device(logits);
  const int64_t rows = batch.rows(), classes = batch.classes(), segments = batch.segments(), bins = BinLayout::bins(classes);
  const SegmentLossTensors out(logits, batch, op.reduction(reduction), upcast_loss);
  const Tensor weights = empty(logits, {rows, classes, 2, bins}, opmath_type_of(logits));
  const Tensor bounds = empty(logits, {rows, classes}, ScalarType::Double);
  const Tensor needs_rebin = empty(logits, {rows, classes}, ScalarType::Bool);
  const Tensor better_table = empty(logits, {rows, classes, BinLayout::table, 2}, ScalarType::Float);
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_histogram_weigh_scratch_bytes(batch));
  op.check(recounted_mask.has_value() == recounts.has_value() && recounts.has_value() == recounted_table.has_value(),
           "recounted_mask", recounted_mask.has_value(), "given with recounts and recounted_table, or without them");
  const BinCounts first = counts_data(op, "counts", counts, segments, bins);
  const BinCounts second = recounts ? counts_data(op, "recounts", *recounts, segments, bins) : first;
  op.check(first.is_int64 == second.is_int64, "recounts", recounts.value_or(counts), "of the type of counts");
  kernels::lovasz_histogram_weigh(
      {.batch = batch,
       .selection = segment_selection(op, batch, selected, present),
       .bins = bins,
       .counts = first,
       .recounted_mask =
           op.data<const bool>("recounted_mask", recounted_mask, segments, DType::u8, "[rows, C] bool, contiguous"),
       .recounts = second,
       .recounted_table = recounted_table ? table_data(op, "recounted_table", *recounted_table, segments, bins) : nullptr,
       .largest =
           op.data<const uint32_t>("largest", largest, segments, DType::i32, "[rows, C] int32, contiguous, of a counting pass"),
       .table = table_data(op, "table", table, segments, bins),
       .out = out.output(op, batch, class_weight),
       .weights = weights.data_ptr(),
       .bounds = static_cast<double*>(bounds.data_ptr()),
       .needs_rebin = static_cast<bool*>(needs_rebin.data_ptr()),
       .again = again,
       .better_table = static_cast<BinPair*>(better_table.data_ptr()),
       .scratch = scratch.data_ptr(),
       .stream = device.stream()});
  return {out.loss, out.scale, weights, bounds, needs_rebin, better_table};
}

Tensor lovasz_histogram_sum(const Tensor& logits, const Tensor& target, const Tensor& table, const Tensor& weights,
                            const Tensor& units, int64_t errors, bool per_image, std::optional<int64_t> ignore_index,
                            std::optional<int64_t> background_index, std::optional<int64_t> upsample) {
  const Op op("lovasz_histogram_sum");
  const SegmentBatch batch = segment_batch(op, logits, target, errors, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const int64_t bins = BinLayout::bins(batch.classes());
  op.check(batch.errors != Errors::softmax, "errors", errors,
           "1 (probabilities) or 2 (hinge): that of a softmax follows from counts");
  const Tensor sums = empty(logits, {batch.rows(), batch.classes()}, ScalarType::Long);
  kernels::lovasz_histogram_sum(
      {.batch = batch,
       .bins = bins,
       .table = table_data(op, "table", table, batch.segments(), bins),
       .weights = weights_data(op, batch, weights),
       .units = op.data<const double>("units", units, batch.segments(), DType::f64, "[rows, C] float64, contiguous"),
       .sums = static_cast<int64_t*>(sums.data_ptr()),
       .stream = device.stream()});
  return sums;
}

Tensor lovasz_histogram_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& table,
                                 const Tensor& weights, const Tensor& scale, int64_t errors, bool per_image,
                                 std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                 int64_t reduction, std::optional<int64_t> upsample) {
  const Op op("lovasz_histogram_backward");
  const SegmentBatch batch = segment_batch(op, logits, target, errors, per_image, ignore_index, background_index, upsample);
  const Device device(logits);
  const int64_t bins = BinLayout::bins(batch.classes());
  const SegmentGradientTensors out(grad, logits, batch);
  kernels::lovasz_histogram_backward({.batch = batch,
                                      .bins = bins,
                                      .table = table_data(op, "table", table, batch.segments(), bins),
                                      .weights = weights_data(op, batch, weights),
                                      .out = out.output(op, batch, scale, reduction),
                                      .terms = {},
                                      .stream = device.stream()});
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("lovasz_histogram_count", TORCH_BOX(&lovasz_histogram_count));
  m.impl("lovasz_histogram_place", TORCH_BOX(&lovasz_histogram_place));
  m.impl("lovasz_histogram_weigh", TORCH_BOX(&lovasz_histogram_weigh));
  m.impl("lovasz_histogram_sum", TORCH_BOX(&lovasz_histogram_sum));
  m.impl("lovasz_histogram_backward", TORCH_BOX(&lovasz_histogram_backward));
}

}  // namespace veerloss
