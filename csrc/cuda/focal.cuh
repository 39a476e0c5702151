// What the passes of both focal losses share: tiles of pixels, sums of blocks, the gradient that comes in.
#pragma once

#include "pixels.cuh"

namespace veerloss {

// The tiles of a pass, and among how many blocks they are dealt out. Tiles of the same pixels and other classes are neighbours.
struct FocalTiles {
  PixelGrid grid;
  uint32_t blocks;
};

template <int pixels_of_tile>
FocalTiles focal_tiles(const Geometry& g, int64_t tiles_of_pixel = 1) {
  constexpr int64_t most = Tuning::Focal::max_blocks;
  PixelGrid grid = pixel_grid<pixels_of_tile>(g.images, g.pixels);
  grid.blocks *= tiles_of_pixel;
  return {grid, static_cast<uint32_t>(grid.blocks < most ? grid.blocks : most)};
}

// Sums and counts of blocks, [blocks] each.
struct FocalPartials {
  double *sums, *counts;
  int64_t bytes;

  FocalPartials(void* memory, int64_t blocks) {
    ScratchArrays arrays(memory);
    sums = arrays.take<double>(blocks);
    counts = arrays.take<double>(blocks);
    bytes = arrays.bytes();
  }

  // Of a block, from those of its threads.
  __device__ void store(double sum, int32_t count) const {
    constexpr int threads = Tuning::Focal::threads;
    __shared__ double scratch[threads];
    __shared__ int32_t count_scratch[threads];
    sum = block_sum<threads>(sum, scratch);
    count = block_sum<threads>(count, count_scratch);
    if (threadIdx.x != 0) return;
    sums[blockIdx.x] = sum;
    counts[blockIdx.x] = count;
  }
};

// The gradient of the sum of the elements' losses, of a loss that is reduced.
template <class T>
__device__ inline T gradient_of_sum(const FocalGradient& out) {
  return static_cast<T>(load_element(out.grad.data, out.grad.dtype, 0) * load_element(out.scale.data, out.scale.dtype, 0));
}

// The loss, and what the sum was multiplied with, from the sums of so many blocks in the scratch memory; without reduction of
// none. One block.
void finish_focal_loss(const FocalLoss& out, int64_t blocks, Stream stream);

}  // namespace veerloss
