// The focal losses over one tile of pixels. Included once per instruction set by for_each_target.h: no include guard.
//
// Every loop runs over pixels with no dependence between them, so that the compiler vectorises it; classes are the outer loop.
// x holds a tile of logits as [classes][stride], where stride >= n is the tile's row length.

struct FocalTiles {
  // ---- sigmoid: one row, that is one channel of the tile. `Plain`: every element is valid and has weight 1, and all have the
  // same incoming gradient; weight and grad are not read. Else ignored elements have weight 0 and a finite logit.

  template <class T, bool Square, bool Plain>
  static double sigmoid_forward(const T* __restrict x, const T* __restrict t, const T* __restrict weight, int64_t n,
                                SigmoidParams<T> p, T* __restrict loss) {
    for (int64_t i = 0; i < n; ++i) {
      const T value = sigmoid_focal<VecMath<T>, Square>(x[i], t[i], p.alpha_positive, p.alpha_negative, p.gamma).value;
      loss[i] = Plain ? value : weight[i] * value;
    }
    return sum(loss, n);
  }

  template <class T, bool Square, bool Plain>
  static void sigmoid_backward(const T* __restrict x, const T* __restrict t, const T* __restrict weight,
                               const T* __restrict grad, T scale, int64_t n, SigmoidParams<T> p, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      const T slope = sigmoid_focal<VecMath<T>, Square>(x[i], t[i], p.alpha_positive, p.alpha_negative, p.gamma).slope;
      out[i] = (Plain ? scale : weight[i] * grad[i]) * slope;
    }
  }

  // The row of class c of the one-hot target that is never stored.
  template <class T>
  static void one_hot(T* __restrict t, const int32_t* __restrict label, int64_t n, int32_t c) {
    for (int64_t i = 0; i < n; ++i) t[i] = label[i] == c ? T(1) : T(0);
  }

  // Takes the elements of ignored pixels out of a row.
  template <class T>
  static void mask_labels(T* __restrict weight, T* __restrict x, const int32_t* __restrict label, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = label[i] >= 0 ? weight[i] : T(0);
      x[i] = label[i] >= 0 ? x[i] : T(0);
    }
  }

  // Whether all of a dense target lies in [0, 1] or is NaN.
  template <class T>
  static bool in_unit_range(const T* __restrict t, int64_t n) {
    int32_t outside = 0;
    for (int64_t i = 0; i < n; ++i) outside += (t[i] < T(0)) | (t[i] > T(1));
    return outside == 0;
  }

  // Takes the ignored elements of a dense target out; they become 0. stored is the target before it was rounded to T. Returns
  // how many are valid.
  template <class T>
  static int64_t mask_dense(T* __restrict t, T* __restrict weight, T* __restrict x, int64_t n, const double* __restrict stored,
                            double ignore) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool valid = stored[i] != ignore;
      count += valid;
      weight[i] = valid ? weight[i] : T(0);
      x[i] = valid ? x[i] : T(0);
      t[i] = valid ? t[i] : T(0);
    }
    return count;
  }

  // ---- softmax

  // difference = logit of the class - maximum, before SoftmaxTiles::exponentials overwrites the logits; 0 for ignored pixels.
  template <class T>
  static void difference(const T* __restrict x, int64_t stride, int64_t n, const int32_t* __restrict label,
                         const T* __restrict maximum, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = label[i] >= 0 ? x[label[i] * stride + i] - maximum[i] : T(0);
  }

  // log p and q = 1 - p of the class, after SoftmaxTiles::exponentials; 0 for ignored pixels. On entry r.log_p is the
  // difference. A most probable class (difference 0) takes both from the sum of the others: subtracting from 1 would lose their
  // digits.
  template <class T>
  static void log_probability(int64_t n, const int32_t* __restrict label, SoftmaxRows<T> r) {
    const T* __restrict rest = r.rest;
    const T* __restrict inverse_sum = r.inverse_sum;
    T* __restrict log_p = r.log_p;
    T* __restrict q = r.q;
    for (int64_t i = 0; i < n; ++i) {
      const T d = log_p[i];
      const bool valid = label[i] >= 0;
      const T not_p = d == T(0) ? rest[i] * inverse_sum[i] : T(1) - VecMath<T>::exp_neg(d) * inverse_sum[i];
      log_p[i] = valid ? d - log_of_sum(rest[i]) : T(0);
      q[i] = valid ? not_p : T(0);
    }
  }

  template <class T, bool Square>
  static double softmax_forward(const T* __restrict log_p, const T* __restrict q, const T* __restrict alpha, int64_t n, T gamma,
                                T* __restrict loss) {
    for (int64_t i = 0; i < n; ++i) loss[i] = softmax_focal<VecMath<T>, Square>(log_p[i], q[i], alpha[i], gamma).value;
    return sum(loss, n);
  }

  // grad: from the gradient of the loss of each pixel to that of its log p.
  template <class T, bool Square>
  static void log_probability_backward(const T* __restrict log_p, const T* __restrict q, const T* __restrict alpha, int64_t n,
                                       T gamma, T* __restrict grad) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= softmax_focal<VecMath<T>, Square>(log_p[i], q[i], alpha[i], gamma).slope;
  }

  // -grad * p for a row of exponentials: the gradient of the logits of one class, but for the pixels whose class it is.
  template <class T>
  static void other_gradient(const T* row, const T* __restrict inverse_sum, const T* __restrict grad, int64_t n, T* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = -grad[i] * (row[i] * inverse_sum[i]);
  }

  // grad * q at each pixel's own class; row 0 of the gradient is at out, the others class_stride apart.
  template <class T>
  static void own_gradient(const int32_t* __restrict label, const T* __restrict grad, const T* __restrict q, int64_t n,
                           T* __restrict out, int64_t class_stride) {
    for (int64_t i = 0; i < n; ++i)
      if (label[i] >= 0) out[label[i] * class_stride + i] = grad[i] * q[i];
  }

  // Ignored pixels may hold anything, NaN too: 0 in all classes.
  template <class T>
  static void clear_ignored(T* __restrict x, int64_t classes, int64_t stride, const int32_t* __restrict label, int64_t n) {
    for (int64_t c = 0; c < classes; ++c) keep_valid(x + c * stride, label, n);
  }

  // The factor of each pixel's loss; 0 for ignored pixels, which takes them out of loss and gradient.
  template <class T>
  static void gather_alpha(T* __restrict out, const T* __restrict alpha, int64_t alpha_step, const int32_t* __restrict label,
                           int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = label[i] >= 0 ? alpha[label[i] * alpha_step] : T(0);
  }

  // ---- softmax with label smoothing: sum over classes of target_c * FL_c, target_c = smoothing / C + (1 - smoothing) [c = y]

  // ln of the sum of the exponentials, from SoftmaxTiles::exponentials.
  template <class T>
  static void log_sum(const T* __restrict rest, int64_t n, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = log_of_sum(rest[i]);
  }

  // The terms of class c: x, logits and slope are its rows. loss adds up over the classes, and so do the slopes: those of the
  // most probable classes (exponential 1) in `top`, the others in `low`.
  template <class T, bool Square>
  static void smooth_terms(const T* __restrict x, const T* __restrict logits, int64_t n, const int32_t* __restrict label,
                           int32_t c, T share, T smoothing, T alpha, T gamma, SoftmaxRows<T> r, T* __restrict loss,
                           T* __restrict slope, T* __restrict top, T* __restrict low) {
    const T* __restrict maximum = r.maximum;
    const T* __restrict rest = r.rest;
    const T* __restrict log_sum = r.log_p;
    const T* __restrict inverse_sum = r.inverse_sum;
    for (int64_t i = 0; i < n; ++i) {
      const T p = x[i] * inverse_sum[i];
      const T q = x[i] == T(1) ? rest[i] * inverse_sum[i] : T(1) - p;
      const T weight = alpha * (label[i] == c ? share + (T(1) - smoothing) : share);
      const auto term = softmax_focal<VecMath<T>, Square>((logits[i] - maximum[i]) - log_sum[i], q, weight, gamma);
      loss[i] += term.value;
      slope[i] = term.slope;
      top[i] += x[i] == T(1) ? term.slope : T(0);
      low[i] += x[i] == T(1) ? T(0) : term.slope;
    }
  }

  // From the exponentials of one class to its gradient, slope - p (top + low). A confident pixel has p near 1 and slope =
  // top: then slope - p top is q slope, which keeps the digits that the subtraction loses.
  template <class T>
  static void smooth_backward(const T* x, const T* __restrict slope, const T* __restrict top, const T* __restrict low,
                              SoftmaxRows<T> r, const int32_t* __restrict label, int64_t n, const T* __restrict grad, T* out) {
    const T* __restrict rest = r.rest;
    const T* __restrict inverse_sum = r.inverse_sum;
    for (int64_t i = 0; i < n; ++i) {
      const T p = x[i] * inverse_sum[i];
      const bool alone = (x[i] == T(1)) & (slope[i] == top[i]);
      const T kept = alone ? slope[i] * rest[i] * inverse_sum[i] : slope[i] - p * top[i];
      out[i] = label[i] >= 0 ? grad[i] * (kept - p * low[i]) : T(0);
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

  // In float64 and a fixed order, eight sums side by side.
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
  static VEERLOSS_HD T log_of_sum(T rest) {
    const bool small = rest <= T(1);
    return small ? VecMath<T>::log1p_unit(small ? rest : T(0)) : VecMath<T>::log(T(1) + rest);
  }
};
