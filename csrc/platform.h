// What the scalar headers need to compile for the CPU and the GPU alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VEERLOSS_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define VEERLOSS_HD __forceinline
#else
// Inlined into callers that are compiled for a wider instruction set than this function (cpu/for_each_target.h).
#define VEERLOSS_HD inline __attribute__((always_inline))
#endif
