// The kernels of a device, as the operators (ops/) call them: plain pointers, no torch headers. cpu/ and cuda/ implement all of
// them. Every launcher takes one struct; a stream is ignored on the CPU.
#pragma once

#include <optional>

#include "layout.h"
#include "math/region.h"
#include "math/upsample.h"
#include "views.h"

namespace veerloss {

// A CUDA stream.
using Stream = void*;

// Logits, and their gradient, are of low resolution, [N, C, low.pixels] in rows: a loss is that of the logits which
// torch.nn.functional.interpolate makes of them, of the size of the target. The geometry of a batch is that of the target.
struct Upsample {
  UpsampleAxis axes[3];  // depth, height, width; 1 to 1 where there are less
  Geometry low;
};

namespace kernels {
// Of a backward pass.
int64_t upsample_scratch_bytes(const Upsample& upsample);
}  // namespace kernels

// ---- focal losses

struct SigmoidFocalInput {
  View logits, target;  // [N, C, P]; target may be class indices [N, P] (`class_indices`)
  View weight;          // [N, C, P], data null for none
  Geometry geometry;
  TargetRule rule;
  bool class_indices;
  std::optional<double> alpha;
  const void* class_alpha;  // [C] opmath type, or null
  double gamma;
  std::optional<Upsample> upsample = {};
};

struct SoftmaxFocalInput {
  View logits, target;  // [N, C, P], [N, P]; target may be class probabilities [N, C, P] (`class_probabilities`)
  Geometry geometry;
  TargetRule rule;
  bool class_probabilities;
  double alpha;
  const void* class_alpha;  // [C] opmath type, or null
  double gamma, label_smoothing;
  std::optional<Upsample> upsample = {};
};

// loss = scale * sum of the elements' losses, where scale is 1 / valid elements for "mean", else factor / normalizer.
struct FocalLoss {
  Reduction reduction;
  double factor;
  View normalizer;  // one element, data null for none
  View loss;        // one element, or without reduction one for each element of the loss
  View scale;       // one element, opmath type
  void* scratch;    // sigmoid_focal_scratch_bytes(), softmax_focal_scratch_bytes()
};

struct FocalGradient {
  Reduction reduction;
  View grad;   // shaped as the loss
  View scale;  // of the forward pass; unused without reduction
  View grad_logits;
  void* scratch;  // upsample_scratch_bytes(), if there is an upsample
};

namespace kernels {
int64_t sigmoid_focal_scratch_bytes(const SigmoidFocalInput& input);
void sigmoid_focal_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream);
void sigmoid_focal_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream);
int64_t softmax_focal_scratch_bytes(const SoftmaxFocalInput& input);
void softmax_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, Stream stream);
void softmax_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream);
// On the CPU alone, of logits of low resolution: `gradient`, if it has data, is that of the sum of the losses, for a loss that
// is reduced.
void upsampled_focal_forward(const SigmoidFocalInput& input, const FocalLoss& out, const View& gradient);
void upsampled_focal_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const View& gradient);
}  // namespace kernels

// ---- losses of segments: Lovász and region losses

// Logits or probabilities [N, C, P] and class indices [N, P], and what they mean. A segment is one class over the pixels of the
// batch, or of an image with per_image; tensors of one value per segment are [rows, classes].
struct SegmentBatch {
  View logits, target;
  Geometry geometry;
  TargetRule rule;
  Errors errors;  // of a region loss softmax or probabilities
  bool mask;      // class indices are of a binary mask: label 1 is foreground to the only channel
  bool per_image;
  std::optional<Upsample> upsample = {};

  VEERLOSS_HD int64_t rows() const { return per_image ? geometry.images : 1; }
  VEERLOSS_HD int64_t classes() const { return geometry.channels; }
  VEERLOSS_HD int64_t segments() const { return rows() * geometry.channels; }
  // Pixels of a segment.
  VEERLOSS_HD int64_t length() const { return per_image ? geometry.pixels : geometry.images * geometry.pixels; }
  VEERLOSS_HD int64_t segment(int64_t image, int64_t c) const { return (per_image ? image : 0) * geometry.channels + c; }
  // The label that is foreground to class c.
  VEERLOSS_HD int64_t foreground(int64_t c) const { return mask ? 1 : c; }
};

// Which segments take part. On a GPU one with a target out of range counts as having both: then its loss is NaN.
struct SegmentSelection {
  const bool* selected;  // [C], or null for all classes
  bool present;          // only classes with foreground

  VEERLOSS_HD bool takes_part(int64_t c, bool has_valid, bool has_foreground) const {
    return has_valid && (!selected || selected[c]) && (!present || has_foreground);
  }
};

// The loss of a batch is the sum over its segments of scale times the loss of the segment. scale is 0 for segments that take no
// part, else the class's weight, for "mean" divided by the number of segments in the mean.
struct SegmentLoss {
  Reduction reduction;
  const void* class_weight;  // [C] opmath type, or null
  void* loss;                // one element, or without reduction [segments]
  DType loss_dtype;
  void* scale;  // [segments], opmath type
};

// d loss / d (loss of a segment) = grad * scale.
struct SegmentGradient {
  Reduction reduction;
  const void* grad;  // one element, or without reduction [segments]
  DType grad_dtype;
  const void* scale;
  View grad_logits;
  void* scratch;  // upsample_scratch_bytes(), if there is an upsample
};

// ---- terms of a compound loss
//
// A pass over the pixels for a loss of segments has their softmax at hand, or the logits of a mask: on the way it sums for a
// focal term and for a region loss, and adds their gradients. Null: there is no such term.

// Of softmax_focal_loss of class indices; of a mask that of sigmoid_focal_loss, which has no smoothing and no class_alpha.
struct FocalTerm {
  std::optional<double> alpha;
  const void* class_alpha;  // [C] opmath type, or null
  double gamma, label_smoothing;
};

struct TermSums {
  FocalTerm focal;
  double* focal_sums = nullptr;    // [3]: the losses of all pixels, how many count, and the alpha of their labels
  int64_t* region_sums = nullptr;  // [rows, classes, RegionLayout::words], zeros before

  VEERLOSS_HD bool any() const { return focal_sums || region_sums; }
};

struct TermGradients {
  FocalTerm focal;
  const void* focal_scale = nullptr;  // one element, opmath type: d loss / d (sum of the pixels' focal losses)
  // [rows, classes, 2], opmath type: d loss / dp of foreground and of background, added to the weights of the errors. (Of
  // method "histogram" of a softmax the weights of the bins have it.)
  const void* region = nullptr;

  VEERLOSS_HD bool any() const { return focal_scale || region; }
};

// ---- Lovász losses, method "exact"

struct LovaszExactForward {
  SegmentBatch batch;
  SegmentSelection selection;
  SegmentLoss out;
  void* keys;                           // [C, N, P], opmath type: error keys, which become the signed weights of the errors
  std::optional<int64_t> valid_pixels;  // on the CPU: [C, valid_pixels] instead, of the pixels that are not ignored
  bool keep_weights;                    // else `keys` holds nothing of use afterwards
  TermSums terms;
  void* scratch;  // lovasz_exact_scratch_bytes()
  Stream stream;
};

struct LovaszExactBackward {
  SegmentBatch batch;   // on a GPU target and rule are for terms alone: the weights already depend on them
  const void* weights;  // of the forward pass
  std::optional<int64_t> valid_pixels;
  SegmentGradient out;
  TermGradients terms;
  Stream stream;
};

namespace kernels {
int64_t lovasz_exact_scratch_bytes(const SegmentBatch& batch);
void lovasz_exact_forward(const LovaszExactForward& args);
void lovasz_exact_backward(const LovaszExactBackward& args);
}  // namespace kernels

// ---- Lovász losses, method "histogram"
//
// Counts are [rows, classes, 2, bins] of background and foreground; bin 0 of the background holds the number of all pixels of
// the segment that count. Tables are [rows, classes, BinLayout::table] of pairs (layout.h).

// Counts that may have been added up over ranks.
struct BinCounts {
  const void* data;
  bool is_int64;  // else int32
};

struct LovaszHistogramCount {
  SegmentBatch batch;
  const BinPair* table;      // null: that of the coarse pass
  const bool* segment_mask;  // [segments] that are counted, or null for all
  bool sampled;
  bool find_largest;  // else `largest` has only NaN, and not how large errors are
  int64_t bins;       // of the counts
  int32_t* counts;    // zeros before. On a GPU a target out of range counts as foreground in bin 0 of every class
  uint32_t* largest;  // [segments], zeros before: key_of_coordinate of the largest error, 0: no pixel
  TermSums terms;
  void* scratch;  // lovasz_histogram_scratch_bytes()
  Stream stream;
};

struct LovaszHistogramPlace {
  Errors errors;
  int64_t segments;
  BinCounts counts;
  int64_t counted_bins;          // bins of `counts`
  const BinPair* counted_table;  // the table that they were made with, or null for that of the coarse pass
  bool sampled;                  // whether they are of a sample
  int64_t bins;                  // to distribute in the table
  BinPair* table;
  Stream stream;
};

struct LovaszHistogramWeigh {
  SegmentBatch batch;  // target and rule are unused
  SegmentSelection selection;
  int64_t bins;
  BinCounts counts;
  const bool* recounted_mask;  // [segments] whose counts are `recounts`, or null for none
  BinCounts recounts;
  const BinPair* recounted_table;
  const uint32_t* largest;  // [segments]
  const BinPair* table;
  SegmentLoss out;
  void* weights;      // [rows, classes, 2, bins], opmath type, signed: background positive, foreground negative
  double* bounds;     // [segments]: upper bound on the sum of |weight - exact weight|
  bool* needs_rebin;  // [segments]: it has no foreground, or its estimated errors exceed the tolerances of layout.h
  bool again;  // a second call follows whatever this one finds: on a GPU all but needs_rebin and better_table is left to it
  BinPair* better_table;  // for segments that need it; of a second call the table that the weights are for

  VEERLOSS_HD bool recounted(int64_t segment) const { return recounted_mask && recounted_mask[segment]; }
  VEERLOSS_HD const BinPair* table_of(int64_t segment) const {
    return (recounted(segment) ? recounted_table : table) + segment * BinLayout::table;
  }
  void* scratch;  // lovasz_histogram_weigh_scratch_bytes()
  Stream stream;
};

struct LovaszHistogramSum {
  SegmentBatch batch;  // errors that may be 0 where foreground is right: probabilities or a hinge
  int64_t bins;
  const BinPair* table;
  const void* weights;
  const double* units;  // [segments]
  int64_t* sums;        // [segments]: |weight| * error over the pixels, in units of 1 / units
  Stream stream;
};

struct LovaszHistogramBackward {
  SegmentBatch batch;
  int64_t bins;
  const BinPair* table;
  const void* weights;
  SegmentGradient out;
  TermGradients terms;
  Stream stream;
};

namespace kernels {
int64_t lovasz_histogram_scratch_bytes(const LovaszHistogramCount& args);  // all but its pointers
void lovasz_histogram_count(const LovaszHistogramCount& args);
void lovasz_histogram_place(const LovaszHistogramPlace& args);
int64_t lovasz_histogram_weigh_scratch_bytes(const SegmentBatch& batch);
void lovasz_histogram_weigh(const LovaszHistogramWeigh& args);
void lovasz_histogram_sum(const LovaszHistogramSum& args);
void lovasz_histogram_backward(const LovaszHistogramBackward& args);
}  // namespace kernels

// ---- region losses

// Values of the target, [N, C, P] in [0, 1], take the place of class indices with `dense`; then batch.target is not read.
struct RegionInput {
  SegmentBatch batch;
  Activation activation;
  bool dense;
  View values;
  std::optional<double> ignored_value;  // of a dense target
  bool squared;                         // S and T are sums of squares
};

// Sums of a segment in fixed point, which threads, blocks and ranks add up in any order: math/region.h.
struct RegionSums {
  RegionInput input;
  int64_t* sums;  // [rows, classes, RegionLayout::words], zeros before
  Stream stream;
};

struct RegionWeigh {
  SegmentBatch batch;  // target and rule are unused
  SegmentSelection selection;
  const int64_t* sums;
  RegionRule rule;
  SegmentLoss out;
  double* coefficients;  // [rows, classes, 2]: dL/dp = t * [0] + [1], with `squared` t * [0] + 2 p * [1]
  Stream stream;
};

struct RegionBackward {
  RegionInput input;
  const double* coefficients;
  SegmentGradient out;
  Stream stream;
};

namespace kernels {
void region_sum(const RegionSums& args);
void region_weigh(const RegionWeigh& args);
void region_backward(const RegionBackward& args);
}  // namespace kernels

// ---- compound losses without a Lovász term

struct CompoundSum {
  SegmentBatch batch;
  TermSums terms;
  void* scratch;  // compound_sum_scratch_bytes()
  Stream stream;
};

struct CompoundBackward {
  SegmentBatch batch;
  SegmentGradient out;  // its scale is of no segment: grad alone
  TermGradients terms;
  Stream stream;
};

namespace kernels {
int64_t compound_sum_scratch_bytes(const SegmentBatch& batch);
void compound_sum(const CompoundSum& args);
void compound_backward(const CompoundBackward& args);
}  // namespace kernels

}  // namespace veerloss
