// The sort of method "exact".
#pragma once

#include "../../kernels.h"

namespace veerloss {

// Segments of one length, side by side.
struct SortedSegments {
  int64_t segments, length;
};

// Sorts the keys of each segment in descending order of all bits but the top one, with the values of the keys; equal keys keep
// their order. Word: uint32_t or uint64_t.
template <class Word>
struct SortPairs {
  SortedSegments shape;
  const Word* keys;
  Word* sorted_keys;
  const uint32_t* values;
  uint32_t* sorted_values;
  void* scratch;
  int64_t scratch_bytes;  // sort_scratch_bytes() of this shape, or of one with more segments
  Stream stream;
};

template <class Word>
int64_t sort_scratch_bytes(const SortedSegments& shape);
template <class Word>
void sort_pairs(const SortPairs<Word>& args);

}  // namespace veerloss
