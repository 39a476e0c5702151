// Softmax focal loss on the CPU, tile by tile: see Focal in focal.h.
#pragma once

#include <limits>

#include "../math/sums.h"
#include "few.h"
#include "focal.h"

#define VEERLOSS_TILES "softmax_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

// The buffers of a thread. `soft`: every class has a share of the target.
template <class T>
struct SoftmaxTile {
  SoftmaxTile(int64_t tile, int64_t classes, bool soft)
      : label(tile),
        soft_loss(soft ? tile : 0),
        totals(classes > classes_per_sum ? 2 * tile : 0),
        storage(tile * (classes * (soft ? 3 : 1) + 15)) {
    T* next = storage.data();
    const auto take = [&](int64_t rows) { return std::exchange(next, next + rows * tile); };
    exps = take(classes);
    logits = soft ? take(classes) : exps;
    slope = soft ? take(classes) : nullptr;
    for (T** row : {&rows.max_logit, &rows.max_count, &rows.sumexp_excl_max, &rows.inv_sumexp, &rows.label_logit, &rows.log_p,
                    &rows.q, &target, &alpha, &loss, &log_sumexp, &top, &low, &grad, &grad_log_p})
      *row = take(1);
  }
  std::vector<int32_t> label;
  std::vector<double> soft_loss;  // [tile]
  std::vector<double> totals;     // of top and low, [tile] each: see SoftmaxTiles::end_part
  // [classes][tile]. The logits are overwritten by their exponentials, and these by the gradient if it cannot be written in
  // place; for soft targets, which need the logits until the end, they have memory of their own. So has their `slope`.
  T *exps, *logits, *slope;
  SoftmaxRows<T> rows;
  T *target, *alpha, *loss, *log_sumexp, *top, *low, *grad, *grad_log_p;  // [tile]

 private:
  std::vector<T> storage;
};

template <class T>
class SoftmaxFocal {
 public:
  explicit SoftmaxFocal(const SoftmaxFocalInput& input)
      : g(input.geometry),
        tile(tile_length(g.channels * (is_soft(input) ? 3 : 1), sizeof(T), g.images * g.pixels)),
        in_(input),
        soft_(is_soft(input)),
        gamma_(static_cast<T>(input.gamma)),
        smoothing_(static_cast<T>(input.label_smoothing)),
        scalar_alpha_(static_cast<T>(input.alpha)),
        alpha_(input.class_alpha ? static_cast<const T*>(input.class_alpha) : &scalar_alpha_),
        alpha_step_(input.class_alpha ? 1 : 0) {}

  const Geometry g;
  const int64_t tile;

  SoftmaxTile<T> rows() const { return SoftmaxTile<T>(tile, g.channels, soft_); }

  template <bool square>
  FocalPartial forward(Run run, SoftmaxTile<T>& t, const FocalLoss& out) {
    const FocalPartial partial = compute<square>(run, t, rows_of(run, t));
    if (out.reduction == Reduction::none) store_row(t.loss, out.loss, g, 0, run);
    return partial;
  }

  template <bool square>
  void backward(Run run, SoftmaxTile<T>& t, const IncomingGradient<T>& incoming, const View& grad_logits) {
    const int64_t n = run.count, valid = compute<square>(run, t, rows_of(run, t)).valid;
    const int32_t* label = t.label.data();
    incoming.load(t.grad, g, 0, run);
    if (valid < n) VEERLOSS_DISPATCH(FocalTiles::keep_valid(t.grad, label, n));  // NaN, perhaps, of what does not count
    const SoftmaxRows<T>& r = t.rows;
    T* const in_place = row_in_place<T>(grad_logits, g, 0, run);
    T* const result = in_place ? in_place : t.exps;
    const int64_t stride = in_place ? grad_logits.stride_channel : tile;
    if (soft_) {
      soft_gradient(n, t, result, stride);
    } else {
      VEERLOSS_DISPATCH(
          FocalTiles::log_probability_backward<T, square>(r.log_p, r.q, t.alpha, n, gamma_, t.grad, t.grad_log_p));
      for (int64_t c = 0; c < g.channels; ++c)
        VEERLOSS_DISPATCH(FocalTiles::other_gradient(t.exps + c * tile, r.inv_sumexp, t.grad_log_p, n, result + c * stride));
      VEERLOSS_DISPATCH(FocalTiles::label_gradient(label, t.grad_log_p, r.q, n, result, stride));
    }
    if (!in_place)
      for (int64_t c = 0; c < g.channels; ++c) store_row(result + c * tile, grad_logits, g, c, run);
  }

  template <bool square, class Load>
  FocalPartial forward_low(Run run, SoftmaxTile<T>& t, const Load& load, const FocalLoss& out, TileGradient<T>* gradient) {
    const auto load_tile = [&] { load(t.logits, tile, t.rows.max_logit); };
    if (gradient && !soft_) {
      const int64_t valid = softmax<true>(run, t, load_tile);
      *gradient = {t.exps, t.grad};
      return {VEERLOSS_DISPATCH(FocalTiles::label_terms<T, square>(t.label.data(), t.rows, t.alpha, run.count, gamma_, t.loss,
                                                                   t.grad, t.grad_log_p, t.exps, tile)),
              valid};
    }
    const FocalPartial partial = compute<square, true>(run, t, load_tile);
    if (out.reduction == Reduction::none) store_row(t.loss, out.loss, g, 0, run);
    if (!gradient) return partial;
    std::fill_n(t.grad, run.count, T(1));
    *gradient = gradient_low<square>(run.count, t);
    return partial;
  }

  template <bool square, class Load>
  TileGradient<T> backward_low(Run run, SoftmaxTile<T>& t, const Load& load, const IncomingGradient<T>& incoming) {
    compute<square, true>(run, t, [&] { load(t.logits, tile, t.rows.max_logit); });
    incoming.load(t.grad, g, 0, run);
    return gradient_low<square>(run.count, t);
  }

  void raise_if_bad() const {
    if (in_.class_probabilities) return bad_.raise_if_any(in_.target, g, "finite values >= 0", g.channels);
    bad_.raise_if_any(in_.target, g, expected_labels(in_.rule));
  }

 private:
  static bool is_soft(const SoftmaxFocalInput& input) { return input.class_probabilities || input.label_smoothing > 0; }

  // After compute(), with the gradient of each pixel's loss in t.grad.
  template <bool square>
  TileGradient<T> gradient_low(int64_t n, SoftmaxTile<T>& t) {
    const SoftmaxRows<T>& r = t.rows;
    const int32_t* label = t.label.data();
    VEERLOSS_DISPATCH(FocalTiles::keep_valid(t.grad, label, n));  // NaN, perhaps, of what does not count
    if (soft_) {
      soft_gradient(n, t, t.exps, tile);
      return {t.exps, nullptr};
    }
    VEERLOSS_DISPATCH(FocalTiles::log_probability_backward<T, square>(r.log_p, r.q, t.alpha, n, gamma_, t.grad, t.grad_log_p));
    VEERLOSS_DISPATCH(FocalTiles::gradient_factor(label, t.grad_log_p, r.q, r.inv_sumexp, n, t.grad, t.exps, tile));
    return {t.exps, t.grad};
  }

  void soft_gradient(int64_t n, SoftmaxTile<T>& t, T* out, int64_t stride) const {
    for (int64_t c = 0; c < g.channels; ++c)
      VEERLOSS_DISPATCH(FocalTiles::soft_backward(t.exps + c * tile, t.slope + c * tile, t.top, t.low, t.rows, t.label.data(),
                                                  n, t.grad, out + c * stride));
  }

  auto rows_of(Run run, SoftmaxTile<T>& t) const {
    return [this, run, &t] {
      for (int64_t c = 0; c < g.channels; ++c) load_row(t.logits + c * tile, in_.logits, g, c, run);
    };
  }

  // Loads a tile, and computes its softmax and losses.
  template <bool square, bool has_maximum = false, class Load>
  FocalPartial compute(Run run, SoftmaxTile<T>& t, const Load& load) {
    const int64_t n = run.count, valid = softmax<has_maximum>(run, t, load);
    if (soft_) return {soft_loss<square>(run, t), valid};
    const SoftmaxRows<T>& r = t.rows;
    VEERLOSS_DISPATCH(FocalTiles::log_probability(n, t.label.data(), r));
    return {VEERLOSS_DISPATCH(FocalTiles::softmax_forward<T, square>(r.log_p, r.q, t.alpha, n, gamma_, t.loss)), valid};
  }

  // The softmax, and of hard labels r.label_logit and t.alpha. Returns the number of valid pixels.
  template <bool has_maximum, class Load>
  int64_t softmax(Run run, SoftmaxTile<T>& t, const Load& load) {
    const int64_t n = run.count;
    const int32_t* label = t.label.data();
    if (in_.class_probabilities)
      std::fill_n(t.label.data(), n, 0);  // every pixel counts
    else
      load_labels(t.label.data(), in_.target, g, in_.rule, run, bad_);
    const int64_t valid = VEERLOSS_DISPATCH(FocalTiles::count_valid(label, n));
    load();
    if (valid < n) VEERLOSS_DISPATCH(FocalTiles::clear_ignored(t.logits, g.channels, tile, label, n));
    const SoftmaxRows<T>& r = t.rows;
    if (!soft_) VEERLOSS_DISPATCH(FocalTiles::label_logit(t.logits, tile, n, label, r.label_logit));
    if (!with_few(g.channels, [&](auto classes) {
          VEERLOSS_DISPATCH(SoftmaxTiles::few<decltype(classes)::value>(t.logits, tile, t.exps, tile, n, r.max_logit,
                                                                        r.sumexp_excl_max, r.inv_sumexp));
        })) {
      if (!has_maximum || valid < n) VEERLOSS_DISPATCH(SoftmaxTiles::maximum(t.logits, g.channels, tile, n, r.max_logit));
      VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(t.logits, tile, t.exps, g.channels, tile, n, r.max_logit, r.max_count,
                                                   r.sumexp_excl_max, r.inv_sumexp, t.totals.data()));
    }
    if (soft_) return valid;
    VEERLOSS_DISPATCH(FocalTiles::below_maximum(r.max_logit, n, r.label_logit));
    VEERLOSS_DISPATCH(FocalTiles::gather_alpha(t.alpha, alpha_, alpha_step_, label, n));
    return valid;
  }

  template <bool square>
  double soft_loss(Run run, SoftmaxTile<T>& t) {
    const int64_t n = run.count;
    const int32_t* label = t.label.data();
    std::fill_n(t.soft_loss.data(), n, 0.0);
    std::fill_n(t.top, n, T(0));
    std::fill_n(t.low, n, T(0));
    VEERLOSS_DISPATCH(FocalTiles::log_sum(t.rows.sumexp_excl_max, n, t.log_sumexp));
    const T share = smoothing_ / static_cast<T>(g.channels);
    for (int64_t c = 0; c < g.channels; ++c) {
      const int64_t row = c * tile;
      if (c > 0 && c % classes_per_sum == 0)
        for_each_sum(t, [&](T* sum, double* total) { VEERLOSS_DISPATCH(SoftmaxTiles::end_part(sum, total, n, c)); });
      const auto add = [&](auto target) {
        VEERLOSS_DISPATCH(FocalTiles::soft_terms<T, square>(t.exps + row, t.logits + row, target, n, share, smoothing_,
                                                            alpha_[c * alpha_step_], gamma_, t.rows, t.log_sumexp,
                                                            t.soft_loss.data(), t.slope + row, t.top, t.low));
      };
      if (in_.class_probabilities)
        add(ProbabilityRow<T>{load_probabilities(c, run, t)});
      else
        add(OneHotRow<T>{label, static_cast<int32_t>(c)});
    }
    if (g.channels > classes_per_sum)
      for_each_sum(t, [&](T* sum, double* total) { VEERLOSS_DISPATCH(SoftmaxTiles::end_sum(sum, total, n)); });
    for (int64_t i = 0; i < n; ++i) t.loss[i] = label[i] >= 0 ? static_cast<T>(t.soft_loss[i]) : T(0);
    return VEERLOSS_DISPATCH(FocalTiles::sum(t.loss, n));
  }

  // A row of class probabilities.
  const T* load_probabilities(int64_t c, Run run, SoftmaxTile<T>& t) {
    const T* const in_place = row_in_place<T>(in_.target, g, c, run);
    if (!in_place) load_row(t.target, in_.target, g, c, run);
    const T* const target = in_place ? in_place : t.target;
    if (!VEERLOSS_DISPATCH(FocalTiles::all_probabilities(target, run.count))) {
      for (int64_t i = 0; i < run.count; ++i)
        if (!(target[i] >= T(0) && target[i] <= std::numeric_limits<T>::max())) {
          bad_.at(c, run.first + i, g.channels);
          break;
        }
    }
    return target;
  }

  // The sums over classes, and their rows of `totals`.
  template <class F>
  void for_each_sum(SoftmaxTile<T>& t, const F& f) const {
    double* total = t.totals.data();
    for (T* sum : {t.top, t.low}) f(sum, std::exchange(total, total + tile));
  }

  const SoftmaxFocalInput& in_;
  const bool soft_;
  T gamma_, smoothing_, scalar_alpha_;
  const T* alpha_;
  int64_t alpha_step_;
  BadTarget bad_;
};

}  // namespace veerloss
