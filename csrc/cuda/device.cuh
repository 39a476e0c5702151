// What the CUDA kernels share: elements of any type, sums over a block, launches. No torch headers: nvcc alone checks them.
//
// Kernels speak to each other through shared memory and barriers only, never through lanes of a warp, so that
// tests/emulator/emulator.h can run them on a CPU, thread by thread.
#pragma once

#if defined(VEERLOSS_EMULATED)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../layout.h"
#include "../platform.h"

namespace veerloss {

// ---- elements

// What a type of logits is computed in.
template <class In>
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class T, class In>
__device__ inline T widen(In value) {
  if constexpr (std::is_same_v<In, __half>)
    return static_cast<T>(__half2float(value));
  else if constexpr (std::is_same_v<In, __nv_bfloat16>)
    return static_cast<T>(__bfloat162float(value));
  else
    return static_cast<T>(value);
}

template <class In, class T>
__device__ inline In rounded(T value) {
  if constexpr (std::is_same_v<In, __half>)
    return __float2half_rn(static_cast<float>(value));
  else if constexpr (std::is_same_v<In, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(value));
  else
    return static_cast<In>(value);
}

// Element i of a tensor of any float type, for what is read once in a while.
__device__ inline double load_value(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::bf16: return widen<double>(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16: return widen<double>(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_value(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[i] = value; break;
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = rounded<__nv_bfloat16>(value); break;
    case DType::f16: static_cast<__half*>(data)[i] = rounded<__half>(value); break;
    default: static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

// f with a value of the element type of `dtype`.
template <class F>
void with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
    default: return f(float{});
  }
}

// ---- blocks

// The combination of every thread's value, in a fixed order, to all of them. Blocks have a power of two of threads.
template <int threads, class T, class F>
__device__ inline T block_reduce(T value, T* scratch, const F& combine) {
  static_assert((threads & (threads - 1)) == 0, "a power of two");
  const int t = static_cast<int>(threadIdx.x);
  scratch[t] = value;
  __syncthreads();
  for (int step = threads / 2; step > 0; step /= 2) {
    if (t < step) scratch[t] = combine(scratch[t], scratch[t + step]);
    __syncthreads();
  }
  const T all = scratch[0];
  __syncthreads();  // before the next use of scratch
  return all;
}

template <int threads, class T>
__device__ inline T block_sum(T value, T* scratch) {
  return block_reduce<threads>(value, scratch, [](T a, T b) { return a + b; });
}

// The sum of the values of lower threads; `all` becomes that of all threads.
template <int threads, class T>
__device__ inline T block_scan(T value, T* scratch, T* all) {
  const int t = static_cast<int>(threadIdx.x);
  scratch[t] = value;
  __syncthreads();
  for (int step = 1; step < threads; step *= 2) {
    const T left = t >= step ? scratch[t - step] : T(0);
    __syncthreads();
    scratch[t] += left;
    __syncthreads();
  }
  const T before = scratch[t] - value;
  *all = scratch[threads - 1];
  __syncthreads();
  return before;
}

// ---- launches

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next launch would find it
  throw std::runtime_error(std::string("veerloss: ") + what + ": " + cudaGetErrorString(error));
}

#if !defined(VEERLOSS_EMULATED)
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
  return value;
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
inline int shared_memory_of_a_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Every launch is one dimension of blocks. An empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("veerloss: more pixels than one launch can take");
  if (shared_bytes > 0) {
    // More than 48 KiB, static and dynamic together, have to be asked for: always all there is, for other threads launch too.
    cudaFuncAttributes own;
    check(cudaFuncGetAttributes(&own, kernel), "attributes of a kernel");
    const int most = shared_memory_of_a_block() - static_cast<int>(own.sharedSizeBytes);
    if (own.sharedSizeBytes + shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of a kernel");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch of a kernel");
}

#define VEERLOSS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace veerloss
