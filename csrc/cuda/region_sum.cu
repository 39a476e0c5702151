// The sums of region losses in CUDA C++, for a loss and its gradient to be made from: integers, which blocks add up in any
// order to the same bits. Logits and target are read once; nothing of their size is kept, and nothing waits for the host. A
// target out of range makes the loss NaN.
//
//   softmax, labels     classes in registers (region_sum_softmax.cu)
//   sigmoid, or given   here: a block has pixels of one class
//   any other softmax   here: a block has pixels of all classes, and goes over these one by one

#include "region.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::RegionSum;

template <class In, Activation activation, bool dense>
__global__ void __launch_bounds__(Policy::threads, activation == Activation::softmax ? 1 : 6)
    region_sum_classes_kernel(RegionInput in, int64_t* sums, Chunks chunks) {
  using T = opmath_t<In>;
  constexpr bool softmax = activation == Activation::softmax;
  constexpr int threads = Policy::threads;
  __shared__ Softmax<T> softmaxes[softmax ? threads * Policy::softmax_tiles<In> : 1];
  const SegmentBatch& b = in.batch;
  const auto classes = static_cast<int>(b.classes());
  const auto [first_image, part, channel] = image_part(chunks.chunks, softmax ? 1 : classes);
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  if constexpr (softmax) {
    // Each thread reads what it has written itself.
    VEERLOSS_NO_UNROLL
    for (uint32_t j = begin + threadIdx.x; j < end; j += threads) {
      const auto [image, pixel] = block_pixel(chunks, first_image, j);
      softmaxes[j - begin] = softmax_of_many(ClassPointer<In>(b.logits, image, pixel), classes);
    }
  }
  const int end_class = softmax ? classes : static_cast<int>(channel) + 1;
  VEERLOSS_NO_UNROLL
  for (int c = static_cast<int>(channel); c < end_class; ++c) {
    const RegionTargets<T, dense> targets(in, c);
    RegionTotals totals;
    VEERLOSS_NO_UNROLL
    for (uint32_t j = begin + threadIdx.x; j < end; j += threads) {
      const auto [image, pixel] = block_pixel(chunks, first_image, j);
      const RegionTarget<T> target = targets(image, pixel);
      if (!target.counts) continue;
      const T x = load<In>(b.logits, image, c, pixel);
      T p;
      if constexpr (softmax)
        p = mul_rn(RegionExp::of(x, softmaxes[j - begin].max_logit), softmaxes[j - begin].inv_sumexp());
      else
        p = probability_of<In, activation>(x).p;
      totals.add(p, target, in.squared);
    }
    totals.add_block<threads>(sums + b.segment(b.per_image ? first_image : 0, c) * RegionLayout::words);
  }
}

}  // namespace

void kernels::region_sum(const RegionSums& args) {
  const RegionInput& in = args.input;
  if (in.batch.upsample && (in.activation != Activation::softmax || in.dense || in.squared))
    throw std::runtime_error("veerloss: on a GPU upsample of a region loss is for a softmax, class indices and no squares");
  if (launch_region_sum_softmax(args)) return;
  const SegmentBatch& b = in.batch;
  const bool softmax = in.activation == Activation::softmax;
  constexpr int threads = Policy::threads;
  with_element_type(b.logits.dtype, [&](auto zero) {
    const Chunks chunks = softmax ? chunks_of(b, threads, Policy::softmax_tiles<decltype(zero)>, multiprocessors(), 1, false)
                                  : class_chunks(b, threads, Policy::most_tiles);
    const Launch shape{
        .blocks = chunks.images * chunks.chunks * (softmax ? 1 : b.classes()), .threads = threads, .stream = args.stream};
    with_activation(in.activation, [&](auto activation) {
      with_flag(in.dense, [&](auto dense) {
        launch(region_sum_classes_kernel<decltype(zero), decltype(activation)::value, decltype(dense)::value>, shape, in,
               args.sums, chunks);
      });
    });
  });
}

}  // namespace veerloss
