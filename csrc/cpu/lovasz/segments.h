// What both methods of the Lovász losses share on the CPU: tiles that keep to a segment, and the loss of a batch from those of
// its segments.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels.h"
#include "../../math/sums.h"
#include "../few.h"
#include "../parallel.h"
#include "../simd/vecmath.h"
#include "../targets.h"
#include "../upsample.h"

#define VEERLOSS_TILES "softmax_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {

// The rows of one tile: the buffers of a thread.
template <class T>
struct TileRows {
  // keep_logits: exponentials have rows of their own.
  TileRows(int64_t classes, int64_t tile, bool gradient, bool keep_logits, const std::optional<LowLogits<T>>& low_logits)
      : label(tile + 1),
        index(tile + 1),
        offset(tile),
        has_weight(gradient ? tile : 0),
        total(classes > classes_per_sum ? tile : 0),
        storage(tile * ((1 + gradient + keep_logits) * classes + (gradient ? 7 : 5))) {
    if (low_logits) low.emplace(*low_logits);
    T* next = storage.data();
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows * tile); };
    values = exps = take(classes);
    if (keep_logits) exps = take(classes);
    max_logit = take(1);
    max_count = take(1);
    sumexp_excl_max = take(1);
    inv_sumexp = take(1);
    label_logit = take(1);
    if (!gradient) return;
    grad = take(classes);
    pivot = take(1);
    others = take(1);
  }
  std::vector<int32_t> label, index;  // [tile] (and room for RowTiles::select): of the pixels of the tile; index in its span
  std::vector<int64_t> offset;        // [tile], in elements
  std::vector<int32_t> has_weight;    // [tile]
  std::vector<double> total;          // [tile]: see SoftmaxTiles::end_part
  std::vector<T> storage;
  // [classes][tile]: logits or probabilities, and the exponentials of a softmax; unless logits are kept, in their place.
  T *values, *exps;
  const T* logits = nullptr;  // [classes][logits_stride] of a softmax: `values`, or where the tensor has them
  int64_t logits_stride = 0;
  T *max_logit, *max_count, *sumexp_excl_max, *inv_sumexp;  // [tile], of a softmax
  T* label_logit;                                           // [tile], less the largest; of a focal term
  T* grad = nullptr;                                        // [classes][tile]
  T *pivot = nullptr, *others = nullptr;                    // [tile]: see GradientTiles
  std::optional<UpsampledRows<T>> low;                      // where logits are of low resolution
};

// Those of a pass, if they are of low resolution.
template <class T>
std::optional<LowLogits<T>> low_logits_of(const SegmentBatch& b) {
  if (!b.upsample) return std::nullopt;
  return std::optional<LowLogits<T>>(std::in_place, *b.upsample, b.logits);
}

// The pixels of a span that are not ignored; of a sample, some of them.
struct Tile {
  int64_t row;
  Run span;        // without a pixel of another row; of a sample, of another image
  int64_t size;    // pixels of the tile
  int64_t before;  // how many of the row, of a sample of the image, are not ignored before the span
  bool sampled;
  bool dense;  // all are loaded, whatever is ignored

  // Whether they are loaded one by one. Of most of a span all are, and the ignored ones computed with them, marked by their
  // label: less work than to leave them out.
  bool sparse() const { return size < span.count && !dense && (sampled || 2 * size <= span.count); }
  // Pixels in the rows of a tile.
  int64_t loaded() const { return sparse() ? size : span.count; }
};

// The tiles of a pass. Where pixels can be ignored this takes a pass over the targets, for tiles to be full: voxel grids are
// 98% ignored.
class SegmentTiles {
 public:
  SegmentTiles(const SegmentBatch& b, bool sampled, int64_t capacity, BadTarget& bad) : sampled_(sampled), valid_(b.rows()) {
    // In capacities. The zeros of a longer span leave the cache before its gradients are written over them.
    constexpr int64_t max_span = 16;
    const Geometry& g = b.geometry;
    const int64_t units = sampled ? g.images : b.rows(), length = sampled ? g.pixels : b.length();
    const std::vector<Run> parts = parts_of(b, units, length);
    std::vector<Run> blocks;
    std::vector<int64_t> first_block;  // of each part
    for (const Run& part : parts) {
      first_block.push_back(static_cast<int64_t>(blocks.size()));
      for (int64_t at = 0; at < part.count; at += capacity)
        blocks.push_back({part.first + at, std::min(capacity, part.count - at)});
    }
    first_block.push_back(static_cast<int64_t>(blocks.size()));
    std::vector<int32_t> valid;
    if (b.rule.has_ignore) {
      valid.resize(blocks.size());
      parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t begin, int64_t end) {
        std::vector<int32_t> label(capacity);
        for (int64_t k = begin; k < end; ++k) {
          load_labels(label.data(), b.target, g, b.rule, blocks[k], bad);
          valid[k] = static_cast<int32_t>(count_pixels(label.data(), blocks[k].count));
        }
      });
    }
    const bool dense = b.upsample && !sampled;
    int64_t unit = -1, before = 0;
    for (size_t part = 0; part < parts.size(); ++part) {
      if (parts[part].first / length != unit) before = 0;
      unit = parts[part].first / length;
      const int64_t row = sampled && !b.per_image ? 0 : unit, before_part = before;
      Tile tile{row, {parts[part].first, 0}, 0, before, sampled, dense};
      const auto end_tile = [&](int64_t next) {
        if (tile.span.count > 0) tiles_.push_back(tile);
        tile = {row, {next, 0}, 0, before, sampled, dense};
      };
      first_tile_.push_back(count());
      for (int64_t k = first_block[part]; k < first_block[part + 1]; ++k) {
        const Run run = blocks[k];
        const int64_t counted = valid.empty() ? run.count : valid[k];
        const int64_t size = sampled ? sampled_before(before + counted) - sampled_before(before) : counted;
        const bool most = dense || 2 * size > run.count;  // a tile of its own
        if (most || tile.size + size > capacity || tile.span.count >= max_span * capacity) end_tile(run.first);
        tile.span.count += run.count;
        tile.size += size;
        before += counted;
        if (most) end_tile(run.first + run.count);
      }
      end_tile(0);
      valid_[row] += before - before_part;
    }
    first_tile_.push_back(count());
  }

  // Parts of a row whose tiles one thread is to have: of logits of low resolution the bands of upsample.h, of each image. Calls
  // f(tile) for those of part k.
  int64_t parts() const { return static_cast<int64_t>(first_tile_.size()) - 1; }
  template <class F>
  void for_each_of_part(int64_t k, const F& f) const {
    for (int64_t i = first_tile_[k]; i < first_tile_[k + 1]; ++i) f(tiles_[i]);
  }

  int64_t count() const { return static_cast<int64_t>(tiles_.size()); }
  const Tile& operator[](int64_t k) const { return tiles_[k]; }
  // Pixels of a row that count.
  int64_t valid(int64_t row) const { return valid_[row]; }

  // The labels of a tile, and of a sparse one the index of its pixels.
  template <class T>
  void load_labels_of(const SegmentBatch& b, const Tile& tile, TileRows<T>& rows, BadTarget& bad) const {
    const Run span = tile.span;
    if (!tile.sparse()) return load_labels(rows.label.data(), b.target, b.geometry, b.rule, span, bad);
    constexpr int64_t chunk = 1024;
    int32_t label[chunk];
    int64_t size = 0, before = tile.before;
    // Without ignored pixels the runs of a sample are known: a sixteenth of the labels.
    const bool runs = sampled_ && !b.rule.has_ignore;
    for (int64_t done = 0; size < tile.size;) {
      const int64_t at = before % sample_step;
      if (runs && at >= sample_run) {
        done += sample_step - at;
        before += sample_step - at;
        continue;
      }
      const int64_t n = std::min(runs ? sample_run - at : chunk, tile.span.count - done);
      load_labels(label, b.target, b.geometry, b.rule, {tile.span.first + done, n}, bad);
      if (runs)
        before += n;
      else if (sampled_)
        before = mark_sample(label, n, before);
      size += select_pixels(label, n, static_cast<int32_t>(done), rows.index.data() + size, rows.label.data() + size);
      done += n;
    }
  }

 private:
  static std::vector<Run> parts_of(const SegmentBatch& b, int64_t units, int64_t length) {
    std::vector<Run> parts;
    if (!b.upsample) {
      for (int64_t unit = 0; unit < units && length > 0; ++unit) parts.push_back({unit * length, length});
      return parts;
    }
    const int64_t width = b.upsample->axes[2].full;
    for (int64_t image = 0; image < b.geometry.images && width > 0; ++image)
      for (const Band& band : bands_of(*b.upsample))
        parts.push_back({image * b.geometry.pixels + band.begin * width, (band.end - band.begin) * width});
    return parts;
  }

  // Marks the pixels that are not in the sample as ignored; `before` pixels of the image count before them. Returns how many do
  // after them.
  static int64_t mark_sample(int32_t* label, int64_t n, int64_t before) {
    int64_t at = before % sample_step;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t counts = label[i] != label_ignored;
      if (at >= sample_run) label[i] = label_ignored;
      at = at + counts == sample_step ? 0 : at + counts;
      before += counts;
    }
    return before;
  }

  // How many of the first `n` pixels are in the sample.
  static int64_t sampled_before(int64_t n) { return n / sample_step * sample_run + std::min(n % sample_step, sample_run); }

  const bool sampled_;
  std::vector<Tile> tiles_;
  std::vector<int64_t> first_tile_;  // of each part
  std::vector<int64_t> valid_;
};

// Loads the logits or probabilities of a tile, and computes the exponentials of a softmax, unless they are left to another.
template <class T>
void load_tile(const SegmentBatch& b, const Tile& tile, int64_t capacity, TileRows<T>& rows, bool exponentials = true) {
  const Geometry& g = b.geometry;
  const bool softmax = b.errors == Errors::softmax;
  const int64_t n = tile.loaded();
  const T* in_place = softmax && !tile.sparse() && !b.upsample ? row_in_place<T>(b.logits, g, 0, tile.span) : nullptr;
  if (b.upsample && tile.sparse())
    rows.low->gather(g.pixels, tile.span.first, rows.index.data(), n, rows.values, capacity);
  else if (b.upsample)
    rows.low->load(tile.span.first / g.pixels, tile.span.first % g.pixels, n, rows.values, capacity);
  else if (tile.sparse())
    pixel_offsets(rows.offset.data(), b.logits, g, tile.span.first, rows.index.data(), n);
  for (int64_t c = 0; !in_place && !b.upsample && c < g.channels; ++c) {
    if (tile.sparse())
      gather_row(rows.values + c * capacity, b.logits, c, rows.offset.data(), rows.index.data(), n);
    else
      load_row(rows.values + c * capacity, b.logits, g, c, tile.span);
  }
  if (!softmax) return;
  rows.logits = in_place ? in_place : rows.values;
  rows.logits_stride = in_place ? b.logits.stride_channel : capacity;
  if (!exponentials) return;
  if (with_few(g.channels, [&](auto classes) {
        VEERLOSS_DISPATCH(SoftmaxTiles::few<decltype(classes)::value>(rows.logits, rows.logits_stride, rows.exps, capacity, n,
                                                                      rows.max_logit, rows.sumexp_excl_max, rows.inv_sumexp));
      }))
    return;
  VEERLOSS_DISPATCH(SoftmaxTiles::maximum(rows.logits, g.channels, rows.logits_stride, n, rows.max_logit));
  VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(rows.logits, rows.logits_stride, rows.exps, g.channels, capacity, n,
                                               rows.max_logit, rows.max_count, rows.sumexp_excl_max, rows.inv_sumexp,
                                               rows.total.data()));
}

inline void raise_if_bad(const BadTarget& bad, const SegmentBatch& b) {
  bad.raise_if_any(b.target, b.geometry, expected_labels(b.rule, b.errors == Errors::hinge));
}

// Loss and scale from the losses of the segments that take part.
template <class T>
void store_segment_loss(const SegmentBatch& b, const SegmentLoss& out, const std::vector<double>& losses,
                        const std::vector<char>& takes_part) {
  const View loss{static_cast<char*>(out.loss), out.loss_dtype, 0, 0, 1};
  const auto* class_weight = static_cast<const T*>(out.class_weight);
  const int64_t rows = b.rows(), classes = b.classes();
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto in_mean = std::count(&takes_part[row * classes], &takes_part[row * classes] + classes, 1);
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t i = row * classes + c;
      double factor = takes_part[i] ? (class_weight ? static_cast<double>(class_weight[c]) : 1.0) : 0.0;
      if (out.reduction == Reduction::mean && takes_part[i]) factor /= static_cast<double>(in_mean * rows);
      const double value = takes_part[i] ? factor * losses[i] : 0.0;
      sum += value;
      static_cast<T*>(out.scale)[i] = static_cast<T>(factor);
      if (out.reduction == Reduction::none) store_element(loss, i, value);
    }
  }
  if (out.reduction != Reduction::none) store_element(loss, 0, sum);
}

}  // namespace veerloss
