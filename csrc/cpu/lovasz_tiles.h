// The Lovász losses over one tile of pixels: logits to error keys, and weights to gradients. Included once per instruction set
// by for_each_target.h: no include guard. Loops over pixels vectorise; classes are the outer loop. x is [classes][stride],
// stride >= n.

struct LovaszTiles {
  // Keys of class c from its exponentials: the error is 1 - p on foreground, p on background. Each of p and 1 - p is known to
  // all its digits: 1 - p of a most probable class (exponential 1) from the sum of the others, and else p <= 1/2.
  template <class T>
  static void softmax_keys(const T* __restrict x, int64_t n, const int32_t* __restrict label, int32_t c,
                           const T* __restrict rest, const T* __restrict inverse_sum,
                           typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const T p = x[i] * inverse_sum[i];
      const T not_p = x[i] == T(1) ? rest[i] * inverse_sum[i] : T(1) - p;
      const bool fg = label[i] == c;
      keys[i] = mark<T>(key_of_probability(fg ? not_p : p, fg ? p : not_p), fg, label[i] >= 0);
    }
    count_keys<T>(keys, n, counts);
  }

  // Keys of class c from its probabilities.
  template <class T>
  static void probability_keys(const T* __restrict p, int64_t n, const int32_t* __restrict label, int32_t c,
                               typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const T difference = label[i] == c ? T(1) - p[i] : p[i];
      keys[i] = mark<T>(key_of_error(difference), label[i] == c, label[i] >= 0);  // drops the sign: |y - p|
    }
    count_keys<T>(keys, n, counts);
  }

  // Keys of a binary segment from its logits. A pixel beyond the margin (error 0) is ignored: it contributes nothing and,
  // ranking last, changes no other weight. It counts, though: as foreground, and as the smallest foreground error.
  template <class T>
  static void hinge_keys(const T* __restrict x, int64_t n, const int32_t* __restrict label,
                         typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const T margin = T(1) - (label[i] == 1 ? x[i] : -x[i]);
      const bool in = !(margin <= T(0));                     // true for NaN
      const T error = (in ? margin : T(0)) + (x[i] - x[i]);  // an infinite logit: NaN
      keys[i] = mark<T>(key_of_error(error), label[i] == 1, (label[i] >= 0) & (in | (error != error)));
    }
    SegmentCounts<T> within;
    count_keys<T>(keys, n, &within);
    int32_t valid = 0, foreground = 0;
    for (int64_t i = 0; i < n; ++i) {
      valid += label[i] >= 0;
      foreground += label[i] == 1;
    }
    if (foreground > within.foreground) within.smallest_fg = 0;
    within.valid = valid;
    within.foreground = foreground;
    counts->add(within);
  }

  // The gradient of the logits from dL/dp: p_j (g_j - sum_c p_c g_c), in two steps of one class at a time. x holds exponentials,
  // g dL/dp. The g of a most probable class is the pivot: taken relative to it, the sum has no large term that cancels; for
  // confident pixels float32 would otherwise keep no digit of it. Where all g are 0 so is the gradient: an ignored pixel may
  // hold NaN.
  template <class T>
  static void begin_gradient(int64_t n, T* __restrict pivot, T* __restrict others, int32_t* __restrict state) {
    for (int64_t i = 0; i < n; ++i) {
      pivot[i] = 0;
      others[i] = 0;
      state[i] = 0;
    }
  }

  template <class T>
  static void accumulate_gradient(const T* __restrict x, const T* __restrict g, int64_t n, T* __restrict pivot,
                                  T* __restrict others, int32_t* __restrict state) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t before = state[i];
      const bool is_pivot = (x[i] == T(1)) & !(before & has_pivot);
      pivot[i] = is_pivot ? g[i] : pivot[i];
      others[i] += is_pivot ? T(0) : x[i] * g[i];
      state[i] = before | (is_pivot ? has_pivot : 0) | (g[i] != T(0) ? has_gradient : 0);
    }
  }

  // From the sums over all classes to sum_c p_c (g_c - pivot), in `others`.
  template <class T>
  static void end_gradient(int64_t n, const T* __restrict rest, const T* __restrict inverse_sum, const T* __restrict pivot,
                           T* __restrict others) {
    for (int64_t i = 0; i < n; ++i) others[i] = (others[i] - pivot[i] * rest[i]) * inverse_sum[i];
  }

  template <class T>
  static void softmax_gradient(T* __restrict x, const T* __restrict g, int64_t n, const T* __restrict inverse_sum,
                               const T* __restrict pivot, const T* __restrict mean, const int32_t* __restrict state) {
    for (int64_t i = 0; i < n; ++i) {
      const T dz = x[i] * inverse_sum[i] * ((g[i] - pivot[i]) - mean[i]);
      x[i] = state[i] & has_gradient ? dz : T(0);
    }
  }

  // The weights are signed as for probabilities inside (0, 1). The error |y - p| of one outside may slope the other way, and
  // one that is right exactly has none.
  template <class T>
  static void sign_outside(const T* __restrict p, T* __restrict weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T magnitude = weight[i] < T(0) ? -weight[i] : weight[i];
      const T outside = p[i] < T(0) ? -magnitude : (p[i] > T(1) ? magnitude : weight[i]);
      const bool right = ((p[i] == T(0)) & (weight[i] > T(0))) | ((p[i] == T(1)) & (weight[i] < T(0)));
      weight[i] = right ? T(0) : outside;
    }
  }

  template <class T>
  static void scale(T* __restrict values, int64_t n, T factor) {
    for (int64_t i = 0; i < n; ++i) values[i] *= factor;
  }

 private:
  static constexpr int32_t has_pivot = 1, has_gradient = 2;  // bits of a pixel's state

  template <class T>
  static VEERLOSS_HD typename ErrorKey<T>::Word mark(typename ErrorKey<T>::Word key, bool foreground, bool valid) {
    using Key = ErrorKey<T>;
    // Every NaN becomes the key of infinity: the bits of one are those of `ignored`.
    const auto ranked = key < Key::infinity ? key : Key::infinity;
    return valid ? (ranked | (foreground ? Key::foreground : typename Key::Word(0))) : Key::ignored;
  }

  template <class T>
  static void count_keys(const typename ErrorKey<T>::Word* __restrict keys, int64_t n, SegmentCounts<T>* counts) {
    using Key = ErrorKey<T>;
    using Word = typename Key::Word;
    // In arithmetic that GCC 12 vectorises; it does not take `fg ? min : same`.
    Word valid = 0, foreground = 0, smallest = ~Word(0), largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Word background_last = keys[i] ^ Key::foreground;      // a foreground key is its error, the others are above
      const Word ignored_is_0 = (keys[i] + 1) & ~Key::foreground;  // the error's key + 1
      foreground += keys[i] / Key::foreground;
      valid += ignored_is_0 != 0;
      smallest = background_last < smallest ? background_last : smallest;
      largest = ignored_is_0 > largest ? ignored_is_0 : largest;
    }
    SegmentCounts<T> here;
    here.valid = static_cast<int64_t>(valid);
    here.foreground = static_cast<int64_t>(foreground);
    if (foreground > 0) here.smallest_fg = smallest;
    if (valid > 0) here.largest = largest - 1;
    counts->add(here);
  }
};
