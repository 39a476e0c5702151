// Lovász losses on the CPU, method "histogram": pixels are counted by error and not sorted, in time linear in the pixels and
// without any temporary of their size. Registered for the schemas in veerloss/ops.py, which puts the steps together:
//
//   count   errors into the cells of jaccard.h, of a sample of the pixels or of all of them (the coarse pass)
//   place   bins: from the mean square error that a cell makes to the number of bins that it gets
//   count   errors into these bins, of all pixels
//   weigh   bins: counts to the weights of their pixels, the losses, and the bounds on what binning moved
//   sum     weight times error over the pixels: the loss where errors have no bound
//   backward: a pixel's bin gives its weight, by look-up
//
// Counts are integers: results are the same bits for any number of threads.

#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "../bins.h"
#include "lovasz_segments.h"
#include "vecmath.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace veerloss {

// A block of bins, from the largest error down: the pixels before and in each, how their counts rise over
// it, its errors, and the weights to find.
struct BinBlock {
  static constexpr int64_t lanes = 8, size = 256;
  double fg_before[size], bg_before[size], fg[size], bg[size], fg_rise[size], bg_rise[size], middle[size], width[size];
  double fg_weight[size], bg_weight[size];
};

// Sums over a segment's bins, in lanes: the loss, the bound on what binning moved, and JaccardDeviation.
struct BinSums {
  enum { loss, bound, weights, gradient_deviation, loss_deviation, count };
  double lanes[count][BinBlock::lanes] = {};

  double operator[](int which) const {
    double all = 0;
    for (double lane : lanes[which]) all += lane;
    return all;
  }
};

}  // namespace veerloss

#define VEERLOSS_TILES "softmax_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "lovasz_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "histogram_tiles.h"
#include "for_each_target.h"

namespace veerloss {
namespace {

// What a pass over the pixels needs, besides the rows of its tile.
struct Pass {
  View x, y;
  Geometry g;
  Segments s;
  Errors errors;
  TargetRule rule;

  Pass(const Tensor& logits, const Tensor& target, Errors errors_, bool per_image, std::optional<int64_t> ignore_index)
      : x(view_of(logits)),
        y(view_of(target)),
        g(segment_geometry(logits, per_image)),
        s(g, per_image),
        errors(errors_),
        rule{errors == Errors::hinge ? 2 : g.channels, ignore_index.has_value(), ignore_index.value_or(0)} {
    check_like(target, logits, false, "a target [N, P] for logits [N, C, P]");
  }

  // The pixels of `runs` into the tile, side by side, up to softmax's exponentials.
  template <class T>
  int64_t load(TileRows<T>& rows, int64_t tile, const std::vector<Run>& runs, BadTarget& bad) const {
    const T* in = errors == Errors::softmax && runs.size() == 1 ? row_in_place<T>(x, g, 0, runs[0]) : nullptr;
    const int64_t stride = in ? x.stride_channel : tile;
    int64_t n = 0;
    for (const Run& run : runs) {
      load_labels(rows.label.data() + n, y, g, rule, run, bad);
      for (int64_t c = 0; !in && c < g.channels; ++c) load_row(rows.x + c * tile + n, x, g, c, run);
      n += run.count;
    }
    if (errors == Errors::softmax) {
      if (!in) in = rows.x;
      VEERLOSS_DISPATCH(SoftmaxTiles::maximum(in, g.channels, stride, n, rows.maximum));
      VEERLOSS_DISPATCH(
          SoftmaxTiles::exponentials(in, stride, rows.x, g.channels, tile, n, rows.maximum, rows.rest, rows.inverse_sum));
    }
    return n;
  }

  template <class T>
  void find_errors(const TileRows<T>& rows, int64_t tile, int64_t n, int64_t c, float* error) const {
    const T* in = rows.x + c * tile;
    const int32_t* label = rows.label.data();
    if (errors == Errors::softmax)
      VEERLOSS_DISPATCH(HistogramTiles::softmax_errors(in, n, label, foreground(c), rows.rest, rows.inverse_sum, error));
    else if (errors == Errors::probabilities)
      VEERLOSS_DISPATCH(HistogramTiles::probability_errors(in, n, label, foreground(c), error));
    else
      VEERLOSS_DISPATCH(HistogramTiles::hinge_errors(in, n, label, error));
  }

  // The label that is foreground to channel c.
  int32_t foreground(int64_t c) const { return errors == Errors::hinge ? 1 : static_cast<int32_t>(c); }
};

// ---- count

// The largest error of a segment and how many pixels have it. -1: no pixel; NaN: an error that is none.
struct Largest {
  float error = -1.0f;
  int64_t pixels = 0;

  void add(const Largest& other) {
    if (std::isnan(error)) return;
    if (std::isnan(other.error) || other.error > error)
      *this = other;
    else if (other.error == error)
      pixels += other.pixels;
  }
};

// Where the pixels of a pass are: tiles of runs, none across the end of a row of segments.
class Tiles {
 public:
  Tiles(const Pass& pass, bool sampled, int64_t tile)
      : g_(pass.g), s_(pass.s), sampled_(sampled), tile_(sampled ? std::max<int64_t>(tile / sample_run, 1) : tile) {
    per_image_ = sampled ? (g_.pixels + sample_step - 1) / sample_step : g_.pixels;
    per_row_ = g_.pixels > 0 ? s_.length / g_.pixels * per_image_ : 0;
    tiles_per_row_ = (per_row_ + tile_ - 1) / tile_;
  }
  int64_t count() const { return s_.rows * tiles_per_row_; }

  int64_t get(int64_t k, std::vector<Run>& runs) const {
    const int64_t row = k / tiles_per_row_, begin = k % tiles_per_row_ * tile_, end = std::min(begin + tile_, per_row_);
    runs.clear();
    if (!sampled_) {
      runs.push_back({row * s_.length + begin, end - begin});
    } else {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t pixel = j % per_image_ * sample_step;
        runs.push_back({row * s_.length + j / per_image_ * g_.pixels + pixel, std::min(sample_run, g_.pixels - pixel)});
      }
    }
    return row;
  }

 private:
  const Geometry g_;
  const Segments s_;
  const bool sampled_;
  const int64_t tile_;
  int64_t per_image_, per_row_, tiles_per_row_;
};

// One thread's counts of the segments of a row: 16 bits each, so that those of many classes stay in cache. They are added to
// the counts of all before any can overflow.
template <class T>
class Counter {
 public:
  Counter(const Pass& pass, int64_t bins, int64_t tile, int32_t* sums, std::vector<Largest>& largest,
          std::vector<std::mutex>& locks)
      : rows(pass.g.channels, tile, false),
        error(tile),
        index(tile),
        pass_(pass),
        slots_(2 * bins),
        memory_(pass.g.channels * (slots_ + 1) * static_cast<int64_t>(sizeof(uint16_t))),
        counts_(static_cast<uint16_t*>(memory_.data())),
        own_(pass.g.channels),
        sums_(sums),
        largest_(largest),
        locks_(locks) {}
  Counter(const Counter&) = delete;
  ~Counter() { flush(); }

  void begin(int64_t row, int64_t pixels) {
    if (row != row_ || pending_ + pixels > 65535) flush();
    row_ = row;
    pending_ += pixels;
  }

  void add(int64_t c, int64_t n, const uint32_t* table, bool bounded) {
    const int32_t* label = rows.label.data();
    const auto bins = static_cast<int32_t>(slots_ / 2);
    const int32_t fg = pass_.foreground(c);
    if (bounded)
      VEERLOSS_DISPATCH(HistogramTiles::find_bins<true>(error.data(), n, label, fg, table, bins, 2 * bins, index.data()));
    else
      VEERLOSS_DISPATCH(HistogramTiles::find_bins<false>(error.data(), n, label, fg, table, bins, 2 * bins, index.data()));
    VEERLOSS_DISPATCH(HistogramTiles::count(index.data(), n, counts_ + c * (slots_ + 1)));
    const int32_t seen = VEERLOSS_DISPATCH(HistogramTiles::largest_bits(error.data(), n, label));
    if (seen < 0) return;
    Largest here{bit_cast<float>(seen), 0};
    if (seen >= 0x7f800000) here.error = std::numeric_limits<float>::quiet_NaN();
    if (here.error >= own_[c].error)
      here.pixels = VEERLOSS_DISPATCH(HistogramTiles::count_equal(error.data(), n, label, here.error));
    own_[c].add(here);
  }

  TileRows<T> rows;
  std::vector<float> error;
  std::vector<uint16_t> index;
  std::vector<Run> runs;

 private:
  void flush() {
    for (int64_t c = 0; pending_ > 0 && c < pass_.g.channels; ++c) {
      const std::lock_guard<std::mutex> lock(locks_[c]);
      const int64_t segment = row_ * pass_.g.channels + c;
      uint16_t* counts = counts_ + c * (slots_ + 1);
      VEERLOSS_DISPATCH(HistogramTiles::add_counts(counts, slots_, sums_ + segment * slots_));
      counts[slots_] = 0;
      largest_[segment].add(own_[c]);
      own_[c] = {};
    }
    pending_ = 0;
  }

  const Pass& pass_;
  const int64_t slots_;
  const Scratch memory_;
  uint16_t* const counts_;  // [classes][slots and the ignored]
  std::vector<Largest> own_;
  int64_t row_ = -1, pending_ = 0;
  int32_t* sums_;
  std::vector<Largest>& largest_;
  std::vector<std::mutex>& locks_;
};

// (counts [rows, classes, 2, bins] of background and foreground, largest [rows, classes, 2]: the error and how many have it).
// Without a table bin 1 + c is cell c. `wanted`, [rows, classes]: the other segments are not counted.
template <class T>
std::tuple<Tensor, Tensor> count(const Tensor& logits, const Pass& pass, const uint32_t* table, const bool* wanted,
                                 bool sampled) {
  const BinLayout layout(pass.errors);
  const int64_t bins = table ? layout.bins : layout.coarse_bins, classes = pass.s.classes;
  std::vector<uint32_t> identity;
  if (!table)
    for (int64_t c = 0; c < layout.cells; ++c) identity.push_back(cell_entry(static_cast<uint32_t>(1 + c), 1));
  Tensor counts = torch::stable::new_zeros(logits, {pass.s.rows, classes, 2, bins}, ScalarType::Int);
  std::vector<Largest> largest(pass.s.count());
  std::vector<std::mutex> locks(classes);
  BadTarget bad;
  int64_t tile = tile_length(pass.g.channels, sizeof(T), pass.s.length);  // far below 65535, what a counter holds
  if (sampled) tile = std::max(tile, sample_run);
  const Tiles tiles(pass, sampled, tile);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    Counter<T> counter(pass, bins, tile, static_cast<int32_t*>(counts.data_ptr()), largest, locks);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = tiles.get(k, counter.runs);
      const int64_t n = pass.load(counter.rows, tile, counter.runs, bad);
      counter.begin(row, n);
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t segment = row * classes + c;
        if (wanted && !wanted[segment]) continue;
        pass.find_errors(counter.rows, tile, n, c, counter.error.data());
        counter.add(c, n, table ? table + segment * layout.cells : identity.data(), layout.bounded);
      }
    }
  });
  bad.raise_if_any(pass.y, pass.g, expected_labels(pass.rule, pass.errors == Errors::hinge));
  Tensor tops = torch::stable::new_empty(logits, {pass.s.rows, classes, 2}, ScalarType::Double);
  for (int64_t i = 0; i < pass.s.count(); ++i) {
    write_element(tops, 2 * i, largest[i].error);
    write_element(tops, 2 * i + 1, static_cast<double>(largest[i].pixels));
  }
  return {counts, tops};
}

// ---- place

// Operators take tables from whoever calls them: every entry must stay within the bins.
const uint32_t* checked_table(const Tensor& table, int64_t segments, const BinLayout& layout) {
  require(table.is_cpu() && table.is_contiguous() && table.numel() == segments * layout.cells && dtype_of(table) == DType::i32,
          "a table with the bins of every cell of every segment");
  const auto* entries = static_cast<const uint32_t*>(table.data_ptr());
  bool fits = true;
  for (int64_t i = 0; i < segments * layout.cells; ++i) {
    const uint32_t first = entries[i] & 0xffffu, bins = entries[i] >> 16;
    fits &= first + bins <= static_cast<uint32_t>(layout.bins) && bins > 0 && bins < (1u << 15);
  }
  require(fits, "a table whose entries lie within the bins");
  return entries;
}

// Calls f(cell, first bin, bins) for every cell of a segment's table.
template <class F>
void for_each_cell(const uint32_t* table, int64_t cells, const F& f) {
  for (int64_t c = cells - 1; c >= 0; --c) f(static_cast<uint32_t>(c), table[c] & 0xffffu, table[c] >> 16);
}

// A table from the counts of a segment's cells, and of its foreground of error 0. s bins divide a cell's mean square errors by
// s^2, so their sum is least where s goes by the cube root. Half of the bins are placed for the gradient and half for the loss:
// against shares of the weight, 2 to 40 times smaller errors (a foreground of 1000 in 1M pixels: gradient 1.9e-3 to 1.5e-4).
void place_segment(const int64_t* counts, int64_t fg_at_0, const BinLayout& layout, uint32_t* table) {
  const int64_t cells = layout.cells;
  std::vector<double> gradient(cells), loss(cells);
  double fg = 0, bg = 0, most_gradient = 0, most_loss = 0, all_gradient = 0, all_loss = 0;
  int64_t total_fg = fg_at_0;
  for (int64_t c = 0; c < cells; ++c) total_fg += counts[2 * c + 1];
  const auto total = static_cast<double>(std::max<int64_t>(total_fg, 1));  // a sample may have missed what there is
  for (int64_t c = cells - 1; c >= 0; --c) {
    const auto b = static_cast<double>(counts[2 * c]), f = static_cast<double>(counts[2 * c + 1]);
    if (b + f == 0) continue;
    const double begin = layout.begin(c), end = layout.begin(c + 1);
    const JaccardDeviation deviation =
        jaccard_bin_deviation(jaccard_bin(total, fg, bg, f, b), jaccard_bin_bound(total, fg, bg, f, b), f, b,
                              slope_of_error(std::min(0.5 * (begin + end), 1.0), layout.bounded), end - begin);
    gradient[c] = std::max(deviation.gradient, 0.0);
    loss[c] = deviation.loss;
    most_gradient = std::max(most_gradient, gradient[c]);
    most_loss = std::max(most_loss, loss[c]);
    fg += f;
    bg += b;
  }
  // Relative to the largest, so that float32, in which cube roots take a third of the time, holds them.
  const auto root = [](double square, double most) {
    return square > 0 ? static_cast<double>(std::cbrt(static_cast<float>(square / most))) : 0.0;
  };
  for (int64_t c = 0; c < cells; ++c) {
    all_gradient += gradient[c] = root(gradient[c], most_gradient);
    all_loss += loss[c] = root(loss[c], most_loss);
  }
  uint32_t bins = 1;
  for (int64_t c = 0; c < cells; ++c) {
    double share = 0;
    if (all_gradient > 0) share += gradient[c] / all_gradient;
    if (all_loss > 0) share += loss[c] / all_loss;
    const uint32_t own = 1 + static_cast<uint32_t>(0.5 * share * static_cast<double>(BinLayout::budget) * (1 - 1e-12));
    table[c] = cell_entry(bins, own);
    bins += own;
  }
}

// counts: of cells, or with `fine`, the table that they were made with, of its bins.
Tensor place(const Tensor& counts, const std::optional<Tensor>& fine, int64_t errors) {
  const BinLayout layout(static_cast<Errors>(errors));
  require(counts.dim() == 4 && counts.is_contiguous() && counts.size(3) == (fine ? layout.bins : layout.coarse_bins) &&
              counts.size(2) == 2 && (dtype_of(counts) == DType::i32 || dtype_of(counts) == DType::i64),
          "counts of a counting pass");
  const int64_t segments = counts.size(0) * counts.size(1), bins = counts.size(3);
  Tensor table = torch::stable::new_empty(counts, {counts.size(0), counts.size(1), layout.cells}, ScalarType::Int);
  auto* entries = static_cast<uint32_t*>(table.data_ptr());
  const auto* before = fine ? checked_table(*fine, segments, layout) : nullptr;
  parallel_for(segments, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> cell_counts(2 * layout.cells);
    for (int64_t i = begin; i < end; ++i) {
      int64_t fg_at_0 = 0;
      const auto sum = [&](const auto* in) {
        fg_at_0 = in[i * 2 * bins + bins];
        for (int64_t c = 0; c < layout.cells; ++c) {
          const uint32_t entry = before ? before[i * layout.cells + c] : cell_entry(static_cast<uint32_t>(1 + c), 1);
          const auto* first = in + i * 2 * bins + (entry & 0xffffu);
          int64_t bg = 0, fg = 0;
          for (uint32_t k = 0; k < entry >> 16; ++k) {
            bg += first[k];
            fg += first[bins + k];
          }
          cell_counts[2 * c] = bg;
          cell_counts[2 * c + 1] = fg;
        }
      };
      if (dtype_of(counts) == DType::i64)
        sum(static_cast<const int64_t*>(counts.data_ptr()));
      else
        sum(static_cast<const int32_t*>(counts.data_ptr()));
      place_segment(cell_counts.data(), fg_at_0, layout, entries + i * layout.cells);
    }
  });
  return table;
}

// ---- weigh

struct SegmentResult {
  double loss = 0, bound = 0, gradient_deviation = 0, loss_deviation = 0;
};

// Counts [2, bins] of background and foreground to signed weights [2, bins].
template <class T, class Count>
SegmentResult weigh_segment(const Count* counts, const uint32_t* table, const BinLayout& layout, double total, float largest,
                            T* weights) {
  const Count* const fg_counts = counts + layout.bins;
  BinBlock block;
  BinSums sums;
  double fg = 0, bg = 0;
  int64_t n = 0;
  uint32_t bin_of[BinBlock::size];
  const auto run = [&] {
    int64_t padded = n;
    for (; padded % BinBlock::lanes != 0; ++padded) {
      block.fg_before[padded] = fg;
      block.bg_before[padded] = bg;
      block.fg[padded] = block.bg[padded] = block.fg_rise[padded] = block.bg_rise[padded] = 0;
      block.middle[padded] = block.width[padded] = 0;
    }
    if (layout.bounded)
      VEERLOSS_DISPATCH(HistogramTiles::weigh<true>(&block, padded, total, &sums));
    else
      VEERLOSS_DISPATCH(HistogramTiles::weigh<false>(&block, padded, total, &sums));
    for (int64_t i = 0; i < n; ++i) {
      weights[bin_of[i]] = static_cast<T>(block.bg_weight[i]);
      weights[layout.bins + bin_of[i]] = static_cast<T>(-block.fg_weight[i]);
    }
    n = 0;
  };
  for_each_cell(table, layout.cells, [&](uint32_t cell, uint32_t first, uint32_t bins) {
    const double begin = layout.begin(cell), width = (layout.begin(cell + 1) - begin) / bins;
    for (int64_t k = static_cast<int64_t>(bins) - 1; k >= 0; --k) {
      const uint32_t bin = first + static_cast<uint32_t>(k);
      const auto b = static_cast<double>(counts[bin]), f = static_cast<double>(fg_counts[bin]);
      const double low = begin + width * static_cast<double>(k), high = std::min(low + width, static_cast<double>(largest));
      block.fg_before[n] = fg;
      block.bg_before[n] = bg;
      block.fg[n] = f;
      block.bg[n] = b;
      block.width[n] = high - low;
      block.middle[n] = 0.5 * (low + high);
      block.fg_rise[n] = rise_of_counts(fg_counts + first, k, bins);
      block.bg_rise[n] = rise_of_counts(counts + first, k, bins);
      if (fg + bg == 0 && f + b > 0) {  // the first: it has the largest error, known exactly, on which a hinge may hang
        block.middle[n] += (static_cast<double>(largest) - block.middle[n]) / (f + b);
        block.fg_rise[n] = block.bg_rise[n] = 0;
      }
      bin_of[n] = bin;
      fg += f;
      bg += b;
      if (++n == BinBlock::size) run();
    }
  });
  run();
  weights[0] = weights[layout.bins] = 0;  // of errors of 0, where they change neither loss nor gradient, and of ignored pixels
  return {sums[BinSums::loss], sums[BinSums::bound],
          sums[BinSums::weights] > 0 ? std::sqrt(sums[BinSums::gradient_deviation] / sums[BinSums::weights]) : 0.0,
          std::sqrt(sums[BinSums::loss_deviation])};
}

// (loss, scale, weights [rows, classes, 2, bins], tops [rows, classes, 2], bounds [rows, classes], doubtful [rows, classes]).
// A segment without foreground has its whole weight on its largest error: tops says which and what weight each pixel with it
// has; 0 elsewhere.
template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> weigh(const Tensor& logits, const Tensor& counts,
                                                                 const Tensor& largest, const Tensor& table, const Options& o) {
  const BinLayout layout(o.errors);
  const Segments s(segment_geometry(logits, o.per_image), o.per_image);
  require(counts.is_contiguous() && counts.numel() == s.count() * layout.bins * 2 &&
              (dtype_of(counts) == DType::i32 || dtype_of(counts) == DType::i64),
          "counts of the second counting pass");
  require(largest.is_contiguous() && largest.numel() == 2 * s.count() && dtype_of(largest) == DType::f64,
          "the largest errors of a counting pass");
  const uint32_t* entries = checked_table(table, s.count(), layout);
  const auto* errors = static_cast<const double*>(largest.data_ptr());
  Tensor weights = torch::stable::new_zeros(logits, {s.rows, s.classes, 2, layout.bins}, scalar_type_of<T>());
  Tensor tops = torch::stable::new_zeros(logits, {s.rows, s.classes, 2}, scalar_type_of<T>());
  Tensor bounds = torch::stable::new_zeros(logits, {s.rows, s.classes}, ScalarType::Double);
  Tensor doubtful = torch::stable::new_zeros(logits, {s.rows, s.classes}, ScalarType::Bool);
  std::vector<SegmentResult> results(s.count());
  std::vector<char> takes_part(s.count(), 0);

  const auto weigh_one = [&](int64_t i, const auto* in) {
    double fg = 0, valid = 0;
    for (int64_t k = 0; k < layout.bins; ++k) {
      valid += static_cast<double>(in[k] + in[layout.bins + k]);
      fg += static_cast<double>(in[layout.bins + k]);
    }
    takes_part[i] = o.take_part(i % s.classes, valid > 0, fg > 0);
    T* out = static_cast<T*>(weights.data_ptr()) + i * layout.bins * 2;
    const double top = errors[2 * i], pixels = errors[2 * i + 1];
    if (!takes_part[i]) return;
    if (std::isnan(top)) {
      std::fill_n(out, 2 * layout.bins, std::numeric_limits<T>::quiet_NaN());
      out[0] = 0;  // that of ignored pixels
      results[i].loss = results[i].bound = top;
    } else if (fg == 0) {
      static_cast<T*>(tops.data_ptr())[2 * i] = static_cast<T>(top);
      static_cast<T*>(tops.data_ptr())[2 * i + 1] = static_cast<T>(1 / pixels);
      results[i].loss = top;
      results[i].bound = 2 * (1 - 1 / pixels);
    } else {
      results[i] = weigh_segment(in, entries + i * layout.cells, layout, fg, static_cast<float>(top), out);
    }
  };
  parallel_for(s.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (dtype_of(counts) == DType::i64)
        weigh_one(i, static_cast<const int64_t*>(counts.data_ptr()) + i * layout.bins * 2);
      else
        weigh_one(i, static_cast<const int32_t*>(counts.data_ptr()) + i * layout.bins * 2);
    }
  });
  std::vector<double> losses(s.count());
  for (int64_t i = 0; i < s.count(); ++i) {
    const auto in_row = std::count(&takes_part[i - i % s.classes], &takes_part[i - i % s.classes] + s.classes, 1);
    losses[i] = results[i].loss;
    write_element(bounds, i, results[i].bound);
    static_cast<bool*>(doubtful.data_ptr())[i] =
        results[i].gradient_deviation > gradient_tolerance ||
        results[i].loss_deviation > loss_tolerance * std::sqrt(static_cast<double>(in_row));
  }
  const auto [loss, scale] = reduce_segments<T>(logits, s, o, losses, takes_part);
  return {loss, scale, weights, tops, bounds, doubtful};
}

// ---- look up

// The signed weights of a tile's pixels in class c, by their errors.
template <class T>
class WeightRow {
 public:
  WeightRow(const Pass& pass, const BinLayout& layout, int64_t tile, const uint32_t* table, const T* weights, const T* tops)
      : error(tile), pass_(pass), layout_(layout), tile_(tile), index_(tile), table_(table), weights_(weights), tops_(tops) {}

  void operator()(const TileRows<T>& rows, int64_t n, int64_t row, int64_t c, T factor, T* g) {
    const int64_t i = row * pass_.s.classes + c;
    const int32_t* label = rows.label.data();
    const T top = tops_[2 * i], top_weight = tops_[2 * i + 1];
    pass_.find_errors(rows, tile_, n, c, error.data());
    if (top_weight > 0) {
      VEERLOSS_DISPATCH(HistogramTiles::weigh_largest(error.data(), n, label, static_cast<float>(top), top_weight * factor, g));
      return;
    }
    const auto bins = static_cast<int32_t>(layout_.bins);
    const uint32_t* cells = table_ + i * layout_.cells;
    const int32_t fg = pass_.foreground(c);
    if (layout_.bounded)
      VEERLOSS_DISPATCH(HistogramTiles::find_bins<true>(error.data(), n, label, fg, cells, bins, 0, index_.data()));
    else
      VEERLOSS_DISPATCH(HistogramTiles::find_bins<false>(error.data(), n, label, fg, cells, bins, 0, index_.data()));
    VEERLOSS_DISPATCH(HistogramTiles::look_up(index_.data(), n, weights_ + i * layout_.bins * 2, factor, g));
  }

  std::vector<float> error;

 private:
  const Pass& pass_;
  const BinLayout& layout_;
  const int64_t tile_;
  std::vector<int32_t> index_;
  const uint32_t* table_;
  const T *weights_, *tops_;
};

// ---- sum

// Sum over the pixels of weight times error, in whole numbers of 1 / units, for errors without a bound: a hinge's bins are too
// wide for its loss to come from their middles (1e-6 of it at 10^4 pixels, 3e-6 where foreground is rare). Integers, so that
// the sum is the same for any number of threads and ranks.
template <class T>
Tensor sum(const Tensor& logits, const Pass& pass, const uint32_t* table, const T* weights, const T* tops,
           const double* units) {
  const Segments& s = pass.s;
  const BinLayout layout(pass.errors);
  const int64_t tile = tile_length(pass.g.channels, sizeof(T), s.length);
  const Tiles tiles(pass, false, tile);
  std::vector<std::atomic<int64_t>> sums(s.count());
  BadTarget bad;  // checked before
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> rows(pass.g.channels, tile, false);
    WeightRow<T> weigh(pass, layout, tile, table, weights, tops);
    std::vector<T> weight(tile);
    std::vector<Run> runs;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = tiles.get(k, runs), n = pass.load(rows, tile, runs, bad);
      for (int64_t c = 0; c < s.classes; ++c) {
        const int64_t i = row * s.classes + c;
        weigh(rows, n, row, c, T(1), weight.data());
        sums[i] += VEERLOSS_DISPATCH(HistogramTiles::fixed_sum(weight.data(), weigh.error.data(), n, units[i]));
      }
    }
  });
  Tensor result = torch::stable::new_empty(logits, {s.rows, s.classes}, ScalarType::Long);
  for (int64_t i = 0; i < s.count(); ++i) static_cast<int64_t*>(result.data_ptr())[i] = sums[i];
  return result;
}

// ---- backward

template <class T>
Tensor backward(const Tensor& grad, const Tensor& logits, const Pass& pass, const Tensor& table, const Tensor& weights,
                const Tensor& tops, const Tensor& scale, Reduction reduction) {
  const Geometry& g = pass.g;
  const Segments& s = pass.s;
  const BinLayout layout(pass.errors);
  const bool softmax = pass.errors == Errors::softmax, probabilities = pass.errors == Errors::probabilities;
  const std::vector<T> factor = segment_factors<T>(grad, scale, s, reduction);
  const uint32_t* entries = checked_table(table, s.count(), layout);
  const T* weight = arithmetic_data<T>(weights, s.count() * layout.bins * 2, "the weights of the forward pass");
  const T* top = arithmetic_data<T>(tops, s.count() * 2, "the tops of the forward pass");
  Tensor grad_logits = with_huge_pages(torch::stable::empty_like(logits));
  const View out = view_of(grad_logits);
  const int64_t tile = tile_length(2 * g.channels, sizeof(T), s.length);
  BadTarget bad;  // checked in the forward pass
  const Tiles tiles(pass, false, tile);
  parallel_for(tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> b(g.channels, tile, true);
    WeightRow<T> weigh(pass, layout, tile, entries, weight, top);
    std::vector<Run> runs;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = tiles.get(k, runs), n = pass.load(b, tile, runs, bad);
      if (softmax) VEERLOSS_DISPATCH(LovaszTiles::begin_gradient(n, b.pivot, b.others, b.weighted.data()));
      for (int64_t c = 0; c < g.channels; ++c) {
        T *x_row = b.x + c * tile, *g_row = b.g + c * tile;
        const T f = factor[row * s.classes + c];
        weigh(b, n, row, c, probabilities ? T(1) : f, g_row);
        if (probabilities) {
          VEERLOSS_DISPATCH(LovaszTiles::sign_outside(x_row, g_row, n));  // by the weight's sign: before the factor's
          VEERLOSS_DISPATCH(LovaszTiles::scale(g_row, n, f));
        }
        if (softmax) VEERLOSS_DISPATCH(LovaszTiles::accumulate_gradient(x_row, g_row, n, b.pivot, b.others, b.weighted.data()));
      }
      if (softmax) VEERLOSS_DISPATCH(LovaszTiles::end_gradient(n, b.rest, b.inverse_sum, b.pivot, b.others));
      for (int64_t c = 0; c < g.channels; ++c) {
        T *x_row = b.x + c * tile, *g_row = b.g + c * tile;
        T* const in_place = softmax ? row_in_place<T>(out, g, c, runs[0]) : nullptr;
        if (softmax)
          VEERLOSS_DISPATCH(LovaszTiles::softmax_gradient(x_row, g_row, n, b.inverse_sum, b.pivot, b.others, b.weighted.data(),
                                                          in_place ? in_place : g_row));
        if (!in_place) store_row(g_row, out, g, c, runs[0]);
      }
    }
  });
  return grad_logits;
}

// ---- operators

std::tuple<Tensor, Tensor> lovasz_histogram_count(const Tensor& logits, const Tensor& target, std::optional<Tensor> table,
                                                  std::optional<Tensor> wanted, int64_t errors, bool per_image,
                                                  std::optional<int64_t> ignore_index, bool sampled) {
  return with_arithmetic_type(logits, [&](auto zero) {
    const Pass pass(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    const BinLayout layout(pass.errors);
    require(!wanted || (wanted->is_contiguous() && wanted->numel() == pass.s.count() && dtype_of(*wanted) == DType::u8),
            "wanted with one bool per segment");
    return count<decltype(zero)>(logits, pass, table ? checked_table(*table, pass.s.count(), layout) : nullptr,
                                 wanted ? static_cast<const bool*>(wanted->data_ptr()) : nullptr, sampled);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lovasz_histogram_weigh(
    const Tensor& logits, const Tensor& counts, const Tensor& largest, const Tensor& table, std::optional<Tensor> selected,
    bool present, std::optional<Tensor> class_weight, int64_t errors, bool per_image, int64_t reduction, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return weigh<decltype(zero)>(logits, counts, largest, table,
                                 {static_cast<Errors>(errors), per_image, std::nullopt, static_cast<Reduction>(reduction), true,
                                  wide, present, class_flags(selected, logits), class_weight});
  });
}

Tensor lovasz_histogram_sum(const Tensor& logits, const Tensor& target, const Tensor& table, const Tensor& weights,
                            const Tensor& tops, const Tensor& units, int64_t errors, bool per_image,
                            std::optional<int64_t> ignore_index) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const Pass pass(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    const BinLayout layout(pass.errors);
    const int64_t segments = pass.s.count();
    require(units.is_contiguous() && units.numel() == segments && dtype_of(units) == DType::f64, "a unit for every segment");
    return sum<T>(logits, pass, checked_table(table, segments, layout),
                  arithmetic_data<T>(weights, segments * layout.bins * 2, "the weights of the bins"),
                  arithmetic_data<T>(tops, segments * 2, "the tops"), static_cast<const double*>(units.data_ptr()));
  });
}

Tensor lovasz_histogram_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, const Tensor& table,
                                 const Tensor& weights, const Tensor& tops, const Tensor& scale, int64_t errors, bool per_image,
                                 std::optional<int64_t> ignore_index, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    const Pass pass(logits, target, static_cast<Errors>(errors), per_image, ignore_index);
    return backward<decltype(zero)>(grad, logits, pass, table, weights, tops, scale, static_cast<Reduction>(reduction));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(veerloss, CPU, m) {
  m.impl("lovasz_histogram_count", TORCH_BOX(&lovasz_histogram_count));
  m.impl("lovasz_histogram_place", TORCH_BOX(&place));
  m.impl("lovasz_histogram_weigh", TORCH_BOX(&lovasz_histogram_weigh));
  m.impl("lovasz_histogram_sum", TORCH_BOX(&lovasz_histogram_sum));
  m.impl("lovasz_histogram_backward", TORCH_BOX(&lovasz_histogram_backward));
}

}  // namespace veerloss
