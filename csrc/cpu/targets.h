// Labels from targets, and the error of a target out of range.
#pragma once

#include <atomic>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "rows.h"

namespace veerloss {

// The first invalid target value that any thread meets, so that the error names the same one in every run. Exceptions do not
// cross threads: kernels record the value, and raise when all threads have ended.
class BadTarget {
 public:
  void at(int64_t channel, int64_t flat_pixel, int64_t channels = 1) {
    const int64_t index = flat_pixel * channels + channel;
    int64_t seen = first_.load();
    while (index < seen && !first_.compare_exchange_weak(seen, index)) {
    }
  }

  // Raises an IndexError in Python: pybind11 maps std::out_of_range to it.
  void raise_if_any(const View& target, const Geometry& g, const std::string& expected, int64_t channels = 1) const {
    const int64_t index = first_.load();
    if (index == none) return;
    double value;
    load_row(&value, target, g, index % channels, {index / channels, 1});
    std::ostringstream message;
    message << "target holds ";
    if (value == std::floor(value) && std::fabs(value) < 9e15)
      message << static_cast<int64_t>(value);
    else
      message << std::setprecision(17) << value;
    message << ", expected " << expected;
    throw std::out_of_range(message.str());
  }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{none};
};

inline void load_labels(int32_t* out, const View& target, const Geometry& g, const TargetRule& rule, Run run, BadTarget& bad) {
  if (load_labels(out, target, g, rule, run)) return;
  for (int64_t i = 0; i < run.count; ++i)
    if (out[i] == label_bad) return bad.at(0, run.first + i);
}

inline std::string expected_labels(const TargetRule& rule, bool binary = false) {
  std::string text = binary ? "0 or 1" : "class indices in [0, " + std::to_string(rule.classes) + ")";
  if (rule.has_background) text += (rule.has_ignore ? ", " : " or ") + ("background_index=" + std::to_string(rule.background));
  return rule.has_ignore ? text + " or ignore_index=" + std::to_string(rule.ignore) : text;
}

}  // namespace veerloss
