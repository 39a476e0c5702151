// What the scalar headers need to compile for the CPU and the GPU alike.
#pragma once

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

}  // namespace veerloss
