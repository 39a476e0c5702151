// Region losses on the CPU: sums over the pixels of each segment, the loss from them, and the gradient. Forward reads logits
// and target once, backward once more; nothing of their size is kept between the two. Threads add up integers: the same bits
// for any number of them.

#include <atomic>
#include <limits>

#include "gradient.h"
#include "region_rows.h"

namespace veerloss {
namespace {

// The rows of the classes of a tile.
template <class T>
class RegionRows {
 public:
  RegionRows(const RegionInput& in, int64_t capacity)
      : in_(in),
        capacity_(capacity),
        ignored_(in.ignored_value ? static_cast<T>(*in.ignored_value) : std::numeric_limits<T>::quiet_NaN()),
        target_(in.dense ? capacity : 0) {}

  RegionRow<T> operator()(const TileRows<T>& rows, const Tile& tile, int64_t c) {
    RegionRow<T> row{in_.activation,
                     in_.squared,
                     tile.loaded(),
                     rows.values + c * capacity_,
                     rows.exps + c * capacity_,
                     rows.inv_sumexp,
                     nullptr,
                     0,
                     nullptr,
                     ignored_};
    if (in_.dense) {
      const T* const in_place = row_in_place<T>(in_.values, in_.batch.geometry, c, tile.span);
      if (!in_place) load_row(target_.data(), in_.values, in_.batch.geometry, c, tile.span);
      row.target = in_place ? in_place : target_.data();
    } else {
      row.label = rows.label.data();
      row.foreground = static_cast<int32_t>(in_.batch.foreground(c));
    }
    return row;
  }

 private:
  const RegionInput& in_;
  const int64_t capacity_;
  const T ignored_;
  std::vector<T> target_;
};

// The first value of a row that is no target, for the message.
template <class T>
void find_bad(const RegionRow<T>& row, const Tile& tile, int64_t c, int64_t channels, BadTarget& bad) {
  for (int64_t i = 0; i < row.n; ++i)
    if (row.target[i] != row.ignored && (row.target[i] < T(0) || row.target[i] > T(1)))
      return bad.at(c, tile.span.first + i, channels);
}

std::string expected_values(const RegionInput& in) {
  if (!in.ignored_value) return "values in [0, 1]";
  return "values in [0, 1] or ignore_index=" + std::to_string(static_cast<int64_t>(*in.ignored_value));
}

template <class T>
void sum(const RegionSums& args) {
  const RegionInput& in = args.input;
  const SegmentBatch& b = in.batch;
  const int64_t capacity = tile_length(b.classes(), sizeof(T), b.length());
  BadTarget bad;
  const SegmentTiles tiles(b, false, capacity, bad);
  std::vector<std::atomic<int64_t>> sums(b.segments() * RegionLayout::words);
  const std::optional<LowLogits<T>> low = low_logits_of<T>(b);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(b.classes(), capacity, false, false, low);
    RegionRows<T> row_of(in, capacity);
    for (int64_t k = begin; k < end; ++k) {
      const Tile& tile = tiles[k];
      if (tile.loaded() == 0) continue;
      if (!in.dense) tiles.load_labels_of(b, tile, rows, bad);
      load_tile(b, tile, capacity, rows);
      for (int64_t c = 0; c < b.classes(); ++c) {
        const RegionRow<T> row = row_of(rows, tile, c);
        const RegionPart part = VEERLOSS_DISPATCH(RegionTiles::sum(row));
        if (part.bad_targets > 0) find_bad(row, tile, c, b.classes(), bad);
        part.add_to(&sums[(tile.row * b.classes() + c) * RegionLayout::words]);
      }
    }
  });
  if (in.dense)
    bad.raise_if_any(in.values, b.geometry, expected_values(in), b.classes());
  else
    bad.raise_if_any(b.target, b.geometry, expected_labels(b.rule, b.mask));
  std::copy(sums.begin(), sums.end(), args.sums);
}

template <class T>
void weigh(const RegionWeigh& args) {
  const SegmentBatch& b = args.batch;
  std::vector<double> losses(b.segments());
  std::vector<char> takes_part(b.segments());
  for (int64_t k = 0; k < b.segments(); ++k) {
    const RegionSegment segment(args.sums + k * RegionLayout::words, args.rule);
    takes_part[k] = args.selection.takes_part(k % b.classes(), segment.has_pixels, segment.has_target);
    losses[k] = segment.terms.value;
    args.coefficients[2 * k] = takes_part[k] ? segment.terms.of_target : 0.0;
    args.coefficients[2 * k + 1] = takes_part[k] ? segment.terms.of_all : 0.0;
  }
  store_segment_loss<T>(b, args.out, losses, takes_part);
}

// The weights dL/dp of a region loss; see segment_gradient.
template <class T, bool dense>
struct RegionWeights {
  static constexpr bool by_error = !dense, of_errors = false;
  static bool makes_exponentials(const SegmentBatch&) { return false; }

  RegionWeights(const RegionInput& in, const double* coefficients, int64_t capacity)
      : row_of_(in, capacity), classes_(in.batch.classes()), coefficients_(coefficients) {}

  void operator()(const TileRows<T>& rows, const Tile& tile, int64_t c, T factor, T* grad) {
    const double* const of = coefficients_ + 2 * (tile.row * classes_ + c);
    const auto scale = static_cast<double>(factor);
    VEERLOSS_DISPATCH(RegionTiles::weigh(row_of_(rows, tile, c), of[0] * scale, of[1] * scale, grad));
  }

 private:
  RegionRows<T> row_of_;
  const int64_t classes_;
  const double* coefficients_;
};

}  // namespace

void kernels::region_sum(const RegionSums& args) {
  with_opmath_type(args.input.batch.logits.dtype, [&](auto zero) { sum<decltype(zero)>(args); });
}

void kernels::region_weigh(const RegionWeigh& args) {
  with_opmath_type(args.batch.logits.dtype, [&](auto zero) { weigh<decltype(zero)>(args); });
}

void kernels::region_backward(const RegionBackward& args) {
  const SegmentBatch& b = args.input.batch;
  with_opmath_type(b.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t capacity = tile_length(2 * b.classes(), sizeof(T), b.length());
    BadTarget bad;  // the forward pass has raised it
    const SegmentTiles tiles(b, false, capacity, bad);
    if (args.input.dense)
      segment_gradient<T>(b, args.out, tiles, capacity, RegionWeights<T, true>(args.input, args.coefficients, capacity));
    else
      segment_gradient<T>(b, args.out, tiles, capacity, RegionWeights<T, false>(args.input, args.coefficients, capacity));
  });
}

}  // namespace veerloss
