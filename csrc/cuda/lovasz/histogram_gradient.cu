// Lovász losses on a GPU, method "histogram": the passes that look weights up by the bins of errors. veerloss/_histogram.py has
// the order of the steps.
//
//   in shared memory  softmax of classes in registers: a block has the tables of all classes, and the weights of background,
//   each
//                     times what its segment is multiplied by. The weight of the label's class comes from L2
//   from L2           everything else, by gradient.cuh
//   sum               probabilities and a hinge: weight times error, in fixed point
//
// All are integers or one value for each element: the results are the same bits in every run.

#include "../gradient.cuh"
#include "coordinates.cuh"

namespace veerloss {
namespace {

// ---- in shared memory

using Policy = Tuning::HistogramGradient;

int64_t shared_bytes(int64_t classes, int64_t bins) {
  return classes * (BinLayout::table * static_cast<int64_t>(sizeof(BinPair)) + 4 * bins);
}

template <class In, class Range, bool flat>
__global__ void __launch_bounds__(Policy::threads) lovasz_gradient_kernel(LovaszHistogramBackward args, Chunks chunks) {
  VEERLOSS_DYNAMIC_SHARED(memory);
  const LovaszBatch& b = args.batch;
  constexpr int bins = BinLayout::bins(Range::most), table = BinLayout::table;
  const auto classes = static_cast<int>(b.classes());
  const auto [first_image, part, none] = image_part(chunks.chunks);
  const int64_t segment = b.segment(b.per_image ? first_image : 0, 0);  // of class 0
  __shared__ float factors[Range::most];
  if (threadIdx.x < Range::most && static_cast<int>(threadIdx.x) < classes)
    factors[threadIdx.x] = SegmentFactor<float>(args.out)(segment + threadIdx.x);
  __syncthreads();
  const float* weights = static_cast<const float*>(args.weights) + segment * 2 * bins;
  auto* tables = reinterpret_cast<BinPair*>(memory);                      // [classes][table]
  auto* background = reinterpret_cast<float*>(tables + classes * table);  // [classes][bins]
  for (int i = static_cast<int>(threadIdx.x); i < classes * table; i += Policy::threads)
    tables[i] = args.table[segment * table + i];
  for (int c = 0; c < classes; ++c) {
    const float times = factors[c];
    for (int k = static_cast<int>(threadIdx.x); k < bins; k += Policy::threads)
      background[c * bins + k] = weights[2 * c * bins + k] * times;
  }
  __syncthreads();

  const int64_t begin = chunks.begin(part), end = chunks.end(part);
  const BlockPixels<flat> pixels{chunks, first_image};
  VEERLOSS_NO_UNROLL
  for (uint32_t j = static_cast<uint32_t>(begin) + threadIdx.x; j < static_cast<uint32_t>(end); j += Policy::threads) {
    const uint32_t image = pixels.image(j);
    const auto pixel = static_cast<uint32_t>(pixels.pixel(j));
    const int32_t label = load_integer_label(b.target, b.rule, image, pixel);
    const NearClasses<In> logits(b.logits, image, pixel), out(args.out.grad_logits, image, pixel);
    if (label < 0) {  // ignored: its logits are not read; out of range: the loss is NaN, whatever is here
#pragma unroll
      for (int c = 0; c < Range::most; ++c)
        if (Range::has(c, classes)) out.store(c, 0.0f);
      continue;
    }
    float exps[Range::most], g[Range::most];
    load_near<Range>(g, logits, 0, classes);
    const float max_logit = max_of(g);
    SumExclMax<float> sum;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      g[c] = below_largest(g[c], max_logit);
      exps[c] = exp2_of(g[c]);
      sum.add(exps[c]);
    }
    const PixelCoordinates<float> coordinates(sum.sum);
    const float inv_sumexp = 1.0f / add_rn(1.0f, sum.sum);
    // The label's class, whose logit is in L1.
    float foreground = 0.0f, label_below = -1.0f;
    if (label < classes) {
      label_below = below_largest(logits.load(label), max_logit);
      const uint32_t bin = bin_offset_of(-coordinates.of(label_below), tables + label * table);
      foreground = weights[(2 * label + 1) * bins + bin / 4] * factors[label];
    }
    // As SoftmaxGradient, in two steps: the weight of a most probable class is the pivot, and all others are relative to it.
    float pivot = 0.0f;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      if (!Range::has(c, classes)) continue;
      const bool top = g[c] == 0.0f;
      const uint32_t bin = bin_offset_of(coordinates.of(g[c]), tables + c * table);
      g[c] = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(background + c * bins) + bin);
      pivot = top ? g[c] : pivot;
    }
    pivot = label_below == 0.0f ? foreground : pivot;
    const uint32_t labels = label < classes ? 1u << label : 0;
    float mean = 0.0f;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      if (!Range::has(c, classes)) continue;
      g[c] = ((labels & (1u << c)) ? foreground : g[c]) - pivot;
      mean = fma_rn(exps[c], g[c], mean);
    }
    mean *= inv_sumexp * inv_sumexp;
#pragma unroll
    for (int c = 0; c < Range::most; ++c)
      if (Range::has(c, classes)) out.store(c, exps[c] * fma_rn(g[c], inv_sumexp, -mean));
  }
}

// ---- from L2

// The signed weights of errors, by their bins.
template <class T>
struct BinWeights {
  static constexpr bool reads_label = true;
  using Exp = CoordinateExp;

  template <class Args>
  explicit BinWeights(const Args& args) : table(args.table), weights(static_cast<const T*>(args.weights)), bins(args.bins) {}

  // `bin`: four times the bin. bin_weights: of a segment.
  static __device__ T weight_of_bin(const T* bin_weights, uint32_t bin) {
    return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(bin_weights) + bin * (sizeof(T) / 4));
  }

  __device__ auto of_pixel(const LovaszBatch& b, int64_t image, int64_t, int first, int32_t label,
                           const Softmax<T>& softmax) const {
    const int64_t segment = b.segment(image, first);
    return [coordinates = PixelCoordinates<T>(softmax.sumexp_excl_max), max_logit = softmax.max_logit,
            pairs = table + segment * BinLayout::table, of_bins = weights + segment * 2 * bins, count = static_cast<int>(bins),
            counts = label >= 0, own = label - first](int k, T logit) {
      const float background = coordinates.of(below_largest(logit, max_logit));
      const uint32_t bin = bin_offset_of(k == own ? -background : background, pairs + k * static_cast<int>(BinLayout::table));
      const T weight = weight_of_bin(of_bins + (k == own ? 2 * k + 1 : 2 * k) * count, bin);
      return counts ? weight : T(0);
    };
  }

  template <Errors errors>
  __device__ auto of_segment(const LovaszBatch&, int64_t segment, int64_t) const {
    return [pairs = table + segment * BinLayout::table, of_bins = weights + segment * 2 * bins, count = static_cast<int>(bins)](
               int64_t, bool is_foreground, T x) {
      const float coordinate = coordinate_of_error<errors>(x, is_foreground);
      const auto bin = static_cast<int32_t>(bin_offset_of(coordinate, pairs) / 4);
      return of_bins[bin_of_error(bin, coordinate, true) + (is_foreground ? count : 0)];
    };
  }

  const BinPair* table;
  const T* weights;
  int64_t bins;
};

// ---- sum

template <class In, Errors errors, bool plain>
__global__ void __launch_bounds__(Tuning::HistogramSum::threads, 1)
    lovasz_sum_kernel(LovaszHistogramSum args, BinWeights<opmath_t<In>> weights, Chunks chunks) {
  using T = opmath_t<In>;
  constexpr int threads = Tuning::HistogramSum::threads;
  __shared__ unsigned long long scratch[threads];
  const LovaszBatch& b = args.batch;
  const auto [first_image, part, c] = image_part(chunks.chunks, b.classes());
  const int64_t segment = b.segment(b.per_image ? first_image : 0, c);
  const auto weigh = weights.template of_segment<errors>(b, segment, c);
  const ClassPixels<In, plain> pixels(b, chunks, first_image, c);
  const int32_t foreground = errors == Errors::hinge ? 1 : static_cast<int32_t>(c);
  const double units = args.units[segment];
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  unsigned long long sum = 0;
  for (uint32_t j = begin + threadIdx.x; j < end; j += threads) {
    const auto at = pixels.at(j);
    const int32_t label = pixels.label(at);
    if (label < 0) continue;
    const T x = pixels.load(at);
    const bool is_foreground = label == foreground;
    const T error = magnitude(signed_error(errors, x, is_foreground));
    const auto weight = static_cast<double>(weigh(0, is_foreground, x));
    const double product = magnitude(weight) * static_cast<double>(narrow_error(error));
    if (weight != 0.0 && product == product) sum += static_cast<unsigned long long>(product * units + 0.5);
  }
  sum = block_sum<threads>(sum, scratch);
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<unsigned long long*>(args.sums) + segment, sum);
}

}  // namespace

namespace kernels {

void lovasz_histogram_sum(const LovaszHistogramSum& args) {
  using SumPolicy = Tuning::HistogramSum;
  const LovaszBatch& b = args.batch;
  zero_memory(args.sums, b.segments() * static_cast<int64_t>(sizeof(int64_t)), args.stream);
  const Chunks chunks = chunks_of(b, SumPolicy::threads, SumPolicy::most_tiles, multiprocessors(), 1, false);
  const Launch shape{
      .blocks = chunks.images * chunks.chunks * b.classes(), .threads = SumPolicy::threads, .stream = args.stream};
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const BinWeights<opmath_t<In>> weights(args);
    with_elementwise(b, is_plain(b, chunks), [&](auto errors, auto plain) {
      launch(lovasz_sum_kernel<In, decltype(errors)::value, decltype(plain)::value>, shape, args, weights, chunks);
    });
  });
}

void lovasz_histogram_backward(const LovaszHistogramBackward& args) {
  const LovaszBatch& b = args.batch;
  const int64_t shared = shared_bytes(b.classes(), args.bins);
  if (b.errors != Errors::softmax || b.logits.dtype == DType::f64 || b.classes() > Policy::most_classes ||
      !is_integer(b.target.dtype) || !are_near(b.logits) || !are_near(args.out.grad_logits) ||
      shared > max_shared_bytes_of_block() - Policy::static_bytes)
    return launch_gradient<BinWeights>(args);
  const Chunks chunks = chunks_of(b, Policy::threads, int64_t{1} << 40, multiprocessors(), 1, false);
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    with_class_range<In>(b.classes(), [&](auto range) {
      using Range = decltype(range);
      if constexpr (!std::is_same_v<In, double> && Range::most > 0 && Range::most <= Policy::most_classes)
        launch(chunks.flat ? lovasz_gradient_kernel<In, Range, true> : lovasz_gradient_kernel<In, Range, false>,
               {.blocks = chunks.images * chunks.chunks,
                .threads = Policy::threads,
                .stream = args.stream,
                .shared_bytes = shared},
               args, chunks);
    });
  });
}

}  // namespace kernels
}  // namespace veerloss
