// Lovász losses on a GPU, method "histogram": count pixels by the bins of their errors. veerloss/_histogram.py has the order of
// the steps, csrc/kernels.h describes the tensors.
//
//   softmax     a block has the counts and tables of all its classes in shared memory, and reads each logit once
//               (histogram_count_softmax.cu)
//   statistics  of more classes than registers hold: maximum and sum of exponentials of every pixel, before that
//   classes     probabilities, a hinge, and what does not fit registers: one class after another
//
// Counts are integers: the results are the same bits in every run.

#include "../terms.cuh"
#include "histogram_count.cuh"

namespace veerloss {
namespace {

using Policy = CountPolicy;

// ---- one class after another

// A mask may be empty: then a pass ends at once.
__device__ inline bool is_any_counted(const LovaszHistogramCount& args) {
  bool any = !args.segment_mask;
  for (int64_t i = 0; i < args.batch.segments() && !any; ++i) any = args.segment_mask[i];
  return any;
}

// statistics: [N, P]; of a sample, only those of its pixels are written.
template <class In>
__global__ void __launch_bounds__(Tuning::HistogramStatistics::threads)
    lovasz_statistics_kernel(LovaszHistogramCount args, Chunks chunks, Softmax<opmath_t<In>>* statistics) {
  constexpr int threads = Tuning::HistogramStatistics::threads;
  const SegmentBatch& b = args.batch;
  const auto [first_image, part, none] = image_part(chunks.chunks);
  const bool any = is_any_counted(args);
  const int64_t begin = chunks.begin(part), end = chunks.end(part);
  for (int64_t j = begin + threadIdx.x; any && j < end; j += threads) {
    const auto [image, pixel] = block_pixel(chunks, first_image, j);
    if (pixel < 0 || load_label(b.target, b.rule, image, pixel) < 0) continue;
    statistics[image * b.geometry.pixels + pixel] = statistics_of_pixel<In, CoordinateExp>(b.logits, b.classes(), image, pixel);
  }
}

// The same of classes in parts, as backward has them (gradient_parts.cuh): it finds the same bins. `in_rows`: rows.cuh.
template <class In, class Range, bool in_rows>
__global__ void __launch_bounds__(PartsPolicy::threads, 3)
    lovasz_statistics_parts_kernel(LovaszHistogramCount args, Chunks chunks, Softmax<opmath_t<In>>* statistics) {
  using T = opmath_t<In>;
  constexpr int pixels = PartsPolicy::pixels;
  __shared__ PartSoftmaxes<T> parts;
  VEERLOSS_DYNAMIC_SHARED(memory);
  const SegmentBatch& b = args.batch;
  const auto classes = static_cast<int>(b.classes());
  const int lane = static_cast<int>(threadIdx.x) % pixels;
  const ClassPart part(static_cast<int>(threadIdx.x) / pixels, classes);
  const auto [first_image, tile, none] = image_part(chunks.chunks);
  if (!is_any_counted(args)) return;
  const int64_t first = chunks.begin(tile), left = chunks.end(tile) - first;
  const auto [image, pixel] = block_pixel(chunks, first_image, lane < left ? first + lane : first);
  const bool has_pixel = lane < left && pixel >= 0;
  const SharedRows<In, PartsPolicy::threads> rows(memory, classes);
  if constexpr (in_rows) {
    rows.load(b.logits, {first_image, first, static_cast<int>(left < pixels ? left : pixels)});
    __syncthreads();
  }
  auto pointer = [&] {
    if constexpr (in_rows)
      return rows.row(has_pixel ? lane : 0);
    else
      return ClassPointer<In>(b.logits, image, has_pixel ? pixel : 0);
  }();
  pointer.skip(part.first);
  T logits[Range::most];
  load_classes<Range>(logits, pointer, part.count);
  put_softmax_of_part<CoordinateExp>(parts, logits);
  __syncthreads();
  if (threadIdx.x < pixels && has_pixel)
    statistics[image * b.geometry.pixels + pixel] = parts.whole(lane, ExpOf<CoordinateExp>{});
}

template <class In>
void launch_statistics(const LovaszHistogramCount& args, Softmax<opmath_t<In>>* statistics) {
  const SegmentBatch& b = args.batch;
  if constexpr (!std::is_same_v<In, double>)
    if (are_in_parts(b.classes(), b.logits.dtype)) {
      const Chunks parts = chunks_of(b, PartsPolicy::pixels, 1, 1, 1, args.sampled);
      const bool rows = !args.sampled && has_rows(b.logits, b.geometry, {.parts = 0, .blocks = 0, .flat = parts.flat});
      const Launch shape{.blocks = parts.images * parts.chunks,
                         .threads = PartsPolicy::threads,
                         .stream = args.stream,
                         .shared_bytes = rows ? shared_rows_bytes(PartsPolicy::pixels, b.classes(), sizeof(opmath_t<In>)) : 0};
      return with_part_range(b.classes(), [&](auto range) {
        with_flag(rows, [&](auto in_rows) {
          launch(lovasz_statistics_parts_kernel<In, decltype(range), decltype(in_rows)::value>, shape, args, parts, statistics);
        });
      });
    }
  constexpr int threads = Tuning::HistogramStatistics::threads;
  const Chunks parts = chunks_of(b, threads, 1, 1, 1, args.sampled);
  launch(lovasz_statistics_kernel<In>, {.blocks = parts.images * parts.chunks, .threads = threads, .stream = args.stream}, args,
         parts, statistics);
}

template <class In, Errors errors, bool plain>
__global__ void __launch_bounds__(Policy::threads, 1)
    lovasz_count_classes_kernel(LovaszHistogramCount args, Chunks chunks, Groups groups,
                                const Softmax<opmath_t<In>>* statistics) {
  using T = opmath_t<In>;
  constexpr bool softmax = errors == Errors::softmax;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ uint32_t block_largest;
  const SegmentBatch& b = args.batch;
  const auto plane = static_cast<int>(plane_of(b.classes()));
  const auto [first_image, part, group] = image_part(chunks.chunks, groups.groups);
  const BlockCounts block = block_counts(args, memory, b.per_image ? first_image : 0, static_cast<int>(group), groups);
  if (!begin_block<Policy::threads>(args, block)) return;
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  PixelTotals totals;
  for (int c = block.first_class; c < block.end_class; ++c) {
    if (threadIdx.x == 0) block_largest = 0;
    __syncthreads();
    const BinPair* table = block.tables + (c - block.first_class) * BinLayout::table;
    uint32_t* counts = block.counts + (c - block.first_class) * plane;
    const ClassPixels<In, plain> pixels(b, chunks, first_image, c);
    const int32_t foreground = errors == Errors::hinge ? 1 : c;
    uint32_t largest = 0;
    VEERLOSS_NO_UNROLL
    for (uint32_t j = begin + threadIdx.x; j < end; j += Policy::threads) {
      const auto at = pixels.sampled_at(j);
      if (!pixels.has(at)) continue;
      const int32_t label = pixels.label(at);
      if (label < 0) {
        totals.bad |= label == label_bad;
        continue;
      }
      totals.valid += c == block.first_class;
      const T x = pixels.load(at);
      const bool is_foreground = label == foreground;
      float coordinate;
      if constexpr (softmax) {
        const Softmax<T> all = statistics[pixels.index(at)];
        totals.nan |= all.sumexp_excl_max != all.sumexp_excl_max;
        coordinate = PixelCoordinates<T>(all.sumexp_excl_max).of(below_largest(x, all.max_logit));
        coordinate = is_foreground ? -coordinate : coordinate;
      } else {
        coordinate = coordinate_of_error<errors>(x, is_foreground);
      }
      const uint32_t key = key_of_coordinate(coordinate);
      largest = key > largest ? key : largest;
      uint32_t bin = bin_offset_of(coordinate, table);
      if (!softmax) bin = 4 * static_cast<uint32_t>(bin_of_error(static_cast<int32_t>(bin / 4), coordinate, true));
      if (bin != 0 || is_foreground) add_to_bin(counts, bin, is_foreground ? one_foreground : one_background);
    }
    if (args.find_largest || largest == key_of_nan) atomicMax(&block_largest, largest);
    __syncthreads();
    if (threadIdx.x == 0 && block_largest != 0 && is_counted(args, block.row, c))
      atomicMax(args.largest + block.row * b.classes() + c, block_largest);
    __syncthreads();
  }
  end_block<Policy::threads>(args, block, totals);
}

// ---- launches

template <class In>
void count(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  auto* statistics = static_cast<Softmax<opmath_t<In>>*>(args.scratch);
  if (b.errors == Errors::softmax && !all_fit_registers(args)) launch_statistics<In>(args, statistics);
  if (fits_registers(args)) return launch_count_softmax(args);
  const Groups groups = groups_of(b, b.classes());
  const Chunks chunks = count_chunks(b, groups.groups, args.sampled);
  const Launch shape{.blocks = chunks.images * chunks.chunks * groups.groups,
                     .threads = Policy::threads,
                     .stream = args.stream,
                     .shared_bytes = groups.classes * class_bytes(b.classes())};
  with_errors(b.errors, [&](auto of_errors) {
    constexpr Errors errors = decltype(of_errors)::value;
    with_flag(is_plain(b, chunks), [&](auto plain) {
      launch(lovasz_count_classes_kernel<In, errors, decltype(plain)::value>, shape, args, chunks, groups, statistics);
    });
  });
}

}  // namespace

int64_t kernels::lovasz_histogram_scratch_bytes(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  const int64_t terms = sums_focal(args)        ? TermPartials(nullptr, most_count_blocks(b.geometry)).bytes
                        : args.terms.focal_sums ? terms_scratch_bytes(b)
                                                : 0;
  if (b.errors != Errors::softmax || all_fit_registers(args)) return terms;
  const int64_t statistics = with_opmath_type(b.logits.dtype, [&](auto zero) {
    return b.geometry.images * b.geometry.pixels * static_cast<int64_t>(sizeof(Softmax<decltype(zero)>));
  });
  return statistics > terms ? statistics : terms;  // one after the other
}

void kernels::lovasz_histogram_count(const LovaszHistogramCount& args) {
  if (args.batch.upsample && !fits_registers(args))
    throw std::runtime_error("veerloss: on a GPU upsample of a Lovasz loss is for a softmax, of the classes present");
  if (args.terms.any()) check_terms(args.batch, args.terms.focal);
  with_element_type(args.batch.logits.dtype, [&](auto zero) { count<decltype(zero)>(args); });
  if (!sums_focal(args)) sum_focal_term(args.batch, args.terms, args.scratch, args.stream);
  sum_region_term(args.batch, args.terms, args.stream);
}

}  // namespace veerloss
