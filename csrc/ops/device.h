// What operators do differently per device. csrc/ops is compiled once into each library: that of the CPU, that of CUDA
// (VEERLOSS_CUDA), and the emulated kernels of tests/emulator (VEERLOSS_EMULATED, the namespace of their operators).
#pragma once

#include "../kernels.h"
#include "checks.h"

#if defined(VEERLOSS_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#elif !defined(VEERLOSS_EMULATED)
#include "../cpu/memory.h"
#endif

namespace veerloss {

#if defined(VEERLOSS_CUDA)
// Makes the device of a tensor current, and names its current stream.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};
#else
class Device {
 public:
  explicit Device(const Tensor&) {}
  Stream stream() const { return nullptr; }
};
#endif

// A large tensor that a kernel writes once.
inline Tensor write_once(Tensor t) {
#if !defined(VEERLOSS_CUDA) && !defined(VEERLOSS_EMULATED)
  advise_huge_pages(t.data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
#endif
  return t;
}

// Memory for one call of a kernel, from PyTorch's allocator.
inline Tensor scratch_memory(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

#if defined(VEERLOSS_EMULATED)
#define VEERLOSS_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(VEERLOSS_EMULATED, CPU, m)
#elif defined(VEERLOSS_CUDA)
#define VEERLOSS_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(veerloss, CUDA, m)
#else
#define VEERLOSS_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(veerloss, CPU, m)
#endif

}  // namespace veerloss
