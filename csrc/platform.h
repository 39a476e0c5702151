// What the scalar headers need to compile for the CPU and the GPU alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VEERLOSS_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define VEERLOSS_HD __forceinline
#else
// Inlined into callers that are compiled for a wider instruction set than this function (cpu/simd/dispatch_isa.h).
#define VEERLOSS_HD inline __attribute__((always_inline))
#endif

// Before a loop that nvcc is not to unroll.
#if defined(__CUDACC__)
#define VEERLOSS_NO_UNROLL _Pragma("unroll 1")
#else
#define VEERLOSS_NO_UNROLL
#endif

namespace veerloss {

template <class To, class From>
VEERLOSS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(VEERLOSS_EMULATED)
// The compiler does not see that it is the same value.
template <class T>
inline T unfused(T value) {
  asm("" : "+x"(value));
  return value;
}
#endif

// a * b rounded to nearest, never contracted into a fused multiply-add: all passes over a pixel then compute the same bits.
template <class T>
VEERLOSS_HD T mul_rn(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    return __dmul_rn(a, b);
  else
    return __fmul_rn(a, b);
#elif defined(VEERLOSS_EMULATED)
  return unfused(a * b);
#else
  return a * b;
#endif
}

// a + b, likewise.
template <class T>
VEERLOSS_HD T add_rn(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    return __dadd_rn(a, b);
  else
    return __fadd_rn(a, b);
#elif defined(VEERLOSS_EMULATED)
  return unfused(a + b);
#else
  return a + b;
#endif
}

// a * b + c; on a GPU rounded once, so that all passes over a pixel compute the same bits. On the CPU compilers choose, alike
// in all passes.
VEERLOSS_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(VEERLOSS_EMULATED)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// To [0, 1]; NaN becomes 0. On a GPU part of the instruction that makes x.
VEERLOSS_HD float saturate(float x) {
#if defined(__CUDA_ARCH__)
  return __saturatef(x);
#else
  const float above = x > 0.0f ? x : 0.0f;
  return above < 1.0f ? above : 1.0f;
#endif
}

}  // namespace veerloss
