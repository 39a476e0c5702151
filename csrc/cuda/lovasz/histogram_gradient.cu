// Lovász losses on a GPU, method "histogram": the passes that look weights up by the bins of errors. veerloss/_histogram.py has
// the order of the steps.
//
//   in shared memory  softmax of classes in registers: a block has the tables of all classes, and the weights of background,
//                     times what their segment is multiplied by. The weight of the label's class comes from L2
//   from L2           everything else, by gradient.cuh
//   sum               probabilities and a hinge: weight times error, in fixed point
//
// All are integers or one value for each element: the results are the same bits in every run.

#include "../../math/log1p.h"
#include "../gradient.cuh"
#include "../rows.cuh"
#include "coordinates.cuh"

namespace veerloss {
namespace {

// ---- in shared memory

using Policy = Tuning::HistogramGradient;

// Whose pixels a block has, one for each thread at a time: those of an image, or of all images as one sequence; or either where
// the classes of a pixel are neighbours (rows.cuh).
enum class Pixels { of_image, of_images, in_rows };

constexpr int threads_of(Pixels pixels, bool focal) {
  return pixels == Pixels::in_rows && focal ? Policy::threads_of_focal_rows : Policy::threads;
}

// The tensors of a pixel; and gamma of a focal term, as the float that is computed with.
struct Tensors {
  NearView logits, target, grad;
  float gamma;
};

// Where a pixel has its elements.
struct PixelAt {
  char *logits, *target, *grad;

  __device__ PixelAt(const Tensors& tensors, uint32_t image, uint32_t pixel)
      : logits(tensors.logits.at(image, pixel)), target(tensors.target.at(image, pixel)), grad(tensors.grad.at(image, pixel)) {}

  // `count` pixels further, in the same image.
  __device__ void advance(const Tensors& tensors, uint32_t count) {
    logits = near(logits, count, tensors.logits.pixel);
    target = near(target, count, tensors.target.pixel);
    grad = near(grad, count, tensors.grad.pixel);
  }
};

template <class In>
Tensors tensors_of(const LovaszHistogramBackward& args) {
  const View& target = args.batch.target;
  return {near_view(args.batch.logits, sizeof(In)), near_view(target, size_of(target.dtype)),
          near_view(args.out.grad_logits, sizeof(In)), static_cast<float>(args.terms.focal.gamma)};
}

// A rule that always has a value to ignore and one that is background: in place of none one that is no class. A gradient does
// not tell what is out of range from what is ignored.
TargetRule without_none(TargetRule rule) {
  const int64_t other = rule.has_background && rule.background == -1 ? -2 : -1;
  if (!rule.has_ignore) rule.ignore = other;
  if (!rule.has_background) rule.background = rule.ignore;
  rule.has_ignore = rule.has_background = true;
  return rule;
}

// What the weight of foreground of a class takes; and what a focal term's slope is multiplied by.
struct alignas(16) LabelClass {
  const float* weights;
  float factor, focal;
};

__device__ inline float weight_of(const float* weights, uint32_t bin_offset) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(weights) + bin_offset);
}

// The classes of a block, in shared memory. `focal`: with a focal term.
template <class Range, bool focal, int threads>
class BlockClasses {
  static constexpr int bins = BinLayout::bins(Range::most), table = BinLayout::table;

 public:
  // From all threads; `segment` is that of class 0. A barrier has to follow.
  __device__ BlockClasses(const LovaszHistogramBackward& args, int64_t segment, unsigned char* memory,
                          LabelClass* label_classes)
      : classes_(static_cast<int>(args.batch.classes())),
        present_((1u << classes_) - 1),
        tables_(reinterpret_cast<BinPair*>(memory)),
        background_(reinterpret_cast<float*>(tables_ + classes_ * table)),
        label_classes_(label_classes) {
    const float* weights = static_cast<const float*>(args.weights) + segment * 2 * bins;
    if (threadIdx.x < Range::most && static_cast<int>(threadIdx.x) < classes_)
      label_classes[threadIdx.x] = {
          weights + (2 * threadIdx.x + 1) * bins, SegmentFactor<float>(args.out)(segment + threadIdx.x),
          focal ? FocalSlopes<float>(args.terms, args.out).factor(static_cast<int32_t>(threadIdx.x)) : 0.0f};
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < classes_ * table; i += threads)
      tables_[i] = args.table[segment * table + i];
    for (int c = 0; c < classes_; ++c) {
      const float times = label_classes[c].factor;
      for (int k = static_cast<int>(threadIdx.x); k < bins; k += threads)
        background_[c * bins + k] = weights[2 * c * bins + k] * times;
    }
  }

  __device__ int count() const { return classes_; }
  // As Range::has, of one bit: a comparison for each class would take more predicates than there are.
  __device__ bool has(int c) const { return c < Range::least || (present_ & (1u << c)) != 0; }
  // A class to look up where the label is background, which compound losses do not know: that takes no branch.
  __device__ int label_class(int32_t label) const { return focal || label < classes_ ? label : 0; }

  // Turns the logits of a pixel into their gradients. `label` >= 0; label_logit: that of label_class. With a focal term
  // returns the gradient of the label's class, which has to take the place of the one in g (see SoftmaxGradient).
  __device__ float gradients(float (&g)[Range::most], float label_logit, int32_t label, float gamma) const {
    const int label_class = this->label_class(label);
    const uint32_t labels = focal || label < classes_ ? 1u << label : 0;
    float exps[Range::most];
    const float max_logit = max_of(g);
    SumExclMax<float> sum;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      g[c] = below_largest(g[c], max_logit);
      exps[c] = exp2_of(g[c]);
      sum.add(exps[c]);
    }
    const PixelCoordinates<float> coordinates(sum.sum);
    const float inv_sumexp = reciprocal_of(1.0f + sum.sum);
    const float label_below = below_largest(label_logit, max_logit);
    const auto [foreground_weights, foreground_factor, focal_factor] = label_classes_[label_class];
    const float label_exp = exp2_of(label_below);
    FocalSlope<float> slope;
    if constexpr (focal) {
      constexpr auto ln2 = static_cast<float>(ln_2);
      // Of what is at hand: log1p would take as many instructions as all else but the powers.
      const float log_sumexp = sum.sum <= 1.0f ? log1p_unit(sum.sum) : (1.0f - coordinates.shared) * ln2;
      const float q = LabelTerm<float>::q_of(sum.sum, inv_sumexp, label_exp, label_below == 0.0f);
      slope = FocalSlope<float>::of(focal_factor, gamma, fma_rn(label_below, ln2, -log_sumexp), q);
    }
    const uint32_t foreground_bin = bin_offset_of(-coordinates.of(label_below), tables_ + label_class * table);
    const float foreground = weight_of(foreground_weights, foreground_bin) * foreground_factor;
    // As SoftmaxGradient, in two steps: the weight of a most probable class is the pivot, and all others are relative to it. A
    // class that is missing has the exponential 0 and the weights of the last one, which takes no branch.
    float pivot = 0.0f;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      const int known = c < Range::least || c < classes_ ? c : classes_ - 1;
      const bool top = g[c] == 0.0f;
      g[c] = weight_of(background_ + known * bins, bin_offset_of(coordinates.of(g[c]), tables_ + known * table));
      pivot = top ? g[c] : pivot;
    }
    pivot = (focal || labels != 0) && label_below == 0.0f ? foreground : pivot;
    float mean = 0.0f;
#pragma unroll
    for (int c = 0; c < Range::most; ++c) {
      g[c] = ((labels & (1u << c)) ? foreground : g[c]) - pivot;
      mean = fma_rn(exps[c], g[c], mean);
    }
    mean *= inv_sumexp * inv_sumexp;
    float own = 0.0f;
    if constexpr (focal) {
      own = fma_rn(label_exp, fma_rn(foreground - pivot, inv_sumexp, -mean), slope.own);
      mean = fma_rn(slope.others, inv_sumexp, mean);
    }
#pragma unroll
    for (int c = 0; c < Range::most; ++c) g[c] = exps[c] * fma_rn(g[c], inv_sumexp, -mean);
    return own;
  }

 private:
  int classes_;
  uint32_t present_;   // a bit for each class
  BinPair* tables_;    // [classes][table]
  float* background_;  // [classes][bins]
  const LabelClass* label_classes_;
};

// strip: so many of a block's pixels go through shared memory together (in_rows). One block at the least, else ptxas takes less
// registers than there are, and spills some.
template <class In, class Range, Pixels kind, bool focal>
__global__ void __launch_bounds__(threads_of(kind, focal), 1)
    lovasz_gradient_kernel(LovaszHistogramBackward args, Chunks chunks, Tensors tensors, int strip) {
  constexpr int threads = threads_of(kind, focal);
  VEERLOSS_DYNAMIC_SHARED(memory);
  __shared__ LabelClass label_classes[Range::most];
  const SegmentBatch& b = args.batch;
  const auto [first_image, part, none] = image_part(chunks.chunks);
  const BlockClasses<Range, focal, threads> classes(args, b.segment(b.per_image ? first_image : 0, 0), memory, label_classes);
  __syncthreads();
  TargetRule rule = b.rule;
  rule.has_ignore = rule.has_background = true;  // see without_none
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  float g[Range::most];
  if constexpr (kind == Pixels::in_rows) {
    const SharedRows<In, threads> rows(memory + classes.count() * class_bytes(Range::most), classes.count());
    constexpr int at_once = Range::most <= 20 ? Range::most : 0;  // 24 would spill
    const auto thread = static_cast<int>(threadIdx.x);
    for (uint32_t first = begin; first < end; first += threads) {
      const int tile = static_cast<int>(end - first < threads ? end - first : threads);
      int32_t label = label_ignored;
      if (thread < tile) {
        const auto [image, pixel] = block_pixel(chunks, first_image, first + thread);
        const char* target = tensors.target.at(static_cast<uint32_t>(image), static_cast<uint32_t>(pixel));
        label = label_of(load_integer(target, b.target.dtype, 0), rule);
      }
      float label_logit = 0.0f, own = 0.0f;
      const auto for_each_strip = [&](const auto& f) {
        VEERLOSS_NO_UNROLL
        for (int from = 0; from < tile; from += strip) {
          const PixelRun run{first_image, first + from, strip < tile - from ? strip : tile - from};
          f(run, thread >= from && thread < from + run.count, rows.row(thread - from));
          __syncthreads();
        }
      };
      for_each_strip([&](const PixelRun& run, bool mine, SharedRow<float> row) {
        rows.template load<at_once>(b.logits, run);
        __syncthreads();
        if (!mine) return;
        if (label >= 0) {
          SharedRow<float> of_label = row;
          of_label.skip(classes.label_class(label));
          label_logit = of_label.load();
        }
        load_classes<Range>(g, row, classes.count());
      });
      if (label >= 0) {
        own = classes.gradients(g, label_logit, label, tensors.gamma);
      } else {
#pragma unroll
        for (float& value : g) value = 0.0f;
      }
      for_each_strip([&](const PixelRun& run, bool mine, SharedRow<float> row) {
        if (mine) {
#pragma unroll
          for (int c = 0; c < Range::most; ++c)
            if (classes.has(c)) row.store(g[c], c);
          if (focal && label >= 0) row.store(own, label);
        }
        __syncthreads();
        rows.template store<at_once>(args.out.grad_logits, run);
      });
    }
  } else {
    uint32_t j = begin + threadIdx.x;
    const BlockPixels<kind == Pixels::of_images> pixels{chunks, first_image};
    PixelAt at(tensors, pixels.image(j), static_cast<uint32_t>(pixels.pixel(j)));
    const auto advance = [&] {
      j += threads;
      if constexpr (kind == Pixels::of_images)
        at = PixelAt(tensors, pixels.image(j), static_cast<uint32_t>(pixels.pixel(j)));
      else
        at.advance(tensors, threads);
    };
    VEERLOSS_NO_UNROLL
    for (; j < end; advance()) {
      const int32_t label = label_of(load_integer(at.target, b.target.dtype, 0), rule);
      const NearClasses<In> logits(at.logits, tensors.logits.channel), out(at.grad, tensors.grad.channel);
      if (label < 0) {  // ignored: its logits are not read; out of range: the loss is NaN, whatever is here
#pragma unroll
        for (int c = 0; c < Range::most; ++c)
          if (classes.has(c)) out.store(c, 0.0f);
        continue;
      }
#pragma unroll
      for (int c = 0; c < Range::most; ++c) g[c] = classes.has(c) ? logits.load(c) : -std::numeric_limits<float>::infinity();
      const float label_logit = logits.load(classes.label_class(label));  // in L1
      const float own = classes.gradients(g, label_logit, label, tensors.gamma);
#pragma unroll
      for (int c = 0; c < Range::most; ++c)
        if (classes.has(c)) out.store(c, g[c]);
      if (focal) out.store(label, own);
    }
  }
}

// ---- from L2

// The signed weights of errors, by their bins.
template <class T>
struct BinWeights : FactorTerm<T> {
  static constexpr bool reads_label = true;
  using Exp = CoordinateExp;

  template <class Args>
  explicit BinWeights(const Args& args) : table(args.table), weights(static_cast<const T*>(args.weights)), bins(args.bins) {}

  // `bin`: four times the bin. bin_weights: of a segment.
  static __device__ T weight_of_bin(const T* bin_weights, uint32_t bin) {
    return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(bin_weights) + bin * (sizeof(T) / 4));
  }

  __device__ auto of_pixel(const SegmentBatch& b, int64_t image, int64_t, int first, int32_t label,
                           const Softmax<T>& softmax) const {
    const int64_t segment = b.segment(image, first);
    return [coordinates = PixelCoordinates<T>(softmax.sumexp_excl_max), max_logit = softmax.max_logit,
            pairs = table + segment * BinLayout::table, of_bins = weights + segment * 2 * bins, count = static_cast<int>(bins),
            counts = label >= 0, own = label - first](int k, T logit, T factor) {
      const float background = coordinates.of(below_largest(logit, max_logit));
      const uint32_t bin = bin_offset_of(k == own ? -background : background, pairs + k * static_cast<int>(BinLayout::table));
      const T weight = weight_of_bin(of_bins + (k == own ? 2 * k + 1 : 2 * k) * count, bin);
      return counts ? weight * factor : T(0);
    };
  }

  template <Errors errors>
  __device__ auto of_segment(const SegmentBatch&, int64_t segment, int64_t) const {
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

template <class T>
using BinWeightsWithFocal = WithFocal<BinWeights<T>>;

// ---- sum

template <class In, Errors errors, bool plain>
__global__ void __launch_bounds__(Tuning::HistogramSum::threads, 1)
    lovasz_sum_kernel(LovaszHistogramSum args, BinWeights<opmath_t<In>> weights, Chunks chunks) {
  using T = opmath_t<In>;
  constexpr int threads = Tuning::HistogramSum::threads;
  __shared__ unsigned long long scratch[threads];
  const SegmentBatch& b = args.batch;
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
  const SegmentBatch& b = args.batch;
  if (b.upsample) throw std::runtime_error("veerloss: on a GPU upsample is for a softmax");
  zero_memory(args.sums, b.segments() * static_cast<int64_t>(sizeof(int64_t)), args.stream);
  const Chunks chunks = class_chunks(b, SumPolicy::threads, SumPolicy::most_tiles);
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
  const SegmentBatch& b = args.batch;
  const View &logits = b.logits, &grad = args.out.grad_logits;
  if (args.terms.any()) check_terms(b, args.terms.focal);
  const int64_t shared = b.classes() * class_bytes(b.classes()),
                left = max_shared_bytes_of_block() - Policy::static_bytes - shared;
  if (b.upsample || b.errors != Errors::softmax || logits.dtype == DType::f64 || b.classes() > Policy::most_classes ||
      !is_integer(b.target.dtype) || !are_near(logits) || !are_near(grad) || !is_near(b.target, sizeof(int64_t)) || left < 0)
    return args.terms.any() ? launch_gradient_with_terms<BinWeightsWithFocal>(args) : launch_gradient<BinWeights>(args);
  with_element_type(logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    with_class_range<In>(b.classes(), [&](auto range) {
      using Range = decltype(range);
      if constexpr (!std::is_same_v<In, double> && Range::most > 0 && Range::most <= Policy::most_classes) {
        const Chunks chunks = chunks_of(b, Policy::threads, int64_t{1} << 40, multiprocessors(), 1, false);
        // Pixels of a strip: of a block, or as many warps of them as fit.
        const int64_t fit = left / shared_rows_bytes(32, b.classes(), sizeof(float)) * 32;
        const bool in_rows = fit > 0 && has_rows(logits, b.geometry, chunks.flat) && has_rows(grad, b.geometry, chunks.flat);
        LovaszHistogramBackward with_rule = args;
        with_rule.batch.rule = without_none(b.rule);
        with_flag(args.terms.focal_scale != nullptr, [&](auto with_focal) {
          constexpr bool focal = decltype(with_focal)::value;
          const int threads = threads_of(in_rows ? Pixels::in_rows : Pixels::of_image, focal);
          const int64_t strip = !in_rows ? 0 : fit < threads ? fit : threads;
          launch(in_rows       ? lovasz_gradient_kernel<In, Range, Pixels::in_rows, focal>
                 : chunks.flat ? lovasz_gradient_kernel<In, Range, Pixels::of_images, focal>
                               : lovasz_gradient_kernel<In, Range, Pixels::of_image, focal>,
                 {.blocks = chunks.images * chunks.chunks,
                  .threads = threads,
                  .stream = args.stream,
                  .shared_bytes = shared + shared_rows_bytes(strip, b.classes(), sizeof(float))},
                 with_rule, chunks, tensors_of<In>(args), static_cast<int>(strip));
        });
      }
    });
  });
}

}  // namespace kernels
}  // namespace veerloss
