// What C++ and Python agree on: enumerations, and the layout of cells and bins of method "histogram". veerloss/_layout.py holds
// the same values; operator `layout_constants` returns these, and tests/test_layout.py compares the two.
#pragma once

#include "platform.h"

namespace veerloss {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// What the logits of a Lovász loss are, and so which errors they have.
enum class Errors : int64_t { softmax = 0, probabilities = 1, hinge = 2 };

// What makes probabilities of the logits of a region loss; the function of the index of a segment that it is.
enum class Activation : int64_t { softmax = 0, sigmoid = 1, none = 2 };
enum class Form : int64_t { linear = 0, log = 1, log_cosh = 2 };

// How logits of low resolution become those of the target's: the modes of torch.nn.functional.interpolate, linear_aligned with
// align_corners.
enum class Interpolation : int64_t { nearest = 0, linear = 1, linear_aligned = 2 };

// Pixels are binned by a coordinate of their error, math/bins.h: a monotone function of it under which errors near 0 and near 1
// are as far apart as those between. A segment has a window of coordinates, which cells divide evenly, and its bins are
// distributed over the cells. Its table, [1 + cells] pairs of float32, finds the bin of a coordinate:
//
//   position  saturate(coordinate * table[0].scale + table[0].offset): 0 where the window begins and below, 1 where it ends
//   cell      of the position
//   bin       position * table[1 + cell].scale + table[1 + cell].offset, in units of 1/4 bin, plus 2^23: an integer in the low
//             bits of a float32, which one fused multiply-add makes
//
// Bins begin and end inside of cells: where cells meet is the middle of a bin, and a last digit there changes no bin.
//
// Bin 0 holds the errors below the window. In a softmax these are not counted: the window begins about where the smallest
// foreground error is, and background below it has weight 0. Their number follows from that of all pixels, which is what the
// background count of bin 0 holds in place of its own. Of other losses bin 0 holds the errors that are exactly 0, alone.
struct alignas(8) BinPair {
  float scale, offset;
};

struct BinLayout {
  static constexpr int64_t cells = 128;
  static constexpr int64_t table = 1 + cells;  // pairs
  // Bins of the coarse pass, over the coordinates from -coarse_reach to coarse_reach: 16 to an octave of the error.
  static constexpr int64_t coarse_bins = 1024;
  static constexpr float coarse_reach = 32.0f;
  static constexpr float magic = 8388608.0f;  // 2^23

  // Bins of a segment: as many as let a block of an H100 hold the tables and the counts, 4 bytes a bin, of all classes, up to
  // 26 of them; a block of an A100 up to 19, but for 7 and 8. The same for the numbers of classes that share a kernel. Segments
  // with little foreground gain by more: a thousandth of 250 000 pixels errs by 1.4e-3 of the gradient with 1920 bins, by 6e-4
  // with 8192.
  VEERLOSS_HD static constexpr int64_t bins(int64_t classes) {
    return classes <= 4 ? 8192 : classes <= 8 ? 6144 : classes <= 12 ? 3072 : classes <= 16 ? 2304 : 1920;
  }
  static constexpr int64_t max_bins = 8192;
};

// The coarse pass may sample every image: runs of 64 pixels, one every 1031. A prime, so that the runs do not align with the
// columns of an image, whatever its width. On the CPU pixels that are ignored are not counted here; on a GPU they are, where
// their place among the others would take a scan to know: of an image that is mostly ignored the sample is poor, and so its
// bins are allocated again from all pixels.
constexpr int64_t sample_run = 64, sample_step = 1031;

// A segment whose estimated errors (root mean square; of the gradient relative, of the loss absolute) exceed these gets its
// bins placed again, from the counts of all pixels: a sample of 1 in 16 is too poor where foreground is rare.
constexpr double gradient_tolerance = 5e-4, loss_tolerance = 1e-6;

}  // namespace veerloss
