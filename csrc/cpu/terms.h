// Terms of a compound loss on the CPU (kernels.h): a focal and a region loss, summed and differentiated over the tiles that a
// loss of segments has loaded. Formulas are those of the losses alone: FocalTiles, RegionTiles.
#pragma once

#include "focal.h"
#include "lovasz/segments.h"
#include "region_rows.h"

namespace veerloss {

// What a tile adds to TermSums::focal_sums.
struct FocalSums {
  double loss = 0;
  int64_t valid = 0;
  double alpha = 0;
};

// The row of a softmax that load_tile leaves out; TileCoordinates makes that of few classes.
template <class T>
void find_label_logit(const TileRows<T>& t, int64_t n) {
  VEERLOSS_DISPATCH(FocalTiles::label_logit(t.logits, t.logits_stride, n, t.label.data(), t.label_logit));
  VEERLOSS_DISPATCH(FocalTiles::below_maximum(t.max_logit, n, t.label_logit));
}

// The focal loss of the pixels of a tile, and its gradient; a thread has one. Logits and, of a softmax, all rows of the tile
// are read.
template <class T>
class FocalOfTile {
 public:
  FocalOfTile(const FocalTerm& term, const SegmentBatch& b, int64_t capacity)
      : batch_(b),
        capacity_(capacity),
        soft_(!b.mask && term.label_smoothing > 0),
        gamma_(static_cast<T>(term.gamma)),
        smoothing_(static_cast<T>(term.label_smoothing)),
        scalar_alpha_(static_cast<T>(term.alpha.value_or(1.0))),
        alpha_(term.class_alpha ? static_cast<const T*>(term.class_alpha) : &scalar_alpha_),
        alpha_step_(term.class_alpha ? 1 : 0),
        of_mask_{T(1), T(1), gamma_},
        soft_loss_(soft_ ? capacity : 0),
        totals_(soft_ && b.classes() > classes_per_sum ? 2 * capacity : 0),
        storage_(capacity * (9 + (soft_ ? b.classes() : 0))) {
    if (term.alpha) of_mask_ = {static_cast<T>(*term.alpha), static_cast<T>(1.0 - *term.alpha), gamma_};
    T* next = storage_.data();
    for (T** row : {&log_p_, &q_, &alpha_row_, &loss_, &grad_, &slope_, &log_sumexp_, &top_, &low_})
      *row = std::exchange(next, next + capacity);
    slopes_ = next;
  }
  FocalOfTile(const FocalOfTile&) = delete;

  // Whether every class has a share of the target.
  bool soft() const { return soft_; }

  FocalSums sum(const TileRows<T>& t, int64_t n) {
    compute(t, n, true);
    FocalSums sums;
    sums.loss = VEERLOSS_DISPATCH(FocalTiles::sum(loss_, n));
    sums.valid = count_pixels(t.label.data(), n);
    sums.alpha = static_cast<double>(sums.valid) * static_cast<double>(scalar_alpha_);
    if (alpha_step_ > 0) {
      VEERLOSS_DISPATCH(FocalTiles::gather_alpha(alpha_row_, alpha_, alpha_step_, t.label.data(), n));
      sums.alpha = VEERLOSS_DISPATCH(FocalTiles::sum(alpha_row_, n));
    }
    return sums;
  }

  // Before the gradient of a tile: factor is d loss / d (loss of a pixel).
  void differentiate(const TileRows<T>& t, int64_t n, T factor) {
    std::fill_n(grad_, n, factor);
    compute(t, n, false);
  }

  // Then of a softmax the derivative to log p of the label, whose 1 - p is `q`; of a mask that to the logit.
  const T* slope() const { return slope_; }
  const T* q() const { return q_; }

  // And of a soft target what class c adds to the gradient of its logits.
  void add_soft(const TileRows<T>& t, int64_t n, int64_t c, T* out) const {
    VEERLOSS_DISPATCH(FocalTiles::soft_backward<true>(t.exps + c * capacity_, slopes_ + c * capacity_, top_, low_, rows(t),
                                                      t.label.data(), n, grad_, out));
  }

 private:
  SoftmaxRows<T> rows(const TileRows<T>& t) const {
    return {t.max_logit, t.max_count, t.sumexp_excl_max, t.inv_sumexp, t.label_logit, log_p_, q_};
  }

  void compute(const TileRows<T>& t, int64_t n, bool forward) {
    if (gamma_ == T(2))
      compute<true>(t, n, forward);
    else
      compute<false>(t, n, forward);
  }

  template <bool square>
  void compute(const TileRows<T>& t, int64_t n, bool forward) {
    const int32_t* label = t.label.data();
    if (batch_.mask) return binary<square>(t, n, forward);
    if (soft_) return soft_terms<square>(t, n);
    const SoftmaxRows<T> r = rows(t);
    VEERLOSS_DISPATCH(FocalTiles::gather_alpha(alpha_row_, alpha_, alpha_step_, label, n));
    if (gamma_ == T(0) && !forward) {
      VEERLOSS_DISPATCH(FocalTiles::label_error(n, label, r));
      return VEERLOSS_DISPATCH(FocalTiles::cross_entropy_backward(alpha_row_, n, grad_, slope_));
    }
    VEERLOSS_DISPATCH(FocalTiles::log_probability(n, label, r));
    if (forward)
      VEERLOSS_DISPATCH(FocalTiles::softmax_forward<T, square>(log_p_, q_, alpha_row_, n, gamma_, loss_));
    else
      VEERLOSS_DISPATCH(FocalTiles::log_probability_backward<T, square>(log_p_, q_, alpha_row_, n, gamma_, grad_, slope_));
  }

  // Of the only row of a mask; ignored pixels have weight 0.
  template <bool square>
  void binary(const TileRows<T>& t, int64_t n, bool forward) {
    const int32_t* label = t.label.data();
    T *const logit = t.label_logit, *const target = log_p_, *const weight = alpha_row_;
    std::copy_n(t.values, n, logit);
    std::fill_n(weight, n, T(1));
    VEERLOSS_DISPATCH(FocalTiles::one_hot(target, label, n, 1));
    VEERLOSS_DISPATCH(FocalTiles::mask_labels(weight, logit, label, n));
    if (forward)
      VEERLOSS_DISPATCH(FocalTiles::sigmoid_forward<T, square, false>(logit, target, weight, n, of_mask_, loss_));
    else
      VEERLOSS_DISPATCH(
          FocalTiles::sigmoid_backward<T, square, false>(logit, target, weight, grad_, T(0), n, of_mask_, slope_));
  }

  template <bool square>
  void soft_terms(const TileRows<T>& t, int64_t n) {
    const int32_t* label = t.label.data();
    const int64_t classes = batch_.classes();
    const SoftmaxRows<T> r = rows(t);
    std::fill_n(soft_loss_.data(), n, 0.0);
    std::fill_n(top_, n, T(0));
    std::fill_n(low_, n, T(0));
    VEERLOSS_DISPATCH(FocalTiles::log_sum(t.sumexp_excl_max, n, log_sumexp_));
    double *const of_top = totals_.data(), *const of_low = of_top + capacity_;
    for (int64_t c = 0; c < classes; ++c) {
      if (c > 0 && c % classes_per_sum == 0) {
        VEERLOSS_DISPATCH(SoftmaxTiles::end_part(top_, of_top, n, c));
        VEERLOSS_DISPATCH(SoftmaxTiles::end_part(low_, of_low, n, c));
      }
      VEERLOSS_DISPATCH(FocalTiles::soft_terms<T, square>(
          t.exps + c * capacity_, t.logits + c * t.logits_stride, OneHotRow<T>{label, static_cast<int32_t>(c)}, n,
          smoothing_ / static_cast<T>(classes), smoothing_, alpha_[c * alpha_step_], gamma_, r, log_sumexp_, soft_loss_.data(),
          slopes_ + c * capacity_, top_, low_));
    }
    if (classes > classes_per_sum) {
      VEERLOSS_DISPATCH(SoftmaxTiles::end_sum(top_, of_top, n));
      VEERLOSS_DISPATCH(SoftmaxTiles::end_sum(low_, of_low, n));
    }
    for (int64_t i = 0; i < n; ++i) loss_[i] = label[i] >= 0 ? static_cast<T>(soft_loss_[i]) : T(0);
  }

  const SegmentBatch& batch_;
  const int64_t capacity_;
  const bool soft_;
  const T gamma_, smoothing_, scalar_alpha_;
  const T* const alpha_;
  const int64_t alpha_step_;
  SigmoidParams<T> of_mask_;
  std::vector<double> soft_loss_, totals_;
  std::vector<T> storage_;
  T *log_p_, *q_, *alpha_row_, *loss_, *grad_, *slope_, *log_sumexp_, *top_, *low_;  // [capacity]
  T* slopes_;                                                                        // [classes][capacity]
};

// The row of class c of a tile for a region loss.
template <class T>
RegionRow<T> region_row(const SegmentBatch& b, const TileRows<T>& t, int64_t n, int64_t c, int64_t capacity) {
  return {b.mask ? Activation::sigmoid : Activation::softmax,
          false,
          n,
          t.values + c * capacity,
          t.exps + c * capacity,
          t.inv_sumexp,
          t.label.data(),
          static_cast<int32_t>(b.foreground(c)),
          nullptr,
          T(0)};
}

// What all threads sum.
class SharedTermSums {
 public:
  SharedTermSums(const SegmentBatch& b, const TermSums& terms, int64_t tiles)
      : region(terms.region_sums ? b.segments() * RegionLayout::words : 0),
        focal(terms.focal_sums ? tiles : 0),
        terms_(terms) {}

  // After the pass. Tiles are added in order: the same bits for any number of threads.
  void store() const {
    std::copy(region.begin(), region.end(), terms_.region_sums);
    if (!terms_.focal_sums) return;
    FocalSums all;
    for (const FocalSums& tile : focal) {
      all.loss += tile.loss;
      all.valid += tile.valid;
      all.alpha += tile.alpha;
    }
    const double sums[] = {all.loss, static_cast<double>(all.valid), all.alpha};
    std::copy_n(sums, 3, terms_.focal_sums);
  }

  std::vector<std::atomic<int64_t>> region;
  std::vector<FocalSums> focal;  // of each tile

 private:
  const TermSums& terms_;
};

// One thread's.
template <class T>
class TermSummer {
 public:
  TermSummer(const SegmentBatch& b, const TermSums& terms, int64_t capacity, SharedTermSums& shared)
      : batch_(b), capacity_(capacity), shared_(shared) {
    if (terms.focal_sums) focal_.emplace(terms.focal, b, capacity);
  }

  // Tile number k. `whole`: TileCoordinates made the rows of its softmax.
  void operator()(const TileRows<T>& rows, const Tile& tile, int64_t k, bool whole = false) {
    const int64_t n = tile.loaded();
    if (focal_) {
      if (!whole && !batch_.mask) find_label_logit(rows, n);
      shared_.focal[k] = focal_->sum(rows, n);
    }
    if (shared_.region.empty()) return;
    for (int64_t c = 0; c < batch_.classes(); ++c) {
      const RegionPart part = VEERLOSS_DISPATCH(RegionTiles::sum(region_row(batch_, rows, n, c, capacity_)));
      part.add_to(&shared_.region[(tile.row * batch_.classes() + c) * RegionLayout::words]);
    }
  }

 private:
  const SegmentBatch& batch_;
  const int64_t capacity_;
  SharedTermSums& shared_;
  std::optional<FocalOfTile<T>> focal_;
};

// One thread's.
template <class T>
class TermGradient {
 public:
  // `grad`: that of the loss.
  TermGradient(const SegmentBatch& b, const TermGradients& terms, double grad, int64_t capacity)
      : batch_(b), capacity_(capacity), grad_(grad), region_(static_cast<const T*>(terms.region)) {
    if (!terms.focal_scale) return;
    focal_.emplace(terms.focal, b, capacity);
    factor_ = static_cast<T>(grad * static_cast<double>(*static_cast<const T*>(terms.focal_scale)));
    of_class_.resize(capacity);
  }

  // Null without a focal term.
  FocalOfTile<T>* focal() { return focal_ ? &*focal_ : nullptr; }
  T focal_factor() const { return factor_; }
  T* row() { return of_class_.data(); }

  // Adds the weights of a region loss to those of class c: dL/dp, of a mask dL/dx.
  void add_region(const TileRows<T>& t, const Tile& tile, int64_t c, T* g) {
    if (!region_) return;
    const T* const pair = region_ + 2 * (tile.row * batch_.classes() + c);
    const T fg = static_cast<T>(grad_ * static_cast<double>(pair[0])),
            bg = static_cast<T>(grad_ * static_cast<double>(pair[1]));
    VEERLOSS_DISPATCH(RegionTiles::add_weights(region_row(batch_, t, tile.loaded(), c, capacity_), fg, bg, g));
  }

 private:
  const SegmentBatch& batch_;
  const int64_t capacity_;
  const double grad_;
  const T* const region_;
  T factor_ = 0;
  std::optional<FocalOfTile<T>> focal_;
  std::vector<T> of_class_;
};

}  // namespace veerloss
