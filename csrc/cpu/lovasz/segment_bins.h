// The bins of a segment as a structure of arrays, for BinTiles::weigh.
#pragma once

#include <cstdint>
#include <vector>

namespace veerloss {

// [bins + 1]: coordinates and counts of the bins and, last, the end of the window, a bin of width 0.
class SegmentBins {
 public:
  explicit SegmentBins(int64_t bins) : storage_(9 * (bins + 2)) {
    double* next = storage_.data();
    for (double** array : {&edge, &middle, &width, &fg, &bg, &fg_before, &bg_before, &fg_weight, &bg_weight}) {
      *array = next;
      next += bins + 2;
    }
  }

  double *edge, *middle, *width;            // lower edge
  double *fg, *bg, *fg_before, *bg_before;  // pixels in the bin, and in those of larger errors
  double *fg_weight, *bg_weight;

 private:
  std::vector<double> storage_;
};

// Sums over a segment's bins, in lanes: the loss, the bound on what binning changed, and JaccardDeviation.
struct BinSums {
  enum { loss, bound, weights, gradient_deviation, loss_deviation, count };
  static constexpr int64_t lanes = 8, block = 256;
  double of[count][lanes] = {};

  double operator[](int which) const {
    double all = 0;
    for (double lane : of[which]) all += lane;
    return all;
  }
};

}  // namespace veerloss
