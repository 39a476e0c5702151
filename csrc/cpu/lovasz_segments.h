// What the methods "exact" and "histogram" of the Lovász losses share on the CPU: tiles that keep to a segment, and the loss of
// a batch from the losses of its segments.
#pragma once

#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../segments.h"
#include "tensor.h"

namespace veerloss {

// f(row, run, buffers) over tiles that do not cross segments; then `merge` takes each thread's buffers, under a lock.
template <class MakeBuffers, class F, class Merge>
void for_each_tile(const Segments& s, int64_t tile, const MakeBuffers& make_buffers, const F& f, const Merge& merge) {
  const int64_t per_row = (s.length + tile - 1) / tile;
  std::mutex mutex;
  parallel_for(s.rows * per_row, [&](int64_t begin, int64_t end) {
    auto buffers = make_buffers();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k / per_row, start = k % per_row * tile;
      f(row, Run{row * s.length + start, std::min(tile, s.length - start)}, buffers);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    merge(buffers);
  });
}

// The rows of one tile: what a thread works on.
template <class T>
struct TileRows {
  TileRows(int64_t classes, int64_t tile, bool gradient)
      : label(tile), weighted(gradient ? tile : 0), storage(tile * ((gradient ? 2 : 1) * classes + (gradient ? 5 : 3))) {
    T* rows = storage.data();
    const auto take = [&](int64_t count) { return std::exchange(rows, rows + count * tile); };
    x = take(classes);
    maximum = take(1);
    inverse_sum = take(1);
    rest = take(1);
    if (!gradient) return;
    g = take(classes);
    pivot = take(1);
    others = take(1);
  }
  std::vector<int32_t> label, weighted;  // [tile]
  std::vector<T> storage;
  T *x, *g = nullptr;                                                    // [classes][tile]
  T *maximum, *inverse_sum, *rest, *pivot = nullptr, *others = nullptr;  // [tile]
};

// (loss, scale) from the losses of the segments that take part: scale[row, class] is d loss / d (loss of the segment).
template <class T>
std::tuple<Tensor, Tensor> reduce_segments(const Tensor& logits, const Segments& s, const Options& o,
                                           const std::vector<double>& losses, const std::vector<char>& takes_part) {
  Tensor loss = torch::stable::new_empty(logits, o.loss_shape(s), loss_type<T>(logits, o.wide));
  Tensor scale = torch::stable::new_empty(logits, o.scale_shape(s), scalar_type_of<T>());
  const T* class_weight =
      o.class_weight ? arithmetic_data<T>(*o.class_weight, s.classes, "class_weight with one value per class, contiguous")
                     : nullptr;
  double sum = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    const auto in_mean = std::count(&takes_part[row * s.classes], &takes_part[row * s.classes] + s.classes, 1);
    for (int64_t c = 0; c < s.classes; ++c) {
      const int64_t i = row * s.classes + c;
      double factor = takes_part[i] ? (class_weight ? static_cast<double>(class_weight[c]) : 1.0) : 0.0;
      if (o.reduction == Reduction::mean && takes_part[i]) factor /= static_cast<double>(in_mean * s.rows);
      const double value = takes_part[i] ? factor * losses[i] : 0.0;
      sum += value;
      write_element(scale, i, factor);
      if (o.reduction == Reduction::none) write_element(loss, i, value);
    }
  }
  if (o.reduction != Reduction::none) write_element(loss, 0, sum);
  return {loss, scale};
}

// d loss / d (loss of each segment), from the gradient of the loss.
template <class T>
std::vector<T> segment_factors(const Tensor& grad, const Tensor& scale, const Segments& s, Reduction reduction) {
  require(scale.is_contiguous() && scale.numel() == s.count(), "the scale of the forward pass");
  require(grad.numel() == (reduction == Reduction::none ? s.count() : 1), "a gradient of the shape of the loss");
  std::vector<T> factor(s.count());
  load_row(factor.data(), element_view(scale), {1, 1, s.count()}, 0, {0, s.count()});
  const Tensor incoming = torch::stable::contiguous(grad);
  for (int64_t i = 0; i < s.count(); ++i) {
    T value;
    load_row(&value, element_view(incoming), {1, 1, incoming.numel()}, 0, {reduction == Reduction::none ? i : 0, 1});
    factor[i] *= value;
  }
  return factor;
}

}  // namespace veerloss
