// Operators of method "histogram" of the Lovász losses: its steps, which veerloss/_histogram.py puts together; schemas in
// veerloss/ops.py.

#include <tuple>

#include "lovasz.h"

namespace veerloss {
namespace {

// A table with the bins of every cell. On the CPU its entries are checked; on a GPU they are taken as they are.
const uint32_t* table_data(const Op& op, const char* argument, const Tensor& table, int64_t segments, const BinLayout& layout) {
  const auto* entries =
      op.data<const uint32_t>(argument, table, segments * layout.cells, DType::i32, "[rows, C, cells] int32, contiguous");
#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
  bool valid = true;
  for (int64_t i = 0; i < segments * layout.cells; ++i) {
    const uint32_t first = entry_first_bin(entries[i]), bins = entry_bins(entries[i]);
    valid &= first + bins <= static_cast<uint32_t>(layout.bins) && bins > 0 && bins < (1u << 15);
  }
  op.check(valid, argument, table, "of entries that lie within the bins");
#endif
  return entries;
}

BinCounts counts_data(const Op& op, const Tensor& counts, int64_t segments, int64_t bins) {
  const auto dtype = dtype_of(counts);
  op.check(on_device(counts) && counts.is_contiguous() && counts.numel() == 2 * segments * bins &&
               (dtype == DType::i32 || dtype == DType::i64),
           "counts", counts, "[rows, C, 2, bins] int32 or int64, contiguous, of a counting pass");
  return {counts.data_ptr(), dtype == DType::i64};
}

BinWeightsInput bin_weights(const Op& op, const LovaszBatch& b, const Tensor& weights, const Tensor& max_weight) {
  const BinLayout layout(b.errors);
  return {
      op.data<const void>("weights", weights, b.segments() * 2 * layout.bins, opmath_of(b), "the weights of the forward pass"),
      op.data<const void>("max_weight", max_weight, b.segments() * 2, opmath_of(b), "the max_weight of the forward pass")};
}

std::tuple<Tensor, Tensor> lovasz_histogram_count(const Tensor& logits, const Tensor& target, std::optional<Tensor> table,
                                                  std::optional<Tensor> segment_mask, int64_t errors, bool per_image,
                                                  std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                                  bool sampled) {
  const Op op("lovasz_histogram_count");
  const LovaszBatch batch = lovasz_batch(op, logits, target, errors, per_image, ignore_index, background_index);
  const Device device(logits);
  const BinLayout layout(batch.errors);
  const int64_t bins = table ? layout.bins : layout.coarse_bins;
  const Tensor counts = zeros(logits, {batch.rows(), batch.classes(), 2, bins}, ScalarType::Int);
  const Tensor max_error = empty(logits, {batch.rows(), batch.classes(), 2}, ScalarType::Double);
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_histogram_scratch_bytes(batch, !table, sampled));
  kernels::lovasz_histogram_count({.batch = batch,
                                   .table = table ? table_data(op, "table", *table, batch.segments(), layout) : nullptr,
                                   .segment_mask = op.data<const bool>("segment_mask", segment_mask, batch.segments(),
                                                                       DType::u8, "[rows, C] bool, contiguous"),
                                   .sampled = sampled,
                                   .counts = static_cast<int32_t*>(counts.data_ptr()),
                                   .max_error = static_cast<double*>(max_error.data_ptr()),
                                   .scratch = scratch.data_ptr(),
                                   .stream = device.stream()});
  return {counts, max_error};
}

Tensor lovasz_histogram_allocate_bins(const Tensor& counts, std::optional<Tensor> counted_table, int64_t errors) {
  const Op op("lovasz_histogram_allocate_bins");
  const BinLayout layout(op.errors(errors));
  op.check(on_device(counts) && counts.dim() == 4, "counts", counts, "[rows, C, 2, bins]");
  const Device device(counts);
  const int64_t segments = counts.size(0) * counts.size(1);
  const BinCounts data = counts_data(op, counts, segments, counted_table ? layout.bins : layout.coarse_bins);
  const Tensor table = empty(counts, {counts.size(0), counts.size(1), layout.cells}, ScalarType::Int);
  kernels::lovasz_histogram_allocate_bins(
      {.errors = static_cast<Errors>(errors),
       .segments = segments,
       .counts = data,
       .counted_table = counted_table ? table_data(op, "counted_table", *counted_table, segments, layout) : nullptr,
       .table = static_cast<uint32_t*>(table.data_ptr()),
       .stream = device.stream()});
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lovasz_histogram_weigh(
    const Tensor& logits, const Tensor& counts, const Tensor& max_error, const Tensor& table, std::optional<Tensor> selected,
    bool present, std::optional<Tensor> class_weight, int64_t errors, bool per_image, int64_t reduction, bool upcast_loss) {
  const Op op("lovasz_histogram_weigh");
  const LovaszBatch batch = lovasz_batch(op, logits, errors, per_image);
  const Device device(logits);
  const BinLayout layout(batch.errors);
  const int64_t rows = batch.rows(), classes = batch.classes();
  const ScalarType type = opmath_type_of(logits);
  const LovaszLossTensors out(logits, batch, op.reduction(reduction), upcast_loss);
  const Tensor weights = empty(logits, {rows, classes, 2, layout.bins}, type);
  const Tensor max_weight = empty(logits, {rows, classes, 2}, type);
  const Tensor bounds = empty(logits, {rows, classes}, ScalarType::Double);
  const Tensor needs_rebin = empty(logits, {rows, classes}, ScalarType::Bool);
  const Tensor scratch = scratch_memory(logits, kernels::lovasz_histogram_weigh_scratch_bytes(batch));
  kernels::lovasz_histogram_weigh({.batch = batch,
                                   .selection = lovasz_selection(op, batch, selected, present),
                                   .counts = counts_data(op, counts, batch.segments(), layout.bins),
                                   .max_error = op.data<const double>("max_error", max_error, 2 * batch.segments(), DType::f64,
                                                                      "[rows, C, 2] float64, contiguous, of a counting pass"),
                                   .table = table_data(op, "table", table, batch.segments(), layout),
                                   .out = out.output(op, batch, class_weight),
                                   .weights = {weights.data_ptr(), max_weight.data_ptr()},
                                   .bounds = static_cast<double*>(bounds.data_ptr()),
                                   .needs_rebin = static_cast<bool*>(needs_rebin.data_ptr()),
                                   .scratch = scratch.data_ptr(),
                                   .stream = device.stream()});
  return {out.loss, out.scale, weights, max_weight, bounds, needs_rebin};
}

Tensor lovasz_histogram_sum(const Tensor& logits, const Tensor& target, const Tensor& table, const Tensor& weights,
                            const Tensor& max_weight, const Tensor& units, int64_t errors, bool per_image,
                            std::optional<int64_t> ignore_index, std::optional<int64_t> background_index) {
  const Op op("lovasz_histogram_sum");
  const LovaszBatch batch = lovasz_batch(op, logits, target, errors, per_image, ignore_index, background_index);
  const Device device(logits);
  op.check(batch.errors != Errors::softmax, "errors", errors, "1 (probabilities) or 2 (hinge): those of a softmax are bounded");
  const Tensor sums = empty(logits, {batch.rows(), batch.classes()}, ScalarType::Long);
  kernels::lovasz_histogram_sum(
      {.batch = batch,
       .table = table_data(op, "table", table, batch.segments(), BinLayout(batch.errors)),
       .weights = bin_weights(op, batch, weights, max_weight),
       .units = op.data<const double>("units", units, batch.segments(), DType::f64, "[rows, C] float64, contiguous"),
       .sums = static_cast<int64_t*>(sums.data_ptr()),
       .stream = device.stream()});
  return sums;
}

Tensor lovasz_histogram_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& table,
                                 const Tensor& weights, const Tensor& max_weight, const Tensor& scale, int64_t errors,
                                 bool per_image, std::optional<int64_t> ignore_index, std::optional<int64_t> background_index,
                                 int64_t reduction) {
  const Op op("lovasz_histogram_backward");
  const LovaszBatch batch = lovasz_batch(op, logits, target, errors, per_image, ignore_index, background_index);
  const Device device(logits);
  const LovaszGradientTensors out(grad, logits);
  kernels::lovasz_histogram_backward({.batch = batch,
                                      .table = table_data(op, "table", table, batch.segments(), BinLayout(batch.errors)),
                                      .weights = bin_weights(op, batch, weights, max_weight),
                                      .out = out.output(op, batch, scale, reduction),
                                      .stream = device.stream()});
  return out.grad_logits;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("lovasz_histogram_count", TORCH_BOX(&lovasz_histogram_count));
  m.impl("lovasz_histogram_allocate_bins", TORCH_BOX(&lovasz_histogram_allocate_bins));
  m.impl("lovasz_histogram_weigh", TORCH_BOX(&lovasz_histogram_weigh));
  m.impl("lovasz_histogram_sum", TORCH_BOX(&lovasz_histogram_sum));
  m.impl("lovasz_histogram_backward", TORCH_BOX(&lovasz_histogram_backward));
}

}  // namespace veerloss
