// Few classes, of which a loop over pixels is compiled for each number.
#pragma once

#include <cstdint>
#include <type_traits>

namespace veerloss {

// Up to so many classes loops over pixels keep in registers.
constexpr int most_few = 8;

// Calls f with the number of few classes as a std::integral_constant, and returns true; false of more classes.
template <int classes = 1, class F>
bool with_few(int64_t count, const F& f) {
  if (count == classes) return f(std::integral_constant<int, classes>{}), true;
  if constexpr (classes < most_few)
    return with_few<classes + 1>(count, f);
  else
    return false;
}

}  // namespace veerloss
