// What the memory traffic of emulated kernels would be on a GPU. The compiler calls the meter at every load and store of a
// kernel (-fsanitize=thread; the functions that it calls are not those of ThreadSanitizer but ours, meter.cpp), so that kernels
// need no hooks. With VEERLOSS_METER=path in the environment each launch appends a line to that file, of JSON:
//
//   kernel                              where its code begins in the library, for nm to name
//   blocks, threads                     of the launch
//   read, written                       bytes of global memory, in distinct sectors of 32 bytes: DRAM sees no less
//   requests, sectors                   of global memory: by warps, and the sectors of each, which L1 asks L2 for if it has
//   none shared, conflicts                   requests of shared memory by warps, and how many more turns they take for the sake
//   of
//                                       banks (32 of 4 bytes): 0 without conflicts
//   atomics, atomic_turns               atomic operations on shared memory by warps, and the turns that they take: of threads
//                                       that want the same bank, the same word too, one at a time
//   global_atomics, global_atomic_turns  of global memory: of threads that want the same word one at a time
//
// A warp's threads are taken to execute an instruction together where they come to it for the n-th time since the last barrier.
#pragma once

#include <cstdint>

namespace meter {

struct Range {
  const void *begin, *end;
};

#if defined(VEERLOSS_METERED)
void begin_launch(const void* kernel, int64_t blocks, int threads, Range stacks);
void end_phase();  // at a barrier, and at the end of a block
void end_launch();
#else
inline void begin_launch(const void*, int64_t, int, Range) {}
inline void end_phase() {}
inline void end_launch() {}
#endif

}  // namespace meter
