// Rows of pixels in and out of the arithmetic type T. Included once per instruction set by dispatch_isa.h: no include guard.

struct RowTiles {
  // out[0, run.count) = the pixels of `run` in one channel.
  template <class T>
  static void load(T* out, const View& v, const Geometry& g, int64_t channel, Run run) {
    for_each_piece(v, g, channel, run, [=](int64_t done, int64_t offset, int64_t n) {
      load_piece(out + done, v.data, v.dtype, offset, v.stride_pixel, n);
    });
  }

  template <class T>
  static void store(const T* in, const View& v, const Geometry& g, int64_t channel, Run run) {
    for_each_piece(v, g, channel, run, [=](int64_t done, int64_t offset, int64_t n) {
      store_piece(in + done, v.data, v.dtype, offset, v.stride_pixel, n);
    });
  }

  // The same of single pixels: the elements at base + channel * stride_channel + offset[i], base being that of the view.
  // Where 16 pixels follow one another, by their index, so do their elements.
  template <class T>
  static void gather(T* __restrict out, const View& v, int64_t channel, const int64_t* __restrict offset,
                     const int32_t* __restrict index, int64_t n) {
    with_element(v.dtype, [&](auto element, auto convert) {
      const auto* __restrict in = reinterpret_cast<const decltype(element)*>(v.data) + channel * v.stride_channel;
      int64_t i = 0;
      while (i + 16 <= n) {
        const bool follow = v.stride_pixel == 1 && index[i + 15] - index[i] == 15 && offset[i + 15] - offset[i] == 15;
        const auto* __restrict from = in + offset[i];
        if (follow)
          for (int64_t j = 0; j < 16; ++j) out[i + j] = static_cast<T>(convert(from[j]));
        else
          for (int64_t j = 0; j < 16; ++j) out[i + j] = static_cast<T>(convert(in[offset[i + j]]));
        i += 16;
      }
      for (; i < n; ++i) out[i] = static_cast<T>(convert(in[offset[i]]));
    });
  }

  template <class T>
  static void scatter(const T* __restrict in, const View& v, int64_t channel, const int64_t* __restrict offset, int64_t n) {
    const auto write_at = [&](auto element, auto convert) {
      auto* __restrict out = reinterpret_cast<decltype(element)*>(v.data) + channel * v.stride_channel;
      for (int64_t i = 0; i < n; ++i) out[offset[i]] = convert(in[i]);
    };
    switch (v.dtype) {
      case DType::f64: return write_at(double{}, [](T x) { return static_cast<double>(x); });
      case DType::bf16: return write_at(uint16_t{}, [](T x) { return float_to_bfloat16(static_cast<float>(x)); });
      case DType::f16: return write_at(uint16_t{}, [](T x) { return float_to_half(static_cast<float>(x)); });
      default: return write_at(float{}, [](T x) { return static_cast<float>(x); });
    }
  }

  // Appends the pixels that are not ignored to index and kept; `first` is the index of label[0]. Returns how many they are.
  // Both have room for one more.
  static int64_t select(const int32_t* __restrict label, int64_t n, int32_t first, int32_t* __restrict index,
                        int32_t* __restrict kept) {
    int64_t size = 0;
    for (int64_t i = 0; i < n; ++i) {
      index[size] = first + static_cast<int32_t>(i);
      kept[size] = label[i];
      size += label[i] != label_ignored;
    }
    return size;
  }

  // Bit i % 16 of mask[i / 16]: whether pixel i is not ignored; n is rounded up to a multiple of 16.
  static void mask(const int32_t* __restrict label, int64_t n, uint16_t* __restrict mask) {
    int64_t k = 0;
#if defined(VEERLOSS_AVX512)
    for (; 16 * k + 16 <= n; ++k)
      mask[k] = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(label + 16 * k), _mm512_set1_epi32(label_ignored));
#endif
    for (; 16 * k < n; ++k) {
      uint32_t bits = 0;
      for (int64_t l = 0; l < 16; ++l) bits |= (16 * k + l < n && label[16 * k + l] != label_ignored ? 1u : 0u) << l;
      mask[k] = static_cast<uint16_t>(bits);
    }
  }

  // Moves the pixels of a mask to the front of a row, in place. Rows have room for n rounded up to a multiple of 16.
  template <class T>
  static void compress(T* row, int64_t n, const uint16_t* __restrict mask) {
    T* out = row;
#if defined(VEERLOSS_AVX512)
    // Compilers have no vector code for the loop below, which takes a cycle for each pixel.
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 bits = mask[i / 16];
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(bits, _mm512_loadu_si512(row + i)));
        out += __builtin_popcount(bits);
      }
      return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
      *out = row[i];
      out += mask[i / 16] >> i % 16 & 1;
    }
  }

  // The inverse: zeros elsewhere. Up to 16 elements behind `in` are read.
  template <class T>
  static void expand(const T* __restrict in, int64_t n, const uint16_t* __restrict mask, T* __restrict row) {
#if defined(VEERLOSS_AVX512)
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 bits = mask[i / 16];
        _mm512_storeu_si512(row + i, _mm512_maskz_expand_epi32(bits, _mm512_loadu_si512(in)));
        in += __builtin_popcount(bits);
      }
      return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
      const bool bit = mask[i / 16] >> i % 16 & 1;
      row[i] = bit ? *in : T(0);
      in += bit;
    }
  }

  static int64_t count(const int32_t* __restrict label, int64_t n) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += label[i] != label_ignored;
    return count;
  }

  // Class indices, or 0/1 labels in any type. Returns false if a value is neither a class nor ignored (then label_bad).
  static bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run) {
    int32_t worst = 0;
    for_each_piece(v, g, 0, run, [&](int64_t done, int64_t offset, int64_t n) {
      const int32_t w = load_labels_piece(out + done, v.data, v.dtype, offset, v.stride_pixel, n, rule);
      worst = w < worst ? w : worst;
    });
    return worst > label_bad;
  }

 private:
  // f(done, offset, n) for each part of `run` that lies in one image.
  template <class F>
  static void for_each_piece(const View& v, const Geometry& g, int64_t channel, Run run, const F& f) {
    if (run.count == 0) return;  // of no pixels at all, perhaps
    int64_t image = run.first / g.pixels, pixel = run.first % g.pixels;
    for (int64_t done = 0; done < run.count;) {
      const int64_t n = run.count - done < g.pixels - pixel ? run.count - done : g.pixels - pixel;
      f(done, image * v.stride_image + channel * v.stride_channel + pixel * v.stride_pixel, n);
      done += n;
      image += 1;
      pixel = 0;
    }
  }

  template <class E, class T, class Convert>
  static void read(T* __restrict out, const char* data, int64_t offset, int64_t stride, int64_t n, Convert convert) {
    const E* __restrict in = reinterpret_cast<const E*>(data) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = convert(in[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] = convert(in[i * stride]);
    }
  }

  template <class E, class T, class Convert>
  static void write(const T* __restrict in, char* data, int64_t offset, int64_t stride, int64_t n, Convert convert) {
    E* __restrict out = reinterpret_cast<E*>(data) + offset;
    if (stride == 1) {
      for (int64_t i = 0; i < n; ++i) out[i] = convert(in[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * stride] = convert(in[i]);
    }
  }

  // f(zero of the type of logits, conversion to float or double)
  template <class F>
  static void with_element(DType dtype, const F& f) {
    switch (dtype) {
      case DType::f64: return f(double{}, [](double v) { return v; });
      case DType::bf16: return f(uint16_t{}, [](uint16_t v) { return bfloat16_to_float(v); });
      case DType::f16: return f(uint16_t{}, [](uint16_t v) { return half_to_float(v); });
      default: return f(float{}, [](float v) { return v; });
    }
  }

  template <class T>
  static void load_piece(T* out, const char* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
    const auto widen = [](auto v) { return static_cast<T>(v); };
    const auto bf16 = [](uint16_t v) { return static_cast<T>(bfloat16_to_float(v)); };
    const auto f16 = [](uint16_t v) { return static_cast<T>(half_to_float(v)); };
    switch (dtype) {
      case DType::f32: return read<float>(out, data, offset, stride, n, widen);
      case DType::f64: return read<double>(out, data, offset, stride, n, widen);
      case DType::bf16: return read<uint16_t>(out, data, offset, stride, n, bf16);
      case DType::f16: return read<uint16_t>(out, data, offset, stride, n, f16);
      case DType::i64: return read<int64_t>(out, data, offset, stride, n, widen);
      case DType::i32: return read<int32_t>(out, data, offset, stride, n, widen);
      case DType::i16: return read<int16_t>(out, data, offset, stride, n, widen);
      case DType::i8: return read<int8_t>(out, data, offset, stride, n, widen);
      case DType::u8: return read<uint8_t>(out, data, offset, stride, n, widen);
    }
  }

  template <class T>
  static void store_piece(const T* in, char* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
    const auto same = [](T x) { return x; };
    const auto bf16 = [](T x) { return float_to_bfloat16(static_cast<float>(x)); };
    const auto f16 = [](T x) { return float_to_half(static_cast<float>(x)); };
    switch (dtype) {
      case DType::f64: return write<double>(in, data, offset, stride, n, same);
      case DType::bf16: return write<uint16_t>(in, data, offset, stride, n, bf16);
      case DType::f16: return write<uint16_t>(in, data, offset, stride, n, f16);
      default: return write<float>(in, data, offset, stride, n, same);
    }
  }

  static int32_t load_labels_piece(int32_t* out, const char* data, DType dtype, int64_t offset, int64_t stride, int64_t n,
                                   const TargetRule& rule) {
    const int64_t classes = rule.classes;
    // Without a value to ignore, or one for background, -1, which is no class, stands for it and is bad.
    const int64_t ignore = rule.has_ignore ? rule.ignore : -1, background = rule.has_background ? rule.background : -1;
    const int32_t at_ignore = rule.has_ignore ? label_ignored : label_bad;
    const int32_t at_background = rule.has_background ? label_background : label_bad;
    const auto integer = [=](auto v) {
      const int64_t c = static_cast<int64_t>(v);
      const int32_t label = c >= 0 && c < classes ? static_cast<int32_t>(c) : c == background ? at_background : label_bad;
      return c == ignore && rule.has_ignore ? at_ignore : label;
    };
    const auto real = [=](auto v) {  // of binary labels, which have no background value
      const double c = static_cast<double>(v);
      const bool inside = c >= 0.0 && c < static_cast<double>(classes);  // false for NaN
      const int32_t label = static_cast<int32_t>(inside ? c : 0.0);
      return c == static_cast<double>(ignore) ? at_ignore : (inside & (label == c) ? label : label_bad);
    };
    switch (dtype) {
      case DType::f32: read<float>(out, data, offset, stride, n, real); break;
      case DType::f64: read<double>(out, data, offset, stride, n, real); break;
      case DType::bf16:
        read<uint16_t>(out, data, offset, stride, n, [=](uint16_t v) { return real(bfloat16_to_float(v)); });
        break;
      case DType::f16: read<uint16_t>(out, data, offset, stride, n, [=](uint16_t v) { return real(half_to_float(v)); }); break;
      case DType::i64: read<int64_t>(out, data, offset, stride, n, integer); break;
      case DType::i32: read<int32_t>(out, data, offset, stride, n, integer); break;
      case DType::i16: read<int16_t>(out, data, offset, stride, n, integer); break;
      case DType::i8: read<int8_t>(out, data, offset, stride, n, integer); break;
      case DType::u8: read<uint8_t>(out, data, offset, stride, n, integer); break;
    }
    int32_t worst = 0;
    for (int64_t i = 0; i < n; ++i) worst = out[i] < worst ? out[i] : worst;
    return worst;
  }
};
