// Checked tensors of method "histogram" of the Lovász losses.
#pragma once

#include "../math/bins.h"
#include "lovasz.h"

namespace veerloss {

// Tables of `segments`. On the CPU their entries are checked: counting writes where they say; on a GPU they are taken as they
// are.
inline const BinPair* table_data(const Op& op, const char* argument, const Tensor& table, int64_t segments, int64_t bins) {
  const auto* pairs = op.data<const BinPair>(argument, table, 2 * segments * BinLayout::table, DType::f32,
                                             "[rows, C, cells + 1, 2] float32, contiguous");
#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
  bool valid = true;
  for (int64_t i = 0; i < segments; ++i) {
    const BinMap map{pairs + i * BinLayout::table};
    for (int64_t cell = 0; cell < BinLayout::cells; ++cell)
      for (const double position : {cell_begin(cell), cell_begin(cell + 1)}) {
        const double bin = map.bin_in_cell(cell, position);
        valid &= bin >= 0.25 && bin <= static_cast<double>(bins) - 0.25;
      }
  }
  op.check(valid, argument, table, "of cells that lie within the bins");
#else
  (void)bins;
#endif
  return pairs;
}

inline BinCounts counts_data(const Op& op, const char* argument, const Tensor& counts, int64_t segments, int64_t bins) {
  const auto dtype = dtype_of(counts);
  op.check(on_device(counts) && counts.is_contiguous() && counts.numel() == 2 * segments * bins &&
               (dtype == DType::i32 || dtype == DType::i64),
           argument, counts, "[rows, C, 2, bins] int32 or int64, contiguous, of a counting pass");
  return {counts.data_ptr(), dtype == DType::i64};
}

inline int64_t bins_of(const Op& op, const Tensor& counts) {
  op.check(on_device(counts) && counts.dim() == 4 && counts.size(2) == 2 && counts.size(3) > BinLayout::table &&
               counts.size(3) <= BinLayout::max_bins,
           "counts", counts, "[rows, C, 2, bins]");
  return counts.size(3);
}

inline const void* weights_data(const Op& op, const SegmentBatch& b, const Tensor& weights) {
  return op.data<const void>("weights", weights, b.segments() * 2 * BinLayout::bins(b.classes()), opmath_of(b),
                             "the weights of the forward pass");
}

}  // namespace veerloss
