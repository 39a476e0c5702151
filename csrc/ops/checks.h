// Between PyTorch's stable ABI and the kernels: views of tensors, and checks. Operators can be called directly, so they check
// whatever could make a kernel read outside a tensor; their errors name the operator, the argument and what it is.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "../layout.h"
#include "../views.h"

namespace veerloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// null for types that no kernel takes.
inline std::optional<DType> dtype_of(const Tensor& t) {
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
    default: return std::nullopt;
  }
}

// Whether a tensor is on the device that this library has kernels for.
inline bool on_device(const Tensor& t) {
#if defined(VEERLOSS_CUDA)
  return t.is_cuda();
#else
  return t.is_cpu();
#endif
}

// Kernels compute in float32, in float64 for float64 logits.
template <class T>
constexpr DType opmath_dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
template <class T>
constexpr ScalarType opmath_scalar_type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline ScalarType opmath_type_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// "[2, 3, 10] float32 on cpu"
inline std::string describe(const Tensor& t) {
  static constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int64",
                                          "int32",   "int16",   "int8",     "uint8"};
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(t.size(d));
  const auto dtype = dtype_of(t);
  text += std::string("] ") + (dtype ? names[static_cast<int>(*dtype)] : "of an unsupported type");
  if (!t.is_contiguous()) text += ", not contiguous,";
  return text + (t.is_cpu()    ? " on cpu"
                 : t.is_cuda() ? " on cuda:" + std::to_string(t.get_device_index())
                               : " on another device");
}

// The checks of one operator.
class Op {
 public:
  explicit Op(const char* name) : name_(name) {}

  void check(bool condition, const char* argument, const Tensor& t, const char* expected) const {
    if (!condition) reject(argument, describe(t), expected);
  }
  void check(bool condition, const char* argument, int64_t value, const char* expected) const {
    if (!condition) reject(argument, std::to_string(value), expected);
  }

  void check_logits(const Tensor& logits) const {
    const auto dtype = dtype_of(logits);
    check(on_device(logits) && logits.dim() == 3 && dtype && *dtype <= DType::f16, "logits", logits,
          "[N, C, P] float32, float64, bfloat16 or float16 on the device of the kernels");
  }

  // `t` is [N, P], or [N, C, P] with channels, beside logits [N, C, P].
  void check_like(const char* argument, const Tensor& t, const Tensor& logits, bool channels) const {
    bool fits = on_device(t) && t.get_device_index() == logits.get_device_index() && dtype_of(t).has_value();
    fits = fits && t.dim() == (channels ? 3 : 2) && t.size(0) == logits.size(0);
    fits = fits && t.size(t.dim() - 1) == logits.size(2) && (!channels || t.size(1) == logits.size(1));
    if (!fits)
      reject(argument, describe(t), (channels ? "[N, C, P], as logits " : "[N, P], for logits [N, C, P] ") + describe(logits));
  }

  // The data of a contiguous tensor of `count` elements of a type.
  template <class T>
  T* data(const char* argument, const Tensor& t, int64_t count, DType dtype, const char* expected) const {
    check(on_device(t) && t.is_contiguous() && t.numel() == count && dtype_of(t) == dtype, argument, t, expected);
    return static_cast<T*>(t.data_ptr());
  }
  template <class T>
  T* data(const char* argument, const std::optional<Tensor>& t, int64_t count, DType dtype, const char* expected) const {
    return t ? data<T>(argument, *t, count, dtype, expected) : nullptr;
  }

  Reduction reduction(int64_t value) const {
    check(value >= 0 && value <= 2, "reduction", value, "0 (none), 1 (mean) or 2 (sum)");
    return static_cast<Reduction>(value);
  }
  Errors errors(int64_t value) const {
    check(value >= 0 && value <= 2, "errors", value, "0 (softmax), 1 (probabilities) or 2 (hinge)");
    return static_cast<Errors>(value);
  }

  [[noreturn]] void reject(const char* argument, const std::string& actual, const std::string& expected) const {
    throw std::invalid_argument(std::string("veerloss::") + name_ + ": " + argument + " must be " + expected + ", got " +
                                actual);
  }

 private:
  const char* name_;
};

// A checked tensor [images, channels, pixels], or without channels [images, pixels]. Single pixels of many images count as the
// pixels of one image.
inline View view_of(const Tensor& t) {
  const int64_t dim = t.dim();
  View v{static_cast<char*>(t.data_ptr()), *dtype_of(t), t.stride(0), dim == 3 ? t.stride(1) : 0, t.stride(dim - 1)};
  if (t.size(dim - 1) == 1) v.stride_pixel = v.stride_image;
  return v;
}

inline Geometry geometry_of(const Tensor& logits) {
  const int64_t images = logits.size(0), pixels = logits.size(2);
  if (pixels == 1) return {1, logits.size(1), images};
  return {images, logits.size(1), pixels};
}

// Elements in a row, or one.
inline View element_view(const Tensor& t) {
  return {static_cast<char*>(t.data_ptr()), *dtype_of(t), 0, 0, 1};
}

// An error of PyTorch's allocator does not come through the stable ABI with its message. This one begins as PyTorch's does: by
// that, code that looks for the largest batch knows it.
template <class F>
Tensor allocate(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type, const F& make) {
  try {
    return make();
  } catch (const std::runtime_error&) {
    int64_t bytes = type == ScalarType::Double || type == ScalarType::Long                             ? 8
                    : type == ScalarType::Half || type == ScalarType::BFloat16                         ? 2
                    : type == ScalarType::Byte || type == ScalarType::Bool || type == ScalarType::Char ? 1
                                                                                                       : 4;
    for (const int64_t size : shape) bytes *= size;
    throw std::runtime_error(
        std::string(like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory:") +
        " veerloss tried to allocate " + std::to_string(bytes) + " bytes, for logits " + describe(like));
  }
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return allocate(like, shape, type, [&] { return torch::stable::new_empty(like, shape, type); });
}

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return allocate(like, shape, type, [&] { return torch::stable::new_zeros(like, shape, type); });
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline Tensor empty_as(const Tensor& t) {
  return allocate(t, shape_of(t), t.scalar_type(), [&] { return torch::stable::empty_like(t); });
}

// The type of a loss: that of the logits, or with `upcast_loss` the opmath type.
inline ScalarType loss_type(const Tensor& logits, bool upcast_loss) {
  return upcast_loss ? opmath_type_of(logits) : logits.scalar_type();
}

}  // namespace veerloss
