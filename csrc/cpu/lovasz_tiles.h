// The gradient of the Lovász losses over one tile of pixels, one class at a time, from the weights of the errors. Included once
// per instruction set by for_each_target.h: no include guard. Loops over pixels vectorise.

struct LovaszTiles {
  // The gradient of the logits from dL/dp: p_j (g_j - sum_c p_c g_c), in two steps of one class at a time. x holds
  // exponentials, g dL/dp. The g of a most probable class is the pivot: taken relative to it, the sum has no large term that
  // cancels; for confident pixels float32 would otherwise keep no digit of it. Where all g are 0 so is the gradient: an ignored
  // pixel may hold NaN.
  template <class T>
  static void begin_gradient(int64_t n, T* __restrict pivot, T* __restrict others, int32_t* __restrict weighted) {
    for (int64_t i = 0; i < n; ++i) {
      pivot[i] = 0;
      others[i] = 0;
      weighted[i] = 0;
    }
  }

  // A pivot that a later class displaces joins the others; at first it is 0.
  template <class T>
  static void accumulate_gradient(const T* __restrict x, const T* __restrict g, int64_t n, T* __restrict pivot,
                                  T* __restrict others, int32_t* __restrict weighted) {
    for (int64_t i = 0; i < n; ++i) {
      others[i] += x[i] == T(1) ? pivot[i] : x[i] * g[i];
      pivot[i] = x[i] == T(1) ? g[i] : pivot[i];
      weighted[i] |= g[i] != T(0);
    }
  }

  // From the sums over all classes to sum_c p_c (g_c - pivot), in `others`.
  template <class T>
  static void end_gradient(int64_t n, const T* __restrict rest, const T* __restrict inverse_sum, const T* __restrict pivot,
                           T* __restrict others) {
    for (int64_t i = 0; i < n; ++i) others[i] = (others[i] - pivot[i] * rest[i]) * inverse_sum[i];
  }

  // dz may be g itself.
  template <class T>
  static void softmax_gradient(const T* __restrict x, const T* g, int64_t n, const T* __restrict inverse_sum,
                               const T* __restrict pivot, const T* __restrict mean, const int32_t* __restrict weighted, T* dz) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T slope = x[i] * inverse_sum[i] * ((g[i] - pivot[i]) - mean[i]);
      dz[i] = weighted[i] ? slope : T(0);
    }
  }

  template <class T>
  static void sign_outside(const T* __restrict p, T* __restrict weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) weight[i] = veerloss::sign_outside(p[i], weight[i]);
  }

  template <class T>
  static void scale(T* __restrict values, int64_t n, T factor) {
    for (int64_t i = 0; i < n; ++i) values[i] *= factor;
  }
};
