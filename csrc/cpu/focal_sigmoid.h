// Sigmoid focal loss on the CPU, tile by tile: see Focal in focal.h.
#pragma once

#include "focal.h"

namespace veerloss {

// The buffers of a thread.
template <class T>
struct SigmoidRows {
  // `low_channels`: of logits of low resolution, all at once.
  explicit SigmoidRows(int64_t tile, int64_t low_channels = 0)
      : label(tile), stored(tile), storage((5 + 2 * low_channels) * tile) {
    T* next = storage.data();
    for (T** row : {&logits_buffer, &target_buffer, &weight, &grad, &result}) *row = std::exchange(next, next + tile);
    if (low_channels == 0) return;
    low_logits = std::exchange(next, next + low_channels * tile);
    low_gradient = next;
  }
  bool plain = false;  // see FocalTiles
  int64_t valid = 0;
  const T *logits = nullptr, *target = nullptr;  // of a channel: the buffers below, or the tensors themselves
  std::vector<int32_t> label;
  std::vector<double> stored;  // a dense target before it is rounded to T, to be compared with ignore_index
  T *logits_buffer, *target_buffer, *weight, *grad, *result;
  T *low_logits = nullptr, *low_gradient = nullptr;  // [channels][tile]

 private:
  std::vector<T> storage;
};

template <class T>
class SigmoidFocal {
 public:
  explicit SigmoidFocal(const SigmoidFocalInput& input)
      : g(input.geometry),
        tile(tile_length(8 + (input.upsample ? 2 * g.channels : 0), sizeof(T), g.images * g.pixels)),
        in_(input) {}

  const Geometry g;
  const int64_t tile;

  SigmoidRows<T> rows() const { return SigmoidRows<T>(tile, in_.upsample ? g.channels : 0); }

  template <bool square>
  FocalPartial forward(Run run, SigmoidRows<T>& r, const FocalLoss& out) {
    FocalPartial partial;
    begin_tile(run, r);
    for (int64_t c = 0; c < g.channels; ++c) {
      load_channel(c, run, r);
      const auto p = params(c);
      partial.valid += r.valid;
      partial.sum += r.plain ? VEERLOSS_DISPATCH(FocalTiles::sigmoid_forward<T, square, true>(r.logits, r.target, r.weight,
                                                                                              run.count, p, r.result))
                             : VEERLOSS_DISPATCH(FocalTiles::sigmoid_forward<T, square, false>(r.logits, r.target, r.weight,
                                                                                               run.count, p, r.result));
      if (out.reduction == Reduction::none) store_row(r.result, out.loss, g, c, run);
    }
    return partial;
  }

  template <bool square, class Load>
  FocalPartial forward_low(Run run, SigmoidRows<T>& r, const Load& load, const FocalLoss& out, TileGradient<T>* gradient) {
    load(r.low_logits, tile, nullptr);
    if (!gradient) return forward<square>(run, r, out);
    FocalPartial partial;
    begin_tile(run, r);
    for (int64_t c = 0; c < g.channels; ++c) {
      load_channel(c, run, r);
      const auto p = params(c);
      T* const slope = r.low_gradient + c * tile;
      partial.valid += r.valid;
      partial.sum += r.plain ? VEERLOSS_DISPATCH(FocalTiles::sigmoid_both<T, square, true>(r.logits, r.target, r.weight,
                                                                                           run.count, p, r.result, slope))
                             : VEERLOSS_DISPATCH(FocalTiles::sigmoid_both<T, square, false>(r.logits, r.target, r.weight,
                                                                                            run.count, p, r.result, slope));
    }
    *gradient = {r.low_gradient, nullptr};
    return partial;
  }

  template <bool square>
  void backward(Run run, SigmoidRows<T>& r, const IncomingGradient<T>& incoming, const View& grad_logits) {
    each_gradient<square>(run, r, incoming, [&](int64_t c, const auto& compute) {
      T* const in_place = row_in_place<T>(grad_logits, g, c, run);
      compute(in_place ? in_place : r.result);
      if (!in_place) store_row(r.result, grad_logits, g, c, run);
    });
  }

  template <bool square, class Load>
  TileGradient<T> backward_low(Run run, SigmoidRows<T>& r, const Load& load, const IncomingGradient<T>& incoming) {
    load(r.low_logits, tile, nullptr);
    each_gradient<square>(run, r, incoming, [&](int64_t c, const auto& compute) { compute(r.low_gradient + c * tile); });
    return {r.low_gradient, nullptr};
  }

  void raise_if_bad() const {
    if (in_.class_indices) return bad_.raise_if_any(in_.target, g, expected_labels(in_.rule));
    std::string expected = "values in [0, 1]";
    if (in_.rule.has_ignore) expected += " or ignore_index=" + std::to_string(in_.rule.ignore);
    bad_.raise_if_any(in_.target, g, expected, g.channels);
  }

 private:
  // Calls f(channel, compute), where compute(row) makes the gradient of the channel.
  template <bool square, class F>
  void each_gradient(Run run, SigmoidRows<T>& r, const IncomingGradient<T>& incoming, const F& f) {
    begin_tile(run, r);
    r.plain = r.plain && !incoming.per_element();
    for (int64_t c = 0; c < g.channels; ++c) {
      load_channel(c, run, r);
      f(c, [&](T* result) { gradient_row<square>(c, run, r, incoming, result); });
    }
  }
  template <bool square>
  void gradient_row(int64_t c, Run run, SigmoidRows<T>& r, const IncomingGradient<T>& incoming, T* result) {
    const auto p = params(c);
    if (r.plain) {
      VEERLOSS_DISPATCH(FocalTiles::sigmoid_backward<T, square, true>(r.logits, r.target, r.weight, r.grad, incoming.scaled(),
                                                                      run.count, p, result));
    } else {
      incoming.load(r.grad, g, c, run);
      VEERLOSS_DISPATCH(
          FocalTiles::sigmoid_backward<T, square, false>(r.logits, r.target, r.weight, r.grad, T(0), run.count, p, result));
    }
  }

  SigmoidParams<T> params(int64_t channel) const {
    const auto gamma = static_cast<T>(in_.gamma);
    if (!in_.class_alpha && !in_.alpha) return {T(1), T(1), gamma};
    const double alpha = in_.class_alpha ? static_cast<double>(static_cast<const T*>(in_.class_alpha)[channel]) : *in_.alpha;
    return {static_cast<T>(alpha), static_cast<T>(1.0 - alpha), gamma};
  }

  // Before the channels of a tile: its labels, if the target has class indices.
  void begin_tile(Run run, SigmoidRows<T>& r) {
    r.plain = !in_.weight.data && (in_.class_indices || !in_.rule.has_ignore);
    if (!in_.class_indices) return;
    load_labels(r.label.data(), in_.target, g, in_.rule, run, bad_);
    r.valid = VEERLOSS_DISPATCH(FocalTiles::count_valid(r.label.data(), run.count));
    r.plain = r.plain && r.valid == run.count;
  }

  // Loads r.logits, r.target and, unless plain, r.weight of one channel; r.valid counts its valid elements.
  void load_channel(int64_t c, Run run, SigmoidRows<T>& r) {
    const T* logits = r.low_logits ? nullptr : row_in_place<T>(in_.logits, g, c, run);
    const T* target = in_.class_indices ? nullptr : row_in_place<T>(in_.target, g, c, run);
    if (r.low_logits)
      r.logits_buffer = r.low_logits + c * tile;
    else if (!r.plain || !logits)
      load_row(r.logits_buffer, in_.logits, g, c, run);
    if (in_.class_indices)
      VEERLOSS_DISPATCH(FocalTiles::one_hot(r.target_buffer, r.label.data(), run.count, static_cast<int32_t>(c)));
    else if (!r.plain || !target)
      load_row(r.target_buffer, in_.target, g, c, run);
    r.logits = r.plain && logits ? logits : r.logits_buffer;
    r.target = r.plain && target ? target : r.target_buffer;
    if (!r.plain) load_weight(c, run, r);
    if (in_.class_indices) return;
    if (r.plain || !in_.rule.has_ignore) r.valid = run.count;
    if (VEERLOSS_DISPATCH(FocalTiles::in_unit_range(r.target, run.count))) return;
    for (int64_t i = 0; i < run.count; ++i)
      if (r.target[i] < T(0) || r.target[i] > T(1)) return bad_.at(c, run.first + i, g.channels);
  }

  void load_weight(int64_t c, Run run, SigmoidRows<T>& r) {
    if (in_.weight.data)
      load_row(r.weight, in_.weight, g, c, run);
    else
      std::fill_n(r.weight, run.count, T(1));
    if (in_.class_indices) {
      VEERLOSS_DISPATCH(FocalTiles::mask_labels(r.weight, r.logits_buffer, r.label.data(), run.count));
    } else if (in_.rule.has_ignore) {
      load_row(r.stored.data(), in_.target, g, c, run);
      r.valid = VEERLOSS_DISPATCH(FocalTiles::mask_dense(r.target_buffer, r.weight, r.logits_buffer, run.count, r.stored.data(),
                                                         static_cast<double>(in_.rule.ignore)));
    }
  }

  const SigmoidFocalInput& in_;
  BadTarget bad_;
};

}  // namespace veerloss
