// Lovász losses on a GPU, method "histogram": the steps of csrc/cpu/lovasz_histogram.cpp, whose comments say what each is for.
//
//   statistics  maximum and sum of exponentials of every pixel (softmax)
//   count       a block counts a chunk of pixels in a few classes in shared memory, then adds to the counts of all
//   place       one block per segment
//   weigh       one block per segment, then one for the loss
//   sum         hinge and probabilities: fixed-point sums of weight times error
//   backward    segments.cuh, with weights looked up
//
// Counts are integers and every other sum has a fixed order: the same bits in every run. Nothing here has been tuned on a GPU.

#include "../bins.h"
#include "segments.cuh"

namespace veerloss {
namespace {

// ---- count

constexpr int count_threads = 1024, count_unroll = 4;
constexpr int64_t count_tile = count_threads * count_unroll;
// Of an element a block reads its logit, 4 bytes of float32; of its pixel the softmax's maximum and sum, and the label, 16
// bytes from L2. So a block counts a few classes, as many as its shared memory holds (70 KiB each: three on an H100, one on a
// GPU for graphics), which makes 9 bytes of those 20.
constexpr int most_group = 3;
// A block adds up to 16 000 counts a class to those of all, so its chunk is to be worth that; and there are to be two rounds of
// blocks, for the ends of the second to be short.
constexpr int64_t least_chunk = 8 * count_tile, rounds = 2;

// The largest error of a segment: 1 + its bits; 0 where there is none. And how many pixels have it.
struct alignas(8) Top {
  uint32_t key, pixels;
};
constexpr uint32_t top_nan = 0xfffffffeu, top_bad = 0xffffffffu;

__device__ inline Top larger(const Top& a, const Top& b) {
  if (a.key == b.key) return {a.key, a.pixels + b.pixels};
  return a.key > b.key ? a : b;
}

// How the pixels of a pass are divided: `chunks` of `chunk` pixels, or pixels of the sample, for each image, and `groups` of
// `group` classes. Small images of one row are in a row, as if they were one.
struct Chunks {
  int64_t images, per_image, chunk, chunks;
  int group, groups;
  bool in_a_row;
};

int64_t count_bytes(const BinLayout& layout, bool coarse) {
  return 4 * (2 * (coarse ? layout.coarse_bins : layout.bins) + (coarse ? 0 : layout.cells));
}

Chunks chunks_of(const Batch& b, bool coarse, bool sampled) {
  Chunks c;
  const int64_t fit = (shared_memory_of_a_block() - 8 * count_threads - 1024) / count_bytes(BinLayout(b.errors), coarse);
  if (fit < 1)
    throw std::runtime_error(
        "veerloss: method 'histogram' needs 80 KiB of shared memory for a block, a GPU of compute capability 8.0 or newer; "
        "backend='triton' has no such need");
  c.group = static_cast<int>(fit < most_group ? fit : most_group);
  if (b.g.channels < c.group) c.group = static_cast<int>(b.g.channels);
  c.groups = static_cast<int>(divide_up(b.g.channels, c.group));
  c.in_a_row = !sampled && !b.per_image && b.g.pixels < least_chunk && b.g.images > 0;
  c.images = c.in_a_row ? 1 : b.g.images;
  c.per_image = sampled ? divide_up(b.g.pixels, sample_step) * sample_run : b.g.pixels;
  if (c.in_a_row) c.per_image *= b.g.images;
  const int64_t wanted = divide_up(rounds * multiprocessors(), c.images > 0 ? c.images * c.groups : 1);
  c.chunk = divide_up(divide_up(c.per_image, wanted), count_tile) * count_tile;
  if (c.chunk < least_chunk) c.chunk = least_chunk;
  c.chunks = divide_up(c.per_image, c.chunk);
  return c;
}

// The pixel at place j of an image's sample, or of the image; -1 past its end, and for -1.
__device__ inline int64_t pixel_at(int64_t j, bool sampled, int64_t pixels) {
  if (!sampled || j < 0) return j;
  const int64_t pixel = j / sample_run * sample_step + j % sample_run;
  return pixel < pixels ? pixel : -1;
}

constexpr int statistics_threads = 256;

// [N, P]; of a sample, those of its pixels alone.
template <class In>
__global__ void __launch_bounds__(statistics_threads)
    lovasz_statistics_kernel(Batch b, int64_t per_image, bool sampled, const bool* wanted, PixelGrid grid,
                             Softmax<Arithmetic<In>>* statistics) {
  if (wanted) {  // perhaps no segment is
    __shared__ int any;
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < b.segments(); i += statistics_threads)
      if (wanted[i]) atomicAdd(&any, 1);
    __syncthreads();
    if (!any) return;
  }
  const auto [image, place, channel] = pixel_place(grid, b.g.images, per_image, statistics_threads);
  const int64_t pixel = pixel_at(place, sampled, b.g.pixels);
  if (pixel < 0) return;
  statistics[image * b.g.pixels + pixel] = softmax_of<In>(b, image, pixel);
}

// The blocks of a chunk's classes run together, and read the statistics of its pixels from L2.
template <class In, Errors errors, bool coarse>
__global__ void __launch_bounds__(count_threads)
    lovasz_count_kernel(Batch b, const Softmax<Arithmetic<In>>* statistics, const int32_t* table, const bool* wanted,
                        Chunks chunks, bool sampled, int32_t* counts, Top* tops) {
  using T = Arithmetic<In>;
  constexpr bool bounded = errors == Errors::softmax;
  constexpr int unroll = sizeof(T) == 8 ? count_unroll / 2 : count_unroll;  // of doubles four spill
  constexpr int64_t tile = count_threads * unroll;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ unsigned long long scratch[count_threads];
  const BinLayout layout(errors);
  const int bins = static_cast<int>(coarse ? layout.coarse_bins : layout.bins), slots = 2 * bins;
  const int words = slots + (coarse ? 0 : static_cast<int>(layout.cells));
  const auto [first_image, part, group] = image_part(chunks.chunks, chunks.groups);
  const int64_t first = group * chunks.group;
  const auto thread = static_cast<int>(threadIdx.x);

  // Each class of the group has its counts, then its table.
  const auto counts_of = [&](int k) { return reinterpret_cast<int32_t*>(memory) + k * words; };
  const auto table_of = [&](int k) { return reinterpret_cast<uint32_t*>(memory) + k * words + slots; };
  Top top[most_group];
  int modal[most_group], in_modal[most_group];
  bool here[most_group], any = false;
#pragma unroll
  for (int k = 0; k < most_group; ++k) {
    top[k] = {0, 0};
    modal[k] = -1;
    in_modal[k] = 0;
    here[k] = k < chunks.group && first + k < b.g.channels && (!wanted || wanted[b.segment(first_image, first + k)]);
    any |= here[k];
    if (!here[k]) continue;
    for (int i = thread; i < slots; i += count_threads) counts_of(k)[i] = 0;
    if (!coarse)
      for (int i = thread; i < layout.cells; i += count_threads)
        table_of(k)[i] = static_cast<uint32_t>(table[b.segment(first_image, first + k) * layout.cells + i]);
  }
  __syncthreads();

  const int64_t begin = part * chunks.chunk;
  const int64_t end = !any ? begin : begin + chunks.chunk < chunks.per_image ? begin + chunks.chunk : chunks.per_image;
  for (int64_t base = begin; base < end; base += tile) {
    if (base == begin + tile) {
      // Most pixels have the same bin where a network is sure. The first tile has shown which one: from here on it is counted
      // in registers.
      __syncthreads();
#pragma unroll
      for (int k = 0; k < most_group; ++k) {
        if (!here[k]) continue;
        unsigned long long most = 0;  // count, slot
        for (int i = thread; i < slots; i += count_threads) {
          const unsigned long long own = (static_cast<unsigned long long>(counts_of(k)[i]) << 32) | static_cast<unsigned>(i);
          most = own > most ? own : most;
        }
        most = block_reduce<count_threads>(most, scratch, [](auto p, auto q) { return p > q ? p : q; });
        modal[k] = static_cast<int>(most & 0xffffffffu);
      }
    }
    int64_t images[unroll], pixels[unroll];
    int32_t labels[unroll];
    Softmax<T> softmax[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t j = base + u * count_threads + thread;
      images[u] = first_image;
      pixels[u] = j < end ? pixel_at(j, sampled, b.g.pixels) : -1;
      if (chunks.in_a_row && pixels[u] >= 0) {  // j < 2^31
        images[u] = static_cast<uint32_t>(j) / static_cast<uint32_t>(b.g.pixels);
        pixels[u] = static_cast<uint32_t>(j) % static_cast<uint32_t>(b.g.pixels);
      }
      labels[u] = pixels[u] < 0 ? label_ignored : load_label(b, images[u], pixels[u]);
      if (bounded && pixels[u] >= 0) softmax[u] = statistics[images[u] * b.g.pixels + pixels[u]];
    }
#pragma unroll
    for (int k = 0; k < most_group; ++k) {
      if (!here[k]) continue;
      T x[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) x[u] = pixels[u] < 0 ? T(0) : load_logit<In>(b, images[u], first + k, pixels[u]);
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (labels[u] == label_ignored) continue;
        const bool foreground = labels[u] == b.foreground(first + k);
        float error;
        if constexpr (errors == Errors::softmax) {
          error =
              static_cast<float>(softmax_error(softmax[u](x[u]), softmax[u].rest, softmax[u].inverse_sum(), foreground).error);
        } else {
          const T difference = errors == Errors::hinge ? hinge_error(x[u], foreground) : probability_error(x[u], foreground);
          error = narrow_error(difference < T(0) ? -difference : difference);
        }
        Top own{1 + (bit_cast<uint32_t>(error) & 0x7fffffffu), 1};
        if (own.key > 0x7f800000u) own.key = top_nan;
        if (labels[u] == label_bad) own.key = top_bad;
        top[k] = larger(top[k], own);
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
  static_assert(sizeof(Top) == sizeof(unsigned long long), "in the same scratch");
#pragma unroll
  for (int k = 0; k < most_group; ++k) {
    if (k >= chunks.group || first + k >= b.g.channels) continue;
    top[k] = block_reduce<count_threads>(top[k], reinterpret_cast<Top*>(scratch), larger);
    if (thread == 0) tops[(first_image * chunks.chunks + part) * b.g.channels + first + k] = top[k];
    if (!here[k]) continue;
    const auto rest = static_cast<int>(block_sum<count_threads>(static_cast<unsigned long long>(in_modal[k]), scratch));
    int32_t* all = counts + b.segment(first_image, first + k) * slots;
    for (int i = thread; i < slots; i += count_threads) {
      const int32_t own = counts_of(k)[i] + (i == modal[k] ? rest : 0);
      if (own != 0) atomicAdd(all + i, own);
    }
  }
}

constexpr int merge_threads = 128;

// largest: [segments, 2], the error and how many pixels have it. -1: no pixel. NaN: an error that is none, or with -1 pixels a
// target out of range.
__global__ void __launch_bounds__(merge_threads)
    lovasz_merge_tops_kernel(Batch b, Chunks chunks, const Top* tops, double* largest) {
  __shared__ Top scratch[merge_threads];
  const int64_t segment = blockIdx.x, c = segment % b.g.channels, row = segment / b.g.channels;
  const int64_t first = b.per_image ? row : 0, images = b.per_image ? 1 : chunks.images;
  Top top{0, 0};
  for (int64_t k = threadIdx.x; k < images * chunks.chunks; k += merge_threads)
    top = larger(top, tops[(first * chunks.chunks + k) * b.g.channels + c]);
  top = block_reduce<merge_threads>(top, scratch, larger);
  if (threadIdx.x != 0) return;
  const double nan = static_cast<double>(bit_cast<float>(0x7fc00000u));
  largest[2 * segment] = top.key == 0 ? -1.0 : top.key >= top_nan ? nan : static_cast<double>(bit_cast<float>(top.key - 1));
  largest[2 * segment + 1] = top.key == top_bad ? -1.0 : static_cast<double>(top.pixels);
}

// ---- place

constexpr int segment_threads = 256;
constexpr int most_cells = ErrorCells::unbounded > ErrorCells::bounded ? ErrorCells::unbounded : ErrorCells::bounded;

// The cell that has a bin >= 1.
__device__ inline int cell_of_bin(const uint32_t* table, int cells, int bin) {
  int low = 0, high = cells;  // table[low] <= bin < table[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<int>(table[middle] & 0xffffu) <= bin)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A cube root, relative to the largest square, so that float32 holds it.
__device__ inline double root_of(double square, double most) {
  return square > 0.0 ? static_cast<double>(cbrtf(static_cast<float>(square / most))) : 0.0;
}

template <class Count>
__global__ void __launch_bounds__(segment_threads)
    lovasz_place_kernel(Errors errors, const Count* all_counts, const int32_t* fine, int32_t* tables) {
  __shared__ unsigned long long cell_bg[most_cells], cell_fg[most_cells];
  __shared__ double scratch[segment_threads];
  const BinLayout layout(errors);
  const auto thread = static_cast<int>(threadIdx.x), cells = static_cast<int>(layout.cells);
  const int64_t segment = blockIdx.x;
  const auto bins = static_cast<int>(fine ? layout.bins : layout.coarse_bins);
  const Count* counts = all_counts + segment * 2 * bins;
  if (fine) {
    const auto* before = reinterpret_cast<const uint32_t*>(fine) + segment * cells;
    for (int c = thread; c < cells; c += segment_threads) cell_bg[c] = cell_fg[c] = 0;
    __syncthreads();
    const int used = static_cast<int>((before[cells - 1] & 0xffffu) + (before[cells - 1] >> 16));
    for (int bin = 1 + thread; bin < used; bin += segment_threads) {
      if (counts[bin] == 0 && counts[bins + bin] == 0) continue;
      const int c = cell_of_bin(before, cells, bin);
      atomicAdd(cell_bg + c, static_cast<unsigned long long>(counts[bin]));
      atomicAdd(cell_fg + c, static_cast<unsigned long long>(counts[bins + bin]));
    }
  } else {
    for (int c = thread; c < cells; c += segment_threads) {
      cell_bg[c] = static_cast<unsigned long long>(counts[1 + c]);
      cell_fg[c] = static_cast<unsigned long long>(counts[bins + 1 + c]);
    }
  }
  __syncthreads();

  // Each thread has neighbouring cells. Doubles hold the counts exactly.
  const int per_thread = (cells + segment_threads - 1) / segment_threads;
  const int begin = thread * per_thread < cells ? thread * per_thread : cells;
  const int end = begin + per_thread < cells ? begin + per_thread : cells;
  double bg = 0, fg = 0, all_bg, all_fg;
  for (int c = begin; c < end; ++c) {
    bg += static_cast<double>(cell_bg[c]);
    fg += static_cast<double>(cell_fg[c]);
  }
  const double bg_below = block_scan<segment_threads>(bg, scratch, &all_bg);
  const double fg_below = block_scan<segment_threads>(fg, scratch, &all_fg);
  bg = all_bg - bg_below - bg;  // in the cells of larger errors
  fg = all_fg - fg_below - fg;
  const double foreground = all_fg + static_cast<double>(counts[bins]), total = foreground > 1.0 ? foreground : 1.0;

  // From here on the arrays hold the bits of what the cells' counts cost.
  struct Doubles {
    unsigned long long* bits;
    __device__ double operator[](int c) const { return bit_cast<double>(bits[c]); }
    __device__ void set(int c, double value) const { bits[c] = bit_cast<unsigned long long>(value); }
  };
  const Doubles gradient{cell_bg}, loss{cell_fg};
  double most_gradient = 0, most_loss = 0;
  for (int c = end - 1; c >= begin; --c) {
    const auto b = static_cast<double>(cell_bg[c]), f = static_cast<double>(cell_fg[c]);
    gradient.set(c, 0.0);
    loss.set(c, 0.0);
    if (b + f == 0) continue;
    const double low = layout.begin(c), high = layout.begin(c + 1), middle = 0.5 * (low + high);
    const JaccardDeviation deviation =
        jaccard_bin_deviation(jaccard_bin(total, fg, bg, f, b), jaccard_bin_bound(total, fg, bg, f, b), f, b,
                              slope_of_error(middle < 1.0 ? middle : 1.0, layout.bounded), high - low);
    gradient.set(c, deviation.gradient > 0.0 ? deviation.gradient : 0.0);
    loss.set(c, deviation.loss);
    most_gradient = gradient[c] > most_gradient ? gradient[c] : most_gradient;
    most_loss = loss[c] > most_loss ? loss[c] : most_loss;
    fg += f;
    bg += b;
  }
  const auto larger_of = [](double a, double b) { return a > b ? a : b; };
  most_gradient = block_reduce<segment_threads>(most_gradient, scratch, larger_of);
  most_loss = block_reduce<segment_threads>(most_loss, scratch, larger_of);
  double all_gradient = 0, all_loss = 0;
  for (int c = begin; c < end; ++c) {
    gradient.set(c, root_of(gradient[c], most_gradient));
    loss.set(c, root_of(loss[c], most_loss));
    all_gradient += gradient[c];
    all_loss += loss[c];
  }
  all_gradient = block_sum<segment_threads>(all_gradient, scratch);
  all_loss = block_sum<segment_threads>(all_loss, scratch);
  const auto bins_of = [&](int c) {
    double share = 0;
    if (all_gradient > 0) share += gradient[c] / all_gradient;
    if (all_loss > 0) share += loss[c] / all_loss;
    return 1 + static_cast<int>(0.5 * share * static_cast<double>(BinLayout::budget) * (1 - 1e-12));
  };
  double own = 0, used;
  for (int c = begin; c < end; ++c) own += bins_of(c);
  auto first = 1 + static_cast<uint32_t>(block_scan<segment_threads>(own, scratch, &used));
  for (int c = begin; c < end; ++c) {
    const auto n = static_cast<uint32_t>(bins_of(c));
    tables[segment * cells + c] = static_cast<int32_t>(cell_entry(first, n));
    first += n;
  }
}

// ---- weigh

template <class T, class Count>
__global__ void __launch_bounds__(segment_threads)
    lovasz_weigh_bins_kernel(Errors errors, int64_t classes, Selection selection, const Count* all_counts,
                             const double* largest, const int32_t* tables, T* all_weights, T* tops, SegmentResult* results,
                             int32_t* in_mean) {
  __shared__ uint32_t table[most_cells];
  __shared__ double scratch[segment_threads];
  const BinLayout layout(errors);
  const auto thread = static_cast<int>(threadIdx.x), cells = static_cast<int>(layout.cells),
             bins = static_cast<int>(layout.bins);
  const int64_t segment = blockIdx.x;
  const Count *counts = all_counts + segment * 2 * bins, *fg_counts = counts + bins;
  T* weights = all_weights + segment * 2 * bins;
  for (int c = thread; c < cells; c += segment_threads) table[c] = static_cast<uint32_t>(tables[segment * cells + c]);
  __syncthreads();
  const int used = static_cast<int>((table[cells - 1] & 0xffffu) + (table[cells - 1] >> 16));

  // Each thread has neighbouring bins, the first thread those of the largest errors.
  const int per_thread = (used - 1 + segment_threads - 1) / segment_threads;
  const int end = used - thread * per_thread > 1 ? used - thread * per_thread : 1;
  const int begin = end - per_thread > 1 ? end - per_thread : 1;
  double bg = 0, fg = 0, all_bg, all_fg;
  for (int k = begin; k < end; ++k) {
    bg += static_cast<double>(counts[k]);
    fg += static_cast<double>(fg_counts[k]);
  }
  bg = block_scan<segment_threads>(bg, scratch, &all_bg);  // in the bins of larger errors
  fg = block_scan<segment_threads>(fg, scratch, &all_fg);
  const double total = all_fg + static_cast<double>(fg_counts[0]);
  const bool has_valid = total + all_bg + static_cast<double>(counts[0]) > 0.0;
  const double top = largest[2 * segment], top_pixels = largest[2 * segment + 1];
  const bool nan = top != top, bad = nan && top_pixels < 0.0;
  const bool part = takes_part(selection, segment % classes, has_valid, total > 0.0, bad);

  SegmentResult result{0.0, 0.0, 0.0, 0.0, part};
  T fill = T(0);  // of the bins that the loop below leaves out
  const bool weigh = part && !nan && total > 0.0;
  if (part && nan) {
    result.loss = result.bound = top;
    fill = static_cast<T>(top);
  } else if (part && total == 0.0) {  // the whole weight is on the largest error
    result.loss = top;
    result.bound = 2.0 * (1.0 - 1.0 / top_pixels);
  }
  if (thread == 0) {
    tops[2 * segment] = static_cast<T>(part && !nan && total == 0.0 ? top : 0.0);
    tops[2 * segment + 1] = static_cast<T>(part && !nan && total == 0.0 ? 1.0 / top_pixels : 0.0);
    if (part) atomicAdd(in_mean + segment / classes, 1);
  }
  for (int k = thread; k < bins; k += segment_threads)
    if (!weigh || k == 0 || k >= used) {
      weights[k] = k == 0 ? T(0) : fill;
      weights[bins + k] = fill;
    }
  if (weigh) {
    double bound_sum = 0, weight_sum = 0, gradient_sum = 0, loss_sum = 0;
    int cell = begin < end ? cell_of_bin(table, cells, end - 1) : 0;
    for (int k = end - 1; k >= begin; --k) {
      while (static_cast<int>(table[cell] & 0xffffu) > k) --cell;
      const int first = static_cast<int>(table[cell] & 0xffffu), own = static_cast<int>(table[cell] >> 16);
      const double cell_low = layout.begin(cell), cell_width = (layout.begin(cell + 1) - cell_low) / own;
      const auto b = static_cast<double>(counts[k]), f = static_cast<double>(fg_counts[k]);
      const double low = cell_low + cell_width * (k - first), high = low + cell_width < top ? low + cell_width : top;
      const double width = high - low;
      double middle = 0.5 * (low + high);
      double fg_rise = rise_of_counts(fg_counts + first, k - first, own),
             bg_rise = rise_of_counts(counts + first, k - first, own);
      if (fg + bg == 0.0 && f + b > 0.0) {  // the first: it has the largest error, known exactly
        middle += (top - middle) / (f + b);
        fg_rise = bg_rise = 0.0;
      }
      const JaccardBin bin = jaccard_bin(total, fg, bg, f, b);
      weights[k] = static_cast<T>(bin.bg);
      weights[bins + k] = static_cast<T>(-bin.fg);
      if (f + b == 0.0) continue;  // no term of any sum; where float64 is slow, that counts
      const JaccardBound bound = jaccard_bin_bound(total, fg, bg, f, b);
      const JaccardDeviation deviation = jaccard_bin_deviation(bin, bound, f, b, slope_of_error(middle, layout.bounded), width);
      result.loss += bin.fg * f * mean_error(middle, width, f, fg_rise) + bin.bg * b * mean_error(middle, width, b, bg_rise);
      bound_sum += bound.fg + bound.bg;
      weight_sum += deviation.weights;
      gradient_sum += deviation.gradient;
      loss_sum += deviation.loss;
      fg += f;
      bg += b;
    }
    result.loss = block_sum<segment_threads>(result.loss, scratch);
    result.bound = block_sum<segment_threads>(bound_sum, scratch);
    weight_sum = block_sum<segment_threads>(weight_sum, scratch);
    gradient_sum = block_sum<segment_threads>(gradient_sum, scratch);
    result.gradient_deviation = weight_sum > 0.0 ? sqrt(gradient_sum / weight_sum) : 0.0;
    result.loss_deviation = sqrt(block_sum<segment_threads>(loss_sum, scratch));
  }
  if (thread == 0) results[segment] = result;
}

// ---- look up

// The signed weights of errors, by their bins.
template <class T>
struct BinWeights {
  using Value = T;
  const uint32_t* table;
  const T *weights, *tops;

  __device__ T operator()(const Batch& b, int64_t image, int64_t, int64_t c, int32_t label, T wide_error) const {
    const BinLayout layout(b.errors);
    const int64_t segment = b.segment(image, c);
    const float error = narrow_error(wide_error);
    const T top_weight = tops[2 * segment + 1];
    if (label < 0) return T(0);
    if (top_weight > T(0)) return error > 0.0f && error == static_cast<float>(tops[2 * segment]) ? top_weight : T(0);
    const uint32_t* cells = table + segment * layout.cells;
    const int32_t bin = layout.bounded ? bin_of_error<true>(error, cells) : bin_of_error<false>(error, cells);
    return weights[segment * 2 * layout.bins + bin + (label == b.foreground(c) ? layout.bins : 0)];
  }
};

// ---- sum

constexpr int sum_threads = 256;
constexpr int64_t sum_chunk = 32 * sum_threads;

template <class In>
__global__ void __launch_bounds__(sum_threads)
    lovasz_sum_kernel(Batch b, BinWeights<Arithmetic<In>> weights, const double* units, int64_t chunks, int64_t* sums) {
  using T = Arithmetic<In>;
  __shared__ unsigned long long scratch[sum_threads];
  const auto [image, part, c] = image_part(chunks, b.g.channels);
  const int64_t segment = b.segment(image, c), begin = part * sum_chunk;
  const int64_t end = begin + sum_chunk < b.g.pixels ? begin + sum_chunk : b.g.pixels;
  unsigned long long sum = 0;
  for (int64_t pixel = begin + threadIdx.x; pixel < end; pixel += sum_threads) {
    const int32_t label = load_label(b, image, pixel);
    if (label < 0) continue;
    const bool foreground = label == b.foreground(c);
    const T x = load_logit<In>(b, image, c, pixel);
    const T difference = b.errors == Errors::hinge ? hinge_error(x, foreground) : probability_error(x, foreground);
    const T error = difference < T(0) ? -difference : difference;
    const auto w = static_cast<double>(weights(b, image, pixel, c, label, error));
    const double product = (w < 0.0 ? -w : w) * static_cast<double>(narrow_error(error));
    if (w != 0.0 && product == product) sum += static_cast<unsigned long long>(product * units[segment] + 0.5);
  }
  sum = block_sum<sum_threads>(sum, scratch);
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(sums) + segment, sum);
}

template <class T>
BinWeights<T> bin_weights(const int32_t* table, const void* weights, const void* tops) {
  return {reinterpret_cast<const uint32_t*>(table), static_cast<const T*>(weights), static_cast<const T*>(tops)};
}

}  // namespace

// ---- launches

int64_t histogram_scratch_bytes(const Batch& b, bool coarse, bool sampled) {
  const Chunks chunks = chunks_of(b, coarse, sampled);
  const int64_t tops = chunks.images * chunks.chunks * b.g.channels * static_cast<int64_t>(sizeof(Top));
  if (b.errors != Errors::softmax) return tops;
  return tops + b.g.images * b.g.pixels * 2 * (b.x.dtype == DType::f64 ? 8 : 4);
}

void launch_histogram_count(const Batch& b, const int32_t* table, const bool* wanted, bool sampled, int32_t* counts,
                            double* largest, void* scratch, cudaStream_t stream) {
  const Chunks chunks = chunks_of(b, !table, sampled);
  const int64_t blocks = chunks.images * chunks.chunks * chunks.groups;
  const auto bytes = static_cast<size_t>(chunks.group * count_bytes(BinLayout(b.errors), !table));
  with_element_type(b.x.dtype, [&](auto zero) {
    using In = decltype(zero);
    auto* statistics = static_cast<Softmax<Arithmetic<In>>*>(scratch);
    auto* tops = reinterpret_cast<Top*>(statistics + (b.errors == Errors::softmax ? b.g.images * b.g.pixels : 0));
    if (b.errors == Errors::softmax) {
      const int64_t per_image = sampled ? divide_up(b.g.pixels, sample_step) * sample_run : b.g.pixels;
      const PixelGrid grid = pixel_grid(b, per_image, statistics_threads);
      launch(lovasz_statistics_kernel<In>, grid.blocks, statistics_threads, 0, stream, b, per_image, sampled, wanted, grid,
             statistics);
    }
    const auto run = [&](auto kernel) {
      launch(kernel, blocks, count_threads, bytes, stream, b, statistics, table, wanted, chunks, sampled, counts, tops);
    };
    const auto run_either = [&](auto fine, auto coarse) { table ? run(fine) : run(coarse); };
    if (b.errors == Errors::softmax)
      run_either(lovasz_count_kernel<In, Errors::softmax, false>, lovasz_count_kernel<In, Errors::softmax, true>);
    else if (b.errors == Errors::probabilities)
      run_either(lovasz_count_kernel<In, Errors::probabilities, false>, lovasz_count_kernel<In, Errors::probabilities, true>);
    else
      run_either(lovasz_count_kernel<In, Errors::hinge, false>, lovasz_count_kernel<In, Errors::hinge, true>);
    launch(lovasz_merge_tops_kernel, b.segments(), merge_threads, 0, stream, b, chunks, static_cast<const Top*>(tops), largest);
  });
}

void launch_histogram_place(Errors errors, int64_t segments, const void* counts, bool counts_64, const int32_t* fine,
                            int32_t* table, cudaStream_t stream) {
  if (counts_64)
    launch(lovasz_place_kernel<int64_t>, segments, segment_threads, 0, stream, errors, static_cast<const int64_t*>(counts),
           fine, table);
  else
    launch(lovasz_place_kernel<int32_t>, segments, segment_threads, 0, stream, errors, static_cast<const int32_t*>(counts),
           fine, table);
}

void launch_histogram_weigh(const Batch& b, const Selection& selection, const void* counts, bool counts_64,
                            const double* largest, const int32_t* table, const LossOutput& out, void* weights, void* tops,
                            SegmentResult* results, int32_t* in_mean, cudaStream_t stream) {
  const auto run = [&](auto value, auto count) {
    using T = decltype(value);
    using Count = decltype(count);
    check(cudaMemsetAsync(in_mean, 0, static_cast<size_t>(b.rows()) * sizeof(int32_t), stream), "memset");
    launch(lovasz_weigh_bins_kernel<T, Count>, b.segments(), segment_threads, 0, stream, b.errors, b.g.channels, selection,
           static_cast<const Count*>(counts), largest, table, static_cast<T*>(weights), static_cast<T*>(tops), results,
           in_mean);
    launch(lovasz_finish_kernel<T>, 1, finish_threads, 0, stream, static_cast<const SegmentResult*>(results),
           static_cast<const int32_t*>(in_mean), b.rows(), b.g.channels, selection, out);
  };
  const bool wide = b.x.dtype == DType::f64;
  if (wide && counts_64) run(double{}, int64_t{});
  if (wide && !counts_64) run(double{}, int32_t{});
  if (!wide && counts_64) run(float{}, int64_t{});
  if (!wide && !counts_64) run(float{}, int32_t{});
}

void launch_histogram_sum(const Batch& b, const int32_t* table, const void* weights, const void* tops, const double* units,
                          int64_t* sums, cudaStream_t stream) {
  check(cudaMemsetAsync(sums, 0, static_cast<size_t>(b.segments()) * sizeof(int64_t), stream), "memset");
  const int64_t chunks = divide_up(b.g.pixels, sum_chunk);
  with_element_type(b.x.dtype, [&](auto zero) {
    using In = decltype(zero);
    launch(lovasz_sum_kernel<In>, b.g.images * chunks * b.g.channels, sum_threads, 0, stream, b,
           bin_weights<Arithmetic<In>>(table, weights, tops), units, chunks, sums);
  });
}

void launch_histogram_backward(const Batch& b, const Factors& factors, const int32_t* table, const void* weights,
                               const void* tops, const View& grad_logits, cudaStream_t stream) {
  if (b.x.dtype == DType::f64)
    launch_gradient(b, factors, bin_weights<double>(table, weights, tops), grad_logits, stream);
  else
    launch_gradient(b, factors, bin_weights<float>(table, weights, tops), grad_logits, stream);
}

}  // namespace veerloss
