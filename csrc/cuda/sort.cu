// The sort of method "exact": CUB's radix sort, of one long segment or of many short ones.
//
// DeviceSegmentedRadixSort has one block for a segment and starves on few long ones, so those are sorted one after another
// (lovasz.cu groups them).

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>

#include "device.cuh"
#include "launch.h"

namespace veerloss {
namespace {

// Where segments of one length begin.
struct Multiple {
  int64_t length;
  __host__ __device__ int64_t operator()(int64_t i) const { return i * length; }
};

template <class Word>
cudaError_t sort(void* scratch, size_t& bytes, const void* keys, void* sorted_keys, const uint32_t* values,
                 uint32_t* sorted_values, int64_t length, int64_t segments, int bits, cudaStream_t stream) {
  const auto* in = static_cast<const Word*>(keys);
  auto* out = static_cast<Word*>(sorted_keys);
  if (segments == 1)
    return cub::DeviceRadixSort::SortPairsDescending(scratch, bytes, in, out, values, sorted_values, length, 0, bits, stream);
  const auto begin = thrust::make_transform_iterator(thrust::counting_iterator<int64_t>(0), Multiple{length});
  return cub::DeviceSegmentedRadixSort::SortPairsDescending(scratch, bytes, in, out, values, sorted_values, length * segments,
                                                            segments, begin, begin + 1, 0, bits, stream);
}

}  // namespace

size_t sort_pairs(void* scratch, size_t scratch_bytes, bool wide, const void* keys, void* sorted_keys, const uint32_t* values,
                  uint32_t* sorted_values, int64_t length, int64_t segments, int bits, cudaStream_t stream) {
  if (!scratch) bits = wide ? 63 : 31;
  const auto run = wide ? sort<uint64_t> : sort<uint32_t>;
  check(run(scratch, scratch_bytes, keys, sorted_keys, values, sorted_values, length, segments, bits, stream), "radix sort");
  return scratch_bytes;
}

}  // namespace veerloss
