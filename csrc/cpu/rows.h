// Rows of pixels in and out of the arithmetic type, whatever the tensor's element type and strides.
#pragma once

#include "layout.h"

namespace veerloss {

// out[0, run.count) = the pixels of `run` in one channel.
void load_row(float* out, const View& v, const Geometry& g, int64_t channel, Run run);
void load_row(double* out, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const float* in, const View& v, const Geometry& g, int64_t channel, Run run);
void store_row(const double* in, const View& v, const Geometry& g, int64_t channel, Run run);

// Class indices of any type. A value that is neither a class nor ignored becomes label_bad; then the result is false.
bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run);

}  // namespace veerloss
