// Where the elements of a tensor are, whatever its type and strides.
#pragma once

#include <cstdint>

namespace veerloss {

// Element types of logits and targets; bool travels as u8.
enum class DType { f32, f64, bf16, f16, i64, i32, i16, i8, u8 };

// A tensor seen as [images, channels, pixels]; strides in elements. A target of class indices has stride_channel 0.
struct View {
  char* data;
  DType dtype;
  int64_t stride_image, stride_channel, stride_pixel;
};

struct Geometry {
  int64_t images, channels, pixels;
};

// A run of `count` pixels from flat index `first` on, where flat = image * pixels + pixel. It may span many small images.
struct Run {
  int64_t first, count;
};

// What a target holds: class indices [0, classes), or an ignored value. Labels are int32: the class, or one of these.
struct TargetRule {
  int64_t classes;
  bool has_ignore;
  int64_t ignore;
};
constexpr int32_t label_ignored = -1;
constexpr int32_t label_bad = -2;

}  // namespace veerloss
