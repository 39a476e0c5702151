#include "rows.h"

#include <cstring>

#include "simd/vecmath.h"

#define VEERLOSS_TILES "row_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

void load_row(float* out, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::load(out, v, g, channel, run));
}

void load_row(double* out, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::load(out, v, g, channel, run));
}

void store_row(const float* in, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::store(in, v, g, channel, run));
}

void store_row(const double* in, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::store(in, v, g, channel, run));
}

void gather_row(float* out, const View& v, int64_t channel, const int64_t* offset, const int32_t* index, int64_t n) {
  VEERLOSS_DISPATCH(RowTiles::gather(out, v, channel, offset, index, n));
}

void gather_row(double* out, const View& v, int64_t channel, const int64_t* offset, const int32_t* index, int64_t n) {
  VEERLOSS_DISPATCH(RowTiles::gather(out, v, channel, offset, index, n));
}

void scatter_row(const float* in, const View& v, int64_t channel, const int64_t* offset, int64_t n) {
  VEERLOSS_DISPATCH(RowTiles::scatter(in, v, channel, offset, n));
}

void scatter_row(const double* in, const View& v, int64_t channel, const int64_t* offset, int64_t n) {
  VEERLOSS_DISPATCH(RowTiles::scatter(in, v, channel, offset, n));
}

void pixel_offsets(int64_t* out, const View& v, const Geometry& g, int64_t first, const int32_t* index, int64_t n) {
  int64_t image = first / g.pixels, begin = image * g.pixels - first;  // the index of the image's first pixel
  for (int64_t i = 0; i < n; ++i) {
    while (index[i] - begin >= g.pixels) {
      ++image;
      begin += g.pixels;
    }
    out[i] = image * v.stride_image + (index[i] - begin) * v.stride_pixel;
  }
}

void clear_run(const View& v, const Geometry& g, Run run) {
  const int64_t size = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  for (int64_t first = run.first, end = run.first + run.count; first < end;) {
    const int64_t image = first / g.pixels, pixel = first % g.pixels, n = std::min(end - first, g.pixels - pixel);
    char* const data = v.data + (image * v.stride_image + pixel * v.stride_pixel) * size;
    if (v.stride_channel == 1 && v.stride_pixel == g.channels) {  // channels_last
      std::memset(data, 0, n * g.channels * size);
    } else {
      for (int64_t c = 0; c < g.channels; ++c) {
        char* const row = data + c * v.stride_channel * size;
        if (v.stride_pixel == 1) {
          std::memset(row, 0, n * size);
        } else {
          for (int64_t i = 0; i < n; ++i) std::memset(row + i * v.stride_pixel * size, 0, size);
        }
      }
    }
    first += n;
  }
}

bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run) {
  return VEERLOSS_DISPATCH(RowTiles::load_labels(out, v, g, rule, run));
}

int64_t select_pixels(const int32_t* label, int64_t n, int32_t first, int32_t* index, int32_t* kept) {
  return VEERLOSS_DISPATCH(RowTiles::select(label, n, first, index, kept));
}

void mask_pixels(const int32_t* label, int64_t n, uint16_t* mask) {
  VEERLOSS_DISPATCH(RowTiles::mask(label, n, mask));
}

void compress_row(uint32_t* row, int64_t n, const uint16_t* mask) {
  VEERLOSS_DISPATCH(RowTiles::compress(row, n, mask));
}

void compress_row(uint64_t* row, int64_t n, const uint16_t* mask) {
  VEERLOSS_DISPATCH(RowTiles::compress(row, n, mask));
}

void expand_row(const float* in, int64_t n, const uint16_t* mask, float* row) {
  VEERLOSS_DISPATCH(RowTiles::expand(in, n, mask, row));
}

void expand_row(const double* in, int64_t n, const uint16_t* mask, double* row) {
  VEERLOSS_DISPATCH(RowTiles::expand(in, n, mask, row));
}

int64_t count_pixels(const int32_t* label, int64_t n) {
  return VEERLOSS_DISPATCH(RowTiles::count(label, n));
}

}  // namespace veerloss
