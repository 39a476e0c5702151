// Between PyTorch's stable ABI and the kernels of any device: views, types, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace veerloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in ops.py

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Short: return DType::i16;
    case ScalarType::Char: return DType::i8;
    case ScalarType::Byte:
    case ScalarType::Bool: return DType::u8;
    default: throw std::invalid_argument("veerloss: unsupported dtype; expected a float, integer or bool tensor");
  }
}

// A tensor [images, channels, pixels] or, without channels, [images, pixels]. A single pixel per image becomes one image of
// many.
inline View view_of(const Tensor& t) {
  const int64_t dim = t.dim();
  if (dim != 2 && dim != 3) throw std::invalid_argument("veerloss: operators take [N, C, P] and [N, P] tensors");
  View v{static_cast<char*>(t.data_ptr()), dtype_of(t), t.stride(0), dim == 3 ? t.stride(1) : 0, t.stride(dim - 1)};
  if (t.size(dim - 1) == 1) v.stride_pixel = v.stride_image;
  return v;
}

inline Geometry geometry_of(const Tensor& logits) {
  if (logits.dim() != 3) throw std::invalid_argument("veerloss: operators take logits [N, C, P]");
  const int64_t images = logits.size(0), pixels = logits.size(2);
  if (pixels == 1) return {1, logits.size(1), images};
  return {images, logits.size(1), pixels};
}

// The operators check what the public functions cannot get wrong: they can be called directly.
inline void require(bool condition, const char* expected) {
  if (!condition) throw std::invalid_argument(std::string("veerloss: expected ") + expected);
}

// Whether a tensor is on the device that this library has kernels for.
inline bool on_device(const Tensor& t) {
#if defined(VEERLOSS_CUDA)
  return t.is_cuda();
#else
  return t.is_cpu();
#endif
}

// t is [N, P], or [N, C, P] with channels, beside logits [N, C, P].
inline void check_like(const Tensor& t, const Tensor& logits, bool channels, const char* expected) {
  bool fits = on_device(t) && t.get_device_index() == logits.get_device_index();
  fits = fits && t.dim() == (channels ? 3 : 2) && t.size(0) == logits.size(0);
  fits = fits && t.size(t.dim() - 1) == logits.size(2) && (!channels || t.size(1) == logits.size(1));
  require(fits, expected);
}

// A contiguous tensor of `count` values in the arithmetic type.
template <class T>
const T* arithmetic_data(const Tensor& t, int64_t count, const char* expected) {
  require(on_device(t) && t.is_contiguous() && t.numel() == count && dtype_of(t) == (sizeof(T) == 8 ? DType::f64 : DType::f32),
          expected);
  return static_cast<const T*>(t.data_ptr());
}

// Arithmetic is in float32, or float64 for float64 logits.
template <class F>
auto with_arithmetic_type(const Tensor& logits, const F& f) {
  const DType dtype = dtype_of(logits);
  require(on_device(logits) && (dtype == DType::f64 || dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16),
          "logits of float32, float64, bfloat16 or float16 on the device of the kernels");
  return dtype == DType::f64 ? f(double{}) : f(float{});
}

template <class T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
}

// The type of a loss: that of the logits, or the arithmetic type where it is to be `wide`.
template <class T>
ScalarType loss_type(const Tensor& logits, bool wide) {
  return wide ? scalar_type_of<T>() : logits.scalar_type();
}

}  // namespace veerloss
