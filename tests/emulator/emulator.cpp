// The parts of the emulator that are not templates: the switch of fibers, and a sort in CUB's place.

#include "emulator.h"

#include <algorithm>
#include <numeric>

#include "../../csrc/cuda/launch.h"

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
namespace {

template <class Word>
void sort(const void* keys, void* sorted_keys, const uint32_t* values, uint32_t* sorted_values, int64_t length,
          int64_t segments, int bits) {
  const Word mask = (Word(1) << bits) - 1;
  const auto* in = static_cast<const Word*>(keys);
  auto* out = static_cast<Word*>(sorted_keys);
  std::vector<int64_t> order(static_cast<size_t>(length));
  for (int64_t base = 0; base < length * segments; base += length) {
    std::iota(order.begin(), order.end(), base);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return (in[a] & mask) > (in[b] & mask); });
    for (int64_t i = 0; i < length; ++i) {
      out[base + i] = in[order[i]];
      sorted_values[base + i] = values[order[i]];
    }
  }
}

}  // namespace

size_t sort_pairs(void* scratch, size_t, bool wide, const void* keys, void* sorted_keys, const uint32_t* values,
                  uint32_t* sorted_values, int64_t length, int64_t segments, int bits, cudaStream_t) {
  if (!scratch) return 1;
  (wide ? sort<uint64_t> : sort<uint32_t>)(keys, sorted_keys, values, sorted_values, length, segments, bits);
  return 1;
}

}  // namespace veerloss
