// Focal losses on the CPU: tiles of pixels on PyTorch's threads, registered for the schemas in veerloss/ops.py.
//
// Forward reads logits and target once; backward reads them once more and writes the gradient. Nothing in between is kept.
// Each tile's sum is a float64, and the tiles are added in order, so the loss does not depend on the number of threads.

#include "../focal.h"

#include <tuple>
#include <vector>

#include "tensor.h"
#include "vecmath.h"

namespace veerloss {

template <class T>
struct SigmoidParams {
  T alpha_positive, alpha_negative, gamma;
};

// Per-pixel rows of a tile, each [n]: what FocalTiles::softmax gives and needs.
template <class T>
struct SoftmaxRows {
  T *maximum, *rest, *log_p, *q, *inverse_sum;
};

}  // namespace veerloss

#define VEERLOSS_TILES "softmax_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "focal_tiles.h"
#include "for_each_target.h"

namespace veerloss {
namespace {

constexpr const char* expected_class_alpha = "class_alpha with one value per class, contiguous, in the arithmetic type";

// f(std::bool_constant<gamma is 2>): the default needs no logarithm.
template <class F>
auto with_square(double gamma, const F& f) {
  return gamma == 2.0 ? f(std::true_type{}) : f(std::false_type{});
}

// What one tile adds to the loss, and to the number of valid elements.
struct Partial {
  double sum = 0;
  int64_t valid = 0;
};

// From the tiles' sums to the loss (unless it holds one value per element), and the factor that the sum was multiplied with:
// 1 / valid for "mean", else factor or factor / normalizer.
template <class T>
std::tuple<Tensor, Tensor> finish(const Tensor& logits, Tensor loss, const std::vector<Partial>& partials, Reduction reduction,
                                  double factor, const std::optional<Tensor>& normalizer) {
  Partial all;
  for (const Partial& p : partials) {
    all.sum += p.sum;
    all.valid += p.valid;
  }
  double scale = normalizer ? factor / read_scalar(*normalizer) : factor;
  if (reduction == Reduction::mean) scale = all.valid > 0 ? 1.0 / static_cast<double>(all.valid) : 0.0;
  // Nothing valid: 0, and not 0 times what the caller divides by.
  if (reduction != Reduction::none) write_element(loss, 0, all.valid > 0 ? all.sum * scale : 0.0);
  Tensor scale_tensor = torch::stable::new_empty(logits, {}, scalar_type_of<T>());
  write_element(scale_tensor, 0, scale);
  return {loss, scale_tensor};
}

// The gradient that reaches each element: one number for a reduced loss, rows of grad for reduction "none".
template <class T>
class IncomingGradient {
 public:
  // `channels`: the loss has a value for each element of [N, C, P], else of [N, P].
  IncomingGradient(const Tensor& grad, const Tensor& scale, const Tensor& logits, bool channels, Reduction reduction)
      : per_element_(reduction == Reduction::none), view_{}, scaled_(0) {
    if (per_element_) check_like(grad, logits, channels, "a gradient of the shape of the loss");
    if (per_element_)
      view_ = view_of(grad);
    else
      scaled_ = static_cast<T>(read_scalar(grad) * read_scalar(scale));
  }

  bool per_element() const { return per_element_; }
  T scaled() const { return scaled_; }

  void load(T* out, const Geometry& g, int64_t channel, Run run) const {
    if (per_element_)
      load_row(out, view_, g, channel, run);
    else
      std::fill_n(out, run.count, scaled_);
  }

 private:
  bool per_element_;
  View view_;
  T scaled_;
};

// f(k, run) for tile k of the flattened pixels; `make_rows` gives each thread its buffers.
template <class MakeRows, class F>
void for_each_tile(const Geometry& g, int64_t tile, const MakeRows& make_rows, const F& f) {
  const int64_t pixels = g.images * g.pixels;
  parallel_for((pixels + tile - 1) / tile, [&](int64_t begin, int64_t end) {
    auto rows = make_rows();
    for (int64_t k = begin; k < end; ++k) f(k, Run{k * tile, std::min(tile, pixels - k * tile)}, rows);
  });
}

int64_t tile_count(const Geometry& g, int64_t tile) {
  return (g.images * g.pixels + tile - 1) / tile;
}

// ---- sigmoid

template <class T>
struct SigmoidRows {
  explicit SigmoidRows(int64_t tile) : label(tile), stored(tile), storage(5 * tile) {
    T* next = storage.data();
    for (T** row : {&x_row, &t_row, &weight, &grad, &out}) {
      *row = next;
      next += tile;
    }
  }
  bool plain = false;  // as FocalTiles has it
  int64_t valid = 0;
  const T *x = nullptr, *t = nullptr;  // x_row and t_row, or the tensors themselves
  std::vector<int32_t> label;
  std::vector<double> stored;  // a dense target before it is rounded to T, to tell what is ignored
  T *x_row, *t_row, *weight, *grad, *out;

 private:
  std::vector<T> storage;
};

template <class T>
class SigmoidFocal {
 public:
  SigmoidFocal(const Tensor& logits, const Tensor& target, std::optional<double> alpha,
               const std::optional<Tensor>& class_alpha, double gamma, const std::optional<Tensor>& weight,
               std::optional<int64_t> ignore_index)
      : g(geometry_of(logits)),
        tile(tile_length(8, sizeof(T), g.images * g.pixels)),
        logits_(view_of(logits)),
        target_(view_of(target)),
        weight_(weight ? view_of(*weight) : View{}),
        has_weight_(weight.has_value()),
        one_hot_(target.dim() == 2),
        rule_{one_hot_ ? g.channels : 1, ignore_index.has_value(), ignore_index.value_or(0)},
        gamma_(static_cast<T>(gamma)),
        alpha_(alpha),
        class_alpha_(class_alpha ? arithmetic_data<T>(*class_alpha, g.channels, expected_class_alpha) : nullptr) {
    check_like(target, logits, !one_hot_, "a target [N, C, P] or [N, P] for logits [N, C, P]");
    if (weight) check_like(*weight, logits, true, "a weight [N, C, P] for logits [N, C, P]");
  }

  const Geometry g;
  const int64_t tile;

  SigmoidParams<T> params(int64_t channel) const {
    if (!class_alpha_ && !alpha_) return {T(1), T(1), gamma_};
    const double alpha = class_alpha_ ? static_cast<double>(class_alpha_[channel]) : *alpha_;
    return {static_cast<T>(alpha), static_cast<T>(1.0 - alpha), gamma_};
  }

  // Before the channels of a tile: its labels, if the target has labels.
  void begin_tile(Run run, SigmoidRows<T>& r) {
    r.plain = !has_weight_ && (one_hot_ || !rule_.has_ignore);
    if (!one_hot_) return;
    load_labels(r.label.data(), target_, g, rule_, run, bad_);
    r.valid = VEERLOSS_DISPATCH(FocalTiles::count_valid(r.label.data(), run.count));
    r.plain = r.plain && r.valid == run.count;
  }

  // r.x, r.t and, unless plain, r.weight of one channel; r.valid counts its valid elements.
  void load_channel(int64_t c, Run run, SigmoidRows<T>& r) {
    const T* x = row_in_place<T>(logits_, g, c, run);
    const T* t = one_hot_ ? nullptr : row_in_place<T>(target_, g, c, run);
    if (!r.plain || !x) load_row(r.x_row, logits_, g, c, run);
    if (one_hot_)
      VEERLOSS_DISPATCH(FocalTiles::one_hot(r.t_row, r.label.data(), run.count, static_cast<int32_t>(c)));
    else if (!r.plain || !t)
      load_row(r.t_row, target_, g, c, run);
    r.x = r.plain && x ? x : r.x_row;
    r.t = r.plain && t ? t : r.t_row;
    if (!r.plain) load_weight(c, run, r);
    if (one_hot_) return;
    if (r.plain || !rule_.has_ignore) r.valid = run.count;
    if (VEERLOSS_DISPATCH(FocalTiles::in_unit_range(r.t, run.count))) return;
    for (int64_t i = 0; i < run.count; ++i)
      if (r.t[i] < T(0) || r.t[i] > T(1)) return bad_.at(c, run.first + i, g.channels);
  }

  void raise_if_bad() const {
    if (one_hot_) return bad_.raise_if_any(target_, g, expected_labels(rule_));
    std::string text = "values in [0, 1]";
    if (rule_.has_ignore) text += " or ignore_index=" + std::to_string(rule_.ignore);
    bad_.raise_if_any(target_, g, text, g.channels);
  }

 private:
  void load_weight(int64_t c, Run run, SigmoidRows<T>& r) {
    if (has_weight_)
      load_row(r.weight, weight_, g, c, run);
    else
      std::fill_n(r.weight, run.count, T(1));
    if (one_hot_)
      VEERLOSS_DISPATCH(FocalTiles::mask_labels(r.weight, r.x_row, r.label.data(), run.count));
    else if (rule_.has_ignore) {
      load_row(r.stored.data(), target_, g, c, run);
      r.valid = VEERLOSS_DISPATCH(
          FocalTiles::mask_dense(r.t_row, r.weight, r.x_row, run.count, r.stored.data(), static_cast<double>(rule_.ignore)));
    }
  }

  View logits_, target_, weight_;
  bool has_weight_, one_hot_;
  TargetRule rule_;
  T gamma_;
  std::optional<double> alpha_;
  const T* class_alpha_;
  BadTarget bad_;
};

std::tuple<Tensor, Tensor> sigmoid_focal_forward(const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                                                 std::optional<int64_t> ignore_index, int64_t reduction_, double factor,
                                                 std::optional<Tensor> normalizer, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const auto reduction = static_cast<Reduction>(reduction_);
    SigmoidFocal<T> in(logits, target, alpha, class_alpha, gamma, weight, ignore_index);
    const bool none = reduction == Reduction::none;
    Tensor loss = none && !wide ? torch::stable::empty_like(logits)
                  : none        ? torch::stable::new_empty(logits, logits.sizes(), scalar_type_of<T>())
                                : torch::stable::new_empty(logits, {}, loss_type<T>(logits, wide));
    if (none) with_huge_pages(loss);
    const View out = none ? view_of(loss) : View{};
    std::vector<Partial> partials(tile_count(in.g, in.tile));
    with_square(gamma, [&](auto square) {
      for_each_tile(
          in.g, in.tile, [&] { return SigmoidRows<T>(in.tile); },
          [&](int64_t k, Run run, SigmoidRows<T>& r) {
            in.begin_tile(run, r);
            for (int64_t c = 0; c < in.g.channels; ++c) {
              constexpr bool sq = decltype(square)::value;
              in.load_channel(c, run, r);
              partials[k].valid += r.valid;
              const auto p = in.params(c);
              partials[k].sum +=
                  r.plain
                      ? VEERLOSS_DISPATCH(FocalTiles::sigmoid_forward<T, sq, true>(r.x, r.t, r.weight, run.count, p, r.out))
                      : VEERLOSS_DISPATCH(FocalTiles::sigmoid_forward<T, sq, false>(r.x, r.t, r.weight, run.count, p, r.out));
              if (none) store_row(r.out, out, in.g, c, run);
            }
          });
    });
    in.raise_if_bad();
    return finish<T>(logits, loss, partials, reduction, factor, normalizer);
  });
}

Tensor sigmoid_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, std::optional<double> alpha,
                              std::optional<Tensor> class_alpha, double gamma, std::optional<Tensor> weight,
                              std::optional<int64_t> ignore_index, int64_t reduction, const Tensor& scale) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    SigmoidFocal<T> in(logits, target, alpha, class_alpha, gamma, weight, ignore_index);
    const IncomingGradient<T> incoming(grad, scale, logits, true, static_cast<Reduction>(reduction));
    Tensor grad_logits = with_huge_pages(torch::stable::empty_like(logits));
    const View out = view_of(grad_logits);
    with_square(gamma, [&](auto square) {
      for_each_tile(
          in.g, in.tile, [&] { return SigmoidRows<T>(in.tile); },
          [&](int64_t, Run run, SigmoidRows<T>& r) {
            in.begin_tile(run, r);
            r.plain = r.plain && !incoming.per_element();
            for (int64_t c = 0; c < in.g.channels; ++c) {
              constexpr bool sq = decltype(square)::value;
              in.load_channel(c, run, r);
              T* const in_place = row_in_place<T>(out, in.g, c, run);
              T* const result = in_place ? in_place : r.out;
              const auto p = in.params(c);
              if (r.plain) {
                VEERLOSS_DISPATCH(FocalTiles::sigmoid_backward<T, sq, true>(r.x, r.t, r.weight, r.grad, incoming.scaled(),
                                                                            run.count, p, result));
              } else {
                incoming.load(r.grad, in.g, c, run);
                VEERLOSS_DISPATCH(
                    FocalTiles::sigmoid_backward<T, sq, false>(r.x, r.t, r.weight, r.grad, T(0), run.count, p, result));
              }
              if (!in_place) store_row(r.out, out, in.g, c, run);
            }
          });
    });
    in.raise_if_bad();
    return grad_logits;
  });
}

// ---- softmax

template <class T>
struct SoftmaxTile {
  SoftmaxTile(int64_t tile, int64_t classes, bool smoothing)
      : label(tile), storage(tile * (classes * (smoothing ? 3 : 1) + 10)) {
    x = storage.data();
    logits = smoothing ? x + tile * classes : nullptr;
    slope = smoothing ? logits + tile * classes : nullptr;
    T* next = storage.data() + tile * classes * (smoothing ? 3 : 1);
    for (T** row : {&rows.maximum, &rows.rest, &rows.log_p, &rows.q, &rows.inverse_sum, &alpha, &loss, &top, &low, &grad}) {
      *row = next;
      next += tile;
    }
  }
  int64_t valid = 0;
  std::vector<int32_t> label;
  T *x, *logits, *slope;  // [classes][tile]; the last two with label smoothing only
  SoftmaxRows<T> rows;
  T *alpha, *loss, *top, *low, *grad;  // [tile]

 private:
  std::vector<T> storage;
};

template <class T>
class SoftmaxFocal {
 public:
  SoftmaxFocal(const Tensor& logits, const Tensor& target, double alpha, const std::optional<Tensor>& class_alpha, double gamma,
               double smoothing, std::optional<int64_t> ignore_index)
      : g(geometry_of(logits)),
        tile(tile_length(g.channels * (smoothing > 0 ? 3 : 1), sizeof(T), g.images * g.pixels)),
        logits_(view_of(logits)),
        target_(view_of(target)),
        rule_{g.channels, ignore_index.has_value(), ignore_index.value_or(0)},
        gamma_(static_cast<T>(gamma)),
        smoothing_(static_cast<T>(smoothing)),
        one_alpha_(static_cast<T>(alpha)),
        alpha_(class_alpha ? arithmetic_data<T>(*class_alpha, g.channels, expected_class_alpha) : &one_alpha_),
        alpha_step_(class_alpha ? 1 : 0) {
    check_like(target, logits, false, "a target [N, P] for logits [N, C, P]");
  }

  const Geometry g;
  const int64_t tile;

  SoftmaxTile<T> make_tile() const { return SoftmaxTile<T>(tile, g.channels, smoothing_ > T(0)); }

  // Loads a tile and takes its softmax; t.loss and t.valid are filled. Returns the tile's sum.
  template <bool square>
  double forward(Run run, SoftmaxTile<T>& t) {
    const int64_t n = run.count;
    const int32_t* label = t.label.data();
    load_labels(t.label.data(), target_, g, rule_, run, bad_);
    t.valid = VEERLOSS_DISPATCH(FocalTiles::count_valid(label, n));
    for (int64_t c = 0; c < g.channels; ++c) load_row(t.x + c * tile, logits_, g, c, run);
    if (t.valid < n) VEERLOSS_DISPATCH(FocalTiles::clear_ignored(t.x, g.channels, tile, label, n));
    VEERLOSS_DISPATCH(SoftmaxTiles::maximum(t.x, g.channels, tile, n, t.rows.maximum));
    if (smoothing_ > T(0)) return forward_smooth<square>(run, t);
    VEERLOSS_DISPATCH(FocalTiles::difference(t.x, tile, n, label, t.rows.maximum, t.rows.log_p));
    VEERLOSS_DISPATCH(
        SoftmaxTiles::exponentials(t.x, tile, t.x, g.channels, tile, n, t.rows.maximum, t.rows.rest, t.rows.inverse_sum));
    VEERLOSS_DISPATCH(FocalTiles::log_probability(n, label, t.rows));
    VEERLOSS_DISPATCH(FocalTiles::gather_alpha(t.alpha, alpha_, alpha_step_, label, n));
    return VEERLOSS_DISPATCH(FocalTiles::softmax_forward<T, square>(t.rows.log_p, t.rows.q, t.alpha, n, gamma_, t.loss));
  }

  // After forward: the gradient of the logits, from t.grad, that of each pixel's loss.
  template <bool square>
  void backward(Run run, SoftmaxTile<T>& t, const View& out) const {
    const int64_t n = run.count;
    const int32_t* label = t.label.data();
    T* const in_place = row_in_place<T>(out, g, 0, run);
    T* const result = in_place ? in_place : t.x;
    const int64_t stride = in_place ? out.stride_channel : tile;
    if (smoothing_ > T(0)) {
      for (int64_t c = 0; c < g.channels; ++c)
        VEERLOSS_DISPATCH(FocalTiles::smooth_backward(t.x + c * tile, t.slope + c * tile, t.top, t.low, t.rows, label, n,
                                                      t.grad, result + c * stride));
    } else {
      VEERLOSS_DISPATCH(FocalTiles::log_probability_backward<T, square>(t.rows.log_p, t.rows.q, t.alpha, n, gamma_, t.grad));
      for (int64_t c = 0; c < g.channels; ++c)
        VEERLOSS_DISPATCH(FocalTiles::other_gradient(t.x + c * tile, t.rows.inverse_sum, t.grad, n, result + c * stride));
      VEERLOSS_DISPATCH(FocalTiles::own_gradient(label, t.grad, t.rows.q, n, result, stride));
    }
    if (!in_place)
      for (int64_t c = 0; c < g.channels; ++c) store_row(t.x + c * tile, out, g, c, run);
  }

  void raise_if_bad() const { bad_.raise_if_any(target_, g, expected_labels(rule_)); }

 private:
  template <bool square>
  double forward_smooth(Run run, SoftmaxTile<T>& t) const {  // after SoftmaxTiles::maximum
    const int64_t n = run.count;
    const int32_t* label = t.label.data();
    std::copy_n(t.x, g.channels * tile, t.logits);
    std::fill_n(t.loss, n, T(0));
    std::fill_n(t.top, n, T(0));
    std::fill_n(t.low, n, T(0));
    VEERLOSS_DISPATCH(
        SoftmaxTiles::exponentials(t.x, tile, t.x, g.channels, tile, n, t.rows.maximum, t.rows.rest, t.rows.inverse_sum));
    VEERLOSS_DISPATCH(FocalTiles::log_sum(t.rows.rest, n, t.rows.log_p));
    const T share = smoothing_ / static_cast<T>(g.channels);
    for (int64_t c = 0; c < g.channels; ++c) {
      const int64_t row = c * tile;
      VEERLOSS_DISPATCH(FocalTiles::smooth_terms<T, square>(t.x + row, t.logits + row, n, label, static_cast<int32_t>(c), share,
                                                            smoothing_, alpha_[c * alpha_step_], gamma_, t.rows, t.loss,
                                                            t.slope + row, t.top, t.low));
    }
    VEERLOSS_DISPATCH(FocalTiles::keep_valid(t.loss, label, n));
    return VEERLOSS_DISPATCH(FocalTiles::sum(t.loss, n));
  }

  View logits_, target_;
  TargetRule rule_;
  T gamma_, smoothing_, one_alpha_;
  const T* alpha_;
  int64_t alpha_step_;
  BadTarget bad_;
};

std::tuple<Tensor, Tensor> softmax_focal_forward(const Tensor& logits, const Tensor& target, double alpha,
                                                 std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                                                 std::optional<int64_t> ignore_index, int64_t reduction_, double factor,
                                                 std::optional<Tensor> normalizer, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const auto reduction = static_cast<Reduction>(reduction_);
    SoftmaxFocal<T> in(logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index);
    const bool none = reduction == Reduction::none;
    Tensor loss = none ? torch::stable::new_empty(logits, {logits.size(0), logits.size(2)}, loss_type<T>(logits, wide))
                       : torch::stable::new_empty(logits, {}, loss_type<T>(logits, wide));
    const View out = none ? view_of(loss) : View{};
    std::vector<Partial> partials(tile_count(in.g, in.tile));
    with_square(gamma, [&](auto square) {
      for_each_tile(
          in.g, in.tile, [&] { return in.make_tile(); },
          [&](int64_t k, Run run, SoftmaxTile<T>& t) {
            partials[k] = {in.template forward<decltype(square)::value>(run, t), t.valid};
            if (none) store_row(t.loss, out, in.g, 0, run);
          });
    });
    in.raise_if_bad();
    return finish<T>(logits, loss, partials, reduction, factor, normalizer);
  });
}

Tensor softmax_focal_backward(const Tensor& grad, const Tensor& logits, const Tensor& target, double alpha,
                              std::optional<Tensor> class_alpha, double gamma, double label_smoothing,
                              std::optional<int64_t> ignore_index, int64_t reduction, const Tensor& scale) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    SoftmaxFocal<T> in(logits, target, alpha, class_alpha, gamma, label_smoothing, ignore_index);
    const IncomingGradient<T> incoming(grad, scale, logits, false, static_cast<Reduction>(reduction));
    Tensor grad_logits = with_huge_pages(torch::stable::empty_like(logits));
    const View out = view_of(grad_logits);
    with_square(gamma, [&](auto square) {
      for_each_tile(
          in.g, in.tile, [&] { return in.make_tile(); },
          [&](int64_t, Run run, SoftmaxTile<T>& t) {
            in.template forward<decltype(square)::value>(run, t);
            incoming.load(t.grad, in.g, 0, run);
            in.template backward<decltype(square)::value>(run, t, out);
          });
    });
    in.raise_if_bad();
    return grad_logits;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(veerloss, CPU, m) {
  m.impl("sigmoid_focal_forward", TORCH_BOX(&sigmoid_focal_forward));
  m.impl("sigmoid_focal_backward", TORCH_BOX(&sigmoid_focal_backward));
  m.impl("softmax_focal_forward", TORCH_BOX(&softmax_focal_forward));
  m.impl("softmax_focal_backward", TORCH_BOX(&softmax_focal_backward));
}

}  // namespace veerloss
