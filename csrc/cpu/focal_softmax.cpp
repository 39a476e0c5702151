// Softmax focal loss on the CPU.

#include "focal_softmax.h"

namespace veerloss {

int64_t kernels::softmax_focal_scratch_bytes(const SoftmaxFocalInput&) {
  return 0;
}

void kernels::softmax_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, Stream) {
  if (input.upsample) return upsampled_focal_forward(input, out, {});
  focal_forward<SoftmaxFocal>(input, out);
}

void kernels::softmax_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream) {
  if (input.upsample) return upsampled_focal_backward(input, out);
  focal_backward<SoftmaxFocal>(input, out);
}

}  // namespace veerloss
