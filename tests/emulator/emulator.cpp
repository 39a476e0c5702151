// The part of the emulator that is compiled once: fibers and their turns.

#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "meter.h"

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

namespace emulator {
namespace {

extern "C" void veerloss_switch_fiber(void** save_stack, void* load_stack);

constexpr int max_threads = 1024;
constexpr size_t stack_bytes = 64 * 1024 + 192;  // no multiple of a page: else all stacks would share lines of the caches

void *scheduler_stack = nullptr, *current_stack = nullptr;
const std::function<void()>* current_kernel = nullptr;
bool current_ended = false;
int current_line = 0;  // of the barrier that the current thread has come to; 0: none

unsigned char* stacks() {
  static const std::unique_ptr<unsigned char[]> memory(new unsigned char[max_threads * stack_bytes]);
  return memory.get();
}

void fiber() {
  (*current_kernel)();
  current_ended = true;
  veerloss_switch_fiber(&current_stack, scheduler_stack);
}

void* new_stack(int thread) {
  auto* words = reinterpret_cast<uintptr_t*>(stacks() + (thread + 1) * stack_bytes);
  words[-2] = reinterpret_cast<uintptr_t>(&fiber);  // where the first switch returns to, aligned as after a call
  return words - 2 - 6;                             // below it the saved registers
}

void leave(int line) {
  const Index saved = state.thread;
  current_line = line;
  veerloss_switch_fiber(&current_stack, scheduler_stack);
  state.thread = saved;
}

// `turns`: who goes on until the next barrier, the last first; with `random` in any order.
void run_block(const std::function<void()>& kernel, std::vector<int> turns, std::mt19937* random) {
  static void* saved[max_threads];
  current_kernel = &kernel;
  for (const int t : turns) saved[t] = new_stack(t);
  while (!turns.empty()) {
    int line = 0;
    std::vector<int> waiting;
    while (!turns.empty()) {
      if (random) std::swap(turns.back(), turns[(*random)() % turns.size()]);
      const int t = turns.back();
      state.thread.x = static_cast<unsigned>(t);
      current_ended = false;
      veerloss_switch_fiber(&scheduler_stack, saved[t]);
      saved[t] = current_stack;
      if (!current_ended && current_line == 0) continue;
      turns.pop_back();
      if (current_ended) continue;
      if (line != 0 && line != current_line)
        throw std::runtime_error("emulator: threads of a block wait at different barriers");
      line = current_line;
      waiting.push_back(t);
    }
    meter::end_phase();
    turns.assign(waiting.rbegin(), waiting.rend());
  }
}

}  // namespace

int shared_bytes_of_block() {
  const char* kib = std::getenv("VEERLOSS_EMULATOR_SHARED");
  return (kib ? std::atoi(kib) : 227) * 1024;
}

void barrier(int line) {
  leave(line);
}

void yield() {
  leave(0);
}

void launch(const void* kernel, const std::function<void()>& call, int64_t blocks, int threads, int64_t shared_bytes) {
  if (shared_bytes + static_shared_bytes > shared_bytes_of_block())
    throw std::runtime_error("emulator: more shared memory than a block can have");
  if (threads > max_threads) throw std::runtime_error("emulator: more threads than a block can have");
  const char* seed = std::getenv("VEERLOSS_EMULATOR_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  state.yields_at_atomics = seed != nullptr;
  std::vector<int> turns(threads);
  std::iota(turns.begin(), turns.end(), 0);
  meter::begin_launch(kernel, blocks, threads, {stacks(), stacks() + max_threads * stack_bytes});
  for (int64_t i = 0; i < blocks; ++i) {
    state.shared.assign(static_cast<size_t>(shared_bytes), 0xcd);
    state.block.x = static_cast<unsigned>(i);
    std::reverse(turns.begin(), turns.end());
    run_block(call, turns, seed ? &random : nullptr);
  }
  meter::end_launch();
}

}  // namespace emulator
