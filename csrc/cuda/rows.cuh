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

// Whether the pixels of every block are one run of memory. One class is that in any case, and is read directly.
inline bool has_rows(const View& view, const Geometry& g, const PixelGrid& grid) {
  const bool images_follow = g.images == 1 || view.stride_image == g.channels * g.pixels;
  return g.channels > 1 && view.stride_channel == 1 && view.stride_pixel == g.channels && (!grid.flat || images_follow);
}

// Element i of shared memory lies in word i + i / 32: rows of every length, that of 32 classes too, then start in different
// banks.
__device__ inline int shared_row_word(int i) {
  return i + (i >> 5);
}
inline int64_t shared_rows_bytes(int64_t elements, int64_t element_size) {
  return (elements + elements / 32) * element_size;
}

// The classes of a pixel in shared memory, as a ClassPointer points to those in memory.
template <class T>
class SharedRow {
 public:
  __device__ SharedRow(T* rows, int first) : rows_(rows), at_(first) {}

  __device__ void operator++() { ++at_; }
  __device__ void skip(int classes) { at_ += classes; }
  __device__ T load(int class_ = 0) const { return rows_[shared_row_word(at_ + class_)]; }
  __device__ void store(T value) const { rows_[shared_row_word(at_)] = value; }

 private:
  T* rows_;
  int at_;
};

// The rows of a block. A barrier has to stand between what the block does together and what threads do with their rows.
template <class In, int threads>
class SharedRows {
  using T = opmath_t<In>;

 public:
  __device__ SharedRows(void* memory, int classes) : rows_(static_cast<T*>(memory)), classes_(classes) {}

  __device__ SharedRow<T> row(int pixel) const { return {rows_, pixel * classes_}; }

  __device__ void load(const View& view, const PixelRun& run) const {
    const In* from = reinterpret_cast<const In*>(view.data) + ptr_offset(view, run.image, 0, run.first);
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < run.count * classes_; i += threads)
      rows_[shared_row_word(i)] = convert<T>(from[i]);
  }
  __device__ void store(const View& view, const PixelRun& run) const {
    In* to = reinterpret_cast<In*>(view.data) + ptr_offset(view, run.image, 0, run.first);
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x); i < run.count * classes_; i += threads)
      to[i] = convert<In>(rows_[shared_row_word(i)]);
  }

 private:
  T* rows_;
  int classes_;
};

}  // namespace veerloss
