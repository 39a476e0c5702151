// Method "exact" of the Lovász losses over one tile of pixels, one class at a time: error keys (math/jaccard.h). Included once
// per instruction set by dispatch_isa.h: no include guard. Loops over pixels vectorise.

struct ExactTiles {
  // Keys of class c from its exponentials.
  template <class T>
  static void softmax_keys(const T* __restrict exps, int64_t n, const int32_t* __restrict label, int32_t c,
                           const T* __restrict sumexp_excl_max, const T* __restrict inv_sumexp,
                           typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const bool fg = label[i] == c;
      const SoftmaxError<T> e = softmax_error(exps[i], sumexp_excl_max[i], inv_sumexp[i], fg);
      keys[i] = mark<T>(key_of_probability(e.error, e.complement), fg, label[i] >= 0);
    }
    count_keys<T>(keys, n, counts);
  }

  // Keys of class c from its probabilities.
  template <class T>
  static void probability_keys(const T* __restrict p, int64_t n, const int32_t* __restrict label, int32_t c,
                               typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const bool fg = label[i] == c;
      keys[i] = mark<T>(key_of_error(probability_error(p[i], fg)), fg, label[i] >= 0);  // the key drops the sign: |y - p|
    }
    count_keys<T>(keys, n, counts);
  }

  // Keys of a binary segment from its logits. A pixel beyond the margin (error 0) is marked ignored: it contributes nothing
  // and, ranking last, changes no other weight. It still counts as valid, as foreground, and as the smallest foreground error.
  template <class T>
  static void hinge_keys(const T* __restrict logits, int64_t n, const int32_t* __restrict label,
                         typename ErrorKey<T>::Word* __restrict keys, SegmentCounts<T>* counts) {
    for (int64_t i = 0; i < n; ++i) {
      const T error = hinge_error(logits[i], label[i] == 1);
      const bool inside = !(error == T(0));  // true for NaN
      keys[i] = mark<T>(key_of_error(error), label[i] == 1, (label[i] >= 0) & inside);
    }
    SegmentCounts<T> within;
    count_keys<T>(keys, n, &within);
    int32_t valid = 0, foreground = 0;
    for (int64_t i = 0; i < n; ++i) {
      valid += label[i] >= 0;
      foreground += label[i] == 1;
    }
    if (foreground > within.foreground) within.min_fg_key = 0;
    within.valid = valid;
    within.foreground = foreground;
    counts->add(within);
  }

 private:
  template <class T>
  static VEERLOSS_HD typename ErrorKey<T>::Word mark(typename ErrorKey<T>::Word key, bool foreground, bool valid) {
    using Key = ErrorKey<T>;
    // Every NaN becomes the key of infinity: the bits of one NaN are those of `ignored`.
    const auto ranked = key < Key::infinity ? key : Key::infinity;
    return valid ? (ranked | (foreground ? Key::foreground : typename Key::Word(0))) : Key::ignored;
  }

  template <class T>
  static void count_keys(const typename ErrorKey<T>::Word* __restrict keys, int64_t n, SegmentCounts<T>* counts) {
    using Key = ErrorKey<T>;
    using Word = typename Key::Word;
    // In arithmetic that GCC 12 vectorises; it does not vectorise `fg ? min : same`.
    Word valid = 0, foreground = 0, min_fg_key = ~Word(0), max_key_plus_1 = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Word background_last = keys[i] ^ Key::foreground;    // foreground keys lose their mark, the others rank above them
      const Word key_plus_1 = (keys[i] + 1) & ~Key::foreground;  // 0 for ignored
      foreground += keys[i] / Key::foreground;
      valid += key_plus_1 != 0;
      min_fg_key = background_last < min_fg_key ? background_last : min_fg_key;
      max_key_plus_1 = key_plus_1 > max_key_plus_1 ? key_plus_1 : max_key_plus_1;
    }
    SegmentCounts<T> tile;
    tile.valid = static_cast<int64_t>(valid);
    tile.foreground = static_cast<int64_t>(foreground);
    if (foreground > 0) tile.min_fg_key = min_fg_key;
    if (valid > 0) tile.max_key = max_key_plus_1 - 1;
    counts->add(tile);
  }
};
