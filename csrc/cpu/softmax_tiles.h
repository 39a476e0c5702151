// Softmax over one tile of pixels, for all losses. Included once per instruction set by for_each_target.h: no include guard.
// x is [classes][stride], stride >= n; the other rows are [n]. Loops over pixels vectorise; classes are the outer loop.

struct SoftmaxTiles {
  template <class T>
  static void maximum(const T* __restrict x, int64_t classes, int64_t stride, int64_t n, T* __restrict largest) {
    for (int64_t i = 0; i < n; ++i) largest[i] = x[i];
    for (int64_t c = 1; c < classes; ++c) {
      const T* __restrict row = x + c * stride;
      for (int64_t i = 0; i < n; ++i) largest[i] = row[i] > largest[i] ? row[i] : largest[i];
    }
  }

  // x = exp(logits - maximum); logits are [classes][logits_stride], x itself perhaps. rest is their sum without one of the
  // largest, which is 1 exactly: so 1 - p of a most probable class is rest / (1 + rest), where 1 - p would lose its digits.
  // inverse_sum = 1 / (1 + rest).
  template <class T>
  static void exponentials(const T* logits, int64_t logits_stride, T* x, int64_t classes, int64_t stride, int64_t n,
                           const T* __restrict largest, T* __restrict rest, T* __restrict inverse_sum) {
    for (int64_t i = 0; i < n; ++i) {
      rest[i] = 0;
      inverse_sum[i] = 0;  // for now, how many classes share the maximum
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T* in = logits + c * logits_stride;
      T* row = x + c * stride;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const T e = VecMath<T>::exp_neg(in[i] - largest[i]);
        rest[i] += e == T(1) ? T(0) : e;
        inverse_sum[i] += e == T(1) ? T(1) : T(0);
        row[i] = e;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      rest[i] += inverse_sum[i] - T(1);
      inverse_sum[i] = T(1) / (T(1) + rest[i]);
    }
  }
};
