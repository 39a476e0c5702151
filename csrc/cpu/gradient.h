// The one backward pass of the losses whose gradient is a weight per pixel and class: it takes the signed weights of the errors
// to the gradient of the logits or probabilities.
#pragma once

#include "../math/jaccard.h"
#include "terms.h"

#define VEERLOSS_TILES "gradient_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

inline View gradient_view(const SegmentGradient& out) {
  return {static_cast<char*>(const_cast<void*>(out.grad)), out.grad_dtype, 0, 0, 1};
}

// d loss / d (loss of a segment), [segments].
template <class T>
std::vector<T> segment_factors(const SegmentBatch& b, const SegmentGradient& out) {
  const View grad = gradient_view(out);
  std::vector<T> factor(b.segments());
  for (int64_t i = 0; i < b.segments(); ++i)
    factor[i] = static_cast<const T*>(out.scale)[i] * load_element<T>(grad, out.reduction == Reduction::none ? i : 0);
  return factor;
}

// `Weights` computes the signed weights dL/dp of one class of a tile, times a factor:
//
//   void operator()(const TileRows<T>& rows, const Tile& tile, int64_t c, T factor, T* grad);
//   static constexpr bool by_error;  // whether it reads the labels and values of `rows`, or `tile` alone
//   static constexpr bool of_errors;  // dL/d error, of which a probability on the wrong side of its target needs the sign
//   static bool makes_exponentials(const SegmentBatch&);  // whether class 0 of a tile makes those of `rows`
//
// Every thread works on a copy of `weights`, which has a buffer of `capacity` elements at most, those of the largest tile.
// Pixels of no tile do not count, and get 0.
template <class T, class Weights>
void segment_gradient(const SegmentBatch& b, const SegmentGradient& out, const SegmentTiles& tiles, int64_t capacity,
                      const Weights& weights, const TermGradients& terms = {}) {
  const Geometry& g = b.geometry;
  const bool softmax = b.errors == Errors::softmax;
  const bool probabilities = Weights::of_errors && b.errors == Errors::probabilities;
  const std::vector<T> factors = segment_factors<T>(b, out);
  const bool by_label = Weights::by_error || terms.any();
  const double grad_of_loss = terms.any() ? load_element<double>(gradient_view(out), 0) : 0.0;
  BadTarget bad;  // the forward pass has raised it
  const std::optional<LowLogits<T>> low_logits = low_logits_of<T>(b);
  std::optional<LowGradient<T>> low_gradient;
  if (b.upsample) low_gradient.emplace(*b.upsample, out.grad_logits);
  parallel_for(b.upsample ? tiles.parts() : tiles.count(), [&](int64_t begin, int64_t end) {
    TileRows<T> t(g.channels, capacity, true, by_label, low_logits);
    std::optional<UpsampledGradient<T>> low;
    if (b.upsample) low.emplace(*low_gradient);
    Weights weigh(weights);
    TermGradient<T> added(b, terms, grad_of_loss, capacity);
    FocalOfTile<T>* const focal = added.focal();
    const bool hard = focal && !focal->soft();
    const auto differentiate = [&](const Tile& tile) {
      const int64_t n = tile.loaded();
      if (tile.sparse()) clear_run(out.grad_logits, g, tile.span);
      if (tile.size == 0) return;
      if (by_label || tile.size < tile.span.count) tiles.load_labels_of(b, tile, t, bad);
      if (by_label || b.errors != Errors::hinge) load_tile(b, tile, capacity, t, !Weights::makes_exponentials(b));
      if (tile.sparse()) pixel_offsets(t.offset.data(), out.grad_logits, g, tile.span.first, t.index.data(), n);
      const bool few = softmax && g.channels <= most_few;
      if (softmax && !few) VEERLOSS_DISPATCH(GradientTiles::begin(n, t.pivot, t.others, t.has_weight.data()));
      for (int64_t c = 0; c < g.channels; ++c) {
        T* const grad = t.grad + c * capacity;
        const T factor = factors[tile.row * g.channels + c];
        weigh(t, tile, c, probabilities ? T(1) : factor, grad);
        if (probabilities) {
          VEERLOSS_DISPATCH(
              GradientTiles::sign_outside(t.values + c * capacity, grad, n));  // needs the sign of the weight alone
          VEERLOSS_DISPATCH(GradientTiles::scale(grad, n, factor));
        }
        added.add_region(t, tile, c, grad);
        if (!softmax || few) continue;
        if (c > 0 && c % classes_per_sum == 0) VEERLOSS_DISPATCH(SoftmaxTiles::end_part(t.others, t.total.data(), n, c));
        VEERLOSS_DISPATCH(GradientTiles::accumulate(t.exps + c * capacity, grad, n, t.pivot, t.others, t.has_weight.data()));
      }
      if (focal) {
        if (softmax && !Weights::makes_exponentials(b)) find_label_logit(t, n);
        focal->differentiate(t, n, added.focal_factor());
      }
      T* const in_place = softmax && !tile.sparse() && !low ? row_in_place<T>(out.grad_logits, g, 0, tile.span) : nullptr;
      T* const to = in_place ? in_place : t.grad;
      const int64_t stride = in_place ? out.grad_logits.stride_channel : capacity;
      const int32_t* const label = t.label.data();
      if (few) {
        with_few(g.channels, [&](auto classes) {
          constexpr int count = decltype(classes)::value;
          if (hard)
            VEERLOSS_DISPATCH(GradientTiles::few<count, true>(t.exps, t.grad, capacity, n, t.sumexp_excl_max, label,
                                                              focal->slope(), focal->q(), to, stride));
          else
            VEERLOSS_DISPATCH(GradientTiles::few<count, false, T>(t.exps, t.grad, capacity, n, t.sumexp_excl_max, nullptr,
                                                                  nullptr, nullptr, to, stride));
        });
      } else if (softmax) {
        if (g.channels > classes_per_sum) VEERLOSS_DISPATCH(SoftmaxTiles::end_sum(t.others, t.total.data(), n));
        VEERLOSS_DISPATCH(GradientTiles::end(n, t.sumexp_excl_max, t.inv_sumexp, t.pivot, t.others));
        if (hard) {
          VEERLOSS_DISPATCH(GradientTiles::label_gradient(t.exps, t.grad, capacity, n, label, t.inv_sumexp, t.pivot, t.others,
                                                          t.has_weight.data(), focal->slope(), focal->q(), added.row()));
          VEERLOSS_DISPATCH(GradientTiles::add_focal(focal->slope(), n, t.others, t.has_weight.data()));
        }
        for (int64_t c = 0; c < g.channels; ++c)
          VEERLOSS_DISPATCH(GradientTiles::softmax(t.exps + c * capacity, t.grad + c * capacity, n, t.inv_sumexp, t.pivot,
                                                   t.others, t.has_weight.data(), to + c * stride));
        if (hard) VEERLOSS_DISPATCH(GradientTiles::put_label(label, added.row(), n, to, stride));
      } else if (focal) {
        VEERLOSS_DISPATCH(GradientTiles::add_row(focal->slope(), n, t.grad));
      }
      for (int64_t c = 0; c < g.channels; ++c) {
        if (softmax && focal && focal->soft()) focal->add_soft(t, n, c, to + c * stride);
        if (in_place || low) continue;
        if (tile.sparse())
          scatter_row(t.grad + c * capacity, out.grad_logits, c, t.offset.data(), n);
        else
          store_row(t.grad + c * capacity, out.grad_logits, g, c, tile.span);
      }
      if (low) low->add(tile.span.first / g.pixels, tile.span.first % g.pixels, n, t.grad, capacity);
    };
    for (int64_t k = begin; k < end; ++k) {
      if (!low) {
        differentiate(tiles[k]);
        continue;
      }
      low->begin_band(k);
      tiles.for_each_of_part(k, differentiate);
      low->end_band();
    }
  });
  if (low_gradient) low_gradient->store();
}

}  // namespace veerloss
