// The gradient of logits of low resolution, from what the tiles of full resolution add to it.

#include "upsample.cuh"

namespace veerloss {
namespace {

// The tiles of an axis that a pixel of low resolution has a part in are among these.
struct TileRange {
  int first, last;

  __device__ TileRange(const LowAxis& axis, int low, int extent) {
    const auto& a = axis.axis;
    // Positions from low - 1 to low + 1, and one pixel more on either side, for mode "nearest" rounds. Those past the last
    // pixel are its own.
    const int begin = low > 1 ? ((low - 1) * a.unit - a.offset) / a.step - 1 : 0;
    const int end = low < a.low - 2 ? ((low + 1) * a.unit - a.offset) / a.step + 1 : a.full - 1;
    first = (begin > 0 ? begin : 0) / extent;
    last = (end < a.full - 1 ? end : a.full - 1) / extent;
  }
};

// A thread has the classes of one pixel. (One block at the least: without it ptxas spilled 8 bytes.)
template <class In>
__global__ void __launch_bounds__(LowPolicy::threads, 1)
    add_up_tiles_kernel(LowLogits low, View grad, LowTiles tiles, int classes, PixelGrid grid, Geometry of_low,
                        const float* partials) {
  const auto [image, pixel, none] = thread_pixel<LowPolicy::threads>(grid, of_low.images, of_low.pixels);
  if (pixel < 0) return;
  const int width = low.x.axis.low, y = static_cast<int>(pixel) / width, x = static_cast<int>(pixel) % width;
  const TileRange down(low.y, y, LowPolicy::rows), across(low.x, x, LowPolicy::columns);
  const int lows_x = tiles.firsts_x + 1, lows_y = tiles.firsts_y + 1;
  for (int c = 0; c < classes; ++c) {
    float sum = 0;
    for (int v = down.first; v <= down.last; ++v) {
      const int row = y - low.y.blend(v * LowPolicy::rows).first;
      if (row < 0 || row >= lows_y) continue;
      for (int h = across.first; h <= across.last; ++h) {
        const int column = x - low.x.blend(h * LowPolicy::columns).first;
        if (column < 0 || column >= lows_x) continue;
        const int64_t tile = image * tiles.of_image() + static_cast<int64_t>(v) * tiles.across + h;
        sum += partials[((tile * classes + c) * lows_y + row) * lows_x + column];
      }
    }
    store<In>(grad, image, c, pixel, sum);
  }
}

}  // namespace

int64_t kernels::upsample_scratch_bytes(const Upsample& upsample) {
  const LowTiles tiles(LowLogits::of(View{}, upsample, float{}));
  const Geometry& low = upsample.low;
  return low.images * tiles.of_image() * low.channels * tiles.lows() * static_cast<int64_t>(sizeof(float));
}

void add_up_tiles(const Geometry& g, const Upsample& upsample, const View& grad_logits, const LowTiles& tiles,
                  const float* partials, Stream stream) {
  const Geometry& low = upsample.low;
  const PixelGrid grid = pixel_grid<LowPolicy::threads>(low.images, low.pixels);
  with_element_type(grad_logits.dtype, [&](auto zero) {
    using In = decltype(zero);
    if constexpr (!std::is_same_v<In, double>)
      launch(add_up_tiles_kernel<In>, {.blocks = grid.blocks, .threads = LowPolicy::threads, .stream = stream},
             LowLogits::of(grad_logits, upsample, zero), grad_logits, tiles, static_cast<int>(g.channels), grid, low, partials);
  });
}

}  // namespace veerloss
