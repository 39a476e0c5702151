// Lovász losses on a GPU, method "histogram": the steps over bins, with one block for each segment. histogram_pixels.cu has
// those over pixels; math/bins.h has the formulas.
//
//   allocate bins  counts to the number of bins of each cell
//   weigh          counts to the weights of bins and the loss of each segment, then the loss of the batch (segments.cuh)
//
// Every sum has a fixed order: the results are the same bits in every run.

#include "../../math/bins.h"
#include "segments.cuh"

namespace veerloss {
namespace {

constexpr int threads = Tuning::HistogramBins::threads;

// One past the last bin that a table uses.
__device__ inline int used_bins(const uint32_t* table, int cells) {
  return static_cast<int>(entry_first_bin(table[cells - 1]) + entry_bins(table[cells - 1]));
}

// The cell that has a bin >= 1.
__device__ inline int cell_of_bin(const uint32_t* table, int cells, int bin) {
  int low = 0, high = cells;  // first bin of low <= bin < first bin of high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (static_cast<int>(entry_first_bin(table[middle])) <= bin)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---- allocate bins

// A cell in its three states, in the same shared memory: two arrays take 32 of the 48 KiB that a block has.
union CellValue {
  unsigned long long count;  // pixels, background or foreground
  double square;             // what they cost: the square error of the gradient or of the loss
  double root;               // the relative cube root of that
};

template <class Count>
__global__ void __launch_bounds__(threads) lovasz_allocate_bins_kernel(LovaszHistogramAllocateBins args) {
  __shared__ CellValue cell_bg[ErrorCells::max_cells], cell_fg[ErrorCells::max_cells];
  __shared__ double scratch[threads];
  const BinLayout layout(args.errors);
  const auto thread = static_cast<int>(threadIdx.x), cells = static_cast<int>(layout.cells);
  const int64_t segment = blockIdx.x;
  const auto bins = static_cast<int>(args.counted_table ? layout.bins : layout.coarse_bins);
  const Count* counts = static_cast<const Count*>(args.counts.data) + segment * 2 * bins;
  if (args.counted_table) {
    const uint32_t* table = args.counted_table + segment * cells;
    for (int c = thread; c < cells; c += threads) cell_bg[c].count = cell_fg[c].count = 0;
    __syncthreads();
    const int used = used_bins(table, cells);
    for (int bin = 1 + thread; bin < used; bin += threads) {
      if (counts[bin] == 0 && counts[bins + bin] == 0) continue;
      const int c = cell_of_bin(table, cells, bin);
      atomicAdd(&cell_bg[c].count, static_cast<unsigned long long>(counts[bin]));
      atomicAdd(&cell_fg[c].count, static_cast<unsigned long long>(counts[bins + bin]));
    }
  } else {
    for (int c = thread; c < cells; c += threads) {
      cell_bg[c].count = static_cast<unsigned long long>(counts[1 + c]);
      cell_fg[c].count = static_cast<unsigned long long>(counts[bins + 1 + c]);
    }
  }
  __syncthreads();

  // Each thread has neighbouring cells. Doubles hold the counts exactly.
  const int per_thread = (cells + threads - 1) / threads;
  const int begin = thread * per_thread < cells ? thread * per_thread : cells;
  const int end = begin + per_thread < cells ? begin + per_thread : cells;
  double thread_bg = 0, thread_fg = 0, all_bg, all_fg;
  for (int c = begin; c < end; ++c) {
    thread_bg += static_cast<double>(cell_bg[c].count);
    thread_fg += static_cast<double>(cell_fg[c].count);
  }
  const double bg_below = block_scan<threads>(thread_bg, scratch, &all_bg);
  const double fg_below = block_scan<threads>(thread_fg, scratch, &all_fg);
  double bg = all_bg - bg_below - thread_bg, fg = all_fg - fg_below - thread_fg;  // in the cells of larger errors
  const double foreground = all_fg + static_cast<double>(counts[bins]), total = foreground > 1.0 ? foreground : 1.0;

  CellValue *const gradient = cell_bg, *const loss = cell_fg;  // from here on
  double max_gradient = 0, max_loss = 0;
  for (int c = end - 1; c >= begin; --c) {
    const auto b = static_cast<double>(cell_bg[c].count), f = static_cast<double>(cell_fg[c].count);
    gradient[c].square = loss[c].square = 0.0;
    if (b + f == 0) continue;
    const double low = cell_begin(layout, c), high = cell_begin(layout, c + 1), middle = 0.5 * (low + high);
    const JaccardDeviation deviation =
        jaccard_bin_deviation(jaccard_bin(total, fg, bg, f, b), jaccard_bin_bound(total, fg, bg, f, b), f, b,
                              slope_of_error(middle < 1.0 ? middle : 1.0, layout.bounded), high - low);
    gradient[c].square = deviation.gradient > 0.0 ? deviation.gradient : 0.0;
    loss[c].square = deviation.loss;
    max_gradient = gradient[c].square > max_gradient ? gradient[c].square : max_gradient;
    max_loss = loss[c].square > max_loss ? loss[c].square : max_loss;
    fg += f;
    bg += b;
  }
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  max_gradient = block_reduce<threads>(max_gradient, scratch, larger);
  max_loss = block_reduce<threads>(max_loss, scratch, larger);
  double sum_gradient = 0, sum_loss = 0;
  for (int c = begin; c < end; ++c) {
    gradient[c].root = relative_cube_root(gradient[c].square, max_gradient);
    loss[c].root = relative_cube_root(loss[c].square, max_loss);
    sum_gradient += gradient[c].root;
    sum_loss += loss[c].root;
  }
  sum_gradient = block_sum<threads>(sum_gradient, scratch);
  sum_loss = block_sum<threads>(sum_loss, scratch);
  const auto bins_of = [&](int c) { return bins_of_cell(gradient[c].root, sum_gradient, loss[c].root, sum_loss); };
  double thread_bins = 0, all_bins;
  for (int c = begin; c < end; ++c) thread_bins += bins_of(c);
  auto first = 1 + static_cast<uint32_t>(block_scan<threads>(thread_bins, scratch, &all_bins));
  for (int c = begin; c < end; ++c) {
    const uint32_t n = bins_of(c);
    args.table[segment * cells + c] = pack_entry(first, n);
    first += n;
  }
}

// ---- weigh

template <class T, class Count>
__global__ void __launch_bounds__(threads) lovasz_weigh_kernel(LovaszHistogramWeigh args, SegmentResults results) {
  __shared__ uint32_t table[ErrorCells::max_cells];
  __shared__ double scratch[threads];
  const BinLayout layout(args.batch.errors);
  const auto thread = static_cast<int>(threadIdx.x), cells = static_cast<int>(layout.cells),
             bins = static_cast<int>(layout.bins);
  const int64_t segment = blockIdx.x, classes = args.batch.classes();
  const Count *counts = static_cast<const Count*>(args.counts.data) + segment * 2 * bins, *fg_counts = counts + bins;
  T* weights = static_cast<T*>(args.weights.weights) + segment * 2 * bins;
  T* max_weight = static_cast<T*>(args.weights.max_weight) + segment * 2;
  for (int c = thread; c < cells; c += threads) table[c] = args.table[segment * cells + c];
  __syncthreads();
  const int used = used_bins(table, cells);

  // Each thread has neighbouring bins, the first thread those of the largest errors.
  const int per_thread = (used - 1 + threads - 1) / threads;
  const int end = used - thread * per_thread > 1 ? used - thread * per_thread : 1;
  const int begin = end - per_thread > 1 ? end - per_thread : 1;
  double thread_bg = 0, thread_fg = 0, all_bg, all_fg;
  for (int k = begin; k < end; ++k) {
    thread_bg += static_cast<double>(counts[k]);
    thread_fg += static_cast<double>(fg_counts[k]);
  }
  double bg = block_scan<threads>(thread_bg, scratch, &all_bg);  // in the bins of larger errors
  double fg = block_scan<threads>(thread_fg, scratch, &all_fg);
  const double total = all_fg + static_cast<double>(fg_counts[0]);
  const bool has_valid = total + all_bg + static_cast<double>(counts[0]) > 0.0;
  const double max_error = args.max_error[2 * segment], max_error_count = args.max_error[2 * segment + 1];
  const bool nan = max_error != max_error, bad_target = nan && max_error_count < 0.0;
  const bool part = args.selection.takes_part(segment % classes, bad_target || has_valid, bad_target || total > 0.0);
  const bool weigh = part && !nan && total > 0.0, on_max_error = part && !nan && total == 0.0;

  SegmentResult result{.loss = 0.0, .bound = 0.0, .gradient_deviation = 0.0, .loss_deviation = 0.0, .takes_part = part};
  T fill = T(0);  // the weight of the bins that the loop below leaves out
  if (part && nan) {
    result.loss = result.bound = max_error;
    fill = static_cast<T>(max_error);
  } else if (on_max_error) {
    result.loss = max_error;
    result.bound = 2.0 * (1.0 - 1.0 / max_error_count);
  }
  if (thread == 0) {
    max_weight[0] = static_cast<T>(on_max_error ? max_error : 0.0);
    max_weight[1] = static_cast<T>(on_max_error ? 1.0 / max_error_count : 0.0);
  }
  for (int k = thread; k < bins; k += threads)
    if (!weigh || k == 0 || k >= used) {
      weights[k] = k == 0 ? T(0) : fill;
      weights[bins + k] = fill;
    }
  if (weigh) {
    double bound_sum = 0, weight_sum = 0, gradient_sum = 0, loss_sum = 0;
    int cell = begin < end ? cell_of_bin(table, cells, end - 1) : 0;
    for (int k = end - 1; k >= begin; --k) {
      while (static_cast<int>(entry_first_bin(table[cell])) > k) --cell;
      const auto first = static_cast<int>(entry_first_bin(table[cell])), cell_bins = static_cast<int>(entry_bins(table[cell]));
      const double cell_low = cell_begin(layout, cell), bin_width = (cell_begin(layout, cell + 1) - cell_low) / cell_bins;
      const auto b = static_cast<double>(counts[k]), f = static_cast<double>(fg_counts[k]);
      const double low = cell_low + bin_width * (k - first), high = low + bin_width < max_error ? low + bin_width : max_error;
      const double width = high - low;
      double middle = 0.5 * (low + high);
      double fg_slope = slope_of_counts(fg_counts + first, k - first, cell_bins);
      double bg_slope = slope_of_counts(counts + first, k - first, cell_bins);
      if (fg + bg == 0.0 && f + b > 0.0) {  // the first: it has the largest error, known exactly
        middle += (max_error - middle) / (f + b);
        fg_slope = bg_slope = 0.0;
      }
      const JaccardBin bin = jaccard_bin(total, fg, bg, f, b);
      weights[k] = static_cast<T>(bin.bg);
      weights[bins + k] = static_cast<T>(-bin.fg);
      if (f + b == 0.0) continue;  // adds to no sum; skipped because float64 is slow on many GPUs
      const JaccardBound bound = jaccard_bin_bound(total, fg, bg, f, b);
      const JaccardDeviation deviation = jaccard_bin_deviation(bin, bound, f, b, slope_of_error(middle, layout.bounded), width);
      result.loss += bin.fg * f * mean_error(middle, width, f, fg_slope) + bin.bg * b * mean_error(middle, width, b, bg_slope);
      bound_sum += bound.fg + bound.bg;
      weight_sum += deviation.weights;
      gradient_sum += deviation.gradient;
      loss_sum += deviation.loss;
      fg += f;
      bg += b;
    }
    result.loss = block_sum<threads>(result.loss, scratch);
    result.bound = block_sum<threads>(bound_sum, scratch);
    weight_sum = block_sum<threads>(weight_sum, scratch);
    gradient_sum = block_sum<threads>(gradient_sum, scratch);
    result.gradient_deviation = weight_sum > 0.0 ? sqrt(gradient_sum / weight_sum) : 0.0;
    result.loss_deviation = sqrt(block_sum<threads>(loss_sum, scratch));
  }
  if (thread == 0) results.store(segment / classes, segment, result);
}

struct WeighScratch {
  WeighScratch(const LovaszBatch& b, void* memory) {
    ScratchArrays arrays(memory);
    results.in_mean = arrays.take<int32_t>(b.rows());
    zeroed_bytes = arrays.bytes();
    results.results = arrays.take<SegmentResult>(b.segments());
    bytes = arrays.bytes();
  }

  SegmentResults results;
  int64_t zeroed_bytes, bytes;
};

// Calls f with a value of the type of counts.
template <class F>
void with_count_type(const BinCounts& counts, const F& f) {
  return counts.is_int64 ? f(int64_t{}) : f(int32_t{});
}

}  // namespace

namespace kernels {

void lovasz_histogram_allocate_bins(const LovaszHistogramAllocateBins& args) {
  with_count_type(args.counts, [&](auto zero) {
    launch(lovasz_allocate_bins_kernel<decltype(zero)>, {.blocks = args.segments, .threads = threads, .stream = args.stream},
           args);
  });
}

int64_t lovasz_histogram_weigh_scratch_bytes(const LovaszBatch& batch) {
  return WeighScratch(batch, nullptr).bytes;
}

void lovasz_histogram_weigh(const LovaszHistogramWeigh& args) {
  const WeighScratch scratch(args.batch, args.scratch);
  zero_memory(args.scratch, scratch.zeroed_bytes, args.stream);
  with_opmath_type(args.batch.logits.dtype, [&](auto opmath_zero) {
    using T = decltype(opmath_zero);
    with_count_type(args.counts, [&](auto count_zero) {
      launch(lovasz_weigh_kernel<T, decltype(count_zero)>,
             {.blocks = args.batch.segments(), .threads = threads, .stream = args.stream}, args, scratch.results);
    });
    launch_finish<T>(args.batch, scratch.results, args.out, {.bounds = args.bounds, .needs_rebin = args.needs_rebin},
                     args.stream);
  });
}

}  // namespace kernels
}  // namespace veerloss
