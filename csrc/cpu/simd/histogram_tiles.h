// Method "histogram" of the Lovász losses over one tile of pixels, one class at a time: errors to bins, and bins to weights.
// Included once per instruction set by dispatch_isa.h: no include guard. Loops over pixels vectorise.

struct HistogramTiles {
  // Errors of class c from its exponentials.
  template <class T>
  static void softmax_errors(const T* __restrict exps, int64_t n, const int32_t* __restrict label, int32_t c,
                             const T* __restrict sumexp_excl_max, const T* __restrict inv_sumexp, float* __restrict error) {
    for (int64_t i = 0; i < n; ++i)
      error[i] = static_cast<float>(softmax_error(exps[i], sumexp_excl_max[i], inv_sumexp[i], label[i] == c).error);
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

  // The bits of the largest error, -1 if all pixels are ignored.
  static int32_t max_error_bits(const float* __restrict error, int64_t n, const int32_t* __restrict label) {
    int32_t max_bits = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t bits = label[i] >= 0 ? bit_cast<int32_t>(error[i]) & 0x7fffffff : -1;
      max_bits = max_bits < bits ? bits : max_bits;
    }
    return max_bits;
  }

  // The slot of an error: its bin on background, `bins` more on foreground, `ignored` for ignored pixels.
  template <bool bounded, class Index>
  static void find_slots(const float* __restrict error, int64_t n, const int32_t* __restrict label, int32_t c,
                         const uint32_t* __restrict table, int32_t bins, int32_t ignored, Index* __restrict slots) {
    int64_t i = 0;
#if defined(VEERLOSS_AVX512)
    // Compilers turn the look-up below into 16 extractions and insertions: 2.3 times slower.
    using Cells = ErrorCells;
    const __m512i mask = _mm512_set1_epi32((1 << Cells::position_bits) - 1);
    for (; i + 16 <= n; i += 16) {
      const __m512 e = _mm512_loadu_ps(error + i);
      const __m512i y = _mm512_loadu_si512(label + i);
      const __mmask16 mirrored = bounded ? _mm512_cmp_ps_mask(e, _mm512_set1_ps(0.5f), _CMP_GT_OQ) : __mmask16(0);
      const __m512 from_end = _mm512_mask_sub_ps(e, mirrored, _mm512_set1_ps(1.0f), e);
      const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(from_end, _mm512_set1_ps(Cells::offset))),
                                            _mm512_set1_epi32(Cells::origin));
      const __m512i last = _mm512_set1_epi32((bounded ? Cells::bounded : Cells::unbounded) - 1);
      __m512i cell = _mm512_srli_epi32(bits, Cells::cell_bits), position = bits;
      if (bounded) {
        cell = _mm512_mask_sub_epi32(cell, mirrored, last, cell);
        position = _mm512_mask_xor_epi32(position, mirrored, position, _mm512_set1_epi32(-1));
      } else {
        const __m512i past = _mm512_sub_epi32(bits, _mm512_set1_epi32(Cells::narrow_end));
        const __mmask16 wide = _mm512_cmpge_epu32_mask(bits, _mm512_set1_epi32(Cells::narrow_end));
        position = _mm512_mask_srli_epi32(position, wide, past, Cells::wide_shift);
        cell = _mm512_mask_add_epi32(cell, wide, _mm512_srli_epi32(past, Cells::cell_bits + Cells::wide_shift),
                                     _mm512_set1_epi32(Cells::narrow_cells));
      }
      cell = _mm512_min_epu32(cell, last);
      const __m512i entry = _mm512_i32gather_epi32(cell, table, 4);
      // Both factors are below 2^15.
      const __m512i product =
          _mm512_madd_epi16(_mm512_and_si512(_mm512_srli_epi32(position, Cells::position_shift), mask), entry_bins(entry));
      const __mmask16 not_0 = _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      __m512i slot = _mm512_maskz_add_epi32(not_0, entry_first_bin(entry), _mm512_srli_epi32(product, Cells::position_bits));
      slot = _mm512_mask_add_epi32(slot, _mm512_cmpeq_epi32_mask(y, _mm512_set1_epi32(c)), slot, _mm512_set1_epi32(bins));
      slot = _mm512_mask_mov_epi32(slot, _mm512_movepi32_mask(y), _mm512_set1_epi32(ignored));
      if constexpr (sizeof(Index) == 2)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(slots + i), _mm512_cvtepi32_epi16(slot));
      else
        _mm512_storeu_si512(slots + i, slot);
    }
#endif
    for (; i < n; ++i) {
      const int32_t slot = bin_of_error<bounded>(error[i], table) + (label[i] == c ? bins : 0);
      slots[i] = static_cast<Index>(label[i] >= 0 ? slot : ignored);
    }
  }

  static void count(const uint16_t* __restrict slots, int64_t n, uint16_t* __restrict counts) {
    for (int64_t i = 0; i < n; ++i) ++counts[slots[i]];
  }

  // sum += counts, which become 0.
  static void add_counts(uint16_t* __restrict counts, int64_t n, int32_t* __restrict sum) {
    for (int64_t i = 0; i < n; ++i) sum[i] += counts[i];
    for (int64_t i = 0; i < n; ++i) counts[i] = 0;
  }

  // dL/dp from the weights of the slots.
  template <class T>
  static void look_up(const int32_t* __restrict slots, int64_t n, const T* __restrict weights, T factor, T* __restrict g) {
    int64_t i = 0;
#if defined(VEERLOSS_AVX512)
    if constexpr (sizeof(T) == 4)
      for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(g + i,
                         _mm512_mul_ps(_mm512_i32gather_ps(_mm512_loadu_si512(slots + i), weights, 4), _mm512_set1_ps(factor)));
#endif
    for (; i < n; ++i) g[i] = weights[slots[i]] * factor;
  }

  // dL/dp of a class without foreground: `weight` for the errors that equal max_error.
  template <class T>
  static void weigh_max_error(const float* __restrict error, int64_t n, const int32_t* __restrict label, float max_error,
                              T weight, T* __restrict g) {
    for (int64_t i = 0; i < n; ++i) g[i] = (label[i] >= 0) & (error[i] == max_error) & (error[i] > 0.0f) ? weight : T(0);
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

  static int64_t count_equal(const float* __restrict error, int64_t n, const int32_t* __restrict label, float value) {
    int32_t equal = 0;
    for (int64_t i = 0; i < n; ++i) equal += (label[i] >= 0) & (error[i] == value) ? 1 : 0;
    return equal;
  }

 private:
#if defined(VEERLOSS_AVX512)
  static VEERLOSS_HD __m512i entry_first_bin(__m512i entry) { return _mm512_and_si512(entry, _mm512_set1_epi32(entry_mask)); }
  static VEERLOSS_HD __m512i entry_bins(__m512i entry) { return _mm512_srli_epi32(entry, entry_shift); }
#endif
};
