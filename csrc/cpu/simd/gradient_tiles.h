// The gradient of the logits over one tile of pixels, one class at a time, from the signed weights dL/dp of the errors.
// Included once per instruction set by dispatch_isa.h: no include guard. Loops over pixels vectorise.

struct GradientTiles {
  // p_j (g_j - sum_c p_c g_c), g = dL/dp, in two passes over the classes. The g of a most probable class is the pivot: relative
  // to it the sum has no large term that cancels, of which float32 would keep no digit where pixels are confident. Where all g
  // are 0 so is the gradient: an ignored pixel may hold NaN.
  template <class T>
  static void begin(int64_t n, T* __restrict pivot, T* __restrict others, int32_t* __restrict has_weight) {
    for (int64_t i = 0; i < n; ++i) {
      pivot[i] = 0;
      others[i] = 0;
      has_weight[i] = 0;
    }
  }

  template <class T>
  static void accumulate(const T* __restrict exps, const T* __restrict g, int64_t n, T* __restrict pivot, T* __restrict others,
                         int32_t* __restrict has_weight) {
    for (int64_t i = 0; i < n; ++i) add(exps[i], g[i], pivot[i], others[i], has_weight[i]);
  }

  // `others` becomes sum_c p_c (g_c - pivot).
  template <class T>
  static void end(int64_t n, const T* __restrict sumexp_excl_max, const T* __restrict inv_sumexp, const T* __restrict pivot,
                  T* __restrict others) {
    for (int64_t i = 0; i < n; ++i) others[i] = mean(others[i], pivot[i], sumexp_excl_max[i], inv_sumexp[i]);
  }

  // `out` may be g.
  template <class T>
  static void softmax(const T* __restrict exps, const T* g, int64_t n, const T* __restrict inv_sumexp,
                      const T* __restrict pivot, const T* __restrict others, const int32_t* __restrict has_weight, T* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = slope(exps[i], g[i], inv_sumexp[i], pivot[i], others[i], has_weight[i]);
  }

  // All of it for few classes, [classes][stride]: one loop, which keeps the classes of a pixel in registers. `out` is g, or
  // not.
  template <int classes, class T>
  static void few(const T* __restrict exps, const T* g, int64_t stride, int64_t n, const T* __restrict sumexp_excl_max, T* out,
                  int64_t out_stride) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T e[classes], weight[classes], pivot = 0, others = 0;
      int32_t has_weight = 0;
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        e[c] = exps[c * stride + i];
        weight[c] = g[c * stride + i];
        add(e[c], weight[c], pivot, others, has_weight);
      }
      const T inv_sumexp = T(1) / (T(1) + sumexp_excl_max[i]);
      others = mean(others, pivot, sumexp_excl_max[i], inv_sumexp);
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) out[c * out_stride + i] = slope(e[c], weight[c], inv_sumexp, pivot, others, has_weight);
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

 private:
  // ---- of one pixel

  // One class. A pivot that a later class replaces joins the others; the first one is 0.
  template <class T>
  static VEERLOSS_HD void add(T exp, T g, T& pivot, T& others, int32_t& has_weight) {
    others += exp == T(1) ? pivot : exp * g;
    pivot = exp == T(1) ? g : pivot;
    has_weight |= g != T(0);
  }
  // sum_c p_c (g_c - pivot)
  template <class T>
  static VEERLOSS_HD T mean(T others, T pivot, T sumexp_excl_max, T inv_sumexp) {
    return (others - pivot * sumexp_excl_max) * inv_sumexp;
  }
  template <class T>
  static VEERLOSS_HD T slope(T exp, T g, T inv_sumexp, T pivot, T mean, int32_t has_weight) {
    const T value = exp * inv_sumexp * ((g - pivot) - mean);
    return has_weight ? value : T(0);
  }
};
