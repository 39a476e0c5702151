// Method "histogram" on a GPU: the counts of a block, and how classes and pixels are shared out among blocks.
#pragma once

#include "../class_parts.cuh"
#include "coordinates.cuh"

namespace veerloss {

using CountPolicy = Tuning::HistogramCount;

// A word for each bin of a class: background in the low 16 bits, foreground in the high ones. A chunk is too short for
// overflow.
constexpr uint32_t one_background = 1, one_foreground = 1u << 16;
static_assert(CountPolicy::most_tiles * CountPolicy::threads < 65536, "counts of 16 bits");

// Words between the counts of two classes: known from the number of classes, also where there are less bins, of the coarse
// pass.
VEERLOSS_HD constexpr int64_t plane_of(int64_t classes) {
  return BinLayout::bins(classes);
}

// How classes are shared out among blocks.
struct Groups {
  int classes, groups;  // of a group at most; their number
};

// other_bytes: of shared memory, beside the classes.
inline Groups groups_of(const SegmentBatch& b, int64_t most_classes, int64_t other_bytes = 0) {
  const int64_t bytes = max_shared_bytes_of_block() - CountPolicy::static_bytes - other_bytes;
  const int64_t fits = bytes / class_bytes(b.classes()), fit = fits < most_classes ? fits : most_classes;
  if (fit < 1) throw std::runtime_error("veerloss: method 'histogram' needs 36 KiB of shared memory for a block");
  const int64_t groups = ceil_div(b.classes(), fit);
  return {static_cast<int>(ceil_div(b.classes(), groups)), static_cast<int>(groups)};
}

// What a block has beside the classes.
struct BlockCounts {
  BinPair* tables;   // [classes of the group][BinLayout::table]
  uint32_t* counts;  // [classes of the group][plane_of], of which args.bins are used
  int64_t row;
  int first_class, end_class;
};

__device__ inline BlockCounts block_counts(const LovaszHistogramCount& args, unsigned char* memory, int64_t row, int group,
                                           Groups groups) {
  const auto classes = static_cast<int>(args.batch.classes());
  const int first = group * groups.classes, end = first + groups.classes < classes ? first + groups.classes : classes;
  auto* tables = reinterpret_cast<BinPair*>(memory);
  return {tables, reinterpret_cast<uint32_t*>(tables + (end - first) * BinLayout::table), row, first, end};
}

__device__ inline bool is_counted(const LovaszHistogramCount& args, int64_t row, int c) {
  return !args.segment_mask || args.segment_mask[row * args.batch.classes() + c];
}

// A block of `threads`: zero counts, and tables; of a class that is not counted one that finds bin 0 for every pixel. Whether
// any class is counted.
template <int threads>
__device__ inline bool begin_block(const LovaszHistogramCount& args, const BlockCounts& block) {
  bool any = false;
  for (int c = block.first_class; c < block.end_class; ++c) any |= is_counted(args, block.row, c);
  if (!any) return false;
  const int classes = block.end_class - block.first_class, table = BinLayout::table;
  for (int i = static_cast<int>(threadIdx.x); i < classes * table; i += threads) {
    const int c = block.first_class + i / table, k = i % table;
    BinPair pair = args.table ? args.table[(block.row * args.batch.classes() + c) * table + k] : coarse_pair(k);
    if (!is_counted(args, block.row, c)) pair = {0.0f, k == 0 ? 0.0f : BinLayout::magic};
    block.tables[i] = pair;
  }
  const auto words = classes * static_cast<int>(plane_of(args.batch.classes()));
  for (int i = static_cast<int>(threadIdx.x); i < words; i += threads) block.counts[i] = 0;
  return true;
}

// What a thread finds out about its pixels: how many count; whether a target is out of range, a logit NaN.
struct PixelTotals {
  int valid = 0;
  bool bad = false, nan = false;
};

// Adds a block's counts, and totals of its threads, to those of the segments.
template <int threads>
__device__ inline void end_block(const LovaszHistogramCount& args, const BlockCounts& block, const PixelTotals& totals) {
  __shared__ int valid, bad, nan;
  if (threadIdx.x == 0) valid = bad = nan = 0;
  __syncthreads();
  if (totals.valid) atomicAdd(&valid, totals.valid);
  if (totals.bad) bad = 1;
  if (totals.nan) nan = 1;
  __syncthreads();
  const auto bins = static_cast<int>(args.bins);
  const int64_t classes = args.batch.classes(), plane = plane_of(classes);
  int32_t* counts = args.counts + (block.row * classes + block.first_class) * 2 * bins;
  for (int c = 0; c < block.end_class - block.first_class; ++c) {
    if (!is_counted(args, block.row, block.first_class + c)) continue;
    for (int k = static_cast<int>(threadIdx.x); k < bins; k += threads) {
      const uint32_t word = block.counts[c * plane + k];
      if (word & 0xffff) atomicAdd(counts + 2 * c * bins + k, static_cast<int32_t>(word & 0xffff));
      if (word >> 16) atomicAdd(counts + (2 * c + 1) * bins + k, static_cast<int32_t>(word >> 16));
    }
    if (threadIdx.x != 0) continue;
    atomicAdd(counts + 2 * c * bins, valid);
    if (bad) atomicAdd(counts + (2 * c + 1) * bins, 1);
    if (bad || nan) atomicMax(args.largest + block.row * classes + block.first_class + c, key_of_nan);
  }
}

// Adds a pixel to a bin, by its offset, of the counts of a class. The lowest bin of background is not counted.
__device__ inline void add_to_bin(uint32_t* counts, uint32_t bin, uint32_t pixel) {
  atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counts) + bin), pixel);
}

// Pixels of a batch, or of its sample, in chunks for blocks of `threads`.
inline Chunks count_chunks(const SegmentBatch& b, int64_t groups, bool sampled, int threads = CountPolicy::threads) {
  return chunks_of(b, threads, CountPolicy::most_tiles, multiprocessors(), groups, sampled);
}

// ---- softmax with classes in registers (histogram_count_softmax.cu)

// Classes in registers are counted without their largest errors.
inline bool fits_registers(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  return b.errors == Errors::softmax && !args.find_largest && b.logits.dtype != DType::f64 && is_integer(b.target.dtype) &&
         are_near(b.logits);
}
// All of a pixel: then its softmax needs no pass of its own.
inline bool all_fit_registers(const LovaszHistogramCount& args) {
  return fits_registers(args) && args.batch.classes() <= CountPolicy::most_classes;
}

// Whether the pass that counts sums the focal term of a compound loss.
inline bool sums_focal(const LovaszHistogramCount& args) {
  return args.terms.focal_sums && !args.segment_mask && all_fit_registers(args);
}
// No pass has more blocks for a group of classes.
inline int64_t most_count_blocks(const Geometry& g) {
  return g.images * ceil_div(g.pixels, CountPolicy::threads_of_rows);
}

void launch_count_softmax(const LovaszHistogramCount& args);

}  // namespace veerloss
