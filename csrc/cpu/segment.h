// The Lovász extension of one segment, exactly: keep the pixels that can have weight, sort them by error, scan.
//
// A background pixel whose error is below the smallest foreground error ranks after the last foreground pixel: its weight is 0, and it
// needs no sorting. Every step gives the same bits for any number of threads: sorts are stable, counts are integers, and sums are
// taken over fixed chunks in order.
#pragma once

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include "../jaccard.h"
#include "tensor.h"
#include "vecmath.h"

namespace veerloss {

// What a segment holds. smallest_fg and largest are error bits without the foreground bit.
template <class T>
struct SegmentCounts {
  int64_t valid = 0, foreground = 0;
  typename ErrorKey<T>::Word smallest_fg = ErrorKey<T>::ignored, largest = 0;

  void add(const SegmentCounts& other) {
    valid += other.valid;
    foreground += other.foreground;
    smallest_fg = std::min(smallest_fg, other.smallest_fg);
    largest = std::max(largest, other.largest);
  }
};

constexpr int64_t max_segment = int64_t{1} << 31;  // a pixel's index takes 31 bits beside the foreground bit

template <class T>
class SegmentSorter {
 public:
  using Key = ErrorKey<T>;
  using Word = typename Key::Word;

  // `threads` > 1 works on one long segment with all threads; else the caller runs many segments side by side.
  explicit SegmentSorter(int64_t threads) : threads_(threads) {}

  // The loss of a segment of n keys. If `keep`, the keys are overwritten by the signed weights dL/dp: - on foreground, + on background.
  double loss(Word* keys, int64_t n, const SegmentCounts<T>& counts, bool keep) {
    const double value = loss_of(keys, n, counts);
    if (keep) write_weights(keys, n, counts);
    return value;
  }

 private:
  struct Entry {
    Word key;          // largest - error: ascending order is descending error
    uint32_t payload;  // foreground bit, pixel
  };
  static constexpr uint32_t fg_bit = 0x80000000u;
  // Small enough that every thread has several; a chunk of entries fits in L2.
  static constexpr int64_t chunk = int64_t{1} << 16;

  static int64_t chunks_of(int64_t n) { return (n + chunk - 1) / chunk; }

  template <class F>
  void for_each_chunk(int64_t n, const F& f) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(k, k * chunk, std::min(n, (k + 1) * chunk));
    };
    if (threads_ > 1)
      parallel_for(chunks_of(n), run);
    else
      run(0, chunks_of(n));
  }

  double loss_of(const Word* keys, int64_t n, const SegmentCounts<T>& counts);
  void collect(const Word* keys, int64_t n, const SegmentCounts<T>& counts);
  void sort(int bits);
  void sort_pass(int shift, int digit_bits);
  void write_weights(Word* keys, int64_t n, const SegmentCounts<T>& counts);

  int64_t threads_;
  int64_t kept_ = 0;
  int64_t capacity_ = 0;
  std::unique_ptr<Entry[]> entries_, spare_;
  std::vector<int64_t> per_chunk_, fg_before_;
  std::vector<uint32_t> histogram_;
  std::vector<double> sums_;
};

template <class T>
double SegmentSorter<T>::loss_of(const Word* keys, int64_t n, const SegmentCounts<T>& counts) {
  kept_ = 0;
  if (counts.valid == 0) return 0.0;
  if (counts.largest >= Key::infinity) return std::numeric_limits<double>::quiet_NaN();
  if (counts.foreground == 0) return static_cast<double>(bit_cast<T>(counts.largest));
  collect(keys, n, counts);
  sort(std::bit_width(static_cast<Word>(counts.largest - counts.smallest_fg)));

  // Ranks: foreground before each chunk, then the losses of the chunks.
  const int64_t total = counts.foreground;
  fg_before_.assign(chunks_of(kept_) + 1, 0);
  for_each_chunk(kept_, [&](int64_t k, int64_t begin, int64_t end) {
    int64_t fg = 0;
    for (int64_t i = begin; i < end; ++i) fg += entries_[i].payload >> 31;
    fg_before_[k + 1] = fg;
  });
  for (size_t k = 1; k < fg_before_.size(); ++k) fg_before_[k] += fg_before_[k - 1];
  sums_.assign(chunks_of(kept_), 0.0);
  for_each_chunk(kept_, [&](int64_t k, int64_t begin, int64_t end) {
    int64_t fg = fg_before_[k], bg = begin - fg;
    double sum = 0;
    for (int64_t block = begin; block < end; block += 256) {  // blockwise, so that rounding does not grow with the chunk
      double part = 0;
      for (int64_t i = block; i < std::min(block + 256, end); ++i) {
        const bool is_fg = entries_[i].payload & fg_bit;
        const double weight = is_fg ? jaccard_fg_weight(total, bg) : jaccard_bg_weight(total, fg, bg);
        const T error = bit_cast<T>(static_cast<Word>(counts.largest - entries_[i].key));
        part += weight * static_cast<double>(error);
        // The key has done its work: the weight takes its place.
        entries_[i].key = bit_cast<Word>(static_cast<T>(is_fg ? -weight : weight));
        fg += is_fg;
        bg += !is_fg;
      }
      sum += part;
    }
    sums_[k] = sum;
  });
  double sum = 0;
  for (double s : sums_) sum += s;
  return sum;
}

// entries_ = the pixels that can have weight, in the order of their pixels.
template <class T>
void SegmentSorter<T>::collect(const Word* keys, int64_t n, const SegmentCounts<T>& counts) {
  const Word least = counts.smallest_fg;
  const auto keeps = [least](Word key) { return (key & ~Key::foreground) >= least && key != Key::ignored; };
  per_chunk_.assign(chunks_of(n) + 1, 0);
  for_each_chunk(n, [&](int64_t k, int64_t begin, int64_t end) {
    Word count = 0;
    for (int64_t i = begin; i < end; ++i) count += keeps(keys[i]);
    per_chunk_[k + 1] = static_cast<int64_t>(count);
  });
  for (size_t k = 1; k < per_chunk_.size(); ++k) per_chunk_[k] += per_chunk_[k - 1];
  kept_ = per_chunk_.back();
  if (kept_ > capacity_) {
    capacity_ = kept_;
    entries_ = std::make_unique_for_overwrite<Entry[]>(capacity_);
    spare_ = std::make_unique_for_overwrite<Entry[]>(capacity_);
  }
  for_each_chunk(n, [&](int64_t k, int64_t begin, int64_t end) {
    Entry* out = entries_.get() + per_chunk_[k];
    Entry* const last = entries_.get() + per_chunk_[k + 1];
    for (int64_t i = begin; i < end && out < last; ++i) {
      // Written always and kept if wanted: no branch to mispredict. The end of the chunk's own part is never passed.
      const Word key = keys[i];
      *out = {static_cast<Word>(counts.largest - (key & ~Key::foreground)), static_cast<uint32_t>(i) | (key >= Key::foreground ? fg_bit : 0u)};
      out += keeps(key);
    }
  });
}

// Stable, ascending in the low `bits` bits of the key: an LSD radix sort, or std::sort where its histograms would cost more.
template <class T>
void SegmentSorter<T>::sort(int bits) {
  if (kept_ < 512) {
    std::sort(entries_.get(), entries_.get() + kept_,
              [](const Entry& a, const Entry& b) { return a.key != b.key ? a.key < b.key : (a.payload & ~fg_bit) < (b.payload & ~fg_bit); });
    return;
  }
  constexpr int most_bits = 11;  // 2048 counters of 4 bytes stay in L1
  const int passes = (bits + most_bits - 1) / most_bits;
  for (int pass = 0, shift = 0; pass < passes; ++pass) {
    const int digit_bits = (bits - shift + (passes - pass) - 1) / (passes - pass);
    sort_pass(shift, digit_bits);
    shift += digit_bits;
  }
}

// Each thread counts and then moves its own contiguous part; (digit, part) order keeps the sort stable.
template <class T>
void SegmentSorter<T>::sort_pass(int shift, int digit_bits) {
  const int64_t digits = int64_t{1} << digit_bits;
  const Word mask = static_cast<Word>(digits - 1);
  const int64_t parts = std::clamp<int64_t>(kept_ / chunk, 1, threads_);
  histogram_.assign(parts * digits, 0);
  const auto for_each_part = [&](const auto& f) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) f(histogram_.data() + p * digits, kept_ * p / parts, kept_ * (p + 1) / parts);
    };
    if (parts > 1)
      parallel_for(parts, run);
    else
      run(0, 1);
  };
  for_each_part([&](uint32_t* counts, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++counts[(entries_[i].key >> shift) & mask];
  });
  uint32_t offset = 0;
  for (int64_t d = 0; d < digits; ++d)
    for (int64_t p = 0; p < parts; ++p) {
      const uint32_t count = histogram_[p * digits + d];
      histogram_[p * digits + d] = offset;
      offset += count;
    }
  for_each_part([&](uint32_t* offsets, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) spare_[offsets[(entries_[i].key >> shift) & mask]++] = entries_[i];
  });
  std::swap(entries_, spare_);
}

template <class T>
void SegmentSorter<T>::write_weights(Word* keys, int64_t n, const SegmentCounts<T>& counts) {
  if (counts.valid > 0 && counts.foreground == 0 && counts.largest < Key::infinity) {
    // All weight on the first of the largest errors. (None is found where all errors of a hinge are 0.)
    const int64_t first = std::find(keys, keys + n, counts.largest) - keys;
    std::fill_n(keys, n, Word(0));
    if (first < n) keys[first] = bit_cast<Word>(T(1));
    return;
  }
  const bool nan = counts.valid > 0 && counts.largest >= Key::infinity;
  const Word rest = nan ? bit_cast<Word>(std::numeric_limits<T>::quiet_NaN()) : Word(0);
  for_each_chunk(n, [&](int64_t, int64_t begin, int64_t end) { std::fill(keys + begin, keys + end, rest); });
  for_each_chunk(kept_, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) keys[entries_[i].payload & ~fg_bit] = entries_[i].key;
  });
}

}  // namespace veerloss
