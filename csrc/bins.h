// The scalar maths of the Lovász losses' method "histogram": cells and bins of errors, and the weights of their pixels.
//
// The weight of a pixel depends on how many pixels of either kind have a larger error, so pixels are counted by error, not
// sorted. Any order within a bin gives a subgradient of the loss of the rounded errors; we take the mean of "foreground first"
// and "background first", in which a bin's weights still add up to its step of J.
#pragma once

#include "jaccard.h"

namespace veerloss {

struct JaccardBin {
  double fg, bg;  // the weight of one pixel
  double step;    // of J over the bin
};

// A bin of `fg` and `bg` pixels with fg_before and bg_before in the bins of larger errors: whole numbers. total > 0.
VEERLOSS_HD JaccardBin jaccard_bin(double total, double fg_before, double bg_before, double fg, double bg) {
  const double left = total - fg_before, first = total + bg_before, last = first + bg;
  JaccardBin bin;
  bin.fg = 0.5 * (1.0 / first + 1.0 / last);
  bin.bg = (left - 0.5 * fg) / (first * last);
  bin.step = fg * bin.fg + bg * bin.bg;
  return bin;
}

// A bound on the sum over a bin's pixels of |weight of jaccard_bin - exact weight|, whatever their order: of the foreground,
// and of the background.
//
// The exact weight of a foreground pixel is between those of the two ends. That of the background pixel with j others of its
// bin before it is between left / ((first + j)(first + j + 1)) and the same with left - fg. The one is further from bin.bg
// while (first + j)(first + j + 1) <= first * last, the other from then on; both sums telescope.
struct JaccardBound {
  double fg, bg;
};

VEERLOSS_HD JaccardBound jaccard_bin_bound(double total, double fg_before, double bg_before, double fg, double bg) {
  const double left = total - fg_before, first = total + bg_before, last = first + bg;
  const double weight = (left - 0.5 * fg) / (first * last);
  using std::sqrt;
  const double root = 0.5 * (sqrt(1.0 + 4.0 * first * last) - 1.0);                   // first - 1/2 < root < last
  const double turn = static_cast<double>(static_cast<int32_t>(root - first + 1.0));  // 0 <= turn <= bg
  JaccardBound bound;
  bound.fg = 0.5 * fg * bg / (first * last);
  bound.bg = turn * (left / (first * (first + turn)) - weight) + (bg - turn) * (weight - (left - fg) / ((first + turn) * last));
  return bound;
}

// What binning costs: mean squares over a bin, as sums over its pixels. `gradient` of weight times `slope` (the factor of the
// gradient over the weight), `loss` of weight times error where errors are spread evenly over the bin's width, and `weights` of
// the weights times `slope` themselves.
struct JaccardDeviation {
  double gradient, loss, weights;
};

VEERLOSS_HD JaccardDeviation jaccard_bin_deviation(JaccardBin bin, JaccardBound bound, double fg, double bg, double slope,
                                                   double width) {
  const double square = fg * bin.fg * bin.fg + bg * bin.bg * bin.bg;
  const double f = fg > 0.0 ? fg : 1.0, b = bg > 0.0 ? bg : 1.0;
  JaccardDeviation deviation;
  deviation.gradient = slope * slope * (bound.fg * bound.fg / f + bound.bg * bound.bg / b);
  deviation.loss = square * width * width / 12.0;
  deviation.weights = slope * slope * square;
  return deviation;
}

// The factor of a logit's gradient over the weight of its error: p (1 - p) of a softmax, else 1.
VEERLOSS_HD double slope_of_error(double error, bool softmax) {
  return softmax ? error * (1.0 - error) : 1.0;
}

// Cells cut [0, infinity) by the bits of error + 2^-8: 128 cells to an octave up to 2^4, four from there on, equal cells below
// 2^-8. Errors of probabilities (`bounded`: at most 1) are cut so up to 1/2, and above by 1 - error in mirror image: there are
// many near 1, too, where a network is sure and wrong. The counts of a coarse pass say how many bins each cell is worth
// (cpu/lovasz_histogram.cpp); a pixel finds its bin with one look-up.
struct ErrorCells {
  static constexpr float offset = 0.00390625f;                       // 2^-8
  static constexpr uint32_t origin = 0x3b800000u;                    // its bits
  static constexpr int cell_bits = 16;                               // below those of the cell
  static constexpr int position_bits = 15, position_shift = 1;       // of them tell the position in the cell
  static constexpr uint32_t narrow_end = 12u << 23;                  // 2^4
  static constexpr int wide_shift = 5;                               // more bits below those of a wide cell
  static constexpr uint32_t half = (7u << (23 - cell_bits)) + 1;     // cells up to an error of 1/2
  static constexpr uint32_t bounded = 2 * half;                      // cells up to 1
  static constexpr uint32_t narrow_cells = narrow_end >> cell_bits;  // cells up to 2^4
  static constexpr uint32_t unbounded = narrow_cells + ((0x7f800000u - origin - narrow_end) >> (cell_bits + wide_shift));
};

struct CellPosition {
  uint32_t cell, position;
};

template <bool bounded>
VEERLOSS_HD CellPosition cell_of_error(float error) {
  using Cells = ErrorCells;
  constexpr uint32_t mask = (1u << Cells::position_bits) - 1;
  const bool mirrored = bounded && error > 0.5f;
  const uint32_t bits = bit_cast<uint32_t>((mirrored ? 1.0f - error : error) + Cells::offset) - Cells::origin;
  const uint32_t past = bits - Cells::narrow_end;
  const bool narrow = bounded || bits < Cells::narrow_end;
  uint32_t cell = narrow ? bits >> Cells::cell_bits : Cells::narrow_cells + (past >> (Cells::cell_bits + Cells::wide_shift));
  uint32_t position = ((narrow ? bits : past >> Cells::wide_shift) >> Cells::position_shift) & mask;
  cell = mirrored ? Cells::bounded - 1 - cell : cell;
  position = mirrored ? mask - position : position;
  const uint32_t last = (bounded ? Cells::bounded : Cells::unbounded) - 1;
  return {cell < last ? cell : last, position};  // NaN ends in the last cell
}

// Where a cell begins; cell + 1 where it ends. Within it errors are linear in their positions.
template <bool bounded>
VEERLOSS_HD double cell_begin(uint32_t cell) {
  using Cells = ErrorCells;
  const bool mirrored = bounded && cell > Cells::half;
  const uint32_t own = mirrored ? Cells::bounded - cell : cell;
  const uint32_t bits = own < Cells::narrow_cells
                            ? own << Cells::cell_bits
                            : Cells::narrow_end + ((own - Cells::narrow_cells) << (Cells::cell_bits + Cells::wide_shift));
  const double begin = own < Cells::unbounded ? static_cast<double>(bit_cast<float>(bits + Cells::origin)) : 0x1p128;
  return mirrored ? 1.0 - (begin - static_cast<double>(Cells::offset)) : begin - static_cast<double>(Cells::offset);
}

// The mean error of `count` pixels in a bin whose neighbours' counts differ: the middle, moved by the slope. Without it the
// many like segments of saturated classes err to one side (19 of them: 1.3e-6 of the loss).
VEERLOSS_HD double mean_error(double middle, double width, double count, double rise) {
  double shift = rise / (12.0 * (count > 0.0 ? count : 1.0));
  shift = shift < 0.25 ? shift : 0.25;
  return middle + width * (shift > -0.25 ? shift : -0.25);
}

// A cell's entry in the look-up table: its first bin, and its number of bins above. Bin 0 holds the errors of exactly 0.
VEERLOSS_HD constexpr uint32_t cell_entry(uint32_t first_bin, uint32_t bins) {
  return first_bin | bins << 16;
}

// Signed, as indices are to be: a gather of 32-bit indices takes them as such.
template <bool bounded>
VEERLOSS_HD int32_t bin_of_error(float error, const uint32_t* table) {
  const CellPosition at = cell_of_error<bounded>(error);
  const uint32_t entry = table[static_cast<int32_t>(at.cell)];
  const uint32_t bin = (entry & 0xffffu) + ((at.position * (entry >> 16)) >> ErrorCells::position_bits);
  return error == 0.0f ? 0 : static_cast<int32_t>(bin);
}

// To float, as which errors are counted; a double that is too large becomes the largest float.
template <class T>
VEERLOSS_HD float narrow_error(T error) {
  constexpr T most = static_cast<T>(3.402823466e38);
  return static_cast<float>(error > most && error - error == T(0) ? most : error);
}

// The cells and bins of a segment's table.
struct BinLayout {
  static constexpr int64_t budget = 6144;  // bins to give out among the cells; each cell has one to begin with

  VEERLOSS_HD explicit BinLayout(Errors errors)
      : bounded(errors == Errors::softmax),
        cells(bounded ? ErrorCells::bounded : ErrorCells::unbounded),
        coarse_bins(1 + cells),
        bins(1 + cells + budget) {}

  VEERLOSS_HD double begin(int64_t cell) const {
    return bounded ? cell_begin<true>(static_cast<uint32_t>(cell)) : cell_begin<false>(static_cast<uint32_t>(cell));
  }

  bool bounded;
  int64_t cells, coarse_bins, bins;
};

// How the counts rise at bin k of a cell's, from one bin to the next.
template <class Count>
VEERLOSS_HD double rise_of_counts(const Count* counts, int64_t k, int64_t bins) {
  const int64_t below = k > 0 ? k - 1 : 0, above = k + 1 < bins ? k + 1 : bins - 1;
  return static_cast<double>(counts[above] - counts[below]) * (above - below == 2 ? 0.5 : 1.0);
}

// A sample of every image: runs of 64 pixels, 1031 from one to the next. A prime, so that the runs do not keep to some columns
// of an image whatever its width.
constexpr int64_t sample_run = 64, sample_step = 1031;

// Above these estimates of a segment's errors (root mean square; relative of the gradient, absolute of the loss) its bins are
// placed again, now by the counts of all pixels. A sample of 1 in 16 is too poor where foreground is rare. The losses of
// classes err independently, so that a mean of m has 1 / sqrt(m) of their error.
constexpr double gradient_tolerance = 5e-4, loss_tolerance = 3e-7;

}  // namespace veerloss
