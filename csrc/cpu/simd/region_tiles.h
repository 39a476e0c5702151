// Region losses over one tile of pixels, one class at a time. Included once per instruction set by dispatch_isa.h: no include
// guard. Loops over pixels vectorise.

struct RegionTiles {
  template <class T>
  static RegionPart sum(const RegionRow<T>& row) {
    switch (row.activation) {
      case Activation::softmax: return sum_of(OfSoftmax<T>{row.exps, row.inv_sumexp}, row);
      case Activation::sigmoid: return sum_of(OfSigmoid<T>{row.values}, row);
      default: return sum_of(Given<T>{row.values}, row);
    }
  }

  // dL/dp, or dL/dx of a sigmoid, from the coefficients of the segment.
  template <class T>
  static void weigh(const RegionRow<T>& row, double of_target, double of_all, T* g) {
    switch (row.activation) {
      case Activation::softmax: return weigh_of(OfSoftmax<T>{row.exps, row.inv_sumexp}, row, of_target, of_all, g);
      case Activation::sigmoid: return weigh_of(OfSigmoid<T>{row.values}, row, of_target, of_all, g);
      default: return weigh_of(Given<T>{row.values}, row, of_target, of_all, g);
    }
  }

  // Adds the weights of labels to g.
  template <class T>
  static void add_weights(const RegionRow<T>& row, T of_foreground, T of_background, T* g) {
    if (row.activation == Activation::softmax)
      weigh_labels<true>(OfSoftmax<T>{row.exps, row.inv_sumexp}, row, of_foreground, of_background, g);
    else
      weigh_labels<true>(OfSigmoid<T>{row.values}, row, of_foreground, of_background, g);
  }

 private:
  // ---- the probability of a pixel, and from dL/dp to what is stored

  template <class T>
  struct OfSoftmax {
    const T *exps, *inv_sumexp;
    VEERLOSS_HD T operator()(int64_t i) const { return exps[i] * inv_sumexp[i]; }
    VEERLOSS_HD T slope(T g, int64_t) const { return g; }  // the rest is GradientTiles'
  };
  template <class T>
  struct OfSigmoid {
    const T* logits;
    VEERLOSS_HD T operator()(int64_t i) const { return sigmoid_terms<VecMath<T>>(logits[i]).p; }
    VEERLOSS_HD T slope(T g, int64_t i) const {
      const auto terms = sigmoid_terms<VecMath<T>>(logits[i]);
      return g * terms.p * terms.not_p;
    }
  };
  template <class T>
  struct Given {
    const T* p;
    VEERLOSS_HD T operator()(int64_t i) const { return p[i]; }
    VEERLOSS_HD T slope(T g, int64_t) const { return g; }
  };

  // ---- the target of a pixel

  struct Labels {
    const int32_t* label;
    int32_t foreground;
    VEERLOSS_HD bool counts(int64_t i) const { return label[i] >= 0; }
    VEERLOSS_HD bool valid(int64_t) const { return true; }
    VEERLOSS_HD float operator()(int64_t i) const { return label[i] == foreground ? 1.0f : 0.0f; }
  };
  template <class T>
  struct Values {
    const T* value;
    T ignored;  // NaN where none is
    VEERLOSS_HD bool counts(int64_t i) const { return !(value[i] == ignored); }
    VEERLOSS_HD bool valid(int64_t i) const { return !(value[i] < T(0) || value[i] > T(1)); }
    VEERLOSS_HD T operator()(int64_t i) const { return value[i]; }
  };

  template <class P, class T>
  static RegionPart sum_of(P probability, const RegionRow<T>& row) {
    if (row.label) return row.squared ? sum_labels<true>(probability, row) : sum_labels<false>(probability, row);
    return row.squared ? sum_values<true>(probability, row) : sum_values<false>(probability, row);
  }

  template <class P, class T>
  static void weigh_of(P probability, const RegionRow<T>& row, double of_target, double of_all, T* g) {
    if (row.label && !row.squared)
      return weigh_labels<false>(probability, row, static_cast<T>(of_target + of_all), static_cast<T>(of_all), g);
    if (row.label) return weigh_over<true>(probability, Labels{row.label, row.foreground}, row.n, of_target, of_all, g);
    const Values<T> target{row.target, row.ignored};
    return row.squared ? weigh_over<true>(probability, target, row.n, of_target, of_all, g)
                       : weigh_over<false>(probability, target, row.n, of_target, of_all, g);
  }

  template <bool squared, class P, class T>
  static RegionPart sum_labels(P probability, const RegionRow<T>& row) {
    const int32_t* __restrict label = row.label;
    const int32_t foreground = row.foreground;
    int64_t intersection = 0, predicted = 0;
    int32_t expected = 0, pixels = 0, bad = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      // Masks: of conditions the compiler makes branches, and no vectors.
      const int32_t counts = ~(label[i] >> 31), is_foreground = -static_cast<int32_t>(label[i] == foreground);
      const T p = probability(i), counted = label[i] >= 0 ? p : T(0);
      bad |= out_of_range(counted);
      expected -= is_foreground;
      pixels -= counts;
      const auto wide = static_cast<double>(counted);
      const int64_t units = region_units(wide);
      intersection += units & is_foreground;
      predicted += squared ? region_units(wide * wide) : units;
    }
    return {intersection, predicted, expected * region_units(1.0), pixels, bad, 0};
  }

  template <bool squared, class P, class T>
  static RegionPart sum_values(P probability, const RegionRow<T>& row) {
    const T* __restrict value = row.target;
    const T ignored = row.ignored;
    int64_t intersection = 0, predicted = 0, expected = 0;
    int32_t pixels = 0, bad = 0, bad_targets = 0;
    for (int64_t i = 0; i < row.n; ++i) {
      const T p = probability(i), counted = value[i] == ignored ? T(0) : p, target = value[i] == ignored ? T(0) : value[i];
      bad |= out_of_range(counted) | out_of_range(target);
      bad_targets |= (target < T(0) ? 1 : 0) | (target > T(1) ? 1 : 0);
      pixels += value[i] == ignored ? 0 : 1;
      const auto wide = static_cast<double>(counted), t = static_cast<double>(target);
      intersection += region_units(wide * t);
      predicted += region_units(squared ? wide * wide : wide);
      expected += region_units(squared ? t * t : t);
    }
    return {intersection, predicted, expected, pixels, bad, bad_targets};
  }

  template <class T>
  static VEERLOSS_HD int32_t out_of_range(T p) {
    return (p >= T(-region_slack) ? 0 : 1) | (p <= T(1.0 + region_slack) ? 0 : 1);  // NaN is
  }
  // Two numbers, which look-ups of the Lovász losses can have added to theirs.
  template <bool adds, class P, class T>
  static void weigh_labels(P probability, const RegionRow<T>& row, T of_foreground, T of_background, T* __restrict g) {
    const int32_t* __restrict label = row.label;
    const int32_t foreground = row.foreground;
#pragma GCC ivdep
    for (int64_t i = 0; i < row.n; ++i) {
      const T slope = probability.slope(label[i] == foreground ? of_foreground : of_background, i);
      const T weight = label[i] >= 0 ? slope : T(0);
      g[i] = adds ? g[i] + weight : weight;
    }
  }

  // In float64: near the optimum of a soft target, or with squares, the two terms cancel.
  template <bool squared, class P, class Target, class T>
  static void weigh_over(P probability, Target target, int64_t n, double of_target, double of_all, T* __restrict g) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const double all = squared ? 2.0 * static_cast<double>(probability(i)) * of_all : of_all;
      const T slope = probability.slope(static_cast<T>(static_cast<double>(target(i)) * of_target + all), i);
      g[i] = target.counts(i) ? slope : T(0);
    }
  }
};
