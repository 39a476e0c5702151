// The focal loss of one element: value and derivative (Lin et al., ICCV 2017, arXiv 1708.02002).
//
// `Math` supplies exp_neg (x <= 0), log, log1p_unit (0 <= x <= 1) and reciprocal for the arithmetic type T: vectorisable
// polynomials on the CPU (cpu/simd/vecmath.h), the device's functions on a GPU. `Square` says that gamma is 2, the default,
// which needs no logarithm. Nothing here clamps a probability or takes it to the power gamma - 1, so every value is finite for
// finite logits and gamma >= 0.
#pragma once

#include "../platform.h"

namespace veerloss {

template <class T>
struct ValueAndSlope {
  T value;
  T slope;
};

// q^gamma and its logarithmic slope: d(q^gamma) = slope * dq, for 0 <= q <= 1. At q = 0 the slope counts as 0: every use
// multiplies it by a factor that vanishes faster.
template <class Math, bool Square, class T>
VEERLOSS_HD ValueAndSlope<T> focusing(T q, T gamma) {
  if constexpr (Square) {
    return {q * q, q + q};
  } else {
    const bool positive = !(q <= T(0));  // true for NaN, which has to stay NaN
    const T safe = positive ? q : T(1);
    const T power = Math::exp_neg(gamma * Math::log(safe));
    return {positive ? power : (gamma > T(0) ? T(0) : T(1)), positive ? gamma * power / safe : T(0)};
  }
}

// What the binary loss takes from a logit x: p = sigmoid(x), 1 - p without the cancellation of that subtraction, and by how
// much softplus(x) exceeds max(x, 0), the same for -x.
template <class T>
struct SigmoidTerms {
  T p, not_p, excess;
};

template <class Math, class T>
VEERLOSS_HD SigmoidTerms<T> sigmoid_terms(T x) {
  const T e = Math::exp_neg(-std::fabs(x));
  const T r = Math::reciprocal(T(1) + e);
  return {x < T(0) ? e * r : r, x < T(0) ? r : e * r, Math::log1p_unit(e)};
}

// Binary focal loss of logit x and target t in [0, 1], torchvision's formula for soft targets:
//   alpha_t * bce(x, t) * q^gamma,  q = p (1 - t) + (1 - p) t,  p = sigmoid(x)
// slope is the derivative with respect to x. An infinite x gives NaN, as it does in binary_cross_entropy_with_logits: of
// x * 0.
template <class Math, bool Square, class T>
VEERLOSS_HD ValueAndSlope<T> sigmoid_focal(T x, T t, T alpha_positive, T alpha_negative, T gamma) {
  const T s = T(1) - t;
  const auto [p, not_p, excess] = sigmoid_terms<Math>(x);
  const T bce = s * (x < T(0) ? T(0) : x) + t * (x < T(0) ? -x : T(0)) + x * T(0) + excess;
  const T alpha = alpha_positive * t + alpha_negative * s;
  const auto focus = focusing<Math, Square>(s * p + t * not_p, gamma);
  const T dq = p * not_p * (s - t);
  return {alpha * focus.value * bce, alpha * (focus.value * (s * p - t * not_p) + focus.slope * dq * bce)};
}

// The same of a target that is 0 or 1, in fewer operations: with u = x for 0 and u = -x for 1 it is
//   alpha * softplus(u) * sigmoid(u)^gamma
// slope is the derivative with respect to u.
template <class Math, bool Square, class T>
VEERLOSS_HD ValueAndSlope<T> sigmoid_focal_of_class(T u, T alpha, T gamma) {
  const auto [q, not_q, excess] = sigmoid_terms<Math>(u);
  const T bce = (u < T(0) ? T(0) : u) + u * T(0) + excess;
  const T factor = alpha * focusing<Math, Square>(q, gamma).value;
  return {factor * bce, factor * (q + gamma * not_q * bce)};
}

// Softmax focal loss of one pixel from log_p, the log-probability of its class, and q, the sum of the *other* probabilities:
//   -alpha q^gamma log_p
// slope is the derivative with respect to log_p; the one for logit j is slope * ([j is the class] - p_j). With dq = -p dlog_p.
template <class Math, bool Square, class T>
VEERLOSS_HD ValueAndSlope<T> softmax_focal(T log_p, T q, T alpha, T gamma) {
  const auto focus = focusing<Math, Square>(q, gamma);
  const T p = T(1) - q;
  const T p_log_p = p > T(0) ? p * log_p : T(0);  // a logit of -inf on the class: p = 0, log_p = -inf
  return {-alpha * focus.value * log_p, -alpha * (focus.value - focus.slope * p_log_p)};
}

}  // namespace veerloss
