// Where the elements of a tensor lie, whatever its type and strides. No torch headers.
#pragma once

#include <cstdint>

namespace veerloss {

// Element types of logits and targets; bool counts as u8.
enum class DType { f32, f64, bf16, f16, i64, i32, i16, i8, u8 };

// Calls f with a zero of the opmath type, in which kernels compute: double for f64 logits, else float.
template <class F>
auto with_opmath_type(DType logits, const F& f) {
  return logits == DType::f64 ? f(double{}) : f(float{});
}

// A tensor seen as [images, channels, pixels]; strides in elements. Class indices have stride_channel 0. `data` is null for an
// optional tensor that is absent.
struct View {
  char* data;
  DType dtype;
  int64_t stride_image, stride_channel, stride_pixel;
};

struct Geometry {
  int64_t images, channels, pixels;
};

// `count` pixels from flat index `first` on, where flat = image * pixels + pixel. A run may span many small images.
struct Run {
  int64_t first, count;
};

// Which values of a target are valid: class indices in [0, classes), the value to ignore, and one that is background to all
// classes. Kernels turn values into int32 labels: the class, or a constant below. A pixel counts where its label is >= 0.
struct TargetRule {
  int64_t classes;
  bool has_ignore = false;
  int64_t ignore = 0;
  bool has_background = false;
  int64_t background = 0;
};
constexpr int32_t label_ignored = -1;
constexpr int32_t label_bad = -2;
constexpr int32_t label_background = 0x7fffffff;

}  // namespace veerloss
