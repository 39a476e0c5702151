// Method "histogram" of the Lovász losses over the bins of a segment. Included once per instruction set by dispatch_isa.h: no
// include guard. The loop over bins vectorises.

struct BinTiles {
  // Computes the weights of bins [begin, end) and adds their terms to the sums. Each bin has neighbours, or slopes of 0 (ends).
  template <bool softmax, bool folded>
  static void weigh(SegmentBins* bins, int64_t begin, int64_t end, double total, BinSums* sums) {
    const double* __restrict fg = bins->fg;
    const double* __restrict bg = bins->bg;
    const double* __restrict fg_before = bins->fg_before;
    const double* __restrict bg_before = bins->bg_before;
    const double* __restrict middle = bins->middle;
    const double* __restrict width = bins->width;
    double* __restrict fg_weight = bins->fg_weight;
    double* __restrict bg_weight = bins->bg_weight;
    for (int64_t block = begin; block < end; block += BinSums::block) {
      const int64_t n = end - block < BinSums::block ? end - block : BinSums::block;
      double terms[BinSums::count][BinSums::block];
      for (int64_t j = 0; j < n; ++j) {
        const int64_t i = block + j;
        const double e = exponent_of(middle[i], folded);
        // Of 2^(e - 32) times 2^32: exp_neg is for numbers below 0.
        const double exp2 = VecMath<double>::exp_neg((e - 32.0) * ln_2) * 0x1p32;
        const ErrorAt error = error_at(middle[i], exp2, folded);
        const JaccardBin bin = jaccard_bin(total, fg_before[i], bg_before[i], fg[i], bg[i]);
        const JaccardBound bound = jaccard_bin_bound(total, fg_before[i], bg_before[i], fg[i], bg[i]);
        const JaccardDeviation deviation =
            jaccard_bin_deviation(bin, bound, fg[i], bg[i], slope_of_error(error.error, softmax), width[i] * error.first);
        const double distance = middle[i + 1] - middle[i - 1];
        const double fg_slope = slope_of_density(fg[i - 1], width[i - 1], fg[i + 1], width[i + 1], distance);
        const double bg_slope = slope_of_density(bg[i - 1], width[i - 1], bg[i + 1], width[i + 1], distance);
        fg_weight[i] = bin.fg;
        bg_weight[i] = bin.bg;
        terms[BinSums::loss][j] =
            bin.fg * sum_of_errors(error, width[i], fg[i], fg_slope) + bin.bg * sum_of_errors(error, width[i], bg[i], bg_slope);
        terms[BinSums::bound][j] = bound.fg + bound.bg;
        terms[BinSums::weights][j] = deviation.weights;
        terms[BinSums::gradient_deviation][j] = deviation.gradient;
        terms[BinSums::loss_deviation][j] = deviation.loss;
      }
      for (int64_t k = 0; k < BinSums::count; ++k) {
        for (int64_t j = n; j % BinSums::lanes != 0; ++j) terms[k][j] = 0;
        for (int64_t j = 0; j < n; j += BinSums::lanes)
          for (int64_t l = 0; l < BinSums::lanes; ++l) sums->of[k][l] += terms[k][j + l];
      }
    }
  }

  // Coordinates at which the bins of a cell begin: bins first, ..., last of a straight line.
  static void edges(double* __restrict edge, int64_t first, int64_t last, double at_first, double step) {
    for (int64_t k = first; k <= last; ++k) edge[k] = at_first + step * static_cast<double>(k - first);
  }
};
