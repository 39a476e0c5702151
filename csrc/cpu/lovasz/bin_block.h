// The bins of a segment in blocks of structure-of-arrays, for BinTiles::weigh.
#pragma once

#include <cstdint>

namespace veerloss {

// A block of bins, from the largest error down: the pixels before and in each, the slope of their counts, its errors, and the
// weights to compute.
struct BinBlock {
  static constexpr int64_t lanes = 8, size = 256;
  double fg_before[size], bg_before[size], fg[size], bg[size], fg_slope[size], bg_slope[size], middle[size], width[size];
  double fg_weight[size], bg_weight[size];
};

// Sums over a segment's bins, in lanes: the loss, the bound on what binning changed, and JaccardDeviation.
struct BinSums {
  enum { loss, bound, weights, gradient_deviation, loss_deviation, count };
  double lanes[count][BinBlock::lanes] = {};

  double operator[](int which) const {
    double all = 0;
    for (double lane : lanes[which]) all += lane;
    return all;
  }
};

}  // namespace veerloss
