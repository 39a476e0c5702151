// The pixels of a batch as kernels see them: which one a thread has, its elements, label and errors.
#pragma once

#include <cmath>

#include "../math/jaccard.h"
#include "device.cuh"
#include "tuning.cuh"

namespace veerloss {

// What a block works on: a part of an image, so that no thread divides by the size of an image. Where `channels` have blocks of
// their own, those of a part are neighbours, which share the labels in L2. The divisions are in 32 bits: in 64 bits each is a
// call.
struct ImagePart {
  int64_t image, part, channel;
};

__device__ inline ImagePart image_part(int64_t parts, int64_t channels = 1, uint32_t block = blockIdx.x) {
  const auto p = static_cast<uint32_t>(parts), c = static_cast<uint32_t>(channels), block_of_channel = block / c;
  return {block_of_channel / p, block_of_channel % p, block % c};
}

// The blocks of a kernel with one thread for each pixel. A block keeps to one image, unless images are small: then the pixels
// of all images are one sequence (`flat`).
struct PixelGrid {
  int64_t parts;   // blocks of an image, or of all images where they are flat
  int64_t blocks;  // in all, for each channel that has its own
  bool flat;
};

// may_flatten: a block may have pixels of several images.
template <int threads>
PixelGrid pixel_grid(int64_t images, int64_t pixels, bool may_flatten = true) {
  const int64_t all = images * pixels;
  if (may_flatten && pixels < Tuning::Pixels::small_image_blocks * threads && all < int64_t{1} << 31)
    return {ceil_div(all, threads), ceil_div(all, threads), true};
  return {ceil_div(pixels, threads), images * ceil_div(pixels, threads), false};
}

struct ThreadPixel {
  int64_t image, pixel, channel;  // pixel -1: the thread has none
};

template <int threads>
__device__ inline ThreadPixel thread_pixel(const PixelGrid& grid, int64_t images, int64_t pixels, int64_t channels = 1,
                                           uint32_t block = blockIdx.x, uint32_t thread = threadIdx.x) {
  const auto [image, part, channel] = image_part(grid.parts, channels, block);
  const int64_t i = part * threads + thread;
  if (!grid.flat) return {image, i < pixels ? i : -1, channel};
  if (i >= images * pixels) return {0, -1, channel};
  return {static_cast<uint32_t>(i) / static_cast<uint32_t>(pixels), static_cast<uint32_t>(i) % static_cast<uint32_t>(pixels),
          channel};
}

__device__ inline int64_t ptr_offset(const View& view, int64_t image, int64_t channel, int64_t pixel) {
  return image * view.stride_image + channel * view.stride_channel + pixel * view.stride_pixel;
}

// An element of a tensor of element type In.
template <class In>
__device__ inline opmath_t<In> load(const View& view, int64_t image, int64_t channel, int64_t pixel) {
  return convert<opmath_t<In>>(reinterpret_cast<const In*>(view.data)[ptr_offset(view, image, channel, pixel)]);
}

template <class In>
__device__ inline void store(const View& view, int64_t image, int64_t channel, int64_t pixel, opmath_t<In> value) {
  reinterpret_cast<In*>(view.data)[ptr_offset(view, image, channel, pixel)] = convert<In>(value);
}

// ---- labels

__device__ inline int32_t label_of(int64_t value, const TargetRule& rule) {
  const int32_t no_class = (rule.has_background & (value == rule.background)) ? label_background : label_bad;
  const bool is_class = static_cast<uint64_t>(value) < static_cast<uint64_t>(rule.classes);
  const int32_t label = is_class ? static_cast<int32_t>(value) : no_class;
  return (rule.has_ignore & (value == rule.ignore)) ? label_ignored : label;
}

__device__ inline int32_t label_of(double value, const TargetRule& rule) {
  if (rule.has_ignore && value == static_cast<double>(rule.ignore)) return label_ignored;
  const bool is_class = value >= 0.0 && value < static_cast<double>(rule.classes) && value == floor(value);
  return is_class ? static_cast<int32_t>(value) : label_bad;
}

// Element i of a tensor of integers.
__device__ inline int64_t load_integer(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::i64: return static_cast<const int64_t*>(data)[i];
    case DType::u8: return static_cast<const uint8_t*>(data)[i];
    case DType::i32: return static_cast<const int32_t*>(data)[i];
    case DType::i16: return static_cast<const int16_t*>(data)[i];
    default: return static_cast<const int8_t*>(data)[i];
  }
}

// From a target [N, P] of integers: less to choose from.
__device__ inline int32_t load_integer_label(const View& target, const TargetRule& rule, int64_t image, int64_t pixel) {
  return label_of(load_integer(target.data, target.dtype, ptr_offset(target, image, 0, pixel)), rule);
}

// From a target [N, P] of any type.
__device__ inline int32_t load_label(const View& target, const TargetRule& rule, int64_t image, int64_t pixel) {
  const int64_t i = ptr_offset(target, image, 0, pixel);
  const void* data = target.data;
  int64_t value;
  // One label_of for all integers: nvcc took ten times as long for one in each case, in loops that unroll over pixels.
  switch (target.dtype) {
    case DType::i64: value = static_cast<const int64_t*>(data)[i]; break;
    case DType::i32: value = static_cast<const int32_t*>(data)[i]; break;
    case DType::i16: value = static_cast<const int16_t*>(data)[i]; break;
    case DType::i8: value = static_cast<const int8_t*>(data)[i]; break;
    case DType::u8: value = static_cast<const uint8_t*>(data)[i]; break;
    default: return label_of(load_element(data, target.dtype, i), rule);
  }
  return label_of(value, rule);
}

// ---- errors

// Of a probability or a hinge, up to its sign.
template <class T>
__device__ inline T signed_error(Errors errors, T x, bool foreground) {
  return errors == Errors::hinge ? hinge_error(x, foreground) : probability_error(x, foreground);
}

template <class T>
__device__ inline T magnitude(T x) {
  return x < T(0) ? -x : x;
}

}  // namespace veerloss
