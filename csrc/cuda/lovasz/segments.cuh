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

// Those of all, as they are.
struct SegmentResults {
  const SegmentResult* results;

  __device__ bool takes_part(int64_t segment) const { return results[segment].takes_part; }
  __device__ double loss(int64_t segment) const { return results[segment].loss; }
};

// One block. Results: a SegmentResults, or what has the same functions; `loss` is called once for each segment.
template <class T, class Results>
__global__ void __launch_bounds__(Tuning::Finish::threads, 1)
    lovasz_finish_kernel(Results results, int64_t rows, int64_t classes, SegmentLoss out) {
  constexpr int threads = Tuning::Finish::threads;
  __shared__ double scratch[threads];
  __shared__ int in_mean[threads];  // of a row, how many segments take part
  const bool reduces = out.reduction != Reduction::none, is_mean = out.reduction == Reduction::mean;
  double sum = 0.0;
  for (int64_t first = 0; first < rows; first += threads) {
    const int64_t begin = first * classes, end = (first + threads < rows ? first + threads : rows) * classes;
    in_mean[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; is_mean && i < end; i += threads)
      if (results.takes_part(i)) atomicAdd(&in_mean[i / classes - first], 1);
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
      const double loss = results.loss(i);
      double factor = 0.0;
      if (results.takes_part(i)) {
        factor = out.class_weight ? static_cast<double>(static_cast<const T*>(out.class_weight)[i % classes]) : 1.0;
        if (is_mean) factor /= static_cast<double>(in_mean[i / classes - first]) * static_cast<double>(rows);
      }
      const double scaled = results.takes_part(i) ? factor * loss : 0.0;
      sum += scaled;
      static_cast<T*>(out.scale)[i] = static_cast<T>(factor);
      if (!reduces) store_element(out.loss, out.loss_dtype, i, scaled);
    }
    __syncthreads();
  }
  sum = block_sum<threads>(sum, scratch);
  if (threadIdx.x == 0 && reduces) store_element(out.loss, out.loss_dtype, 0, sum);
}

template <class T, class Results>
void launch_finish(const SegmentBatch& batch, const Results& results, const SegmentLoss& out, Stream stream) {
  launch(lovasz_finish_kernel<T, Results>, {.blocks = 1, .threads = Tuning::Finish::threads, .stream = stream}, results,
         batch.rows(), batch.classes(), out);
}

}  // namespace veerloss
