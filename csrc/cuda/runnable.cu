// Whether the kernels of this library run on the current device: a library loads beside an older driver, and without code for
// the device. veerloss/_extension.py asks once for each device, by name.

#include "device.cuh"

namespace veerloss {
namespace {

__global__ void empty_kernel() {}

}  // namespace
}  // namespace veerloss

// Null, or CUDA's error; and the versions of CUDA, 1000 * major + 10 * minor, that the driver is for and that this is built
// with. Loads a kernel, but launches none: nothing waits for the device.
extern "C" __attribute__((visibility("default"))) const char* veerloss_cuda_error(int* driver, int* built_with) {
  *driver = *built_with = 0;
  (void)cudaDriverGetVersion(driver);
  (void)cudaRuntimeGetVersion(built_with);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, veerloss::empty_kernel);
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // clears it, else the next launch would report it
  return cudaGetErrorString(error);
}
