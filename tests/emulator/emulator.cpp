// The parts of the emulator that are compiled once: the switch of fibers, and a sort in place of csrc/cuda/lovasz/sort.cu.

#include <algorithm>
#include <numeric>
#include <vector>

#include "../../csrc/cuda/lovasz/sort.h"

#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64"
#endif

// Keeps the registers that a function may not change on the stack, and goes on with another stack.
asm(R"(
.text
.globl veerloss_switch_fiber
.type veerloss_switch_fiber, @function
veerloss_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size veerloss_switch_fiber, .-veerloss_switch_fiber
)");

namespace veerloss {

template <class Word>
int64_t sort_scratch_bytes(const SortedSegments&) {
  return 1;
}

template <class Word>
void sort_pairs(const SortPairs<Word>& args) {
  constexpr Word mask = ~(Word(1) << (8 * sizeof(Word) - 1));
  const auto [segments, length] = args.shape;
  std::vector<int64_t> order(static_cast<size_t>(length));
  for (int64_t base = 0; base < segments * length; base += length) {
    std::iota(order.begin(), order.end(), base);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return (args.keys[a] & mask) > (args.keys[b] & mask); });
    for (int64_t i = 0; i < length; ++i) {
      args.sorted_keys[base + i] = args.keys[order[i]];
      args.sorted_values[base + i] = args.values[order[i]];
    }
  }
}

template int64_t sort_scratch_bytes<uint32_t>(const SortedSegments&);
template int64_t sort_scratch_bytes<uint64_t>(const SortedSegments&);
template void sort_pairs<uint32_t>(const SortPairs<uint32_t>&);
template void sort_pairs<uint64_t>(const SortPairs<uint64_t>&);

}  // namespace veerloss
