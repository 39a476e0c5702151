// Softmax over one tile of pixels, for all losses. Included once per instruction set by dispatch_isa.h: no include guard.
// Logits are [classes][stride], stride >= n; the other rows are [n]. Loops over pixels vectorise; classes are the outer loop.

struct SoftmaxTiles {
  template <class T>
  static void maximum(const T* __restrict logits, int64_t classes, int64_t stride, int64_t n, T* __restrict max_logit) {
    for (int64_t i = 0; i < n; ++i) max_logit[i] = logits[i];
    for (int64_t c = 1; c < classes; ++c) {
      const T* __restrict row = logits + c * stride;
      for (int64_t i = 0; i < n; ++i) max_logit[i] = row[i] > max_logit[i] ? row[i] : max_logit[i];
    }
  }

  // exps = exp(logits - max_logit), [classes][stride]; may be the memory of the logits. sumexp_excl_max is their sum without
  // one of the largest, which is exactly 1: so 1 - p of a most probable class is sumexp_excl_max / (1 + sumexp_excl_max), where
  // 1 - p would cancel. inv_sumexp = 1 / (1 + sumexp_excl_max). Scratch: max_count, how many classes have the maximum; total,
  // see end_part.
  template <class T>
  static void exponentials(const T* logits, int64_t logits_stride, T* exps, int64_t classes, int64_t stride, int64_t n,
                           const T* __restrict max_logit, T* __restrict max_count, T* __restrict sumexp_excl_max,
                           T* __restrict inv_sumexp, double* __restrict total) {
    for (int64_t i = 0; i < n; ++i) {
      sumexp_excl_max[i] = 0;
      max_count[i] = 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      if (c > 0 && c % classes_per_sum == 0) end_part(sumexp_excl_max, total, n, c);
      const T* in = logits + c * logits_stride;
      T* out = exps + c * stride;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        out[i] = exponential(in[i] - max_logit[i], sumexp_excl_max[i], max_count[i]);
      }
    }
    if (classes > classes_per_sum) end_sum(sumexp_excl_max, total, n);
    for (int64_t i = 0; i < n; ++i) {
      sumexp_excl_max[i] += max_count[i] - T(1);
      inv_sumexp[i] = T(1) / (T(1) + sumexp_excl_max[i]);
    }
  }

  // The same of few classes: one loop, which keeps the classes of a pixel in registers.
  template <int classes, class T>
  static void few(const T* logits, int64_t logits_stride, T* exps, int64_t stride, int64_t n, T* __restrict max_of_pixel,
                  T* __restrict sumexp_excl_max, T* __restrict inv_sumexp) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T below[classes], max_logit = logits[i], sum = 0, count = 0;
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        below[c] = logits[c * logits_stride + i];
        max_logit = below[c] > max_logit ? below[c] : max_logit;
      }
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) exps[c * stride + i] = exponential(below[c] - max_logit, sum, count);
      sum += count - T(1);
      max_of_pixel[i] = max_logit;
      sumexp_excl_max[i] = sum;
      inv_sumexp[i] = T(1) / (T(1) + sum);
    }
  }

  // Of one class of a pixel, which is added to the sum of the others, or one more that has the maximum.
  template <class T>
  static VEERLOSS_HD T exponential(T below_max, T& sumexp_excl_max, T& max_count) {
    const T e = VecMath<T>::exp_neg(below_max);
    sumexp_excl_max += e == T(1) ? T(0) : e;
    max_count += e == T(1) ? T(1) : T(0);
    return e;
  }

  // A sum over more than classes_per_sum classes, every so many of them, before class c: what `sum` has goes to `total`.
  template <class T>
  static void end_part(T* __restrict sum, double* __restrict total, int64_t n, int64_t c) {
    for (int64_t i = 0; i < n; ++i) {
      total[i] = (c == classes_per_sum ? 0.0 : total[i]) + static_cast<double>(sum[i]);
      sum[i] = 0;
    }
  }

  // After all classes: the whole sum.
  template <class T>
  static void end_sum(T* __restrict sum, const double* __restrict total, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<T>(total[i] + static_cast<double>(sum[i]));
  }
};
