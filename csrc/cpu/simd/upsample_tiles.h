// Rows of pixels between low and full resolution. Included once per instruction set by dispatch_isa.h: no include guard.

struct UpsampleTiles {
  // A row of low resolution, with `upsample_padding` elements behind it, at full width. `ascends`: `first` never grows by more
  // than one, so that a vector's worth of columns reads no more elements than that, which are loaded and permuted. (A gather
  // took three times as long.)
  template <class T>
  static void expand(const T* __restrict low, const int32_t* __restrict first, const T* __restrict second_weight, int64_t n,
                     bool ascends, T* __restrict out) {
    int64_t done = 0;
#if defined(VEERLOSS_AVX512)
    if constexpr (sizeof(T) == 4)
      for (; ascends && done + 16 <= n; done += 16) {
        const T* const from = low + first[done];
        const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(first + done), _mm512_set1_epi32(first[done]));
        const __m512 w = _mm512_loadu_ps(second_weight + done), u = _mm512_sub_ps(_mm512_set1_ps(1.0f), w);
        const __m512 a = _mm512_permutexvar_ps(at, _mm512_loadu_ps(from));
        const __m512 b = _mm512_permutexvar_ps(at, _mm512_loadu_ps(from + 1));
        _mm512_storeu_ps(out + done, _mm512_fmadd_ps(w, b, _mm512_mul_ps(u, a)));
      }
#elif defined(VEERLOSS_AVX2)
    if constexpr (sizeof(T) == 4)
      for (; ascends && done + 8 <= n; done += 8) {
        const T* const from = low + first[done];
        const __m256i at = _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + done)),
                                            _mm256_set1_epi32(first[done]));
        const __m256 w = _mm256_loadu_ps(second_weight + done), u = _mm256_sub_ps(_mm256_set1_ps(1.0f), w);
        const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), at);
        const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + 1), at);
        _mm256_storeu_ps(out + done, _mm256_fmadd_ps(w, b, _mm256_mul_ps(u, a)));
      }
#else
    (void)ascends;
#endif
    for (int64_t i = done; i < n; ++i) {
      const T w = second_weight[i];
      out[i] = (T(1) - w) * low[first[i]] + w * low[first[i] + 1];
    }
  }
  template <class T>
  static void copy(const T* __restrict low, const int32_t* __restrict first, int64_t n, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) out[i] = low[first[i]];
  }

  // A row of full resolution from those that it lies between.
  template <class T>
  static void blend(const T* const* rows, const T* weight, int64_t taps, int64_t n, T* __restrict out) {
    if (taps == 1) {
      std::copy_n(rows[0], n, out);
    } else if (taps == 2) {
      const T *a = rows[0], *b = rows[1];
      const T u = weight[0], v = weight[1];
      for (int64_t i = 0; i < n; ++i) out[i] = u * a[i] + v * b[i];
    } else {
      const T *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
      const T u = weight[0], v = weight[1], s = weight[2], t = weight[3];
      for (int64_t i = 0; i < n; ++i) out[i] = (u * a[i] + v * b[i]) + (s * c[i] + t * d[i]);
    }
  }

  // The same, and the largest of what the classes so far have; `first`: of none.
  template <class T>
  static void blend_max(const T* const* rows, const T* weight, int64_t taps, int64_t n, bool first, T* __restrict out,
                        T* __restrict largest) {
    if (taps == 2 && !first) {
      const T *a = rows[0], *b = rows[1];
      const T u = weight[0], v = weight[1];
      for (int64_t i = 0; i < n; ++i) {
        const T value = u * a[i] + v * b[i];
        out[i] = value;
        largest[i] = value > largest[i] ? value : largest[i];
      }
      return;
    }
    blend(rows, weight, taps, n, out);
    for (int64_t i = 0; i < n; ++i) largest[i] = first || out[i] > largest[i] ? out[i] : largest[i];
  }

  // Their sums, with a gradient row of full resolution added, times a factor of each pixel.
  template <class T>
  static void add_blend(const T* __restrict grad, const T* __restrict factor, const T* weight, int64_t taps, int64_t n,
                        T* const* sums) {
    if (taps == 2 && factor) {
      T* __restrict a = sums[0], * __restrict b = sums[1];
      const T u = weight[0], v = weight[1];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const T value = grad[i] * factor[i];
        a[i] += u * value;
        b[i] += v * value;
      }
      return;
    }
    if (taps == 2) {
      T* __restrict a = sums[0], * __restrict b = sums[1];
      const T u = weight[0], v = weight[1];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        a[i] += u * grad[i];
        b[i] += v * grad[i];
      }
      return;
    }
    for (int64_t k = 0; k < taps; ++k) {
      T* __restrict sum = sums[k];
      const T w = weight[k];
      if (factor)
        for (int64_t i = 0; i < n; ++i) sum[i] += w * (grad[i] * factor[i]);
      else
        for (int64_t i = 0; i < n; ++i) sum[i] += w * grad[i];
    }
  }

  // A row of low resolution, and the element behind it, with a row of full width added: of each pixel of low resolution x,
  // `longest` taps [longest][n], what pixel at[x] adds to it and to the next. sum: [2][n + 1].
  template <class T>
  static void contract(const T* __restrict row, const int32_t* __restrict at, const T* __restrict to_first,
                       const T* __restrict to_second, int64_t longest, int64_t n, T* __restrict sum, T* __restrict low) {
    T* __restrict first = sum, * __restrict second = sum + n + 1;
    for (int64_t x = 0; x <= n; ++x) first[x] = second[x] = 0;
    for (int64_t k = 0; k < longest; ++k) {
      const int32_t* __restrict at_k = at + k * n;
      const T* __restrict f = to_first + k * n, * __restrict s = to_second + k * n;
      for (int64_t x = 0; x < n; ++x) {
        const T value = row[at_k[x]];
        first[x] += f[x] * value;
        second[x + 1] += s[x] * value;
      }
    }
    for (int64_t x = 0; x < n; ++x) low[x] += first[x] + second[x];
  }

  // The same of two rows at once, whose sums are [2][stride]: by chunks of 16 columns that lie among eight pixels of low
  // resolution. True if there is code for it. (Two thirds of the time of the other.)
  template <class T>
  static bool contract_pair(const T* a, const T* b, const UpsampleChunk<T>* chunks, int64_t count, const UpsampleTap<T>* taps,
                            T* sums, int64_t stride) {
#if defined(VEERLOSS_AVX512)
    if constexpr (sizeof(T) == 4) {
      const __m512i back = _mm512_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 14);
      for (int64_t k = 0; k < count; ++k) {
        const UpsampleChunk<T>& chunk = chunks[k];
        const __mmask16 valid = static_cast<__mmask16>((1u << chunk.columns) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(valid, a + 16 * k), y = _mm512_maskz_loadu_ps(valid, b + 16 * k);
        __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
        const UpsampleTap<T>* const end = taps + chunk.first_tap + chunk.taps;
        for (const UpsampleTap<T>* tap = taps + chunk.first_tap; tap != end; ++tap) {
          const __m512 value = _mm512_permutex2var_ps(x, _mm512_loadu_si512(tap->column), y);
          first = _mm512_fmadd_ps(value, _mm512_loadu_ps(tap->to_first), first);
          second = _mm512_fmadd_ps(value, _mm512_loadu_ps(tap->to_second), second);
        }
        const __m512 sum = _mm512_add_ps(first, _mm512_maskz_permutexvar_ps(0xfefe, back, second));
        T *const of_a = sums + chunk.first, *const of_b = of_a + stride;
        _mm256_storeu_ps(of_a, _mm256_add_ps(_mm256_loadu_ps(of_a), _mm512_castps512_ps256(sum)));
        _mm256_storeu_ps(of_b, _mm256_add_ps(_mm256_loadu_ps(of_b), _mm512_extractf32x8_ps(sum, 1)));
      }
      return true;
    }
#endif
    (void)a, (void)b, (void)chunks, (void)count, (void)taps, (void)sums, (void)stride;
    return false;
  }
};
