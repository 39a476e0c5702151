// Sigmoid focal loss on the CPU.

#include "focal_sigmoid.h"

namespace veerloss {

int64_t kernels::sigmoid_focal_scratch_bytes(const SigmoidFocalInput&) {
  return 0;
}

void kernels::sigmoid_focal_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream) {
  if (input.upsample) return upsampled_focal_forward(input, out, {});
  focal_forward<SigmoidFocal>(input, out);
}

void kernels::sigmoid_focal_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream) {
  if (input.upsample) return upsampled_focal_backward(input, out);
  focal_backward<SigmoidFocal>(input, out);
}

}  // namespace veerloss
