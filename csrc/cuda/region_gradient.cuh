// What the backward passes of the region losses share: dL/dp from the coefficients of a segment.
#pragma once

#include "gradient_parts.cuh"
#include "region.cuh"

namespace veerloss {

// dL/dp = t * of_target + of_all, or with squares t * of_target + 2 p * of_all, times what a segment's loss is multiplied by.
struct RegionCoefficients {
  double of_target, of_all;

  __device__ RegionCoefficients() {}
  __device__ RegionCoefficients(const double* coefficients, int64_t segment, double factor)
      : of_target(coefficients[2 * segment] * factor), of_all(coefficients[2 * segment + 1] * factor) {}

  // In float64: near the optimum of a soft target, or with squares, the two terms cancel.
  template <class T>
  __device__ T weight(T p, T t, bool squared) const {
    const double all = squared ? 2.0 * static_cast<double>(p) * of_all : of_all;
    return static_cast<T>(static_cast<double>(t) * of_target + all);
  }
};

// Of labels, without squares.
template <class T>
struct RegionLabelTerm {
  T foreground, background;

  __device__ RegionLabelTerm() {}
  __device__ RegionLabelTerm(const double* coefficients, int64_t segment, T factor) {
    const RegionCoefficients of(coefficients, segment, static_cast<double>(factor));
    foreground = static_cast<T>(of.of_target + of.of_all);
    background = static_cast<T>(of.of_all);
  }
};

// Of a softmax with class indices and without squares, all classes in registers: region_gradient_softmax.cu. Whether it did.
bool launch_region_gradient_softmax(const RegionBackward& args);

}  // namespace veerloss
