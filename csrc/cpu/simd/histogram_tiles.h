// Method "histogram" of the Lovász losses over one tile of pixels, one class at a time: coordinates of errors to bins, and bins
// to weights. Included once per instruction set by dispatch_isa.h: no include guard. Loops over pixels vectorise.

struct HistogramTiles {
  // What the classes of a pixel share: 1 - log2(sum of exponentials), and the coordinate of background in a most probable
  // class.
  template <class T>
  static void shared_coordinates(const T* __restrict sumexp_excl_max, int64_t n, T* __restrict shared, T* __restrict top) {
    for (int64_t i = 0; i < n; ++i) {
      const T log2_sum = VecMath<T>::log2(T(1) + sumexp_excl_max[i]);
      shared[i] = T(1) - log2_sum;
      top[i] = top_coordinate<VecMath<T>>(sumexp_excl_max[i], log2_sum);
    }
  }

  // The coordinates of all of few classes, [classes][stride], with the softmax that they come from: one loop, which keeps the
  // classes of a pixel in registers. Other terms of a compound loss need `whole`: also the rows from max_logit on.
  template <int classes, bool whole, class T>
  static void few_coordinates(const T* __restrict logits, int64_t logits_stride, int64_t n, const int32_t* __restrict label,
                              int64_t stride, T* __restrict exps, T* __restrict sumexp_excl_max, float* __restrict coordinates,
                              T* __restrict max_of_pixel, T* __restrict inv_sumexp, T* __restrict label_logit) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T below[classes], max_logit = logits[i], sum = 0, count = 0;
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        below[c] = logits[c * logits_stride + i];
        max_logit = below[c] > max_logit ? below[c] : max_logit;
      }
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        below[c] -= max_logit;
        exps[c * stride + i] = SoftmaxTiles::exponential(below[c], sum, count);
      }
      sum += count - T(1);
      sumexp_excl_max[i] = sum;
      if (whole) {
        T of_label = 0;
#pragma GCC unroll 8
        for (int c = 0; c < classes; ++c) of_label += keep_if(label[i] == c, below[c]);
        max_of_pixel[i] = max_logit;
        inv_sumexp[i] = T(1) / (T(1) + sum);
        label_logit[i] = of_label;
      }
      const T log2_sum = VecMath<T>::log2(T(1) + sum), shared = T(1) - log2_sum;
      const T top = top_coordinate<VecMath<T>>(sum, log2_sum);
#pragma GCC unroll 8
      for (int c = 0; c < classes; ++c) {
        coordinates[c * stride + i] = softmax_coordinate(below[c], shared, top, label[i] == c);
      }
    }
  }

  // Of class c.
  template <class T>
  static void softmax_coordinates(const T* __restrict logits, int64_t n, const int32_t* __restrict label, int32_t c,
                                  const T* __restrict max_logit, const T* __restrict shared, const T* __restrict top,
                                  float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = softmax_coordinate(logits[i] - max_logit[i], shared[i], top[i], label[i] == c);
    }
  }

  template <class T>
  static void probability_coordinates(const T* __restrict p, int64_t n, const int32_t* __restrict label, int32_t c,
                                      float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      const T difference = probability_error(p[i], label[i] == c), error = difference < T(0) ? -difference : difference;
      const T x = folded_coordinate<VecMath<T>>(at_least_tiny(error));
      out[i] = coordinate_or_0(error, x);
    }
  }

  template <class T>
  static void hinge_coordinates(const T* __restrict logits, int64_t n, const int32_t* __restrict label, float* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
      const T error = hinge_error(logits[i], label[i] == 1);
      out[i] = coordinate_or_0(error, VecMath<T>::log2(at_least_tiny(error)));
    }
  }

  template <class T>
  static void probability_errors(const T* __restrict p, int64_t n, const int32_t* __restrict label, int32_t c,
                                 float* __restrict error) {
    for (int64_t i = 0; i < n; ++i) {
      const T difference = probability_error(p[i], label[i] == c);
      error[i] = narrow_error(difference < T(0) ? -difference : difference);
    }
  }

  template <class T>
  static void hinge_errors(const T* __restrict logits, int64_t n, const int32_t* __restrict label, float* __restrict error) {
    for (int64_t i = 0; i < n; ++i) error[i] = narrow_error(hinge_error(logits[i], label[i] == 1));
  }

  // Whether a valid pixel's value is NaN.
  template <class T>
  static bool any_nan(const T* __restrict values, int64_t n, const int32_t* __restrict label) {
    int32_t nan = 0;
    for (int64_t i = 0; i < n; ++i) nan |= (label[i] >= 0) & (values[i] != values[i]) ? 1 : 0;
    return nan != 0;
  }

  // The largest coordinate of the valid pixels, none of which is NaN; -infinity where there is none.
  static float largest(const float* __restrict coordinate, int64_t n, const int32_t* __restrict label) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      const float x = label[i] >= 0 ? coordinate[i] : -std::numeric_limits<float>::infinity();
      most = most < x ? x : most;
    }
    return most;
  }

  // The slots of the pixels that are counted, one after another, and how many: its bin for background, `bins` more for
  // foreground. Background in bin 0 is not counted, ignored pixels neither.
  template <bool zero_bin>
  static int64_t find_slots(const float* __restrict coordinate, int64_t n, const int32_t* __restrict label, int32_t c,
                            const BinPair* __restrict table, int32_t bins, uint32_t* __restrict slots) {
    int64_t i = 0, count = 0;
#if defined(VEERLOSS_AVX512)
    const Table in_registers(table);
    for (; i + 16 <= n; i += 16) {
      const __m512i y = _mm512_loadu_si512(label + i), bin = in_registers.bin_of<zero_bin>(_mm512_loadu_ps(coordinate + i));
      const __mmask16 ignored = _mm512_movepi32_mask(y), fg = _mm512_cmpeq_epi32_mask(y, _mm512_set1_epi32(c));
      const __mmask16 counted = (_mm512_test_epi32_mask(bin, bin) | fg) & ~ignored;
      const __m512i slot = _mm512_mask_add_epi32(bin, fg, bin, _mm512_set1_epi32(bins));
      _mm512_storeu_si512(slots + count, _mm512_maskz_compress_epi32(counted, slot));
      count += __builtin_popcount(counted);
    }
#endif
    for (; i < n; ++i) {
      const int32_t bin = bin_of_error(bin_of(coordinate[i], table), coordinate[i], zero_bin);
      const bool foreground = label[i] == c;
      slots[count] = static_cast<uint32_t>(bin + (foreground ? bins : 0));
      count += (label[i] >= 0) & ((bin != 0) | foreground) ? 1 : 0;
    }
    return count;
  }

  static void count(const uint32_t* __restrict slots, int64_t n, uint16_t* __restrict counts) {
    for (int64_t i = 0; i < n; ++i) ++counts[slots[i]];
  }

  // sum += counts, which become 0.
  static void add_counts(uint16_t* __restrict counts, int64_t n, int32_t* __restrict sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += counts[i];
    for (int64_t i = 0; i < n; ++i) counts[i] = 0;
  }

  // dL/dp from the weights [2, bins] of background and foreground; 0 for ignored pixels.
  template <bool zero_bin, class T>
  static void look_up(const float* __restrict coordinate, int64_t n, const int32_t* __restrict label, int32_t c,
                      const BinPair* __restrict table, int32_t bins, const T* __restrict weights, T factor, T* __restrict g) {
    int64_t i = 0;
#if defined(VEERLOSS_AVX512)
    if constexpr (sizeof(T) == 4) {
      const Table in_registers(table);
      for (; i + 16 <= n; i += 16) {
        const __m512i y = _mm512_loadu_si512(label + i), bin = in_registers.bin_of<zero_bin>(_mm512_loadu_ps(coordinate + i));
        const __mmask16 valid = ~_mm512_movepi32_mask(y), fg = _mm512_cmpeq_epi32_mask(y, _mm512_set1_epi32(c));
        const __m512i slot = _mm512_mask_add_epi32(bin, fg, bin, _mm512_set1_epi32(bins));
        const __m512 weight = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), valid, slot, weights, 4);
        _mm512_storeu_ps(g + i, _mm512_mul_ps(weight, _mm512_set1_ps(factor)));
      }
    }
#endif
    for (; i < n; ++i) {
      const int32_t bin = bin_of_error(bin_of(coordinate[i], table), coordinate[i], zero_bin);
      g[i] = label[i] >= 0 ? weights[bin + (label[i] == c ? bins : 0)] * factor : T(0);
    }
  }

  // The sum of |weight| * error in integers of 1 / unit.
  template <class T>
  static int64_t fixed_sum(const T* __restrict weight, const float* __restrict error, int64_t n, double unit) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double w = static_cast<double>(weight[i]), product = (w < 0.0 ? -w : w) * static_cast<double>(error[i]);
      sum += w == 0.0 || product != product ? 0 : static_cast<int64_t>(product * unit + 0.5);  // ignored pixels may hold NaN
    }
    return sum;
  }

 private:
  // value or 0, by a mask: of a chain of conditions the compiler makes branches, and no vectors.
  template <class T>
  static VEERLOSS_HD T keep_if(bool condition, T value) {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    return bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(value) & -static_cast<Bits>(condition)));
  }

  template <class T>
  static VEERLOSS_HD float softmax_coordinate(T below_max, T shared, T top, bool foreground) {
    const T background = below_max == T(0) ? top : below_max * T(log2_e) + shared;
    return static_cast<float>(foreground ? -background : background);
  }

  // For the logarithm of normal numbers.
  template <class T>
  static VEERLOSS_HD T at_least_tiny(T error) {
    return error < T(0x1p-126) ? T(0x1p-126) : error;
  }

  template <class T>
  static VEERLOSS_HD float coordinate_or_0(T error, T coordinate) {
    return error == T(0) ? -std::numeric_limits<float>::infinity() : static_cast<float>(coordinate);
  }

#if defined(VEERLOSS_AVX512)
  // A table in registers. Looking up 16 of 128 cells takes 7 permutations and blends, 1.6 ns where a gather takes 5.7 (Zen 4).
  struct Table {
    explicit VEERLOSS_HD Table(const BinPair* table)
        : window_scale(_mm512_set1_ps(table[0].scale)), window_offset(_mm512_set1_ps(table[0].offset)) {
      static_assert(BinLayout::cells == 128, "8 registers for each");
      const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const float* pairs = &table[1 + 16 * k].scale;
        const __m512 low = _mm512_loadu_ps(pairs), high = _mm512_loadu_ps(pairs + 16);
        scale[k] = _mm512_permutex2var_ps(low, even, high);
        offset[k] = _mm512_permutex2var_ps(low, odd, high);
      }
    }

    static VEERLOSS_HD __m512 look_up(const __m512 (&of)[8], __m512i cell, __mmask16 bit_5, __mmask16 bit_6) {
      const __m512 low =
          _mm512_mask_blend_ps(bit_5, _mm512_permutex2var_ps(of[0], cell, of[1]), _mm512_permutex2var_ps(of[2], cell, of[3]));
      const __m512 high =
          _mm512_mask_blend_ps(bit_5, _mm512_permutex2var_ps(of[4], cell, of[5]), _mm512_permutex2var_ps(of[6], cell, of[7]));
      return _mm512_mask_blend_ps(bit_6, low, high);
    }

    // bin_of_error of 16.
    template <bool zero_bin>
    VEERLOSS_HD __m512i bin_of(__m512 coordinate) const {
      const __m512 magic = _mm512_set1_ps(BinLayout::magic);
      __m512 u = _mm512_fmadd_ps(coordinate, window_scale, window_offset);
      u = _mm512_min_ps(_mm512_max_ps(u, _mm512_setzero_ps()), _mm512_set1_ps(1.0f));  // NaN, the first operand, becomes 0
      const __m512i bits = _mm512_castps_si512(_mm512_fmadd_ps(u, _mm512_set1_ps(cell_scale), magic));
      const __m512i cell = _mm512_srli_epi32(bits, 3);  // in the low 7 bits
      const __mmask16 bit_5 = _mm512_test_epi32_mask(cell, _mm512_set1_epi32(32));
      const __mmask16 bit_6 = _mm512_test_epi32_mask(cell, _mm512_set1_epi32(64));
      const __m512 quarters = _mm512_fmadd_ps(u, look_up(scale, cell, bit_5, bit_6), look_up(offset, cell, bit_5, bit_6));
      __m512i bin =
          _mm512_srli_epi32(_mm512_and_si512(_mm512_castps_si512(quarters), _mm512_set1_epi32(4 * BinLayout::max_bins - 4)), 2);
      if (!zero_bin) return bin;
      bin = _mm512_max_epi32(bin, _mm512_set1_epi32(1));
      return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(coordinate, _mm512_set1_ps(-3.0e38f), _CMP_NLT_UQ), bin);
    }

    __m512 window_scale, window_offset, scale[8], offset[8];
  };
#endif
};
