// Compound losses without a Lovász term on the CPU: the passes of terms.h alone.

#include "gradient.h"

namespace veerloss {
namespace {

template <class T>
void sum(const CompoundSum& args) {
  const SegmentBatch& b = args.batch;
  const int64_t capacity = tile_length(b.classes(), sizeof(T), b.length());
  BadTarget bad;
  const SegmentTiles tiles(b, false, capacity, bad);
  SharedTermSums shared(b, args.terms, tiles.count());
  const std::optional<LowLogits<T>> low = low_logits_of<T>(b);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(b.classes(), capacity, false, true, low);
    TermSummer<T> sum_terms(b, args.terms, capacity, shared);
    for (int64_t k = begin; k < end; ++k) {
      if (tiles[k].loaded() == 0) continue;
      tiles.load_labels_of(b, tiles[k], rows, bad);
      load_tile(b, tiles[k], capacity, rows);
      sum_terms(rows, tiles[k], k);
    }
  });
  raise_if_bad(bad, b);
  shared.store();
}

// Of no error: all that a pixel has is what the terms add.
template <class T>
struct NoWeights {
  static constexpr bool by_error = true, of_errors = false;
  static bool makes_exponentials(const SegmentBatch&) { return false; }

  void operator()(const TileRows<T>&, const Tile& tile, int64_t, T, T* grad) { std::fill_n(grad, tile.loaded(), T(0)); }
};

}  // namespace

int64_t kernels::compound_sum_scratch_bytes(const SegmentBatch&) {
  return 0;
}

void kernels::compound_sum(const CompoundSum& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { sum<decltype(zero)>(args); });
}

void kernels::compound_backward(const CompoundBackward& args) {
  const SegmentBatch& b = args.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t capacity = tile_length(2 * b.classes(), sizeof(T), b.length());
    BadTarget bad;  // the forward pass has raised it
    const SegmentTiles tiles(b, false, capacity, bad);
    segment_gradient<T>(b, args.out, tiles, capacity, NoWeights<T>(), args.terms);
  });
}

}  // namespace veerloss
