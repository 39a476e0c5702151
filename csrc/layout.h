// What C++ and Python agree on: enumerations, and the layout of cells and bins of method "histogram". veerloss/_layout.py holds
// the same values; operator `layout_constants` returns these, and tests/test_layout.py compares the two.
#pragma once

#include "platform.h"

namespace veerloss {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };

// What the logits of a Lovász loss are, and so which errors they have.
enum class Errors : int64_t { softmax = 0, probabilities = 1, hinge = 2 };

// Cells divide [0, infinity) by the bits of error + 2^-8: 128 cells to an octave up to 2^4, four to an octave above, cells of
// equal width below 2^-8. Softmax errors are bounded by 1 and also cluster near 1, where a network is sure and wrong: they are
// divided so up to 1/2, and above by 1 - error in mirror image. The counts of a coarse pass over the cells decide how many bins
// each cell gets; a pixel then finds its bin with one look-up.
struct ErrorCells {
  static constexpr float offset = 0.00390625f;                       // 2^-8
  static constexpr uint32_t origin = 0x3b800000u;                    // the bits of `offset`
  static constexpr int cell_bits = 16;                               // mantissa bits below those that select the cell
  static constexpr int position_bits = 15, position_shift = 1;       // of these, the bits of the position inside the cell
  static constexpr uint32_t narrow_end = 12u << 23;                  // 2^4
  static constexpr int wide_shift = 5;                               // additional low bits of a wide cell
  static constexpr uint32_t half = (7u << (23 - cell_bits)) + 1;     // cells up to an error of 1/2
  static constexpr uint32_t bounded = 2 * half;                      // cells up to 1
  static constexpr uint32_t narrow_cells = narrow_end >> cell_bits;  // cells up to 2^4
  static constexpr uint32_t unbounded = narrow_cells + ((0x7f800000u - origin - narrow_end) >> (cell_bits + wide_shift));
  static constexpr uint32_t max_cells = unbounded > bounded ? unbounded : bounded;
};

// The entry of a cell in the look-up table: its first bin in the low 16 bits, its number of bins in the high ones. Bin 0 holds
// the errors that are exactly 0.
constexpr int entry_shift = 16;
constexpr uint32_t entry_mask = (1u << entry_shift) - 1;

VEERLOSS_HD constexpr uint32_t pack_entry(uint32_t first_bin, uint32_t bins) {
  return first_bin | bins << entry_shift;
}
VEERLOSS_HD constexpr uint32_t entry_first_bin(uint32_t entry) {
  return entry & entry_mask;
}
VEERLOSS_HD constexpr uint32_t entry_bins(uint32_t entry) {
  return entry >> entry_shift;
}
// The entry of a cell in a coarse pass, in which bin 1 + c is cell c.
VEERLOSS_HD constexpr uint32_t coarse_entry(uint32_t cell) {
  return pack_entry(1 + cell, 1);
}

// The sizes of a segment's table and counts.
struct BinLayout {
  static constexpr int64_t budget = 6144;  // bins to distribute over the cells, besides the one that each cell has

  VEERLOSS_HD constexpr explicit BinLayout(Errors errors)
      : bounded(errors == Errors::softmax),
        cells(bounded ? ErrorCells::bounded : ErrorCells::unbounded),
        coarse_bins(1 + cells),
        bins(1 + cells + budget) {}

  bool bounded;
  int64_t cells, coarse_bins, bins;
};

// The coarse pass may sample every image: runs of 64 pixels, one every 1031. A prime, so that the runs do not align with the
// columns of an image, whatever its width. On the CPU pixels that are ignored are not counted here; on a GPU they are, where
// their place among the others would take a scan to know: of an image that is mostly ignored the sample is poor, and so its
// bins are allocated again from all pixels.
constexpr int64_t sample_run = 64, sample_step = 1031;

// A segment whose estimated errors (root mean square; of the gradient relative, of the loss absolute) exceed these gets its
// bins allocated again, from the counts of all pixels: a sample of 1 in 16 is too poor where foreground is rare. The losses of
// classes err independently, so the mean of m losses has 1 / sqrt(m) of their error.
constexpr double gradient_tolerance = 5e-4, loss_tolerance = 3e-7;

}  // namespace veerloss
