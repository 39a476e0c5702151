// Logits of low resolution on the CPU, which passes see at the full resolution of the target, tile by tile: see Upsample in
// kernels.h.
//
// A row of full resolution is a blend of rows of low resolution: one, two, or in a volume four. These are kept at full width,
// so that the pixels between two of them share the work across columns: the pass along the columns of [19, 128, 128] to 512 x
// 512 costs a quarter of what it would pixel by pixel. Backward does the same the other way round.
//
// A thread has whole bands of rows, which depend on the shape alone. What a band adds to rows of low resolution that are the
// next band's too is kept apart, and added at the end in the order of bands: the same bits for any number of threads.
//
// In one file, of which no part is of use without the others: the map, rows at full width, logits, their gradient.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../kernels.h"
#include "rows.h"

namespace veerloss {

// Elements behind a row that is read in vectors.
constexpr int64_t upsample_padding = 17;

// 16 columns, or the last ones: the first pixel of low resolution that they add to, and the taps of UpsampleMap.
template <class T>
struct UpsampleChunk {
  int64_t first, columns, first_tap, taps;
};
// Of each of eight pixels of low resolution one column, and what that adds to the pixel and to the next; in the upper half the
// same for another row, whose columns come after those of the first.
template <class T>
struct UpsampleTap {
  int32_t column[16];
  T to_first[16], to_second[16];
};

}  // namespace veerloss

#define VEERLOSS_TILES "upsample_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

// Rows of low resolution that a row of full resolution lies between.
template <class T>
struct RowTaps {
  int64_t count;
  std::array<int64_t, 4> row;
  std::array<T, 4> weight;
};

// Rows of full resolution of an image: those of one index, or in a volume of planes, from `begin` to `end`.
struct Band {
  int64_t begin, end;
  int64_t shared;  // rows of low resolution from here on are the next band's too, where it has any
};

// Bands of eight first neighbours of the outer axis, or fewer of a small image, so that there are some for every thread.
inline std::vector<Band> bands_of(const Upsample& u) {
  const UpsampleAxis &z = u.axes[0], &y = u.axes[1];
  const bool in_planes = z.full > 1 || z.low > 1;
  const UpsampleAxis& outer = in_planes ? z : y;
  const int64_t inner_rows = in_planes ? y.full : 1, inner_low = in_planes ? y.low : 1;
  const int64_t most = std::clamp<int64_t>(outer.low / 16, 1, 8);
  std::vector<Band> bands;
  int64_t begin = 0, firsts = 0, before = -1;
  for (int64_t i = 0; i < outer.full; ++i) {
    int64_t first;
    outer.blend<float>(i, first);
    if (first != before && firsts++ == most) {
      bands.push_back({begin * inner_rows, i * inner_rows, (before + 1) * inner_low});
      begin = i;
      firsts = 1;
    }
    before = first;
  }
  if (outer.full > 0) bands.push_back({begin * inner_rows, outer.full * inner_rows, outer.low * inner_low});
  return bands;
}

// What the threads of a pass share.
template <class T>
class UpsampleMap {
 public:
  explicit UpsampleMap(const Upsample& u)
      : z_(u.axes[0]),
        y_(u.axes[1]),
        x_(u.axes[2]),
        images_(u.low.images),
        channels_(u.low.channels),
        first_(x_.full),
        second_weight_(x_.full),
        bands_(bands_of(u)) {
    std::vector<int64_t> taps_of(x_.low, 0);
    std::vector<int32_t> place(x_.full);
    for (int64_t i = 0; i < x_.full; ++i) {
      int64_t first;
      second_weight_[i] = x_.blend<T>(i, first);
      if (x_.is_nearest) {
        first += second_weight_[i] > T(0);
        second_weight_[i] = T(0);
      }
      first_[i] = static_cast<int32_t>(first);
      place[i] = static_cast<int32_t>(taps_of[first]++);
      longest_ = std::max<int64_t>(longest_, place[i] + 1);
    }
    at_.resize(longest_ * x_.low);
    to_first_.resize(longest_ * x_.low);
    to_second_.resize(longest_ * x_.low);
    for (int64_t i = 0; i < x_.full; ++i) {
      const int64_t k = place[i] * x_.low + first_[i];
      at_[k] = static_cast<int32_t>(i);
      to_first_[k] = T(1) - second_weight_[i];
      to_second_[k] = second_weight_[i];
    }
    find_chunks();
  }

  int64_t width() const { return x_.full; }
  int64_t low_width() const { return x_.low; }
  int64_t low_rows() const { return z_.low * y_.low; }
  int64_t rows() const { return z_.full * y_.full; }
  int64_t images() const { return images_; }
  int64_t channels() const { return channels_; }
  bool is_nearest() const { return x_.is_nearest; }
  const std::vector<Band>& bands() const { return bands_; }
  const int32_t* first() const { return first_.data(); }
  const T* second_weight() const { return second_weight_.data(); }
  // Of rows of low resolution that two bands have.
  int64_t shared_rows() const { return in_planes() ? y_.low : 1; }

  RowTaps<T> taps(int64_t row) const {
    int64_t z, y;
    const T v = z_.blend<T>(row / y_.full, z), u = y_.blend<T>(row % y_.full, y);
    const int64_t next_z = z_.low > 1 && !z_.is_nearest, next_y = y_.low > 1 && !y_.is_nearest;
    RowTaps<T> found{0, {}, {}};
    if (y_.is_nearest) {  // in the place of a pair that ends with it
      const int64_t exact_z = z + (v > T(0)), exact_y = y + (u > T(0));
      return {1, {exact_z * y_.low + exact_y}, {T(1)}};
    }
    for (int64_t k = 0; k <= next_z; ++k)
      for (int64_t j = 0; j <= next_y; ++j) {
        found.row[found.count] = (z + k) * y_.low + y + j;
        found.weight[found.count++] = (k ? v : next_z ? T(1) - v : T(1)) * (j ? u : next_y ? T(1) - u : T(1));
      }
    return found;
  }

  void expand(const T* low, T* out) const {
    if (is_nearest())
      VEERLOSS_DISPATCH(UpsampleTiles::copy(low, first_.data(), width(), out));
    else
      VEERLOSS_DISPATCH(UpsampleTiles::expand(low, first_.data(), second_weight_.data(), width(), x_.low <= x_.full, out));
  }
  // Adds the rows of full width of all channels, a width apart, to those of low resolution, row_of(channel). sums: scratch.
  template <class F>
  void contract(const T* rows, std::vector<T>& sums, const F& row_of) const {
    const int64_t stride = low_width() + upsample_padding;
    sums.resize(2 * stride);
    int64_t c = 0;
    for (; !chunks_.empty() && c + 2 <= channels_; c += 2) {
      const T* const row = rows + c * width();
      std::fill_n(sums.data(), 2 * stride, T(0));
      if (!VEERLOSS_DISPATCH(UpsampleTiles::contract_pair(
              row, row + width(), chunks_.data(), static_cast<int64_t>(chunks_.size()), taps_.data(), sums.data(), stride)))
        break;
      for (int64_t k = 0; k < 2; ++k) {
        T* const to = row_of(c + k);
        for (int64_t i = 0; i < low_width(); ++i) to[i] += sums[k * stride + i];
      }
    }
    for (; c < channels_; ++c)
      VEERLOSS_DISPATCH(UpsampleTiles::contract(rows + c * width(), at_.data(), to_first_.data(), to_second_.data(), longest_,
                                                low_width(), sums.data(), row_of(c)));
  }

 private:
  bool in_planes() const { return z_.full > 1 || z_.low > 1; }

  // None where 16 columns lie among more than eight pixels of low resolution.
  void find_chunks() {
    for (int64_t at = 0; at < x_.full; at += 16) {
      const int64_t columns = std::min<int64_t>(16, x_.full - at), first = first_[at];
      UpsampleChunk<T> chunk{first, columns, static_cast<int64_t>(taps_.size()), 0};
      std::array<int64_t, 8> taken{};
      for (int64_t l = 0; l < columns; ++l) {
        const int64_t x = first_[at + l] - first;
        if (x < 0 || x > 6) {
          chunks_.clear();
          return;
        }
        if (taken[x] == chunk.taps) {
          taps_.push_back({});
          ++chunk.taps;
        }
        UpsampleTap<T>& tap = taps_[chunk.first_tap + taken[x]++];
        for (int64_t half = 0; half < 2; ++half) {
          tap.column[8 * half + x] = static_cast<int32_t>(l + 16 * half);
          tap.to_second[8 * half + x] = second_weight_[at + l];
          tap.to_first[8 * half + x] = T(1) - second_weight_[at + l];
        }
      }
      chunks_.push_back(chunk);
    }
  }

  UpsampleAxis z_, y_, x_;
  int64_t images_, channels_;
  std::vector<int32_t> first_;  // of each column
  std::vector<T> second_weight_;
  // Columns by the first of their pair: [longest_][low_width()], of weight 0 where there are less.
  int64_t longest_ = 0;
  std::vector<int32_t> at_;
  std::vector<T> to_first_, to_second_;
  std::vector<UpsampleChunk<T>> chunks_;
  std::vector<UpsampleTap<T>> taps_;
  std::vector<Band> bands_;
};

// Rows of low resolution at full width, [channels][width] in each slot; those that the current row lies between are in some.
template <class T>
class RowSlots {
 public:
  explicit RowSlots(const UpsampleMap<T>& map) : size_(map.channels() * map.width()), memory_(4 * size_) { key_.fill(-1); }

  // The slots of the rows `taps`; leave(slot, key) before a slot gets another row, enter(slot, key) after. A key is a row among
  // those of all images.
  template <class Leave, class Enter>
  std::array<T*, 4> find(const RowTaps<T>& taps, int64_t first_key, const Leave& leave, const Enter& enter) {
    std::array<T*, 4> found{};
    const auto has = [&](int64_t key) {
      for (int64_t k = 0; k < taps.count; ++k)
        if (first_key + taps.row[k] == key) return true;
      return false;
    };
    for (int64_t k = 0; k < taps.count; ++k) {
      const int64_t key = first_key + taps.row[k];
      auto slot = std::find(key_.begin(), key_.end(), key);
      if (slot == key_.end()) {
        slot = std::find_if(key_.begin(), key_.end(), [&](int64_t other) { return !has(other); });
        T* const data = memory_.data() + (slot - key_.begin()) * size_;
        if (*slot >= 0) leave(data, *slot);
        *slot = key;
        enter(data, key);
      }
      found[k] = memory_.data() + (slot - key_.begin()) * size_;
    }
    return found;
  }
  template <class Leave>
  void clear(const Leave& leave) {
    for (size_t k = 0; k < key_.size(); ++k) {
      if (key_[k] >= 0) leave(memory_.data() + static_cast<int64_t>(k) * size_, key_[k]);
      key_[k] = -1;
    }
  }

 private:
  const int64_t size_;
  std::vector<T> memory_;
  std::array<int64_t, 4> key_;
};

// Calls f(row of the image, column, count, how many are before) for the parts of a run in each row.
template <class T, class F>
void for_each_row(const UpsampleMap<T>& map, int64_t pixel, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (pixel + done) / map.width(), column = (pixel + done) % map.width();
    const int64_t n = std::min(count - done, map.width() - column);
    f(row, column, n, done);
    done += n;
  }
}

// The logits of a pass; each thread has an UpsampledRows.
template <class T>
class LowLogits {
 public:
  LowLogits(const Upsample& u, const View& logits) : map(u), view_(logits), low_(u.low) {}

  // A row, and zeros behind it.
  void load(int64_t image, int64_t channel, int64_t row, T* out) const {
    const int64_t width = map.low_width();
    load_row(out, view_, low_, channel, {image * low_.pixels + row * width, width});
    std::fill_n(out + width, upsample_padding, T(0));
  }

  const UpsampleMap<T> map;

 private:
  const View view_;
  const Geometry low_;
};

template <class T>
class UpsampledRows {
 public:
  explicit UpsampledRows(const LowLogits<T>& logits)
      : logits_(logits), slots_(logits.map), low_(logits.map.low_width() + upsample_padding) {}

  // The pixels of a run, which lies in one image, of all channels: out [channels][stride]; and of each the largest, if wanted.
  void load(int64_t image, int64_t pixel, int64_t count, T* out, int64_t stride, T* largest = nullptr) {
    const UpsampleMap<T>& map = logits_.map;
    for_each_row(map, pixel, count, [&](int64_t row, int64_t column, int64_t n, int64_t done) {
      const RowTaps<T> taps = map.taps(row);
      const auto slots = find(taps, image);
      for (int64_t c = 0; c < map.channels(); ++c) {
        std::array<const T*, 4> rows{};
        for (int64_t k = 0; k < taps.count; ++k) rows[k] = slots[k] + c * map.width() + column;
        T* const to = out + c * stride + done;
        if (largest)
          VEERLOSS_DISPATCH(
              UpsampleTiles::blend_max(rows.data(), taps.weight.data(), taps.count, n, c == 0, to, largest + done));
        else
          VEERLOSS_DISPATCH(UpsampleTiles::blend(rows.data(), taps.weight.data(), taps.count, n, to));
      }
    });
  }
  // Single pixels, `first` + index[i] of all images.
  void gather(int64_t pixels, int64_t first, const int32_t* index, int64_t count, T* out, int64_t stride) {
    const UpsampleMap<T>& map = logits_.map;
    for (int64_t i = 0; i < count;) {
      const int64_t image = (first + index[i]) / pixels, pixel = (first + index[i]) % pixels;
      int64_t n = 1;  // a run of them in the same row
      while (i + n < count && index[i + n] == index[i] + n && pixel % map.width() + n < map.width()) ++n;
      load(image, pixel, n, out + i, stride);
      i += n;
    }
  }

 private:
  std::array<T*, 4> find(const RowTaps<T>& taps, int64_t image) {
    const UpsampleMap<T>& map = logits_.map;
    return slots_.find(
        taps, image * map.low_rows(), [](T*, int64_t) {},
        [&](T* slot, int64_t key) {
          for (int64_t c = 0; c < map.channels(); ++c) {
            logits_.load(key / map.low_rows(), c, key % map.low_rows(), low_.data());
            map.expand(low_.data(), slot + c * map.width());
          }
        });
  }

  const LowLogits<T>& logits_;
  RowSlots<T> slots_;
  std::vector<T> low_;
};

// The gradient of a pass, from those of full resolution; each thread has an UpsampledGradient. Written by store().
template <class T>
class LowGradient {
 public:
  LowGradient(const Upsample& u, const View& grad)
      : map(u),
        view_(grad),
        low_(u.low),
        in_place_(row_in_place<T>(grad, {1, low_.channels, low_.pixels}, 0, {0, low_.pixels})),
        sums_(in_place_ ? 0 : low_.images * low_.channels * low_.pixels),
        shared_(low_.images * bands() * low_.channels * map.shared_rows() * map.low_width()) {
    if (!in_place_) return;
    for (int64_t n = 0; n < low_.images; ++n)
      for (int64_t c = 0; c < low_.channels; ++c) std::fill_n(plane(n, c), low_.pixels, T(0));
  }

  int64_t bands() const { return static_cast<int64_t>(map.bands().size()); }
  const Band& band(int64_t k) const { return map.bands()[k % bands()]; }

  // Where band k of all images adds to a row.
  T* row(int64_t k, int64_t image, int64_t channel, int64_t row) {
    const int64_t width = map.low_width(), first = band(k).shared;
    if (row < first) return plane(image, channel) + row * width;
    return &shared_[((k * low_.channels + channel) * map.shared_rows() + row - first) * width];
  }

  void store() {
    for (int64_t k = 0; k < low_.images * bands(); ++k) {
      const int64_t first = band(k).shared, rows = std::min(map.shared_rows(), map.low_rows() - first);
      for (int64_t c = 0; rows > 0 && c < low_.channels; ++c) {
        T* const to = plane(k / bands(), c) + first * map.low_width();
        const T* const from = row(k, k / bands(), c, first);
        for (int64_t i = 0; i < rows * map.low_width(); ++i) to[i] += from[i];
      }
    }
    for (int64_t n = 0; !in_place_ && n < low_.images; ++n)
      for (int64_t c = 0; c < low_.channels; ++c) store_row(plane(n, c), view_, low_, c, {n * low_.pixels, low_.pixels});
  }

  const UpsampleMap<T> map;

 private:
  T* plane(int64_t image, int64_t channel) {
    return in_place_ ? in_place_ + image * view_.stride_image + channel * view_.stride_channel
                     : &sums_[(image * low_.channels + channel) * low_.pixels];
  }

  const View view_;
  const Geometry low_;
  T* const in_place_;
  std::vector<T> sums_;    // [images][channels][pixels]
  std::vector<T> shared_;  // [images * bands][channels][shared rows][low width]
};

template <class T>
class UpsampledGradient {
 public:
  explicit UpsampledGradient(LowGradient<T>& low) : low_(low), slots_(low.map) {}

  void begin_band(int64_t k) { band_ = k; }
  // The gradients of a run of the band, [channels][stride], each times a factor of its pixel, if there are any.
  void add(int64_t image, int64_t pixel, int64_t count, const T* grad, int64_t stride, const T* factor = nullptr) {
    const UpsampleMap<T>& map = low_.map;
    for_each_row(map, pixel, count, [&](int64_t row, int64_t column, int64_t n, int64_t done) {
      const RowTaps<T> taps = map.taps(row);
      const auto slots = slots_.find(
          taps, image * map.low_rows(), [&](T* slot, int64_t key) { contract(slot, key); },
          [&](T* slot, int64_t) { std::fill_n(slot, map.channels() * map.width(), T(0)); });
      for (int64_t c = 0; c < map.channels(); ++c) {
        std::array<T*, 4> sums{};
        for (int64_t k = 0; k < taps.count; ++k) sums[k] = slots[k] + c * map.width() + column;
        VEERLOSS_DISPATCH(UpsampleTiles::add_blend(grad + c * stride + done, factor ? factor + done : nullptr,
                                                   taps.weight.data(), taps.count, n, sums.data()));
      }
    });
  }
  void end_band() {
    slots_.clear([&](T* slot, int64_t key) { contract(slot, key); });
  }

 private:
  void contract(T* slot, int64_t key) {
    const int64_t rows = low_.map.low_rows();
    low_.map.contract(slot, sums_, [&](int64_t c) { return low_.row(band_, key / rows, c, key % rows); });
  }

  LowGradient<T>& low_;
  RowSlots<T> slots_;
  std::vector<T> sums_;
  int64_t band_ = 0;
};

}  // namespace veerloss
