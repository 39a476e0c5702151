// The loss of a batch from the losses of its segments, the last step of both methods.
#pragma once

#include "../device.cuh"
#include "../tuning.cuh"

namespace veerloss {

// Of one segment.
struct SegmentResult {
  double loss;
  bool takes_part;
};

// One block.
template <class T>
__global__ void __launch_bounds__(Tuning::Finish::threads)
    lovasz_finish_kernel(const SegmentResult* results, int64_t rows, int64_t classes, LovaszLoss out) {
  constexpr int threads = Tuning::Finish::threads;
  __shared__ double scratch[threads];
  const bool reduces = out.reduction != Reduction::none, is_mean = out.reduction == Reduction::mean;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < rows * classes; i += threads) {
    const SegmentResult result = results[i];
    const int64_t row = i / classes, c = i % classes;
    int32_t in_mean = 0;
    for (int64_t k = 0; is_mean && k < classes; ++k) in_mean += results[row * classes + k].takes_part;
    double factor = result.takes_part ? 1.0 : 0.0;
    if (result.takes_part && out.class_weight) factor = static_cast<double>(static_cast<const T*>(out.class_weight)[c]);
    if (result.takes_part && is_mean) factor /= static_cast<double>(in_mean) * static_cast<double>(rows);
    const double loss = result.takes_part ? factor * result.loss : 0.0;
    sum += loss;
    static_cast<T*>(out.scale)[i] = static_cast<T>(factor);
    if (!reduces) store_element(out.loss, out.loss_dtype, i, loss);
  }
  sum = block_sum<threads>(sum, scratch);
  if (threadIdx.x == 0 && reduces) store_element(out.loss, out.loss_dtype, 0, sum);
}

template <class T>
void launch_finish(const LovaszBatch& batch, const SegmentResult* results, const LovaszLoss& out, Stream stream) {
  launch(lovasz_finish_kernel<T>, {.blocks = 1, .threads = Tuning::Finish::threads, .stream = stream}, results, batch.rows(),
         batch.classes(), out);
}

}  // namespace veerloss
