// What both methods of the Lovász losses share on the CPU: tiles that keep to a segment, and the loss of a batch from those of
// its segments.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../../kernels.h"
#include "../parallel.h"
#include "../simd/vecmath.h"
#include "../targets.h"

#define VEERLOSS_TILES "softmax_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {

// The rows of one tile: the buffers of a thread.
template <class T>
struct TileRows {
  TileRows(int64_t classes, int64_t tile, bool gradient)
      : label(tile), has_weight(gradient ? tile : 0), storage(tile * ((gradient ? 2 : 1) * classes + (gradient ? 6 : 4))) {
    T* next = storage.data();
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows * tile); };
    values = exps = take(classes);
    max_logit = take(1);
    max_count = take(1);
    sumexp_excl_max = take(1);
    inv_sumexp = take(1);
    if (!gradient) return;
    grad = take(classes);
    pivot = take(1);
    others = take(1);
  }
  std::vector<int32_t> label, has_weight;  // [tile]
  std::vector<T> storage;
  // [classes][tile]: logits or probabilities; those of a softmax are overwritten by their exponentials, under the other name.
  T *values, *exps;
  T *max_logit, *max_count, *sumexp_excl_max, *inv_sumexp;  // [tile], of a softmax
  T* grad = nullptr;                                        // [classes][tile]
  T *pivot = nullptr, *others = nullptr;                    // [tile]: see GradientTiles
};

// The tiles of a pass: runs of pixels, none of which crosses the end of a row of segments.
class SegmentTiles {
 public:
  SegmentTiles(const LovaszBatch& b, bool sampled, int64_t tile)
      : pixels_(b.geometry.pixels), length_(b.length()), rows_(b.rows()), sampled_(sampled) {
    tile_ = sampled ? std::max<int64_t>(tile / sample_run, 1) : tile;
    per_image_ = sampled ? (pixels_ + sample_step - 1) / sample_step : pixels_;
    per_row_ = pixels_ > 0 ? length_ / pixels_ * per_image_ : 0;
    tiles_per_row_ = (per_row_ + tile_ - 1) / tile_;
  }
  int64_t count() const { return rows_ * tiles_per_row_; }

  // The runs of tile k; returns its row. One run, unless it is of a sample.
  int64_t get(int64_t k, std::vector<Run>& runs) const {
    const int64_t row = k / tiles_per_row_, begin = k % tiles_per_row_ * tile_, end = std::min(begin + tile_, per_row_);
    runs.clear();
    if (!sampled_) {
      runs.push_back({row * length_ + begin, end - begin});
    } else {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t pixel = j % per_image_ * sample_step;
        runs.push_back({row * length_ + j / per_image_ * pixels_ + pixel, std::min(sample_run, pixels_ - pixel)});
      }
    }
    return row;
  }

 private:
  const int64_t pixels_, length_, rows_;
  const bool sampled_;
  int64_t tile_, per_image_, per_row_, tiles_per_row_;  // in pixels, or in runs of a sample
};

// Loads the logits or probabilities of `runs` side by side into a tile, and computes the exponentials of a softmax. Returns the
// number of pixels.
template <class T>
int64_t load_tile(const LovaszBatch& b, const std::vector<Run>& runs, int64_t tile, TileRows<T>& rows) {
  const Geometry& g = b.geometry;
  const bool softmax = b.errors == Errors::softmax;
  const T* logits = softmax && runs.size() == 1 ? row_in_place<T>(b.logits, g, 0, runs[0]) : nullptr;
  const int64_t stride = logits ? b.logits.stride_channel : tile;
  int64_t n = 0;
  for (const Run& run : runs) {
    for (int64_t c = 0; !logits && c < g.channels; ++c) load_row(rows.values + c * tile + n, b.logits, g, c, run);
    n += run.count;
  }
  if (softmax) {
    if (!logits) logits = rows.values;
    VEERLOSS_DISPATCH(SoftmaxTiles::maximum(logits, g.channels, stride, n, rows.max_logit));
    VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(logits, stride, rows.exps, g.channels, tile, n, rows.max_logit, rows.max_count,
                                                 rows.sumexp_excl_max, rows.inv_sumexp));
  }
  return n;
}

template <class T>
void load_tile_labels(const LovaszBatch& b, const std::vector<Run>& runs, TileRows<T>& rows, BadTarget& bad) {
  int64_t n = 0;
  for (const Run& run : runs) {
    load_labels(rows.label.data() + n, b.target, b.geometry, b.rule, run, bad);
    n += run.count;
  }
}

inline void raise_if_bad(const BadTarget& bad, const LovaszBatch& b) {
  bad.raise_if_any(b.target, b.geometry, expected_labels(b.rule, b.errors == Errors::hinge));
}

// Loss and scale from the losses of the segments that take part.
template <class T>
void store_lovasz_loss(const LovaszBatch& b, const LovaszLoss& out, const std::vector<double>& losses,
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
