// Sums of region losses of a softmax with class indices: a thread has all classes of a pixel in registers, or of many classes a
// part (class_parts.cuh), and beside each the sum of its probabilities. The probability of the label's class goes to shared
// memory, where a class has a column, and a thread a place of its own in it: nothing is added atomically before the end.

#include "class_parts.cuh"
#include "region.cuh"
#include "upsample.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::RegionSumSoftmax;

// Where logits come from: memory, or by way of shared memory, where the classes of a pixel are neighbours (rows.cuh); of pixels
// that have a thread each, or several. Those of low resolution are blended (upsample.cuh).
enum class Source { memory, rows, parts, parts_in_rows, low };

constexpr bool are_parts(Source source) {
  return source == Source::parts || source == Source::parts_in_rows;
}
constexpr bool are_rows(Source source) {
  return source == Source::rows || source == Source::parts_in_rows;
}
constexpr int threads_of(Source source) {
  return are_parts(source) ? PartsPolicy::threads : Policy::threads;
}
// Pixels that a block has at a time.
constexpr int lanes_of(Source source) {
  return are_parts(source) ? PartsPolicy::pixels : Policy::threads;
}

// The label's probability and that there was one, in a word: units below, a count above.
constexpr int count_shift = 58;
constexpr RegionUnits one_label = RegionUnits{1} << count_shift;
static_assert((Policy::most_tiles << region_bits) < (int64_t{1} << count_shift), "units of a thread");
static_assert(Policy::most_tiles < 1 << (64 - count_shift), "labels of a thread");

// Words of the threads of a block, [classes][lanes] in shared memory.
template <int threads, int lanes>
class ClassColumns {
  static constexpr int parts = 8;  // of a column, with a thread each
  static_assert((lanes / parts * Policy::most_tiles << region_bits >> region_bits) < 1 << 11, "units of a part");

 public:
  __device__ ClassColumns(RegionUnits* words, int classes) : words_(words), classes_(classes) {}

  __device__ RegionUnits& at(int c, int lane) const { return words_[c * lanes + lane]; }

  // Calls f(c, sum of the units, sum of the counts) for each part of each column; with `packed` words have both.
  template <bool packed, class F>
  __device__ void for_each_sum(const F& f) const {
    VEERLOSS_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x); i < classes_ * parts; i += threads) {
      const int c = i / parts;
      RegionUnits units = 0, labels = 0;
      for (int lane = i % parts; lane < lanes; lane += parts) {
        const RegionUnits word = at(c, lane);
        units += packed ? word & (one_label - 1) : word;
        labels += packed ? word >> count_shift : 0;
      }
      f(c, units, labels);
    }
  }

 private:
  RegionUnits* words_;
  int classes_;
};

// What a block has in shared memory: columns, the words of its segments, and rows.
int64_t shared_bytes(int64_t classes, int lanes) {
  return classes * (lanes + RegionLayout::words) * static_cast<int64_t>(sizeof(RegionUnits));
}

// Of the pixels of parts, in shared memory.
template <class T>
struct RegionExchange {
  PartSoftmaxes<T> parts;
  T max_logit[PartsPolicy::pixels], inv_sumexp[PartsPolicy::pixels];
  int32_t label[PartsPolicy::pixels];
};

template <class In, class Range, Source source, bool squared>
__global__ void __launch_bounds__(threads_of(source), Policy::min_blocks<In, Range>(threads_of(source)))
    region_sum_softmax_kernel(SegmentBatch b, LowLogits low, int64_t* sums, Chunks chunks) {
  using T = opmath_t<In>;
  constexpr int threads = threads_of(source), lanes = lanes_of(source), words = RegionLayout::words;
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ RegionExchange<T> exchange;
  __shared__ int block_pixels, block_nan, block_wrong;
  const auto classes = static_cast<int>(b.classes()), thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
  int first = 0, count = classes;
  if constexpr (are_parts(source)) {
    const ClassPart part(thread / lanes, classes);
    first = part.first;
    count = part.count;
  }
  const ClassColumns<threads, lanes> columns(reinterpret_cast<RegionUnits*>(memory), classes);
  RegionUnits* const totals = &columns.at(classes, 0);
  const SharedRows<In, threads> rows(totals + classes * words, classes);
  for (int k = 0; k < count; ++k) columns.at(first + k, lane) = 0;
  for (int i = thread; i < classes * words; i += threads) totals[i] = 0;
  if (thread == 0) block_pixels = block_nan = block_wrong = 0;

  const auto [first_image, chunk, none] = image_part(chunks.chunks);
  const BlockPixels<true> pixels{chunks, first_image};
  const auto begin = static_cast<uint32_t>(chunks.begin(chunk)), end = static_cast<uint32_t>(chunks.end(chunk));
  RegionUnits predicted[Range::most] = {};
  int counted = 0;
  bool nan = false, wrong = false;  // a logit, a target
  // Of exponentials, times `inv_sumexp`; that of the label's class from its logit, which is in L1 or in shared memory.
  const auto add_pixel = [&](const T(&exps)[Range::most], T inv_sumexp, int32_t label, const auto& label_exp) {
    nan |= inv_sumexp != inv_sumexp;
#pragma unroll
    for (int k = 0; k < Range::most; ++k) predicted[k] += units_of_softmax<squared>(exps[k], inv_sumexp);
    if (label < first || label - first >= count) return;
    const RegionUnits units = units_of_softmax<false>(label_exp(), inv_sumexp);
    columns.at(label, lane) += one_label + (inv_sumexp == inv_sumexp ? units : 0);
  };
  VEERLOSS_NO_UNROLL
  for (uint32_t tile = begin; tile < end; tile += lanes) {
    const uint32_t j = tile + static_cast<uint32_t>(lane);
    const bool has_pixel = j < end;
    const uint32_t image = has_pixel ? pixels.image(j) : 0, pixel = has_pixel ? static_cast<uint32_t>(pixels.pixel(j)) : 0;
    int32_t label = label_ignored;
    if ((!are_parts(source) || thread < lanes) && has_pixel) {
      label = load_integer_label(b.target, b.rule, image, pixel);
      wrong |= label == label_bad;
      counted += label != label_ignored;
    }
    if constexpr (are_rows(source)) {
      rows.load(b.logits, {first_image, tile, static_cast<int>(end - tile < lanes ? end - tile : lanes)});
      __syncthreads();
    }
    const auto logits = [&] {
      if constexpr (are_rows(source))
        return rows.row(has_pixel ? lane : 0);
      else if constexpr (source == Source::low)
        return BlendedClasses<In>::at(low, image, static_cast<int32_t>(pixel));
      else
        return NearClasses<In>(b.logits, image, pixel);
    }();
    T values[Range::most];
    if constexpr (are_parts(source)) {
      load_near<Range>(values, logits, first, count);
      const T part_max = max_of(values), relative_to = finite_max(part_max);
      exchange.parts.put(part_max, exponentials_in_place(values, relative_to));
      __syncthreads();
      if (thread < lanes) {
        const Softmax<T> softmax = exchange.parts.whole(lane, FastExp{});
        exchange.max_logit[lane] = softmax.max_logit;
        exchange.inv_sumexp[lane] = softmax.inv_sumexp();
        exchange.label[lane] = label;
      }
      __syncthreads();
      label = exchange.label[lane];
      const T times = exp_neg(part_max - exchange.max_logit[lane]) * exchange.inv_sumexp[lane];
      if (label >= 0) add_pixel(values, times, label, [&] { return exp_neg(logits.load(label) - relative_to); });
    } else if (label >= 0) {
      load_near<Range>(values, logits, 0, classes);
      const Softmax<T> softmax = softmax_in_place(values);
      add_pixel(values, softmax.inv_sumexp(), label, [&] { return exp_neg(logits.load(label) - softmax.max_logit); });
    }
    if constexpr (are_rows(source)) __syncthreads();  // before the next rows
  }

  __syncthreads();
  if (counted > 0) atomicAdd(&block_pixels, counted);
  if (nan) block_nan = 1;
  if (wrong) block_wrong = 1;
  const auto add_units = [&](int c, int word, RegionUnits units) {
    atomicAdd(totals + c * words + word, static_cast<RegionUnits>(units >> RegionLayout::word_bits));
    atomicAdd(totals + c * words + word + 1, units & ((RegionUnits{1} << RegionLayout::word_bits) - 1));
  };
  columns.template for_each_sum<true>([&](int c, RegionUnits units, RegionUnits labels) {
    add_units(c, RegionLayout::intersection, units);
    add_units(c, RegionLayout::expected, labels << region_bits);
  });
  __syncthreads();
#pragma unroll
  for (int k = 0; k < Range::most; ++k)
    if (Range::has(k, count)) columns.at(first + k, lane) = predicted[k];
  __syncthreads();
  columns.template for_each_sum<false>(
      [&](int c, RegionUnits units, RegionUnits) { add_units(c, RegionLayout::predicted, units); });
  __syncthreads();
  int64_t* const of_row = sums + b.segment(b.per_image ? first_image : 0, 0) * words;
  for (int i = thread; i < classes * words; i += threads) {
    RegionUnits word = totals[i];
    switch (i % words) {
      case RegionLayout::pixels: word = static_cast<RegionUnits>(block_pixels); break;
      case RegionLayout::bad_parts: word = static_cast<RegionUnits>(block_nan | block_wrong); break;
      // A target out of range is of every class: then each takes part.
      case RegionLayout::expected: word += static_cast<RegionUnits>(block_wrong) << (region_bits - RegionLayout::word_bits);
    }
    add_to_word(of_row + i, word);
  }
}

}  // namespace

bool launch_region_sum_softmax(const RegionSums& args) {
  const RegionInput& in = args.input;
  const SegmentBatch& b = in.batch;
  if (in.activation != Activation::softmax || in.dense || !is_integer(b.target.dtype) || !are_near(b.logits)) return false;
  const int64_t classes = b.classes();
  bool launched = false;
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const auto launch_source = [&](auto range, auto of_source, int64_t rows_bytes) {
      constexpr Source source = decltype(of_source)::value;
      using Range = decltype(range);
      const Chunks chunks = chunks_of(b, lanes_of(source), Policy::most_tiles,
                                      multiprocessors() * Policy::min_blocks<In, Range>(threads_of(source)), 1, false);
      with_flag(in.squared, [&](auto squared) {
        if constexpr (source != Source::low || !decltype(squared)::value)
          launch(region_sum_softmax_kernel<In, Range, source, decltype(squared)::value>,
                 {.blocks = chunks.images * chunks.chunks,
                  .threads = threads_of(source),
                  .stream = args.stream,
                  .shared_bytes = shared_bytes(classes, lanes_of(source)) + rows_bytes},
                 b, source == Source::low ? LowLogits::of(b.logits, *b.upsample, zero) : LowLogits{}, args.sums, chunks);
      });
      launched = true;
    };
    // By way of shared memory where classes are neighbours, and where there is as much.
    const auto launch_either = [&](auto range, auto plain, auto in_rows) {
      constexpr int lanes = lanes_of(decltype(plain)::value);
      const int64_t bytes = shared_rows_bytes(lanes, classes, sizeof(opmath_t<In>));
      const int64_t left = max_shared_bytes_of_block() - Policy::static_bytes - shared_bytes(classes, lanes);
      if (left < 0) return;
      const bool flat = chunks_of(b, lanes, 1, 1, 1, false).flat;
      if (bytes <= left && has_rows(b.logits, b.geometry, flat))
        launch_source(range, in_rows, bytes);
      else
        launch_source(range, plain, 0);
    };
    if constexpr (!std::is_same_v<In, double>) {
      if (!b.upsample && are_in_parts(classes, b.logits.dtype))
        return with_part_range(classes, [&](auto range) {
          launch_either(range, std::integral_constant<Source, Source::parts>{},
                        std::integral_constant<Source, Source::parts_in_rows>{});
        });
    }
    if (b.upsample)
      return with_low_range<In>(b, [&](auto range) { launch_source(range, std::integral_constant<Source, Source::low>{}, 0); });
    with_class_range<In>(classes, [&](auto range) {
      if constexpr (decltype(range)::most > 0)
        launch_either(range, std::integral_constant<Source, Source::memory>{}, std::integral_constant<Source, Source::rows>{});
    });
  });
  return launched;
}

}  // namespace veerloss
