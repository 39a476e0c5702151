// The focal and the region term of a compound loss (kernels.h) on a GPU: what a pass over the pixels of a softmax sums, and
// what it adds to a gradient. Labels are hard.
#pragma once

#include "focal_softmax.cuh"

namespace veerloss {

// A pass has none, where nothing is told of label smoothing or of a mask: they need kernels of their own.
inline void check_terms(const SegmentBatch& b, const FocalTerm& focal) {
  if (b.errors != Errors::softmax || focal.label_smoothing > 0)
    throw std::runtime_error("veerloss: on a GPU a compound loss is of a softmax, without label smoothing");
}

template <class T>
__device__ inline T alpha_of(const FocalTerm& term, int32_t label) {
  return term.class_alpha ? static_cast<const T*>(term.class_alpha)[label] : static_cast<T>(term.alpha.value_or(1.0));
}

// ---- forward

// Of TermSums::focal_sums, the sums of blocks, which are added up in their order.
struct TermPartials {
  int64_t blocks;
  double *losses, *alphas;
  int64_t* valid;
  int64_t bytes;

  TermPartials(void* memory, int64_t blocks) : blocks(blocks) {
    ScratchArrays arrays(memory);
    losses = arrays.take<double>(blocks);
    alphas = arrays.take<double>(blocks);
    valid = arrays.take<int64_t>(blocks);
    bytes = arrays.bytes();
  }
};

// Of the pixels of a thread.
template <class T>
struct FocalTotals {
  double loss = 0, alpha = 0;
  int32_t valid = 0;

  // logit: that of the label. Of a label out of range the loss is NaN.
  __device__ void add(const FocalTerm& term, const Softmax<T>& softmax, T logit, int32_t label) {
    const T factor = alpha_of<T>(term, label);
    loss +=
        static_cast<double>(LabelTerm<T>(factor, static_cast<T>(term.gamma), softmax, softmax.inv_sumexp(), logit).loss.value);
    if (term.class_alpha) alpha += static_cast<double>(factor);
    ++valid;
  }
  __device__ void add_bad() {
    loss = not_a_number;
    ++valid;
  }

  // From all threads; `scratch` has a word for each.
  template <int threads>
  __device__ void store(const TermPartials& partials, const FocalTerm& term, int64_t block, double* scratch) const {
    const double whole = block_sum<threads>(loss, scratch);
    const int32_t count = block_sum<threads>(valid, reinterpret_cast<int32_t*>(scratch));
    const double alphas = block_sum<threads>(alpha, scratch);
    if (threadIdx.x != 0) return;
    partials.losses[block] = whole;
    partials.valid[block] = count;
    partials.alphas[block] = term.class_alpha ? alphas : count * static_cast<double>(static_cast<T>(term.alpha.value_or(1.0)));
  }
};

// focal_sums from the sums of the blocks.
void finish_terms(const TermPartials& partials, double* focal_sums, Stream stream);

// The sums of both terms, by passes of their own. scratch: terms_scratch_bytes.
int64_t terms_scratch_bytes(const SegmentBatch& b);
void sum_focal_term(const SegmentBatch& b, const TermSums& terms, void* scratch, Stream stream);
void sum_region_term(const SegmentBatch& b, const TermSums& terms, Stream stream);

// ---- backward

// What the focal term of a pixel adds to the gradient of its logits: s (q at the label, -p elsewhere), where s is the
// derivative to log p of the label.
template <class T>
struct FocalSlope {
  T others = T(0), own = T(0);  // s and s q

  // alpha: also times the gradient of the loss. Cross-entropy needs no logarithm.
  __device__ static FocalSlope of(T alpha, T gamma, T log_p, T q) {
    const T s = gamma == T(0) ? -alpha : LabelTerm<T>(alpha, gamma, log_p, q).loss.slope;
    return {s, s * q};
  }
};

// Of a Weights (gradient.cuh): its pixels have a FocalSlope.
template <class T>
class FocalSlopes {
 public:
  VEERLOSS_HD FocalSlopes(const TermGradients& terms, const SegmentGradient& out)
      : term_(terms.focal), scale_(static_cast<const T*>(terms.focal_scale)), grad_(out.grad), grad_dtype_(out.grad_dtype) {}

  // d loss / d (loss of a pixel of this label).
  __device__ T factor(int32_t label) const {
    return scale_ ? alpha_of<T>(term_, label) * (load_element<T>(grad_, grad_dtype_, 0) * *scale_) : T(0);
  }
  // `row`: the logits of the pixel.
  template <class Pointer>
  __device__ FocalSlope<T> operator()(const Softmax<T>& softmax, T inv_sumexp, const Pointer& row, int32_t label) const {
    if (!scale_ || label < 0) return {};
    const T d = label_logit(row, label) - softmax.max_logit;
    const T q = LabelTerm<T>::q_of(softmax.sumexp_excl_max, inv_sumexp, exp_neg(d), d == T(0));
    return FocalSlope<T>::of(factor(label), static_cast<T>(term_.gamma), d - log_sumexp(softmax), q);
  }

 private:
  FocalTerm term_;
  const T* scale_;
  const void* grad_;
  DType grad_dtype_;
};

// Weights of errors, which have those of a region loss, and a focal term.
template <class Base>
struct WithFocal : Base {
  template <class Args>
  explicit WithFocal(const Args& args) : Base(args), focal(args.terms, args.out) {}

  FocalSlopes<typename Base::Type> focal;
};

// Of a Weights (gradient.cuh).
template <class Weights>
constexpr bool is_at_full_size = [] {
  if constexpr (requires { Weights::at_full_size; })
    return Weights::at_full_size;
  else
    return false;
}();

// Weights of errors and both terms: what a region loss adds is two numbers of a segment.
template <class Base>
struct WithTerms {
  static constexpr bool reads_label = true, at_full_size = is_at_full_size<Base>;
  using Exp = typename Base::Exp;
  using Type = typename Base::Type;
  struct Term {
    Type factor, foreground, background;
  };

  template <class Args>
  explicit WithTerms(const Args& args)
      : base(args),
        focal(args.terms, args.out),
        region(static_cast<const Type*>(args.terms.region)),
        grad(args.out.grad),
        grad_dtype(args.out.grad_dtype) {}

  __device__ Term term(int64_t segment, Type factor) const {
    if (!region) return {factor, Type(0), Type(0)};
    const auto of_loss = load_element<Type>(grad, grad_dtype, 0);
    return {factor, of_loss * region[2 * segment], of_loss * region[2 * segment + 1]};
  }
  __device__ auto of_pixel(const SegmentBatch& b, int64_t image, int64_t pixel, int first, int32_t label,
                           const Softmax<Type>& softmax) const {
    return [weight = base.of_pixel(b, image, pixel, first, label, softmax), counts = label >= 0, own = label - first](
               int k, Type logit, const Term& term) {
      const Type found = weight(k, logit, term.factor) + (k == own ? term.foreground : term.background);
      return counts ? found : Type(0);
    };
  }

  Base base;
  FocalSlopes<Type> focal;
  const Type* region;
  const void* grad;
  DType grad_dtype;
};

}  // namespace veerloss
