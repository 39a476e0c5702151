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

  // Logits of low resolution (upsample.cuh).
  struct Low {
    // Of a tile: a warp reads 128 bytes of a row of labels.
    static constexpr int columns = 32;
    // 384 threads. At four times the size a tile adds to 5 x 10 pixels, 13% of its own; of 8 rows it were 16%.
    static constexpr int rows = 12;
    // Of classes whose gradients are in shared memory together: 12 KB, and as many sums at the most.
    static constexpr int quads = 2;
    // Blocks on a multiprocessor: 80 registers; of more than 12 classes, which spilled 12 bytes where weights come by bins,
    // as many as one block may have.
    template <class Range>
    static constexpr int min_blocks = Range::most > 12 ? 1 : 2;
    // Of losses of segments: with 32, weights of bins with a focal term spilled 80 bytes.
    static constexpr int64_t most_classes = 24;
    // What adds up the tiles.
    static constexpr int threads = 128;
  };

  // More classes than 32, up to 32 for each warp: the warps of a block share 32 pixels (class_parts.cuh).
  struct ClassParts {
    static constexpr int threads = 256;
    static constexpr int pixels = 32, warps = threads / pixels;
    static constexpr int64_t min_classes = 33, max_classes = 32 * warps;
  };

  // Both focal losses.
  struct Focal {
    static constexpr int threads = 256;
    // Blocks of a forward pass, each of which leaves one partial sum. Each takes every max_blocks-th tile, in order: the sums,
    // and so the bits of the loss, do not depend on the GPU. Two waves or more of the largest, 8 blocks on each of 192
    // multiprocessors; at [8, 19, 512, 1024] four tiles share the sum over a block, of some 100 instructions.
#if defined(VEERLOSS_EMULATED)
    static constexpr int64_t max_blocks = 2;  // tests of moderate size then have several tiles to a block
#else
    static constexpr int64_t max_blocks = 4096;
#endif
  };

  // Sigmoid focal loss: elements in one run of memory.
  struct SigmoidRows {
    static constexpr int threads = Focal::threads;
    // Blocks on a multiprocessor: 64 registers; 80 with an alpha for each class, where 16-bit logits spilled 4 bytes; or 128
    // where gamma is not 2, for they spilled 36 bytes of 80.
    static constexpr int min_blocks(bool square, bool class_alpha) { return !square ? 2 : class_alpha ? 3 : 4; }
    // Elements of a tile, 32 for each thread, which share what a tile costs. At least `run` pixels, the most elements that are
    // loaded at once, of 16 bits; and of few classes no more labels than these.
    static constexpr int tile_elements = 8192, run = 8, max_tile_labels = 1024;
    static constexpr int64_t max_classes = int64_t{1} << 20;  // elements of a tile are counted in 32 bits
  };

  // Sigmoid focal loss: pixels, class by class.
  struct SigmoidPlanes {
    static constexpr int threads = Focal::threads;
    // As of SigmoidRows; of 16-bit logits 80 registers, for with 64 they spilled up to 20 bytes on sm_100 and sm_120.
    template <class In>
    static constexpr int min_blocks(bool square) {
      return sizeof(In) == 8 ? 1 : SigmoidRows::min_blocks(square, sizeof(In) == 2);
    }
    // A thread goes over all classes, which share what a tile costs, unless there are fewer blocks than these, four waves of an
    // H100: then over a group of classes, of at least so many.
    static constexpr int64_t min_group_classes = 4;
#if defined(VEERLOSS_EMULATED)
    static constexpr int64_t wanted_blocks = 16;  // in tests of moderate size some
#else
    static constexpr int64_t wanted_blocks = 2048;
#endif
  };

  struct Gradient {
    static constexpr int threads = 256;
    // Of probabilities and a hinge, pixels of a thread at most: what a block finds out about its class is shared by so many.
    static constexpr int64_t most_tiles = 16;
  };

  // ---- region losses

  // Sums of a softmax with class indices.
  struct RegionSumSoftmax {
    // Half as many as usual, as a word of shared memory for each thread and class lets more classes fit.
    static constexpr int threads = 128;
    // Blocks on a multiprocessor: 80 registers, 96 for more than 16 classes, which spilled 16 bytes, and 128 for more than 20.
    // A sum takes two. Where several threads have a pixel, at most 128: of 80 they spilled 56 bytes. On sm_100 and sm_120 more
    // than 4 classes in float64 spilled up to 48 bytes with 80, more than 24 classes 8 bytes with 128.
    template <class In, class Range>
    static constexpr int min_blocks(int threads_of_block) {
      if (threads_of_block == threads && (sizeof(In) == 8 ? Range::most > 4 : Range::most > 24)) return 3;
      return (Range::most <= 16 ? 6 : Range::most <= 20 ? 5 : 4) * threads / threads_of_block;
    }
    // Pixels of a thread, at most: the words of the label's class hold so many.
    static constexpr int64_t most_tiles = 63;
    // Static shared memory, and what the driver reserves.
    static constexpr int64_t static_bytes = 4096;
  };

  // Sums of all others.
  struct RegionSum {
    static constexpr int threads = 256;
    // Pixels of a thread, at most: a block ends with a sum over its threads, of some 300 instructions.
    static constexpr int64_t most_tiles = 63;
    // Of a softmax, which is kept for so many: there each class ends with one.
    template <class In>
    static constexpr int64_t softmax_tiles = sizeof(In) == 8 ? 4 : 8;
  };

  // The gradient of a softmax with class indices, as Focal.
  struct RegionGradientSoftmax {
    static constexpr int threads = 256;
    // Blocks on a multiprocessor: 64 registers; 80 for more than 20 classes; 128 for more than 24, which spilled 4 bytes, and
    // in float64. Of 16 bits for four classes less: on sm_100 and sm_120 they spilled up to 24 bytes.
    template <class In, class Range>
    static constexpr int min_blocks = sizeof(In) == 8                             ? 1
                                      : Range::most > (sizeof(In) == 2 ? 20 : 24) ? 2
                                      : Range::most > (sizeof(In) == 2 ? 16 : 20) ? 3
                                                                                  : 4;
    static constexpr int64_t most_tiles = int64_t{1} << 40;  // of a block: any number
  };

  // The gradient of classes that are independent, as Gradient.
  struct RegionGradient {
    static constexpr int threads = 256;
    static constexpr int64_t most_tiles = 16;
  };

  // ---- all losses of segments

  // The loss of a batch from its segments, one block.
  struct Finish {
    static constexpr int threads = 256;
  };

  // ---- method "exact"

  struct ExactKeys {
    static constexpr int threads = 256;
    // What a block finds out about its pixels' classes, 8 or 12 bytes a class, goes through shared memory where it fits into
    // the 48 KiB that every launch may use.
    static constexpr int64_t max_shared_classes = 4000;
  };

  struct ExactSort {
    static constexpr int threads = 256;  // one for each value of a digit
    // Pairs of a thread. An odd number: item i of thread t, the word items * t + i of shared memory, lies in a bank of its own.
    // 15 keep the shared memory of a block below 48 KiB.
    static constexpr int items = 15, items_of_double = 7;
    // Blocks on a multiprocessor: 80 registers, 128 of float64, none of which spills. GPUs for graphics have shared memory for
    // two blocks.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
    static constexpr int min_blocks = 2, min_blocks_of_double = 2;
#else
    static constexpr int min_blocks = 3, min_blocks_of_double = 2;
#endif
    // Keys that a block counts: its 1280 counters are added to those of its segment at the end.
    static constexpr int64_t chunk = int64_t{1} << 14;
    // Segments are sorted in groups. What a group needs, 18 bytes in float32 for each pair, is no more than the gradient takes,
    // which is not there yet, but at the least and at most so many bytes.
#if defined(VEERLOSS_EMULATED)
    static constexpr int64_t min_bytes = int64_t{1} << 18, max_bytes = int64_t{1} << 18;  // several groups
#else
    static constexpr int64_t min_bytes = int64_t{64} << 20, max_bytes = int64_t{320} << 20;
#endif
  };

  // The loss of a segment from those of its tiles.
  struct ExactSegment {
    static constexpr int threads = 128;
  };

  // ---- method "histogram"

  // Maximum and sum of exponentials of every pixel.
  struct HistogramStatistics {
    static constexpr int threads = 256;
  };

  struct HistogramCount {
    static constexpr int threads = 1024;  // 64 registers each; one block on a multiprocessor, whose shared memory it fills
    // By way of shared memory: the rows of so many pixels, 40 KB of 19 classes, fit beside the counts.
    static constexpr int threads_of_rows = 512;
    // Of low resolution: 128 registers, for what blends the classes of a pixel takes some too.
    static constexpr int threads_of_low = 512;
    // Tiles of one pixel for each thread to a chunk, at most: counts have 16 bits.
    static constexpr int64_t most_tiles = 63;
    // Static shared memory, and what the driver reserves.
    static constexpr int64_t static_bytes = 1280;
    // In registers: 24 of float32 take 63 of 64. In float64 four would spill.
    static constexpr int64_t most_classes = 24;
    // Of a softmax that is stored: with 24, whose addresses take registers too, 44 bytes would spill on sm_80.
    static constexpr int64_t most_stored_classes = 20;
  };

  // As HistogramCount: weights of four bytes take the place of counts.
  struct HistogramGradient {
    static constexpr int threads = 768;                // 80 registers each
    static constexpr int threads_of_focal_rows = 640;  // 96: with a focal term, classes in rows spilled 20 bytes of 80
    static constexpr int64_t static_bytes = 1408;      // as above
    static constexpr int64_t most_classes = 24;
  };

  // Kernels with one block for each segment, which place its bins and weigh them: a bin takes some 1000 instructions, one after
  // another. At most 128 registers each.
  struct HistogramBins {
    static constexpr int threads = 512;
  };

  struct HistogramSum {
    static constexpr int threads = 256;
    static constexpr int64_t most_tiles = 32;  // pixels of a thread, at most: a block ends with a sum over its threads
  };
};

using Tuning = Sm80;

}  // namespace veerloss
