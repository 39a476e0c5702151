// The pixels of the Lovász losses as kernels see them: logits, labels, softmax, errors.
#pragma once

#include "../jaccard.h"
#include "device.cuh"
#include "launch.h"

namespace veerloss {

// What a block works on: part of an image, so that no thread divides by the size of one, and of one channel where `channels`
// are told apart, those of a part side by side. In 32 bits, in which a division is no call.
struct ImagePart {
  int64_t image, part, channel;
};

__device__ inline ImagePart image_part(int64_t parts, int64_t channels = 1) {
  const auto p = static_cast<uint32_t>(parts), c = static_cast<uint32_t>(channels), rest = blockIdx.x / c;
  return {rest / p, rest % p, blockIdx.x % c};
}

// The pixels of a launch with one thread for each: blocks keep to an image, unless images are small, and their pixels in a row.
struct PixelGrid {
  int64_t parts;   // blocks for an image, or for all images where they are in a row
  int64_t blocks;  // for each channel that is told apart
  bool in_a_row;
};

// may_cross: a block may have pixels of several images.
inline PixelGrid pixel_grid(const Batch& b, int64_t pixels, int threads, bool may_cross = true) {
  const int64_t all = b.g.images * pixels;
  if (may_cross && pixels < 4 * threads && all < int64_t{1} << 31)
    return {divide_up(all, threads), divide_up(all, threads), true};
  return {divide_up(pixels, threads), b.g.images * divide_up(pixels, threads), false};
}

struct PixelPlace {
  int64_t image, pixel, channel;  // pixel -1: past the last one
};

__device__ inline PixelPlace pixel_place(const PixelGrid& grid, int64_t images, int64_t pixels, int threads,
                                         int64_t channels = 1) {
  const auto [image, part, channel] = image_part(grid.parts, channels);
  const int64_t i = part * threads + threadIdx.x;
  if (!grid.in_a_row) return {image, i < pixels ? i : -1, channel};
  if (i >= images * pixels) return {0, -1, channel};
  return {static_cast<uint32_t>(i) / static_cast<uint32_t>(pixels), static_cast<uint32_t>(i) % static_cast<uint32_t>(pixels),
          channel};
}

template <class In>
__device__ inline Arithmetic<In> load_logit(const Batch& b, int64_t image, int64_t channel, int64_t pixel) {
  const int64_t at = image * b.x.stride_image + channel * b.x.stride_channel + pixel * b.x.stride_pixel;
  return widen<Arithmetic<In>>(reinterpret_cast<const In*>(b.x.data)[at]);
}

template <class In>
__device__ inline void store_gradient(const View& out, int64_t image, int64_t channel, int64_t pixel, Arithmetic<In> value) {
  const int64_t at = image * out.stride_image + channel * out.stride_channel + pixel * out.stride_pixel;
  reinterpret_cast<In*>(out.data)[at] = rounded<In>(value);
}

__device__ inline int32_t label_of(int64_t value, const TargetRule& rule) {
  if (rule.has_ignore && value == rule.ignore) return label_ignored;
  return value >= 0 && value < rule.classes ? static_cast<int32_t>(value) : label_bad;
}

__device__ inline int32_t label_of(double value, const TargetRule& rule) {
  if (rule.has_ignore && value == static_cast<double>(rule.ignore)) return label_ignored;
  const bool is_class = value >= 0.0 && value < static_cast<double>(rule.classes) && value == floor(value);
  return is_class ? static_cast<int32_t>(value) : label_bad;
}

__device__ inline int32_t load_label(const Batch& b, int64_t image, int64_t pixel) {
  const int64_t at = image * b.y.stride_image + pixel * b.y.stride_pixel;
  const void* data = b.y.data;
  switch (b.y.dtype) {
    case DType::i64: return label_of(static_cast<const int64_t*>(data)[at], b.rule);
    case DType::i32: return label_of(int64_t{static_cast<const int32_t*>(data)[at]}, b.rule);
    case DType::i16: return label_of(int64_t{static_cast<const int16_t*>(data)[at]}, b.rule);
    case DType::i8: return label_of(int64_t{static_cast<const int8_t*>(data)[at]}, b.rule);
    case DType::u8: return label_of(int64_t{static_cast<const uint8_t*>(data)[at]}, b.rule);
    default: return label_of(load_value(data, b.y.dtype, at), b.rule);
  }
}

// ---- softmax of a pixel

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

// exp(x - maximum) of the classes of a pixel, and `rest`, their sum without one of the largest, which is 1 exactly: so 1 - p of
// a most probable class is rest / (1 + rest), where 1 - p would lose its digits. All passes of a loss come to the same bits.
template <class T>
struct alignas(2 * sizeof(T)) Softmax {
  T maximum, rest;

  __device__ T operator()(T x) const { return exponential(x - maximum); }
  __device__ T inverse_sum() const { return T(1) / rounded_sum(T(1), rest); }

  // The sum, one exponential at a time; `ones` counts those of the maximum.
  __device__ void add(T e, T& ones) {
    rest = rounded_sum(rest, e == T(1) ? T(0) : e);
    ones += e == T(1) ? T(1) : T(0);
  }
  __device__ void end(T ones) { rest = rounded_sum(rest, ones - T(1)); }
};

// From `x(c)`, called for every class twice: the second time the logits come from registers or the cache. One pass that
// rescales the sum at every new maximum would round more often, and so rank more pixels wrongly.
template <class T, class X>
__device__ inline Softmax<T> softmax_over(int64_t classes, const X& x) {
  Softmax<T> softmax{x(0), T(0)};
  for (int64_t c = 1; c < classes; ++c) {
    const T value = x(c);
    softmax.maximum = value > softmax.maximum ? value : softmax.maximum;
  }
  T ones = T(0);
  for (int64_t c = 0; c < classes; ++c) softmax.add(softmax(x(c)), ones);
  softmax.end(ones);
  return softmax;
}

template <class In>
__device__ inline Softmax<Arithmetic<In>> softmax_of(const Batch& b, int64_t image, int64_t pixel) {
  return softmax_over<Arithmetic<In>>(b.g.channels, [&](int64_t c) { return load_logit<In>(b, image, c, pixel); });
}

}  // namespace veerloss
