// Sigmoid focal loss of elements that lie in one run of memory, the classes of a pixel next to each other: channels_last,
// points [P, C], and everything that is alike in all classes. Threads take 16 bytes of logits at a time, whatever pixels these
// are of. The labels of a tile wait in shared memory.

#include "focal_sigmoid.cuh"

namespace veerloss {
namespace {

using Policy = Tuning::SigmoidRows;

// What a kernel is compiled for, besides types: targets of elements, without regard to their classes or with an alpha for each
// class, or labels.
enum class Targets { values, values_by_class, labels };

// Pixels of all images, as one sequence.
struct RowTiles {
  int64_t pixels, tiles;
  int tile_pixels, classes;
  uint32_t blocks;
};

RowTiles row_tiles(const Geometry& g, bool labels) {
  const auto classes = static_cast<int>(g.channels);
  // A multiple of the elements of a run: tiles then begin where a run may.
  int64_t pixels = Policy::tile_elements / (classes > 0 ? classes : 1) / Policy::run * Policy::run;
  if (pixels < Policy::run) pixels = Policy::run;
  if (labels && pixels > Policy::max_tile_labels) pixels = Policy::max_tile_labels;
  const int64_t all = classes > 0 ? g.images * g.pixels : 0, tiles = ceil_div(all, pixels), most = Tuning::Focal::max_blocks;
  return {all, tiles, static_cast<int>(pixels), classes, static_cast<uint32_t>(tiles < most ? tiles : most)};
}

// The pixel and the class of an element of a tile.
struct ElementPlace {
  int pixel, c;

  __device__ ElementPlace(int element, int classes)
      : pixel(static_cast<int>(static_cast<uint32_t>(element) / static_cast<uint32_t>(classes))),
        c(element - pixel * classes) {}

  __device__ void skip(const ElementPlace& distance, int classes) {
    pixel += distance.pixel;
    c += distance.c;
    if (c < classes) return;
    c -= classes;
    ++pixel;
  }
};

// Where a run of elements begins: a pointer takes the place of the index of an element, and of its product with a size.
template <class In>
struct RunPointers {
  const In* logits;
  const char* target;
  In* gradient;

  __device__ void skip(int elements, int64_t target_size) {
    logits += elements;
    target += elements * target_size;
    gradient += elements;
  }
};

template <class In, Targets targets, bool square, class Out>
__global__ void __launch_bounds__(Policy::threads, Policy::min_blocks(square, targets == Targets::values_by_class))
    sigmoid_focal_rows_kernel(SigmoidFocalInput input, Out out, RowTiles tiles, FocalPartials partials) {
  using T = opmath_t<In>;
  constexpr Pass pass = pass_of<Out>;
  constexpr int threads = Policy::threads, n = run_length<In>;
  constexpr bool has_labels = targets == Targets::labels, by_class = targets != Targets::values;
  const int classes = tiles.classes;
  const T gamma = static_cast<T>(input.gamma);
  T grad = T(1);
  if constexpr (pass == Pass::backward) grad = gradient_of_sum<T>(out);
  const SigmoidFactors<T> factors(input, grad);
  const IgnoredValue ignored(input.rule);
  const int64_t target_size = size_of(input.target.dtype);
  const ElementPlace stride(by_class ? threads * n : 0, classes);
  const int own = static_cast<int>(threadIdx.x);
  __shared__ int32_t labels[has_labels ? Policy::max_tile_labels + 1 : 1];
  double sum = 0;
  int32_t count = 0;

  const auto run = [&](auto length, const RunPointers<In>& pointers, ElementPlace at) {
    constexpr int m = length;
    T logits[m], results[m];
    load_run(logits, pointers.logits);
    if constexpr (has_labels) {
      int32_t label = labels[at.pixel];
#pragma unroll
      for (int k = 0; k < m; ++k) {
        const T result =
            result_of_label<In, pass, square>(logits[k], label == at.c, factors.of_class(input, grad, at.c), gamma);
        results[k] = label >= 0 ? result : without_class<T>(label);
        if (++at.c == classes) {
          at.c = 0;
          label = labels[++at.pixel];  // after the last pixel: not used
        }
      }
    } else {
      T values[m];
      bool counts[m];
      load_targets(values, counts, pointers.target, input.target.dtype, ignored);
#pragma unroll
      for (int k = 0; k < m; ++k) {
        auto of_element = factors;
        if constexpr (by_class) {
          of_element = factors.of_class(input, grad, at.c);
          at.c = at.c + 1 == classes ? 0 : at.c + 1;
        }
        const T result = result_of_target<In, pass, square>(logits[k], values[k], of_element, gamma);
        results[k] = counts[k] ? result : T(0);
        count += counts[k];
      }
    }
    if constexpr (pass == Pass::backward) {
      store_run(pointers.gradient, results);
    } else {
      T of_run = results[0];
#pragma unroll
      for (int k = 1; k < m; ++k) of_run += results[k];
      sum += static_cast<double>(of_run);
    }
  };

  const auto pointers_to = [&](int64_t element) {
    RunPointers<In> found{reinterpret_cast<const In*>(input.logits.data) + element, nullptr, nullptr};
    if constexpr (!has_labels) found.target = input.target.data + element * target_size;
    if constexpr (pass == Pass::backward) found.gradient = reinterpret_cast<In*>(out.grad_logits.data) + element;
    return found;
  };

  int64_t first = 0;  // element of the tile, and then of the last one
  int elements = 0;
  for (int64_t tile = blockIdx.x; tile < tiles.tiles; tile += tiles.blocks) {
    const int64_t first_pixel = tile * tiles.tile_pixels, left = tiles.pixels - first_pixel;
    const int pixels = left < tiles.tile_pixels ? static_cast<int>(left) : tiles.tile_pixels;
    first = first_pixel * classes;
    elements = pixels * classes;
    if constexpr (has_labels) {
      __syncthreads();  // those of the tile before have been read
      VEERLOSS_NO_UNROLL
      for (int i = own; i < pixels; i += threads) {
        const int32_t label = load_integer_label(input.target, input.rule, 0, first_pixel + i);
        labels[i] = label;
        count += label != label_ignored ? classes : 0;
      }
      __syncthreads();
    }
    RunPointers<In> pointers = pointers_to(first + own * n);
    ElementPlace at(by_class ? own * n : 0, classes);
    VEERLOSS_NO_UNROLL
    for (int element = own * n; element + n <= elements; element += threads * n) {
      run(std::integral_constant<int, n>{}, pointers, at);
      pointers.skip(threads * n, target_size);
      if constexpr (by_class) at.skip(stride, classes);
    }
  }
  // The last tile of all may have some elements more.
  if (const int rest = elements % n; own < rest) {
    const int element = elements - rest + own;
    run(std::integral_constant<int, 1>{}, pointers_to(first + element), ElementPlace(by_class ? element : 0, classes));
  }
  if constexpr (pass == Pass::forward) partials.store(sum, count);
}

template <class Out>
int64_t launch_rows(const SigmoidFocalInput& input, const Out& out, void* scratch, Stream stream) {
  const RowTiles tiles = row_tiles(input.geometry, input.class_indices);
  const auto call = [&](auto zero, auto square, auto targets) {
    using In = decltype(zero);
    if constexpr (!std::is_same_v<In, double>)
      launch(sigmoid_focal_rows_kernel<In, decltype(targets)::value, decltype(square)::value, Out>,
             {.blocks = tiles.blocks, .threads = Policy::threads, .stream = stream}, input, out, tiles,
             FocalPartials(scratch, tiles.blocks));
  };
  with_sigmoid_kernel(input, [&](auto zero, auto square) {
    if (input.class_indices) return call(zero, square, std::integral_constant<Targets, Targets::labels>{});
    if (input.class_alpha) return call(zero, square, std::integral_constant<Targets, Targets::values_by_class>{});
    call(zero, square, std::integral_constant<Targets, Targets::values>{});
  });
  return tiles.blocks;
}

// Whether the elements are one run of memory that begins where a run of 16 bytes may, pixel by pixel.
bool is_run(const View& view, const Geometry& g) {
  return (g.channels == 1 || view.stride_channel == 1) && (g.pixels == 1 || view.stride_pixel == g.channels) &&
         (g.images == 1 || view.stride_image == g.channels * g.pixels) && is_aligned(view);
}

}  // namespace

bool has_sigmoid_rows(const SigmoidFocalInput& input, Reduction reduction, const View* grad_logits) {
  const Geometry& g = input.geometry;
  if (reduction == Reduction::none || input.weight.data || input.logits.dtype == DType::f64) return false;
  if (g.channels > Policy::max_classes || !is_run(input.logits, g)) return false;
  if (grad_logits && !is_run(*grad_logits, g)) return false;
  if (!input.class_indices) return is_run(input.target, g);
  const bool images_follow = g.images == 1 || input.target.stride_image == g.pixels * input.target.stride_pixel;
  return is_integer(input.target.dtype) && images_follow;
}

int64_t launch_sigmoid_rows_forward(const SigmoidFocalInput& input, const FocalLoss& out, Stream stream) {
  return launch_rows(input, out, out.scratch, stream);
}
void launch_sigmoid_rows_backward(const SigmoidFocalInput& input, const FocalGradient& out, Stream stream) {
  launch_rows(input, out, nullptr, stream);
}

}  // namespace veerloss
