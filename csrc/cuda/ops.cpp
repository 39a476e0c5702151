// The CUDA operators of the Lovász losses, for the schemas in veerloss/ops.py: checks, memory, stream, registration. Nothing
// here waits for the device, and all memory comes from PyTorch's allocator.

#include <tuple>
#include <vector>

#include "../bins.h"
#include "../segments.h"
#include "launch.h"

#if !defined(VEERLOSS_EMULATED)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace veerloss {
namespace {

#if defined(VEERLOSS_EMULATED)
struct CurrentStream {
  explicit CurrentStream(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// The device of a tensor made current, and its current stream.
struct CurrentStream {
  explicit CurrentStream(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};
#endif

Tensor scratch_memory(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

Batch batch_of(const Tensor& logits, Errors errors, bool per_image) {
  require(logits.dim() == 3 && logits.size(1) > 0, "logits [N, C, P] with a class");
  require(errors != Errors::hinge || logits.size(1) == 1, "logits [N, 1, P]");
  const Geometry g = segment_geometry(logits, per_image);
  (void)Segments(g, per_image);  // raises for one that is too long
  return {view_of(logits), View{}, g, TargetRule{}, errors, per_image};
}

Batch batch_of(const Tensor& logits, const Tensor& target, Errors errors, bool per_image, std::optional<int64_t> ignore_index) {
  Batch b = batch_of(logits, errors, per_image);
  check_like(target, logits, false, "a target [N, P] for logits [N, C, P]");
  b.y = view_of(target);
  b.rule = {errors == Errors::hinge ? 2 : b.g.channels, ignore_index.has_value(), ignore_index.value_or(0)};
  return b;
}

template <class T>
Selection selection_of(const Options& o, int64_t classes) {
  const T* class_weight =
      o.class_weight ? arithmetic_data<T>(*o.class_weight, classes, "class_weight with one value per class, contiguous")
                     : nullptr;
  return {reinterpret_cast<const bool*>(o.selected), o.present, class_weight, o.reduction == Reduction::mean};
}

// The factors keep a contiguous gradient alive in `kept`.
Factors factors_of(const Tensor& grad, const Tensor& scale, const Batch& b, Reduction reduction, Tensor& kept) {
  require(on_device(scale) && scale.is_contiguous() && scale.numel() == b.segments() &&
              dtype_of(scale) == (b.x.dtype == DType::f64 ? DType::f64 : DType::f32),
          "the scale of the forward pass");
  const bool one = reduction != Reduction::none;
  require(on_device(grad) && grad.numel() == (one ? 1 : b.segments()), "a gradient of the shape of the loss");
  kept = torch::stable::contiguous(grad);
  return {kept.data_ptr(), dtype_of(kept), one, scale.data_ptr()};
}

LossOutput loss_output(const Tensor& loss, const Tensor& scale, Reduction reduction) {
  return {loss.data_ptr(), dtype_of(loss), reduction != Reduction::none, scale.data_ptr(), nullptr, nullptr};
}

// ---- method "exact"

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const Options& o) {
  const CurrentStream current(logits);
  const Batch b = batch_of(logits, target, o.errors, o.per_image, o.ignore_index);
  const Segments s(b.g, o.per_image);
  Tensor weights = torch::stable::new_empty(logits, {logits.size(1), logits.size(0), logits.size(2)}, scalar_type_of<T>());
  Tensor loss = torch::stable::new_empty(logits, o.loss_shape(s), loss_type<T>(logits, o.wide));
  Tensor scale = torch::stable::new_empty(logits, o.scale_shape(s), scalar_type_of<T>());
  const Tensor scratch = scratch_memory(logits, lovasz_scratch_bytes(b, sizeof(T) == 8));
  launch_lovasz_forward(b, selection_of<T>(o, s.classes), loss_output(loss, scale, o.reduction), weights.data_ptr(), o.keep,
                        scratch.data_ptr(), current.stream);
  return {loss, scale, o.keep ? weights : torch::stable::new_empty(logits, {0}, scalar_type_of<T>())};
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale, Errors errors,
                bool per_image, Reduction reduction) {
  const CurrentStream current(logits);
  Batch b = batch_of(logits, errors, per_image);
  const T* weight = arithmetic_data<T>(weights, logits.numel(), "the weights of a forward pass with keep=True");
  // The weights know their labels, so any will do: one byte that all pixels share.
  const Tensor label = torch::stable::new_zeros(logits, {1}, ScalarType::Byte);
  b.y = {static_cast<char*>(label.data_ptr()), DType::u8, 0, 0, 0};
  b.rule = {2, false, 0};
  Tensor kept = grad, grad_logits = torch::stable::empty_like(logits);
  launch_lovasz_backward(b, factors_of(grad, scale, b, reduction, kept), weight, view_of(grad_logits), current.stream);
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor> lovasz_softmax_forward(const Tensor& logits, const Tensor& target,
                                                          std::optional<Tensor> selected, bool present, bool per_image,
                                                          std::optional<Tensor> class_weight,
                                                          std::optional<int64_t> ignore_index, bool from_logits,
                                                          int64_t reduction, bool keep, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return forward<decltype(zero)>(
        logits, target,
        {from_logits ? Errors::softmax : Errors::probabilities, per_image, ignore_index, static_cast<Reduction>(reduction),
         keep, wide, present, class_flags(selected, logits), class_weight});
  });
}

Tensor lovasz_softmax_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale,
                               bool per_image, bool from_logits, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return backward<decltype(zero)>(grad, logits, weights, scale, from_logits ? Errors::softmax : Errors::probabilities,
                                    per_image, static_cast<Reduction>(reduction));
  });
}

std::tuple<Tensor, Tensor, Tensor> lovasz_hinge_forward(const Tensor& logits, const Tensor& target, bool per_image,
                                                        std::optional<int64_t> ignore_index, int64_t reduction, bool keep,
                                                        bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return forward<decltype(zero)>(
        logits, target,
        {Errors::hinge, per_image, ignore_index, static_cast<Reduction>(reduction), keep, wide, false, nullptr, std::nullopt});
  });
}

Tensor lovasz_hinge_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale,
                             bool per_image, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return backward<decltype(zero)>(grad, logits, weights, scale, Errors::hinge, per_image, static_cast<Reduction>(reduction));
  });
}

// ---- method "histogram"

// A table with the bins of every cell. Its entries are on the device and taken as they are.
const int32_t* table_data(const Tensor& table, int64_t segments, const BinLayout& layout) {
  require(
      on_device(table) && table.is_contiguous() && table.numel() == segments * layout.cells && dtype_of(table) == DType::i32,
      "a table with the bins of every cell of every segment");
  return static_cast<const int32_t*>(table.data_ptr());
}

void check_counts(const Tensor& counts, int64_t segments, int64_t bins) {
  require(on_device(counts) && counts.is_contiguous() && counts.numel() == 2 * segments * bins &&
              (dtype_of(counts) == DType::i32 || dtype_of(counts) == DType::i64),
          "counts of a counting pass");
}

std::tuple<Tensor, Tensor> lovasz_histogram_count(const Tensor& logits, const Tensor& target, std::optional<Tensor> table,
                                                  std::optional<Tensor> wanted, int64_t errors, bool per_image,
                                                  std::optional<int64_t> ignore_index, bool sampled) {
  return with_arithmetic_type(logits, [&](auto) {
    const CurrentStream current(logits);
    const Batch b = batch_of(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    const BinLayout layout(b.errors);
    require(!wanted || (on_device(*wanted) && wanted->is_contiguous() && wanted->numel() == b.segments() &&
                        dtype_of(*wanted) == DType::u8),
            "wanted with one bool per segment");
    const int64_t bins = table ? layout.bins : layout.coarse_bins;
    Tensor counts = torch::stable::new_zeros(logits, {b.rows(), b.g.channels, 2, bins}, ScalarType::Int);
    Tensor largest = torch::stable::new_empty(logits, {b.rows(), b.g.channels, 2}, ScalarType::Double);
    const Tensor scratch = scratch_memory(logits, histogram_scratch_bytes(b, !table, sampled));
    launch_histogram_count(b, table ? table_data(*table, b.segments(), layout) : nullptr,
                           wanted ? static_cast<const bool*>(wanted->data_ptr()) : nullptr, sampled,
                           static_cast<int32_t*>(counts.data_ptr()), static_cast<double*>(largest.data_ptr()),
                           scratch.data_ptr(), current.stream);
    return std::tuple<Tensor, Tensor>{counts, largest};
  });
}

Tensor lovasz_histogram_place(const Tensor& counts, std::optional<Tensor> fine, int64_t errors) {
  const CurrentStream current(counts);
  const BinLayout layout(static_cast<Errors>(errors));
  require(counts.dim() == 4, "counts of a counting pass");
  const int64_t segments = counts.size(0) * counts.size(1);
  check_counts(counts, segments, fine ? layout.bins : layout.coarse_bins);
  Tensor table = torch::stable::new_empty(counts, {counts.size(0), counts.size(1), layout.cells}, ScalarType::Int);
  launch_histogram_place(static_cast<Errors>(errors), segments, counts.data_ptr(), dtype_of(counts) == DType::i64,
                         fine ? table_data(*fine, segments, layout) : nullptr, static_cast<int32_t*>(table.data_ptr()),
                         current.stream);
  return table;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lovasz_histogram_weigh(
    const Tensor& logits, const Tensor& counts, const Tensor& largest, const Tensor& table, std::optional<Tensor> selected,
    bool present, std::optional<Tensor> class_weight, int64_t errors, bool per_image, int64_t reduction, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const CurrentStream current(logits);
    const Options o{
        static_cast<Errors>(errors),   per_image,   std::nullopt, static_cast<Reduction>(reduction), true, wide, present,
        class_flags(selected, logits), class_weight};
    const Batch b = batch_of(logits, o.errors, per_image);
    const Segments s(b.g, per_image);
    const BinLayout layout(b.errors);
    check_counts(counts, s.count(), layout.bins);
    require(
        on_device(largest) && largest.is_contiguous() && largest.numel() == 2 * s.count() && dtype_of(largest) == DType::f64,
        "the largest errors of a counting pass");
    const auto empty = [&](std::vector<int64_t> shape, ScalarType type) {
      return torch::stable::new_empty(logits, shape, type);
    };
    Tensor loss = empty(o.loss_shape(s), loss_type<T>(logits, wide)), scale = empty(o.scale_shape(s), scalar_type_of<T>());
    Tensor weights = empty({s.rows, s.classes, 2, layout.bins}, scalar_type_of<T>());
    Tensor tops = empty({s.rows, s.classes, 2}, scalar_type_of<T>()), bounds = empty({s.rows, s.classes}, ScalarType::Double);
    Tensor doubtful = empty({s.rows, s.classes}, ScalarType::Bool);
    const Tensor results = scratch_memory(logits, s.count() * static_cast<int64_t>(sizeof(SegmentResult)));
    const Tensor in_mean = empty({s.rows}, ScalarType::Int);
    LossOutput out = loss_output(loss, scale, o.reduction);
    out.bounds = static_cast<double*>(bounds.data_ptr());
    out.doubtful = static_cast<bool*>(doubtful.data_ptr());
    launch_histogram_weigh(b, selection_of<T>(o, s.classes), counts.data_ptr(), dtype_of(counts) == DType::i64,
                           static_cast<const double*>(largest.data_ptr()), table_data(table, s.count(), layout), out,
                           weights.data_ptr(), tops.data_ptr(), static_cast<SegmentResult*>(results.data_ptr()),
                           static_cast<int32_t*>(in_mean.data_ptr()), current.stream);
    return std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>{loss, scale, weights, tops, bounds, doubtful};
  });
}

// The weights and tops of a forward pass, of the right sizes and types.
template <class T>
void check_weights(const Tensor& weights, const Tensor& tops, int64_t segments, const BinLayout& layout) {
  arithmetic_data<T>(weights, segments * layout.bins * 2, "the weights of the forward pass");
  arithmetic_data<T>(tops, segments * 2, "the tops of the forward pass");
}

Tensor lovasz_histogram_sum(const Tensor& logits, const Tensor& target, const Tensor& table, const Tensor& weights,
                            const Tensor& tops, const Tensor& units, int64_t errors, bool per_image,
                            std::optional<int64_t> ignore_index) {
  return with_arithmetic_type(logits, [&](auto zero) {
    const CurrentStream current(logits);
    const Batch b = batch_of(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    const BinLayout layout(b.errors);
    require(b.errors != Errors::softmax, "errors of probabilities or of a hinge");
    check_weights<decltype(zero)>(weights, tops, b.segments(), layout);
    require(on_device(units) && units.is_contiguous() && units.numel() == b.segments() && dtype_of(units) == DType::f64,
            "a unit for every segment");
    Tensor sums = torch::stable::new_empty(logits, {b.rows(), b.g.channels}, ScalarType::Long);
    launch_histogram_sum(b, table_data(table, b.segments(), layout), weights.data_ptr(), tops.data_ptr(),
                         static_cast<const double*>(units.data_ptr()), static_cast<int64_t*>(sums.data_ptr()), current.stream);
    return sums;
  });
}

Tensor lovasz_histogram_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& table,
                                 const Tensor& weights, const Tensor& tops, const Tensor& scale, int64_t errors, bool per_image,
                                 std::optional<int64_t> ignore_index, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    const CurrentStream current(logits);
    const Batch b = batch_of(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    const BinLayout layout(b.errors);
    check_weights<decltype(zero)>(weights, tops, b.segments(), layout);
    Tensor kept = grad, grad_logits = torch::stable::empty_like(logits);
    launch_histogram_backward(b, factors_of(grad, scale, b, static_cast<Reduction>(reduction), kept),
                              table_data(table, b.segments(), layout), weights.data_ptr(), tops.data_ptr(),
                              view_of(grad_logits), current.stream);
    return grad_logits;
  });
}

}  // namespace

#if defined(VEERLOSS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(veerloss_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(veerloss, CUDA, m) {
#endif
  m.impl("lovasz_softmax_forward", TORCH_BOX(&lovasz_softmax_forward));
  m.impl("lovasz_softmax_backward", TORCH_BOX(&lovasz_softmax_backward));
  m.impl("lovasz_hinge_forward", TORCH_BOX(&lovasz_hinge_forward));
  m.impl("lovasz_hinge_backward", TORCH_BOX(&lovasz_hinge_backward));
  m.impl("lovasz_histogram_count", TORCH_BOX(&lovasz_histogram_count));
  m.impl("lovasz_histogram_place", TORCH_BOX(&lovasz_histogram_place));
  m.impl("lovasz_histogram_weigh", TORCH_BOX(&lovasz_histogram_weigh));
  m.impl("lovasz_histogram_sum", TORCH_BOX(&lovasz_histogram_sum));
  m.impl("lovasz_histogram_backward", TORCH_BOX(&lovasz_histogram_backward));
}

}  // namespace veerloss
