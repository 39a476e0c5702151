// Method "histogram" of the Lovász losses on the CPU: count pixels by the bins of their errors. veerloss/_histogram.py has the
// order of the steps. No temporary has the size of the logits, and all that threads add up are integers: the same bits for any
// number of threads.

#include <mutex>

#include "../memory.h"
#include "../terms.h"
#include "coordinates.h"
#include "histogram_place.h"

namespace veerloss {
namespace {

// The counts of all threads.
struct SharedCounts {
  int32_t* counts;                // [segments][2 * bins]
  uint32_t* largest;              // [segments]: see LovaszHistogramCount
  std::vector<std::mutex> locks;  // by class
};

// One thread's counts of a row of segments: 16 bits each, so that those of many classes stay in cache. They are added to the
// shared ones before any can overflow.
class Counter {
 public:
  Counter(const SegmentBatch& b, int64_t bins, int64_t capacity, SharedCounts& shared)
      : batch_(b),
        slots_(capacity + 16),  // find_slots stores 16 at a time
        size_(2 * bins),
        memory_(b.classes() * size_ * static_cast<int64_t>(sizeof(uint16_t))),
        counts_(static_cast<uint16_t*>(memory_.data())),
        largest_(b.classes()),
        shared_(shared) {}
  Counter(const Counter&) = delete;
  ~Counter() { flush(); }

  // Before the classes of a tile of `pixels`, of which `valid` count.
  void begin(int64_t row, int64_t pixels, int64_t valid) {
    if (row != row_ || pending_ + pixels > 65535) flush();
    row_ = row;
    pending_ += pixels;
    valid_ += valid;
  }

  // Counts the pixels of class c by their coordinates.
  void add(int64_t c, const float* coordinate, int64_t n, const int32_t* label, const BinPair* table) {
    const auto bins = static_cast<int32_t>(size_ / 2), fg = static_cast<int32_t>(batch_.foreground(c));
    const int64_t counted =
        batch_.errors == Errors::softmax
            ? VEERLOSS_DISPATCH(HistogramTiles::find_slots<false>(coordinate, n, label, fg, table, bins, slots_.data()))
            : VEERLOSS_DISPATCH(HistogramTiles::find_slots<true>(coordinate, n, label, fg, table, bins, slots_.data()));
    VEERLOSS_DISPATCH(HistogramTiles::count(slots_.data(), counted, counts_ + c * size_));
  }

  void add_largest(int64_t c, uint32_t key) { largest_[c] = std::max(largest_[c], key); }

 private:
  void flush() {
    for (int64_t c = 0; pending_ > 0 && c < batch_.classes(); ++c) {
      const std::lock_guard<std::mutex> lock(shared_.locks[c]);
      const int64_t segment = row_ * batch_.classes() + c;
      int32_t* sum = shared_.counts + segment * size_;
      VEERLOSS_DISPATCH(HistogramTiles::add_counts(counts_ + c * size_, size_, sum));
      sum[0] += static_cast<int32_t>(valid_);
      shared_.largest[segment] = std::max(shared_.largest[segment], largest_[c]);
      largest_[c] = 0;
    }
    pending_ = valid_ = 0;
  }

  const SegmentBatch& batch_;
  std::vector<uint32_t> slots_;
  const int64_t size_;
  const Scratch memory_;
  uint16_t* const counts_;  // [classes][size_]
  std::vector<uint32_t> largest_;
  int64_t row_ = -1, pending_ = 0, valid_ = 0;
  SharedCounts& shared_;
};

template <class T>
void count(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  const int64_t classes = b.classes();
  SharedCounts shared{args.counts, args.largest, std::vector<std::mutex>(classes)};
  BadTarget bad;
  const int64_t capacity = tile_length(classes, sizeof(T), b.length());  // far below 65535, the capacity of a counter
  const SegmentTiles tiles(b, args.sampled, capacity, bad);
  SharedTermSums term_sums(b, args.terms, tiles.count());
  const std::optional<LowLogits<T>> low = low_logits_of<T>(b);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(classes, capacity, false, true, low);
    TileCoordinates<T> coordinates(b, capacity, args.terms.any());
    Counter counter(b, args.bins, capacity, shared);
    TermSummer<T> sum_terms(b, args.terms, capacity, term_sums);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      const int64_t n = tile.loaded();
      if (n == 0) continue;
      const int32_t* label = rows.label.data();
      tiles.load_labels_of(b, tile, rows, bad);
      load_tile(b, tile, capacity, rows, !TileCoordinates<T>::makes_exponentials(b));
      counter.begin(tile.row, n, count_pixels(label, n));
      coordinates.begin(rows, n);
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t segment = tile.row * classes + c;
        if (args.segment_mask && !args.segment_mask[segment]) continue;
        const float* coordinate = coordinates.find(rows, c);
        counter.add(c, coordinate, n, label, args.table ? args.table + segment * BinLayout::table : coarse_table().data());
        if (coordinates.any_nan(rows))
          counter.add_largest(c, key_of_nan);
        else if (args.find_largest)
          counter.add_largest(c, key_of_coordinate(VEERLOSS_DISPATCH(HistogramTiles::largest(coordinate, n, label))));
      }
      if (args.terms.any()) sum_terms(rows, tile, k, TileCoordinates<T>::makes_exponentials(b));
    }
  });
  term_sums.store();
  raise_if_bad(bad, b);
}

}  // namespace

int64_t kernels::lovasz_histogram_scratch_bytes(const LovaszHistogramCount&) {
  return 0;
}

void kernels::lovasz_histogram_count(const LovaszHistogramCount& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { count<decltype(zero)>(args); });
}

}  // namespace veerloss
