// A radix sort in parts: a tile of pairs, sorted in shared memory by a digit, and where its runs of equal digits go. exact.cu
// makes kernels of them.
//
// Threads communicate through shared memory and barriers only, and blocks through words of memory that each hold all there is
// to know: the emulator runs every line of it.
#pragma once

#include "../../math/jaccard.h"
#include "../device.cuh"
#include "../tuning.cuh"

namespace veerloss {

using SortPolicy = Tuning::ExactSort;

constexpr int digit_bits = 8, digits = 1 << digit_bits;
static_assert(SortPolicy::threads == digits);

// What is sorted, in ascending order of all bits but the top one: a key, complemented, and the mark of foreground at the top.
template <class Word>
struct SortWord {
  static constexpr Word foreground = Word(1) << (8 * sizeof(Word) - 1);
  static constexpr Word last = ~foreground;  // ranks behind all others
  static constexpr int passes = sizeof(Word), top_shift = 8 * (passes - 1);

  __device__ static Word of_key(Word marked_key) { return marked_key ^ ~foreground; }
  __device__ static Word key(Word word) { return ~word & ~foreground; }
  __device__ static bool is_foreground(Word word) { return (word & foreground) != 0; }
  // The top digit has a bit less.
  __device__ static uint32_t digit(Word word, int shift) {
    return static_cast<uint32_t>(word >> shift) & (shift == top_shift ? digits / 2 - 1 : digits - 1);
  }
};

// Exclusive prefix sum over the threads, in two levels of 16: four barriers.
class BlockScan {
 public:
  __device__ uint32_t operator()(uint32_t value, uint32_t* total) {
    const int t = static_cast<int>(threadIdx.x), group = t / width;
    values_[t + group] = value;
    __syncthreads();
    uint32_t sum = 0;
    if (t < width) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        uint32_t& at = values_[t * (width + 1) + i];
        const uint32_t v = at;
        at = sum;
        sum += v;
      }
      sums_[t] = sum;
    }
    __syncthreads();
    if (t < width) {
      uint32_t before = 0;
#pragma unroll
      for (int i = 0; i < width; ++i) before += i < t ? sums_[i] : 0;
      before_[t] = before;
      if (t == width - 1) before_[width] = before + sum;
    }
    __syncthreads();
    const uint32_t before = values_[t + group] + before_[group];
    *total = before_[width];
    __syncthreads();  // before the next use
    return before;
  }

 private:
  static constexpr int width = 16;
  static_assert(SortPolicy::threads == width * width);
  uint32_t values_[SortPolicy::threads + width];  // groups lie a word apart: no two in the same bank
  uint32_t sums_[width], before_[width + 1];
};

template <class Word>
struct alignas(2 * sizeof(Word)) Pair {
  Word word;
  uint32_t value;
};

// In shared memory: pairs, the items of thread t being those from t * items on.
//
// A pass takes 91 instructions for each pair in float32 on sm_90, and 25 barriers a tile; CUB's, which ranks by votes of a
// warp, some 100.
template <class Word>
class SortTile {
 public:
  static constexpr int threads = SortPolicy::threads;
  static constexpr int items = sizeof(Word) == 4 ? SortPolicy::items : SortPolicy::items_of_double;
  static constexpr int size = threads * items;

  Pair<Word> pairs[size];
  BlockScan scan;

  // Stable, by the digit at `shift`, in two rounds of 4 bits. A barrier precedes.
  __device__ void sort(int shift) {
    sort_by_nibble(shift, nibbles - 1);
    sort_by_nibble(shift + 4, shift == SortWord<Word>::top_shift ? nibbles / 2 - 1 : nibbles - 1);
  }

 private:
  static constexpr int nibbles = 16;

  // How many items a thread has of a nibble. A thread takes part in the prefix sum with a run of as many counters, two to a
  // word.
  alignas(16) uint16_t counters_[nibbles][threads];

  __device__ void sort_by_nibble(int shift, uint32_t mask) {
    const auto t = static_cast<int>(threadIdx.x);
    const auto counter = [&](Word word) -> uint16_t& { return counters_[static_cast<uint32_t>(word >> shift) & mask][t]; };
    Pair<Word> item[items];
    uint32_t ranks[ceil_div(items, 8)] = {};  // among the items of the thread and of the nibble: 4 bits each
#pragma unroll
    for (int n = 0; n < nibbles; ++n) counters_[n][t] = 0;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      item[i] = pairs[t * items + i];
      uint16_t& n = counter(item[i].word);
      ranks[i / 8] += static_cast<uint32_t>(n) << (4 * (i % 8));
      ++n;
    }
    __syncthreads();
    // Counters to the number of items that go before: of smaller nibbles, and of the same one in threads before.
    uint32_t run[nibbles / 2], sum = 0, total;
    std::memcpy(run, &counters_[0][0] + t * nibbles, sizeof(run));
#pragma unroll
    for (int i = 0; i < nibbles / 2; ++i) sum += run[i];
    uint32_t before = scan((sum & 0xffff) + (sum >> 16), &total);
#pragma unroll
    for (int i = 0; i < nibbles / 2; ++i) {
      const uint32_t low = run[i] << 16, both = run[i] + low;
      run[i] = before * 0x10001 + low;
      before += both >> 16;
    }
    std::memcpy(&counters_[0][0] + t * nibbles, run, sizeof(run));
    __syncthreads();
#pragma unroll
    for (int i = 0; i < items; ++i) pairs[counter(item[i].word) + (ranks[i / 8] >> (4 * (i % 8)) & 15)] = item[i];
    __syncthreads();
  }
};

// What a tile has of a digit, for the tiles behind it: 0 as long as nothing is known, else one more than its own count, or with
// the top bit the count up to its end. A word says all, so that no order of memory accesses matters. Count: a number of pairs
// below 2^31, in 32 bits, or with that of foreground in the high half of 64.
template <class Count>
class TileStates {
 public:
  // Of the thread's digit; `states`: [tiles, digits] of a segment.
  __device__ TileStates(Count* states, uint32_t tile)
      : state_(states + static_cast<int64_t>(tile) * digits + threadIdx.x), is_first_(tile == 0) {}

  // `first`: what goes before the first tile.
  __device__ void publish(Count own, Count first) const { *state_ = is_first_ ? to_end | (first + own) : own + 1; }

  // The count before this tile, but 0 for the first. Waits for the tiles before.
  __device__ Count look_back(Count own) const {
    if (is_first_) return 0;
    Count before = 0;
    for (const volatile Count* other = state_;;) {
      other -= digits;
      Count found;
      do found = *other;
      while (found == 0);
      before += found & to_end ? found & ~to_end : found - 1;
      if (found & to_end) break;
    }
    *state_ = to_end | (before + own);
    return before;
  }

 private:
  static constexpr Count to_end = Count(1) << (8 * sizeof(Count) - 1);

  volatile Count* const state_;
  const bool is_first_;
};

}  // namespace veerloss
