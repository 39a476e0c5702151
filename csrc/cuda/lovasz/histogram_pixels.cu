// Lovász losses on a GPU, method "histogram": the steps over pixels. histogram_bins.cu has those over bins;
// veerloss/_histogram.py describes the steps, csrc/kernels.h the tensors.
//
//   statistics  maximum and sum of exponentials of every pixel (softmax)
//   count       a block counts a chunk of pixels in a few classes in shared memory, then adds to the counts of the segments
//   max error   the largest error of each segment from those of its blocks
//   sum         probabilities and hinge: weight times error, in fixed point
//   backward    gradient.cuh, with the weights of bins
//
// Counts and sums are integers: the results are the same bits in every run.

#include "../../math/bins.h"
#include "../gradient.cuh"

namespace veerloss {
namespace {

using CountPolicy = Tuning::HistogramCount;

// ---- statistics

// Pixels of an image in a pass; of a sample including those past the end of the image, see sampled_pixel().
int64_t pixels_of_pass(const LovaszBatch& b, bool sampled) {
  return sampled ? ceil_div(b.geometry.pixels, sample_step) * sample_run : b.geometry.pixels;
}

// Pixel j of an image's sample, or of the image; -1 past its end, and for -1.
__device__ inline int64_t sampled_pixel(int64_t j, bool sampled, int64_t pixels) {
  if (!sampled || j < 0) return j;
  const int64_t pixel = j / sample_run * sample_step + j % sample_run;
  return pixel < pixels ? pixel : -1;
}

// statistics: [N, P]; of a sample, only those of its pixels are written.
template <class In>
__global__ void __launch_bounds__(Tuning::HistogramStatistics::threads)
    lovasz_statistics_kernel(LovaszHistogramCount args, int64_t pass_pixels, PixelGrid grid,
                             Softmax<opmath_t<In>>* statistics) {
  constexpr int threads = Tuning::HistogramStatistics::threads;
  const LovaszBatch& b = args.batch;
  if (args.segment_mask) {  // which may be empty: the pass ends at once
    __shared__ int masked;
    if (threadIdx.x == 0) masked = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < b.segments(); i += threads)
      if (args.segment_mask[i]) atomicAdd(&masked, 1);
    __syncthreads();
    if (!masked) return;
  }
  const auto [image, j, channel] = thread_pixel<threads>(grid, b.geometry.images, pass_pixels);
  const int64_t pixel = sampled_pixel(j, args.sampled, b.geometry.pixels);
  if (pixel < 0) return;
  statistics[image * b.geometry.pixels + pixel] = softmax_of_pixel<In>(b.logits, b.classes(), image, pixel);
}

// ---- count

// The largest error of some pixels, as 1 + its bits (0: no pixel), and how many of them have it. key_nan: an error is not a
// number; key_bad_target: a target is out of range.
struct alignas(8) MaxError {
  uint32_t key, pixels;
};
constexpr uint32_t key_nan = 0xfffffffeu, key_bad_target = 0xffffffffu;

__device__ inline MaxError larger(const MaxError& a, const MaxError& b) {
  if (a.key == b.key) return {a.key, a.pixels + b.pixels};
  return a.key > b.key ? a : b;
}

// How a pass is divided among blocks: each counts a chunk of `chunk` pixels in a group of `classes` classes. Small images of
// one segment are one sequence of pixels (`flat`), as if they were one image.
struct Chunks {
  int64_t images, pixels;  // of the pass; pixels of an image, or with `flat` of all
  int64_t chunk, chunks;   // pixels of a chunk, chunks of an image
  int classes, groups;
  bool flat;
};

// 32-bit words of shared memory for a class: the counts of background and foreground, then the table.
VEERLOSS_HD int64_t words_of_class(const BinLayout& layout, bool coarse) {
  return coarse ? 2 * layout.coarse_bins : 2 * layout.bins + layout.cells;
}

Chunks chunks_of(const LovaszBatch& b, bool coarse, bool sampled) {
  constexpr int64_t static_bytes = 8 * CountPolicy::threads + 1024;  // and what the driver reserves
  const int64_t fit = (max_shared_bytes_of_block() - static_bytes) / (4 * words_of_class(BinLayout(b.errors), coarse));
  if (fit < 1)
    throw std::runtime_error(
        "veerloss: method 'histogram' needs 80 KiB of shared memory for a block, a GPU of compute capability 8.0 or newer; "
        "backend='triton' has no such need");
  Chunks c;
  c.classes = static_cast<int>(fit < CountPolicy::max_classes ? fit : CountPolicy::max_classes);
  if (b.classes() < c.classes) c.classes = static_cast<int>(b.classes());
  c.groups = static_cast<int>(ceil_div(b.classes(), c.classes));
  c.flat = !sampled && !b.per_image && b.geometry.pixels < CountPolicy::min_chunk && b.geometry.images > 0;
  c.images = c.flat ? 1 : b.geometry.images;
  c.pixels = pixels_of_pass(b, sampled) * (c.flat ? b.geometry.images : 1);
  const int64_t wanted_chunks = ceil_div(CountPolicy::rounds * multiprocessors(), c.images > 0 ? c.images * c.groups : 1);
  c.chunk = ceil_div(ceil_div(c.pixels, wanted_chunks), CountPolicy::tile) * CountPolicy::tile;
  if (c.chunk < CountPolicy::min_chunk) c.chunk = CountPolicy::min_chunk;
  c.chunks = ceil_div(c.pixels, c.chunk);
  return c;
}

// The error of a pixel in a class.
template <Errors errors, class T>
__device__ inline float counted_error(T x, const Softmax<T>& softmax, bool foreground) {
  if constexpr (errors == Errors::softmax) {
    return static_cast<float>(
        softmax_error(softmax.exp_of(x), softmax.sumexp_excl_max, softmax.inv_sumexp(), foreground).error);
  } else {
    return narrow_error(magnitude(signed_error(errors, x, foreground)));
  }
}

// The slot with the largest count.
__device__ inline int modal_slot(const int32_t* counts, int slots, unsigned long long* scratch) {
  unsigned long long modal = 0;  // count, slot
  for (int i = static_cast<int>(threadIdx.x); i < slots; i += CountPolicy::threads) {
    const unsigned long long slot = (static_cast<unsigned long long>(counts[i]) << 32) | static_cast<unsigned>(i);
    modal = slot > modal ? slot : modal;
  }
  modal = block_reduce<CountPolicy::threads>(modal, scratch, [](auto a, auto b) { return a > b ? a : b; });
  return static_cast<int>(modal & 0xffffffffu);
}

// max_errors: [images, chunks, classes]. The blocks of a chunk's groups run together and read the statistics of its pixels from
// L2.
template <class In, Errors errors, bool coarse>
__global__ void __launch_bounds__(CountPolicy::threads)
    lovasz_count_kernel(LovaszHistogramCount args, Chunks chunks, const Softmax<opmath_t<In>>* statistics,
                        MaxError* max_errors) {
  using T = opmath_t<In>;
  constexpr bool bounded = errors == Errors::softmax;
  constexpr int threads = CountPolicy::threads, max_classes = CountPolicy::max_classes;
  constexpr int unroll = std::is_same_v<T, double> ? CountPolicy::unroll_of_double : CountPolicy::unroll;
  constexpr int64_t tile = threads * unroll;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ unsigned long long scratch[threads];
  const LovaszBatch& b = args.batch;
  const BinLayout layout(errors);
  const int bins = static_cast<int>(coarse ? layout.coarse_bins : layout.bins), slots = 2 * bins;
  const int words = static_cast<int>(words_of_class(layout, coarse));
  const auto [first_image, part, group] = image_part(chunks.chunks, chunks.groups);
  const int64_t first_class = group * chunks.classes;
  const auto thread = static_cast<int>(threadIdx.x);

  // Of the group's class k:
  const auto counts_of = [&](int k) { return reinterpret_cast<int32_t*>(memory) + k * words; };
  const auto table_of = [&](int k) { return reinterpret_cast<uint32_t*>(memory) + k * words + slots; };
  const auto exists = [&](int k) { return k < chunks.classes && first_class + k < b.classes(); };
  MaxError max_error[max_classes];
  int modal[max_classes], in_modal[max_classes];  // the slot that this thread counts in a register, and its count
  bool counted[max_classes], any = false;
#pragma unroll
  for (int k = 0; k < max_classes; ++k) {
    max_error[k] = {0, 0};
    modal[k] = -1;
    in_modal[k] = 0;
    counted[k] = exists(k) && (!args.segment_mask || args.segment_mask[b.segment(first_image, first_class + k)]);
    any |= counted[k];
    if (!counted[k]) continue;
    for (int i = thread; i < slots; i += threads) counts_of(k)[i] = 0;
    if (!coarse)
      for (int i = thread; i < layout.cells; i += threads)
        table_of(k)[i] = args.table[b.segment(first_image, first_class + k) * layout.cells + i];
  }
  __syncthreads();

  const int64_t begin = part * chunks.chunk;
  const int64_t end = !any ? begin : begin + chunks.chunk < chunks.pixels ? begin + chunks.chunk : chunks.pixels;
  for (int64_t base = begin; base < end; base += tile) {
    if (base == begin + tile) {
      // Where a network is sure, most pixels have the same bin. The first tile has shown which one.
      __syncthreads();
#pragma unroll
      for (int k = 0; k < max_classes; ++k)
        if (counted[k]) modal[k] = modal_slot(counts_of(k), slots, scratch);
    }
    int64_t images[unroll], pixels[unroll];
    int32_t labels[unroll];
    Softmax<T> softmax[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t j = base + u * threads + thread;
      images[u] = first_image;
      pixels[u] = j < end ? sampled_pixel(j, args.sampled, b.geometry.pixels) : -1;
      if (chunks.flat && pixels[u] >= 0) {  // one segment: j < 2^31
        images[u] = static_cast<uint32_t>(j) / static_cast<uint32_t>(b.geometry.pixels);
        pixels[u] = static_cast<uint32_t>(j) % static_cast<uint32_t>(b.geometry.pixels);
      }
      labels[u] = pixels[u] < 0 ? label_ignored : load_label(b.target, b.rule, images[u], pixels[u]);
      if (bounded && pixels[u] >= 0) softmax[u] = statistics[images[u] * b.geometry.pixels + pixels[u]];
    }
#pragma unroll
    for (int k = 0; k < max_classes; ++k) {
      if (!counted[k]) continue;
      T x[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) x[u] = pixels[u] < 0 ? T(0) : load<In>(b.logits, images[u], first_class + k, pixels[u]);
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (labels[u] == label_ignored) continue;
        const bool foreground = labels[u] == b.foreground(first_class + k);
        const float error = counted_error<errors>(x[u], softmax[u], foreground);
        MaxError pixel_error{1 + (bit_cast<uint32_t>(error) & 0x7fffffffu), 1};
        if (pixel_error.key > 0x7f800000u) pixel_error.key = key_nan;
        if (labels[u] == label_bad) pixel_error.key = key_bad_target;
        max_error[k] = larger(max_error[k], pixel_error);
        int slot = error == 0.0f ? 0 : 1 + static_cast<int>(cell_of_error<bounded>(error).cell);
        if constexpr (!coarse) slot = bin_of_error<bounded>(error, table_of(k));
        slot += foreground ? bins : 0;
        if (slot == modal[k])
          ++in_modal[k];
        else
          atomicAdd(counts_of(k) + slot, 1);
      }
    }
  }
  __syncthreads();
  static_assert(sizeof(MaxError) == sizeof(unsigned long long), "in the same scratch");
#pragma unroll
  for (int k = 0; k < max_classes; ++k) {
    if (!exists(k)) continue;
    max_error[k] = block_reduce<threads>(max_error[k], reinterpret_cast<MaxError*>(scratch), larger);
    if (thread == 0) max_errors[(first_image * chunks.chunks + part) * b.classes() + first_class + k] = max_error[k];
    if (!counted[k]) continue;
    const auto modal_count = static_cast<int>(block_sum<threads>(static_cast<unsigned long long>(in_modal[k]), scratch));
    int32_t* segment_counts = args.counts + b.segment(first_image, first_class + k) * slots;
    for (int i = thread; i < slots; i += threads) {
      const int32_t count = counts_of(k)[i] + (i == modal[k] ? modal_count : 0);
      if (count != 0) atomicAdd(segment_counts + i, count);
    }
  }
}

// One block for each segment. The result is described at LovaszHistogramCount::max_error.
__global__ void __launch_bounds__(Tuning::HistogramMaxError::threads)
    lovasz_max_error_kernel(LovaszHistogramCount args, Chunks chunks, const MaxError* max_errors) {
  constexpr int threads = Tuning::HistogramMaxError::threads;
  __shared__ MaxError scratch[threads];
  const int64_t classes = args.batch.classes(), segment = blockIdx.x, c = segment % classes, row = segment / classes;
  const int64_t first_image = args.batch.per_image ? row : 0, images = args.batch.per_image ? 1 : chunks.images;
  MaxError max_error{0, 0};
  for (int64_t k = threadIdx.x; k < images * chunks.chunks; k += threads)
    max_error = larger(max_error, max_errors[(first_image * chunks.chunks + k) * classes + c]);
  max_error = block_reduce<threads>(max_error, scratch, larger);
  if (threadIdx.x != 0) return;
  const auto [key, pixels] = max_error;
  args.max_error[2 * segment] = key == 0 ? -1.0 : key >= key_nan ? not_a_number : static_cast<double>(bit_cast<float>(key - 1));
  args.max_error[2 * segment + 1] = key == key_bad_target ? -1.0 : static_cast<double>(pixels);
}

template <class T>
struct CountScratch {
  CountScratch(const LovaszBatch& b, const Chunks& chunks, void* memory) {
    ScratchArrays arrays(memory);
    statistics = arrays.take<Softmax<T>>(b.errors == Errors::softmax ? b.geometry.images * b.geometry.pixels : 0);
    max_errors = arrays.take<MaxError>(chunks.images * chunks.chunks * b.classes());
    bytes = arrays.bytes();
  }

  Softmax<T>* statistics;
  MaxError* max_errors;
  int64_t bytes;
};

template <class In>
void count(const LovaszHistogramCount& args) {
  constexpr int statistics_threads = Tuning::HistogramStatistics::threads;
  const LovaszBatch& b = args.batch;
  const bool coarse = !args.table;
  const Chunks chunks = chunks_of(b, coarse, args.sampled);
  const CountScratch<opmath_t<In>> scratch(b, chunks, args.scratch);
  if (b.errors == Errors::softmax) {
    const int64_t pixels = pixels_of_pass(b, args.sampled);
    const PixelGrid grid = pixel_grid<statistics_threads>(b.geometry.images, pixels);
    launch(lovasz_statistics_kernel<In>, {.blocks = grid.blocks, .threads = statistics_threads, .stream = args.stream}, args,
           pixels, grid, scratch.statistics);
  }
  const Launch shape{.blocks = chunks.images * chunks.chunks * chunks.groups,
                     .threads = CountPolicy::threads,
                     .stream = args.stream,
                     .shared_bytes = chunks.classes * 4 * words_of_class(BinLayout(b.errors), coarse)};
  with_errors(b.errors, [&](auto errors) {
    constexpr Errors e = decltype(errors)::value;
    launch(coarse ? lovasz_count_kernel<In, e, true> : lovasz_count_kernel<In, e, false>, shape, args, chunks,
           scratch.statistics, scratch.max_errors);
  });
  launch(lovasz_max_error_kernel,
         {.blocks = b.segments(), .threads = Tuning::HistogramMaxError::threads, .stream = args.stream}, args, chunks,
         scratch.max_errors);
}

// ---- weights

// The signed weights of errors, by their bins.
template <class T>
struct BinWeights {
  static constexpr bool reads_label = true;

  template <class Args>
  explicit BinWeights(const Args& args)
      : table(args.table),
        weights(static_cast<const T*>(args.weights.weights)),
        max_weight(static_cast<const T*>(args.weights.max_weight)) {}

  __device__ T operator()(const LovaszBatch& b, int64_t image, int64_t, int64_t c, int32_t label, T opmath_error) const {
    const BinLayout layout(b.errors);
    const int64_t segment = b.segment(image, c);
    const float error = narrow_error(opmath_error);
    const T max_error_weight = max_weight[2 * segment + 1];
    if (label < 0) return T(0);
    if (max_error_weight > T(0))
      return error > 0.0f && error == static_cast<float>(max_weight[2 * segment]) ? max_error_weight : T(0);
    const uint32_t* entries = table + segment * layout.cells;
    const int32_t bin = layout.bounded ? bin_of_error<true>(error, entries) : bin_of_error<false>(error, entries);
    return weights[segment * 2 * layout.bins + bin + (label == b.foreground(c) ? layout.bins : 0)];
  }

  const uint32_t* table;
  const T *weights, *max_weight;
};

// ---- sum

template <class In>
__global__ void __launch_bounds__(Tuning::HistogramSum::threads)
    lovasz_sum_kernel(LovaszHistogramSum args, BinWeights<opmath_t<In>> weights, int64_t chunks) {
  using T = opmath_t<In>;
  using Policy = Tuning::HistogramSum;
  __shared__ unsigned long long scratch[Policy::threads];
  const LovaszBatch& b = args.batch;
  const auto [image, part, c] = image_part(chunks, b.classes());
  const int64_t segment = b.segment(image, c), begin = part * Policy::chunk;
  const int64_t end = begin + Policy::chunk < b.geometry.pixels ? begin + Policy::chunk : b.geometry.pixels;
  unsigned long long sum = 0;
  for (int64_t pixel = begin + threadIdx.x; pixel < end; pixel += Policy::threads) {
    const int32_t label = load_label(b.target, b.rule, image, pixel);
    if (label < 0) continue;
    const T x = load<In>(b.logits, image, c, pixel);
    const T error = magnitude(signed_error(b.errors, x, label == b.foreground(c)));
    const auto weight = static_cast<double>(weights(b, image, pixel, c, label, error));
    const double product = magnitude(weight) * static_cast<double>(narrow_error(error));
    if (weight != 0.0 && product == product) sum += static_cast<unsigned long long>(product * args.units[segment] + 0.5);
  }
  sum = block_sum<Policy::threads>(sum, scratch);
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.sums) + segment, sum);
}

}  // namespace

namespace kernels {

int64_t lovasz_histogram_scratch_bytes(const LovaszBatch& batch, bool coarse, bool sampled) {
  const Chunks chunks = chunks_of(batch, coarse, sampled);
  return with_opmath_type(batch.logits.dtype,
                          [&](auto zero) { return CountScratch<decltype(zero)>(batch, chunks, nullptr).bytes; });
}

void lovasz_histogram_count(const LovaszHistogramCount& args) {
  with_element_type(args.batch.logits.dtype, [&](auto zero) { count<decltype(zero)>(args); });
}

void lovasz_histogram_sum(const LovaszHistogramSum& args) {
  using Policy = Tuning::HistogramSum;
  const LovaszBatch& b = args.batch;
  zero_memory(args.sums, b.segments() * static_cast<int64_t>(sizeof(int64_t)), args.stream);
  const int64_t chunks = ceil_div(b.geometry.pixels, Policy::chunk);
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    launch(lovasz_sum_kernel<In>,
           {.blocks = b.geometry.images * chunks * b.classes(), .threads = Policy::threads, .stream = args.stream}, args,
           BinWeights<opmath_t<In>>(args), chunks);
  });
}

void lovasz_histogram_backward(const LovaszHistogramBackward& args) {
  launch_gradient<BinWeights>(args);
}

}  // namespace kernels
}  // namespace veerloss
