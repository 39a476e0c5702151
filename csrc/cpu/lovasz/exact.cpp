// Method "exact" of the Lovász losses on the CPU.
//
// Forward: a pass over tiles writes the error keys of the pixels that count; each segment is sorted and scanned
// (segment_sort.h), which overwrites its keys with the signed weights dL/dp of the errors. Backward reads weights and logits.

#include <atomic>
#include <mutex>

#include "../../math/jaccard.h"
#include "../gradient.h"
#include "segment_sort.h"

#define VEERLOSS_TILES "exact_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {
namespace {

// Where the keys of a segment lie, and then its weights: [classes][stride]. Only pixels that are not ignored have one. With
// their number given, one row of them follows the other; else each begins where it would if none were ignored.
class SegmentKeys {
 public:
  SegmentKeys(const SegmentBatch& b, const SegmentTiles& tiles, std::optional<int64_t> valid_pixels)
      : begin_(b.rows()), size_(b.rows()), stride_(valid_pixels.value_or(b.rows() * b.length())) {
    int64_t before = 0;
    for (int64_t row = 0; row < b.rows(); ++row) {
      size_[row] = tiles.valid(row);
      begin_[row] = valid_pixels ? before : row * b.length();
      before += size_[row];
    }
    if (valid_pixels && before != *valid_pixels)
      throw std::invalid_argument("veerloss::lovasz_exact: valid_pixels must be the number of pixels that are not ignored, " +
                                  std::to_string(before) + ", got " + std::to_string(*valid_pixels));
  }
  int64_t at(int64_t row, int64_t c) const { return c * stride_ + begin_[row]; }
  int64_t size(int64_t row) const { return size_[row]; }
  int64_t stride() const { return stride_; }

 private:
  std::vector<int64_t> begin_, size_;
  int64_t stride_;
};

// Writes the keys; returns what each segment holds, [rows, classes].
template <class T>
std::vector<SegmentCounts<T>> write_keys(const SegmentBatch& b, const SegmentTiles& tiles, int64_t capacity,
                                         const SegmentKeys& place, typename ErrorKey<T>::Word* keys, const TermSums& terms,
                                         BadTarget& bad) {
  const Geometry& g = b.geometry;
  std::vector<SegmentCounts<T>> counts(b.segments());
  std::mutex mutex;
  SharedTermSums term_sums(b, terms, tiles.count());
  const std::optional<LowLogits<T>> low = low_logits_of<T>(b);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> t(g.channels, capacity, false, terms.any(), low);
    TermSummer<T> sum_terms(b, terms, capacity, term_sums);
    std::vector<SegmentCounts<T>> thread_counts(b.segments());
    std::vector<typename ErrorKey<T>::Word> of_span(capacity + 16);
    std::vector<uint16_t> mask(capacity / 16);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      const int64_t n = tile.loaded();
      if (tile.size == 0) continue;
      tiles.load_labels_of(b, tile, t, bad);
      load_tile(b, tile, capacity, t);
      const int32_t* label = t.label.data();
      if (tile.size < n) mask_pixels(label, n, mask.data());
      for (int64_t c = 0; c < g.channels; ++c) {
        auto* const kept = keys + place.at(tile.row, c) + tile.before;
        auto* const out = tile.size < n ? of_span.data() : kept;
        SegmentCounts<T>* count = &thread_counts[tile.row * g.channels + c];
        const auto cls = static_cast<int32_t>(c);
        if (b.errors == Errors::softmax)
          VEERLOSS_DISPATCH(
              ExactTiles::softmax_keys(t.exps + c * capacity, n, label, cls, t.sumexp_excl_max, t.inv_sumexp, out, count));
        else if (b.errors == Errors::probabilities)
          VEERLOSS_DISPATCH(ExactTiles::probability_keys(t.values + c * capacity, n, label, cls, out, count));
        else
          VEERLOSS_DISPATCH(ExactTiles::hinge_keys(t.values + c * capacity, n, label, out, count));
        if (tile.size < n) {
          compress_row(out, n, mask.data());
          std::copy_n(out, tile.size, kept);
        }
      }
      if (terms.any()) sum_terms(t, tile, k);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < b.segments(); ++i) counts[i].add(thread_counts[i]);
  });
  raise_if_bad(bad, b);
  term_sums.store();
  return counts;
}

// The losses of the segments that take part, [rows, classes]. The keys of a segment become weights: 0 if it takes no part.
template <class T>
std::vector<double> segment_losses(const SegmentBatch& b, const SegmentKeys& place, typename ErrorKey<T>::Word* keys,
                                   const std::vector<SegmentCounts<T>>& counts, const std::vector<char>& takes_part,
                                   bool keep_weights) {
  std::vector<double> losses(b.segments(), 0.0);
  const auto work = [&](SegmentSorter<T>& sorter, int64_t i) {
    const int64_t row = i / b.classes(), c = i % b.classes();
    auto* segment = keys + place.at(row, c);
    if (takes_part[i])
      losses[i] = sorter.loss(segment, place.size(row), counts[i], keep_weights);
    else if (keep_weights)
      std::fill_n(segment, place.size(row), typename ErrorKey<T>::Word(0));
    const int64_t behind = place.stride() == b.rows() * b.length() ? b.length() - place.size(row) : 0;
    if (keep_weights) std::fill_n(segment + place.size(row), behind, typename ErrorKey<T>::Word(0));
  };
  const int64_t threads = num_threads();
  // Segments run side by side, each thread taking the next one, because their lengths differ after pruning. The long segments
  // that are left over run one by one on all threads; a parallel region costs about 10 us, too much for short ones.
  constexpr int64_t long_segment = int64_t{1} << 17;
  int64_t longest = 0;
  for (int64_t row = 0; row < b.rows(); ++row) longest = std::max(longest, place.size(row));
  const int64_t side_by_side = longest < long_segment ? b.segments() : b.segments() / threads * threads;
  std::atomic<int64_t> next{0};
  parallel_for(std::min(threads, side_by_side), [&](int64_t, int64_t) {
    SegmentSorter<T> sorter(1, b.errors == Errors::softmax);
    for (int64_t i; (i = next++) < side_by_side;) work(sorter, i);
  });
  SegmentSorter<T> sorter(threads, b.errors == Errors::softmax);
  for (int64_t i = side_by_side; i < b.segments(); ++i) work(sorter, i);
  return losses;
}

// Weights of a forward pass.
template <class T>
class StoredWeights {
 public:
  static constexpr bool by_error = false, of_errors = true;
  static bool makes_exponentials(const SegmentBatch&) { return false; }

  StoredWeights(const T* weights, const SegmentKeys& place, int64_t capacity)
      : weights_(weights), place_(place), of_tile_(capacity + 16), mask_(capacity / 16) {}

  void operator()(const TileRows<T>& rows, const Tile& tile, int64_t c, T factor, T* grad) {
    const T* in = weights_ + place_.at(tile.row, c) + tile.before;
    const int64_t n = tile.loaded();
    if (tile.size < n) {
      if (c == 0) mask_pixels(rows.label.data(), n, mask_.data());
      std::copy_n(in, tile.size, of_tile_.data());
      expand_row(of_tile_.data(), n, mask_.data(), grad);
      in = grad;
    }
    for (int64_t i = 0; i < n; ++i) grad[i] = in[i] * factor;
  }

 private:
  const T* weights_;
  const SegmentKeys& place_;
  std::vector<T> of_tile_;  // and as many more as expand_row reads
  std::vector<uint16_t> mask_;
};

}  // namespace

int64_t kernels::lovasz_exact_scratch_bytes(const SegmentBatch&) {
  return 0;
}

void kernels::lovasz_exact_forward(const LovaszExactForward& args) {
  const SegmentBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* keys = static_cast<typename ErrorKey<T>::Word*>(args.keys);
    const int64_t capacity = tile_length(b.classes(), sizeof(T), b.length());
    BadTarget bad;
    const SegmentTiles tiles(b, false, capacity, bad);
    const SegmentKeys place(b, tiles, args.valid_pixels);
    const auto counts = write_keys<T>(b, tiles, capacity, place, keys, args.terms, bad);
    std::vector<char> takes_part(b.segments());
    for (int64_t i = 0; i < b.segments(); ++i)
      takes_part[i] = args.selection.takes_part(i % b.classes(), counts[i].valid > 0, counts[i].foreground > 0);
    const std::vector<double> losses = segment_losses<T>(b, place, keys, counts, takes_part, args.keep_weights);
    store_segment_loss<T>(b, args.out, losses, takes_part);
  });
}

void kernels::lovasz_exact_backward(const LovaszExactBackward& args) {
  const SegmentBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t capacity = tile_length(2 * b.classes(), sizeof(T), b.length());
    BadTarget bad;  // the forward pass has raised it
    const SegmentTiles tiles(b, false, capacity, bad);
    const SegmentKeys place(b, tiles, args.valid_pixels);
    segment_gradient<T>(b, args.out, tiles, capacity, StoredWeights<T>(static_cast<const T*>(args.weights), place, capacity),
                        args.terms);
  });
}

}  // namespace veerloss
