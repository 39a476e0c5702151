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
  TileCoordinates(const LovaszBatch& b, int64_t capacity)
      : coordinate(capacity), batch_(b), capacity_(capacity), shared_(capacity), top_(capacity) {}

  void begin(const TileRows<T>& rows, int64_t n) {
    n_ = n;
    if (batch_.errors != Errors::softmax) return;
    VEERLOSS_DISPATCH(HistogramTiles::shared_coordinates(rows.sumexp_excl_max, n, shared_.data(), top_.data()));
    any_nan_ = VEERLOSS_DISPATCH(HistogramTiles::any_nan(shared_.data(), n, rows.label.data()));
  }

  void find(const TileRows<T>& rows, int64_t c) {
    const int32_t* label = rows.label.data();
    const auto foreground = static_cast<int32_t>(batch_.foreground(c));
    float* const out = coordinate.data();
    if (batch_.errors == Errors::softmax)
      VEERLOSS_DISPATCH(HistogramTiles::softmax_coordinates(rows.logits + c * rows.logits_stride, n_, label, foreground,
                                                            rows.max_logit, shared_.data(), top_.data(), out));
    else if (batch_.errors == Errors::probabilities)
      VEERLOSS_DISPATCH(HistogramTiles::probability_coordinates(rows.values + c * capacity_, n_, label, foreground, out));
    else
      VEERLOSS_DISPATCH(HistogramTiles::hinge_coordinates(rows.values + c * capacity_, n_, label, out));
  }

  // Whether a pixel has an error that is not a number: in a softmax of any class, else of the class found last.
  bool any_nan(const TileRows<T>& rows) const {
    if (batch_.errors == Errors::softmax) return any_nan_;
    return VEERLOSS_DISPATCH(HistogramTiles::any_nan(coordinate.data(), n_, rows.label.data()));
  }

  std::vector<float> coordinate;  // [capacity], of the class found last

 private:
  const LovaszBatch& batch_;
  const int64_t capacity_;
  int64_t n_ = 0;
  bool any_nan_ = false;
  std::vector<T> shared_, top_;
};

}  // namespace veerloss
