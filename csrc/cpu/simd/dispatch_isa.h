// Compiles the tile functions of VEERLOSS_TILES once for each instruction set, so that one binary serves every machine.
//
// Define VEERLOSS_TILES to a header of this folder that holds a struct of static functions, say FocalTiles, then include this
// file: it defines baseline::FocalTiles, avx2::FocalTiles and avx512::FocalTiles. VEERLOSS_DISPATCH(FocalTiles::f(x)) calls the
// widest that the machine supports; VEERLOSS_CPU=baseline|avx2|avx512 in the environment lowers the choice, for tests.
//
// Everything that a tile function calls has to be inlined (VEERLOSS_HD). Of an out-of-line copy of a shared inline function the
// linker could keep the one compiled for AVX-512, also for machines without it.

#ifndef VEERLOSS_DISPATCH_ISA
#define VEERLOSS_DISPATCH_ISA

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define VEERLOSS_X86 1
#include <immintrin.h>
#endif

namespace veerloss {

enum class Isa { baseline, avx2, avx512 };

inline Isa detect_isa() {
  Isa best = Isa::baseline;
#ifdef VEERLOSS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  const char* requested = std::getenv("VEERLOSS_CPU");
  if (requested && !std::strcmp(requested, "baseline")) best = Isa::baseline;
  if (requested && !std::strcmp(requested, "avx2")) best = std::min(best, Isa::avx2);
  return best;
}

inline Isa cpu_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace veerloss

#ifdef VEERLOSS_X86
#define VEERLOSS_DISPATCH(...) \
  (cpu_isa() == Isa::avx512 ? avx512::__VA_ARGS__ : cpu_isa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define VEERLOSS_DISPATCH(...) baseline::__VA_ARGS__
#endif

#endif  // VEERLOSS_DISPATCH_ISA

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
#define VEERLOSS_AVX2  // guards intrinsics, where the compiler does not vectorise well
namespace veerloss::avx2 {
#include VEERLOSS_TILES
}
#undef VEERLOSS_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
// prefer-vector-width: by default the compiler uses 256 bits, half of what these purely arithmetic loops can use.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define VEERLOSS_AVX512  // likewise
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
