// The sort of method "exact": CUB's radix sort, of one segment or of many.
//
// DeviceSegmentedRadixSort has one block for each segment, too few threads for a few long segments: exact.cu sorts those one
// after another.

#include "sort.h"

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "../device.cuh"

namespace veerloss {
namespace {

// Where segments of one length begin.
struct SegmentBegin {
  int64_t length;
  __host__ __device__ int64_t operator()(int64_t i) const { return i * length; }
};

// CUB's convention: without scratch memory, only `bytes` is written.
template <class Word>
void run(const SortPairs<Word>& args, size_t& bytes) {
  constexpr int end_bit = 8 * sizeof(Word) - 1;
  const auto [segments, length] = args.shape;
  auto* stream = static_cast<cudaStream_t>(args.stream);
  if (segments == 1) {
    check(cub::DeviceRadixSort::SortPairsDescending(args.scratch, bytes, args.keys, args.sorted_keys, args.values,
                                                    args.sorted_values, length, 0, end_bit, stream),
          "radix sort");
    return;
  }
  const auto begin = thrust::make_transform_iterator(thrust::counting_iterator<int64_t>(0), SegmentBegin{length});
  check(cub::DeviceSegmentedRadixSort::SortPairsDescending(args.scratch, bytes, args.keys, args.sorted_keys, args.values,
                                                           args.sorted_values, length * segments, segments, begin, begin + 1, 0,
                                                           end_bit, stream),
        "segmented radix sort");
}

}  // namespace

template <class Word>
int64_t sort_scratch_bytes(const SortedSegments& shape) {
  size_t bytes = 0;
  run(SortPairs<Word>{.shape = shape}, bytes);
  return static_cast<int64_t>(bytes);
}

template <class Word>
void sort_pairs(const SortPairs<Word>& args) {
  auto bytes = static_cast<size_t>(args.scratch_bytes);
  run(args, bytes);
}

template int64_t sort_scratch_bytes<uint32_t>(const SortedSegments&);
template int64_t sort_scratch_bytes<uint64_t>(const SortedSegments&);
template void sort_pairs<uint32_t>(const SortPairs<uint32_t>&);
template void sort_pairs<uint64_t>(const SortPairs<uint64_t>&);

}  // namespace veerloss
