// Lovász losses on a GPU, method "histogram": the steps over bins, with one block for each segment. math/bins.h has the
// formulas, csrc/cpu/lovasz/histogram_place.h and histogram_bins.cpp the same steps without threads.
//
//   place  counts to the table of each segment
//   weigh  counts to the weights of bins and the loss of each segment, and where it needs one to a better table; then the loss
//   of
//          the batch (segments.cuh)
//
// Every sum has a fixed order: the results are the same bits in every run.

#include "../../math/bins.h"
#include "segments.cuh"

namespace veerloss {
namespace {

constexpr int threads = Tuning::HistogramBins::threads;
constexpr int cells = BinLayout::cells;
static_assert(threads >= cells, "a thread for each cell");

// ---- place

// The bins of a thread: neighbours, the first thread's the lowest.
struct ThreadBins {
  int begin, end;

  __device__ ThreadBins(int first, int last) {
    const int per_thread = (last - first + threads - 1) / threads, at = first + static_cast<int>(threadIdx.x) * per_thread;
    begin = at < last ? at : last;
    end = begin + per_thread < last ? begin + per_thread : last;
  }
};

struct PlaceScratch {
  double sum[threads];
  double fg_at[cells + 1], bg_at[cells + 1], fg[cells], bg[cells];
  double at[cells + 1];  // where cells begin, in the bins that were counted
  BinPair window;
  int least, any_least, largest, tail;
};

__device__ inline double larger(double a, double b) {
  return a > b ? a : b;
}

// The table of a segment from counts in `bins` bins of `map`. A function of its own: float64 takes much code.
template <class Count>
__device__ __noinline__ void place_segment(const Count* bg_counts, const Count* fg_counts, const BinMap& map, int bins,
                                           Errors errors, bool sampled, int new_bins, BinPair* table, PlaceScratch& s) {
  const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
  const auto thread = static_cast<int>(threadIdx.x);
  const ThreadBins mine(1, bins);
  if (thread == 0) {
    s.least = s.any_least = bins;
    s.largest = s.tail = 0;
  }
  double thread_fg = 0, thread_bg = 0, all_fg, all_bg;
  int least = bins, any_least = bins, largest = 0;
  for (int k = mine.begin; k < mine.end; ++k) {
    thread_fg += static_cast<double>(fg_counts[k]);
    thread_bg += static_cast<double>(bg_counts[k]);
    if (fg_counts[k] > 0 && least == bins) least = k;
    if ((fg_counts[k] > 0 || bg_counts[k] > 0) && any_least == bins) any_least = k;
    if (fg_counts[k] > 0 || bg_counts[k] > 0) largest = k;
  }
  const double fg_before = block_scan<threads>(thread_fg, s.sum, &all_fg);
  const double bg_before = block_scan<threads>(thread_bg, s.sum, &all_bg);
  atomicMin(&s.least, least);
  atomicMin(&s.any_least, any_least);
  atomicMax(&s.largest, largest);
  double below = fg_before;
  for (int k = mine.begin; k < mine.end; ++k) {
    if (softmax && fg_counts[k] > 0 && below < tail_pixels) atomicMax(&s.tail, k);
    below += static_cast<double>(fg_counts[k]);
  }
  __syncthreads();
  if (thread == 0) {
    const int first = softmax && s.least < bins ? s.least : s.any_least;
    const CountedRange range{first < bins ? first : 0, s.tail > first ? s.tail : first, s.largest, softmax && fg_counts[0] > 0};
    s.window = window_of(range, map, bins, sampled);
  }
  __syncthreads();
  const BinMap window{&s.window};
  if (thread <= cells) {
    const double position = map.position_at(window.coordinate_at(cell_begin(thread)));
    const double at = position >= 1.0 ? static_cast<double>(bins) : map.bin_at(position);
    s.at[thread] = at < 1.0 ? 1.0 : at > bins ? static_cast<double>(bins) : at;
    s.fg_at[thread] = all_fg;  // of those at the end
    s.bg_at[thread] = all_bg;
  }
  __syncthreads();
  // Cells begin in order: those in a thread's bins are neighbours.
  if (mine.begin < mine.end) {
    int c = 0;
    while (c <= cells && s.at[c] < mine.begin) ++c;
    double fg_below = fg_before, bg_below = bg_before;
    for (int k = mine.begin; k < mine.end; ++k) {
      const auto f = static_cast<double>(fg_counts[k]), b = static_cast<double>(bg_counts[k]);
      for (; c <= cells && s.at[c] < k + 1; ++c) {
        s.fg_at[c] = fg_below + (s.at[c] - k) * f;
        s.bg_at[c] = bg_below + (s.at[c] - k) * b;
      }
      fg_below += f;
      bg_below += b;
    }
  }
  __syncthreads();
  // From here on a thread has a cell.
  const bool has_cell = thread < cells;
  double fg = 0, bg = 0;
  if (has_cell) {
    s.fg[thread] = fg = s.fg_at[thread + 1] - s.fg_at[thread];
    s.bg[thread] = bg = s.bg_at[thread + 1] - s.bg_at[thread];
  }
  __syncthreads();
  if (has_cell && sampled) {
    const int low = thread > 0 ? thread - 1 : 0, high = thread + 1 < cells ? thread + 1 : thread;
    fg = smooth_count(s.fg[low], fg, s.fg[high]);
    bg = smooth_count(s.bg[low], bg, s.bg[high]);
  }
  double total, total_bg;
  const double fg_lower = block_scan<threads>(fg, s.sum, &total), bg_lower = block_scan<threads>(bg, s.sum, &total_bg);
  CellDeviation cell{0.0, 0.0};
  const double everything = total + (sampled ? 0.0 : static_cast<double>(fg_counts[0]));
  if (has_cell) {
    const double low = window.coordinate_at(cell_begin(thread)), width = window.coordinate_at(cell_begin(thread + 1)) - low;
    cell = cell_deviation(fg, bg, everything > 1.0 ? everything : 1.0, total - fg_lower - fg, total_bg - bg_lower - bg,
                          low + 0.5 * width, width, softmax, folded);
  }
  const double max_gradient = block_reduce<threads>(cell.gradient, s.sum, larger);
  const double max_loss = block_reduce<threads>(cell.loss, s.sum, larger);
  double worth = 1, gradient = 0, sum_gradient = 0;
  VEERLOSS_NO_UNROLL
  for (int step = 0; step <= worth_steps; ++step) {
    gradient = bins_for_gradient(cell.gradient, max_gradient, fg + bg, worth);
    sum_gradient = block_sum<threads>(gradient, s.sum);
    if (step < worth_steps) worth = next_worth(worth, sum_gradient, static_cast<double>(new_bins));
  }
  const double loss = bins_for_loss(cell.loss, max_loss), sum_loss = block_sum<threads>(loss, s.sum);
  const double share = has_cell ? share_of_cell(gradient, sum_gradient, loss, sum_loss) : 0.0;
  double all_shares;
  const double shares = block_scan<threads>(share, s.sum, &all_shares);
  if (has_cell) {
    const double begin = thread == 0 ? 0.0 : bins_before(thread, shares, new_bins);
    const double end =
        thread + 1 == cells ? static_cast<double>(new_bins - 1) : bins_before(thread + 1, shares + share, new_bins);
    table[1 + thread] = cell_pair(thread, begin, end);
  }
  if (thread == 0) table[0] = s.window;
}

// Loads a table, that of the coarse pass for null.
__device__ inline void load_table(const BinPair* table, BinPair* out) {
  for (int i = static_cast<int>(threadIdx.x); i < BinLayout::table; i += threads) out[i] = table ? table[i] : coarse_pair(i);
  __syncthreads();
}

template <class Count>
__global__ void __launch_bounds__(threads, 1) lovasz_place_kernel(LovaszHistogramPlace args) {
  __shared__ BinPair table[BinLayout::table];
  __shared__ PlaceScratch scratch;
  const int64_t segment = blockIdx.x;
  const auto bins = static_cast<int>(args.counted_bins);
  load_table(args.counted_table ? args.counted_table + segment * BinLayout::table : nullptr, table);
  const Count* bg = static_cast<const Count*>(args.counts.data) + segment * 2 * bins;
  place_segment(bg, bg + bins, BinMap{table}, bins, args.errors, args.sampled, static_cast<int>(args.bins),
                args.table + segment * BinLayout::table, scratch);
}

// ---- weigh

// The coordinates of a bin and of those beside it, from edge to edge, as a thread goes down its bins.
struct BinWalk {
  double below, low, high, above;

  // At bin k, 1 <= k < bins. Beside the outer bins are others as wide.
  __device__ BinWalk(const BinMap& map, int k, int bins)
      : below(0),
        low(map.edge(k, bins)),
        high(map.edge(k + 1, bins)),
        above(k + 1 < bins ? map.edge(k + 2, bins) : 2 * high - low) {
    find_below(map, k, bins);
  }
  // From bin k + 1 to bin k.
  __device__ void step(const BinMap& map, int k, int bins) {
    above = high;
    high = low;
    low = below;
    find_below(map, k, bins);
  }
  __device__ double middle() const { return 0.5 * (low + high); }
  __device__ double width() const { return high - low; }
  __device__ double slope(double count_below, double count_above) const {
    return slope_of_density(count_below, low - below, count_above, above - high, 0.5 * (high + above - below - low));
  }

 private:
  __device__ void find_below(const BinMap& map, int k, int bins) { below = k > 1 ? map.edge(k - 1, bins) : 2 * low - high; }
};

// What a call finds out. Of two calls, the first (`again`) whether bins have to be placed again, and where; the second the
// weights and the loss.
enum class Weigh { all, placement, weights };

template <class T, class Count, Weigh what>
__global__ void __launch_bounds__(threads, 1) lovasz_weigh_kernel(LovaszHistogramWeigh args, SegmentResult* results) {
  __shared__ BinPair table[BinLayout::table];
  __shared__ PlaceScratch scratch;
  constexpr bool weighs = what != Weigh::placement, places = what != Weigh::weights;
  const Errors errors = args.batch.errors;
  const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
  const auto thread = static_cast<int>(threadIdx.x), bins = static_cast<int>(args.bins);
  const int64_t segment = blockIdx.x, classes = args.batch.classes();
  const auto* counts =
      static_cast<const Count*>(args.recounted(segment) ? args.recounts.data : args.counts.data) + segment * 2 * bins;
  const Count* fg_counts = counts + bins;
  T* weights = static_cast<T*>(args.weights) + segment * 2 * bins;
  BinPair* better = args.better_table + segment * BinLayout::table;
  load_table(args.table_of(segment), table);
  const BinMap map{table};
  for (int i = thread; i < BinLayout::table; i += threads) better[i] = table[i];

  const ThreadBins mine(1, bins);
  double thread_fg = 0, thread_bg = 0, all_fg, all_bg;
  for (int k = mine.begin; k < mine.end; ++k) {
    thread_fg += static_cast<double>(fg_counts[k]);
    thread_bg += static_cast<double>(counts[k]);
  }
  const double fg_below = block_scan<threads>(thread_fg, scratch.sum, &all_fg);
  const double bg_below = block_scan<threads>(thread_bg, scratch.sum, &all_bg);
  const auto lowest_fg = static_cast<double>(fg_counts[0]), valid = static_cast<double>(counts[0]);
  const double total = all_fg + lowest_fg, lowest_bg = valid - all_bg - total;
  // On a GPU a target out of range counts as foreground in bin 0, and its largest error as NaN.
  const uint32_t largest = args.largest[segment];
  const bool nan = largest == key_of_nan;
  const bool part = args.selection.takes_part(segment % classes, valid > 0.0 || (nan && total > 0.0), total > 0.0);
  SegmentResult result{.loss = 0.0, .takes_part = part};
  double bound = 0.0;
  bool needs_rebin = false;
  const bool weigh = part && !nan && total > 0.0;
  const float largest_at = coordinate_of_key(largest);
  const bool of_largest = part && !nan && total == 0.0 && largest != 0 && largest_at > -3.0e38f;
  if (weighs && !weigh) {
    const T fill = part && nan ? static_cast<T>(not_a_number) : T(0);
    for (int k = thread; k < 2 * bins; k += threads) weights[k] = fill;
    if (part && nan) result.loss = bound = not_a_number;
  }
  if (of_largest) {  // the largest error has the whole weight
    __syncthreads();
    int top = 0;
    for (int k = mine.begin; k < mine.end; ++k) top = counts[k] > 0 ? k : top;
    top = static_cast<int>(block_reduce<threads>(static_cast<double>(top), scratch.sum, larger));
    const double pixels = top > 0 ? static_cast<double>(counts[top]) : 1.0;
    if (weighs && thread == 0 && top > 0) weights[top] = static_cast<T>(1.0 / pixels);
    for (int i = thread; places && i < BinLayout::table; i += threads) better[i] = largest_pair(i, largest_at, bins);
    result.loss = error_of_coordinate(static_cast<double>(largest_at), folded);
    bound = 2.0 * (1.0 - 1.0 / pixels);
    needs_rebin = true;  // to be counted by that table
  }
  if (weigh) {
    double fg = all_fg - fg_below - thread_fg, bg = all_bg - bg_below - thread_bg;  // in the bins of larger errors
    double loss = 0, bound_sum = 0, weight_sum = 0, gradient_sum = 0, loss_sum = 0;
    BinWalk walk(map, bins - 1, bins);
    int at_bin = 0;  // of the walk; 0: none of this thread
    VEERLOSS_NO_UNROLL
    for (int k = mine.end - 1; k >= mine.begin; --k) {
      const auto f = static_cast<double>(fg_counts[k]), b = static_cast<double>(counts[k]);
      const JaccardBin bin = jaccard_bin(total, fg, bg, f, b);
      if constexpr (weighs) {
        weights[k] = static_cast<T>(bin.bg);
        weights[bins + k] = static_cast<T>(-bin.fg);
      }
      if (f + b == 0.0) {  // adds to no sum; skipped because float64 is slow on many GPUs
        at_bin = 0;
        continue;
      }
      if (at_bin == k + 1)
        walk.step(map, k, bins);
      else
        walk = BinWalk(map, k, bins);
      at_bin = k;
      const double middle = walk.middle(), width = walk.width();
      const ErrorAt error = error_at(middle, exp2(exponent_of(middle, folded)), folded);
      const JaccardBound bin_bound = jaccard_bin_bound(total, fg, bg, f, b);
      if constexpr (weighs) {
        const int low = k > 1 ? k - 1 : k, high = k + 1 < bins ? k + 1 : k;
        const double fg_slope = walk.slope(static_cast<double>(fg_counts[low]), static_cast<double>(fg_counts[high]));
        const double bg_slope = walk.slope(static_cast<double>(counts[low]), static_cast<double>(counts[high]));
        loss += bin.fg * sum_of_errors(error, width, f, fg_slope) + bin.bg * sum_of_errors(error, width, b, bg_slope);
        bound_sum += bin_bound.fg + bin_bound.bg;
      }
      if constexpr (places) {
        const JaccardDeviation deviation =
            jaccard_bin_deviation(bin, bin_bound, f, b, slope_of_error(error.error, softmax), width * error.first);
        weight_sum += deviation.weights;
        gradient_sum += deviation.gradient;
        loss_sum += deviation.loss;
      }
      fg += f;
      bg += b;
    }
    if (thread == 0) {  // bin 0
      if (weighs) weights[0] = weights[bins] = T(0);
      if (softmax) {
        const JaccardBin bin = jaccard_lowest_bin(total, all_bg);
        const JaccardBound bin_bound = jaccard_lowest_bound(total, all_bg, lowest_fg, lowest_bg);
        const double error = error_of_coordinate(map.edge(1, bins), folded);
        const JaccardDeviation deviation =
            jaccard_bin_deviation(bin, bin_bound, lowest_fg, lowest_bg, slope_of_error(error, softmax), 0.0);
        if (weighs) weights[bins] = static_cast<T>(-bin.fg);
        loss += lowest_fg * bin.fg * error;
        bound_sum += bin_bound.fg + bin_bound.bg;
        gradient_sum += deviation.gradient;
        weight_sum += deviation.weights;
      }
    }
    if constexpr (weighs) {
      result.loss = block_sum<threads>(loss, scratch.sum);
      bound = block_sum<threads>(bound_sum, scratch.sum);
    }
    if constexpr (places) {
      weight_sum = block_sum<threads>(weight_sum, scratch.sum);
      gradient_sum = block_sum<threads>(gradient_sum, scratch.sum);
      const double gradient_deviation = weight_sum > 0.0 ? sqrt(gradient_sum / weight_sum) : 0.0;
      const double loss_deviation = sqrt(block_sum<threads>(loss_sum, scratch.sum));
      needs_rebin = gradient_deviation > gradient_tolerance || loss_deviation > loss_tolerance;
      if (needs_rebin) {
        __syncthreads();
        place_segment(counts, fg_counts, map, bins, errors, false, bins, better, scratch);
      }
    }
  }
  if (thread == 0) {
    results[segment] = result;
    args.bounds[segment] = bound;
    args.needs_rebin[segment] = needs_rebin;
  }
}

// Calls f with a value of the type of counts.
template <class F>
void with_count_type(const BinCounts& counts, const F& f) {
  return counts.is_int64 ? f(int64_t{}) : f(int32_t{});
}

struct WeighScratch {
  WeighScratch(const LovaszBatch& b, void* memory) {
    ScratchArrays arrays(memory);
    results = arrays.take<SegmentResult>(b.segments());
    bytes = arrays.bytes();
  }

  SegmentResult* results;
  int64_t bytes;
};

}  // namespace

namespace kernels {

void lovasz_histogram_place(const LovaszHistogramPlace& args) {
  with_count_type(args.counts, [&](auto zero) {
    launch(lovasz_place_kernel<decltype(zero)>, {.blocks = args.segments, .threads = threads, .stream = args.stream}, args);
  });
}

int64_t lovasz_histogram_weigh_scratch_bytes(const LovaszBatch& batch) {
  return WeighScratch(batch, nullptr).bytes;
}

void lovasz_histogram_weigh(const LovaszHistogramWeigh& args) {
  const WeighScratch scratch(args.batch, args.scratch);
  with_opmath_type(args.batch.logits.dtype, [&](auto opmath_zero) {
    using T = decltype(opmath_zero);
    with_count_type(args.counts, [&](auto count_zero) {
      using Count = decltype(count_zero);
      launch(args.again            ? lovasz_weigh_kernel<T, Count, Weigh::placement>
             : args.recounted_mask ? lovasz_weigh_kernel<T, Count, Weigh::weights>
                                   : lovasz_weigh_kernel<T, Count, Weigh::all>,
             {.blocks = args.batch.segments(), .threads = threads, .stream = args.stream}, args, scratch.results);
    });
    if (!args.again) launch_finish<T>(args.batch, scratch.results, args.out, args.stream);
  });
}

}  // namespace kernels
}  // namespace veerloss
