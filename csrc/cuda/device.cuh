// What every CUDA kernel uses: conversion of elements, reductions and scans over a block, launches, scratch memory. No torch
// headers: nvcc compiles the kernels alone.
//
// The threads of a block communicate through shared memory and barriers only, never through lanes of a warp: tests/emulator
// runs the kernels thread by thread on a CPU.
#pragma once

#if defined(VEERLOSS_EMULATED)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VEERLOSS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

namespace veerloss {

// ---- elements

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// The type that kernels compute in for logits of a type.
template <class In>
using opmath_t = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Between element types and opmath types, rounded to nearest; to 16 bits by way of float32.
template <class To, class From>
__device__ inline To convert(From value) {
  if constexpr (std::is_same_v<From, __half>)
    return static_cast<To>(__half2float(value));
  else if constexpr (std::is_same_v<From, __nv_bfloat16>)
    return static_cast<To>(__bfloat162float(value));
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(static_cast<float>(value));
  else if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(value));
  else
    return static_cast<To>(value);
}

// Element i of a tensor of any type, where a kernel template per type is not worth it.
template <class T = double>
__device__ inline T load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return convert<T>(static_cast<const double*>(data)[i]);
    case DType::bf16: return convert<T>(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16: return convert<T>(static_cast<const __half*>(data)[i]);
    case DType::i64: return static_cast<T>(static_cast<const int64_t*>(data)[i]);
    case DType::i32: return static_cast<T>(static_cast<const int32_t*>(data)[i]);
    case DType::i16: return static_cast<T>(static_cast<const int16_t*>(data)[i]);
    case DType::i8: return static_cast<T>(static_cast<const int8_t*>(data)[i]);
    case DType::u8: return static_cast<T>(static_cast<const uint8_t*>(data)[i]);
    default: return convert<T>(static_cast<const float*>(data)[i]);
  }
}

// The same of a float type.
__device__ inline void store_element(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[i] = value; break;
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = convert<__nv_bfloat16>(value); break;
    case DType::f16: static_cast<__half*>(data)[i] = convert<__half>(value); break;
    default: static_cast<float*>(data)[i] = static_cast<float>(value);
  }
}

VEERLOSS_HD bool is_integer(DType dtype) {
  return dtype != DType::f32 && dtype != DType::f64 && dtype != DType::bf16 && dtype != DType::f16;
}

// Bytes of an element.
VEERLOSS_HD int size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::i8:
    case DType::u8: return 1;
    default: return 2;
  }
}

// ---- run-time values as template arguments

// Calls f with a value of the element type of logits.
template <class F>
void with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
    default: return f(float{});
  }
}

// Calls f with a std::bool_constant.
template <class F>
void with_flag(bool flag, const F& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f with a std::integral_constant.
template <class F>
void with_errors(Errors errors, const F& f) {
  switch (errors) {
    case Errors::softmax: return f(std::integral_constant<Errors, Errors::softmax>{});
    case Errors::probabilities: return f(std::integral_constant<Errors, Errors::probabilities>{});
    case Errors::hinge: return f(std::integral_constant<Errors, Errors::hinge>{});
  }
}

// ---- blocks: one dimension of a power of two of threads; `scratch` is [threads] in shared memory

// Combines the values of all threads in a fixed order. Every thread receives the result.
template <int threads, class T, class F>
__device__ inline T block_reduce(T value, T* scratch, const F& combine) {
  static_assert((threads & (threads - 1)) == 0, "a power of two");
  const int t = static_cast<int>(threadIdx.x);
  scratch[t] = value;
  __syncthreads();
  VEERLOSS_NO_UNROLL
  for (int step = threads / 2; step > 0; step /= 2) {
    if (t < step) scratch[t] = combine(scratch[t], scratch[t + step]);
    __syncthreads();
  }
  const T result = scratch[0];
  __syncthreads();  // before the next use of scratch
  return result;
}

template <int threads, class T>
__device__ inline T block_sum(T value, T* scratch) {
  return block_reduce<threads>(value, scratch, [](T a, T b) { return a + b; });
}

// Exclusive prefix sum over the threads; `total` receives the sum of all.
template <int threads, class T>
__device__ inline T block_scan(T value, T* scratch, T* total) {
  const int t = static_cast<int>(threadIdx.x);
  scratch[t] = value;
  __syncthreads();
  VEERLOSS_NO_UNROLL
  for (int step = 1; step < threads; step *= 2) {
    const T left = t >= step ? scratch[t - step] : T(0);
    __syncthreads();
    scratch[t] += left;
    __syncthreads();
  }
  const T before = scratch[t] - value;
  *total = scratch[threads - 1];
  __syncthreads();  // before the next use of scratch
  return before;
}

// ---- launches

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears it, else the next launch would report it
  throw std::runtime_error(std::string("veerloss: ") + what + ": " + cudaGetErrorString(error));
}

inline void zero_memory(void* data, int64_t bytes, Stream stream) {
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "memset");
}

// Every launch is one dimension of blocks. An empty grid is no launch.
struct Launch {
  int64_t blocks;
  int threads;
  Stream stream;
  int64_t shared_bytes = 0;  // dynamic shared memory
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "an attribute of the device");
  return value;
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
// Static and dynamic together.
inline int max_shared_bytes_of_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Launch& shape, std::type_identity_t<Parameters>... arguments) {
  if (shape.blocks == 0) return;
  if (shape.blocks > 0x7fffffff) throw std::invalid_argument("veerloss: more pixels than one launch can take");
#if !defined(VEERLOSS_EMULATED)
  if (shape.shared_bytes > 0) {
    // More than 48 KiB, static and dynamic together, must be requested. The request is always for the maximum: another thread
    // may launch the same kernel with more between the request and the launch.
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
    const auto static_bytes = static_cast<int64_t>(attributes.sharedSizeBytes);
    const int max_dynamic = max_shared_bytes_of_block() - static_cast<int>(static_bytes);
    if (static_bytes + shape.shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_dynamic),
            "shared memory of a kernel");
  }
  auto* const stream = static_cast<cudaStream_t>(shape.stream);
  kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), "launch of a kernel");
#else
  const auto call = [&] { kernel(arguments...); };
  emulator::launch(reinterpret_cast<const void*>(kernel), std::ref(call), shape.blocks, shape.threads, shape.shared_bytes);
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Divides scratch memory into arrays. Without memory (null) the arrays are null, and bytes() tells how much they need.
class ScratchArrays {
 public:
  explicit ScratchArrays(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace veerloss
