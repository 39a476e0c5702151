// Runs the CUDA kernels of csrc/cuda on a CPU, so that tests cover them where there is no GPU. A .cu file compiles as C++ with
// -DVEERLOSS_EMULATED and this folder on the include path.
//
// Blocks run one after another; the threads of a block are fibers that take turns between barriers. Every other block runs its
// threads in reverse order, and shared memory starts as garbage, so that a missing barrier shows as a wrong result. What it
// cannot show: races inside a warp, timing, and limits of the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace emulator {

struct Index {
  unsigned x = 0;
};
inline Index thread, block;
inline std::vector<unsigned char> shared;

// The device: few multiprocessors, for few blocks; the shared memory of an H100, and what kernels may have of it that is
// static.
constexpr int multiprocessors = 2, shared_bytes_of_block = 227 * 1024, static_shared_bytes = 9 * 1024;

// ---- fibers (x86-64, System V)

extern "C" void veerloss_switch_fiber(void** save_stack, void* load_stack);

constexpr size_t stack_bytes = 64 * 1024;
inline void *scheduler_stack = nullptr, *current_stack = nullptr;
inline const std::function<void()>* kernel = nullptr;
inline bool current_ended = false;
inline int current_line = 0;

// All threads that have not ended have to come to the same barrier.
inline void barrier(int line) {
  const Index saved = thread;
  current_line = line;
  veerloss_switch_fiber(&current_stack, scheduler_stack);
  thread = saved;
}

inline void fiber() {
  (*kernel)();
  current_ended = true;
  veerloss_switch_fiber(&current_stack, scheduler_stack);
}

struct Fiber {
  Fiber() : memory(new unsigned char[stack_bytes]) {}
  std::unique_ptr<unsigned char[]> memory;
  void* stack = nullptr;
  bool ended = false;

  void begin() {
    auto top = (reinterpret_cast<uintptr_t>(memory.get()) + stack_bytes) / 16 * 16;
    auto* words = reinterpret_cast<uintptr_t*>(top);
    words[-2] = reinterpret_cast<uintptr_t>(&fiber);  // where the first switch returns to, aligned as after a call
    stack = words - 2 - 6;                            // below it the saved registers
    ended = false;
  }
};

inline void run_block(const std::function<void()>& f, int threads, bool reverse) {
  static std::vector<Fiber> fibers;
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  kernel = &f;
  for (int t = 0; t < threads; ++t) fibers[t].begin();
  for (int live = threads; live > 0;) {
    int line = 0;
    for (int k = 0; k < threads; ++k) {
      const int t = reverse ? threads - 1 - k : k;
      if (fibers[t].ended) continue;
      thread.x = static_cast<unsigned>(t);
      current_stack = fibers[t].stack;
      current_ended = false;
      void* to = fibers[t].stack;
      veerloss_switch_fiber(&scheduler_stack, to);
      fibers[t].stack = current_stack;
      fibers[t].ended = current_ended;
      live -= current_ended;
      if (current_ended) continue;
      if (line != 0 && line != current_line)
        throw std::runtime_error("emulator: threads of a block wait at different barriers");
      line = current_line;
    }
  }
}

}  // namespace emulator

// ---- what kernels use of CUDA

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define VEERLOSS_DYNAMIC_SHARED(name) unsigned char* name = emulator::shared.data()

#define __syncthreads() emulator::barrier(__LINE__)

template <class T, class U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = static_cast<T>(before + static_cast<T>(value));
  return before;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "an error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::shared_bytes_of_block : emulator::multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

namespace emulator {

// In place of kernel<<<blocks, threads, shared_bytes>>>(...): `call` calls the kernel.
inline void launch(const std::function<void()>& call, int64_t blocks, int threads, int64_t shared_bytes) {
  if (shared_bytes + static_shared_bytes > shared_bytes_of_block)
    throw std::runtime_error("emulator: more shared memory than a block of an H100 can have");
  for (int64_t i = 0; i < blocks; ++i) {
    shared.assign(static_cast<size_t>(shared_bytes), 0xcd);
    block.x = static_cast<unsigned>(i);
    run_block(call, threads, i % 2 == 1);
  }
}

}  // namespace emulator
