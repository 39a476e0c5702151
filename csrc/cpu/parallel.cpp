#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace veerloss {

int64_t num_threads() {
  return static_cast<int64_t>(torch::stable::get_num_threads());
}

void parallel_for(int64_t count, void (*body)(const void* context, int64_t begin, int64_t end), const void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace veerloss
