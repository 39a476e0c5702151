// Scalar maths of method "histogram" of the Lovász losses: cells and bins of errors, and the weights of the pixels in them.
//
// The weight of a pixel depends only on how many foreground and background pixels have a larger error, so pixels are counted by
// error instead of sorted. Any order of the pixels inside a bin gives a subgradient of the loss of the rounded errors; the
// weights here are the mean of "foreground first" and "background first", and still add up to the bin's increment of J.
#pragma once

#include "jaccard.h"

namespace veerloss {

// The weights of one pixel in a bin.
struct JaccardBin {
  double fg, bg;
};

// A bin of `fg` and `bg` pixels, with fg_before and bg_before pixels in the bins of larger errors: integers. total > 0.
VEERLOSS_HD JaccardBin jaccard_bin(double total, double fg_before, double bg_before, double fg, double bg) {
  const double left = total - fg_before, first = total + bg_before, last = first + bg;
  JaccardBin bin;
  bin.fg = 0.5 * (1.0 / first + 1.0 / last);
  bin.bg = (left - 0.5 * fg) / (first * last);
  return bin;
}

// Upper bounds on the sum over a bin's pixels of |weight of jaccard_bin - exact weight|, whatever their order: over the
// foreground and over the background.
//
// The exact weight of a foreground pixel lies between those of the two ends. That of a background pixel with j others of its
// bin before it lies between left / ((first + j)(first + j + 1)) and the same with left - fg. The former is further from bin.bg
// while (first + j)(first + j + 1) <= first * last, the latter from there on; both sums telescope.
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

// Estimated errors of binning, as sums of squares over the pixels of a bin: `gradient` of weight times `slope` (the derivative
// of the error, see slope_of_error), `loss` of weight times error where errors are uniform over the bin's width. `weights` is
// the sum of the squared weights times slope, which makes the former relative.
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

// d error / d logit up to its sign: p (1 - p) of a softmax, else 1.
VEERLOSS_HD double slope_of_error(double error, bool softmax) {
  return softmax ? error * (1.0 - error) : 1.0;
}

// ---- cells and bins: layout.h

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

// The lower edge of a cell; that of cell + 1 is its upper edge. Errors are linear in their positions inside a cell.
VEERLOSS_HD double cell_begin(const BinLayout& layout, int64_t cell_) {
  using Cells = ErrorCells;
  const auto cell = static_cast<uint32_t>(cell_);
  const bool mirrored = layout.bounded && cell > Cells::half;
  const uint32_t unmirrored = mirrored ? Cells::bounded - cell : cell;
  const uint32_t bits = unmirrored < Cells::narrow_cells ? unmirrored << Cells::cell_bits
                                                         : Cells::narrow_end + ((unmirrored - Cells::narrow_cells)
                                                                                << (Cells::cell_bits + Cells::wide_shift));
  const double begin = (unmirrored < Cells::unbounded ? static_cast<double>(bit_cast<float>(bits + Cells::origin)) : 0x1p128) -
                       static_cast<double>(Cells::offset);
  return mirrored ? 1.0 - begin : begin;
}

// Signed, because a gather instruction takes 32-bit indices as signed.
template <bool bounded>
VEERLOSS_HD int32_t bin_of_error(float error, const uint32_t* table) {
  const CellPosition at = cell_of_error<bounded>(error);
  const uint32_t entry = table[static_cast<int32_t>(at.cell)];
  const uint32_t bin = entry_first_bin(entry) + ((at.position * entry_bins(entry)) >> ErrorCells::position_bits);
  return error == 0.0f ? 0 : static_cast<int32_t>(bin);
}

// Errors are counted as float32; a finite double beyond its range becomes the largest float.
template <class T>
VEERLOSS_HD float narrow_error(T error) {
  constexpr T max_float = static_cast<T>(3.402823466e38);
  return static_cast<float>(error > max_float && error - error == T(0) ? max_float : error);
}

// ---- the allocation of bins to cells
//
// s bins divide the mean square errors of a cell by s^2, so their sum over the cells is least where s is proportional to the
// cube root. Half of the budget follows the error of the gradient, half that of the loss. Against shares of the weight: 2 to 40
// times smaller errors (foreground of 1000 in 1M pixels: gradient 1.9e-3 to 1.5e-4).

// The cube root of a square error, relative to the largest one, so that float32 holds it: its cube root takes a third of the
// time.
VEERLOSS_HD double relative_cube_root(double square, double max_square) {
  using std::cbrt;
  return square > 0.0 ? static_cast<double>(cbrt(static_cast<float>(square / max_square))) : 0.0;
}

// From a cell's cube roots and their sums over all cells.
VEERLOSS_HD uint32_t bins_of_cell(double gradient, double sum_gradient, double loss, double sum_loss) {
  double share = 0.0;
  if (sum_gradient > 0.0) share += gradient / sum_gradient;
  if (sum_loss > 0.0) share += loss / sum_loss;
  return 1 + static_cast<uint32_t>(0.5 * share * static_cast<double>(BinLayout::budget) * (1 - 1e-12));
}

// ---- the mean error of the pixels in a bin

// The difference of the counts from one bin to the next, at bin k of a cell with `bins` of them.
template <class Count>
VEERLOSS_HD double slope_of_counts(const Count* counts, int64_t k, int64_t bins) {
  const int64_t below = k > 0 ? k - 1 : 0, above = k + 1 < bins ? k + 1 : bins - 1;
  return static_cast<double>(counts[above] - counts[below]) * (above - below == 2 ? 0.5 : 1.0);
}

// The middle of the bin, shifted by the slope of the counts. Without the shift the many similar segments of saturated classes
// all err to one side (19 classes: 1.3e-6 of the loss).
VEERLOSS_HD double mean_error(double middle, double width, double count, double slope) {
  double shift = slope / (12.0 * (count > 0.0 ? count : 1.0));
  shift = shift < 0.25 ? shift : 0.25;
  return middle + width * (shift > -0.25 ? shift : -0.25);
}

}  // namespace veerloss
