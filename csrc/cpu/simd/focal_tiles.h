// The focal losses over one tile of pixels. Included once per instruction set by dispatch_isa.h: no include guard.
//
// No loop over pixels has a dependence between them, so that the compiler vectorises it; classes are the outer loop. Logits and
// exponentials of a tile are [classes][stride], stride >= n.

struct FocalTiles {
  // ---- sigmoid: one row, that is one channel of the tile. `Plain`: every element is valid, has weight 1 and the same incoming
  // gradient; then weight and grad are not read. Otherwise ignored elements have weight 0 and a finite logit.

  template <class T, bool Square, bool Plain>
  static double sigmoid_forward(const T* __restrict logits, const T* __restrict target, const T* __restrict weight, int64_t n,
                                SigmoidParams<T> p, T* __restrict loss) {
    for (int64_t i = 0; i < n; ++i) {
      const T value =
          sigmoid_focal<VecMath<T>, Square>(logits[i], target[i], p.alpha_positive, p.alpha_negative, p.gamma).value;
      loss[i] = Plain ? value : weight[i] * value;
    }
    return sum(loss, n);
  }

  // The same, and the gradient of the sum.
  template <class T, bool Square, bool Plain>
  static double sigmoid_both(const T* __restrict logits, const T* __restrict target, const T* __restrict weight, int64_t n,
                             SigmoidParams<T> p, T* __restrict loss, T* __restrict slope) {
    for (int64_t i = 0; i < n; ++i) {
      const auto [value, derivative] =
          sigmoid_focal<VecMath<T>, Square>(logits[i], target[i], p.alpha_positive, p.alpha_negative, p.gamma);
      loss[i] = Plain ? value : weight[i] * value;
      slope[i] = Plain ? derivative : weight[i] * derivative;
    }
    return sum(loss, n);
  }

  template <class T, bool Square, bool Plain>
  static void sigmoid_backward(const T* __restrict logits, const T* __restrict target, const T* __restrict weight,
                               const T* __restrict grad, T scale, int64_t n, SigmoidParams<T> p, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      const T slope =
          sigmoid_focal<VecMath<T>, Square>(logits[i], target[i], p.alpha_positive, p.alpha_negative, p.gamma).slope;
      const T weighted = Plain ? scale : weight[i] * grad[i];
      out[i] = (Plain || weight[i] != T(0) ? weighted : T(0)) * slope;  // a NaN, perhaps, of what does not count
    }
  }

  // The row of class c of a one-hot target, which is never stored as a tensor.
  template <class T>
  static void one_hot(T* __restrict target, const int32_t* __restrict label, int64_t n, int32_t c) {
    for (int64_t i = 0; i < n; ++i) target[i] = label[i] == c ? T(1) : T(0);
  }

  // Gives the elements of ignored pixels weight 0.
  template <class T>
  static void mask_labels(T* __restrict weight, T* __restrict logits, const int32_t* __restrict label, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = label[i] >= 0 ? weight[i] : T(0);
      logits[i] = label[i] >= 0 ? logits[i] : T(0);
    }
  }

  // Whether all of a dense target lies in [0, 1] or is NaN.
  template <class T>
  static bool in_unit_range(const T* __restrict target, int64_t n) {
    int32_t outside = 0;
    for (int64_t i = 0; i < n; ++i) outside += (target[i] < T(0)) | (target[i] > T(1));
    return outside == 0;
  }

  // Gives the ignored elements of a dense target weight 0. `stored` is the target before it was rounded to T. Returns the
  // number of valid elements.
  template <class T>
  static int64_t mask_dense(T* __restrict target, T* __restrict weight, T* __restrict logits, int64_t n,
                            const double* __restrict stored, double ignore) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool valid = stored[i] != ignore;
      count += valid;
      weight[i] = valid ? weight[i] : T(0);
      logits[i] = valid ? logits[i] : T(0);
      target[i] = valid ? target[i] : T(0);
    }
    return count;
  }

  // ---- softmax

  // The logit of the label, before its exponential overwrites it; 0 for ignored pixels.
  template <class T>
  static void label_logit(const T* __restrict logits, int64_t stride, int64_t n, const int32_t* __restrict label,
                          T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = label[i] >= 0 ? logits[label[i] * stride + i] : T(0);
  }

  // r.log_p and r.q from r.label_logit, less the maximum; both 0 for ignored pixels. For a most probable class (label_logit 0)
  // both come from the sum of the other exponentials: 1 - p would cancel.
  template <class T>
  static void log_probability(int64_t n, const int32_t* __restrict label, SoftmaxRows<T> r) {
    const T* __restrict sumexp_excl_max = r.sumexp_excl_max;
    const T* __restrict inv_sumexp = r.inv_sumexp;
    const T* __restrict label_logit = r.label_logit;
    T* __restrict log_p = r.log_p;
    T* __restrict q = r.q;
    for (int64_t i = 0; i < n; ++i) {
      const T d = label_logit[i];
      const bool valid = label[i] >= 0;
      log_p[i] = valid ? d - log_sumexp(sumexp_excl_max[i]) : T(0);
      q[i] = valid ? not_p(d, sumexp_excl_max[i], inv_sumexp[i]) : T(0);
    }
  }

  // The logits of the labels less the largest ones.
  template <class T>
  static void below_maximum(const T* __restrict max_logit, int64_t n, T* __restrict label_logit) {
    for (int64_t i = 0; i < n; ++i) label_logit[i] -= max_logit[i];
  }

  // r.q alone.
  template <class T>
  static void label_error(int64_t n, const int32_t* __restrict label, SoftmaxRows<T> r) {
    const T* __restrict sumexp_excl_max = r.sumexp_excl_max;
    const T* __restrict inv_sumexp = r.inv_sumexp;
    const T* __restrict label_logit = r.label_logit;
    T* __restrict q = r.q;
    for (int64_t i = 0; i < n; ++i) q[i] = label[i] >= 0 ? not_p(label_logit[i], sumexp_excl_max[i], inv_sumexp[i]) : T(0);
  }

  // Of gamma 0, which takes no powers.
  template <class T>
  static void cross_entropy(const T* __restrict log_p, const T* __restrict alpha, int64_t n, T* __restrict loss) {
    for (int64_t i = 0; i < n; ++i) loss[i] = -alpha[i] * log_p[i];
  }
  template <class T>
  static void cross_entropy_backward(const T* __restrict alpha, int64_t n, const T* __restrict grad, T* __restrict grad_log_p) {
    for (int64_t i = 0; i < n; ++i) grad_log_p[i] = -grad[i] * alpha[i];
  }

  template <class T, bool Square>
  static double softmax_forward(const T* __restrict log_p, const T* __restrict q, const T* __restrict alpha, int64_t n, T gamma,
                                T* __restrict loss) {
    if (!Square && gamma == T(0))
      cross_entropy(log_p, alpha, n, loss);
    else
      for (int64_t i = 0; i < n; ++i) loss[i] = softmax_focal<VecMath<T>, Square>(log_p[i], q[i], alpha[i], gamma).value;
    return sum(loss, n);
  }

  // From the gradient of each pixel's loss to that of its log p.
  template <class T, bool Square>
  static void log_probability_backward(const T* __restrict log_p, const T* __restrict q, const T* __restrict alpha, int64_t n,
                                       T gamma, const T* __restrict grad, T* __restrict grad_log_p) {
    if (!Square && gamma == T(0)) return cross_entropy_backward(alpha, n, grad, grad_log_p);
    for (int64_t i = 0; i < n; ++i)
      grad_log_p[i] = grad[i] * softmax_focal<VecMath<T>, Square>(log_p[i], q[i], alpha[i], gamma).slope;
  }

  // All that is left of a pixel with a hard label after its exponentials: the sum of the losses, and their gradient as
  // gradient_factor() has it. own: [n], scratch.
  template <class T, bool Square>
  static double label_terms(const int32_t* __restrict label, SoftmaxRows<T> r, const T* __restrict alpha, int64_t n, T gamma,
                            T* __restrict loss, T* __restrict factor, T* __restrict own, T* __restrict exps, int64_t stride) {
    const T* __restrict sumexp_excl_max = r.sumexp_excl_max;
    const T* __restrict inv_sumexp = r.inv_sumexp;
    const T* __restrict label_logit = r.label_logit;
    const auto each = [&](const auto& term) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const T d = label_logit[i], sum = sumexp_excl_max[i];
        const bool valid = label[i] >= 0;
        const T q = valid ? not_p(d, sum, inv_sumexp[i]) : T(0);
        const ValueAndSlope<T> found = term(valid ? d - log_sumexp(sum) : T(0), q, alpha[i]);
        loss[i] = found.value;
        factor[i] = -found.slope * inv_sumexp[i];
        own[i] = -q * (T(1) + sum);
      }
    };
    if (!Square && gamma == T(0))
      each([](T log_p, T, T a) { return ValueAndSlope<T>{-a * log_p, -a}; });
    else
      each([gamma](T log_p, T q, T a) { return softmax_focal<VecMath<T>, Square>(log_p, q, a, gamma); });
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0) exps[label[i] * stride + i] = own[i];
    return FocalTiles::sum(loss, n);
  }

  // -grad_log_p * p for one class: the gradient of its logits, but for the pixels whose label it is. `out` may be `exps`.
  template <class T>
  static void other_gradient(const T* exps, const T* __restrict inv_sumexp, const T* __restrict grad_log_p, int64_t n, T* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = -grad_log_p[i] * (exps[i] * inv_sumexp[i]);
  }

  // grad_log_p * q at the label of each pixel; row 0 of the gradient is at `out`, the others class_stride apart.
  template <class T>
  static void label_gradient(const int32_t* __restrict label, const T* __restrict grad_log_p, const T* __restrict q, int64_t n,
                             T* __restrict out, int64_t class_stride) {
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0) out[label[i] * class_stride + i] = grad_log_p[i] * q[i];
  }

  // The same as a factor of each pixel's exponentials, where that of the label takes another value, [classes][stride].
  template <class T>
  static void gradient_factor(const int32_t* __restrict label, const T* __restrict grad_log_p, const T* __restrict q,
                              const T* __restrict inv_sumexp, int64_t n, T* __restrict factor, T* __restrict exps,
                              int64_t stride) {
    for (int64_t i = 0; i < n; ++i) factor[i] = -grad_log_p[i] * inv_sumexp[i];
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0) exps[label[i] * stride + i] = -q[i] / inv_sumexp[i];
  }

  // Ignored pixels may hold anything, also NaN: 0 in all classes.
  template <class T>
  static void clear_ignored(T* __restrict logits, int64_t classes, int64_t stride, const int32_t* __restrict label, int64_t n) {
    for (int64_t c = 0; c < classes; ++c) keep_valid(logits + c * stride, label, n);
  }

  // The factor of each pixel's loss; 0 for ignored pixels, which removes them from loss and gradient.
  template <class T>
  static void gather_alpha(T* __restrict out, const T* __restrict alpha, int64_t alpha_step, const int32_t* __restrict label,
                           int64_t n) {
    const T of_all = alpha[0];
    if (alpha_step == 0)  // a gather of one number is still a gather
      for (int64_t i = 0; i < n; ++i) out[i] = label[i] >= 0 ? of_all : T(0);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = label[i] >= 0 ? alpha[label[i] * alpha_step] : T(0);
  }

  // ---- softmax with a soft target: the sum over classes of target_c * FL_c. Label smoothing mixes the one-hot target, or
  // class probabilities, with equal shares: target_c = smoothing / C + (1 - smoothing) t_c.

  // Whether all of a row of class probabilities is finite and not negative.
  template <class T>
  static bool all_probabilities(const T* __restrict target, int64_t n) {
    constexpr T largest = std::numeric_limits<T>::max();
    int32_t outside = 0;
    for (int64_t i = 0; i < n; ++i) outside += !((target[i] >= T(0)) & (target[i] <= largest));
    return outside == 0;
  }

  template <class T>
  static void log_sum(const T* __restrict sumexp_excl_max, int64_t n, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = log_sumexp(sumexp_excl_max[i]);
  }

  // The terms of one class; exps, logits, target and slope are its rows. `loss` adds up over the classes, in float64 because
  // the label's term is far larger than the others; and so do the slopes, those of the most probable classes (exponential 1) in
  // `top`, the others in `low`. A class that is masked out (exponential 0), and has no part of the target, adds nothing.
  template <class T, bool Square, class Target>
  static void soft_terms(const T* __restrict exps, const T* __restrict logits, Target target, int64_t n, T share, T smoothing,
                         T alpha, T gamma, SoftmaxRows<T> r, const T* __restrict log_sumexp, double* __restrict loss,
                         T* __restrict slope, T* __restrict top, T* __restrict low) {
    const T* __restrict max_logit = r.max_logit;
    const T* __restrict sumexp_excl_max = r.sumexp_excl_max;
    const T* __restrict inv_sumexp = r.inv_sumexp;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T p = exps[i] * inv_sumexp[i];
      const T q = exps[i] == T(1) ? sumexp_excl_max[i] * inv_sumexp[i] : T(1) - p;
      const T weight = alpha * (share + (T(1) - smoothing) * target(i));
      const T log_p = (logits[i] - max_logit[i]) - log_sumexp[i];
      const bool absent = (exps[i] == T(0)) & (weight == T(0));
      const auto term = softmax_focal<VecMath<T>, Square>(absent ? T(0) : log_p, q, weight, gamma);
      loss[i] += static_cast<double>(term.value);
      slope[i] = term.slope;
      top[i] += exps[i] == T(1) ? term.slope : T(0);
      low[i] += exps[i] == T(1) ? T(0) : term.slope;
    }
  }

  // The gradient of one class, slope - p (top + low). A confident pixel has p near 1 and slope = top: there slope - p top is
  // q slope, which keeps the digits that the subtraction loses. `out` may be `exps`; with `adds` it is added to.
  template <bool adds = false, class T>
  static void soft_backward(const T* exps, const T* __restrict slope, const T* __restrict top, const T* __restrict low,
                            SoftmaxRows<T> r, const int32_t* __restrict label, int64_t n, const T* __restrict grad, T* out) {
    const T* __restrict sumexp_excl_max = r.sumexp_excl_max;
    const T* __restrict inv_sumexp = r.inv_sumexp;
    for (int64_t i = 0; i < n; ++i) {
      const T p = exps[i] * inv_sumexp[i];
      const bool alone = (exps[i] == T(1)) & (slope[i] == top[i]);
      const T kept = alone ? slope[i] * sumexp_excl_max[i] * inv_sumexp[i] : slope[i] - p * top[i];
      const T gradient = label[i] >= 0 ? grad[i] * (kept - p * low[i]) : T(0);
      out[i] = adds ? out[i] + gradient : gradient;
    }
  }

  // ---- shared

  template <class T>
  static void keep_valid(T* __restrict values, const int32_t* __restrict label, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = label[i] >= 0 ? values[i] : T(0);
  }

  static int64_t count_valid(const int32_t* __restrict label, int64_t n) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += label[i] >= 0;
    return count;
  }

  // In float64 and a fixed order: eight partial sums.
  template <class T>
  static double sum(const T* __restrict values, int64_t n) {
    double lanes[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      for (int64_t l = 0; l < 8; ++l) lanes[l] += static_cast<double>(values[i + l]);
    for (; i < n; ++i) lanes[i % 8] += static_cast<double>(values[i]);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }

 private:
  template <class T>
  static VEERLOSS_HD T not_p(T label_logit, T sumexp_excl_max, T inv_sumexp) {
    return label_logit == T(0) ? sumexp_excl_max * inv_sumexp : T(1) - VecMath<T>::exp_neg(label_logit) * inv_sumexp;
  }

  template <class T>
  static VEERLOSS_HD T log_sumexp(T sumexp_excl_max) {
    const bool small = sumexp_excl_max <= T(1);
    return small ? VecMath<T>::log1p_unit(small ? sumexp_excl_max : T(0)) : VecMath<T>::log(T(1) + sumexp_excl_max);
  }
};
