// The first step of method "exact": keys of all errors, and what is known of the segments before they are sorted.
#pragma once

#include <utility>

#include "../registers.cuh"

namespace veerloss {

template <class T>
using KeyWord = typename ErrorKey<T>::Word;

// Of the segments of a row: valid pixels, and whether any target is out of range (the number of blocks with one).
struct RowCounts {
  int32_t valid, bad;
};

// What is known of the segments before they are sorted, [segments] but for the rows; zeros before.
template <class T>
struct SegmentTotals {
  using Key = ErrorKey<T>;

  int32_t* foreground;
  KeyWord<T>* reach;  // how far the least key of foreground lies below infinity
  int32_t* unranked;  // not 0: there is an error that is not a number, or infinite
  RowCounts* rows;    // [rows]
  int64_t classes;
  SegmentSelection selection;

  __device__ bool takes_part(int64_t segment) const {
    const auto c = static_cast<uint32_t>(segment) % static_cast<uint32_t>(classes);
    const RowCounts row = rows[static_cast<uint32_t>(segment) / static_cast<uint32_t>(classes)];
    return selection.takes_part(c, row.bad || row.valid > 0, row.bad || foreground[segment] > 0);
  }
  // Errors of smaller keys have no weight: those of background below all foreground, and of 0.
  __device__ KeyWord<T> least_key(int64_t segment) const {
    if (unranked[segment] || !takes_part(segment)) return Key::infinity + 1;
    const KeyWord<T> least = foreground[segment] ? Key::infinity - reach[segment] : 0;
    return least > 0 ? least : 1;
  }
};

// ---- keys

__device__ inline void atomic_max(uint32_t* at, uint32_t value) {
  atomicMax(at, value);
}
__device__ inline void atomic_max(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

// What a block finds out about the classes of a row, in shared memory or, of more classes than fit there, in memory at once.
template <class T>
struct ClassTotals {
  KeyWord<T>* reach;
  int32_t* foreground;

  __device__ void add(int64_t c, int32_t count, KeyWord<T> class_reach) const {
    atomicAdd(foreground + c, count);
    atomic_max(reach + c, class_reach);
  }
  static constexpr int64_t bytes_of_class = sizeof(KeyWord<T>) + sizeof(int32_t);
};

// Blocks on a multiprocessor: 128, 80 or 64 registers, none of which spills.
template <class In, class Range>
constexpr int keys_min_blocks = [] {
  if (std::is_same_v<In, double> || Range::most > 24 || Range::most == 0) return 2;
  return Range::most > 12 ? 3 : 4;
}();

// Range: a ClassRange for the softmax of so many classes, which are then read once; ManyClasses for more, and for other errors.
template <class In, Errors errors, class Range>
__global__ void __launch_bounds__(Tuning::ExactKeys::threads, keys_min_blocks<In, Range>)
    lovasz_keys_kernel(SegmentBatch batch, KeyWord<opmath_t<In>>* keys, SegmentTotals<opmath_t<In>> totals, PixelGrid grid,
                       bool count_in_shared) {
  using T = opmath_t<In>;
  using Key = ErrorKey<T>;
  using Word = KeyWord<T>;
  using Chunk = std::conditional_t<Range::most == 0, SomeClasses<In>, Range>;
  constexpr int threads = Tuning::ExactKeys::threads;
  constexpr bool is_softmax = errors == Errors::softmax, one_read = is_softmax && Range::most > 0;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ int32_t valid, bad;
  const auto [images, pixels] = std::pair(batch.geometry.images, batch.geometry.pixels);
  const auto classes = static_cast<int>(batch.classes());
  const auto [image, pixel, channel] = thread_pixel<threads>(grid, images, pixels);
  const int64_t row = batch.per_image ? image : 0, segment = row * classes;
  const ClassTotals<T> of_row{totals.reach + segment, totals.foreground + segment};
  ClassTotals<T> of_block = of_row;
  if (threadIdx.x == 0) valid = bad = 0;
  if (count_in_shared) {
    of_block = {reinterpret_cast<Word*>(memory), reinterpret_cast<int32_t*>(reinterpret_cast<Word*>(memory) + classes)};
    for (int c = threadIdx.x; c < classes; c += threads) of_block.reach[c] = 0, of_block.foreground[c] = 0;
  }
  __syncthreads();
  if (pixel >= 0) {
    const int32_t label = load_label(batch.target, batch.rule, image, pixel);
    const int32_t fg_class = errors == Errors::hinge ? (label == 1 ? 0 : -1) : label < classes ? label : -1;
    ClassPointer<In> logits(batch.logits, image, pixel);
    T values[Chunk::most];
    Softmax<T> softmax{T(0), T(0)};
    const AccurateExp exp_of;  // errors far below 1 are no better than it is
    if constexpr (one_read) {
      load_classes<Chunk>(values, logits, classes);
      softmax = softmax_in_place(values, exp_of);
    } else if constexpr (is_softmax) {
      softmax = softmax_of_many(logits, classes, exp_of);
    }
    const T inv_sumexp = softmax.inv_sumexp();
    const int64_t flat = images * pixels;
    Word* out = keys + image * pixels + pixel;
    // Errors without a rank, and those of bad targets, rank first; ignored pixels last: they count as errors of 0. A softmax
    // has a NaN in all classes or in none.
    const bool unranked = label == label_bad || (is_softmax && label != label_ignored && !(inv_sumexp == inv_sumexp));
    const Word keep = unranked || label == label_ignored ? 0 : ~Key::foreground, rest = unranked ? Key::infinity : 0;
    Word fg_key = Key::infinity;
    int first = 0;
    do {
      if constexpr (!one_read) {
        load_classes<Chunk>(values, logits, classes - first);
        logits.skip(Chunk::most);
      }
#pragma unroll
      for (int i = 0; i < Chunk::most; ++i, out += flat) {
        const int c = first + i;
        if (!Chunk::has(i, classes - first)) continue;
        const bool is_foreground = c == fg_class;
        Word key;
        if constexpr (is_softmax) {
          const T exp = one_read ? values[i] : exp_of(values[i] - softmax.max_logit);
          const auto e = softmax_error(exp, softmax.sumexp_excl_max, inv_sumexp, is_foreground);
          key = key_of_probability(e.error, e.complement);
        } else {
          key = key_of_error(signed_error(errors, values[i], is_foreground));
          if (!(key < Key::infinity)) {
            key = Key::infinity;
            if (label != label_ignored) totals.unranked[segment + c] = 1;
          }
        }
        key = (key & keep) | rest;
        if (is_foreground) fg_key = key;
        *out = key | (is_foreground ? Key::foreground : Word(0));
      }
    } while (!one_read && (first += Chunk::most) < classes);
    if (label != label_ignored) atomicAdd(&valid, 1);
    if (label == label_bad) atomicAdd(&bad, 1);
    if (label >= 0 && fg_class >= 0) of_block.add(fg_class, 1, Key::infinity - fg_key);
    if (unranked)
      for (int c = 0; c < classes; ++c) totals.unranked[segment + c] = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (valid) atomicAdd(&totals.rows[row].valid, valid);
    if (bad) atomicAdd(&totals.rows[row].bad, 1);
  }
  if (count_in_shared)
    for (int c = threadIdx.x; c < classes; c += threads)
      if (of_block.foreground[c]) of_row.add(c, of_block.foreground[c], of_block.reach[c]);
}

}  // namespace veerloss
