// Method "histogram" on a GPU: the coordinates of a pixel's errors (math/bins.h), and the pixels of a block. Counting and
// gradient compute coordinates with the same operations in the same order, and so find the same bins.
#pragma once

#include "../../math/bins.h"
#include "../registers.cuh"

namespace veerloss {

// ---- arithmetic

struct CoordinateMath {
  // Of normal x > 0. In float32 one instruction, accurate to 2^-22.
  static __device__ float log2(float x) {
#if defined(VEERLOSS_EMULATED)
    return std::log2(x);
#else
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
  }
  static __device__ double log2(double x) { return ::log2(x); }
};

// Shared memory of a class in kernels that have all its bins there: its table, and four bytes for each bin, as many as a
// segment of so many classes has.
VEERLOSS_HD constexpr int64_t class_bytes(int64_t classes) {
  return BinLayout::table * static_cast<int64_t>(sizeof(BinPair)) + 4 * BinLayout::bins(classes);
}

// Four times the bin of a coordinate. `table`: of a segment, in any memory; 8-byte aligned.
__device__ inline uint32_t bin_offset_of(float coordinate, const BinPair* table) {
  const float position = position_of(coordinate, table[0]);
  const auto* cells = reinterpret_cast<const char*>(table + 1);
  return bin_offset(position, *reinterpret_cast<const BinPair*>(cells + cell_offset(position)));
}

// ---- softmax

// What the classes of a pixel share. A class has `below`, (logit - largest logit) log2(e): 2^below is its exponential.
template <class T>
struct PixelCoordinates {
  T shared, top;

  __device__ explicit PixelCoordinates(T sumexp_excl_max) {
    const T log2_sum = CoordinateMath::log2(add_rn(T(1), sumexp_excl_max));
    shared = T(1) - log2_sum;
    top = top_coordinate<CoordinateMath>(sumexp_excl_max, log2_sum);
  }
  // Of background; foreground has its negative.
  __device__ float of(T below) const { return static_cast<float>(below == T(0) ? top : add_rn(below, shared)); }
};

template <class T>
__device__ inline T below_largest(T logit, T max_logit) {
  return mul_rn(add_rn(logit, -max_logit), T(log2_e));
}

// The exponential of a logit from what is binned; in float64, where it is no more work, from the logit.
struct CoordinateExp {
  static __device__ float of(float logit, float max_logit) { return exp2_of(below_largest(logit, max_logit)); }
  static __device__ double of(double logit, double max_logit) { return exp(logit - max_logit); }
};
// To the last digits of its type.
struct LogitExp {
  template <class T>
  static __device__ T of(T logit, T max_logit) {
    return AccurateExp{}(logit - max_logit);
  }
};

// Of more classes than registers hold, or of any: reads the logits of a pixel twice, the second time from the cache. The same
// operations in the same order as those of classes in registers.
template <class In, class Exp>
__device__ inline Softmax<opmath_t<In>> statistics_of_pixel(const View& logits, int64_t classes, int64_t image, int64_t pixel) {
  using T = opmath_t<In>;
  ClassPointer<In> at(logits, image, pixel);
  T max_logit = at.load();
  for (int64_t c = 1; c < classes; ++c) {
    ++at;
    max_logit = max_or_nan(max_logit, at.load());
  }
  SumExclMax<T> sum;
  SumOfParts<T> parts;
  at = ClassPointer<In>(logits, image, pixel);
  for (int64_t c = 0; c < classes; ++c, ++at) {
    parts.before(c, sum.sum);
    sum.add(Exp::of(at.load(), max_logit));
  }
  parts.end(classes, sum.sum);
  return {max_logit, sum.sum};
}

// base + i * bytes, of less than 2^31 both: in one instruction. (nvcc would step from one class to the next, by an addition of
// 64 bits, which takes two; ptxas too, if it saw a multiply-add of unsigned numbers.)
__device__ inline char* near(char* base, uint32_t i, uint32_t bytes) {
#if defined(VEERLOSS_EMULATED)
  return base + static_cast<uint64_t>(i) * bytes;
#else
  char* at;
  asm("{ .reg .s64 d; mul.wide.s32 d, %1, %2; add.s64 %0, d, %3; }" : "=l"(at) : "r"(i), "r"(bytes), "l"(base));
  __builtin_assume(__isGlobal(at));
  return at;
#endif
}

// Where the elements of a tensor lie, in bytes: made on the host, so that no pixel has to multiply.
struct NearView {
  char* data;
  int64_t image;
  uint32_t channel, pixel;

  __device__ char* at(uint32_t image_index, uint32_t i) const {
    return near(data + static_cast<int64_t>(image_index) * image, i, pixel);
  }
};

inline NearView near_view(const View& view, int64_t element_bytes) {
  return {view.data, view.stride_image * element_bytes, static_cast<uint32_t>(view.stride_channel * element_bytes),
          static_cast<uint32_t>(view.stride_pixel * element_bytes)};
}
inline bool is_near(const View& view, int64_t element_bytes) {
  const auto fits = [&](int64_t stride) { return stride >= 0 && stride * element_bytes < int64_t{1} << 31; };
  return fits(view.stride_channel) && fits(view.stride_pixel);
}
inline bool are_near(const View& logits) {
  return is_near(logits, sizeof(float));
}

// The classes of a pixel at distances of 32 bits, which multiply in one instruction.
template <class In>
struct NearClasses {
  char* first;
  uint32_t step;

  __device__ NearClasses(char* first, uint32_t step) : first(first), step(step) {}
  __device__ NearClasses(const View& view, uint32_t image, uint32_t pixel)
      : first(near(view.data + static_cast<int64_t>(image) * view.stride_image * static_cast<int64_t>(sizeof(In)), pixel,
                   static_cast<uint32_t>(view.stride_pixel) * static_cast<uint32_t>(sizeof(In)))),
        step(static_cast<uint32_t>(view.stride_channel) * static_cast<uint32_t>(sizeof(In))) {}

  __device__ opmath_t<In> load(int c) const {
#if defined(VEERLOSS_EMULATED)
    return convert<opmath_t<In>>(*at(c));
#else
    return convert<opmath_t<In>>(__ldg(at(c)));
#endif
  }
  __device__ void store(int c, opmath_t<In> value) const { *at(c) = convert<In>(value); }

 private:
  __device__ In* at(int c) const { return reinterpret_cast<In*>(near(first, static_cast<uint32_t>(c), step)); }
};

// All loads of a pixel are under way at once: `classes` from `first` on. Those that are missing get -infinity. `pixel` is a
// NearClasses or a SharedRow (rows.cuh).
template <class Range, class T, class Pixel>
__device__ inline void load_near(T (&values)[Range::most], const Pixel& pixel, int first, int classes) {
#pragma unroll
  for (int c = 0; c < Range::most; ++c)
    values[c] = Range::has(c, classes) ? pixel.load(first + c) : -std::numeric_limits<T>::infinity();
}

// ---- probabilities, hinge

// The coordinate of an error up to its sign; -infinity for 0, NaN for what is none.
template <Errors errors, class T>
__device__ inline float coordinate_of_error(T x, bool foreground) {
  const T error = magnitude(signed_error(errors, x, foreground)), least = T(0x1p-126);
  const T positive = error < least ? least : error;
  const T found =
      errors == Errors::probabilities ? folded_coordinate<CoordinateMath>(positive) : CoordinateMath::log2(positive);
  const T infinite = std::numeric_limits<T>::infinity();
  return static_cast<float>(error == T(0) ? -infinite : found + (x - x));
}

// ---- pixels of a block

// A block has a chunk of an image, or of the pixels of all images as one sequence (`flat`: small images of one segment).
// Of a sample, chunk and pixels count those of the sample, also past the end of the image; see sampled_pixel.
struct Chunks {
  int64_t images, pixels;  // pixels of an image, or with `flat` of all
  int64_t chunk, chunks;   // pixels of a chunk, chunks of an image
  bool flat, sampled;
  uint32_t image_pixels;

  // The pixels of chunk k.
  __device__ int64_t begin(int64_t k) const { return k * chunk; }
  __device__ int64_t end(int64_t k) const { return begin(k + 1) < pixels ? begin(k + 1) : pixels; }
};

// tile: pixels that a block takes at a time; most: at most so many of them.
inline Chunks chunks_of(const SegmentBatch& b, int64_t tile, int64_t most, int64_t blocks_at_once, int64_t groups,
                        bool sampled) {
  const auto& [images, classes, pixels] = b.geometry;
  Chunks c{};
  c.sampled = sampled;
  c.image_pixels = static_cast<uint32_t>(pixels);
  c.flat = !sampled && !b.per_image && images > 1 && pixels < 8 * tile;
  c.images = c.flat ? 1 : images;
  c.pixels = sampled ? ceil_div(pixels, sample_step) * sample_run : pixels * (c.flat ? images : 1);
  // As many blocks as run at once, or a multiple: each with the same number of tiles.
  const int64_t tiles = ceil_div(c.pixels, tile),
                wanted = ceil_div(blocks_at_once, c.images * groups > 0 ? c.images * groups : 1);
  const int64_t chunk = ceil_div(tiles, wanted > 0 ? wanted : 1);
  c.chunk = tile * (chunk < 1 ? 1 : chunk > most ? most : chunk);
  c.chunks = ceil_div(c.pixels, c.chunk);
  return c;
}

// For kernels whose blocks have pixels of one class: as many blocks of `threads` as multiprocessors hold.
inline Chunks class_chunks(const SegmentBatch& b, int threads, int64_t most_tiles) {
  return chunks_of(b, threads, most_tiles, multiprocessors() * (2048 / threads), b.classes(), false);
}

// Pixel j of an image's sample, or of the image; -1 past its end, which no pixel of 32 bits is.
__device__ inline int64_t sampled_pixel(int64_t j, bool sampled, int64_t pixels) {
  if (!sampled) return j;
  const auto i = static_cast<uint32_t>(j);
  const int64_t pixel = static_cast<int64_t>(i / sample_run) * sample_step + i % sample_run;
  return pixel < pixels ? pixel : -1;
}

// The pixels of a block. Where they are known not to be flat no thread divides, and images have one address.
template <bool may_be_flat>
struct BlockPixels {
  const Chunks& chunks;
  int64_t first_image;

  __device__ uint32_t image(uint32_t j) const {
    return may_be_flat && chunks.flat ? j / chunks.image_pixels : static_cast<uint32_t>(first_image);
  }
  // -1: none.
  __device__ int32_t pixel(uint32_t j) const {
    if (may_be_flat && chunks.flat) return static_cast<int32_t>(j % chunks.image_pixels);
    return static_cast<int32_t>(sampled_pixel(j, chunks.sampled, chunks.image_pixels));
  }
};

struct BlockPixel {
  int64_t image, pixel;  // pixel -1: none
};

__device__ inline BlockPixel block_pixel(const Chunks& chunks, int64_t image, int64_t j) {
  if (!chunks.flat) return {image, sampled_pixel(j, chunks.sampled, chunks.image_pixels)};
  const auto i = static_cast<uint32_t>(j);  // one segment: j < 2^31
  return {i / chunks.image_pixels, i % chunks.image_pixels};
}

// The pixels of one class. `plain`: images are not flat, labels are integers, and strides are of 32 bits.
template <class In, bool plain>
class ClassPixels {
  using T = opmath_t<In>;

 public:
  using Pixel = std::conditional_t<plain, uint32_t, BlockPixel>;

  __device__ ClassPixels(const SegmentBatch& batch, const Chunks& chunks, int64_t first_image, int64_t c)
      : batch_(batch), chunks_(chunks), image_(first_image), class_(c) {}

  // Pixel j of the block's image, or of all.
  __device__ Pixel at(uint32_t j) const {
    if constexpr (plain)
      return j;
    else
      return block_pixel(chunks_, image_, j);
  }
  // Of a sample, perhaps; then has() tells whether there is one.
  __device__ Pixel sampled_at(uint32_t j) const {
    if constexpr (plain)
      return static_cast<uint32_t>(sampled_pixel(j, chunks_.sampled, chunks_.image_pixels));
    else
      return block_pixel(chunks_, image_, j);
  }
  __device__ bool has(const Pixel& at) const {
    if constexpr (plain)
      return at < chunks_.image_pixels;
    else
      return at.pixel >= 0;
  }
  __device__ int32_t label(const Pixel& at) const {
    if constexpr (plain)
      return load_integer_label(batch_.target, batch_.rule, image_, at);
    else
      return load_label(batch_.target, batch_.rule, at.image, at.pixel);
  }
  __device__ T load(const Pixel& at) const { return convert<T>(*address(batch_.logits, at)); }
  __device__ void store(const View& view, const Pixel& at, T value) const { *address(view, at) = convert<In>(value); }

  // Where a pixel is in a contiguous tensor of [N, P].
  __device__ int64_t index(const Pixel& at) const {
    if constexpr (plain)
      return image_ * chunks_.image_pixels + at;
    else
      return at.image * chunks_.image_pixels + at.pixel;
  }

 private:
  __device__ In* address(const View& view, const Pixel& at) const {
    if constexpr (plain) {
      char* const first = view.data + ptr_offset(view, image_, class_, 0) * static_cast<int64_t>(sizeof(In));
      return reinterpret_cast<In*>(first + static_cast<uint64_t>(at) *
                                               (static_cast<uint32_t>(view.stride_pixel) * static_cast<uint32_t>(sizeof(In))));
    } else {
      return reinterpret_cast<In*>(view.data) + ptr_offset(view, at.image, class_, at.pixel);
    }
  }

  const SegmentBatch& batch_;
  const Chunks& chunks_;
  const int64_t image_, class_;
};

// Calls f with the errors of a loss whose classes are independent, and `plain`, as compile-time constants.
template <class F>
void with_elementwise(const SegmentBatch& batch, bool plain, const F& f) {
  with_flag(plain, [&](auto is_plain) {
    if (batch.errors == Errors::hinge) return f(std::integral_constant<Errors, Errors::hinge>{}, is_plain);
    f(std::integral_constant<Errors, Errors::probabilities>{}, is_plain);
  });
}

inline bool is_plain(const SegmentBatch& batch, const Chunks& chunks) {
  return !chunks.flat && is_integer(batch.target.dtype) && are_near(batch.logits);
}

}  // namespace veerloss
