// Memory of the CPU kernels.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>

namespace veerloss {

// Large outputs are written once, and the first touch of each 4 KiB page costs more than writing it: 40 MB took 15 ms of page
// faults, 2 ms of them with pages of 2 MiB. A hint only, for kernels that hand out such pages on demand.
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

// Zeroed memory from the operating system, returned to it when the scope ends: what an allocator keeps of freed blocks would
// raise the peak.
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

}  // namespace veerloss
