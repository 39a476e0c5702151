// Runs the CUDA kernels of csrc/cuda on a CPU, so that tests cover them where there is no GPU. A .cu file compiles as C++ with
// -DVEERLOSS_EMULATED and this folder on the include path; emulator.cpp has what is compiled once.
//
// Blocks run one after another; the threads of a block are fibers that take turns between barriers. Every other block runs its
// threads in reverse order, and shared memory starts as garbage, so that a missing barrier shows as a wrong result. With
// VEERLOSS_EMULATOR_SEED=n in the environment threads take turns in random order, and also at every atomic operation: what is
// not atomic, or takes an order for granted, then shows. What it cannot show: races inside a warp, timing, and limits of the
// device.
//
// Compiled with -DVEERLOSS_METERED -fsanitize=thread, the memory that kernels read and write is metered (meter.h).
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
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

namespace emulator {

struct Index {
  unsigned x = 0;
};

// What changes while a kernel runs, in one place: none of it is memory of the kernel.
struct State {
  Index thread, block;
  std::vector<unsigned char> shared;
  bool yields_at_atomics = false;
};
inline State state;

// The device: few multiprocessors, for few blocks; what kernels may have of its shared memory that is static. Of dynamic and
// static together a block may have what it has of an H100, or VEERLOSS_EMULATOR_SHARED=n KiB.
constexpr int multiprocessors = 2, static_shared_bytes = 1024;
int shared_bytes_of_block();

// All threads that have not ended have to come to the same barrier.
void barrier(int line);
// Lets another thread go on.
void yield();
// In place of kernel<<<blocks, threads, shared_bytes>>>(...): `call` calls the kernel.
void launch(const void* kernel, const std::function<void()>& call, int64_t blocks, int threads, int64_t shared_bytes);

#if defined(VEERLOSS_METERED)
void begin_atomic(const void* at, int size);
void end_atomic();
#else
inline void begin_atomic(const void*, int) {}
inline void end_atomic() {}
#endif

}  // namespace emulator

// ---- what kernels use of CUDA

#define threadIdx emulator::state.thread
#define blockIdx emulator::state.block
#define VEERLOSS_DYNAMIC_SHARED(name) unsigned char* name = emulator::state.shared.data()

#define __syncthreads() emulator::barrier(__LINE__)

template <class T, class F>
__attribute__((always_inline)) inline T emulator_exchange(T* at, const F& f) {  // inlined: the meter tells its uses apart
  if (emulator::state.yields_at_atomics) emulator::yield();
  emulator::begin_atomic(at, sizeof(T));
  const T before = *at;
  *at = f(before);
  emulator::end_atomic();
  return before;
}
template <class T, class U>
__attribute__((always_inline)) inline T atomicAdd(T* at, U value) {
  return emulator_exchange(at, [value](T before) { return static_cast<T>(before + static_cast<T>(value)); });
}
template <class T>
__attribute__((always_inline)) inline T atomicMax(T* at, T value) {
  return emulator_exchange(at, [value](T before) { return before < value ? value : before; });
}
template <class T>
__attribute__((always_inline)) inline T atomicMin(T* at, T value) {
  return emulator_exchange(at, [value](T before) { return value < before ? value : before; });
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
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::shared_bytes_of_block() : emulator::multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
