// Logits of low resolution, whose pixels kernels see at the full resolution of the target: bilinear, or to the nearest one.
//
// Forward, a class of a pixel is a blend of four loads, which its neighbours find in L1. Backward, a block has a tile of
// pixels. The gradients go through shared memory, some classes at a time, where rows and then columns are summed to what the
// tile adds to pixels of low resolution: an eighth of the tile at four times the size. A second kernel adds up the tiles in
// their order, so that the bits are the same in every run.
#pragma once

#include "../math/upsample.h"
#include "lovasz/coordinates.cuh"
#include "registers.cuh"

namespace veerloss {

using LowPolicy = Tuning::Low;

// Divides numbers below 2^31 by a multiplication.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((int64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }
  __device__ int32_t operator()(int32_t n) const {
    const auto u = static_cast<uint32_t>(n);
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(u) * multiplier_ >> 32);
    return static_cast<int32_t>((high + u) >> shift_);
  }

 private:
  uint32_t multiplier_ = 1;
  int shift_ = 0;
};

struct LowBlend {
  int32_t first;
  float second_weight;
};

struct LowAxis {
  UpsampleAxisOf<int32_t> axis;
  Divisor unit;

  LowAxis() = default;
  explicit LowAxis(const UpsampleAxis& a)
      : axis{static_cast<int32_t>(a.low),    static_cast<int32_t>(a.full), static_cast<int32_t>(a.step),
             static_cast<int32_t>(a.offset), static_cast<int32_t>(a.unit), a.is_nearest},
        unit(a.unit) {}

  __device__ LowBlend blend(int32_t i) const {
    LowBlend found;
    found.second_weight = axis.blend<float>(i, found.first, unit);
    return found;
  }
  // Pixels of low resolution that are first of the pairs of so many pixels in a row, at most.
  int firsts(int count) const { return static_cast<int>(ceil_div(static_cast<int64_t>(count - 1) * axis.step, axis.unit)) + 1; }
};

// Images whose rows and columns are of low resolution; the columns of a class are contiguous.
struct LowLogits {
  char* data;
  int64_t image;          // bytes from one image to the next
  uint32_t channel, row;  // likewise
  LowAxis y, x;
  Divisor columns;  // of full resolution

  LowLogits() = default;
  template <class In>
  static LowLogits of(const View& logits, const Upsample& upsample, const In&) {
    constexpr auto bytes = static_cast<int64_t>(sizeof(In));
    const UpsampleAxis &y = upsample.axes[1], &x = upsample.axes[2];
    LowLogits found;
    found.data = logits.data;
    found.image = logits.stride_image * bytes;
    found.channel = static_cast<uint32_t>(logits.stride_channel * bytes);
    found.row = static_cast<uint32_t>(x.low * bytes);
    found.y = LowAxis(y);
    found.x = LowAxis(x);
    found.columns = Divisor(x.full);
    return found;
  }
};

// What kernels can blend: images, no smaller than their logits.
inline bool is_low(const View& logits, const Upsample& upsample) {
  const auto fits = [](const UpsampleAxis& a) { return a.low > 1 && a.low <= a.full && a.low * a.full < int64_t{1} << 30; };
  const UpsampleAxis &z = upsample.axes[0], &y = upsample.axes[1], &x = upsample.axes[2];
  return z.full == 1 && z.low == 1 && fits(y) && fits(x) && y.full * x.full < int64_t{1} << 31 && logits.stride_pixel == 1 &&
         are_near(logits);
}

// Calls f with the range of the classes of a softmax, of class indices.
template <class In, class F>
void with_low_range(const SegmentBatch& batch, const F& f) {
  if (batch.errors != Errors::softmax || !is_low(batch.logits, *batch.upsample))
    throw std::runtime_error("veerloss: on a GPU upsample is for a softmax of images, to a larger size");
  with_class_range<In>(batch.classes(), [&](auto range) {
    if constexpr (range.most > 0 && range.most <= LowPolicy::most_classes && !std::is_same_v<In, double>)
      f(range);
    else
      throw std::runtime_error("veerloss: on a GPU upsample is for 24 classes at most, not of float64");
  });
}

// The classes of a pixel, as NearClasses and ClassPointer have those in memory.
template <class In>
class BlendedClasses {
  using T = opmath_t<In>;

 public:
  using Element = In;

  __device__ BlendedClasses(const LowLogits& logits, int64_t image, const LowBlend& y, const LowBlend& x)
      : upper_(near(logits.data + image * logits.image + static_cast<int64_t>(x.first) * static_cast<int64_t>(sizeof(In)),
                    static_cast<uint32_t>(y.first), logits.row)),
        lower_(upper_ + logits.row),
        step_(logits.channel) {
    const T v = y.second_weight, h = x.second_weight, u = T(1) - v, g = T(1) - h;
    upper_first_ = u * g;
    upper_second_ = u * h;
    lower_first_ = v * g;
    lower_second_ = v * h;
  }
  __device__ BlendedClasses(const LowLogits& logits, int64_t image, int32_t row, int32_t column)
      : BlendedClasses(logits, image, logits.y.blend(row), logits.x.blend(column)) {}

  // pixel: of full resolution.
  __device__ static BlendedClasses at(const LowLogits& logits, int64_t image, int32_t pixel) {
    const int32_t row = logits.columns(pixel);
    return BlendedClasses(logits, image, row, pixel - row * logits.x.axis.full);
  }

  __device__ T load(int c = 0) const {
    const In *upper = of_class(upper_, c), *lower = of_class(lower_, c);
    return fma_rn(
        lower_second_, value(lower + 1),
        fma_rn(lower_first_, value(lower), fma_rn(upper_second_, value(upper + 1), mul_rn(upper_first_, value(upper)))));
  }
  __device__ void operator++() { skip(1); }
  __device__ void skip(int classes) {
    upper_ = near(upper_, static_cast<uint32_t>(classes), step_);
    lower_ = near(lower_, static_cast<uint32_t>(classes), step_);
  }

 private:
  __device__ const In* of_class(char* first, int c) const {
    return reinterpret_cast<const In*>(near(first, static_cast<uint32_t>(c), step_));
  }
  __device__ static T value(const In* at) {
#if defined(VEERLOSS_EMULATED)
    return convert<T>(*at);
#else
    return convert<T>(__ldg(at));
#endif
  }

  char *upper_, *lower_;
  uint32_t step_;
  T upper_first_, upper_second_, lower_first_, lower_second_;
};

// ---- tiles of full resolution, of which blocks have the gradients

// The tiles of all images.
struct LowTiles {
  int across, down;        // of an image
  int firsts_x, firsts_y;  // LowAxis::firsts of a tile

  explicit LowTiles(const LowLogits& logits)
      : across(static_cast<int>(ceil_div(logits.x.axis.full, LowPolicy::columns))),
        down(static_cast<int>(ceil_div(logits.y.axis.full, LowPolicy::rows))),
        firsts_x(logits.x.firsts(LowPolicy::columns)),
        firsts_y(logits.y.firsts(LowPolicy::rows)) {}

  VEERLOSS_HD int64_t of_image() const { return static_cast<int64_t>(across) * down; }
  // Pixels of low resolution that a tile adds to.
  VEERLOSS_HD int lows_x() const { return firsts_x + 1; }
  VEERLOSS_HD int lows_y() const { return firsts_y + 1; }
  VEERLOSS_HD int lows() const { return lows_x() * lows_y(); }
};

// What a pixel adds to the two of an axis, and by how many its first differs from that of the next in the tile.
struct alignas(16) LowShares {
  float first, second;
  int32_t steps;
};

// Four classes of a pixel, which shared memory loads and stores together.
struct alignas(16) LowQuad {
  float of[4];

  __device__ void add(float share, const LowQuad& values) {
#pragma unroll
    for (int k = 0; k < 4; ++k) of[k] = fma_rn(share, values.of[k], of[k]);
  }
};

// One tile; a thread of the block has one of its pixels. All functions are for all threads.
class LowTile {
  static constexpr int rows = LowPolicy::rows, columns = LowPolicy::columns;
  static constexpr int quads = LowPolicy::quads, classes_at_once = 4 * quads;

 public:
  static constexpr int threads = rows * columns;

  static int64_t shared_bytes(const LowTiles& tiles) {
    return (columns + rows) * static_cast<int64_t>(sizeof(LowShares)) +
           quads * columns * (rows + tiles.lows_y()) * static_cast<int64_t>(sizeof(LowQuad)) +
           (tiles.firsts_x + 1) * static_cast<int64_t>(sizeof(int));
  }

  __device__ LowTile(const LowTiles& tiles, const LowLogits& logits, unsigned char* memory)
      : tiles_(tiles), logits_(logits), memory_(memory) {}

  // Goes to tile `index` of an image.
  __device__ void begin(int index) {
    const int down = index / tiles_.across;
    first_row_ = down * rows;
    first_column_ = (index - down * tiles_.across) * columns;
  }
  __device__ bool has_pixel() const { return row() < logits_.y.axis.full && column() < logits_.x.axis.full; }
  __device__ int64_t pixel() const { return static_cast<int64_t>(row()) * logits_.x.axis.full + column(); }
  template <class In>
  __device__ BlendedClasses<In> logits(int64_t image) const {
    return BlendedClasses<In>(logits_, image, row(), column());
  }

  // What the tile adds to pixels of low resolution, `to` [classes][lows], from the gradients of each thread's pixel; 0 of one
  // that is none. With barriers, of which the first stands before anything is read that another tile has left.
  template <int most>
  __device__ void reduce(const float (&g)[most], int classes, float* to) const {
    __syncthreads();
    begin_shares();
#pragma unroll
    for (int first = 0; first < most; first += classes_at_once) {
      if (first >= classes) break;
#pragma unroll
      for (int q = 0; q < quads; ++q) {
        LowQuad quad{};
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (first + 4 * q + k < most) quad.of[k] = g[first + 4 * q + k];
        gradients()[q * threads + thread()] = quad;
      }
      __syncthreads();
      sum_rows();
      __syncthreads();
      sum_columns(classes - first, to + first * tiles_.lows());
    }
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ int row() const { return first_row_ + thread() / columns; }
  __device__ int column() const { return first_column_ + thread() % columns; }

  // From the threads of the first row, and of the first column.
  __device__ void begin_shares() const {
    if (thread() < columns) {
      const int i = thread(), valid = valid_of(logits_.x, first_column_, columns);
      const int origin = logits_.x.blend(first_column_).first, own = logits_.x.blend(column()).first - origin;
      const int steps = put_shares(shares_x(), logits_.x, column(), i, valid);
      // Where in the tile the pixels of each first start.
      if (i == 0) starts_x()[0] = 0;
      for (int k = 0; k < steps; ++k) starts_x()[own + 1 + k] = i + 1;
      if (i == valid - 1)
        for (int k = own + 1; k <= tiles_.firsts_x; ++k) starts_x()[k] = valid;
    }
    if (thread() % columns == 0)
      put_shares(shares_y(), logits_.y, row(), thread() / columns, valid_of(logits_.y, first_row_, rows));
  }
  __device__ static int valid_of(const LowAxis& axis, int first, int count) {
    return axis.axis.full - first < count ? axis.axis.full - first : count;
  }
  // Pixels of no image have no share.
  __device__ static int put_shares(LowShares* shares, const LowAxis& axis, int pixel, int i, int valid) {
    const LowBlend blend = axis.blend(pixel);
    const int steps = i < valid - 1 ? axis.blend(pixel + 1).first - blend.first : 0;
    shares[i] = {i < valid ? 1.0f - blend.second_weight : 0.0f, i < valid ? blend.second_weight : 0.0f, steps};
    return steps;
  }

  // Of each column, to rows of low resolution.
  __device__ void sum_rows() const {
    if (thread() >= quads * columns) return;
    const int q = thread() / columns, lows = tiles_.lows_y();
    const LowQuad* g = gradients() + q * threads + thread() % columns;
    LowQuad first{}, second{};
    LowQuad* to = sums() + q * lows * columns + thread() % columns;
    const LowQuad* const end = to + lows * columns;
    const auto next_row = [&] {
      *to = first;
      first = second;
      second = {};
      to += columns;
    };
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      const LowShares share = shares_y()[r];
      const LowQuad values = g[r * columns];
      first.add(share.first, values);
      second.add(share.second, values);
      VEERLOSS_NO_UNROLL
      for (int step = 0; step < share.steps; ++step) next_row();
    }
    while (to < end) next_row();
  }

  // Of these rows, to pixels of low resolution; a thread has one of each class.
  __device__ void sum_columns(int classes, float* to) const {
    const int lows_x = tiles_.lows_x(), lows_y = tiles_.lows_y(), lows = lows_x * lows_y;
    VEERLOSS_NO_UNROLL
    for (int i = thread(); i < lows; i += threads) {
      const int y = i / lows_x, x = i - y * lows_x;
      const int begin = starts_x()[x > 0 ? x - 1 : 0], own = x < lows_x - 1 ? starts_x()[x] : columns;
      const int end = starts_x()[x < lows_x - 1 ? x + 1 : x];
      LowQuad found[quads] = {};
      VEERLOSS_NO_UNROLL
      for (int c = begin; c < end; ++c) {
        const float share = c < own ? shares_x()[c].second : shares_x()[c].first;
#pragma unroll
        for (int q = 0; q < quads; ++q) found[q].add(share, sums()[(q * lows_y + y) * columns + c]);
      }
      float* at = to + i;
#pragma unroll
      for (int k = 0; k < classes_at_once; ++k, at += lows)
        if (k < classes) *at = found[k / 4].of[k % 4];
    }
  }

  // The shared memory, of which no address is kept where registers are for the classes.
  __device__ LowShares* shares_x() const { return reinterpret_cast<LowShares*>(memory_); }
  __device__ LowShares* shares_y() const { return shares_x() + columns; }
  __device__ LowQuad* gradients() const { return reinterpret_cast<LowQuad*>(shares_y() + rows); }  // [quads][rows][columns]
  __device__ LowQuad* sums() const { return gradients() + quads * threads; }                       // [quads][lows_y][columns]
  __device__ int* starts_x() const { return reinterpret_cast<int*>(sums() + quads * tiles_.lows_y() * columns); }

  const LowTiles& tiles_;
  const LowLogits& logits_;
  unsigned char* memory_;
  int first_row_ = 0, first_column_ = 0;
};

// The gradient of the logits from the partial sums of all tiles, [images][tiles][classes][lows].
void add_up_tiles(const Geometry& g, const Upsample& upsample, const View& grad_logits, const LowTiles& tiles,
                  const float* partials, Stream stream);

}  // namespace veerloss
