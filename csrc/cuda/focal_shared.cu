// Softmax focal loss of many classes, in parts (class_parts.cuh). The first warp has the targets.

#include "class_parts.cuh"
#include "focal_softmax.cuh"

namespace veerloss {
namespace {

constexpr int threads = PartsPolicy::threads, tile_pixels = PartsPolicy::pixels;

// What warps tell each other of a tile.
template <class T>
struct Exchange {
  PartSoftmaxes<T> parts;
  T whole_max[tile_pixels], others[tile_pixels], own[tile_pixels];  // the factors of the gradient of a pixel
  int32_t label[tile_pixels];
};

// Goes over the tiles of a block. In each, for the pixels of the first warp, calls lead(image, pixel, logits, softmax), which
// has one thread for a pixel; then, in a backward pass, for those of all warps finish(pointer to the gradient of the part's
// first class, the part's exponentials, part, its largest logit).
template <class In, class Range, bool in_rows, class Lead, class Finish>
__device__ inline void for_each_tile(const FocalTiles& tiles, const SoftmaxFocalInput& input, const View* grad_logits,
                                     Exchange<opmath_t<In>>& exchange, const Lead& lead, const Finish& finish) {
  using T = opmath_t<In>;
  const auto [images, channels, pixels] = input.geometry;
  const auto classes = static_cast<int>(channels);
  const int lane = static_cast<int>(threadIdx.x) % tile_pixels, warp = static_cast<int>(threadIdx.x) / tile_pixels;
  const ClassPart part(warp, classes);
  VEERLOSS_DYNAMIC_SHARED(memory);
  const SharedRows<In, threads> rows(memory, classes);
  for (int64_t t = blockIdx.x; t < tiles.grid.blocks; t += tiles.blocks) {
    const auto tile = static_cast<uint32_t>(t);
    const auto at = thread_pixel<tile_pixels>(tiles.grid, images, pixels, 1, tile, static_cast<uint32_t>(lane));
    const int64_t pixel = at.pixel < 0 ? 0 : at.pixel;  // a thread without one has another's, and is not heard
    const PixelRun run = pixel_run<tile_pixels>(tiles.grid, images, pixels, tile);
    if constexpr (in_rows) {
      rows.load(input.logits, run);
      __syncthreads();
    }
    const auto pointer = [&](const View& view) {
      if constexpr (in_rows)
        return rows.row(at.pixel < 0 ? 0 : lane);
      else
        return ClassPointer<In>(view, at.image, pixel);
    };
    const auto logits = pointer(input.logits);
    T values[Range::most];
    auto own = logits;
    own.skip(part.first);
    load_classes<Range>(values, own, part.count);
    const T part_max = max_of(values);
    exchange.parts.put(part_max, exponentials_in_place(values, finite_max(part_max)));
    __syncthreads();
    if (warp == 0 && at.pixel >= 0) lead(at.image, pixel, lane, logits, exchange.parts.whole(lane, FastExp{}));
    __syncthreads();
    if (!grad_logits) continue;
    if (at.pixel >= 0) {
      auto to = pointer(*grad_logits);
      to.skip(part.first);
      finish(to, values, part, lane, part_max);
    }
    if constexpr (in_rows) {
      __syncthreads();
      rows.store(*grad_logits, run);
      __syncthreads();
    }
  }
}

template <class In, class Range>
__global__ void __launch_bounds__(threads, focal_min_blocks<In, Range>)
    softmax_focal_shared_forward_kernel(SoftmaxFocalInput input, FocalLoss out, FocalTiles tiles, FocalPartials partials) {
  using T = opmath_t<In>;
  __shared__ Exchange<T> exchange;
  double sum = 0;
  int32_t count = 0;
  const auto lead = [&](int64_t image, int64_t pixel, int, const auto& logits, const Softmax<T>& softmax) {
    const int32_t label = label_of_pixel(input, image, pixel), known = label < 0 ? 0 : label;
    const LabelTerm<T> term(input, softmax, softmax.inv_sumexp(), label_logit(logits, known), known);
    sum += counted_loss(out, image, pixel, label, term.loss.value);
    count += label != label_ignored;
  };
  for_each_tile<In, Range, true>(tiles, input, nullptr, exchange, lead,
                                 [](const auto&, const T(&)[Range::most], const ClassPart&, int, T) {});
  if (out.reduction != Reduction::none) partials.store(sum, count);
}

template <class In, class Range, bool in_rows>
__global__ void __launch_bounds__(threads, focal_min_blocks<In, Range>)
    softmax_focal_shared_backward_kernel(SoftmaxFocalInput input, FocalGradient out, FocalTiles tiles) {
  using T = opmath_t<In>;
  __shared__ Exchange<T> exchange;
  const FocalIncoming<T> incoming(out);
  const auto lead = [&](int64_t image, int64_t pixel, int lane, const auto& logits, const Softmax<T>& softmax) {
    const int32_t label = label_of_pixel(input, image, pixel), known = label < 0 ? 0 : label;
    const T inv_sumexp = softmax.inv_sumexp();
    const LabelTerm<T> term(input, softmax, inv_sumexp, label_logit(logits, known), known);
    const T g = incoming(out, image, pixel, label) * term.loss.slope;
    exchange.whole_max[lane] = softmax.max_logit;
    exchange.others[lane] = -g * inv_sumexp;
    exchange.own[lane] = g * term.q;
    exchange.label[lane] = label;
  };
  const auto finish = [&](auto to, const T(&exps)[Range::most], const ClassPart& part, int lane, T part_max) {
    const int32_t label = exchange.label[lane];
    const bool counts = label != label_ignored;  // else the gradient is 0, whatever the logits hold
    const T others = exchange.others[lane] * exp_neg(part_max - exchange.whole_max[lane]), own = exchange.own[lane];
    store_gradient<Range>(to, exps, part.count, label - part.first, counts, others, own);
  };
  for_each_tile<In, Range, in_rows>(tiles, input, &out.grad_logits, exchange, lead, finish);
}

// Calls f with the element type, the range of the classes of a warp, and a launch with shared memory for rows.
template <class F>
void with_kernel(const SoftmaxFocalInput& input, const FocalTiles& tiles, Stream stream, const F& f) {
  const int64_t classes = input.geometry.channels;
  const Launch shape{.blocks = tiles.blocks,
                     .threads = threads,
                     .stream = stream,
                     .shared_bytes = shared_rows_bytes(tile_pixels, classes, sizeof(float))};
  with_element_type(input.logits.dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) with_part_range(classes, [&](auto range) { f(zero, range, shape); });
  });
}

bool fits(const SoftmaxFocalInput& input) {
  const int64_t classes = input.geometry.channels;
  return are_in_parts(classes, input.logits.dtype) && !is_soft(input);
}

}  // namespace

bool launch_shared_forward(const SoftmaxFocalInput& input, const FocalLoss& out, const FocalTiles& tiles,
                           const FocalPartials& partials, Stream stream) {
  if (!fits(input) || !has_rows(input.logits, input.geometry, tiles.grid)) return false;
  with_kernel(input, tiles, stream, [&](auto zero, auto range, const Launch& shape) {
    launch(softmax_focal_shared_forward_kernel<decltype(zero), decltype(range)>, shape, input, out, tiles, partials);
  });
  return true;
}

bool launch_shared_backward(const SoftmaxFocalInput& input, const FocalGradient& out, Stream stream) {
  if (!fits(input)) return false;
  const FocalTiles tiles = focal_tiles<tile_pixels>(input.geometry);
  const bool rows = has_rows(input.logits, input.geometry, tiles.grid) && has_rows(out.grad_logits, input.geometry, tiles.grid);
  with_kernel(input, tiles, stream, [&](auto zero, auto range, Launch shape) {
    if (rows) {
      launch(softmax_focal_shared_backward_kernel<decltype(zero), decltype(range), true>, shape, input, out, tiles);
    } else {
      shape.shared_bytes = 0;
      launch(softmax_focal_shared_backward_kernel<decltype(zero), decltype(range), false>, shape, input, out, tiles);
    }
  });
  return true;
}

}  // namespace veerloss
