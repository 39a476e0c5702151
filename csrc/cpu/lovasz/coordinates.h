// Method "histogram" on the CPU: the coordinates of the errors of a tile (math/bins.h), which all its passes over pixels share.
#pragma once

#include "../../math/bins.h"
#include "segments.h"

#define VEERLOSS_TILES "histogram_tiles.h"
#include "../simd/dispatch_isa.h"

namespace veerloss {

// Of one tile after another, as load_tile has left them in `rows`: `begin`, then each class.
template <class T>
class TileCoordinates {
 public:
  // `whole`: with the rows of a softmax that other terms of a compound loss need.
  TileCoordinates(const SegmentBatch& b, int64_t capacity, bool whole)
      : batch_(b),
        capacity_(capacity),
        whole_(whole),
        few_(makes_exponentials(b)),
        coordinates_(capacity * (few_ ? b.classes() : 1)),
        shared_(few_ ? 0 : capacity),
        top_(few_ ? 0 : capacity) {}

  // Whether `begin` makes the exponentials of `rows`, with the coordinates of all classes at once: a choice by the number of
  // classes alone, so that all passes over pixels find the same bits.
  static bool makes_exponentials(const SegmentBatch& b) { return b.errors == Errors::softmax && b.classes() <= most_few; }

  void begin(const TileRows<T>& rows, int64_t n) {
    n_ = n;
    if (batch_.errors != Errors::softmax) return;
    if (few_)
      with_few(batch_.classes(), [&](auto classes) {
        constexpr int count = decltype(classes)::value;
        const auto find = [&](auto whole) {
          VEERLOSS_DISPATCH(HistogramTiles::few_coordinates<count, decltype(whole)::value>(
              rows.logits, rows.logits_stride, n, rows.label.data(), capacity_, rows.exps, rows.sumexp_excl_max,
              coordinates_.data(), rows.max_logit, rows.inv_sumexp, rows.label_logit));
        };
        whole_ ? find(std::true_type()) : find(std::false_type());
      });
    else
      VEERLOSS_DISPATCH(HistogramTiles::shared_coordinates(rows.sumexp_excl_max, n, shared_.data(), top_.data()));
    any_nan_ = VEERLOSS_DISPATCH(HistogramTiles::any_nan(rows.sumexp_excl_max, n, rows.label.data()));
  }

  // [capacity], until the next class is found.
  const float* find(const TileRows<T>& rows, int64_t c) {
    if (few_) return found_ = coordinates_.data() + c * capacity_;
    const int32_t* label = rows.label.data();
    const auto foreground = static_cast<int32_t>(batch_.foreground(c));
    float* const out = coordinates_.data();
    if (batch_.errors == Errors::softmax)
      VEERLOSS_DISPATCH(HistogramTiles::softmax_coordinates(rows.logits + c * rows.logits_stride, n_, label, foreground,
                                                            rows.max_logit, shared_.data(), top_.data(), out));
    else if (batch_.errors == Errors::probabilities)
      VEERLOSS_DISPATCH(HistogramTiles::probability_coordinates(rows.values + c * capacity_, n_, label, foreground, out));
    else
      VEERLOSS_DISPATCH(HistogramTiles::hinge_coordinates(rows.values + c * capacity_, n_, label, out));
    return found_ = out;
  }

  // Whether a pixel has an error that is not a number: in a softmax of any class, else of the class found last.
  bool any_nan(const TileRows<T>& rows) const {
    if (batch_.errors == Errors::softmax) return any_nan_;
    return VEERLOSS_DISPATCH(HistogramTiles::any_nan(found_, n_, rows.label.data()));
  }

 private:
  const SegmentBatch& batch_;
  const int64_t capacity_;
  const bool whole_, few_;
  int64_t n_ = 0;
  bool any_nan_ = false;
  const float* found_ = nullptr;
  std::vector<float> coordinates_;  // [classes][capacity] of few, else of the class found last
  std::vector<T> shared_, top_;
};

}  // namespace veerloss
