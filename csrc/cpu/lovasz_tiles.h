// The Lovász losses over one tile of pixels: logits to error keys, and weights to gradients. Included once per instruction set by
// for_each_target.h: no include guard. Loops over pixels vectorise; classes are the outer loop. x is [classes][stride], stride >= n.

struct LovaszTiles {
  // From x = logits to x = exp(logits - max); inverse_sum = 1 / their sum. maximum is scratch. All rows are [n].
  template <class T>
  static void exponentials(T* __restrict x, int64_t classes, int64_t stride, int64_t n, T* __restrict maximum, T* __restrict inverse_sum) {
    for (int64_t i = 0; i < n; ++i) maximum[i] = x[i];
    for (int64_t c = 1; c < classes; ++c) {
      const T* __restrict row = x + c * stride;
      for (int64_t i = 0; i < n; ++i) maximum[i] = row[i] > maximum[i] ? row[i] : maximum[i];
    }
    for (int64_t i = 0; i < n; ++i) inverse_sum[i] = 0;
    for (int64_t c = 0; c < classes; ++c) {
      T* __restrict row = x + c * stride;
      for (int64_t i = 0; i < n; ++i) {
        const T e = VecMath<T>::exp_neg(row[i] - maximum[i]);
        inverse_sum[i] += e;
        row[i] = e;
      }
    }
    for (int64_t i = 0; i < n; ++i) inverse_sum[i] = T(1) / inverse_sum[i];
  }

  // others = the sum of the probabilities of all classes but the target's: its error, without the cancellation of 1 - p.
  template <class T>
  static void other_probabilities(const T* __restrict x, int64_t classes, int64_t stride, int64_t n, const int32_t* __restrict label,
                                  const T* __restrict inverse_sum, T* __restrict others) {
    for (int64_t i = 0; i < n; ++i) others[i] = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const T* __restrict row = x + c * stride;
      for (int64_t i = 0; i < n; ++i) others[i] += label[i] == static_cast<int32_t>(c) ? T(0) : row[i];
    }
    for (int64_t i = 0; i < n; ++i) others[i] *= inverse_sum[i];
  }

  // Keys of class c from its exponentials.
  template <class T>
  static void softmax_keys(const T* __restrict x, int64_t n, const int32_t* __restrict label, int32_t c, const T* __restrict inverse_sum,
                           const T* __restrict others, typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i)
      keys[i] = make_key<T>(label[i] == c ? others[i] : x[i] * inverse_sum[i], label[i] == c, label[i] >= 0);
    count_keys<T>(keys, n, counts);
  }

  // Keys of class c from its probabilities.
  template <class T>
  static void probability_keys(const T* __restrict p, int64_t n, const int32_t* __restrict label, int32_t c,
                               typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const T difference = label[i] == c ? T(1) - p[i] : p[i];
      keys[i] = make_key<T>(difference < T(0) ? -difference : difference, label[i] == c, label[i] >= 0);
    }
    count_keys<T>(keys, n, counts);
  }

  // Keys of a binary segment from its logits. A pixel beyond the margin (error 0) is ignored: it contributes nothing and, ranking
  // last, changes no other weight. It counts, though: as foreground, and as the smallest foreground error.
  template <class T>
  static void hinge_keys(const T* __restrict x, int64_t n, const int32_t* __restrict label, typename ErrorKey<T>::Word* __restrict keys,
                         SegmentCounts<T>* counts) {
    int32_t beyond = 0, beyond_fg = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T margin = T(1) - (label[i] == 1 ? x[i] : -x[i]);
      const bool in = !(margin <= T(0));  // true for NaN
      const bool valid = label[i] >= 0;
      const T error = (in ? margin : T(0)) + (x[i] - x[i]);  // an infinite logit: NaN
      keys[i] = make_key<T>(error, label[i] == 1, valid & (in | (error != error)));
      beyond += valid & !in & (error == error);
      beyond_fg += (label[i] == 1) & !in & (error == error);
    }
    count_keys<T>(keys, n, counts);
    counts->valid += beyond;
    counts->foreground += beyond_fg;
    if (beyond_fg > 0) counts->smallest_fg = 0;
  }

  // The gradient of the logits from dL/dp: p_j (g_j - sum_c p_c g_c), x holding exponentials on entry, the gradient on return.
  // g is [classes][stride]. Taken relative to the g of a most probable class, the sum has no large term that cancels: for confident
  // pixels float32 would otherwise keep no digit of it. Where all g are 0 so is the gradient: an ignored pixel may hold NaN.
  template <class T>
  static void softmax_gradient(T* __restrict x, T* __restrict g, int64_t classes, int64_t stride, int64_t n, const T* __restrict inverse_sum,
                               T* __restrict pivot, T* __restrict mean, int32_t* __restrict weighted) {
    for (int64_t i = 0; i < n; ++i) {
      pivot[i] = 0;
      mean[i] = 0;
      weighted[i] = 0;
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T* __restrict e = x + c * stride;
      const T* __restrict row = g + c * stride;
      for (int64_t i = 0; i < n; ++i) {
        pivot[i] = e[i] == T(1) ? row[i] : pivot[i];
        weighted[i] |= row[i] != T(0);
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T* __restrict e = x + c * stride;
      const T* __restrict row = g + c * stride;
      for (int64_t i = 0; i < n; ++i) mean[i] += e[i] * (row[i] - pivot[i]);
    }
    for (int64_t i = 0; i < n; ++i) mean[i] *= inverse_sum[i];
    for (int64_t c = 0; c < classes; ++c) {
      T* __restrict e = x + c * stride;
      const T* __restrict row = g + c * stride;
      for (int64_t i = 0; i < n; ++i) {
        const T dz = e[i] * inverse_sum[i] * ((row[i] - pivot[i]) - mean[i]);
        e[i] = weighted[i] ? dz : T(0);
      }
    }
  }

  // The weights are signed as for probabilities in [0, 1]; the error |y - p| of one outside may slope the other way.
  template <class T>
  static void sign_outside(const T* __restrict p, T* __restrict weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T magnitude = weight[i] < T(0) ? -weight[i] : weight[i];
      weight[i] = p[i] < T(0) ? -magnitude : (p[i] > T(1) ? magnitude : weight[i]);
    }
  }

  template <class T>
  static void scale(T* __restrict values, int64_t n, T factor) {
    for (int64_t i = 0; i < n; ++i) values[i] *= factor;
  }

 private:
  template <class T>
  static VEERLOSS_HD typename ErrorKey<T>::Word make_key(T error, bool foreground, bool valid) {
    using Key = ErrorKey<T>;
    const auto word = bit_cast<typename Key::Word>(error) & ~Key::foreground;  // NaN may carry a sign
    return valid ? (word | (foreground ? Key::foreground : typename Key::Word(0))) : Key::ignored;
  }

  template <class T>
  static void count_keys(const typename ErrorKey<T>::Word* __restrict keys, int64_t n, SegmentCounts<T>* counts) {
    using Key = ErrorKey<T>;
    using Word = typename Key::Word;
    Word smallest_fg = Key::ignored, largest = 0, valid = 0, foreground = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Word error = keys[i] & ~Key::foreground;
      const bool fg = keys[i] >= Key::foreground;
      const bool in = keys[i] != Key::ignored;
      valid += in;
      foreground += fg;
      const Word of_fg = fg ? error : Key::ignored;
      const Word of_valid = in ? error : Word(0);
      smallest_fg = of_fg < smallest_fg ? of_fg : smallest_fg;
      largest = of_valid > largest ? of_valid : largest;
    }
    counts->valid += static_cast<int64_t>(valid);
    counts->foreground += static_cast<int64_t>(foreground);
    counts->smallest_fg = smallest_fg < counts->smallest_fg ? smallest_fg : counts->smallest_fg;
    counts->largest = largest > counts->largest ? largest : counts->largest;
  }
};
