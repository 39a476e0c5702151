// Method "histogram" of the Lovász losses on the CPU, the steps over the bins of a segment: place bins, and weigh them.
// veerloss/_histogram.py has the order of the steps.

#include <cmath>
#include <limits>

#include "histogram_place.h"
#include "segment_bins.h"
#include "segments.h"

#define VEERLOSS_TILES "bin_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {
namespace {

struct SegmentResult {
  double loss = 0, bound = 0, gradient_deviation = 0, loss_deviation = 0;
  bool of_largest = false;  // it has no foreground: all weight is on the largest error
};

// Weighs segments; a thread has one.
template <class T, class Count>
class Weigher {
 public:
  explicit Weigher(const LovaszHistogramWeigh& args) : args_(args), bins_(args.bins), s_(args.bins) {}

  // Signed weights, and the table for a better count where the segment needs one. The weights of a segment that takes no part
  // are 0.
  SegmentResult operator()(int64_t i, const Count* counts, char* takes_part) {
    const SegmentBatch& b = args_.batch;
    const BinPair* table = args_.table_of(i);
    BinPair* better = args_.better_table + i * BinLayout::table;
    T* weights = static_cast<T*>(args_.weights) + 2 * i * bins_;
    const Count* const fg_counts = counts + bins_;
    const uint32_t largest = args_.largest[i];
    std::copy_n(table, BinLayout::table, better);
    std::fill_n(weights, 2 * bins_, T(0));
    double total = 0, counted = 0;
    for (int64_t k = 0; k < bins_; ++k) {
      total += static_cast<double>(fg_counts[k]);
      counted += static_cast<double>((k > 0 ? counts[k] : 0) + fg_counts[k]);
    }
    const auto valid = static_cast<double>(counts[0]);
    *takes_part = args_.selection.takes_part(i % b.classes(), valid > 0, total > 0);
    if (!*takes_part) return {};
    if (largest == key_of_nan) {
      const auto nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(weights, 2 * bins_, static_cast<T>(nan));
      return {nan, nan};
    }
    if (total == 0) return weigh_largest(i, counts, weights, better);
    return weigh(counts, BinMap{table}, total, valid - counted, weights);
  }

 private:
  // A segment without foreground: its loss is its largest error.
  SegmentResult weigh_largest(int64_t i, const Count* counts, T* weights, BinPair* better) {
    const float largest = coordinate_of_key(args_.largest[i]);
    if (args_.largest[i] == 0 || largest < -3.0e38f) return {};  // all errors are 0
    for (int64_t k = 0; !args_.recounted_mask && k < BinLayout::table; ++k) better[k] = largest_pair(k, largest, bins_);
    int64_t k = bins_ - 1;
    while (k > 1 && counts[k] == 0) --k;
    const double pixels = std::max(static_cast<double>(counts[k]), 1.0);
    weights[k] = static_cast<T>(1.0 / pixels);
    const double error = error_of_coordinate(static_cast<double>(largest), args_.batch.errors != Errors::hinge);
    return {.loss = error, .bound = 2.0 * (1.0 - 1.0 / pixels), .of_largest = true};
  }

  SegmentResult weigh(const Count* counts, const BinMap& map, double total, double lowest_bg, T* weights) {
    const Errors errors = args_.batch.errors;
    const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
    find_edges(map);
    const Count* const fg_counts = counts + bins_;
    double fg = 0, bg = 0;
    for (int64_t k = bins_ - 1; k >= 1; --k) {
      s_.middle[k] = 0.5 * (s_.edge[k] + s_.edge[k + 1]);
      s_.width[k] = s_.edge[k + 1] - s_.edge[k];
      s_.fg[k] = static_cast<double>(fg_counts[k]);
      s_.bg[k] = static_cast<double>(counts[k]);
      s_.fg_before[k] = fg;
      s_.bg_before[k] = bg;
      fg += s_.fg[k];
      bg += s_.bg[k];
    }
    // Beside the outer bins counts are as in these.
    for (const auto& [beside, k] : {std::pair(int64_t{0}, int64_t{1}), std::pair(bins_, bins_ - 1)}) {
      s_.middle[beside] = s_.middle[k] + (k == 1 ? -s_.width[k] : s_.width[k]);
      s_.width[beside] = s_.width[k];
      s_.fg[beside] = s_.fg[k];
      s_.bg[beside] = s_.bg[k];
    }
    BinSums sums;
    if (softmax)
      VEERLOSS_DISPATCH(BinTiles::weigh<true, true>(&s_, 1, bins_, total, &sums));
    else if (folded)
      VEERLOSS_DISPATCH(BinTiles::weigh<false, true>(&s_, 1, bins_, total, &sums));
    else
      VEERLOSS_DISPATCH(BinTiles::weigh<false, false>(&s_, 1, bins_, total, &sums));
    for (int64_t k = 1; k < bins_; ++k) {
      weights[k] = static_cast<T>(s_.bg_weight[k]);
      weights[bins_ + k] = static_cast<T>(-s_.fg_weight[k]);
    }
    SegmentResult result{
        .loss = sums[BinSums::loss], .bound = sums[BinSums::bound], .loss_deviation = std::sqrt(sums[BinSums::loss_deviation])};
    double gradient = sums[BinSums::gradient_deviation], squares = sums[BinSums::weights];
    if (softmax) {
      const auto lowest_fg = static_cast<double>(fg_counts[0]);
      const JaccardBin bin = jaccard_lowest_bin(total, bg);
      const JaccardBound bound = jaccard_lowest_bound(total, bg, lowest_fg, lowest_bg);
      const double error = error_of_coordinate(s_.edge[1], folded);
      const JaccardDeviation deviation =
          jaccard_bin_deviation(bin, bound, lowest_fg, lowest_bg, slope_of_error(error, softmax), 0);
      weights[bins_] = static_cast<T>(-bin.fg);
      result.loss += lowest_fg * bin.fg * error;
      result.bound += bound.fg + bound.bg;
      gradient += deviation.gradient;
      squares += deviation.weights;
    }
    result.gradient_deviation = squares > 0 ? std::sqrt(gradient / squares) : 0.0;
    return result;
  }

  // Of bins 1 to bins; bin 0 is below.
  void find_edges(const BinMap& map) {
    int64_t k = 1;
    for (int64_t cell = 0; cell < BinLayout::cells && k < bins_; ++cell) {
      const double end = map.bin_in_cell(cell, cell_begin(cell + 1));
      const int64_t last = cell + 1 == BinLayout::cells ? bins_ - 1 : std::min(static_cast<int64_t>(end), bins_ - 1);
      if (last < k) continue;
      const double first = map.edge_in_cell(cell, static_cast<double>(k));
      const double step =
          last > k ? (map.edge_in_cell(cell, static_cast<double>(last)) - first) / static_cast<double>(last - k) : 0;
      VEERLOSS_DISPATCH(BinTiles::edges(s_.edge, k, last, first, step));
      k = last + 1;
    }
    s_.edge[bins_] = map.edge(bins_, bins_);
  }

  const LovaszHistogramWeigh& args_;
  const int64_t bins_;
  SegmentBins s_;
};

template <class T, class Count>
void weigh(const LovaszHistogramWeigh& args) {
  const SegmentBatch& b = args.batch;
  const auto* counts = static_cast<const Count*>(args.counts.data);
  const auto* recounts = static_cast<const Count*>(args.recounts.data);
  const auto counts_of = [&](int64_t i) { return (args.recounted(i) ? recounts : counts) + 2 * i * args.bins; };
  std::vector<SegmentResult> results(b.segments());
  std::vector<char> takes_part(b.segments(), 0);
  std::vector<double> losses(b.segments());
  parallel_for(b.segments(), [&](int64_t begin, int64_t end) {
    Weigher<T, Count> weigher(args);
    for (int64_t i = begin; i < end; ++i) results[i] = weigher(i, counts_of(i), &takes_part[i]);
  });
  for (int64_t i = 0; i < b.segments(); ++i) {
    losses[i] = results[i].loss;
    args.bounds[i] = results[i].bound;
    args.needs_rebin[i] = results[i].of_largest || results[i].gradient_deviation > gradient_tolerance ||
                          results[i].loss_deviation > loss_tolerance;
  }
  if (!args.recounted_mask)  // else this is the last count
    parallel_for(b.segments(), [&](int64_t begin, int64_t end) {
      BinPlacer placer;
      for (int64_t i = begin; i < end; ++i)
        if (args.needs_rebin[i] && !results[i].of_largest)
          placer.place(counts_of(i), counts_of(i) + args.bins, BinMap{args.table + i * BinLayout::table}, args.bins, b.errors,
                       false, args.bins, args.better_table + i * BinLayout::table);
    });
  store_segment_loss<T>(b, args.out, losses, takes_part);
}

}  // namespace

void kernels::lovasz_histogram_place(const LovaszHistogramPlace& args) {
  with_counts(args.counts, [&](const auto* counts) {
    parallel_for(args.segments, [&](int64_t begin, int64_t end) {
      BinPlacer placer;
      for (int64_t i = begin; i < end; ++i) {
        const auto* bg = counts + i * 2 * args.counted_bins;
        const BinPair* counted = args.counted_table ? args.counted_table + i * BinLayout::table : coarse_table().data();
        placer.place(bg, bg + args.counted_bins, BinMap{counted}, args.counted_bins, args.errors, args.sampled, args.bins,
                     args.table + i * BinLayout::table);
      }
    });
  });
}

int64_t kernels::lovasz_histogram_weigh_scratch_bytes(const SegmentBatch&) {
  return 0;
}

void kernels::lovasz_histogram_weigh(const LovaszHistogramWeigh& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) {
    if (args.counts.is_int64)
      weigh<decltype(zero), int64_t>(args);
    else
      weigh<decltype(zero), int32_t>(args);
  });
}

}  // namespace veerloss
