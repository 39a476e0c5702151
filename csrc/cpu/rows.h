// Rows of pixels and single elements, from a tensor's type and strides to the opmath type and back.
#pragma once

#include <algorithm>

#include "../views.h"

namespace veerloss {

// out[0, run.count) = the pixels of `run` in one channel.
void load_row(float* out, const View& v, const Geometry& g, int64_t channel, Run run);
void load_row(double* out, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const float* in, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const double* in, const View& v, const Geometry& g, int64_t channel, Run run);

// The memory of a row, if it can be used as T directly; null if it has another type, another stride, or lies in several images.
template <class T>
T* row_in_place(const View& v, const Geometry& g, int64_t channel, Run run) {
  const int64_t image = run.first / g.pixels, pixel = run.first % g.pixels;
  if (v.dtype != (sizeof(T) == 8 ? DType::f64 : DType::f32) || v.stride_pixel != 1 || pixel + run.count > g.pixels)
    return nullptr;
  return reinterpret_cast<T*>(v.data) + image * v.stride_image + channel * v.stride_channel + pixel;
}

// Single pixels of a channel of logits, each `offset` elements from those of pixel 0; `index` as for pixel_offsets.
void gather_row(float* out, const View& v, int64_t channel, const int64_t* offset, const int32_t* index, int64_t n);
void gather_row(double* out, const View& v, int64_t channel, const int64_t* offset, const int32_t* index, int64_t n);
void scatter_row(const float* in, const View& v, int64_t channel, const int64_t* offset, int64_t n);
void scatter_row(const double* in, const View& v, int64_t channel, const int64_t* offset, int64_t n);

// The offsets of the pixels `first` + index[i].
void pixel_offsets(int64_t* out, const View& v, const Geometry& g, int64_t first, const int32_t* index, int64_t n);

// Zeros in all channels of a run.
void clear_run(const View& v, const Geometry& g, Run run);

// Labels (views.h) from class indices of any type. False if any is label_bad.
bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run);

// The pixels that are not ignored, appended to index and kept; `first` is the index of label[0]. Returns how many they are;
// both have room for one more.
int64_t select_pixels(const int32_t* label, int64_t n, int32_t first, int32_t* index, int32_t* kept);

// The same of whole rows, by a mask of the pixels: see RowTiles.
void mask_pixels(const int32_t* label, int64_t n, uint16_t* mask);
void compress_row(uint32_t* row, int64_t n, const uint16_t* mask);
void compress_row(uint64_t* row, int64_t n, const uint16_t* mask);
void expand_row(const float* in, int64_t n, const uint16_t* mask, float* row);
void expand_row(const double* in, int64_t n, const uint16_t* mask, double* row);

int64_t count_pixels(const int32_t* label, int64_t n);

// Element i of a contiguous tensor.
template <class T>
T load_element(const View& v, int64_t i) {
  T value;
  load_row(&value, v, {1, 1, i + 1}, 0, {i, 1});
  return value;
}

template <class T>
void store_element(const View& v, int64_t i, T value) {
  store_row(&value, v, {1, 1, i + 1}, 0, {i, 1});
}

// Pixels in a tile of `rows` rows: a multiple of every vector length, the tile in L2 with room to spare. 64 to 512 KiB measured
// alike to within noise (Sapphire Rapids, 19 classes), and so did prefetching the next tile's rows. Many classes take short
// tiles: 16 pixels at the least, or all there are.
inline int64_t tile_length(int64_t rows, size_t element_size, int64_t pixels) {
  constexpr int64_t tile_bytes = 1 << 16, vector = 16;
  const int64_t fit = tile_bytes / static_cast<int64_t>(element_size) / std::max<int64_t>(rows, 1) / vector * vector;
  const int64_t all = std::max((pixels + vector - 1) / vector * vector, vector);
  return std::min(std::clamp<int64_t>(fit, vector, 1024), all);
}

}  // namespace veerloss
