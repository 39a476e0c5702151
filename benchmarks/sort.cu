// One bare radix sort of 32-bit keys with 32-bit values: what the method "exact" is measured against.
// Built and called by benchmarks/gpu_timing.py.

#include <cstddef>
#include <cstdint>

#include <cub/device/device_radix_sort.cuh>

// With temporary = null only *bytes is set, to what the sort needs there. Returns the CUDA error, 0 for none.
extern "C" int sort_pairs(void* temporary, size_t* bytes, const uint32_t* keys, uint32_t* sorted_keys, const uint32_t* values,
                          uint32_t* sorted_values, int64_t count, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, *bytes, keys, sorted_keys, values, sorted_values, count, 0, 32, stream);
}
