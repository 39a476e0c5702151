// The loss of a batch from the losses of its segments, the last step of both methods.
#pragma once

#include "../device.cuh"
#include "../tuning.cuh"

namespace veerloss {

// Of one segment. Bound and deviations are what binning costs (math/bins.h), 0 for method "exact".
struct SegmentResult {
  double loss, bound, gradient_deviation, loss_deviation;
  bool takes_part;
};

// Of all segments, in scratch memory.
struct SegmentResults {
  SegmentResult* results;  // [segments]
  int32_t* in_mean = nullptr;  // [rows]: how many segments take part; zeros before. Null: it is counted at the end

  __device__ void store(int64_t row, int64_t segment, const SegmentResult& result) const {
    results[segment] = result;
    if (result.takes_part) atomicAdd(in_mean + row, 1);
  }
};

// What method "histogram" has besides the loss, both [segments]; null for method "exact".
struct BinningErrors {
  double* bounds = nullptr;
  bool* needs_rebin = nullptr;
};

// One block.
template <class T>
__global__ void __launch_bounds__(Tuning::Finish::threads)
    lovasz_finish_kernel(SegmentResults segments, int64_t rows, int64_t classes, LovaszLoss out, BinningErrors binning) {
  constexpr int threads = Tuning::Finish::threads;
  __shared__ double scratch[threads];
  const bool reduces = out.reduction != Reduction::none, is_mean = out.reduction == Reduction::mean;
  const auto in_mean_of = [&](int64_t row) {
    if (segments.in_mean) return segments.in_mean[row];
    int32_t count = 0;
    for (int64_t c = 0; c < classes; ++c) count += segments.results[row * classes + c].takes_part;
    return count;
  };
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < rows * classes; i += threads) {
    const SegmentResult result = segments.results[i];
    const int64_t row = i / classes, c = i % classes;
    const double in_mean = result.takes_part ? static_cast<double>(in_mean_of(row)) : 0.0;
    double factor = result.takes_part ? 1.0 : 0.0;
    if (result.takes_part && out.class_weight) factor = static_cast<double>(static_cast<const T*>(out.class_weight)[c]);
    if (result.takes_part && is_mean) factor /= in_mean * static_cast<double>(rows);
    const double loss = result.takes_part ? factor * result.loss : 0.0;
    sum += loss;
    static_cast<T*>(out.scale)[i] = static_cast<T>(factor);
    if (!reduces) store_element(out.loss, out.loss_dtype, i, loss);
    if (binning.bounds) binning.bounds[i] = result.takes_part ? result.bound : 0.0;
    if (binning.needs_rebin)
      binning.needs_rebin[i] =
          result.takes_part && (result.gradient_deviation > gradient_tolerance ||
                                result.loss_deviation > loss_tolerance * sqrt(in_mean));
  }
  sum = block_sum<threads>(sum, scratch);
  if (threadIdx.x == 0 && reduces) store_element(out.loss, out.loss_dtype, 0, sum);
}

template <class T>
void launch_finish(const LovaszBatch& batch, const SegmentResults& segments, const LovaszLoss& out,
                   const BinningErrors& binning, Stream stream) {
  launch(lovasz_finish_kernel<T>, {.blocks = 1, .threads = Tuning::Finish::threads, .stream = stream}, segments, batch.rows(),
         batch.classes(), out, binning);
}

}  // namespace veerloss
