// Pixels whose classes lie next to each other (channels_last, points [P, C]), by way of shared memory: a block reads and writes
// its pixels as one run of memory, and its threads have a row each. A thread that went to memory for its own row would touch
// as many sectors as its warp has threads with every load, and write each sector in as many parts as it has elements.
#pragma once

#include "pixels.cuh"

namespace veerloss {

// The pixels of a block: `count` from `first` on, in an image or, where a grid is flat, in the sequence of all images.
struct PixelRun {
  int64_t image, first;
  int count;
};

template <int threads>
__device__ inline PixelRun pixel_run(const PixelGrid& grid, int64_t images, int64_t pixels, uint32_t block) {
  const auto [image, part, channel] = image_part(grid.parts, 1, block);
  const int64_t first = part * threads, left = (grid.flat ? images * pixels : pixels) - first;
  return {image, first, static_cast<int>(left < threads ? left : threads)};
}

// Whether the pixels of every block are one run of memory, `flat`: also those of several images. One class is that in any case,
// and is read directly.
inline bool has_rows(const View& view, const Geometry& g, bool flat) {
  const bool images_follow = g.images == 1 || view.stride_image == g.channels * g.pixels;
  return g.channels > 1 && view.stride_channel == 1 && view.stride_pixel == g.channels && (!flat || images_follow);
}
inline bool has_rows(const View& view, const Geometry& g, const PixelGrid& grid) {
  return has_rows(view, g, grid.flat);
}

// Rows begin an odd number of words apart: the same class of 32 pixels then lies in 32 banks.
VEERLOSS_HD constexpr int shared_row_words(int classes) {
  return classes | 1;
}
inline int64_t shared_rows_bytes(int64_t pixels, int64_t classes, int64_t element_size) {
  return pixels * shared_row_words(static_cast<int>(classes)) * element_size;
}

// The classes of a pixel in shared memory, as a ClassPointer points to those in memory.
template <class T>
class SharedRow {
 public:
  __device__ explicit SharedRow(T* at) : at_(at) {}

  __device__ void operator++() { ++at_; }
  __device__ void skip(int classes) { at_ += classes; }
  __device__ T load(int class_ = 0) const { return at_[class_]; }
  __device__ void store(T value, int class_ = 0) const { at_[class_] = value; }
  __device__ void store(int class_, T value) const { at_[class_] = value; }

 private:
  T* at_;
};

// The rows of a block. A barrier has to stand between what the block does together and what threads do with their rows.
template <class In, int threads>
class SharedRows {
  static_assert(threads < 1024, "see word");
  using T = opmath_t<In>;

 public:
  __device__ SharedRows(void* memory, int classes)
      : rows_(static_cast<T*>(memory)),
        classes_(classes),
        inverse_(classes % 2 == 0 ? (1u << 22) / static_cast<uint32_t>(classes) + 1 : 0) {}

  __device__ SharedRow<T> row(int pixel) const { return SharedRow<T>(rows_ + pixel * shared_row_words(classes_)); }

  // `most`: elements that a thread has at most, all of which are then under way at once; 0 if that is not known.
  template <int most = 0>
  __device__ void load(const View& view, const PixelRun& run) const {
    const In* from = reinterpret_cast<const In*>(view.data) + ptr_offset(view, run.image, 0, run.first);
    for_each<most>(run, [&](int i) { rows_[word(i)] = convert<T>(from[i]); });
  }
  template <int most = 0>
  __device__ void store(const View& view, const PixelRun& run) const {
    In* to = reinterpret_cast<In*>(view.data) + ptr_offset(view, run.image, 0, run.first);
    for_each<most>(run, [&](int i) { to[i] = convert<In>(rows_[word(i)]); });
  }

 private:
  // Calls f(element of the run) for the elements of a thread.
  template <int most, class F>
  __device__ void for_each(const PixelRun& run, const F& f) const {
    const int first = static_cast<int>(threadIdx.x), elements = run.count * classes_;
    if constexpr (most > 0) {
#pragma unroll
      for (int k = 0; k < most; ++k)
        if (first + k * threads < elements) f(first + k * threads);
    } else {
#pragma unroll 8
      for (int i = first; i < elements; i += threads) f(i);
    }
  }
  // Where element i of a run lies: with a word for each row before it where classes are even. The quotient by one
  // multiplication in 32 bits: it is exact for i * classes < 2^22, and i / classes < 1024 keeps the product below 2^32.
  __device__ uint32_t word(int i) const {
    const auto element = static_cast<uint32_t>(i);
    return element + (element * inverse_ >> 22);
  }

  T* rows_;
  int classes_;
  uint32_t inverse_;
};

}  // namespace veerloss
