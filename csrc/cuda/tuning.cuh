// Every tuning constant of the CUDA kernels: one policy for each kernel, one set of policies for each architecture.
//
// None of them has been measured on a GPU. Beside each constant stands the count or the limit that it follows from; 256 threads
// are the usual choice where nothing else decides.
//
// An architecture that needs other values derives its set from the one before it, struct Sm90 : Sm80, and replaces the policies
// that differ. `Tuning` is then a template parameter of the kernels, and the host has to choose by
// cudaFuncAttributes::ptxVersion, the architecture that a kernel was compiled for: a GPU may run the code of an older one.
#pragma once

#include <cstdint>

namespace veerloss {

// Compute capability 8.0 and newer.
struct Sm80 {
  // Kernels with one thread for each pixel (pixels.cuh).
  struct Pixels {
    // Below this many blocks for an image, blocks span several images. The last block of an image is half empty on average: an
    // eighth of the threads at 4 blocks.
    static constexpr int small_image_blocks = 4;
  };

  // Softmax focal loss.
  struct Focal {
    static constexpr int threads = 256;
    // Of more classes than 32, up to 32 for each warp, the warps of a block share 32 pixels (focal_shared.cu).
    static constexpr int shared_pixels = 32, warps = threads / shared_pixels;
    static constexpr int64_t min_shared_classes = 33, max_shared_classes = 32 * warps;
    // Blocks of a forward pass, each of which leaves one partial sum. Each takes every max_blocks-th tile, in order: the sums,
    // and so the bits of the loss, do not depend on the GPU. Two waves or more of the largest, 8 blocks on each of 192
    // multiprocessors; at [8, 19, 512, 1024] four tiles share the sum over a block, of some 100 instructions.
#if defined(VEERLOSS_EMULATED)
    static constexpr int64_t max_blocks = 2;  // tests of moderate size then have several tiles to a block
#else
    static constexpr int64_t max_blocks = 4096;
#endif
  };

  struct Gradient {
    static constexpr int threads = 256;
  };

  // The loss of a batch from its segments, one block.
  struct Finish {
    static constexpr int threads = 256;
  };

  // ---- method "exact"

  struct ExactKeys {
    static constexpr int threads = 256;
    // Foreground is counted in shared memory first where the counts of a block, 4 bytes a class, fit into the 48 KiB that every
    // launch may use.
    static constexpr int64_t max_shared_classes = 8192;
  };

  struct ExactRanks {
    static constexpr int threads = 256;
    // Sorted pixels of a thread. A tile of keys takes 8 KiB of shared memory in float32, 16 KiB in float64.
    static constexpr int items = 8;
    static constexpr int tile = threads * items;
  };

  struct ExactSort {
    // A radix sort of one long segment fills a GPU; short segments are sorted in groups, with one block for each. Where the
    // segments are fewer than the multiprocessors, they count as long from a smaller size on.
    static constexpr int64_t long_segment = int64_t{1} << 18, long_segment_of_few = int64_t{1} << 15;
    // In the segments of a group: 192 MiB of keys and indices in float32, and 128 MiB for the sort.
    static constexpr int64_t group_pixels = int64_t{1} << 24;
  };

  // ---- method "histogram"

  // Maximum and sum of exponentials of every pixel.
  struct HistogramStatistics {
    static constexpr int threads = 256;
  };

  struct HistogramCount {
    static constexpr int threads = 1024;  // 64 registers each; one block on a multiprocessor, whose shared memory it fills
    // Tiles of one pixel for each thread to a chunk, at most: counts have 16 bits.
    static constexpr int64_t most_tiles = 63;
    // Static shared memory, and what the driver reserves.
    static constexpr int64_t static_bytes = 1280;
    // Classes in registers: 24 of float32 take 63 of 64; 4 of float64 would spill.
    static constexpr int64_t most_classes = 24;
  };

  // As HistogramCount: weights of four bytes take the place of counts.
  struct HistogramGradient {
    static constexpr int threads = 768;  // 80 registers each
    static constexpr int64_t static_bytes = 1280;
    static constexpr int64_t most_classes = 24;
  };

  // Kernels with one block for each segment, which allocate its bins and weigh them.
  struct HistogramBins {
    static constexpr int threads = 256;
  };

  struct HistogramSum {
    static constexpr int threads = 256;
    static constexpr int64_t chunk = 32 * threads;  // pixels of a block, which ends with a reduction of log2(threads) barriers
  };
};

using Tuning = Sm80;

}  // namespace veerloss
