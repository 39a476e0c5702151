// Method "histogram" of the Lovász losses on the CPU, the steps over the bins of a segment: allocate bins to cells, and weigh
// bins. veerloss/_histogram.py has the order of the steps.

#include <cmath>
#include <limits>

#include "../../math/bins.h"
#include "bin_block.h"
#include "segments.h"

#define VEERLOSS_TILES "bin_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {
namespace {

// Calls f with the counts, int32_t* or int64_t*.
template <class F>
void with_counts(const BinCounts& counts, const F& f) {
  if (counts.is_int64)
    f(static_cast<const int64_t*>(counts.data));
  else
    f(static_cast<const int32_t*>(counts.data));
}

// ---- allocate

struct CellCounts {
  int64_t bg, fg;
};

// A segment's table from the counts of its cells, and of its foreground of error 0.
void allocate_segment(const std::vector<CellCounts>& counts, int64_t fg_at_0, const BinLayout& layout, uint32_t* table) {
  const int64_t cells = layout.cells;
  std::vector<double> gradient(cells), loss(cells);
  double fg = 0, bg = 0, max_gradient = 0, max_loss = 0, sum_gradient = 0, sum_loss = 0;
  int64_t total_fg = fg_at_0;
  for (const CellCounts& cell : counts) total_fg += cell.fg;
  const auto total = static_cast<double>(std::max<int64_t>(total_fg, 1));  // a sample may have missed the foreground
  for (int64_t c = cells - 1; c >= 0; --c) {
    const auto b = static_cast<double>(counts[c].bg), f = static_cast<double>(counts[c].fg);
    if (b + f == 0) continue;
    const double begin = cell_begin(layout, c), end = cell_begin(layout, c + 1);
    const JaccardDeviation deviation =
        jaccard_bin_deviation(jaccard_bin(total, fg, bg, f, b), jaccard_bin_bound(total, fg, bg, f, b), f, b,
                              slope_of_error(std::min(0.5 * (begin + end), 1.0), layout.bounded), end - begin);
    gradient[c] = std::max(deviation.gradient, 0.0);
    loss[c] = deviation.loss;
    max_gradient = std::max(max_gradient, gradient[c]);
    max_loss = std::max(max_loss, loss[c]);
    fg += f;
    bg += b;
  }
  for (int64_t c = 0; c < cells; ++c) {
    sum_gradient += gradient[c] = relative_cube_root(gradient[c], max_gradient);
    sum_loss += loss[c] = relative_cube_root(loss[c], max_loss);
  }
  uint32_t first_bin = 1;
  for (int64_t c = 0; c < cells; ++c) {
    const uint32_t bins = bins_of_cell(gradient[c], sum_gradient, loss[c], sum_loss);
    table[c] = pack_entry(first_bin, bins);
    first_bin += bins;
  }
}

// ---- weigh

struct SegmentResult {
  double loss = 0, bound = 0, gradient_deviation = 0, loss_deviation = 0;
};

// Signed weights [2, bins] from counts [2, bins] of background and foreground; zero on entry.
template <class T, class Count>
SegmentResult weigh_segment(const Count* counts, const uint32_t* table, const BinLayout& layout, double total, double max_error,
                            T* weights) {
  const Count* const fg_counts = counts + layout.bins;
  BinBlock block;
  BinSums sums;
  double fg = 0, bg = 0;
  int64_t n = 0;
  uint32_t bin_of[BinBlock::size];
  const auto weigh_block = [&] {
    int64_t padded = n;
    for (; padded % BinBlock::lanes != 0; ++padded) {
      block.fg_before[padded] = fg;
      block.bg_before[padded] = bg;
      block.fg[padded] = block.bg[padded] = block.fg_slope[padded] = block.bg_slope[padded] = 0;
      block.middle[padded] = block.width[padded] = 0;
    }
    if (layout.bounded)
      VEERLOSS_DISPATCH(BinTiles::weigh<true>(&block, padded, total, &sums));
    else
      VEERLOSS_DISPATCH(BinTiles::weigh<false>(&block, padded, total, &sums));
    for (int64_t i = 0; i < n; ++i) {
      weights[bin_of[i]] = static_cast<T>(block.bg_weight[i]);
      weights[layout.bins + bin_of[i]] = static_cast<T>(-block.fg_weight[i]);
    }
    n = 0;
  };
  for (int64_t cell = layout.cells - 1; cell >= 0; --cell) {
    const uint32_t first = entry_first_bin(table[cell]), bins = entry_bins(table[cell]);
    const double begin = cell_begin(layout, cell), width = (cell_begin(layout, cell + 1) - begin) / bins;
    for (int64_t k = static_cast<int64_t>(bins) - 1; k >= 0; --k) {
      const uint32_t bin = first + static_cast<uint32_t>(k);
      const auto b = static_cast<double>(counts[bin]), f = static_cast<double>(fg_counts[bin]);
      const double low = begin + width * static_cast<double>(k), high = std::min(low + width, max_error);
      block.fg_before[n] = fg;
      block.bg_before[n] = bg;
      block.fg[n] = f;
      block.bg[n] = b;
      block.width[n] = high - low;
      block.middle[n] = 0.5 * (low + high);
      block.fg_slope[n] = slope_of_counts(fg_counts + first, k, bins);
      block.bg_slope[n] = slope_of_counts(counts + first, k, bins);
      if (fg + bg == 0 && f + b > 0) {  // the first bin with pixels holds max_error, known exactly; a hinge may depend on it
        block.middle[n] += (max_error - block.middle[n]) / (f + b);
        block.fg_slope[n] = block.bg_slope[n] = 0;
      }
      bin_of[n] = bin;
      fg += f;
      bg += b;
      if (++n == BinBlock::size) weigh_block();
    }
  }
  weigh_block();
  weights[0] = weights[layout.bins] = 0;  // errors of 0 change neither loss nor gradient; ignored pixels have bin 0
  return {sums[BinSums::loss], sums[BinSums::bound],
          sums[BinSums::weights] > 0 ? std::sqrt(sums[BinSums::gradient_deviation] / sums[BinSums::weights]) : 0.0,
          std::sqrt(sums[BinSums::loss_deviation])};
}

// One segment. `takes_part` is an output, the weights of a segment that does not are 0.
template <class T, class Count>
SegmentResult weigh_or_skip(const LovaszHistogramWeigh& args, int64_t i, const Count* counts, char* takes_part) {
  const BinLayout layout(args.batch.errors);
  T* weights = static_cast<T*>(args.weights.weights) + 2 * i * layout.bins;
  T* max_weight = static_cast<T*>(args.weights.max_weight) + 2 * i;
  std::fill_n(weights, 2 * layout.bins, T(0));
  max_weight[0] = max_weight[1] = T(0);
  double fg = 0, valid = 0;
  for (int64_t k = 0; k < layout.bins; ++k) {
    valid += static_cast<double>(counts[k] + counts[layout.bins + k]);
    fg += static_cast<double>(counts[layout.bins + k]);
  }
  const double max_error = args.max_error[2 * i], max_error_count = args.max_error[2 * i + 1];
  *takes_part = args.selection.takes_part(i % args.batch.classes(), valid > 0, fg > 0);
  if (!*takes_part) return {};
  if (std::isnan(max_error)) {
    std::fill_n(weights, 2 * layout.bins, std::numeric_limits<T>::quiet_NaN());
    weights[0] = 0;  // that of ignored pixels
    return {max_error, max_error, 0, 0};
  }
  if (fg == 0) {
    max_weight[0] = static_cast<T>(max_error);
    max_weight[1] = static_cast<T>(1 / max_error_count);
    return {max_error, 2 * (1 - 1 / max_error_count), 0, 0};
  }
  return weigh_segment(counts, args.table + i * layout.cells, layout, fg, max_error, weights);
}

}  // namespace

void kernels::lovasz_histogram_allocate_bins(const LovaszHistogramAllocateBins& args) {
  const BinLayout layout(args.errors);
  const int64_t bins = args.counted_table ? layout.bins : layout.coarse_bins;
  with_counts(args.counts, [&](const auto* counts) {
    parallel_for(args.segments, [&](int64_t begin, int64_t end) {
      std::vector<CellCounts> cell_counts(layout.cells);
      for (int64_t i = begin; i < end; ++i) {
        const auto *bg = counts + i * 2 * bins, *fg = bg + bins;
        for (int64_t c = 0; c < layout.cells; ++c) {
          const uint32_t entry =
              args.counted_table ? args.counted_table[i * layout.cells + c] : coarse_entry(static_cast<uint32_t>(c));
          cell_counts[c] = {0, 0};
          for (uint32_t k = entry_first_bin(entry); k < entry_first_bin(entry) + entry_bins(entry); ++k) {
            cell_counts[c].bg += bg[k];
            cell_counts[c].fg += fg[k];
          }
        }
        allocate_segment(cell_counts, fg[0], layout, args.table + i * layout.cells);
      }
    });
  });
}

int64_t kernels::lovasz_histogram_weigh_scratch_bytes(const LovaszBatch&) {
  return 0;
}

void kernels::lovasz_histogram_weigh(const LovaszHistogramWeigh& args) {
  const LovaszBatch& b = args.batch;
  const int64_t bins = BinLayout(b.errors).bins;
  std::vector<SegmentResult> results(b.segments());
  std::vector<char> takes_part(b.segments(), 0);
  std::vector<double> losses(b.segments());
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_counts(args.counts, [&](const auto* counts) {
      parallel_for(b.segments(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) results[i] = weigh_or_skip<T>(args, i, counts + 2 * i * bins, &takes_part[i]);
      });
    });
    for (int64_t i = 0; i < b.segments(); ++i) {
      const auto* row = &takes_part[i - i % b.classes()];
      const auto in_row = static_cast<double>(std::count(row, row + b.classes(), 1));
      losses[i] = results[i].loss;
      args.bounds[i] = results[i].bound;
      args.needs_rebin[i] =
          results[i].gradient_deviation > gradient_tolerance || results[i].loss_deviation > loss_tolerance * std::sqrt(in_row);
    }
    store_lovasz_loss<T>(b, args.out, losses, takes_part);
  });
}

}  // namespace veerloss
