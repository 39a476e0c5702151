// Compiles the tile functions in VEERLOSS_TILES once for each instruction set, so that one binary serves every machine.
//
// Define VEERLOSS_TILES to a header that holds a struct of static functions, say FocalTiles, then include this file: it yields
// baseline::FocalTiles, avx2::FocalTiles and avx512::FocalTiles. VEERLOSS_DISPATCH(FocalTiles::f(x)) calls the widest that the
// machine has.
// Everything that a tile function calls has to be inlined (VEERLOSS_HD): an out-of-line copy of a shared inline function,
// compiled for AVX-512, could be the one the linker keeps for machines without it. VEERLOSS_CPU=baseline|avx2|avx512 in the
// environment lowers the choice, for tests.

#ifndef VEERLOSS_FOR_EACH_TARGET
#define VEERLOSS_FOR_EACH_TARGET

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define VEERLOSS_X86 1
#endif

namespace veerloss {

enum class Target { baseline, avx2, avx512 };

inline Target detect_target() {
  Target best = Target::baseline;
#ifdef VEERLOSS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Target::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = Target::avx512;
#endif
  const char* wanted = std::getenv("VEERLOSS_CPU");
  if (wanted && !std::strcmp(wanted, "baseline")) best = Target::baseline;
  if (wanted && !std::strcmp(wanted, "avx2")) best = std::min(best, Target::avx2);
  return best;
}

inline Target cpu_target() {
  static const Target target = detect_target();
  return target;
}

}  // namespace veerloss

#ifdef VEERLOSS_X86
#define VEERLOSS_DISPATCH(...)                          \
  (cpu_target() == Target::avx512 ? avx512::__VA_ARGS__ \
   : cpu_target() == Target::avx2 ? avx2::__VA_ARGS__   \
                                  : baseline::__VA_ARGS__)
#else
#define VEERLOSS_DISPATCH(...) baseline::__VA_ARGS__
#endif

#endif  // VEERLOSS_FOR_EACH_TARGET

namespace veerloss::baseline {
#include VEERLOSS_TILES
}

#ifdef VEERLOSS_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace veerloss::avx2 {
#include VEERLOSS_TILES
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
// prefer-vector-width: the default of 256 bits leaves half of the machine idle in these loops, which are nothing but
// arithmetic.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define VEERLOSS_AVX512  // for what compilers do not find by themselves
namespace veerloss::avx512 {
#include VEERLOSS_TILES
}
#undef VEERLOSS_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // VEERLOSS_X86

#undef VEERLOSS_TILES
