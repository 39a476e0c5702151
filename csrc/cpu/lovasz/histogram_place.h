// The table of a segment from its counts: the window of its errors, and the bins of each cell.
#pragma once

#include <algorithm>
#include <vector>

#include "../../kernels.h"
#include "../../math/bins.h"

namespace veerloss {

// From counts in `bins` bins of `map`, those of a sample or of all pixels; `place` has buffers, for one thread.
class BinPlacer {
 public:
  template <class Count>
  void place(const Count* bg_counts, const Count* fg_counts, const BinMap& map, int64_t bins, Errors errors, bool sampled,
             int64_t new_bins, BinPair* table) {
    constexpr int64_t cells = BinLayout::cells;
    const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
    fg_below_.assign(bins + 1, 0.0);  // in the bins from 1 on
    bg_below_.assign(bins + 1, 0.0);
    CountedRange range{0, 0, 0, softmax && fg_counts[0] > 0};
    const bool any_foreground = std::any_of(fg_counts + 1, fg_counts + bins, [](Count n) { return n > 0; });
    for (int64_t k = 1; k < bins; ++k) {
      const bool bounds = fg_counts[k] > 0 || (bg_counts[k] > 0 && !(softmax && any_foreground));
      fg_below_[k + 1] = fg_below_[k] + static_cast<double>(fg_counts[k]);
      bg_below_[k + 1] = bg_below_[k] + static_cast<double>(bg_counts[k]);
      if (bounds && range.least == 0) range.least = k;
      if (softmax && fg_counts[k] > 0 && fg_below_[k] < tail_pixels) range.tail = k;
      if (fg_counts[k] > 0 || bg_counts[k] > 0) range.largest = k;
    }
    range.tail = std::max(range.tail, range.least);
    table[0] = window_of(range, map, bins, sampled);

    const BinMap window{table};
    double fg_at[cells + 1], bg_at[cells + 1], fg[cells], bg[cells], gradient[cells] = {}, loss[cells] = {},
                                                                     bins_of_gradient[cells];
    for (int64_t c = 0; c <= cells; ++c) {
      const double position = map.position_at(window.coordinate_at(cell_begin(c)));
      fg_at[c] = count_below(fg_below_, position, map, bins);
      bg_at[c] = count_below(bg_below_, position, map, bins);
    }
    for (int64_t c = 0; c < cells; ++c) {
      fg[c] = fg_at[c + 1] - fg_at[c];
      bg[c] = bg_at[c + 1] - bg_at[c];
    }
    if (sampled) {
      smooth(fg);
      smooth(bg);
    }
    double total = 0, fg_before = 0, bg_before = 0, max_gradient = 0, max_loss = 0, sum_gradient = 0, sum_loss = 0;
    for (double n : fg) total += n;
    if (!sampled) total += static_cast<double>(fg_counts[0]);
    total = std::max(total, 1.0);
    for (int64_t c = cells - 1; c >= 0; --c) {
      const double low = window.coordinate_at(cell_begin(c)), width = window.coordinate_at(cell_begin(c + 1)) - low;
      const CellDeviation cell =
          cell_deviation(fg[c], bg[c], total, fg_before, bg_before, low + 0.5 * width, width, softmax, folded);
      gradient[c] = cell.gradient;
      loss[c] = cell.loss;
      max_gradient = std::max(max_gradient, gradient[c]);
      max_loss = std::max(max_loss, loss[c]);
      fg_before += fg[c];
      bg_before += bg[c];
    }
    double worth = 1;
    for (int step = 0; step <= worth_steps; ++step) {
      sum_gradient = 0;
      for (int64_t c = 0; c < cells; ++c)
        sum_gradient += bins_of_gradient[c] = bins_for_gradient(gradient[c], max_gradient, fg[c] + bg[c], worth);
      if (step < worth_steps) worth = next_worth(worth, sum_gradient, static_cast<double>(new_bins));
    }
    for (int64_t c = 0; c < cells; ++c) sum_loss += loss[c] = bins_for_loss(loss[c], max_loss);
    double shares = 0, before = 0;
    for (int64_t c = 0; c < cells; ++c) {
      shares += share_of_cell(bins_of_gradient[c], sum_gradient, loss[c], sum_loss);
      const double next = c + 1 == cells ? static_cast<double>(new_bins - 1) : bins_before(c + 1, shares, new_bins);
      table[1 + c] = cell_pair(c, before, next);
      before = next;
    }
  }

 private:
  // Of the bins from 1 on, bins divided evenly.
  static double count_below(const std::vector<double>& below, double position, const BinMap& map, int64_t bins) {
    if (position >= 1.0) return below[bins];
    const double at = std::clamp(map.bin_at(position), 1.0, static_cast<double>(bins));
    const auto k = static_cast<int64_t>(at);
    return k >= bins ? below[bins] : below[k] + (at - static_cast<double>(k)) * (below[k + 1] - below[k]);
  }

  static void smooth(double* count) {
    constexpr int64_t cells = BinLayout::cells;
    double below = count[0];
    for (int64_t c = 0; c < cells; ++c) {
      const double here = count[c];
      count[c] = smooth_count(below, here, c + 1 < cells ? count[c + 1] : here);
      below = here;
    }
  }

  std::vector<double> fg_below_, bg_below_;
};

// The table of the coarse pass.
inline const std::vector<BinPair>& coarse_table() {
  static const std::vector<BinPair> table = [] {
    std::vector<BinPair> pairs;
    for (int64_t i = 0; i < BinLayout::table; ++i) pairs.push_back(coarse_pair(i));
    return pairs;
  }();
  return table;
}

// Calls f with the counts, int32_t* or int64_t*.
template <class F>
void with_counts(const BinCounts& counts, const F& f) {
  if (counts.is_int64)
    f(static_cast<const int64_t*>(counts.data));
  else
    f(static_cast<const int32_t*>(counts.data));
}

}  // namespace veerloss
