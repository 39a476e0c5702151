// The Lovász extension of one segment, exactly: partition its keys into buckets of like errors, then sort, rank and weigh each
// bucket while it is in cache.
//
// A background pixel whose error is below the smallest foreground error ranks after the last foreground pixel: its weight is 0,
// and it needs no sorting. The counts of the buckets give every bucket its first rank, so that buckets are independent. Results
// have the same bits for any number of threads: sorts are stable, counts are integers, and the buckets' sums are added in
// order.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "../../math/jaccard.h"
#include "../memory.h"
#include "../parallel.h"

namespace veerloss {

// What a segment holds. min_fg_key and max_key are error keys without the foreground bit.
template <class T>
struct SegmentCounts {
  int64_t valid = 0, foreground = 0;
  typename ErrorKey<T>::Word min_fg_key = ErrorKey<T>::ignored, max_key = 0;

  void add(const SegmentCounts& other) {
    valid += other.valid;
    foreground += other.foreground;
    min_fg_key = std::min(min_fg_key, other.min_fg_key);
    max_key = std::max(max_key, other.max_key);
  }
};

template <class T>
class SegmentSorter {
 public:
  using Key = ErrorKey<T>;
  using Word = typename Key::Word;

  // `threads` > 1 works on one long segment with all threads; else the caller runs many segments side by side.
  // `probabilities`: keys are those of key_of_probability, else of key_of_error.
  SegmentSorter(int64_t threads, bool probabilities) : threads_(threads), probabilities_(probabilities) {}

  // The loss of a segment of n keys. With `keep_weights` the keys are overwritten by the signed weights dL/dp: - on foreground,
  // + on background.
  double loss(Word* keys, int64_t n, const SegmentCounts<T>& counts, bool keep_weights) {
    if (counts.valid == 0) return constant(keys, n, T(0), keep_weights);
    if (counts.max_key >= Key::infinity) return constant(keys, n, std::numeric_limits<T>::quiet_NaN(), keep_weights);
    if (counts.foreground == 0) return all_on_max_error(keys, n, counts, keep_weights);
    partition(keys, n, counts);
    if (keep_weights) constant(keys, n, T(0), true);
    return weigh_buckets(keep_weights ? keys : nullptr, counts);
  }

 private:
  struct Entry {
    Word key;          // max_key - error key: ascending order is descending error
    uint32_t payload;  // foreground bit, pixel
  };
  static constexpr uint32_t fg_bit = 0x80000000u;

  // A bucket of 2048 entries, twice, is 32 KiB: it sorts in L1. At most 2048 buckets: more streams than that miss L1 in the
  // partition.
  static constexpr int64_t bucket_entries = 2048;
  static constexpr int max_bucket_bits = 11;
  static constexpr int max_digit_bits = 10;  // of a pass inside a bucket: 1024 counters beside 2048 entries

  struct Bucket {
    int64_t begin, fg_before;
  };

  template <class F>
  void for_each_part(int64_t parts, const F& f) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) f(p);
    };
    if (parts > 1)
      parallel_for(parts, run);
    else
      run(0, 1);
  }

  static std::unique_ptr<Entry[]> allocate(int64_t count) {
    auto entries = std::make_unique_for_overwrite<Entry[]>(count);
    advise_huge_pages(entries.get(), count * static_cast<int64_t>(sizeof(Entry)));
    return entries;
  }

  double error_of(Word key) const {
    return probabilities_ ? probability_of_key<T>(key) : static_cast<double>(bit_cast<T>(key));
  }

  double constant(Word* keys, int64_t n, T value, bool keep_weights) {
    const int64_t parts = n < bucket_entries ? 1 : threads_;
    if (keep_weights)
      for_each_part(parts,
                    [&](int64_t p) { std::fill(keys + n * p / parts, keys + n * (p + 1) / parts, bit_cast<Word>(value)); });
    return static_cast<double>(value);
  }

  // No foreground: all weight goes to the first of the largest errors. (None is found where all errors of a hinge are 0.)
  double all_on_max_error(Word* keys, int64_t n, const SegmentCounts<T>& counts, bool keep_weights) {
    if (keep_weights) {
      const int64_t first = std::find(keys, keys + n, counts.max_key) - keys;
      std::fill_n(keys, n, Word(0));
      if (first < n) keys[first] = bit_cast<Word>(T(1));
    }
    return error_of(counts.max_key);
  }

  void partition(const Word* keys, int64_t n, const SegmentCounts<T>& counts);
  double weigh_buckets(Word* weights, const SegmentCounts<T>& counts);
  const Entry* sort_bucket(Entry* entries, Entry* spare, int64_t count) const;
  double weigh(const Entry* sorted, int64_t count, int64_t fg, int64_t bg, const SegmentCounts<T>& counts, Word* weights) const;

  const int64_t threads_;
  const bool probabilities_;
  int shift_ = 0;  // key bits below the bucket's
  int64_t gathered_capacity_ = 0, capacity_ = 0;
  std::unique_ptr<Entry[]> gathered_, entries_;  // in the order of pixels, of buckets
  std::vector<Bucket> buckets_;                  // and an end
  std::vector<uint64_t> histogram_;              // [parts][buckets]: entries in the low half, foreground in the high half
};

template <class T>
void SegmentSorter<T>::partition(const Word* keys, int64_t n, const SegmentCounts<T>& counts) {
  const Word max_key = counts.max_key, min_key = counts.min_fg_key;
  const int bits = std::bit_width(static_cast<Word>(max_key - min_key));
  const int bucket_bits =
      std::min({bits, max_bucket_bits, static_cast<int>(std::bit_width(static_cast<uint64_t>(n / bucket_entries)))});
  const int shift = shift_ = bits - bucket_bits;
  const int64_t count = int64_t{1} << bucket_bits;
  const int64_t parts = n < bucket_entries ? 1 : threads_;
  // Gather the pixels that can have weight, each part from its first pixel's place on, and count them: without a branch on the
  // data.
  if (n > gathered_capacity_) {
    gathered_capacity_ = n;
    gathered_ = allocate(n);
  }
  histogram_.assign(parts * count, 0);
  std::vector<int64_t> sizes(parts);
  for_each_part(parts, [&](int64_t p) {
    constexpr int64_t block = 512;
    uint64_t* histogram = histogram_.data() + p * count;
    Entry* const out = gathered_.get() + n * p / parts;
    int64_t size = 0;
    for (int64_t begin = n * p / parts, end = n * (p + 1) / parts; begin < end; begin += block) {
      const int64_t before = size;
      for (int64_t i = begin; i < std::min(begin + block, end); ++i) {
        const Word key = keys[i], error = key & ~Key::foreground;
        out[size] = {static_cast<Word>(max_key - error), static_cast<uint32_t>(i) | (key >= Key::foreground ? fg_bit : 0u)};
        size += (error >= min_key) & (key != Key::ignored);
      }
      for (int64_t j = before; j < size; ++j)
        histogram[out[j].key >> shift] += 1 + (static_cast<uint64_t>(out[j].payload >> 31) << 32);
    }
    sizes[p] = size;
  });

  // (bucket, part) order: the partition is stable.
  buckets_.resize(count + 1);
  int64_t entries = 0, fg = 0;
  for (int64_t b = 0; b < count; ++b) {
    buckets_[b] = {entries, fg};
    for (int64_t p = 0; p < parts; ++p) {
      uint64_t& counter = histogram_[p * count + b];
      const uint64_t counted = std::exchange(counter, static_cast<uint64_t>(entries));
      entries += static_cast<uint32_t>(counted);
      fg += static_cast<int64_t>(counted >> 32);
    }
  }
  buckets_[count] = {entries, fg};
  if (entries > capacity_) {
    capacity_ = entries;
    entries_ = allocate(entries);
  }
  for_each_part(parts, [&](int64_t p) {
    uint64_t* offsets = histogram_.data() + p * count;
    const Entry* in = gathered_.get() + n * p / parts;
    Entry* out = entries_.get();
    for (int64_t j = 0; j < sizes[p]; ++j) out[offsets[in[j].key >> shift]++] = in[j];
  });
}

// Sorts, ranks and weighs every bucket; the sum of weight times error.
template <class T>
double SegmentSorter<T>::weigh_buckets(Word* weights, const SegmentCounts<T>& counts) {
  const int64_t count = static_cast<int64_t>(buckets_.size()) - 1;
  std::vector<double> sums(count, 0.0);
  std::atomic<int64_t> next{0};
  for_each_part(std::min(threads_, count), [&](int64_t) {
    std::unique_ptr<Entry[]> spare;
    int64_t spare_size = 0;
    for (int64_t b; (b = next++) < count;) {
      const auto [begin, fg] = buckets_[b];
      const int64_t size = buckets_[b + 1].begin - begin;
      if (size > spare_size) {
        spare_size = std::max(size, 2 * bucket_entries);
        spare = std::make_unique_for_overwrite<Entry[]>(spare_size);
      }
      const Entry* sorted = sort_bucket(entries_.get() + begin, spare.get(), size);
      sums[b] = weigh(sorted, size, fg, begin - fg, counts, weights);
    }
  });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

// Stable, ascending in the low shift_ bits, in which alone a bucket's keys differ. The result lies in either of the two
// buffers.
template <class T>
auto SegmentSorter<T>::sort_bucket(Entry* entries, Entry* spare, int64_t count) const -> const Entry* {
  if (count <= 24) {  // insertion
    for (int64_t i = 1; i < count; ++i) {
      const Entry entry = entries[i];
      int64_t j = i;
      for (; j > 0 && entries[j - 1].key > entry.key; --j) entries[j] = entries[j - 1];
      entries[j] = entry;
    }
    return entries;
  }
  const int passes = (shift_ + max_digit_bits - 1) / max_digit_bits;
  const int digit_bits = passes > 0 ? (shift_ + passes - 1) / passes : 0;
  const Word mask = (Word(1) << digit_bits) - 1;
  uint32_t offsets[1 << max_digit_bits];
  for (int shift = 0; shift < shift_; shift += digit_bits) {
    std::fill_n(offsets, mask + 1, 0u);
    for (int64_t i = 0; i < count; ++i) ++offsets[(entries[i].key >> shift) & mask];
    if (offsets[(entries[0].key >> shift) & mask] == count) continue;  // one digit for all: nothing to move
    uint32_t sum = 0;
    for (Word digit = 0; digit <= mask; ++digit) {
      sum += std::exchange(offsets[digit], sum);
    }
    for (int64_t i = 0; i < count; ++i) spare[offsets[(entries[i].key >> shift) & mask]++] = entries[i];
    std::swap(entries, spare);
  }
  return entries;
}

// The weights of a sorted bucket, fg and bg being the pixels ranked before it.
template <class T>
double SegmentSorter<T>::weigh(const Entry* sorted, int64_t count, int64_t fg, int64_t bg, const SegmentCounts<T>& counts,
                               Word* weights) const {
  double sum = 0;
  for (int64_t block = 0; block < count; block += 256) {  // blockwise, so that rounding does not grow with the bucket
    double part = 0;
    for (int64_t i = block; i < std::min(block + 256, count); ++i) {
      const bool is_fg = sorted[i].payload & fg_bit;
      const double weight = is_fg ? jaccard_fg_weight(counts.foreground, bg) : jaccard_bg_weight(counts.foreground, fg, bg);
      part += weight * error_of(static_cast<Word>(counts.max_key - sorted[i].key));
      if (weights) weights[sorted[i].payload & ~fg_bit] = bit_cast<Word>(static_cast<T>(is_fg ? -weight : weight));
      fg += is_fg;
      bg += !is_fg;
    }
    sum += part;
  }
  return sum;
}

}  // namespace veerloss
