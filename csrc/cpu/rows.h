// Rows of pixels in and out of the arithmetic type, whatever the tensor's element type and strides.
#pragma once

#include "../layout.h"

namespace veerloss {

// out[0, run.count) = the pixels of `run` in one channel.
void load_row(float* out, const View& v, const Geometry& g, int64_t channel, Run run);
void load_row(double* out, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const float* in, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const double* in, const View& v, const Geometry& g, int64_t channel, Run run);

// Where a row lies in memory as T, ready to use, or null if it does not: another type, spread out, or in several images.
template <class T>
T* row_in_place(const View& v, const Geometry& g, int64_t channel, Run run) {
  const int64_t image = run.first / g.pixels, pixel = run.first % g.pixels;
  if (v.dtype != (sizeof(T) == 8 ? DType::f64 : DType::f32) || v.stride_pixel != 1 || pixel + run.count > g.pixels)
    return nullptr;
  return reinterpret_cast<T*>(v.data) + image * v.stride_image + channel * v.stride_channel + pixel;
}

// Class indices of any type. A value that is neither a class nor ignored becomes label_bad; then the result is false.
bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run);

}  // namespace veerloss
