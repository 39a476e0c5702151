// Lovász losses on a GPU, method "histogram": counts to the weights of bins and the loss of each segment, and where it needs
// one to a better table; then the loss of the batch (segments.cuh). math/bins.h has the formulas,
// csrc/cpu/lovasz/histogram_bins.cpp the same without threads.
//
// Every sum has a fixed order: the results are the same bits in every run.

#include "histogram_place.cuh"
#include "segments.cuh"

namespace veerloss {
namespace {

constexpr int threads = BinsPolicy::threads;

// The coordinates of a bin and of those beside it, from edge to edge, as a thread goes down its bins.
struct BinWalk {
  double below, low, high, above;

  BinWalk() = default;
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

// What the bins of a block add to the loss and to the bound of their segment.
struct WeighPart {
  double loss, bound;
};

// Blocks of a segment: one, or where bins are not placed, and so no sum over the segment is needed, one for so many bins as it
// has threads.
template <Weigh what>
VEERLOSS_HD int64_t parts_of(int64_t bins) {
  return what == Weigh::weights ? (bins - 1 + threads - 1) / threads : 1;
}

template <class T, class Count, Weigh what>
__global__ void __launch_bounds__(threads, 1)
    lovasz_weigh_kernel(LovaszHistogramWeigh args, bool* takes_part, WeighPart* parts) {
  __shared__ BinPair table[BinLayout::table];
  __shared__ PlaceScratch scratch;
  constexpr bool weighs = what != Weigh::placement, places = what != Weigh::weights;
  const Errors errors = args.batch.errors;
  const bool softmax = errors == Errors::softmax, folded = errors != Errors::hinge;
  const auto thread = static_cast<int>(threadIdx.x), bins = static_cast<int>(args.bins);
  const int64_t classes = args.batch.classes();
  const auto blocks = static_cast<uint32_t>(parts_of<what>(bins)), block = blockIdx.x % blocks;
  const int64_t segment = blockIdx.x / blocks;
  const int slice = blocks > 1 ? threads : bins, first = block > 0 ? 1 + static_cast<int>(block) * slice : 0;
  const int begin = first > 0 ? first : 1,
            end = 1 + static_cast<int>(block + 1) * slice < bins ? 1 + static_cast<int>(block + 1) * slice : bins;
  const auto* counts =
      static_cast<const Count*>(args.recounted(segment) ? args.recounts.data : args.counts.data) + segment * 2 * bins;
  const Count* fg_counts = counts + bins;
  T* weights = static_cast<T*>(args.weights) + segment * 2 * bins;
  BinPair* better = args.better_table + segment * BinLayout::table;
  load_table(args.table_of(segment), table);
  const BinMap map{table};
  for (int i = thread; block == 0 && i < BinLayout::table; i += threads) better[i] = table[i];

  // Of the bins of this block, of those of a thread, and of those below and above.
  const ThreadBins mine(begin, end);
  double thread_fg = 0, thread_bg = 0, fg_low = 0, bg_low = 0, fg_high = 0, bg_high = 0, block_fg, block_bg;
  for (int k = mine.begin; k < mine.end; ++k) {
    thread_fg += static_cast<double>(fg_counts[k]);
    thread_bg += static_cast<double>(counts[k]);
  }
  const double fg_before = block_scan<threads>(thread_fg, scratch.sum, &block_fg);
  const double bg_before = block_scan<threads>(thread_bg, scratch.sum, &block_bg);
  if (blocks > 1) {
    for (int k = 1 + thread; k < begin; k += threads) {
      fg_low += static_cast<double>(fg_counts[k]);
      bg_low += static_cast<double>(counts[k]);
    }
    for (int k = end + thread; k < bins; k += threads) {
      fg_high += static_cast<double>(fg_counts[k]);
      bg_high += static_cast<double>(counts[k]);
    }
    fg_low = block_sum<threads>(fg_low, scratch.sum);
    bg_low = block_sum<threads>(bg_low, scratch.sum);
    fg_high = block_sum<threads>(fg_high, scratch.sum);
    bg_high = block_sum<threads>(bg_high, scratch.sum);
  }
  const double all_fg = fg_low + block_fg + fg_high, all_bg = bg_low + block_bg + bg_high;
  const auto lowest_fg = static_cast<double>(fg_counts[0]), valid = static_cast<double>(counts[0]);
  const double total = all_fg + lowest_fg, lowest_bg = valid - all_bg - total;
  // On a GPU a target out of range counts as foreground in bin 0, and its largest error as NaN.
  const uint32_t largest = args.largest[segment];
  const bool nan = largest == key_of_nan;
  const bool part = args.selection.takes_part(segment % classes, valid > 0.0 || (nan && total > 0.0), total > 0.0);
  double loss = 0.0, bound = 0.0;  // of this block's bins
  bool needs_rebin = false;
  const bool weigh = part && !nan && total > 0.0;
  const float largest_at = coordinate_of_key(largest);
  const bool of_largest = part && !nan && total == 0.0 && largest != 0 && largest_at > -3.0e38f;
  if (weighs && !weigh) {
    const T fill = part && nan ? static_cast<T>(not_a_number) : T(0);
    for (int k = first + thread; k < end; k += threads) weights[k] = weights[bins + k] = fill;
    if (part && nan) loss = bound = not_a_number;
  }
  if (of_largest) {  // the largest error has the whole weight
    __syncthreads();
    int top = 0;
    for (int k = 1 + thread; k < bins; k += threads) top = counts[k] > 0 ? k : top;
    top = static_cast<int>(block_reduce<threads>(static_cast<double>(top), scratch.sum, larger));
    const double pixels = top > 0 ? static_cast<double>(counts[top]) : 1.0;
    if (weighs && thread == 0 && top >= begin && top < end) weights[top] = static_cast<T>(1.0 / pixels);
    for (int i = thread; places && i < BinLayout::table; i += threads) better[i] = largest_pair(i, largest_at, bins);
    if (block == 0) {
      loss = error_of_coordinate(static_cast<double>(largest_at), folded);
      bound = 2.0 * (1.0 - 1.0 / pixels);
    }
    needs_rebin = true;  // to be counted by that table
  }
  if (weigh) {
    double fg = fg_high + (block_fg - fg_before - thread_fg),
           bg = bg_high + (block_bg - bg_before - thread_bg);  // larger errors
    double weight_sum = 0, gradient_sum = 0, loss_sum = 0;
    BinWalk walk;
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
        bound += bin_bound.fg + bin_bound.bg;
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
    if (block == 0 && thread == 0) {  // bin 0
      if (weighs) weights[0] = weights[bins] = T(0);
      if (softmax) {
        const JaccardBin bin = jaccard_lowest_bin(total, all_bg);
        const JaccardBound bin_bound = jaccard_lowest_bound(total, all_bg, lowest_fg, lowest_bg);
        const double error = error_of_coordinate(map.edge(1, bins), folded);
        const JaccardDeviation deviation =
            jaccard_bin_deviation(bin, bin_bound, lowest_fg, lowest_bg, slope_of_error(error, softmax), 0.0);
        if (weighs) weights[bins] = static_cast<T>(-bin.fg);
        loss += lowest_fg * bin.fg * error;
        bound += bin_bound.fg + bin_bound.bg;
        gradient_sum += deviation.gradient;
        weight_sum += deviation.weights;
      }
    }
    if constexpr (weighs) {
      loss = block_sum<threads>(loss, scratch.sum);
      bound = block_sum<threads>(bound, scratch.sum);
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
  if (thread != 0) return;
  if (weighs) parts[blockIdx.x] = {loss, bound};
  if (block != 0) return;
  takes_part[segment] = part;
  args.needs_rebin[segment] = needs_rebin;
}

// The results of all segments, from the parts of each, for lovasz_finish_kernel.
struct WeighResults {
  const bool* part_taken;
  const WeighPart* parts;
  double* bounds;
  int blocks;  // of a segment

  __device__ bool takes_part(int64_t segment) const { return part_taken[segment]; }
  __device__ double loss(int64_t segment) const {
    WeighPart sum{0.0, 0.0};
    for (int k = 0; k < blocks; ++k) {
      sum.loss += parts[segment * blocks + k].loss;
      sum.bound += parts[segment * blocks + k].bound;
    }
    bounds[segment] = sum.bound;
    return sum.loss;
  }
};

struct WeighScratch {
  WeighScratch(const SegmentBatch& b, void* memory) {
    ScratchArrays arrays(memory);
    takes_part = arrays.take<bool>(b.segments());
    parts = arrays.take<WeighPart>(b.segments() * parts_of<Weigh::weights>(BinLayout::bins(b.classes())));
    bytes = arrays.bytes();
  }

  bool* takes_part;
  WeighPart* parts;
  int64_t bytes;
};

}  // namespace

int64_t kernels::lovasz_histogram_weigh_scratch_bytes(const SegmentBatch& batch) {
  return WeighScratch(batch, nullptr).bytes;
}

void kernels::lovasz_histogram_weigh(const LovaszHistogramWeigh& args) {
  const WeighScratch scratch(args.batch, args.scratch);
  with_opmath_type(args.batch.logits.dtype, [&](auto opmath_zero) {
    using T = decltype(opmath_zero);
    const auto run = [&]<Weigh what>() {
      const int64_t parts = parts_of<what>(args.bins);
      with_count_type(args.counts, [&](auto zero) {
        launch(lovasz_weigh_kernel<T, decltype(zero), what>,
               {.blocks = args.batch.segments() * parts, .threads = threads, .stream = args.stream}, args, scratch.takes_part,
               scratch.parts);
      });
      if (what != Weigh::placement)
        launch_finish<T>(args.batch, WeighResults{scratch.takes_part, scratch.parts, args.bounds, static_cast<int>(parts)},
                         args.out, args.stream);
    };
    if (args.again)
      run.template operator()<Weigh::placement>();
    else if (args.recounted_mask)
      run.template operator()<Weigh::weights>();
    else
      run.template operator()<Weigh::all>();
  });
}

}  // namespace veerloss
