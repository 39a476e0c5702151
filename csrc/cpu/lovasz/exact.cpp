// Method "exact" of the Lovász losses on the CPU.
//
// Forward: a pass over tiles writes error keys [C, N, P]; each segment is sorted and scanned (segment_sort.h), which overwrites
// its keys with the signed weights dL/dp of the errors. Backward reads weights and logits.

#include <atomic>
#include <mutex>

#include "../../math/jaccard.h"
#include "../gradient.h"
#include "segment_sort.h"

#define VEERLOSS_TILES "exact_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {
namespace {

// Writes the keys [C, N, P]; returns what each segment holds, [rows, classes].
template <class T>
std::vector<SegmentCounts<T>> write_keys(const LovaszBatch& b, typename ErrorKey<T>::Word* keys) {
  const Geometry& g = b.geometry;
  const int64_t tile = tile_length(g.channels, sizeof(T), b.length()), flat = g.images * g.pixels;
  const SegmentTiles tiles(b, false, tile);
  std::vector<SegmentCounts<T>> counts(b.segments());
  std::mutex mutex;
  BadTarget bad;
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> t(g.channels, tile, false);
    std::vector<SegmentCounts<T>> thread_counts(b.segments());
    std::vector<Run> runs;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = tiles.get(k, runs), n = load_tile(b, runs, tile, t);
      load_tile_labels(b, runs, t, bad);
      const int32_t* label = t.label.data();
      for (int64_t c = 0; c < g.channels; ++c) {
        auto* out = keys + c * flat + runs[0].first;
        SegmentCounts<T>* count = &thread_counts[row * g.channels + c];
        const auto cls = static_cast<int32_t>(c);
        if (b.errors == Errors::softmax)
          VEERLOSS_DISPATCH(
              ExactTiles::softmax_keys(t.exps + c * tile, n, label, cls, t.sumexp_excl_max, t.inv_sumexp, out, count));
        else if (b.errors == Errors::probabilities)
          VEERLOSS_DISPATCH(ExactTiles::probability_keys(t.values + c * tile, n, label, cls, out, count));
        else
          VEERLOSS_DISPATCH(ExactTiles::hinge_keys(t.values + c * tile, n, label, out, count));
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < b.segments(); ++i) counts[i].add(thread_counts[i]);
  });
  raise_if_bad(bad, b);
  return counts;
}

// The losses of the segments that take part, [rows, classes]. The keys of a segment become weights: 0 if it takes no part.
template <class T>
std::vector<double> segment_losses(const LovaszBatch& b, typename ErrorKey<T>::Word* keys,
                                   const std::vector<SegmentCounts<T>>& counts, const std::vector<char>& takes_part,
                                   bool keep_weights) {
  std::vector<double> losses(b.segments(), 0.0);
  const auto work = [&](SegmentSorter<T>& sorter, int64_t i) {
    const int64_t row = i / b.classes(), c = i % b.classes();
    auto* segment = keys + (c * b.rows() + row) * b.length();
    if (takes_part[i])
      losses[i] = sorter.loss(segment, b.length(), counts[i], keep_weights);
    else if (keep_weights)
      std::fill_n(segment, b.length(), typename ErrorKey<T>::Word(0));
  };
  const int64_t threads = num_threads();
  // Segments run side by side, each thread taking the next one, because their lengths differ after pruning. The long segments
  // that are left over run one by one on all threads; a parallel region costs about 10 us, too much for short ones.
  constexpr int64_t long_segment = int64_t{1} << 17;
  const int64_t side_by_side = b.length() < long_segment ? b.segments() : b.segments() / threads * threads;
  std::atomic<int64_t> next{0};
  parallel_for(std::min(threads, side_by_side), [&](int64_t, int64_t) {
    SegmentSorter<T> sorter(1, b.errors == Errors::softmax);
    for (int64_t i; (i = next++) < side_by_side;) work(sorter, i);
  });
  SegmentSorter<T> sorter(threads, b.errors == Errors::softmax);
  for (int64_t i = side_by_side; i < b.segments(); ++i) work(sorter, i);
  return losses;
}

// Weights [C, N, P] of a forward pass.
template <class T>
struct StoredWeights {
  static constexpr bool by_error = false;
  const T* weights;
  int64_t flat;  // N * P

  void operator()(const TileRows<T>&, Run run, int64_t, int64_t c, T factor, T* grad) const {
    const T* in = weights + c * flat + run.first;
    for (int64_t i = 0; i < run.count; ++i) grad[i] = in[i] * factor;
  }
};

}  // namespace

int64_t kernels::lovasz_exact_scratch_bytes(const LovaszBatch&) {
  return 0;
}

void kernels::lovasz_exact_forward(const LovaszExactForward& args) {
  const LovaszBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* keys = static_cast<typename ErrorKey<T>::Word*>(args.keys);
    const auto counts = write_keys<T>(b, keys);
    std::vector<char> takes_part(b.segments());
    for (int64_t i = 0; i < b.segments(); ++i)
      takes_part[i] = args.selection.takes_part(i % b.classes(), counts[i].valid > 0, counts[i].foreground > 0);
    const std::vector<double> losses = segment_losses<T>(b, keys, counts, takes_part, args.keep_weights);
    store_lovasz_loss<T>(b, args.out, losses, takes_part);
  });
}

void kernels::lovasz_exact_backward(const LovaszExactBackward& args) {
  const LovaszBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const StoredWeights<T> weights{static_cast<const T*>(args.weights), b.geometry.images * b.geometry.pixels};
    lovasz_gradient<T>(b, args.out, tile_length(2 * b.classes(), sizeof(T), b.length()), weights);
  });
}

}  // namespace veerloss
