// ln(1 + x) for 0 <= x <= 1: x times the polynomial through ln(1 + x) / x at the Chebyshev nodes of [0, 1], lowest power first.
#pragma once

#include "../platform.h"

namespace veerloss {

template <class T, class... Rest>
VEERLOSS_HD T polynomial(T x, T coefficient, Rest... rest) {
  if constexpr (sizeof...(rest) == 0)
    return coefficient;
  else
    return polynomial(x, rest...) * x + coefficient;
}

// Relative error 5e-9: one unit in the last place.
VEERLOSS_HD float log1p_unit(float x) {
  return x * polynomial(x, 0.999999995f, -0.499998926f, 0.333297105f, -0.249516163f, 0.196632743f, -0.152696671f, 0.105436238f,
                        -0.0563736128f, 0.0195425273f, -0.00317605702f);
}

// 1.4e-6, for what is computed from 16 bits.
VEERLOSS_HD float log1p_unit_short(float x) {
  return x *
         polynomial(x, 0.999998574f, -0.499858994f, 0.330975258f, -0.234545201f, 0.148294134f, -0.0655903064f, 0.0138744845f);
}

// 1e-17: one unit.
VEERLOSS_HD double log1p_unit(double x) {
  return x * polynomial(x, 0.99999999999999999, -0.49999999999999079, 0.333333333331975252, -0.249999999920095234,
                        0.199999997498565228, -0.166666618482485386, 0.142856519752759262, -0.124994270635143811,
                        0.111072115852995379, -0.0997976809658656833, 0.0900909581519863245, -0.0807095457843020583,
                        0.0701529623652647141, -0.0571897853419390586, 0.0419257098539041573, -0.0263987794807432172,
                        0.0135987780906172537, -0.00542173399100160966, 0.00155352440343343336, -0.000282742113937410716,
                        0.0000244379739485809471);
}

}  // namespace veerloss
