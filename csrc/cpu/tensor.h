// Between PyTorch's stable ABI and the CPU kernels: elements, memory, threads, errors of targets.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <limits>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../tensor.h"
#include "rows.h"

namespace veerloss {

inline View element_view(const Tensor& t) {
  return View{static_cast<char*>(t.data_ptr()), dtype_of(t), 0, 0, 1};
}

// The value of a tensor of one element, of any type.
inline double read_scalar(const Tensor& t) {
  if (t.numel() != 1) throw std::invalid_argument("veerloss: expected a tensor of one element");
  double value;
  load_row(&value, element_view(t), {1, 1, 1}, 0, {0, 1});
  return value;
}

// Element i of a contiguous tensor takes a value, rounded to its type.
inline void write_element(const Tensor& t, int64_t i, double value) {
  store_row(&value, element_view(t), {1, 1, t.numel()}, 0, {i, 1});
}

// How many pixels make a tile of `rows` rows: a multiple of every vector length, the tile in L2 with room to spare. 64 to 512
// KiB measured alike to within noise (Sapphire Rapids, 19 classes), and so did prefetching the next tile's rows.
// Many classes take short tiles: 16 pixels at the least, or all there are.
inline int64_t tile_length(int64_t rows, size_t element_size, int64_t pixels) {
  constexpr int64_t tile_bytes = 1 << 16, vector = 16;
  const int64_t fit = tile_bytes / static_cast<int64_t>(element_size) / std::max<int64_t>(rows, 1) / vector * vector;
  const int64_t all = std::max((pixels + vector - 1) / vector * vector, vector);
  return std::min(std::clamp<int64_t>(fit, vector, 1024), all);
}

// Large outputs are written once, and the first touch of each 4 KiB page costs more than writing it: 40 MB took 15 ms of page
// faults, 2 ms of them with pages of 2 MiB. A hint only, to kernels that give such pages on demand.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  if (bytes >= (4 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline const Tensor& with_huge_pages(const Tensor& t) {
  advise_huge_pages(t.data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

// Zeroed memory for a while, straight from the operating system and back: what allocators keep of freed blocks would add to the
// peak.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes) {
#if defined(__linux__)
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
#else
    data_ = std::calloc(bytes, 1);
    if (!data_) throw std::bad_alloc();
#endif
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
#if defined(__linux__)
    munmap(data_, bytes_);
#else
    std::free(data_);
#endif
  }
  void* data() const { return data_; }

 private:
  const int64_t bytes_;
  void* data_;
};

// f(first, last) over parts of [0, count), on PyTorch's own threads.
template <class F>
void parallel_for(int64_t count, const F& f) {
  if (count == 1) return f(int64_t{0}, int64_t{1});
  if (count > 0) torch::stable::parallel_for(0, count, 1, f);
}

// The first bad target that any thread meets, so that the error names the same one every time. Exceptions do not cross threads.
class BadTarget {
 public:
  void at(int64_t channel, int64_t flat_pixel, int64_t channels = 1) {
    const int64_t index = flat_pixel * channels + channel;
    int64_t seen = first_.load();
    while (index < seen && !first_.compare_exchange_weak(seen, index)) {
    }
  }

  // IndexError: pybind11 maps std::out_of_range to it.
  void raise_if_any(const View& target, const Geometry& g, const std::string& expected, int64_t channels = 1) const {
    const int64_t index = first_.load();
    if (index == none) return;
    const int64_t flat = index / channels;
    double value;
    load_row(&value, target, g, index % channels, {flat, 1});
    std::ostringstream message;
    message << "target holds ";
    if (value == std::floor(value) && std::fabs(value) < 9e15)
      message << static_cast<int64_t>(value);
    else
      message << std::setprecision(17) << value;
    message << ", expected " << expected;
    throw std::out_of_range(message.str());
  }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{none};
};

inline void load_labels(int32_t* out, const View& target, const Geometry& g, const TargetRule& rule, Run run, BadTarget& bad) {
  if (load_labels(out, target, g, rule, run)) return;
  for (int64_t i = 0; i < run.count; ++i)
    if (out[i] == label_bad) return bad.at(0, run.first + i);
}

inline std::string expected_labels(const TargetRule& rule, bool binary = false) {
  std::string text = binary ? "0 or 1" : "class indices in [0, " + std::to_string(rule.classes) + ")";
  return rule.has_ignore ? text + " or ignore_index=" + std::to_string(rule.ignore) : text;
}

}  // namespace veerloss
