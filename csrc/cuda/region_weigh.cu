// The loss of a batch from the sums of its segments, and the coefficients of its gradient.

#include "lovasz/segments.cuh"

namespace veerloss {
namespace {

// As SegmentResults: of segments that are no more than their sums.
struct RegionResults {
  RegionWeigh args;

  __device__ const int64_t* sums(int64_t segment) const { return args.sums + segment * RegionLayout::words; }
  __device__ bool takes_part(int64_t segment) const {
    const int64_t* const words = sums(segment);
    return args.selection.takes_part(segment % args.batch.classes(), words[RegionLayout::pixels] > 0,
                                     region_total(words + RegionLayout::expected) > 0.0);
  }
  // Also stores the segment's coefficients.
  __device__ double loss(int64_t segment) const {
    const RegionTerms terms = RegionSegment(sums(segment), args.rule).terms;
    const bool counts = takes_part(segment);
    args.coefficients[2 * segment] = counts ? terms.of_target : 0.0;
    args.coefficients[2 * segment + 1] = counts ? terms.of_all : 0.0;
    return terms.value;
  }
};

}  // namespace

void kernels::region_weigh(const RegionWeigh& args) {
  with_opmath_type(args.batch.logits.dtype,
                   [&](auto zero) { launch_finish<decltype(zero)>(args.batch, RegionResults{args}, args.out, args.stream); });
}

}  // namespace veerloss
