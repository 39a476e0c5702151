// Rows of pixels between low and full resolution. Included once per instruction set by dispatch_isa.h: no include guard.

struct UpsampleTiles {
  // A row of low resolution, and the element behind it, at full width.
  template <class T>
  static void expand(const T* __restrict low, const int32_t* __restrict first, const T* __restrict second_weight, int64_t n,
                     T* __restrict out) {
    for (int64_t i = 0; i < n; ++i) {
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

  // Their sums, with a gradient row of full resolution added.
  template <class T>
  static void add_blend(const T* __restrict grad, const T* weight, int64_t taps, int64_t n, T* const* sums) {
    if (taps == 2) {
      T *__restrict a = sums[0], *__restrict b = sums[1];
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
      for (int64_t i = 0; i < n; ++i) sum[i] += w * grad[i];
    }
  }

  // A row of low resolution, and the element behind it, with a row of full width added: of each pixel of low resolution x,
  // `longest` taps [longest][n], what pixel at[x] adds to it and to the next. sum: [2][n + 1].
  template <class T>
  static void contract(const T* __restrict row, const int32_t* __restrict at, const T* __restrict to_first,
                       const T* __restrict to_second, int64_t longest, int64_t n, T* __restrict sum, T* __restrict low) {
    T *__restrict first = sum, *__restrict second = sum + n + 1;
    for (int64_t x = 0; x <= n; ++x) first[x] = second[x] = 0;
    for (int64_t k = 0; k < longest; ++k) {
      const int32_t* __restrict at_k = at + k * n;
      const T *__restrict f = to_first + k * n, *__restrict s = to_second + k * n;
      for (int64_t x = 0; x < n; ++x) {
        const T value = row[at_k[x]];
        first[x] += f[x] * value;
        second[x + 1] += s[x] * value;
      }
    }
    for (int64_t x = 0; x < n; ++x) low[x] += first[x] + second[x];
  }
};
