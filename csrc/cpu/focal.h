// What the two focal losses share on the CPU. Forward reads logits and target once; backward reads them again and writes the
// gradient; nothing is kept between the two. Every tile's sum is float64, and tiles are added in order, so the loss has the
// same bits for any number of threads.
#pragma once

#include <utility>
#include <vector>

#include "../kernels.h"
#include "../math/focal.h"
#include "parallel.h"
#include "simd/vecmath.h"
#include "targets.h"

namespace veerloss {

// Parameters of the binary loss.
template <class T>
struct SigmoidParams {
  T alpha_positive, alpha_negative, gamma;
};

// Per-pixel rows of a softmax tile, each [n]; see FocalTiles.
template <class T>
struct SoftmaxRows {
  T *max_logit, *max_count, *sumexp_excl_max, *inv_sumexp;
  T *label_logit, *log_p, *q;  // of the label: its logit - max_logit, log p, and 1 - p
};

// The target of a class, [n], of a softmax tile: from labels, or class probabilities.
template <class T>
struct OneHotRow {
  const int32_t* label;
  int32_t c;
  VEERLOSS_HD T operator()(int64_t i) const { return label[i] == c ? T(1) : T(0); }
};
template <class T>
struct ProbabilityRow {
  const T* values;
  VEERLOSS_HD T operator()(int64_t i) const { return values[i]; }
};

}  // namespace veerloss

#define VEERLOSS_TILES "focal_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

// What one tile adds to the loss, and to the number of valid elements.
struct FocalPartial {
  double sum = 0;
  int64_t valid = 0;
};

// Of the logits of a tile, [channels][tile], each times a factor of its pixel, [tile], unless that is null.
template <class T>
struct TileGradient {
  const T *rows, *factor;
};

// From the tiles' sums to the loss (unless it has one value per element) and its scale.
inline void store_focal_loss(const FocalLoss& out, const std::vector<FocalPartial>& partials) {
  FocalPartial all;
  for (const FocalPartial& p : partials) {
    all.sum += p.sum;
    all.valid += p.valid;
  }
  double scale = out.normalizer.data ? out.factor / load_element<double>(out.normalizer, 0) : out.factor;
  if (out.reduction == Reduction::mean) scale = 1.0 / static_cast<double>(all.valid);
  if (all.valid == 0) scale = 0.0;  // then loss and gradient are 0, even where the normaliser is 0
  if (out.reduction != Reduction::none) store_element(out.loss, 0, all.sum * scale);
  store_element(out.scale, 0, scale);
}

// The gradient of the loss of each element: one number for a reduced loss, rows of `grad` without reduction.
template <class T>
class IncomingGradient {
 public:
  explicit IncomingGradient(const FocalGradient& g)
      : per_element_(g.reduction == Reduction::none),
        view_(g.grad),
        scaled_(per_element_ ? T(0) : static_cast<T>(load_element<double>(g.grad, 0) * load_element<double>(g.scale, 0))) {}

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

// A `Focal` has the input of a loss in the opmath type, and computes one tile:
//
//   Focal(input)                     with members `g` (Geometry) and `tile` (pixels of a tile)
//   rows()                           the buffers of a thread
//   forward<square>(run, rows, out)  the FocalPartial of a run; without reduction it stores the losses
//   backward<square>(run, rows, incoming, grad_logits)
//   raise_if_bad()                   raises if a target was out of range
//
// and of logits of low resolution (focal_low.cpp), where load(out, stride, largest) puts those of all classes into rows, and of
// each pixel the largest unless that is null:
//
//   forward_low<square>(run, rows, load, out, gradient)   the same; *gradient, if not null, is that of the sum of the losses
//   backward_low<square>(run, rows, load, incoming)       a TileGradient
//
// `square`: gamma is 2, the default, which needs no logarithm.
template <class Focal, class F>
void for_each_focal_tile(Focal& focal, double gamma, const F& f) {
  const int64_t pixels = focal.g.images * focal.g.pixels, tile = focal.tile;
  parallel_for((pixels + tile - 1) / tile, [&](int64_t begin, int64_t end) {
    auto rows = focal.rows();
    for (int64_t k = begin; k < end; ++k) {
      const Run run{k * tile, std::min(tile, pixels - k * tile)};
      if (gamma == 2.0)
        f(k, run, rows, std::true_type{});
      else
        f(k, run, rows, std::false_type{});
    }
  });
  focal.raise_if_bad();
}

// Backward of the losses of logits of low resolution, as kernels::upsampled_focal_forward.
void upsampled_focal_backward(const SigmoidFocalInput& input, const FocalGradient& out);
void upsampled_focal_backward(const SoftmaxFocalInput& input, const FocalGradient& out);

template <template <class T> class Focal, class Input>
void focal_forward(const Input& input, const FocalLoss& out) {
  with_opmath_type(input.logits.dtype, [&](auto zero) {
    Focal<decltype(zero)> focal(input);
    std::vector<FocalPartial> partials((focal.g.images * focal.g.pixels + focal.tile - 1) / focal.tile);
    for_each_focal_tile(focal, input.gamma, [&](int64_t k, Run run, auto& rows, auto square) {
      partials[k] = focal.template forward<decltype(square)::value>(run, rows, out);
    });
    store_focal_loss(out, partials);
  });
}

template <template <class T> class Focal, class Input>
void focal_backward(const Input& input, const FocalGradient& out) {
  with_opmath_type(input.logits.dtype, [&](auto zero) {
    Focal<decltype(zero)> focal(input);
    const IncomingGradient<decltype(zero)> incoming(out);
    for_each_focal_tile(focal, input.gamma, [&](int64_t, Run run, auto& rows, auto square) {
      focal.template backward<decltype(square)::value>(run, rows, incoming, out.grad_logits);
    });
  });
}

}  // namespace veerloss
