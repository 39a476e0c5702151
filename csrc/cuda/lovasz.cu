// Lovász losses on a GPU, method "exact".
//
//   keys      a pixel's error in every class as an integer of the same order, [C, N, P]; foreground pixels are counted
//   sort      of a group of segments at a time, keys with the pixel's index (sort.cu)
//   ranks     foreground before each tile of sorted pixels, then before each pixel: the weight in closed form, which goes back
//             to the pixel, over the keys that are no longer needed
//   finish    the loss of the segments, and of the batch
//   backward  segments.cuh, with the weights as they are stored
//
// Beside the keys, which become the weights, memory for sorting one group. Every sum has a fixed order and sorts are stable:
// the same bits in every run. Nothing here has been tuned on a GPU.

#include "segments.cuh"

namespace veerloss {
namespace {

// ---- keys

constexpr int key_threads = 256;

// Of the segments of a row: pixels that are valid, and of them those whose target is out of range.
struct RowCounts {
  int32_t valid, bad;
};

template <class T>
__device__ inline typename ErrorKey<T>::Word marked(typename ErrorKey<T>::Word key, bool foreground, int32_t label) {
  using Key = ErrorKey<T>;
  if (label == label_ignored) return 0;  // ranks last, among the errors of 0, whose weight is 0 too
  const auto ranked = label == label_bad || !(key < Key::infinity) ? Key::infinity : key;
  return ranked | (foreground ? Key::foreground : typename Key::Word(0));
}

// foreground: [segments] and rows: [rows], both zero before.
template <class In, Errors errors>
__global__ void __launch_bounds__(key_threads)
    lovasz_keys_kernel(Batch b, typename ErrorKey<Arithmetic<In>>::Word* keys, int32_t* foreground, RowCounts* rows,
                       PixelGrid grid, bool count_in_shared) {
  using T = Arithmetic<In>;
  VEERLOSS_DYNAMIC_SHARED(memory);
  auto* own = reinterpret_cast<int32_t*>(memory);  // [classes]
  __shared__ int32_t valid, bad;
  const auto [image, pixel, channel] = pixel_place(grid, b.g.images, b.g.pixels, key_threads);
  const int64_t classes = b.g.channels, row = b.per_image ? image : 0;
  if (threadIdx.x == 0) valid = bad = 0;
  if (count_in_shared)
    for (int64_t c = threadIdx.x; c < classes; c += key_threads) own[c] = 0;
  __syncthreads();
  if (pixel >= 0) {
    const int32_t label = load_label(b, image, pixel);
    if (label != label_ignored) atomicAdd(&valid, 1);
    if (label == label_bad) atomicAdd(&bad, 1);
    const int64_t foreground_channel = errors == Errors::hinge ? (label == 1 ? 0 : -1) : label;
    if (label >= 0 && foreground_channel >= 0)
      atomicAdd(count_in_shared ? own + foreground_channel : foreground + row * classes + foreground_channel, 1);
    Softmax<T> softmax{T(0), T(0)};
    if constexpr (errors == Errors::softmax) softmax = softmax_of<In>(b, image, pixel);
    const T inverse_sum = softmax.inverse_sum();
    const int64_t flat = b.g.images * b.g.pixels, at = image * b.g.pixels + pixel;
    for (int64_t c = 0; c < classes; ++c) {
      const bool is_foreground = label == b.foreground(c);
      const T x = load_logit<In>(b, image, c, pixel);
      typename ErrorKey<T>::Word key;
      if constexpr (errors == Errors::softmax) {
        const auto e = softmax_error(softmax(x), softmax.rest, inverse_sum, is_foreground);
        key = key_of_probability(e.error, e.complement);
      } else {
        key = key_of_error(errors == Errors::hinge ? hinge_error(x, is_foreground) : probability_error(x, is_foreground));
      }
      keys[c * flat + at] = marked<T>(key, is_foreground, label);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (valid) atomicAdd(&rows[row].valid, valid);
    if (bad) atomicAdd(&rows[row].bad, 1);
  }
  if (count_in_shared)
    for (int64_t c = threadIdx.x; c < classes; c += key_threads)
      if (own[c]) atomicAdd(foreground + row * classes + c, own[c]);
}

// [segments, length] with each pixel's index in its segment.
__global__ void __launch_bounds__(key_threads) lovasz_index_kernel(uint32_t* index, int64_t length, int64_t parts) {
  const auto [segment, part, channel] = image_part(parts);
  const int64_t i = part * key_threads + threadIdx.x;
  if (i < length) index[segment * length + i] = static_cast<uint32_t>(i);
}

// ---- ranks

constexpr int rank_threads = 256, rank_items = 8;
constexpr int64_t rank_tile = rank_threads * rank_items;

// A group of sorted segments, [group, length]; segment k of the group is segment `first` + k in the order of the keys,
// [classes, rows].
template <class T>
struct SortedGroup {
  const typename ErrorKey<T>::Word* keys;
  const uint32_t* index;
  int64_t length, tiles, first, rows, classes;

  // In [rows, classes].
  __device__ int64_t segment(int64_t k) const { return (first + k) % rows * classes + (first + k) / rows; }
};

// Foreground in each tile, [group, tiles].
template <class T>
__global__ void __launch_bounds__(rank_threads) lovasz_tile_counts_kernel(SortedGroup<T> group, int32_t* in_tile) {
  __shared__ int32_t scratch[rank_threads];
  const auto [k, tile, channel] = image_part(group.tiles);
  const auto* keys = group.keys + k * group.length;
  int32_t fg = 0;
  for (int item = 0; item < rank_items; ++item) {
    const int64_t i = tile * rank_tile + item * rank_threads + threadIdx.x;
    if (i < group.length) fg += (keys[i] & ErrorKey<T>::foreground) != 0;
  }
  fg = block_sum<rank_threads>(fg, scratch);
  if (threadIdx.x == 0) in_tile[k * group.tiles + tile] = fg;
}

// From those to the foreground before each tile. One block per segment.
__global__ void __launch_bounds__(rank_threads) lovasz_tile_ranks_kernel(int32_t* in_tile, int64_t tiles) {
  __shared__ int32_t scratch[rank_threads];
  int32_t* own = in_tile + static_cast<int64_t>(blockIdx.x) * tiles;
  int32_t before = 0, all;
  for (int64_t base = 0; base < tiles; base += rank_threads) {
    const int64_t tile = base + threadIdx.x;
    const int32_t fg = tile < tiles ? own[tile] : 0;
    const int32_t rank = block_scan<rank_threads>(fg, scratch, &all);
    if (tile < tiles) own[tile] = before + rank;
    before += all;
  }
}

// tile_losses: [group, tiles]. weights: [classes, rows, length] of all segments, or null.
template <class T, bool probabilities>
__global__ void __launch_bounds__(rank_threads)
    lovasz_ranks_kernel(SortedGroup<T> group, const int32_t* foreground, const int32_t* before_tile, T* weights,
                        double* tile_losses) {
  using Key = ErrorKey<T>;
  using Word = typename Key::Word;
  __shared__ Word tile_keys[rank_tile];
  __shared__ int32_t ranks[rank_threads];
  __shared__ double scratch[rank_threads];
  const auto [k, tile, channel] = image_part(group.tiles);
  const Word* keys = group.keys + k * group.length;
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t base = tile * rank_tile, total = foreground[group.segment(k)];
  for (int item = 0; item < rank_items; ++item) {
    const int at = item * rank_threads + thread;
    tile_keys[at] = base + at < group.length ? keys[base + at] : Word(0);
  }
  __syncthreads();
  int32_t own = 0, all;
  for (int item = 0; item < rank_items; ++item) own += (tile_keys[thread * rank_items + item] & Key::foreground) != 0;
  int64_t fg = before_tile[k * group.tiles + tile] + block_scan<rank_threads>(own, ranks, &all);
  const bool nan = (keys[0] & ~Key::foreground) >= Key::infinity;
  double loss = 0;
  for (int item = 0; item < rank_items; ++item) {
    const int at = thread * rank_items + item;
    const int64_t rank = base + at, bg = rank - fg;
    if (rank >= group.length) break;
    const Word key = tile_keys[at] & ~Key::foreground;
    const bool is_foreground = (tile_keys[at] & Key::foreground) != 0;
    double weight = 0;
    if (key != 0) {
      if (total == 0)
        weight = rank == 0 ? 1.0 : 0.0;
      else
        weight = is_foreground ? jaccard_fg_weight(total, bg) : jaccard_bg_weight(total, fg, bg);
      loss += weight * (probabilities ? probability_of_key<T>(key) : static_cast<double>(bit_cast<T>(key)));
      if (nan) weight = static_cast<double>(bit_cast<T>(Word(Key::infinity | (Key::infinity >> 1))));
    }
    if (weights)
      weights[(group.first + k) * group.length + group.index[k * group.length + rank]] =
          static_cast<T>(is_foreground ? -weight : weight);
    fg += is_foreground;
  }
  loss = block_sum<rank_threads>(loss, scratch);
  if (threadIdx.x == 0) tile_losses[k * group.tiles + tile] = nan ? static_cast<double>(bit_cast<float>(0x7fc00000u)) : loss;
}

// One block per segment of a group.
template <class T>
__global__ void __launch_bounds__(rank_threads)
    lovasz_segment_kernel(SortedGroup<T> group, const double* tile_losses, const int32_t* foreground, RowCounts* rows,
                          Selection selection, SegmentResult* results, int32_t* in_mean) {
  __shared__ double scratch[rank_threads];
  const int64_t k = blockIdx.x, segment = group.segment(k), row = segment / group.classes;
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < group.tiles; tile += rank_threads) loss += tile_losses[k * group.tiles + tile];
  loss = block_sum<rank_threads>(loss, scratch);
  if (threadIdx.x != 0) return;
  const bool part = takes_part(selection, segment % group.classes, rows[row].valid > 0, foreground[segment] > 0, rows[row].bad);
  results[segment] = {loss, 0.0, 0.0, 0.0, part};
  if (part) atomicAdd(in_mean + row, 1);
}

// ---- the gradient

// Weights [C, N, P] of a forward pass.
template <class T>
struct StoredWeights {
  using Value = T;
  const T* weights;

  __device__ T operator()(const Batch& b, int64_t image, int64_t pixel, int64_t c, int32_t, T) const {
    return weights[(c * b.g.images + image) * b.g.pixels + pixel];
  }
};

// ---- scratch memory

// One radix sort of a long segment fills a GPU; of short ones, a segmented sort takes as many as a group holds, with one block
// for each: where they are fewer than multiprocessors, segments count as long from 2^15 on. (Not measured.)
constexpr int64_t long_segment = 1 << 18, long_of_few = 1 << 15, group_pixels = 1 << 24;

// Takes pieces of memory, or adds up their sizes where there is none.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class P>
  P* take(int64_t count) {
    P* piece = memory_ ? reinterpret_cast<P*>(memory_ + used_) : nullptr;
    used_ += divide_up(count * static_cast<int64_t>(sizeof(P)), 256) * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class T>
struct Scratch {
  using Word = typename ErrorKey<T>::Word;

  Scratch(const Batch& b, void* memory) {
    Pieces pieces(memory);
    const int64_t length = b.length() > 0 ? b.length() : 1;
    const bool few = b.segments() < multiprocessors();
    group = b.length() >= (few ? long_of_few : long_segment) ? 1 : group_pixels / length;
    if (group > b.segments()) group = b.segments();
    tiles = divide_up(b.length(), rank_tile);
    foreground = pieces.take<int32_t>(b.segments());
    rows = pieces.take<RowCounts>(b.rows());
    in_mean = pieces.take<int32_t>(b.rows());
    zeroed = pieces.used();
    results = pieces.take<SegmentResult>(b.segments());
    sorted = pieces.take<Word>(group * b.length());
    index = pieces.take<uint32_t>(group * b.length());
    sorted_index = pieces.take<uint32_t>(group * b.length());
    in_tile = pieces.take<int32_t>(group * tiles);
    tile_losses = pieces.take<double>(group * tiles);
    sort_bytes = sort_pairs(nullptr, 0, sizeof(T) == 8, nullptr, nullptr, nullptr, nullptr, b.length(), group, 0, nullptr);
    sort = pieces.take<char>(static_cast<int64_t>(sort_bytes));
    bytes = pieces.used();
  }

  int64_t group, tiles, zeroed, bytes;
  size_t sort_bytes;
  int32_t *foreground, *in_mean, *in_tile;
  RowCounts* rows;
  SegmentResult* results;
  Word* sorted;
  uint32_t *index, *sorted_index;
  double* tile_losses;
  char* sort;
};

template <class In, Errors errors>
void forward(const Batch& b, const Selection& selection, const LossOutput& out, void* words, bool keep, void* memory,
             cudaStream_t stream) {
  using T = Arithmetic<In>;
  using Word = typename ErrorKey<T>::Word;
  const Scratch<T> s(b, memory);
  auto* keys = static_cast<Word*>(words);
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(s.zeroed), stream), "memset");
  const PixelGrid grid = pixel_grid(b, b.g.pixels, key_threads, !b.per_image);  // a block counts for one row
  const bool count_in_shared = b.g.channels <= 8192;
  launch(lovasz_keys_kernel<In, errors>, grid.blocks, key_threads, count_in_shared ? static_cast<size_t>(4 * b.g.channels) : 0,
         stream, b, keys, s.foreground, s.rows, grid, count_in_shared);
  const int64_t index_parts = divide_up(b.length(), key_threads);
  launch(lovasz_index_kernel, s.group * index_parts, key_threads, 0, stream, s.index, b.length(), index_parts);
  for (int64_t first = 0; first < b.segments(); first += s.group) {
    const int64_t group = first + s.group < b.segments() ? s.group : b.segments() - first;
    Word* own = keys + first * b.length();
    if (b.length() > 0)
      sort_pairs(s.sort, s.sort_bytes, sizeof(T) == 8, own, s.sorted, s.index, s.sorted_index, b.length(), group,
                 8 * static_cast<int>(sizeof(T)) - 1, stream);
    const SortedGroup<T> sorted{s.sorted, s.sorted_index, b.length(), s.tiles, first, b.rows(), b.g.channels};
    launch(lovasz_tile_counts_kernel<T>, group * s.tiles, rank_threads, 0, stream, sorted, s.in_tile);
    launch(lovasz_tile_ranks_kernel, s.tiles > 0 ? group : 0, rank_threads, 0, stream, s.in_tile, s.tiles);
    launch(lovasz_ranks_kernel<T, errors == Errors::softmax>, group * s.tiles, rank_threads, 0, stream, sorted,
           static_cast<const int32_t*>(s.foreground), static_cast<const int32_t*>(s.in_tile),
           keep ? static_cast<T*>(words) : nullptr, s.tile_losses);
    launch(lovasz_segment_kernel<T>, group, rank_threads, 0, stream, sorted, static_cast<const double*>(s.tile_losses),
           static_cast<const int32_t*>(s.foreground), s.rows, selection, s.results, s.in_mean);
  }
  launch(lovasz_finish_kernel<T>, 1, finish_threads, 0, stream, static_cast<const SegmentResult*>(s.results),
         static_cast<const int32_t*>(s.in_mean), b.rows(), b.g.channels, selection, out);
}

}  // namespace

// ---- launches

int64_t lovasz_scratch_bytes(const Batch& b, bool wide) {
  return wide ? Scratch<double>(b, nullptr).bytes : Scratch<float>(b, nullptr).bytes;
}

void launch_lovasz_forward(const Batch& b, const Selection& selection, const LossOutput& out, void* keys, bool keep,
                           void* scratch, cudaStream_t stream) {
  with_element_type(b.x.dtype, [&](auto zero) {
    using In = decltype(zero);
    if (b.errors == Errors::softmax)
      forward<In, Errors::softmax>(b, selection, out, keys, keep, scratch, stream);
    else if (b.errors == Errors::probabilities)
      forward<In, Errors::probabilities>(b, selection, out, keys, keep, scratch, stream);
    else
      forward<In, Errors::hinge>(b, selection, out, keys, keep, scratch, stream);
  });
}

void launch_lovasz_backward(const Batch& b, const Factors& factors, const void* weights, const View& grad_logits,
                            cudaStream_t stream) {
  if (b.x.dtype == DType::f64)
    launch_gradient(b, factors, StoredWeights<double>{static_cast<const double*>(weights)}, grad_logits, stream);
  else
    launch_gradient(b, factors, StoredWeights<float>{static_cast<const float*>(weights)}, grad_logits, stream);
}

}  // namespace veerloss
