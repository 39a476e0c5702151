// Loops on PyTorch's threads, without torch headers (parallel.cpp has them).
#pragma once

#include <cstdint>

namespace veerloss {

int64_t num_threads();

void parallel_for(int64_t count, void (*body)(const void* context, int64_t begin, int64_t end), const void* context);

// f(begin, end) over parts of [0, count).
template <class F>
void parallel_for(int64_t count, const F& f) {
  if (count == 1) return f(int64_t{0}, int64_t{1});
  if (count > 0)
    parallel_for(
        count, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

}  // namespace veerloss
