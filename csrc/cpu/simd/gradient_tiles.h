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

  // A focal term adds s (q at the label, -p elsewhere), s its derivative to log p of the label. Elsewhere s joins the mean; at
  // the label, where s - p s would cancel, the gradient is made beforehand, and put in its place after `softmax`.
  template <class T>
  static void label_gradient(const T* __restrict exps, const T* __restrict g, int64_t stride, int64_t n,
                             const int32_t* __restrict label, const T* __restrict inv_sumexp, const T* __restrict pivot,
                             const T* __restrict others, const int32_t* __restrict has_weight, const T* __restrict s,
                             const T* __restrict q, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t k = (label[i] < 0 ? 0 : label[i]) * stride + i;
      out[i] = slope(exps[k], g[k], inv_sumexp[i], pivot[i], others[i], has_weight[i]) + s[i] * q[i];
    }
  }

  template <class T>
  static void add_focal(const T* __restrict s, int64_t n, T* __restrict others, int32_t* __restrict has_weight) {
    for (int64_t i = 0; i < n; ++i) {
      others[i] += s[i];
      has_weight[i] |= s[i] != T(0);
    }
  }

  template <class T>
  static void put_label(const int32_t* __restrict label, const T* __restrict gradient, int64_t n, T* __restrict out,
                        int64_t stride) {
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0) out[label[i] * stride + i] = gradient[i];
  }

  // All of it for few classes, [classes][stride]: one loop, which keeps the classes of a pixel in registers. `out` is g, or
  // not. Label, s and q are read with a focal term alone.
  template <int classes, bool focal, class T>
  static void few(const T* __restrict exps, const T* g, int64_t stride, int64_t n, const T* __restrict sumexp_excl_max,
                  const int32_t* __restrict label, const T* __restrict s, const T* __restrict q, T* out, int64_t out_stride) {
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
      if (focal) has_weight |= s[i] != T(0);
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        const bool is_label = focal && label[i] == c;
        const T gradient = slope(e[c], weight[c], inv_sumexp, pivot, focal && !is_label ? others + s[i] : others, has_weight);
        out[c * out_stride + i] = is_label ? gradient + s[i] * q[i] : gradient;
      }
    }
  }

  template <class T>
  static void sign_outside(const T* __restrict p, T* __restrict weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) weight[i] = veerloss::sign_outside(p[i], weight[i]);
  }

  template <class T>
  static void add_row(const T* __restrict values, int64_t n, T* __restrict sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += values[i];
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
