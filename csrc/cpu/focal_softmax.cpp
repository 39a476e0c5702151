// Softmax focal loss on the CPU, of logits as large as the target.

#include "focal_softmax.h"

#include <stdexcept>

namespace veerloss {

int64_t kernels::softmax_focal_scratch_bytes(const SoftmaxFocalInput&) {
  return 0;
}

void kernels::softmax_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, Stream) {
  if (input.upsample) throw std::runtime_error("veerloss: on a CPU upsampled_focal_forward takes logits of low resolution");
  focal_forward<SoftmaxFocal>(input, out);
}

void kernels::softmax_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream) {
  if (input.upsample) throw std::runtime_error("veerloss: on a CPU upsampled_focal_forward takes logits of low resolution");
  focal_backward<SoftmaxFocal>(input, out);
}

}  // namespace veerloss
