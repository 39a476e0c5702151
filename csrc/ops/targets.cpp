// Operator `count_not_ignored`: how many pixels of a target have another value than the one to ignore. On the CPU alone, where
// the answer chooses a method and sizes what is allocated; on a GPU the host would have to wait for it.

#include <atomic>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/rows.h"
#include "device.h"

namespace veerloss {
namespace {

int64_t count_not_ignored(const Tensor& target, int64_t ignore_index) {
  const Op op("count_not_ignored");
  op.check(on_device(target) && target.dim() == 2 && dtype_of(target).has_value(), "target", target, "[N, P] on the CPU");
  const View view = view_of(target);
  const bool points = target.size(1) == 1;
  const Geometry g{points ? 1 : target.size(0), 1, points ? target.size(0) : target.size(1)};
  const TargetRule rule{.classes = 1, .has_ignore = true, .ignore = ignore_index};
  constexpr int64_t block = 4096;
  const int64_t pixels = g.images * g.pixels;
  std::atomic<int64_t> total{0};
  parallel_for((pixels + block - 1) / block, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> label(block);
    int64_t count = 0;
    for (int64_t k = begin; k < end; ++k) {
      const Run run{k * block, std::min(block, pixels - k * block)};
      load_labels(label.data(), view, g, rule, run);
      count += count_pixels(label.data(), run.count);
    }
    total += count;
  });
  return total;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("count_not_ignored", TORCH_BOX(&count_not_ignored));
}

}  // namespace veerloss
