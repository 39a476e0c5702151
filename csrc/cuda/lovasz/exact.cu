// Lovász losses on a GPU, method "exact": kernels::lovasz_exact_forward and _backward of kernels.h.
//
//   keys      the error of every pixel in every class as an integer of the same order, [C, N, P]; foreground is counted
//   sort      the keys of a group of segments, each with the index of its pixel (sort.h)
//   ranks     the foreground before each tile of sorted pixels, then before each pixel: the weight in closed form, which is
//             written to the pixel, over the keys: they have been sorted into other memory
//   finish    the losses of the segments, and of the batch (segments.cuh)
//   backward  gradient.cuh, with stored weights
//
// Besides the keys, which become the weights, there is memory to sort one group. Every sum has a fixed order and sorts are
// stable: the results are the same bits in every run.

#include "../gradient.cuh"
#include "segments.cuh"
#include "sort.h"

namespace veerloss {
namespace {

// ---- keys

// Of the segments of a row: valid pixels, and whether any target is out of range (the number of blocks with one).
struct RowCounts {
  int32_t valid, bad;
};

template <class T>
using KeyWord = typename ErrorKey<T>::Word;

// The key with the mark of foreground. Pixels without an error rank first, ignored ones last: they count as errors of 0, whose
// weight is 0.
template <class T>
__device__ inline KeyWord<T> mark_key(KeyWord<T> key, bool foreground, int32_t label) {
  using Key = ErrorKey<T>;
  if (label == label_ignored) return 0;
  const auto ranked = label == label_bad || !(key < Key::infinity) ? Key::infinity : key;
  return ranked | (foreground ? Key::foreground : KeyWord<T>(0));
}

template <class T>
struct Keys {
  KeyWord<T>* keys;     // [C, N, P]
  int32_t* foreground;  // [segments], zeros before
  RowCounts* rows;      // [rows], zeros before
};

// count_in_shared: the block has 4 bytes of dynamic shared memory for each class.
template <class In, Errors errors>
__global__ void __launch_bounds__(Tuning::ExactKeys::threads)
    lovasz_keys_kernel(LovaszBatch batch, Keys<opmath_t<In>> out, PixelGrid grid, bool count_in_shared) {
  using T = opmath_t<In>;
  constexpr int threads = Tuning::ExactKeys::threads;
  VEERLOSS_DYNAMIC_SHARED(memory);
  auto* block_foreground = reinterpret_cast<int32_t*>(memory);  // [classes]
  __shared__ int32_t valid, bad;
  const auto [images, classes, pixels] = batch.geometry;
  const auto [image, pixel, channel] = thread_pixel<threads>(grid, images, pixels);
  const int64_t row = batch.per_image ? image : 0;
  if (threadIdx.x == 0) valid = bad = 0;
  if (count_in_shared)
    for (int64_t c = threadIdx.x; c < classes; c += threads) block_foreground[c] = 0;
  __syncthreads();
  if (pixel >= 0) {
    const int32_t label = load_label(batch.target, batch.rule, image, pixel);
    if (label != label_ignored) atomicAdd(&valid, 1);
    if (label == label_bad) atomicAdd(&bad, 1);
    const int64_t foreground_class = errors == Errors::hinge ? (label == 1 ? 0 : -1) : label == label_background ? -1 : label;
    if (label >= 0 && foreground_class >= 0)
      atomicAdd((count_in_shared ? block_foreground : out.foreground + row * classes) + foreground_class, 1);
    Softmax<T> softmax{T(0), T(0)};
    if constexpr (errors == Errors::softmax) softmax = softmax_of_pixel<In>(batch.logits, classes, image, pixel);
    const T inv_sumexp = softmax.inv_sumexp();
    const int64_t flat = images * pixels, i = image * pixels + pixel;
    for (int64_t c = 0; c < classes; ++c) {
      const bool is_foreground = label == batch.foreground(c);
      const T x = load<In>(batch.logits, image, c, pixel);
      KeyWord<T> key;
      if constexpr (errors == Errors::softmax) {
        const auto e = softmax_error(softmax.exp_of(x), softmax.sumexp_excl_max, inv_sumexp, is_foreground);
        key = key_of_probability(e.error, e.complement);
      } else {
        key = key_of_error(signed_error(errors, x, is_foreground));
      }
      out.keys[c * flat + i] = mark_key<T>(key, is_foreground, label);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (valid) atomicAdd(&out.rows[row].valid, valid);
    if (bad) atomicAdd(&out.rows[row].bad, 1);
  }
  if (count_in_shared)
    for (int64_t c = threadIdx.x; c < classes; c += threads)
      if (block_foreground[c]) atomicAdd(out.foreground + row * classes + c, block_foreground[c]);
}

// [segments, length]: the index of each pixel in its segment.
__global__ void __launch_bounds__(Tuning::ExactKeys::threads)
    lovasz_index_kernel(uint32_t* index, int64_t length, int64_t parts) {
  const auto [segment, part, channel] = image_part(parts);
  const int64_t i = part * Tuning::ExactKeys::threads + threadIdx.x;
  if (i < length) index[segment * length + i] = static_cast<uint32_t>(i);
}

// ---- ranks

using RanksPolicy = Tuning::ExactRanks;

// A group of sorted segments, [group, length]. Segment k of the group is segment `first` + k in the order of the keys,
// [classes, rows].
template <class T>
struct SortedGroup {
  const KeyWord<T>* keys;
  const uint32_t* index;
  int64_t length, tiles, first, rows, classes;

  // In the order of tensors of one value per segment, [rows, classes].
  __device__ int64_t segment(int64_t k) const { return (first + k) % rows * classes + (first + k) / rows; }
};

// tile_foreground: [group, tiles], the foreground in each tile.
template <class T>
__global__ void __launch_bounds__(RanksPolicy::threads)
    lovasz_tile_counts_kernel(SortedGroup<T> group, int32_t* tile_foreground) {
  __shared__ int32_t scratch[RanksPolicy::threads];
  const auto [k, tile, channel] = image_part(group.tiles);
  const auto* keys = group.keys + k * group.length;
  int32_t fg = 0;
  for (int item = 0; item < RanksPolicy::items; ++item) {
    const int64_t i = tile * RanksPolicy::tile + item * RanksPolicy::threads + threadIdx.x;
    if (i < group.length) fg += (keys[i] & ErrorKey<T>::foreground) != 0;
  }
  fg = block_sum<RanksPolicy::threads>(fg, scratch);
  if (threadIdx.x == 0) tile_foreground[k * group.tiles + tile] = fg;
}

// foreground_before: [group, tiles], the foreground in the tiles before each. One block for each segment.
__global__ void __launch_bounds__(RanksPolicy::threads)
    lovasz_tile_ranks_kernel(const int32_t* tile_foreground, int32_t* foreground_before, int64_t tiles) {
  __shared__ int32_t scratch[RanksPolicy::threads];
  const int64_t segment_begin = static_cast<int64_t>(blockIdx.x) * tiles;
  int32_t before = 0, total;
  for (int64_t base = 0; base < tiles; base += RanksPolicy::threads) {
    const int64_t tile = base + threadIdx.x;
    const int32_t fg = tile < tiles ? tile_foreground[segment_begin + tile] : 0;
    const int32_t rank = block_scan<RanksPolicy::threads>(fg, scratch, &total);
    if (tile < tiles) foreground_before[segment_begin + tile] = before + rank;
    before += total;
  }
}

// weights: [classes, rows, length] of all segments, or null. tile_losses: [group, tiles].
template <class T, bool probabilities>
__global__ void __launch_bounds__(RanksPolicy::threads)
    lovasz_ranks_kernel(SortedGroup<T> group, const int32_t* foreground, const int32_t* foreground_before, T* weights,
                        double* tile_losses) {
  using Key = ErrorKey<T>;
  using Word = KeyWord<T>;
  __shared__ Word tile_keys[RanksPolicy::tile];
  __shared__ int32_t scan_scratch[RanksPolicy::threads];
  __shared__ double sum_scratch[RanksPolicy::threads];
  const auto [k, tile, channel] = image_part(group.tiles);
  const Word* keys = group.keys + k * group.length;
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t base = tile * RanksPolicy::tile, total = foreground[group.segment(k)];
  for (int item = 0; item < RanksPolicy::items; ++item) {
    const int i = item * RanksPolicy::threads + thread;
    tile_keys[i] = base + i < group.length ? keys[base + i] : Word(0);
  }
  __syncthreads();
  // Each thread has neighbouring pixels.
  int32_t thread_foreground = 0, tile_foreground;
  for (int item = 0; item < RanksPolicy::items; ++item)
    thread_foreground += (tile_keys[thread * RanksPolicy::items + item] & Key::foreground) != 0;
  int64_t fg = foreground_before[k * group.tiles + tile] +
               block_scan<RanksPolicy::threads>(thread_foreground, scan_scratch, &tile_foreground);
  const bool nan = (keys[0] & ~Key::foreground) >= Key::infinity;
  double loss = 0;
  for (int item = 0; item < RanksPolicy::items; ++item) {
    const int i = thread * RanksPolicy::items + item;
    const int64_t rank = base + i, bg = rank - fg;
    if (rank >= group.length) break;
    const Word key = tile_keys[i] & ~Key::foreground;
    const bool is_foreground = (tile_keys[i] & Key::foreground) != 0;
    double weight = 0;
    if (key != 0) {
      if (total == 0)
        weight = rank == 0 ? 1.0 : 0.0;
      else
        weight = is_foreground ? jaccard_fg_weight(total, bg) : jaccard_bg_weight(total, fg, bg);
      loss += weight * (probabilities ? probability_of_key<T>(key) : static_cast<double>(bit_cast<T>(key)));
      if (nan) weight = not_a_number;
    }
    if (weights)
      weights[(group.first + k) * group.length + group.index[k * group.length + rank]] =
          static_cast<T>(is_foreground ? -weight : weight);
    fg += is_foreground;
  }
  loss = block_sum<RanksPolicy::threads>(loss, sum_scratch);
  if (threadIdx.x == 0) tile_losses[k * group.tiles + tile] = nan ? not_a_number : loss;
}

// One block for each segment of a group.
template <class T>
__global__ void __launch_bounds__(RanksPolicy::threads)
    lovasz_segment_kernel(SortedGroup<T> group, const double* tile_losses, const int32_t* foreground, const RowCounts* rows,
                          LovaszSelection selection, SegmentResults out) {
  __shared__ double scratch[RanksPolicy::threads];
  const int64_t k = blockIdx.x, segment = group.segment(k), row = segment / group.classes;
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < group.tiles; tile += RanksPolicy::threads)
    loss += tile_losses[k * group.tiles + tile];
  loss = block_sum<RanksPolicy::threads>(loss, scratch);
  if (threadIdx.x != 0) return;
  const bool bad = rows[row].bad;
  const bool part = selection.takes_part(segment % group.classes, bad || rows[row].valid > 0, bad || foreground[segment] > 0);
  out.store(row, segment, {.loss = loss, .bound = 0.0, .gradient_deviation = 0.0, .loss_deviation = 0.0, .takes_part = part});
}

// ---- backward

// The weights of a forward pass.
template <class T>
struct StoredWeights {
  static constexpr bool reads_label = false;  // the weights already depend on it

  explicit StoredWeights(const LovaszExactBackward& args) : weights(static_cast<const T*>(args.weights)) {}

  __device__ T operator()(const LovaszBatch& b, int64_t image, int64_t pixel, int64_t c, int32_t, T, const Softmax<T>& = {}) const {
    return weights[(c * b.geometry.images + image) * b.geometry.pixels + pixel];
  }

  const T* weights;  // [C, N, P]
};

// ---- forward

template <class T>
struct ExactScratch {
  ExactScratch(const LovaszBatch& b, void* memory) {
    using Policy = Tuning::ExactSort;
    ScratchArrays arrays(memory);
    const int64_t length = b.length() > 0 ? b.length() : 1;
    const bool few = b.segments() < multiprocessors();
    group = b.length() >= (few ? Policy::long_segment_of_few : Policy::long_segment) ? 1 : Policy::group_pixels / length;
    if (group > b.segments()) group = b.segments();
    tiles = ceil_div(b.length(), RanksPolicy::tile);
    foreground = arrays.take<int32_t>(b.segments());
    rows = arrays.take<RowCounts>(b.rows());
    results.in_mean = arrays.take<int32_t>(b.rows());
    zeroed_bytes = arrays.bytes();
    results.results = arrays.take<SegmentResult>(b.segments());
    sorted_keys = arrays.take<KeyWord<T>>(group * b.length());
    index = arrays.take<uint32_t>(group * b.length());
    sorted_index = arrays.take<uint32_t>(group * b.length());
    tile_foreground = arrays.take<int32_t>(group * tiles);
    foreground_before = arrays.take<int32_t>(group * tiles);
    tile_losses = arrays.take<double>(group * tiles);
    sort_bytes = sort_scratch_bytes<KeyWord<T>>({.segments = group, .length = b.length()});
    sort = arrays.take<char>(sort_bytes);
    bytes = arrays.bytes();
  }

  int64_t group;  // segments that are sorted together
  int64_t tiles;  // of a segment
  int64_t zeroed_bytes, sort_bytes, bytes;
  int32_t* foreground;
  RowCounts* rows;
  SegmentResults results;
  KeyWord<T>* sorted_keys;
  uint32_t *index, *sorted_index;
  int32_t *tile_foreground, *foreground_before;
  double* tile_losses;
  char* sort;
};

template <class In, Errors errors>
void forward(const LovaszExactForward& args) {
  using T = opmath_t<In>;
  constexpr int key_threads = Tuning::ExactKeys::threads;
  const LovaszBatch& b = args.batch;
  const ExactScratch<T> s(b, args.scratch);
  const auto shape = [&](int64_t blocks, int threads, int64_t shared_bytes = 0) {
    return Launch{.blocks = blocks, .threads = threads, .stream = args.stream, .shared_bytes = shared_bytes};
  };
  zero_memory(args.scratch, s.zeroed_bytes, args.stream);

  auto* keys = static_cast<KeyWord<T>*>(args.keys);
  auto* weights = args.keep_weights ? static_cast<T*>(args.keys) : nullptr;  // of segments whose keys are sorted
  // A block counts foreground for one row.
  const PixelGrid grid = pixel_grid<key_threads>(b.geometry.images, b.geometry.pixels, !b.per_image);
  const bool count_in_shared = b.classes() <= Tuning::ExactKeys::max_shared_classes;
  launch(lovasz_keys_kernel<In, errors>, shape(grid.blocks, key_threads, count_in_shared ? 4 * b.classes() : 0), b,
         {.keys = keys, .foreground = s.foreground, .rows = s.rows}, grid, count_in_shared);
  const int64_t index_parts = ceil_div(b.length(), key_threads);
  launch(lovasz_index_kernel, shape(s.group * index_parts, key_threads), s.index, b.length(), index_parts);
  for (int64_t first = 0; first < b.segments(); first += s.group) {
    const int64_t group = first + s.group < b.segments() ? s.group : b.segments() - first;
    if (b.length() > 0)
      sort_pairs<KeyWord<T>>({.shape = {.segments = group, .length = b.length()},
                              .keys = keys + first * b.length(),
                              .sorted_keys = s.sorted_keys,
                              .values = s.index,
                              .sorted_values = s.sorted_index,
                              .scratch = s.sort,
                              .scratch_bytes = s.sort_bytes,
                              .stream = args.stream});
    const SortedGroup<T> sorted{.keys = s.sorted_keys,
                                .index = s.sorted_index,
                                .length = b.length(),
                                .tiles = s.tiles,
                                .first = first,
                                .rows = b.rows(),
                                .classes = b.classes()};
    launch(lovasz_tile_counts_kernel<T>, shape(group * s.tiles, RanksPolicy::threads), sorted, s.tile_foreground);
    launch(lovasz_tile_ranks_kernel, shape(s.tiles > 0 ? group : 0, RanksPolicy::threads), s.tile_foreground,
           s.foreground_before, s.tiles);
    launch(lovasz_ranks_kernel<T, errors == Errors::softmax>, shape(group * s.tiles, RanksPolicy::threads), sorted,
           s.foreground, s.foreground_before, weights, s.tile_losses);
    launch(lovasz_segment_kernel<T>, shape(group, RanksPolicy::threads), sorted, s.tile_losses, s.foreground, s.rows,
           args.selection, s.results);
  }
  launch_finish<T>(b, s.results, args.out, {}, args.stream);
}

}  // namespace

namespace kernels {

int64_t lovasz_exact_scratch_bytes(const LovaszBatch& batch) {
  return with_opmath_type(batch.logits.dtype, [&](auto zero) { return ExactScratch<decltype(zero)>(batch, nullptr).bytes; });
}

void lovasz_exact_forward(const LovaszExactForward& args) {
  with_element_type(args.batch.logits.dtype, [&](auto zero) {
    with_errors(args.batch.errors, [&](auto errors) { forward<decltype(zero), decltype(errors)::value>(args); });
  });
}

void lovasz_exact_backward(const LovaszExactBackward& args) {
  launch_gradient<StoredWeights>(args);
}

}  // namespace kernels
}  // namespace veerloss
