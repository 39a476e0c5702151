// Method "histogram" on a GPU: the table of a segment from its counts, by one block. math/bins.h has the formulas,
// csrc/cpu/lovasz/histogram_place.h the same without threads. Every sum has a fixed order: the results are the same bits in
// every run.
#pragma once

#include "../../math/bins.h"
#include "../device.cuh"
#include "../tuning.cuh"

namespace veerloss {

using BinsPolicy = Tuning::HistogramBins;
constexpr int cells = BinLayout::cells;
static_assert(BinsPolicy::threads >= cells, "a thread for each cell");

// Calls f with a value of the type of counts.
template <class F>
void with_count_type(const BinCounts& counts, const F& f) {
  return counts.is_int64 ? f(int64_t{}) : f(int32_t{});
}

// The bins of a thread: neighbours, the first thread's the lowest.
struct ThreadBins {
  int begin, end;

  __device__ ThreadBins(int first, int last) {
    const int per_thread = (last - first + BinsPolicy::threads - 1) / BinsPolicy::threads,
              at = first + static_cast<int>(threadIdx.x) * per_thread;
    begin = at < last ? at : last;
    end = begin + per_thread < last ? begin + per_thread : last;
  }
};

struct PlaceScratch {
  double sum[BinsPolicy::threads];
  double fg_at[cells + 1], bg_at[cells + 1], fg[cells], bg[cells];
  double at[cells + 1];  // where cells begin, in the bins that were counted
  BinPair window;
  int least, any_least, largest, tail;
};

__device__ inline double larger(double a, double b) {
  return a > b ? a : b;
}

// The table of a segment from counts in `bins` bins of `map`. A function of its own: float64 takes much code.
template <class Count>
__device__ __noinline__ void place_segment(const Count* bg_counts, const Count* fg_counts, const BinMap& map, int bins,
                                           Errors errors, bool sampled, int new_bins, BinPair* table, PlaceScratch& s) {
  const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
  const auto thread = static_cast<int>(threadIdx.x);
  const ThreadBins mine(1, bins);
  if (thread == 0) {
    s.least = s.any_least = bins;
    s.largest = s.tail = 0;
  }
  double thread_fg = 0, thread_bg = 0, all_fg, all_bg;
  int least = bins, any_least = bins, largest = 0;
  for (int k = mine.begin; k < mine.end; ++k) {
    thread_fg += static_cast<double>(fg_counts[k]);
    thread_bg += static_cast<double>(bg_counts[k]);
    if (fg_counts[k] > 0 && least == bins) least = k;
    if ((fg_counts[k] > 0 || bg_counts[k] > 0) && any_least == bins) any_least = k;
    if (fg_counts[k] > 0 || bg_counts[k] > 0) largest = k;
  }
  const double fg_before = block_scan<BinsPolicy::threads>(thread_fg, s.sum, &all_fg);
  const double bg_before = block_scan<BinsPolicy::threads>(thread_bg, s.sum, &all_bg);
  atomicMin(&s.least, least);
  atomicMin(&s.any_least, any_least);
  atomicMax(&s.largest, largest);
  double below = fg_before;
  for (int k = mine.begin; k < mine.end; ++k) {
    if (softmax && fg_counts[k] > 0 && below < tail_pixels) atomicMax(&s.tail, k);
    below += static_cast<double>(fg_counts[k]);
  }
  __syncthreads();
  if (thread == 0) {
    const int first = softmax && s.least < bins ? s.least : s.any_least;
    const CountedRange range{first < bins ? first : 0, s.tail > first ? s.tail : first, s.largest, softmax && fg_counts[0] > 0};
    s.window = window_of(range, map, bins, sampled);
  }
  __syncthreads();
  const BinMap window{&s.window};
  if (thread <= cells) {
    const double position = map.position_at(window.coordinate_at(cell_begin(thread)));
    const double at = position >= 1.0 ? static_cast<double>(bins) : map.bin_at(position);
    s.at[thread] = at < 1.0 ? 1.0 : at > bins ? static_cast<double>(bins) : at;
    s.fg_at[thread] = all_fg;  // of those at the end
    s.bg_at[thread] = all_bg;
  }
  __syncthreads();
  // Cells begin in order: those in a thread's bins are neighbours.
  if (mine.begin < mine.end) {
    int c = 0;
    while (c <= cells && s.at[c] < mine.begin) ++c;
    double fg_below = fg_before, bg_below = bg_before;
    for (int k = mine.begin; k < mine.end; ++k) {
      const auto f = static_cast<double>(fg_counts[k]), b = static_cast<double>(bg_counts[k]);
      for (; c <= cells && s.at[c] < k + 1; ++c) {
        s.fg_at[c] = fg_below + (s.at[c] - k) * f;
        s.bg_at[c] = bg_below + (s.at[c] - k) * b;
      }
      fg_below += f;
      bg_below += b;
    }
  }
  __syncthreads();
  // From here on a thread has a cell.
  const bool has_cell = thread < cells;
  double fg = 0, bg = 0;
  if (has_cell) {
    s.fg[thread] = fg = s.fg_at[thread + 1] - s.fg_at[thread];
    s.bg[thread] = bg = s.bg_at[thread + 1] - s.bg_at[thread];
  }
  __syncthreads();
  if (has_cell && sampled) {
    const int low = thread > 0 ? thread - 1 : 0, high = thread + 1 < cells ? thread + 1 : thread;
    fg = smooth_count(s.fg[low], fg, s.fg[high]);
    bg = smooth_count(s.bg[low], bg, s.bg[high]);
  }
  double total, total_bg;
  const double fg_lower = block_scan<BinsPolicy::threads>(fg, s.sum, &total),
               bg_lower = block_scan<BinsPolicy::threads>(bg, s.sum, &total_bg);
  CellDeviation cell{0.0, 0.0};
  const double everything = total + (sampled ? 0.0 : static_cast<double>(fg_counts[0]));
  if (has_cell) {
    const double low = window.coordinate_at(cell_begin(thread)), width = window.coordinate_at(cell_begin(thread + 1)) - low;
    cell = cell_deviation(fg, bg, everything > 1.0 ? everything : 1.0, total - fg_lower - fg, total_bg - bg_lower - bg,
                          low + 0.5 * width, width, softmax, folded);
  }
  const double max_gradient = block_reduce<BinsPolicy::threads>(cell.gradient, s.sum, larger);
  const double max_loss = block_reduce<BinsPolicy::threads>(cell.loss, s.sum, larger);
  double worth = 1, gradient = 0, sum_gradient = 0;
  VEERLOSS_NO_UNROLL
  for (int step = 0; step <= worth_steps; ++step) {
    gradient = bins_for_gradient(cell.gradient, max_gradient, fg + bg, worth);
    sum_gradient = block_sum<BinsPolicy::threads>(gradient, s.sum);
    if (step < worth_steps) worth = next_worth(worth, sum_gradient, static_cast<double>(new_bins));
  }
  const double loss = bins_for_loss(cell.loss, max_loss), sum_loss = block_sum<BinsPolicy::threads>(loss, s.sum);
  const double share = has_cell ? share_of_cell(gradient, sum_gradient, loss, sum_loss) : 0.0;
  double all_shares;
  const double shares = block_scan<BinsPolicy::threads>(share, s.sum, &all_shares);
  if (has_cell) {
    const double begin = thread == 0 ? 0.0 : bins_before(thread, shares, new_bins);
    const double end =
        thread + 1 == cells ? static_cast<double>(new_bins - 1) : bins_before(thread + 1, shares + share, new_bins);
    table[1 + thread] = cell_pair(thread, begin, end);
  }
  if (thread == 0) table[0] = s.window;
}

// Loads a table, that of the coarse pass for null.
__device__ inline void load_table(const BinPair* table, BinPair* out) {
  for (int i = static_cast<int>(threadIdx.x); i < BinLayout::table; i += BinsPolicy::threads)
    out[i] = table ? table[i] : coarse_pair(i);
  __syncthreads();
}

}  // namespace veerloss
