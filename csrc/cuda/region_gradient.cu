// The gradient of the region losses: dL/dp of a segment is one number for its foreground and one for its background, or with
// values or squares linear in them. Logits and target are read once more.
//
//   softmax, labels      classes in registers (region_gradient_softmax.cu); more of them, gradient.cuh
//   softmax otherwise    gradient.cuh, class by class
//   sigmoid, or given    here: a block has pixels of one class

#include "gradient.cuh"
#include "region_gradient.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::RegionGradient;

// Of labels, without squares.
template <class T>
struct RegionLabelWeights {
  static constexpr bool reads_label = true;
  using Type = T;
  using Exp = RegionExp;
  using Term = RegionLabelTerm<T>;

  explicit RegionLabelWeights(const RegionBackward& args) : coefficients(args.coefficients) {}

  __device__ Term term(int64_t segment, T factor) const { return {coefficients, segment, factor}; }
  __device__ auto of_pixel(const SegmentBatch&, int64_t, int64_t, int first, int32_t label, const Softmax<T>&) const {
    return [counts = label >= 0, own = label - first](int k, T, const Term& term) {
      const T weight = k == own ? term.foreground : term.background;
      return counts ? weight : T(0);
    };
  }

  const double* coefficients;
};

// Of values, or with squares.
template <class T>
struct RegionValueWeights {
  static constexpr bool reads_label = false;  // not of values
  using Type = T;
  using Exp = RegionExp;
  using Term = RegionCoefficients;

  explicit RegionValueWeights(const RegionBackward& args) : input(args.input), coefficients(args.coefficients) {}

  __device__ Term term(int64_t segment, T factor) const { return {coefficients, segment, static_cast<double>(factor)}; }
  __device__ auto of_pixel(const SegmentBatch& b, int64_t image, int64_t pixel, int first, int32_t,
                           const Softmax<T>& softmax) const {
    const int32_t label = input.dense ? 0 : load_label(b.target, b.rule, image, pixel);
    return [this, image, pixel, first, label, max_logit = softmax.max_logit, inv_sumexp = softmax.inv_sumexp()](
               int k, T logit, const Term& term) {
      const View& values = input.values;
      T t = label == first + k ? T(1) : T(0);
      if (input.dense) t = load_element<T>(values.data, values.dtype, ptr_offset(values, image, first + k, pixel));
      const T weight = term.weight(Exp::of(logit, max_logit) * inv_sumexp, t, input.squared);
      return label >= 0 ? weight : T(0);
    };
  }

  RegionInput input;
  const double* coefficients;
};

template <class In, Activation activation, bool dense>
__global__ void __launch_bounds__(Policy::threads) region_gradient_classes_kernel(RegionBackward args, Chunks chunks) {
  using T = opmath_t<In>;
  const RegionInput& in = args.input;
  const SegmentBatch& b = in.batch;
  const auto [first_image, part, c] = image_part(chunks.chunks, b.classes());
  const int64_t segment = b.segment(b.per_image ? first_image : 0, c);
  const T factor = SegmentFactor<T>(args.out)(segment);
  const RegionCoefficients of(args.coefficients, segment, static_cast<double>(factor));
  const RegionTargets<T, dense> targets(in, c);
  const auto begin = static_cast<uint32_t>(chunks.begin(part)), end = static_cast<uint32_t>(chunks.end(part));
  VEERLOSS_NO_UNROLL
  for (uint32_t j = begin + threadIdx.x; j < end; j += Policy::threads) {
    const auto [image, pixel] = block_pixel(chunks, first_image, j);
    const RegionTarget<T> target = targets(image, pixel);
    const auto [p, slope] = probability_of<In, activation>(load<In>(b.logits, image, c, pixel));
    const T g = of.weight(p, target.value, in.squared) * slope;
    // 0 of a segment that takes no part, whatever it holds
    store<In>(args.out.grad_logits, image, c, pixel, target.counts && factor != T(0) ? g : T(0));
  }
}

}  // namespace

void kernels::region_backward(const RegionBackward& args) {
  const RegionInput& in = args.input;
  const SegmentBatch& b = in.batch;
  if (b.upsample && (in.activation != Activation::softmax || in.dense || in.squared))
    throw std::runtime_error("veerloss: on a GPU upsample of a region loss is for a softmax, class indices and no squares");
  with_element_type(b.logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    using T = opmath_t<In>;
    if (in.activation == Activation::softmax && !in.dense && !in.squared)
      return launch_region_gradient_softmax(args)
                 ? void()
                 : launch_softmax_gradient<In>(b, RegionLabelWeights<T>(args), args.out, args.stream);
    if (in.activation == Activation::softmax)
      return launch_gradient_of_many<In>(b, RegionValueWeights<T>(args), args.out, args.stream);
    const Chunks chunks = class_chunks(b, Policy::threads, Policy::most_tiles);
    const Launch shape{
        .blocks = chunks.images * chunks.chunks * b.classes(), .threads = Policy::threads, .stream = args.stream};
    with_flag(in.dense, [&](auto dense) {
      with_flag(in.activation == Activation::sigmoid, [&](auto sigmoid) {
        constexpr Activation activation = decltype(sigmoid)::value ? Activation::sigmoid : Activation::none;
        launch(region_gradient_classes_kernel<In, activation, decltype(dense)::value>, shape, args, chunks);
      });
    });
  });
}

}  // namespace veerloss
