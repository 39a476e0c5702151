// The sort of method "exact", and the weights: kernels for a group of segments.
#pragma once

#include "exact_keys.cuh"
#include "sort.cuh"

namespace veerloss {

// ---- a group of segments: count, sort, weigh

// Pairs of a digit before a place in a segment, and with foreground in the high half.
using Place = uint32_t;
using RankedPlace = uint64_t;

// Segment k of the group is segment `first` + k in the order of the keys, [classes, rows].
template <class T>
struct SortGroup {
  using Word = KeyWord<T>;
  using Sort = SortWord<Word>;
  static constexpr int counted = Sort::passes + 1;

  const Word* keys;        // [group, length]
  T* weights;              // in the same place, or null
  Pair<Word>* buffers[2];  // [group, length]: the pass of digit i writes to buffer i % 2
  int64_t segments, length, tiles, rows, first = 0;
  SegmentTotals<T> totals;
  uint32_t* sorted;     // [group]: how many pixels of a segment are sorted; zeros before
  uint32_t* counts;     // [group, counted, digits]: pixels of a digit, and foreground of the top digit; zeros before
  uint32_t* tickets;    // [passes]; zeros before
  Place* states;        // [passes - 1, group, tiles, digits]; zeros before
  RankedPlace* ranked;  // [group, tiles, digits]; zeros before
  double* tile_losses;  // [group, tiles]

  // In the order of tensors of one value per segment, [rows, classes].
  __device__ int64_t segment(int64_t k) const {
    const auto of_keys = static_cast<uint32_t>(first + k), n = static_cast<uint32_t>(rows);
    return of_keys % n * totals.classes + of_keys / n;
  }
};

// What a block works on.
template <class Word>
struct Tile {
  uint32_t k, tile;
  int64_t segment;
  Word least_key;
};

// Tiles in the order in which blocks start, so that those which a block waits for (TileState) never wait for it.
template <class T>
__device__ inline Tile<KeyWord<T>> next_tile(const SortGroup<T>& group, int pass) {
  __shared__ Tile<KeyWord<T>> tile;
  if (threadIdx.x == 0) {
    const uint32_t ticket = atomicAdd(group.tickets + pass, 1u), tiles = static_cast<uint32_t>(group.tiles);
    tile.k = ticket / tiles;
    tile.tile = ticket % tiles;
    tile.segment = group.segment(tile.k);
    tile.least_key = pass == 0 ? group.totals.least_key(tile.segment) : 0;
  }
  __syncthreads();
  return tile;
}

template <class T>
__global__ void __launch_bounds__(SortPolicy::threads) lovasz_digits_kernel(SortGroup<T> group, int64_t chunks) {
  using Sort = SortWord<KeyWord<T>>;
  constexpr int threads = SortPolicy::threads, counted = SortGroup<T>::counted;
  __shared__ uint32_t counts[counted][digits], sorted;
  const auto [k, chunk, channel] = image_part(chunks);
  const auto t = static_cast<int>(threadIdx.x);
  const KeyWord<T> least_key = group.totals.least_key(group.segment(k));
  if (least_key > ErrorKey<T>::infinity) return;  // none has a larger key
  for (int i = 0; i < counted; ++i) counts[i][t] = 0;
  if (t == 0) sorted = 0;
  __syncthreads();
  const KeyWord<T>* const keys = group.keys + k * group.length;
  const int64_t begin = chunk * SortPolicy::chunk, left = group.length - begin;
  uint32_t count = 0;
#pragma unroll 4
  for (int64_t i = t; i < (left < SortPolicy::chunk ? left : SortPolicy::chunk); i += threads) {
    const KeyWord<T> key = keys[begin + i], word = Sort::of_key(key);
    if ((key & ~Sort::foreground) < least_key) continue;
    ++count;
#pragma unroll
    for (int pass = 0; pass < Sort::passes; ++pass) atomicAdd(&counts[pass][Sort::digit(word, digit_bits * pass)], 1u);
    if (Sort::is_foreground(word)) atomicAdd(&counts[Sort::passes][Sort::digit(word, Sort::top_shift)], 1u);
  }
  atomicAdd(&sorted, count);
  __syncthreads();
  for (int i = 0; i < counted; ++i)
    if (counts[i][t]) atomicAdd(group.counts + (k * counted + i) * digits + t, counts[i][t]);
  if (t == 0 && sorted) atomicAdd(group.sorted + k, sorted);
}

// Reads the pairs of a tile behind the first digit's pass, and counts digits. Returns how many there are.
template <class T, class F>
__device__ inline void load_pairs(SortTile<KeyWord<T>>& tile, const Pair<KeyWord<T>>* in, int64_t count, const F& each) {
  using Shared = SortTile<KeyWord<T>>;
#pragma unroll
  for (int i = 0; i < Shared::items; ++i) {
    const int j = i * Shared::threads + static_cast<int>(threadIdx.x);
    Pair<KeyWord<T>> pair{SortWord<KeyWord<T>>::last, 0};
    if (j < count) {
      pair = in[j];
      each(pair.word);
    }
    tile.pairs[j] = pair;
  }
}

// Reads keys, takes those that are to be sorted, and writes the weights of the others.
template <class T, class F>
__device__ inline int load_keys(SortTile<KeyWord<T>>& tile, const SortGroup<T>& group, const Tile<KeyWord<T>>& at,
                                const F& each) {
  using Word = KeyWord<T>;
  using Sort = SortWord<Word>;
  using Shared = SortTile<Word>;
  constexpr int items = Shared::items;
  const auto t = static_cast<int>(threadIdx.x);
  const int64_t in_segment = static_cast<int64_t>(at.tile) * Shared::size, left = group.length - in_segment;
  const int64_t begin = at.k * group.length + in_segment;
  const bool nan = group.totals.unranked[at.segment];
#pragma unroll 5
  for (int i = 0; i < items; ++i) {
    const int j = i * Shared::threads + t;
    const Word marked = j < left ? group.keys[begin + j] : 0, key = marked & ~Sort::foreground;
    tile.pairs[j].word = marked;
    if (group.weights && j < left && key < at.least_key)
      group.weights[begin + j] = static_cast<T>(nan && key != 0 ? not_a_number : 0.0);
  }
  __syncthreads();
  Word marked[items];
  uint32_t kept = 0, total;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    marked[i] = tile.pairs[t * items + i].word;
    kept += (marked[i] & ~Sort::foreground) >= at.least_key;
  }
  auto to = static_cast<int>(tile.scan(kept, &total));
#pragma unroll
  for (int i = 0; i < items; ++i) {
    if ((marked[i] & ~Sort::foreground) < at.least_key) continue;
    const Word word = Sort::of_key(marked[i]);
    tile.pairs[to++] = {word, static_cast<uint32_t>(in_segment) + t * items + i};
    each(word);
  }
  for (int j = static_cast<int>(total) + t; j < Shared::size; j += Shared::threads) tile.pairs[j] = {Sort::last, 0};
  return static_cast<int>(total);
}

template <class T>
constexpr int sort_min_blocks = sizeof(T) == 4 ? SortPolicy::min_blocks : SortPolicy::min_blocks_of_double;

// Of a digit but the top one: from the keys if it is the first, else from the other buffer.
template <class T, bool first>
__global__ void __launch_bounds__(SortPolicy::threads, sort_min_blocks<T>) lovasz_sort_kernel(SortGroup<T> group, int pass) {
  using Word = KeyWord<T>;
  using Sort = SortWord<Word>;
  using Shared = SortTile<Word>;
  __shared__ Shared tile;
  __shared__ Place counts[digits], offsets[digits];  // of digits in the tile; from a place in the tile to that in the segment
  const auto t = static_cast<int>(threadIdx.x);
  const int shift = first ? 0 : digit_bits * pass;
  counts[t] = 0;
  const auto at = next_tile(group, pass);
  const int64_t segment_begin = at.k * group.length, in_segment = static_cast<int64_t>(at.tile) * Shared::size;
  const auto count_digit = [&](Word word) { atomicAdd(&counts[Sort::digit(word, shift)], 1u); };
  int64_t count;
  if constexpr (first) {
    count = load_keys(tile, group, at, count_digit);
  } else {
    count = group.sorted[at.k] - in_segment;
    if (count <= 0) return;
    load_pairs<T>(tile, group.buffers[(pass + 1) % 2] + segment_begin + in_segment, count, count_digit);
  }
  __syncthreads();
  uint32_t before = 0, total;
  if (at.tile == 0) before = tile.scan(group.counts[(at.k * group.counted + pass) * digits + t], &total);
  const Place own = counts[t];
  const TileStates<Place> states(group.states + (pass * group.segments + at.k) * group.tiles * digits, at.tile);
  states.publish(own, before);
  offsets[t] = before - tile.scan(own, &total);
  tile.sort(shift);
  offsets[t] += states.look_back(own);
  __syncthreads();
  Pair<Word>* const out = group.buffers[first ? 0 : pass % 2] + segment_begin;
#pragma unroll
  for (int i = 0; i < Shared::items; ++i) {
    const int j = i * Shared::threads + t;
    if (j >= count) break;
    const Pair<Word> pair = tile.pairs[j];
    out[offsets[Sort::digit(pair.word, shift)] + j] = pair;
  }
}

// Of the top digit.
template <class T, bool probabilities>
__global__ void __launch_bounds__(SortPolicy::threads, sort_min_blocks<T>) lovasz_weigh_kernel(SortGroup<T> group) {
  using Word = KeyWord<T>;
  using Sort = SortWord<Word>;
  using Shared = SortTile<Word>;
  constexpr int threads = SortPolicy::threads, items = Shared::items, pass = Sort::passes - 1;
  constexpr RankedPlace one_fg = RankedPlace(1) << 32;
  __shared__ Shared tile;
  __shared__ uint32_t counts[digits], fg_counts[digits];
  __shared__ RankedPlace offsets[digits];
  __shared__ double loss_scratch[threads];
  const auto t = static_cast<int>(threadIdx.x);
  counts[t] = fg_counts[t] = 0;
  const auto at = next_tile(group, pass);
  const int64_t segment_begin = at.k * group.length, in_segment = static_cast<int64_t>(at.tile) * Shared::size;
  const int64_t count = group.sorted[at.k] - in_segment;
  if (count <= 0) return;
  load_pairs<T>(tile, group.buffers[(pass + 1) % 2] + segment_begin + in_segment, count, [&](Word word) {
    const uint32_t digit = Sort::digit(word, Sort::top_shift);
    atomicAdd(&counts[digit], 1u);
    if (Sort::is_foreground(word)) atomicAdd(&fg_counts[digit], 1u);
  });
  __syncthreads();
  RankedPlace before = 0;
  uint32_t total;
  if (at.tile == 0) {
    const uint32_t* const of_segment = group.counts + (at.k * group.counted + pass) * digits + t;
    before = tile.scan(of_segment[0], &total);
    before += one_fg * tile.scan(of_segment[digits], &total);
  }
  const auto own = [&] { return counts[t] + one_fg * fg_counts[t]; };
  const TileStates<RankedPlace> states(group.ranked + at.k * group.tiles * digits, at.tile);
  states.publish(own(), before);
  const uint32_t in_tile = tile.scan(counts[t] + (fg_counts[t] << 16), &total);
  offsets[t] = before - ((in_tile & 0xffff) + one_fg * (in_tile >> 16));
  tile.sort(Sort::top_shift);
  offsets[t] += states.look_back(own());
  uint32_t fg = 0;
#pragma unroll
  for (int i = 0; i < items; ++i) {
    const int j = t * items + i;
    fg += j < count && Sort::is_foreground(tile.pairs[j].word);
  }
  RankedPlace place = t * items + one_fg * tile.scan(fg, &total);
  const int64_t all_foreground = group.totals.foreground[at.segment];
  T* const weights = group.weights ? group.weights + segment_begin : nullptr;
  double loss = 0;
#pragma unroll 3
  for (int i = 0; i < items; ++i) {
    const int j = t * items + i;
    if (j >= count) break;
    const Pair<Word> pair = tile.pairs[j];
    const bool is_foreground = Sort::is_foreground(pair.word);
    const RankedPlace in_order = offsets[Sort::digit(pair.word, Sort::top_shift)] + place;
    const int64_t rank = static_cast<uint32_t>(in_order), rank_fg = in_order >> 32;
    double weight;
    if (all_foreground == 0)
      weight = rank == 0 ? 1.0 : 0.0;
    else
      weight = jaccard_weight(all_foreground, rank_fg, rank - rank_fg, is_foreground);
    const Word key = Sort::key(pair.word);
    loss += weight * (probabilities ? probability_of_key<T>(key) : static_cast<double>(bit_cast<T>(key)));
    if (weights) weights[pair.value] = static_cast<T>(is_foreground ? -weight : weight);
    place += 1 + (is_foreground ? one_fg : 0);
  }
  loss = block_sum<threads>(loss, loss_scratch);
  if (t == 0) group.tile_losses[at.k * group.tiles + at.tile] = loss;
}

}  // namespace veerloss
