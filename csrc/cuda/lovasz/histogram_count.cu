// Lovász losses on a GPU, method "histogram": count pixels by the bins of their errors. veerloss/_histogram.py has the order of
// the steps, csrc/kernels.h describes the tensors.
//
//   softmax     a block has the counts and tables of all its classes in shared memory, and reads each logit once. Where not all
//               classes fit, blocks of the same pixels share out the classes, and the logits come from L2
//   statistics  of more classes than registers hold: maximum and sum of exponentials of every pixel
//   classes     probabilities, a hinge, and those many classes: one class after another
//
// Counts are integers: the results are the same bits in every run.

#include "coordinates.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::HistogramCount;

// A word for each bin of a class: background in the low 16 bits, foreground in the high ones. A chunk is too short for
// overflow.
constexpr uint32_t one_background = 1, one_foreground = 1u << 16;
static_assert(Policy::most_tiles * Policy::threads < 65536, "counts of 16 bits");

// Words between the counts of two classes: known from the number of classes, also where there are less bins, of the coarse
// pass.
VEERLOSS_HD constexpr int64_t plane_of(int64_t classes) {
  return BinLayout::bins(classes);
}

// Shared memory of a class: its table, and its counts.
VEERLOSS_HD constexpr int64_t table_bytes() {
  return BinLayout::table * static_cast<int64_t>(sizeof(BinPair));
}
VEERLOSS_HD constexpr int64_t class_bytes(int64_t classes) {
  return table_bytes() + 4 * plane_of(classes);
}

// How classes are shared out among blocks.
struct Groups {
  int classes, groups;  // of a group at most; their number
};

Groups groups_of(const LovaszBatch& b) {
  const int64_t fit = (max_shared_bytes_of_block() - Policy::static_bytes) / class_bytes(b.classes());
  if (fit < 1) throw std::runtime_error("veerloss: method 'histogram' needs 36 KiB of shared memory for a block");
  const int64_t groups = ceil_div(b.classes(), fit);
  return {static_cast<int>(ceil_div(b.classes(), groups)), static_cast<int>(groups)};
}

// What a block has beside the classes.
struct BlockCounts {
  BinPair* tables;   // [classes of the group][BinLayout::table]
  uint32_t* counts;  // [classes of the group][plane_of], of which args.bins are used
  int64_t row;
  int first_class, end_class;
};

__device__ inline BlockCounts block_counts(const LovaszHistogramCount& args, unsigned char* memory, int64_t row, int group,
                                           Groups groups) {
  const auto classes = static_cast<int>(args.batch.classes());
  const int first = group * groups.classes, end = first + groups.classes < classes ? first + groups.classes : classes;
  auto* tables = reinterpret_cast<BinPair*>(memory);
  return {tables, reinterpret_cast<uint32_t*>(tables + (end - first) * BinLayout::table), row, first, end};
}

__device__ inline bool is_counted(const LovaszHistogramCount& args, int64_t row, int c) {
  return !args.segment_mask || args.segment_mask[row * args.batch.classes() + c];
}

// Zero counts, and tables; of a class that is not counted one that finds bin 0 for every pixel. Whether any class is counted.
__device__ inline bool begin_block(const LovaszHistogramCount& args, const BlockCounts& block) {
  bool any = false;
  for (int c = block.first_class; c < block.end_class; ++c) any |= is_counted(args, block.row, c);
  if (!any) return false;
  const int classes = block.end_class - block.first_class, table = BinLayout::table;
  for (int i = static_cast<int>(threadIdx.x); i < classes * table; i += Policy::threads) {
    const int c = block.first_class + i / table, k = i % table;
    BinPair pair = args.table ? args.table[(block.row * args.batch.classes() + c) * table + k] : coarse_pair(k);
    if (!is_counted(args, block.row, c)) pair = {0.0f, k == 0 ? 0.0f : BinLayout::magic};
    block.tables[i] = pair;
  }
  const auto words = classes * static_cast<int>(plane_of(args.batch.classes()));
  for (int i = static_cast<int>(threadIdx.x); i < words; i += Policy::threads) block.counts[i] = 0;
  return true;
}

// Adds a block's counts to those of the segments. `valid` pixels of it count; bad: a target is out of range.
__device__ inline void end_block(const LovaszHistogramCount& args, const BlockCounts& block, int valid, bool bad, bool nan) {
  const auto bins = static_cast<int>(args.bins);
  const int64_t classes = args.batch.classes(), plane = plane_of(classes);
  int32_t* counts = args.counts + (block.row * classes + block.first_class) * 2 * bins;
  for (int c = 0; c < block.end_class - block.first_class; ++c) {
    if (!is_counted(args, block.row, block.first_class + c)) continue;
    for (int k = static_cast<int>(threadIdx.x); k < bins; k += Policy::threads) {
      const uint32_t word = block.counts[c * plane + k];
      if (word & 0xffff) atomicAdd(counts + 2 * c * bins + k, static_cast<int32_t>(word & 0xffff));
      if (word >> 16) atomicAdd(counts + (2 * c + 1) * bins + k, static_cast<int32_t>(word >> 16));
    }
    if (threadIdx.x != 0) continue;
    atomicAdd(counts + 2 * c * bins, valid);
    if (bad) atomicAdd(counts + (2 * c + 1) * bins, 1);
    if (bad || nan) atomicMax(args.largest + block.row * classes + block.first_class + c, key_of_nan);
  }
}

// ---- softmax, in registers

template <class In, class Range, bool grouped, bool flat>
__global__ void __launch_bounds__(Policy::threads)
    lovasz_count_softmax_kernel(LovaszHistogramCount args, Chunks chunks, Groups groups) {
  using T = opmath_t<In>;
  constexpr int plane = plane_of(Range::most);
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ int block_valid, block_bad, block_nan;
  const LovaszBatch& b = args.batch;
  const auto classes = static_cast<int>(b.classes());
  const auto [first_image, part, group] = image_part(chunks.chunks, groups.groups);
  const BlockCounts block = block_counts(args, memory, b.per_image ? first_image : 0, static_cast<int>(group), groups);
  if (!begin_block(args, block)) return;
  if (threadIdx.x == 0) block_valid = block_bad = block_nan = 0;
  __syncthreads();

  const int64_t begin = chunks.begin(part), end = chunks.end(part);
  int valid = 0;
  bool bad = false, nan = false;
  const BlockPixels<flat> pixels{chunks, first_image};
  VEERLOSS_NO_UNROLL  // registers are for the classes
      for (uint32_t j = static_cast<uint32_t>(begin) + threadIdx.x; j < static_cast<uint32_t>(end); j += Policy::threads) {
    const uint32_t image = pixels.image(j);
    const int32_t pixel = pixels.pixel(j);
    if (pixel < 0) continue;
    const int32_t label = load_integer_label(b.target, b.rule, image, pixel);
    if (label < 0) {
      bad |= label == label_bad;
      continue;
    }
    ++valid;
    const NearClasses<In> logits(b.logits, image, static_cast<uint32_t>(pixel));
    T below[Range::most];
    load_near<Range>(below, logits, classes);
    const T max_logit = max_of(below);
    SumExclMax<T> sum;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      below[c] = below_largest(below[c], max_logit);
      sum.add(exp2_of(below[c]));
    }
    nan |= sum.sum != sum.sum;
    const PixelCoordinates<T> coordinates(sum.sum);
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      if (!Range::has(c, classes)) continue;
      if (grouped && (c < block.first_class || c >= block.end_class)) continue;
      const int k = grouped ? c - block.first_class : c;
      const uint32_t bin = bin_offset_of(coordinates.of(below[c]), block.tables + k * BinLayout::table);
      if (bin != 0 && c != label)
        atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(block.counts + k * plane) + bin), one_background);
    }
    // The label's class, whose logit is in L1.
    if (label < classes && (!grouped || (label >= block.first_class && label < block.end_class))) {
      const int k = grouped ? label - block.first_class : label;
      const T logit = logits.load(label);
      const uint32_t bin = bin_offset_of(-coordinates.of(below_largest(logit, max_logit)), block.tables + k * BinLayout::table);
      atomicAdd(reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(block.counts + k * plane) + bin), one_foreground);
    }
  }
  if (valid) atomicAdd(&block_valid, valid);
  if (bad) block_bad = 1;
  if (nan) block_nan = 1;
  __syncthreads();
  end_block(args, block, block_valid, block_bad != 0, block_nan != 0);
}

// ---- one class after another

// statistics: [N, P]; of a sample, only those of its pixels are written.
template <class In>
__global__ void __launch_bounds__(Tuning::HistogramStatistics::threads)
    lovasz_statistics_kernel(LovaszHistogramCount args, Chunks chunks, Softmax<opmath_t<In>>* statistics) {
  constexpr int threads = Tuning::HistogramStatistics::threads;
  const LovaszBatch& b = args.batch;
  const auto [first_image, part, none] = image_part(chunks.chunks);
  bool any = false;  // a mask may be empty: then the pass ends at once
  for (int64_t i = 0; i < b.segments() && !any; ++i) any = !args.segment_mask || args.segment_mask[i];
  const int64_t begin = chunks.begin(part), end = chunks.end(part);
  for (int64_t j = begin + threadIdx.x; any && j < end; j += threads) {
    const auto [image, pixel] = block_pixel(chunks, first_image, j);
    if (pixel < 0 || load_label(b.target, b.rule, image, pixel) < 0) continue;
    statistics[image * b.geometry.pixels + pixel] = statistics_of_pixel<In, CoordinateExp>(b.logits, b.classes(), image, pixel);
  }
}

template <class In, Errors errors>
__global__ void __launch_bounds__(Policy::threads)
    lovasz_count_classes_kernel(LovaszHistogramCount args, Chunks chunks, Groups groups,
                                const Softmax<opmath_t<In>>* statistics) {
  using T = opmath_t<In>;
  constexpr bool softmax = errors == Errors::softmax;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ int block_valid, block_bad, block_nan;
  __shared__ uint32_t block_largest;
  const LovaszBatch& b = args.batch;
  const auto plane = static_cast<int>(plane_of(b.classes()));
  const auto [first_image, part, group] = image_part(chunks.chunks, groups.groups);
  const BlockCounts block = block_counts(args, memory, b.per_image ? first_image : 0, static_cast<int>(group), groups);
  if (!begin_block(args, block)) return;
  if (threadIdx.x == 0) block_valid = block_bad = block_nan = 0;
  const int64_t begin = chunks.begin(part), end = chunks.end(part);
  int valid = 0;
  bool bad = false, nan = false;
  for (int c = block.first_class; c < block.end_class; ++c) {
    if (threadIdx.x == 0) block_largest = 0;
    __syncthreads();
    const BinPair* table = block.tables + (c - block.first_class) * BinLayout::table;
    auto* counts = reinterpret_cast<char*>(block.counts + (c - block.first_class) * plane);
    uint32_t largest = 0;
    VEERLOSS_NO_UNROLL
    for (int64_t j = begin + threadIdx.x; j < end; j += Policy::threads) {
      const auto [image, pixel] = block_pixel(chunks, first_image, j);
      if (pixel < 0) continue;
      const int32_t label = load_label(b.target, b.rule, image, pixel);
      if (label < 0) {
        bad |= label == label_bad;
        continue;
      }
      valid += c == block.first_class;
      const T x = load<In>(b.logits, image, c, pixel);
      const bool foreground = label == b.foreground(c);
      float coordinate;
      if constexpr (softmax) {
        const Softmax<T> all = statistics[image * b.geometry.pixels + pixel];
        nan |= all.sumexp_excl_max != all.sumexp_excl_max;
        coordinate = PixelCoordinates<T>(all.sumexp_excl_max).of(below_largest(x, all.max_logit));
        coordinate = foreground ? -coordinate : coordinate;
      } else {
        coordinate = coordinate_of_error<errors>(x, foreground);
      }
      const uint32_t key = key_of_coordinate(coordinate);
      largest = key > largest ? key : largest;
      uint32_t bin = bin_offset_of(coordinate, table);
      if (!softmax) bin = 4 * static_cast<uint32_t>(bin_of_error(static_cast<int32_t>(bin / 4), coordinate, true));
      if (bin != 0 || foreground)
        atomicAdd(reinterpret_cast<uint32_t*>(counts + bin), foreground ? one_foreground : one_background);
    }
    if (args.find_largest || largest == key_of_nan) atomicMax(&block_largest, largest);
    __syncthreads();
    if (threadIdx.x == 0 && block_largest != 0 && is_counted(args, block.row, c))
      atomicMax(args.largest + block.row * b.classes() + c, block_largest);
    __syncthreads();
  }
  if (valid) atomicAdd(&block_valid, valid);
  if (bad) block_bad = 1;
  if (nan) block_nan = 1;
  __syncthreads();
  end_block(args, block, block_valid, block_bad != 0, block_nan != 0);
}

// ---- launches

// Classes in registers are counted without their largest errors.
bool fits_registers(const LovaszHistogramCount& args) {
  const LovaszBatch& b = args.batch;
  return b.errors == Errors::softmax && !args.find_largest && b.logits.dtype != DType::f64 && is_integer(b.target.dtype) &&
         are_near(b.logits) && b.classes() <= Policy::most_classes;
}

Chunks count_chunks(const LovaszBatch& b, int64_t groups, bool sampled) {
  return chunks_of(b, Policy::threads, Policy::most_tiles, multiprocessors(), groups, sampled);
}

template <class In>
void count(const LovaszHistogramCount& args) {
  using T = opmath_t<In>;
  const LovaszBatch& b = args.batch;
  const Groups groups = groups_of(b);
  const Chunks chunks = count_chunks(b, groups.groups, args.sampled);
  const Launch shape{.blocks = chunks.images * chunks.chunks * groups.groups,
                     .threads = Policy::threads,
                     .stream = args.stream,
                     .shared_bytes = groups.classes * class_bytes(b.classes())};
  if (fits_registers(args))
    return with_class_range<In>(b.classes(), [&](auto range) {
      using Range = decltype(range);
      if constexpr (!std::is_same_v<In, double> && Range::most > 0 && Range::most <= Policy::most_classes)
        with_flag(groups.groups > 1, [&](auto grouped) {
          with_flag(chunks.flat, [&](auto flat) {
            launch(lovasz_count_softmax_kernel<In, Range, decltype(grouped)::value, decltype(flat)::value>, shape, args, chunks,
                   groups);
          });
        });
    });
  auto* statistics = static_cast<Softmax<T>*>(args.scratch);
  if (b.errors == Errors::softmax) {
    constexpr int threads = Tuning::HistogramStatistics::threads;
    const Chunks parts = chunks_of(b, threads, 1, 1, 1, args.sampled);
    launch(lovasz_statistics_kernel<In>, {.blocks = parts.images * parts.chunks, .threads = threads, .stream = args.stream},
           args, parts, statistics);
  }
  with_errors(b.errors, [&](auto errors) {
    launch(lovasz_count_classes_kernel<In, decltype(errors)::value>, shape, args, chunks, groups, statistics);
  });
}

}  // namespace

int64_t kernels::lovasz_histogram_scratch_bytes(const LovaszHistogramCount& args) {
  const LovaszBatch& b = args.batch;
  if (b.errors != Errors::softmax || fits_registers(args)) return 0;
  return with_opmath_type(b.logits.dtype, [&](auto zero) {
    return b.geometry.images * b.geometry.pixels * static_cast<int64_t>(sizeof(Softmax<decltype(zero)>));
  });
}

void kernels::lovasz_histogram_count(const LovaszHistogramCount& args) {
  with_element_type(args.batch.logits.dtype, [&](auto zero) { count<decltype(zero)>(args); });
}

}  // namespace veerloss
