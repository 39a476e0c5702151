// Sigmoid focal loss in CUDA C++. Forward reads the logits and the target once, backward reads them again and writes the
// gradient; nothing is kept between the two, and nothing waits for the host. A target out of range makes the loss NaN.
//
// The kernel here takes elements that lie in memory in any way: threads have pixels, and go over classes. Where pixels are
// contiguous (NCHW), a thread has 16 bytes of logits of each class; else one pixel, and so it has with weights, without
// reduction and in float64. Elements in one run of memory: focal_sigmoid_rows.cu.

#include "focal_sigmoid.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::SigmoidPlanes;

// Tiles of so many runs of pixels and so many classes, but for the last of each.
struct PlaneTiles {
  FocalTiles tiles;
  int groups, group_classes;  // of classes
};

PlaneTiles plane_tiles(const Geometry& g, int run) {
  const Geometry runs{g.images, 1, g.pixels / run};
  const int64_t most = ceil_div(g.channels, Policy::min_group_classes);
  const int64_t blocks = focal_tiles<Policy::threads>(runs).grid.blocks;
  const int64_t wanted = blocks > 0 ? ceil_div(Policy::wanted_blocks, blocks) : 1, groups = wanted < most ? wanted : most;
  return {focal_tiles<Policy::threads>(runs, groups), static_cast<int>(groups),
          static_cast<int>(groups > 0 ? ceil_div(g.channels, groups) : 0)};
}

template <class S, int n>
__device__ inline void load_integers(int64_t (&values)[n], const View& target, int64_t first) {
  load_run(values, reinterpret_cast<const S*>(target.data) + first);
}

// The labels of a run of pixels; of one, from a target of any type.
template <int n>
__device__ inline void load_labels(int32_t (&labels)[n], const SigmoidFocalInput& input, int64_t image, int64_t pixel) {
  if constexpr (n == 1) {
    labels[0] = load_label(input.target, input.rule, image, pixel);
  } else {
    const View& target = input.target;
    const int64_t first = ptr_offset(target, image, 0, pixel);
    int64_t values[n];
    switch (target.dtype) {
      case DType::i64: load_integers<int64_t>(values, target, first); break;
      case DType::i32: load_integers<int32_t>(values, target, first); break;
      case DType::i16: load_integers<int16_t>(values, target, first); break;
      case DType::i8: load_integers<int8_t>(values, target, first); break;
      default: load_integers<uint8_t>(values, target, first);
    }
#pragma unroll
    for (int k = 0; k < n; ++k) labels[k] = label_of(values[k], input.rule);
  }
}

// n: pixels of a thread. One that has a single pixel also takes weights, and a loss that is not reduced.
template <class In, int n, bool has_labels, bool square, class Out>
__global__ void __launch_bounds__(Policy::threads, Policy::min_blocks<In>(square))
    sigmoid_focal_planes_kernel(SigmoidFocalInput input, Out out, PlaneTiles planes, FocalPartials partials) {
  using T = opmath_t<In>;
  constexpr Pass pass = pass_of<Out>;
  const auto [images, channels, pixels] = input.geometry;
  const auto& [tiles, groups, group_classes] = planes;
  const T gamma = static_cast<T>(input.gamma);
  const bool each = n == 1 && out.reduction == Reduction::none;
  T grad = T(1);
  if constexpr (pass == Pass::backward)
    if (!each) grad = gradient_of_sum<T>(out);
  const SigmoidFactors<T> factors(input, grad);
  const IgnoredValue ignored(input.rule);
  const int64_t target_size = size_of(input.target.dtype);
  double sum = 0;
  int32_t count = 0;
  for (int64_t t = blockIdx.x; t < tiles.grid.blocks; t += tiles.blocks) {
    const auto at = thread_pixel<Policy::threads>(tiles.grid, images, pixels / n, groups, static_cast<uint32_t>(t));
    if (at.pixel < 0) continue;
    const int64_t image = at.image, pixel = at.pixel * n;
    const int begin = static_cast<int>(at.channel) * group_classes, left = static_cast<int>(channels) - begin;
    const int end = begin + (left < group_classes ? left : group_classes);
    const auto pointer = [&](const View& view) {
      return reinterpret_cast<In*>(view.data) + ptr_offset(view, image, begin, pixel);
    };
    const In* from = pointer(input.logits);
    In* to = nullptr;
    if constexpr (pass == Pass::backward) to = pointer(out.grad_logits);
    const char* target = input.target.data + ptr_offset(input.target, image, begin, pixel) * target_size;
    int32_t labels[n];
    if constexpr (has_labels) {
      load_labels(labels, input, image, pixel);
#pragma unroll
      for (int k = 0; k < n; ++k) count += labels[k] != label_ignored ? end - begin : 0;
    }
    VEERLOSS_NO_UNROLL
    for (int c = begin; c < end; ++c) {
      T logits[n], results[n];
      load_run(logits, from);
      from += input.logits.stride_channel;
      T outer = T(1);  // what an element of a thread with one pixel is multiplied with
      if constexpr (n == 1) {
        if (input.weight.data)
          outer = load_element<T>(input.weight.data, input.weight.dtype, ptr_offset(input.weight, image, c, pixel));
        if constexpr (pass == Pass::backward)
          if (each) outer *= load_element<T>(out.grad.data, out.grad.dtype, ptr_offset(out.grad, image, c, pixel));
      }
      const auto of_class = factors.of_class(input, grad, c);
      if constexpr (has_labels) {
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const T result = outer * result_of_label<In, pass, square>(logits[k], labels[k] == c, of_class, gamma);
          results[k] = labels[k] >= 0 ? result : without_class<T>(labels[k]);
        }
      } else {
        T values[n];
        bool counts[n];
        load_targets(values, counts, target, input.target.dtype, ignored);
        target += input.target.stride_channel * target_size;
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const T result = outer * result_of_target<In, pass, square>(logits[k], values[k], of_class, gamma);
          results[k] = counts[k] ? result : T(0);
          count += counts[k];
        }
      }
      if constexpr (pass == Pass::backward) {
        store_run(to, results);
        to += out.grad_logits.stride_channel;
      } else {
        if (each)
          store_element(out.loss.data, out.loss.dtype, ptr_offset(out.loss, image, c, pixel), static_cast<double>(results[0]));
        T of_run = results[0];
#pragma unroll
        for (int k = 1; k < n; ++k) of_run += results[k];
        sum += static_cast<double>(of_run);
      }
    }
  }
  if constexpr (pass == Pass::forward)
    if (!each) partials.store(sum, count);
}

// Whether runs of pixels begin where a run of 16 bytes may, in every class of every image.
bool has_runs(const View& view, const Geometry& g, int run) {
  return g.pixels % run == 0 && view.stride_pixel == 1 && is_aligned(view) && (g.images == 1 || view.stride_image % run == 0) &&
         (g.channels == 1 || view.stride_channel % run == 0);
}

template <class Out>
int64_t launch_planes(const SigmoidFocalInput& input, const Out& out, const View* grad_logits, void* scratch, Stream stream) {
  const Geometry& g = input.geometry;
  int64_t blocks = 0;
  const auto call = [&](auto zero, auto square, auto run) {
    const PlaneTiles tiles = plane_tiles(g, run);
    blocks = tiles.tiles.blocks;
    with_flag(input.class_indices, [&](auto has_labels) {
      launch(sigmoid_focal_planes_kernel<decltype(zero), decltype(run)::value, decltype(has_labels)::value,
                                         decltype(square)::value, Out>,
             {.blocks = blocks, .threads = Policy::threads, .stream = stream}, input, out, tiles,
             FocalPartials(scratch, blocks));
    });
  };
  with_sigmoid_kernel(input, [&](auto zero, auto square) {
    using In = decltype(zero);
    if constexpr (!std::is_same_v<In, double>) {
      constexpr int n = run_length<In>;
      const bool runs = out.reduction != Reduction::none && !input.weight.data && has_runs(input.logits, g, n) &&
                        (!grad_logits || has_runs(*grad_logits, g, n)) && has_runs(input.target, g, n) &&
                        (!input.class_indices || is_integer(input.target.dtype));
      if (runs) return call(zero, square, std::integral_constant<int, n>{});
    }
    call(zero, square, std::integral_constant<int, 1>{});
  });
  return blocks;
}

}  // namespace

namespace kernels {

int64_t sigmoid_focal_scratch_bytes(const SigmoidFocalInput&) {
  return FocalPartials(nullptr, Tuning::Focal::max_blocks).bytes;
}

void sigmoid_focal_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream) {
  const int64_t blocks = input.upsample ? launch_sigmoid_low_forward(input, out, stream)
                         : has_sigmoid_rows(input, out.reduction, nullptr)
                             ? launch_sigmoid_rows_forward(input, out, stream)
                             : launch_planes(input, out, nullptr, out.scratch, stream);
  finish_focal_loss(out, blocks, stream);
}

void sigmoid_focal_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream) {
  if (input.upsample)
    launch_sigmoid_low_backward(input, out, stream);
  else if (has_sigmoid_rows(input, out.reduction, &out.grad_logits))
    launch_sigmoid_rows_backward(input, out, stream);
  else
    launch_planes(input, out, &out.grad_logits, nullptr, stream);
}

}  // namespace kernels
}  // namespace veerloss
