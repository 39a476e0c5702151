// The end of a focal loss: the loss from the sums of the blocks, in order.

#include "focal.cuh"

namespace veerloss {
namespace {

__global__ void __launch_bounds__(Tuning::Focal::threads)
    focal_finish_kernel(FocalLoss out, FocalPartials partials, int64_t blocks) {
  constexpr int threads = Tuning::Focal::threads;
  __shared__ double scratch[threads];
  double sum = 0, count = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += threads) {
    sum += partials.sums[i];
    count += partials.counts[i];
  }
  sum = block_sum<threads>(sum, scratch);
  count = block_sum<threads>(count, scratch);
  if (threadIdx.x != 0) return;
  double scale = out.factor;
  if (out.normalizer.data) scale /= load_element(out.normalizer.data, out.normalizer.dtype, 0);
  if (out.reduction == Reduction::mean) scale = 1.0 / count;
  if (out.reduction != Reduction::none && count == 0.0) scale = 0.0;  // loss and gradient are 0, whatever the normaliser is
  if (out.reduction != Reduction::none) store_element(out.loss.data, out.loss.dtype, 0, sum * scale);
  store_element(out.scale.data, out.scale.dtype, 0, scale);
}

}  // namespace

void finish_focal_loss(const FocalLoss& out, int64_t blocks, Stream stream) {
  launch(focal_finish_kernel, {.blocks = 1, .threads = Tuning::Focal::threads, .stream = stream}, out,
         FocalPartials(out.scratch, blocks), out.reduction == Reduction::none ? 0 : blocks);
}

}  // namespace veerloss
