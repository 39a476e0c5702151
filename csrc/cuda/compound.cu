// Compound losses on a GPU: the terms' sums by passes of their own, and the gradient of a compound loss without a Lovász term.

#include "gradient.cuh"
#include "region.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::Focal;

// One thread for each pixel, which reads the logits once. (One block at the least: without it ptxas spilled 180 bytes of
// float64.)
template <class In, bool is_low>
__global__ void __launch_bounds__(Policy::threads, 1)
    compound_focal_kernel(SegmentBatch b, LowLogits low, FocalTerm term, FocalTiles tiles, TermPartials partials) {
  using T = opmath_t<In>;
  constexpr int threads = Policy::threads;
  __shared__ double scratch[threads];
  const auto [images, classes, pixels] = b.geometry;
  FocalTotals<T> totals;
  for (uint32_t block = blockIdx.x; block < tiles.grid.blocks; block += tiles.blocks) {
    const auto [image, pixel, channel] = thread_pixel<threads>(tiles.grid, images, pixels, 1, block);
    if (pixel < 0) continue;
    const int32_t label = load_label(b.target, b.rule, image, pixel);
    if (label == label_bad) totals.add_bad();
    if (label < 0) continue;
    const auto logits = [&] {
      if constexpr (is_low)
        return BlendedClasses<In>::at(low, image, static_cast<int32_t>(pixel));
      else
        return ClassPointer<In>(b.logits, image, pixel);
    }();
    totals.add(term, softmax_of_many(logits, static_cast<int>(classes)), label_logit(logits, label), label);
  }
  totals.template store<threads>(partials, term, blockIdx.x, scratch);
}

__global__ void __launch_bounds__(Tuning::Finish::threads) compound_finish_kernel(TermPartials partials, double* focal_sums) {
  constexpr int threads = Tuning::Finish::threads;
  __shared__ double scratch[threads];
  double loss = 0, valid = 0, alpha = 0;
  for (int64_t i = threadIdx.x; i < partials.blocks; i += threads) {
    loss += partials.losses[i];
    valid += static_cast<double>(partials.valid[i]);
    alpha += partials.alphas[i];
  }
  loss = block_sum<threads>(loss, scratch);
  valid = block_sum<threads>(valid, scratch);
  alpha = block_sum<threads>(alpha, scratch);
  if (threadIdx.x != 0) return;
  focal_sums[0] = loss;
  focal_sums[1] = valid;
  focal_sums[2] = alpha;
}

TermPartials partials_of(const SegmentBatch& b, void* scratch) {
  return {scratch, focal_tiles<Policy::threads>(b.geometry).blocks};
}

// Errors of no weight: all that a pixel has is what the terms add.
template <class T>
struct NoWeights : FactorTerm<T> {
  using Exp = RegionExp;

  explicit NoWeights(const CompoundBackward&) {}

  __device__ auto of_pixel(const SegmentBatch&, int64_t, int64_t, int, int32_t, const Softmax<T>&) const {
    return [](int, T, T) { return T(0); };
  }
};

}  // namespace

void finish_terms(const TermPartials& partials, double* focal_sums, Stream stream) {
  launch(compound_finish_kernel, {.blocks = 1, .threads = Tuning::Finish::threads, .stream = stream}, partials, focal_sums);
}

int64_t terms_scratch_bytes(const SegmentBatch& b) {
  return partials_of(b, nullptr).bytes;
}

void sum_focal_term(const SegmentBatch& b, const TermSums& terms, void* scratch, Stream stream) {
  if (!terms.focal_sums) return;
  const FocalTiles tiles = focal_tiles<Policy::threads>(b.geometry);
  const TermPartials partials = partials_of(b, scratch);
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    const Launch shape{.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream};
    if (!b.upsample) return launch(compound_focal_kernel<In, false>, shape, b, LowLogits{}, terms.focal, tiles, partials);
    with_low_range<In>(b, [&](auto) {
      launch(compound_focal_kernel<In, true>, shape, b, LowLogits::of(b.logits, *b.upsample, zero), terms.focal, tiles,
             partials);
    });
  });
  finish_terms(partials, terms.focal_sums, stream);
}

void sum_region_term(const SegmentBatch& b, const TermSums& terms, Stream stream) {
  if (!terms.region_sums) return;
  const RegionInput input{.batch = b, .activation = Activation::softmax, .dense = false, .squared = false};
  kernels::region_sum({.input = input, .sums = terms.region_sums, .stream = stream});
}

namespace kernels {

int64_t compound_sum_scratch_bytes(const SegmentBatch& b) {
  return terms_scratch_bytes(b);
}

void compound_sum(const CompoundSum& args) {
  check_terms(args.batch, args.terms.focal);
  sum_focal_term(args.batch, args.terms, args.scratch, args.stream);
  sum_region_term(args.batch, args.terms, args.stream);
}

void compound_backward(const CompoundBackward& args) {
  const SegmentBatch& b = args.batch;
  check_terms(b, args.terms.focal);
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    launch_softmax_gradient<In>(b, WithTerms<NoWeights<opmath_t<In>>>(args), args.out, args.stream);
  });
}

}  // namespace kernels
}  // namespace veerloss
