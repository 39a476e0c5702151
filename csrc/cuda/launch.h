// What csrc/cuda/ops.cpp asks of the kernels: plain pointers and a stream. No torch headers.
#pragma once

#if defined(VEERLOSS_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../jaccard.h"
#include "../layout.h"

namespace veerloss {

// Logits [N, C, P] and targets [N, P], and what they mean.
struct Batch {
  View x, y;
  Geometry g;
  TargetRule rule;
  Errors errors;
  bool per_image;

  VEERLOSS_HD int64_t rows() const { return per_image ? g.images : 1; }
  VEERLOSS_HD int64_t segments() const { return rows() * g.channels; }
  VEERLOSS_HD int64_t length() const { return per_image ? g.pixels : g.images * g.pixels; }  // of a segment
  // The segment of a class in an image, in [rows, classes].
  VEERLOSS_HD int64_t segment(int64_t image, int64_t c) const { return (per_image ? image : 0) * g.channels + c; }
  // The label that is foreground to a channel.
  VEERLOSS_HD int64_t foreground(int64_t c) const { return errors == Errors::hinge ? 1 : c; }
};

// Which segments take part, and how their losses add up.
struct Selection {
  const bool* selected;      // [C], or null for all classes
  bool present;              // only classes with foreground
  const void* class_weight;  // [C] in the arithmetic type, or null
  bool mean;                 // over the classes that take part, and rows
};

// Of a segment, on the device. The deviations estimate what binning costs (bins.h); 0 for method "exact".
struct SegmentResult {
  double loss, bound, gradient_deviation, loss_deviation;
  bool takes_part;
};

// The loss of a batch from those of its segments; all outputs on the device. bounds and doubtful may be null.
struct LossOutput {
  void* loss;  // [] or, without reduction, [segments]
  DType loss_dtype;
  bool reduce;
  void* scale;     // [segments] in the arithmetic type: d loss / d (loss of a segment)
  double* bounds;  // [segments]
  bool* doubtful;  // [segments]
};

// What the gradient of the loss does to a segment: grad times scale.
struct Factors {
  const void* grad;  // [] or, without reduction, [segments]
  DType grad_dtype;
  bool one;
  const void* scale;
};

// ---- method "exact" (lovasz.cu)

// Bytes of scratch memory for one forward pass.
int64_t lovasz_scratch_bytes(const Batch& b, bool wide);
// keys: [C, N, P] in the arithmetic type; with `keep` they become the weights.
void launch_lovasz_forward(const Batch& b, const Selection& selection, const LossOutput& out, void* keys, bool keep,
                           void* scratch, cudaStream_t stream);
void launch_lovasz_backward(const Batch& b, const Factors& factors, const void* weights, const View& grad_logits,
                            cudaStream_t stream);

// ---- method "histogram" (lovasz_histogram.cu); counts are [rows, classes, 2, bins], int32 or int64

// coarse: without a table.
int64_t histogram_scratch_bytes(const Batch& b, bool coarse, bool sampled);
// table: null counts in cells. wanted: [segments], or null for all.
void launch_histogram_count(const Batch& b, const int32_t* table, const bool* wanted, bool sampled, int32_t* counts,
                            double* largest, void* scratch, cudaStream_t stream);
// fine: the table that counts were made with, or null for those of cells.
void launch_histogram_place(Errors errors, int64_t segments, const void* counts, bool counts_64, const int32_t* fine,
                            int32_t* table, cudaStream_t stream);
// results: [segments], in_mean: [rows], both scratch.
void launch_histogram_weigh(const Batch& b, const Selection& selection, const void* counts, bool counts_64,
                            const double* largest, const int32_t* table, const LossOutput& out, void* weights, void* tops,
                            SegmentResult* results, int32_t* in_mean, cudaStream_t stream);
void launch_histogram_sum(const Batch& b, const int32_t* table, const void* weights, const void* tops, const double* units,
                          int64_t* sums, cudaStream_t stream);
void launch_histogram_backward(const Batch& b, const Factors& factors, const int32_t* table, const void* weights,
                               const void* tops, const View& grad_logits, cudaStream_t stream);

// ---- sort.cu

// Pairs of each of `segments` segments of `length`, side by side, in descending order of the keys' low `bits`; equal keys keep
// their order. Words of 32 or 64 bits. Without scratch, returns how many bytes of it are needed.
size_t sort_pairs(void* scratch, size_t scratch_bytes, bool wide, const void* keys, void* sorted_keys, const uint32_t* values,
                  uint32_t* sorted_values, int64_t length, int64_t segments, int bits, cudaStream_t stream);

}  // namespace veerloss
