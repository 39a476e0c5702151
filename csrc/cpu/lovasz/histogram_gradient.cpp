// Method "histogram" of the Lovász losses on the CPU, the passes that look weights up by the bins of errors: the gradient, and
// the sum of weight times error. veerloss/_histogram.py has the order of the steps.

#include <atomic>

#include "../gradient.h"
#include "coordinates.h"

namespace veerloss {
namespace {

// Weights of errors by their bins; see segment_gradient.
template <class T>
struct BinWeights {
  static constexpr bool by_error = true, of_errors = true;
  static bool makes_exponentials(const SegmentBatch& b) { return TileCoordinates<T>::makes_exponentials(b); }

  BinWeights(const SegmentBatch& b, int64_t bins, const BinPair* table, const void* weights, int64_t capacity,
             bool whole = false)
      : batch_(b), bins_(bins), table_(table), weights_(static_cast<const T*>(weights)), coordinates_(b, capacity, whole) {}

  void operator()(const TileRows<T>& rows, const Tile& tile, int64_t c, T factor, T* grad) {
    const int64_t segment = tile.row * batch_.classes() + c, n = tile.loaded();
    const int32_t* label = rows.label.data();
    const auto bins = static_cast<int32_t>(bins_), fg = static_cast<int32_t>(batch_.foreground(c));
    const BinPair* table = table_ + segment * BinLayout::table;
    const T* weights = weights_ + segment * 2 * bins_;
    if (c == 0) coordinates_.begin(rows, n);
    const float* coordinate = coordinates_.find(rows, c);
    if (batch_.errors == Errors::softmax)
      VEERLOSS_DISPATCH(HistogramTiles::look_up<false>(coordinate, n, label, fg, table, bins, weights, factor, grad));
    else
      VEERLOSS_DISPATCH(HistogramTiles::look_up<true>(coordinate, n, label, fg, table, bins, weights, factor, grad));
  }

 private:
  const SegmentBatch& batch_;
  const int64_t bins_;
  const BinPair* table_;
  const T* weights_;
  TileCoordinates<T> coordinates_;
};

// ---- sum

// Errors of class c of a tile, not of a softmax.
template <class T>
void find_errors(const SegmentBatch& b, const TileRows<T>& rows, int64_t capacity, int64_t n, int64_t c, float* error) {
  const int32_t* label = rows.label.data();
  const auto foreground = static_cast<int32_t>(b.foreground(c));
  if (b.errors == Errors::probabilities)
    VEERLOSS_DISPATCH(HistogramTiles::probability_errors(rows.values + c * capacity, n, label, foreground, error));
  else
    VEERLOSS_DISPATCH(HistogramTiles::hinge_errors(rows.values + c * capacity, n, label, error));
}

// Sums of weight times error in integers of 1 / units, so that they are the same for any number of threads and ranks. The bins
// of a hinge are too wide for its loss to follow from their middles: 1e-6 of it at 10^4 pixels, 3e-6 where foreground is rare.
template <class T>
void sum(const LovaszHistogramSum& args) {
  const SegmentBatch& b = args.batch;
  const int64_t capacity = tile_length(b.classes(), sizeof(T), b.length());
  BadTarget bad;  // the counts have raised it
  const SegmentTiles tiles(b, false, capacity, bad);
  std::vector<std::atomic<int64_t>> sums(b.segments());
  const std::optional<LowLogits<T>> low = low_logits_of<T>(b);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(b.classes(), capacity, false, false, low);
    BinWeights<T> weigh(b, args.bins, args.table, args.weights, capacity);
    std::vector<T> weight(capacity);
    std::vector<float> error(capacity);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      const int64_t n = tile.loaded();
      if (n == 0) continue;
      tiles.load_labels_of(b, tile, rows, bad);
      load_tile(b, tile, capacity, rows);
      for (int64_t c = 0; c < b.classes(); ++c) {
        const int64_t i = tile.row * b.classes() + c;
        weigh(rows, tile, c, T(1), weight.data());
        find_errors(b, rows, capacity, n, c, error.data());
        sums[i] += VEERLOSS_DISPATCH(HistogramTiles::fixed_sum(weight.data(), error.data(), n, args.units[i]));
      }
    }
  });
  for (int64_t i = 0; i < b.segments(); ++i) args.sums[i] = sums[i];
}

}  // namespace

void kernels::lovasz_histogram_sum(const LovaszHistogramSum& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { sum<decltype(zero)>(args); });
}

void kernels::lovasz_histogram_backward(const LovaszHistogramBackward& args) {
  const SegmentBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t capacity = tile_length(2 * b.classes(), sizeof(T), b.length());
    BadTarget bad;  // the forward pass has raised it
    const SegmentTiles tiles(b, false, capacity, bad);
    segment_gradient<T>(b, args.out, tiles, capacity,
                        BinWeights<T>(b, args.bins, args.table, args.weights, capacity, args.terms.any()), args.terms);
  });
}

}  // namespace veerloss
