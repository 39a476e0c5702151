// Method "histogram" of the Lovász losses on the CPU, the passes over the pixels: count errors in bins, sum weight times error,
// and backward. veerloss/_histogram.py has the order of the steps. No temporary has the size of the logits, and all that
// threads add up are integers: the same bits for any number of threads.

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>

#include "../../math/bins.h"
#include "../gradient.h"
#include "../memory.h"

#define VEERLOSS_TILES "histogram_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {
namespace {

// Errors of class c of a tile.
template <class T>
void find_errors(const LovaszBatch& b, const TileRows<T>& t, int64_t tile, int64_t n, int64_t c, float* error) {
  const int32_t* label = t.label.data();
  const auto foreground = static_cast<int32_t>(b.foreground(c));
  if (b.errors == Errors::softmax)
    VEERLOSS_DISPATCH(
        HistogramTiles::softmax_errors(t.exps + c * tile, n, label, foreground, t.sumexp_excl_max, t.inv_sumexp, error));
  else if (b.errors == Errors::probabilities)
    VEERLOSS_DISPATCH(HistogramTiles::probability_errors(t.values + c * tile, n, label, foreground, error));
  else
    VEERLOSS_DISPATCH(HistogramTiles::hinge_errors(t.values + c * tile, n, label, error));
}

// Slots of errors: the bin on background, `bins` more on foreground, `ignored` elsewhere.
template <class Index>
void find_slots(const float* error, int64_t n, const int32_t* label, int64_t foreground, const uint32_t* table, bool bounded,
                int32_t bins, int32_t ignored, Index* slots) {
  const auto fg = static_cast<int32_t>(foreground);
  if (bounded)
    VEERLOSS_DISPATCH(HistogramTiles::find_slots<true>(error, n, label, fg, table, bins, ignored, slots));
  else
    VEERLOSS_DISPATCH(HistogramTiles::find_slots<false>(error, n, label, fg, table, bins, ignored, slots));
}

// ---- count

// The largest error of a segment, and how many pixels have it. -1: no pixel; NaN: an error that is not a number.
struct MaxError {
  float error = -1.0f;
  int64_t count = 0;

  void add(const MaxError& other) {
    if (std::isnan(error)) return;
    if (std::isnan(other.error) || other.error > error)
      *this = other;
    else if (other.error == error)
      count += other.count;
  }
};

// The counts of all threads.
struct SharedCounts {
  int32_t* counts;  // [segments][2 * bins]
  std::vector<MaxError> max_error;
  std::vector<std::mutex> locks;  // by class
};

// One thread's counts of a row of segments: 16 bits each, so that those of many classes stay in cache. They are added to the
// shared ones before any can overflow.
template <class T>
class Counter {
 public:
  Counter(const LovaszBatch& b, int64_t bins, int64_t tile, SharedCounts& shared)
      : rows(b.classes(), tile, false),
        error(tile),
        batch_(b),
        slots_(tile),
        size_(2 * bins),
        memory_(b.classes() * (size_ + 1) * static_cast<int64_t>(sizeof(uint16_t))),
        counts_(static_cast<uint16_t*>(memory_.data())),
        max_error_(b.classes()),
        shared_(shared) {}
  Counter(const Counter&) = delete;
  ~Counter() { flush(); }

  // Before the classes of a tile.
  void begin(int64_t row, int64_t pixels) {
    if (row != row_ || pending_ + pixels > 65535) flush();
    row_ = row;
    pending_ += pixels;
  }

  // Counts `error`, the errors of class c.
  void add(int64_t c, int64_t n, const uint32_t* table, bool bounded) {
    const int32_t* label = rows.label.data();
    const auto bins = static_cast<int32_t>(size_ / 2);
    find_slots(error.data(), n, label, batch_.foreground(c), table, bounded, bins, 2 * bins, slots_.data());
    VEERLOSS_DISPATCH(HistogramTiles::count(slots_.data(), n, counts_ + c * (size_ + 1)));
    const int32_t max_bits = VEERLOSS_DISPATCH(HistogramTiles::max_error_bits(error.data(), n, label));
    if (max_bits < 0) return;
    MaxError max_error{bit_cast<float>(max_bits), 0};
    if (max_bits >= 0x7f800000) max_error.error = std::numeric_limits<float>::quiet_NaN();
    if (max_error.error >= max_error_[c].error)
      max_error.count = VEERLOSS_DISPATCH(HistogramTiles::count_equal(error.data(), n, label, max_error.error));
    max_error_[c].add(max_error);
  }

  TileRows<T> rows;
  std::vector<float> error;

 private:
  void flush() {
    for (int64_t c = 0; pending_ > 0 && c < batch_.classes(); ++c) {
      const std::lock_guard<std::mutex> lock(shared_.locks[c]);
      const int64_t segment = row_ * batch_.classes() + c;
      uint16_t* counts = counts_ + c * (size_ + 1);
      VEERLOSS_DISPATCH(HistogramTiles::add_counts(counts, size_, shared_.counts + segment * size_));
      counts[size_] = 0;
      shared_.max_error[segment].add(max_error_[c]);
      max_error_[c] = {};
    }
    pending_ = 0;
  }

  const LovaszBatch& batch_;
  std::vector<uint16_t> slots_;
  const int64_t size_;
  const Scratch memory_;
  uint16_t* const counts_;  // [classes][size_, and one for ignored pixels]
  std::vector<MaxError> max_error_;
  int64_t row_ = -1, pending_ = 0;
  SharedCounts& shared_;
};

template <class T>
void count(const LovaszHistogramCount& args) {
  const LovaszBatch& b = args.batch;
  const BinLayout layout(b.errors);
  const int64_t bins = args.table ? layout.bins : layout.coarse_bins, classes = b.classes();
  std::vector<uint32_t> coarse_table;
  if (!args.table)
    for (int64_t c = 0; c < layout.cells; ++c) coarse_table.push_back(coarse_entry(static_cast<uint32_t>(c)));
  SharedCounts shared{args.counts, std::vector<MaxError>(b.segments()), std::vector<std::mutex>(classes)};
  BadTarget bad;
  const int64_t capacity = tile_length(classes, sizeof(T), b.length());  // far below 65535, the capacity of a counter
  const SegmentTiles tiles(b, args.sampled, capacity, bad);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    Counter<T> counter(b, bins, capacity, shared);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      const int64_t n = tile.loaded();
      if (n == 0) continue;
      tiles.load_labels_of(b, tile, counter.rows, bad);
      load_tile(b, tile, capacity, counter.rows);
      counter.begin(tile.row, n);
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t segment = tile.row * classes + c;
        if (args.segment_mask && !args.segment_mask[segment]) continue;
        find_errors(b, counter.rows, capacity, n, c, counter.error.data());
        counter.add(c, n, args.table ? args.table + segment * layout.cells : coarse_table.data(), layout.bounded);
      }
    }
  });
  raise_if_bad(bad, b);
  for (int64_t i = 0; i < b.segments(); ++i) {
    args.max_error[2 * i] = shared.max_error[i].error;
    args.max_error[2 * i + 1] = static_cast<double>(shared.max_error[i].count);
  }
}

// ---- look up

// Weights of errors by their bins; see lovasz_gradient.
template <class T>
struct BinWeights {
  static constexpr bool by_error = true;

  BinWeights(const LovaszBatch& b, const uint32_t* table, const BinWeightsInput& in, int64_t tile)
      : error(tile),
        batch_(b),
        layout_(b.errors),
        table_(table),
        weights_(static_cast<const T*>(in.weights)),
        max_weight_(static_cast<const T*>(in.max_weight)),
        slots_(tile) {}

  void operator()(const TileRows<T>& rows, const Tile& tile, int64_t c, T factor, T* grad) {
    const int64_t segment = tile.row * batch_.classes() + c, n = tile.loaded();
    const int32_t* label = rows.label.data();
    const T max_error = max_weight_[2 * segment], max_error_weight = max_weight_[2 * segment + 1];
    find_errors(batch_, rows, static_cast<int64_t>(error.size()), n, c, error.data());
    if (max_error_weight > 0) {
      VEERLOSS_DISPATCH(HistogramTiles::weigh_max_error(error.data(), n, label, static_cast<float>(max_error),
                                                        max_error_weight * factor, grad));
      return;
    }
    const auto bins = static_cast<int32_t>(layout_.bins);
    find_slots(error.data(), n, label, batch_.foreground(c), table_ + segment * layout_.cells, layout_.bounded, bins, 0,
               slots_.data());
    VEERLOSS_DISPATCH(HistogramTiles::look_up(slots_.data(), n, weights_ + segment * layout_.bins * 2, factor, grad));
  }

  std::vector<float> error;  // [tile], of the last call

 private:
  const LovaszBatch& batch_;
  const BinLayout layout_;
  const uint32_t* table_;
  const T *weights_, *max_weight_;
  std::vector<int32_t> slots_;
};

// ---- sum

// Sums of weight times error in integers of 1 / units, so that they are the same for any number of threads and ranks. The bins
// of a hinge are too wide for its loss to follow from their middles: 1e-6 of it at 10^4 pixels, 3e-6 where foreground is rare.
template <class T>
void sum(const LovaszHistogramSum& args) {
  const LovaszBatch& b = args.batch;
  const int64_t capacity = tile_length(b.classes(), sizeof(T), b.length());
  BadTarget bad;  // the counts have raised it
  const SegmentTiles tiles(b, false, capacity, bad);
  std::vector<std::atomic<int64_t>> sums(b.segments());
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(b.classes(), capacity, false);
    BinWeights<T> weigh(b, args.table, args.weights, capacity);
    std::vector<T> weight(capacity);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      if (tile.loaded() == 0) continue;
      tiles.load_labels_of(b, tile, rows, bad);
      load_tile(b, tile, capacity, rows);
      for (int64_t c = 0; c < b.classes(); ++c) {
        const int64_t i = tile.row * b.classes() + c;
        weigh(rows, tile, c, T(1), weight.data());
        sums[i] +=
            VEERLOSS_DISPATCH(HistogramTiles::fixed_sum(weight.data(), weigh.error.data(), tile.loaded(), args.units[i]));
      }
    }
  });
  for (int64_t i = 0; i < b.segments(); ++i) args.sums[i] = sums[i];
}

}  // namespace

int64_t kernels::lovasz_histogram_scratch_bytes(const LovaszBatch&, bool, bool) {
  return 0;
}

void kernels::lovasz_histogram_count(const LovaszHistogramCount& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { count<decltype(zero)>(args); });
}

void kernels::lovasz_histogram_sum(const LovaszHistogramSum& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { sum<decltype(zero)>(args); });
}

void kernels::lovasz_histogram_backward(const LovaszHistogramBackward& args) {
  const LovaszBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t capacity = tile_length(2 * b.classes(), sizeof(T), b.length());
    BadTarget bad;  // the forward pass has raised it
    const SegmentTiles tiles(b, false, capacity, bad);
    lovasz_gradient<T>(b, args.out, tiles, capacity, BinWeights<T>(b, args.table, args.weights, capacity));
  });
}

}  // namespace veerloss
