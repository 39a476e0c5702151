// Method "histogram" of the Lovász losses over a block of bins. Included once per instruction set by dispatch_isa.h: no include
// guard. The loop over bins vectorises.

struct BinTiles {
  // Computes the weights of a block, and adds its terms to the sums; n is a multiple of the lanes.
  template <bool softmax>
  static void weigh(BinBlock* bins, int64_t n, double total, BinSums* sums) {
    const double* __restrict fg = bins->fg;
    const double* __restrict bg = bins->bg;
    const double* __restrict fg_slope = bins->fg_slope;
    const double* __restrict bg_slope = bins->bg_slope;
    const double* __restrict middle = bins->middle;
    const double* __restrict fg_before = bins->fg_before;
    const double* __restrict bg_before = bins->bg_before;
    const double* __restrict width = bins->width;
    double* __restrict fg_weight = bins->fg_weight;
    double* __restrict bg_weight = bins->bg_weight;
    double terms[BinSums::count][BinBlock::size];
    for (int64_t i = 0; i < n; ++i) {
      const JaccardBin bin = jaccard_bin(total, fg_before[i], bg_before[i], fg[i], bg[i]);
      const JaccardBound bound = jaccard_bin_bound(total, fg_before[i], bg_before[i], fg[i], bg[i]);
      const JaccardDeviation deviation =
          jaccard_bin_deviation(bin, bound, fg[i], bg[i], slope_of_error(middle[i], softmax), width[i]);
      fg_weight[i] = bin.fg;
      bg_weight[i] = bin.bg;
      terms[BinSums::loss][i] = bin.fg * fg[i] * mean_error(middle[i], width[i], fg[i], fg_slope[i]) +
                                bin.bg * bg[i] * mean_error(middle[i], width[i], bg[i], bg_slope[i]);
      terms[BinSums::bound][i] = bound.fg + bound.bg;
      terms[BinSums::weights][i] = deviation.weights;
      terms[BinSums::gradient_deviation][i] = deviation.gradient;
      terms[BinSums::loss_deviation][i] = deviation.loss;
    }
    for (int64_t k = 0; k < BinSums::count; ++k)
      for (int64_t i = 0; i < n; i += BinBlock::lanes)
        for (int64_t l = 0; l < BinBlock::lanes; ++l) sums->lanes[k][l] += terms[k][i + l];
  }
};
