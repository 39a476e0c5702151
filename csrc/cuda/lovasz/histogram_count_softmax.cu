// Lovász losses on a GPU, method "histogram": count pixels by the bins of their errors in a softmax, with classes in registers.
// A block has the counts and tables of its classes in shared memory.

#include "../terms.cuh"
#include "../upsample.cuh"
#include "histogram_count.cuh"

namespace veerloss {
namespace {

// Where logits and softmax come from.
enum class Source {
  memory,  // every thread reads the classes of a pixel, and makes the softmax; where not all classes fit a block, blocks of the
           // same pixels share them out, and the logits come from L2
  rows,    // the same by way of shared memory: the classes of a pixel lie next to each other (rows.cuh)
  stored,  // every thread reads its block's classes of a pixel; the softmax has been stored
  low      // every thread blends those of low resolution (upsample.cuh)
};

constexpr int threads_of(Source source) {
  return source == Source::rows  ? CountPolicy::threads_of_rows
         : source == Source::low ? CountPolicy::threads_of_low
                                 : CountPolicy::threads;
}

// The classes of a pixel that a thread has are `first` and those after it; `below` is [Range::most] of them.
template <class Range, bool grouped, class T>
__device__ inline void count_background(const BlockCounts& block, int first, int classes,
                                        const PixelCoordinates<T>& coordinates, const T (&below)[Range::most], int32_t label,
                                        int plane) {
#pragma unroll
  for (int i = 0; i < Range::most; ++i) {
    if (!Range::has(i, classes)) continue;
    const int c = first + i;
    if (grouped && (c < block.first_class || c >= block.end_class)) continue;
    const int k = grouped ? c - block.first_class : i;
    const uint32_t bin = bin_offset_of(coordinates.of(below[i]), block.tables + k * BinLayout::table);
    if (bin != 0 && c != label) add_to_bin(block.counts + k * plane, bin, one_background);
  }
}

template <class T>
__device__ inline void count_foreground(const BlockCounts& block, const PixelCoordinates<T>& coordinates, T below,
                                        int32_t label, int plane) {
  const int k = label - block.first_class;
  add_to_bin(block.counts + k * plane, bin_offset_of(-coordinates.of(below), block.tables + k * BinLayout::table),
             one_foreground);
}

// The focal term of a compound loss: its sums of each thread, in shared memory, for registers are for the classes.
template <class T, int threads>
class FocalOfThreads {
 public:
  static constexpr int64_t bytes = 2 * threads * static_cast<int64_t>(sizeof(double));

  __device__ explicit FocalOfThreads(void* memory) : losses_(static_cast<double*>(memory)) {
    losses_[threadIdx.x] = losses_[threads + threadIdx.x] = 0;
  }
  __device__ void add(const FocalTerm& term, const Softmax<T>& softmax, T logit, int32_t label) const {
    FocalTotals<T> pixel;
    pixel.add(term, softmax, logit, label);
    losses_[threadIdx.x] += pixel.loss;
    if (term.class_alpha) losses_[threads + threadIdx.x] += pixel.alpha;
  }
  // From all threads. count: of their pixels; bad: whether a label is out of range.
  __device__ void store(const TermPartials& partials, const FocalTerm& term, int64_t block, int count, bool bad) const {
    FocalTotals<T> totals;
    totals.loss = bad ? not_a_number : losses_[threadIdx.x];
    totals.alpha = losses_[threads + threadIdx.x];
    totals.valid = count;
    totals.template store<threads>(partials, term, block, losses_);
  }

 private:
  double* losses_;  // then the sums of alpha
};

template <class In, class Range, Source source, bool grouped, bool may_be_flat, bool focal>
__global__ void __launch_bounds__(threads_of(source), 1)
    lovasz_count_softmax_kernel(LovaszHistogramCount args, LowLogits low, Chunks chunks, Groups groups,
                                const Softmax<opmath_t<In>>* statistics, TermPartials partials) {
  using T = opmath_t<In>;
  constexpr int threads = threads_of(source);
  VEERLOSS_DYNAMIC_SHARED(memory);
  const SegmentBatch& b = args.batch;
  const auto classes = static_cast<int>(b.classes());
  constexpr int plane = source == Source::stored ? static_cast<int>(plane_of(CountPolicy::most_classes + 1))
                                                 : static_cast<int>(plane_of(Range::most));
  const auto [first_image, part, group] = image_part(chunks.chunks, groups.groups);
  using Focal = FocalOfThreads<T, threads>;
  const BlockCounts block =
      block_counts(args, memory + (focal ? Focal::bytes : 0), b.per_image ? first_image : 0, static_cast<int>(group), groups);
  std::conditional_t<focal, Focal, void*> focal_sums(memory);
  if (!begin_block<threads>(args, block)) return;
  __syncthreads();

  const BlockPixels<may_be_flat> pixels{chunks, first_image};
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  PixelTotals totals;
  // A pixel whose logits, all or the block's, are `from`.
  const auto count_pixel = [&](uint32_t image, uint32_t pixel, int32_t label, const auto& from) {
    const int first = source == Source::stored ? block.first_class : 0;
    const int count = source == Source::stored ? block.end_class - first : classes;
    T below[Range::most];
    load_near<Range>(below, from, first, count);
    T max_logit, sumexp_excl_max;
    if constexpr (source == Source::stored) {
      const Softmax<T> all = statistics[image * b.geometry.pixels + pixel];
      max_logit = all.max_logit;
      sumexp_excl_max = all.sumexp_excl_max;
#pragma unroll
      for (int c = 0; c < Range::most; ++c) below[c] = below_largest(below[c], max_logit);
    } else {
      max_logit = max_of(below);
      SumExclMax<T> sum;
#pragma unroll
      for (int c = 0; c < Range::most; ++c) {
        below[c] = below_largest(below[c], max_logit);
        sum.add(exp2_of(below[c]));
      }
      sumexp_excl_max = sum.sum;
    }
    ++totals.valid;
    totals.nan |= sumexp_excl_max != sumexp_excl_max;
    const PixelCoordinates<T> coordinates(sumexp_excl_max);
    count_background<Range, grouped>(block, first, count, coordinates, below, label, plane);
    if constexpr (focal)
      if (!grouped || group == 0) focal_sums.add(args.terms.focal, {max_logit, sumexp_excl_max}, from.load(label), label);
    // The label's class, whose logit is in L1 or in shared memory.
    if (label < classes && (source != Source::stored && !grouped || (label >= block.first_class && label < block.end_class)))
      count_foreground(block, coordinates, below_largest(from.load(label), max_logit), label, plane);
  };
  const auto label_at = [&](uint32_t image, uint32_t pixel) {
    const int32_t label = load_integer_label(b.target, b.rule, image, pixel);
    totals.bad |= label == label_bad;
    return label;
  };
  if constexpr (source == Source::rows) {
    const SharedRows<In, threads> rows(block.counts + (block.end_class - block.first_class) * plane, classes);
    for (uint32_t tile = begin; tile < end; tile += threads) {
      const uint32_t left = end - tile, j = tile + threadIdx.x;
      __syncthreads();
      rows.load(b.logits, {first_image, tile, static_cast<int>(left < threads ? left : threads)});
      __syncthreads();
      if (j >= end) continue;
      const uint32_t image = pixels.image(j);
      const auto pixel = static_cast<uint32_t>(pixels.pixel(j));
      const int32_t label = label_at(image, pixel);
      if (label >= 0) count_pixel(image, pixel, label, rows.row(static_cast<int>(threadIdx.x)));
    }
  } else {
    VEERLOSS_NO_UNROLL  // registers are for the classes
        for (uint32_t j = begin + threadIdx.x; j < end; j += threads) {
      const uint32_t image = pixels.image(j);
      const int32_t pixel = pixels.pixel(j);
      if (pixel < 0) continue;
      const int32_t label = label_at(image, static_cast<uint32_t>(pixel));
      if (label < 0) continue;
      if constexpr (source == Source::low)
        count_pixel(image, static_cast<uint32_t>(pixel), label, BlendedClasses<In>::at(low, image, pixel));
      else
        count_pixel(image, static_cast<uint32_t>(pixel), label, NearClasses<In>(b.logits, image, static_cast<uint32_t>(pixel)));
    }
  }
  if constexpr (focal)
    if (!grouped || group == 0)
      focal_sums.store(partials, args.terms.focal, blockIdx.x / groups.groups, totals.valid + totals.bad, totals.bad);
  end_block<threads>(args, block, totals);
}

// A launch of the kernel.
template <class In, class Range, Source source>
void launch_source(const LovaszHistogramCount& args, const Groups& groups, int64_t other_bytes,
                   const Softmax<opmath_t<In>>* statistics = nullptr) {
  const SegmentBatch& b = args.batch;
  const Chunks chunks = count_chunks(b, groups.groups, args.sampled, threads_of(source));
  const Launch shape{.blocks = chunks.images * chunks.chunks * groups.groups,
                     .threads = threads_of(source),
                     .stream = args.stream,
                     .shared_bytes = groups.classes * class_bytes(b.classes()) + other_bytes};
  const TermPartials partials(args.scratch, sums_focal(args) ? chunks.images * chunks.chunks : 0);
  with_flag(source != Source::stored && groups.groups > 1, [&](auto is_grouped) {
    constexpr bool grouped = decltype(is_grouped)::value;
    // Of the most frequent way one kernel is for pixels that are not flat.
    with_flag(chunks.flat || grouped || source != Source::memory, [&](auto may_be_flat) {
      constexpr bool flat = decltype(may_be_flat)::value;
      constexpr bool exists = flat ? source != Source::stored || !grouped : source == Source::memory && !grouped;
      if constexpr (exists)
        with_flag(source != Source::stored && sums_focal(args), [&](auto with_focal) {
          constexpr bool focal = decltype(with_focal)::value;
          if constexpr (!focal || source != Source::stored)
            launch(lovasz_count_softmax_kernel<In, Range, source, grouped, flat, focal>, shape, args,
                   source == Source::low ? LowLogits::of(b.logits, *b.upsample, In{}) : LowLogits{}, chunks, groups, statistics,
                   partials);
        });
    });
  });
  if (sums_focal(args)) finish_terms(partials, args.terms.focal_sums, args.stream);
}

// Calls f with the range of the classes of a group of many.
template <class In, class F>
void with_group_range(int64_t classes, const F& f) {
  if (classes <= 12) return f(ClassRange<1, 12>{});
  with_class_range<In>(classes, f);
}

// Whether pixels come in rows, rather than to each thread: not of a sample, whose runs are short.
bool in_rows(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  const Chunks chunks = count_chunks(b, 1, false, CountPolicy::threads_of_rows);
  return !args.sampled && has_rows(b.logits, b.geometry, {.parts = 0, .blocks = 0, .flat = chunks.flat});
}

template <class In>
void launch_all(const LovaszHistogramCount& args) {
  const SegmentBatch& b = args.batch;
  constexpr int64_t most = CountPolicy::most_classes;
  if (b.upsample && (b.classes() > most || !is_low(b.logits, *b.upsample)))
    throw std::runtime_error(
        "veerloss: on a GPU upsample of a Lovasz loss is for up to 24 classes of images, to a larger size");
  if (b.classes() > most) {
    const Groups groups = groups_of(b, CountPolicy::most_stored_classes);
    return with_group_range<In>(groups.classes, [&](auto range) {
      using Range = decltype(range);
      if constexpr (Range::most >= 12 && Range::most <= CountPolicy::most_stored_classes)
        launch_source<In, Range, Source::stored>(args, groups, 0, static_cast<const Softmax<opmath_t<In>>*>(args.scratch));
    });
  }
  with_class_range<In>(b.classes(), [&](auto range) {
    using Range = decltype(range);
    if constexpr (Range::most > 0 && Range::most <= most) {
      const auto launch_with = [&](auto of_source, int64_t rows_bytes) {
        constexpr Source source = decltype(of_source)::value;
        const int64_t bytes = rows_bytes + (sums_focal(args) ? FocalOfThreads<float, threads_of(source)>::bytes : 0);
        launch_source<In, Range, source>(args, groups_of(b, most, bytes), bytes);
      };
      if (b.upsample) return launch_with(std::integral_constant<Source, Source::low>{}, 0);
      if (!in_rows(args)) return launch_with(std::integral_constant<Source, Source::memory>{}, 0);
      launch_with(std::integral_constant<Source, Source::rows>{},
                  shared_rows_bytes(CountPolicy::threads_of_rows, b.classes(), sizeof(opmath_t<In>)));
    }
  });
}

}  // namespace

void launch_count_softmax(const LovaszHistogramCount& args) {
  with_element_type(args.batch.logits.dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) launch_all<decltype(zero)>(args);
  });
}

}  // namespace veerloss
