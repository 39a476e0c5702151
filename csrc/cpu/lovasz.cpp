// Lovász losses on the CPU, method "exact", registered for the schemas in veerloss/ops.py.
//
// Forward: a pass over tiles turns logits into error keys [C, N, P]; each segment is sorted and scanned (segment.h), which
// overwrites its keys with the signed weights dL/dp. Backward: a pass over tiles takes weights and logits to the gradient.

#include <atomic>
#include <mutex>
#include <tuple>
#include <vector>

#include "segment.h"
#include "vecmath.h"

#define VEERLOSS_TILES "softmax_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "lovasz_tiles.h"
#include "for_each_target.h"

namespace veerloss {
namespace {

// Segments of one call: rows x classes of `length` pixels, row r and class c being keys[(c * rows + r) * length ...].
struct Segments {
  int64_t rows, classes, length;

  // [C, N, P] has the images of a class side by side, so a segment is contiguous whether it is one image or the batch.
  Segments(const Geometry& g, bool per_image)
      : rows(per_image ? g.images : 1), classes(g.channels), length(per_image ? g.pixels : g.images * g.pixels) {
    if (length >= max_segment)
      throw std::invalid_argument(
          "veerloss: a segment (the pixels of the batch, or of an image with per_image) must have less than 2^31");
  }
  int64_t count() const { return rows * classes; }
};

// Images of one pixel fold into one image of many, unless each is a segment of its own.
Geometry segment_geometry(const Tensor& logits, bool per_image) {
  return per_image ? Geometry{logits.size(0), logits.size(1), logits.size(2)} : geometry_of(logits);
}

// f(row, run, buffers) over tiles that do not cross segments; then `merge` takes each thread's buffers, under a lock.
template <class MakeBuffers, class F, class Merge>
void for_each_tile(const Segments& s, int64_t tile, const MakeBuffers& make_buffers, const F& f, const Merge& merge) {
  const int64_t per_row = (s.length + tile - 1) / tile;
  std::mutex mutex;
  parallel_for(s.rows * per_row, [&](int64_t begin, int64_t end) {
    auto buffers = make_buffers();
    for (int64_t k = begin; k < end; ++k) {
      const int64_t row = k / per_row, start = k % per_row * tile;
      f(row, Run{row * s.length + start, std::min(tile, s.length - start)}, buffers);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    merge(buffers);
  });
}

template <class T>
struct Buffers {
  Buffers(int64_t classes, int64_t tile, int64_t counts_)
      : label(tile), counts(counts_), storage(tile * (2 * classes + 3)), x(storage.data()), g(x + classes * tile) {
    maximum = g + classes * tile;
    inverse_sum = maximum + tile;
    rest = inverse_sum + tile;
  }
  std::vector<int32_t> label;
  std::vector<SegmentCounts<T>> counts;  // [rows, classes]
  std::vector<T> storage;
  T *x, *g;                         // [classes][tile]
  T *maximum, *inverse_sum, *rest;  // [tile]
};

enum class Errors { softmax, probabilities, hinge };

// Logits to keys [C, N, P] and counts [rows, classes].
template <class T>
std::vector<SegmentCounts<T>> write_keys(const Tensor& logits, const Tensor& target, const Geometry& g, const Segments& s,
                                         Errors errors, std::optional<int64_t> ignore_index, typename ErrorKey<T>::Word* keys) {
  check_like(target, logits, false, "a target [N, P] for logits [N, C, P]");
  const View x = view_of(logits), y = view_of(target);
  const TargetRule rule{errors == Errors::hinge ? 2 : g.channels, ignore_index.has_value(), ignore_index.value_or(0)};
  const int64_t tile = tile_length(g.channels, sizeof(T), s.length), flat = g.images * g.pixels;
  std::vector<SegmentCounts<T>> counts(s.count());
  BadTarget bad;
  for_each_tile(
      s, tile, [&] { return Buffers<T>(g.channels, tile, s.count()); },
      [&](int64_t row, Run run, Buffers<T>& b) {
        const int64_t n = run.count;
        const int32_t* label = b.label.data();
        load_labels(b.label.data(), y, g, rule, run, bad);
        for (int64_t c = 0; c < g.channels; ++c) load_row(b.x + c * tile, x, g, c, run);
        if (errors == Errors::softmax) {
          VEERLOSS_DISPATCH(SoftmaxTiles::maximum(b.x, g.channels, tile, n, b.maximum));
          VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(b.x, g.channels, tile, n, b.maximum, b.rest, b.inverse_sum));
        }
        for (int64_t c = 0; c < g.channels; ++c) {
          const T* in = b.x + c * tile;
          auto* out = keys + c * flat + run.first;
          SegmentCounts<T>* count = &b.counts[row * s.classes + c];
          const auto cls = static_cast<int32_t>(c);
          if (errors == Errors::softmax)
            VEERLOSS_DISPATCH(LovaszTiles::softmax_keys(in, n, label, cls, b.rest, b.inverse_sum, out, count));
          else if (errors == Errors::probabilities)
            VEERLOSS_DISPATCH(LovaszTiles::probability_keys(in, n, label, cls, out, count));
          else
            VEERLOSS_DISPATCH(LovaszTiles::hinge_keys(in, n, label, out, count));
        }
      },
      [&](const Buffers<T>& b) {
        for (int64_t i = 0; i < s.count(); ++i) counts[i].add(b.counts[i]);
      });
  bad.raise_if_any(y, g, expected_labels(rule, errors == Errors::hinge));
  return counts;
}

// The loss of every segment that `takes_part`, [rows, classes], its keys becoming weights (0 for the other segments).
template <class T>
std::vector<double> segment_losses(typename ErrorKey<T>::Word* keys, const Segments& s, Errors errors,
                                   const std::vector<SegmentCounts<T>>& counts, const std::vector<char>& takes_part,
                                   bool keep) {
  std::vector<double> losses(s.count(), 0.0);
  const auto work = [&](SegmentSorter<T>& sorter, int64_t i) {
    const int64_t row = i / s.classes, c = i % s.classes;
    auto* segment = keys + (c * s.rows + row) * s.length;
    if (takes_part[i])
      losses[i] = sorter.loss(segment, s.length, counts[i], keep);
    else if (keep)
      std::fill_n(segment, s.length, typename ErrorKey<T>::Word(0));
  };
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  // Segments side by side, each thread taking the next one: their lengths after pruning differ. What is left over of long
  // segments is then worked on by all threads together; a parallel region costs about 10 us, so short segments are not worth
  // that.
  constexpr int64_t long_segment = int64_t{1} << 17;
  const int64_t side_by_side = s.length < long_segment ? s.count() : s.count() / threads * threads;
  std::atomic<int64_t> next{0};
  parallel_for(std::min(threads, side_by_side), [&](int64_t, int64_t) {
    SegmentSorter<T> sorter(1, errors == Errors::softmax);
    for (int64_t i; (i = next++) < side_by_side;) work(sorter, i);
  });
  SegmentSorter<T> sorter(threads, errors == Errors::softmax);
  for (int64_t i = side_by_side; i < s.count(); ++i) work(sorter, i);
  return losses;
}

struct Options {
  Errors errors;
  bool per_image;
  std::optional<int64_t> ignore_index;
  Reduction reduction;
  bool keep, wide;
  bool present;          // only classes with foreground
  const char* selected;  // [C] bool, or null for all classes
  std::optional<Tensor> class_weight;
};

// (loss, scale, weights): scale[row, class] is d loss / d (loss of the segment).
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const Options& o) {
  using Word = typename ErrorKey<T>::Word;
  require(logits.dim() == 3, "logits [N, C, P]");
  const Geometry g = segment_geometry(logits, o.per_image);
  const Segments s(g, o.per_image);
  const std::vector<int64_t> shape = o.errors == Errors::hinge
                                         ? (o.per_image ? std::vector<int64_t>{s.rows} : std::vector<int64_t>{})
                                     : o.per_image ? std::vector<int64_t>{s.rows, s.classes}
                                                   : std::vector<int64_t>{s.classes};
  Tensor keys =
      with_huge_pages(torch::stable::new_empty(logits, {logits.size(1), logits.size(0), logits.size(2)}, scalar_type_of<T>()));
  Tensor loss = torch::stable::new_empty(logits, o.reduction == Reduction::none ? shape : std::vector<int64_t>{},
                                         loss_type<T>(logits, o.wide));
  Tensor scale = torch::stable::new_empty(logits, shape, scalar_type_of<T>());

  auto* words = static_cast<Word*>(keys.data_ptr());
  const auto counts = write_keys<T>(logits, target, g, s, o.errors, o.ignore_index, words);
  std::vector<char> takes_part(s.count());
  for (int64_t i = 0; i < s.count(); ++i)
    takes_part[i] =
        counts[i].valid > 0 && (!o.selected || o.selected[i % s.classes]) && (!o.present || counts[i].foreground > 0);
  const std::vector<double> losses = segment_losses<T>(words, s, o.errors, counts, takes_part, o.keep);

  const T* class_weight =
      o.class_weight ? arithmetic_data<T>(*o.class_weight, s.classes, "class_weight with one value per class, contiguous")
                     : nullptr;
  double sum = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    const auto in_mean = std::count(&takes_part[row * s.classes], &takes_part[row * s.classes] + s.classes, 1);
    for (int64_t c = 0; c < s.classes; ++c) {
      const int64_t i = row * s.classes + c;
      double factor = takes_part[i] ? (class_weight ? static_cast<double>(class_weight[c]) : 1.0) : 0.0;
      if (o.reduction == Reduction::mean && takes_part[i]) factor /= static_cast<double>(in_mean * s.rows);
      const double value = takes_part[i] ? factor * losses[i] : 0.0;
      sum += value;
      write_element(scale, i, factor);
      if (o.reduction == Reduction::none) write_element(loss, i, value);
    }
  }
  if (o.reduction != Reduction::none) write_element(loss, 0, sum);
  return {loss, scale, o.keep ? keys : torch::stable::new_empty(logits, {0}, scalar_type_of<T>())};
}

// The gradient of the logits or probabilities from the signed weights.
template <class T>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale, Errors errors,
                bool per_image, Reduction reduction) {
  const Geometry g = segment_geometry(logits, per_image);
  const Segments s(g, per_image);
  const int64_t flat = g.images * g.pixels, tile = tile_length(2 * g.channels, sizeof(T), s.length);
  require(scale.is_contiguous() && scale.numel() == s.count(), "the scale of the forward pass");
  require(grad.numel() == (reduction == Reduction::none ? s.count() : 1), "a gradient of the shape of the loss");
  std::vector<T> factor(s.count());
  load_row(factor.data(), element_view(scale), {1, 1, s.count()}, 0, {0, s.count()});
  const Tensor incoming = torch::stable::contiguous(grad);
  for (int64_t i = 0; i < s.count(); ++i) {
    T value;
    load_row(&value, element_view(incoming), {1, 1, incoming.numel()}, 0, {reduction == Reduction::none ? i : 0, 1});
    factor[i] *= value;
  }
  Tensor grad_logits = with_huge_pages(torch::stable::empty_like(logits));
  const View x = view_of(logits), out = view_of(grad_logits);
  const T* weight = arithmetic_data<T>(weights, flat * g.channels, "the weights of a forward pass with keep=True");
  for_each_tile(
      s, tile, [&] { return Buffers<T>(g.channels, tile, 0); },
      [&](int64_t row, Run run, Buffers<T>& b) {
        const int64_t n = run.count;
        for (int64_t c = 0; c < g.channels; ++c) {
          T *x_row = b.x + c * tile, *g_row = b.g + c * tile;
          std::copy_n(weight + c * flat + run.first, n, g_row);
          if (errors != Errors::hinge) load_row(x_row, x, g, c, run);
          if (errors == Errors::probabilities) VEERLOSS_DISPATCH(LovaszTiles::sign_outside(x_row, g_row, n));
          VEERLOSS_DISPATCH(LovaszTiles::scale(g_row, n, factor[row * s.classes + c]));
        }
        if (errors == Errors::softmax) {
          VEERLOSS_DISPATCH(SoftmaxTiles::maximum(b.x, g.channels, tile, n, b.maximum));
          VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(b.x, g.channels, tile, n, b.maximum, b.rest, b.inverse_sum));
          VEERLOSS_DISPATCH(
              LovaszTiles::softmax_gradient(b.x, b.g, g.channels, tile, n, b.inverse_sum, b.maximum, b.rest, b.label.data()));
        }
        const T* gradient = errors == Errors::softmax ? b.x : b.g;
        for (int64_t c = 0; c < g.channels; ++c) store_row(gradient + c * tile, out, g, c, run);
      },
      [](const Buffers<T>&) {});
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor> lovasz_softmax_forward(const Tensor& logits, const Tensor& target,
                                                          std::optional<Tensor> selected, bool present, bool per_image,
                                                          std::optional<Tensor> class_weight,
                                                          std::optional<int64_t> ignore_index, bool from_logits,
                                                          int64_t reduction, bool keep, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);

    require(!selected || (selected->is_cpu() && selected->is_contiguous() && selected->numel() == logits.size(1) &&
                          dtype_of(*selected) == DType::u8),
            "selected with one bool per class, contiguous");
    return forward<T>(
        logits, target,
        {from_logits ? Errors::softmax : Errors::probabilities, per_image, ignore_index, static_cast<Reduction>(reduction),
         keep, wide, present, selected ? static_cast<const char*>(selected->data_ptr()) : nullptr, class_weight});
  });
}

Tensor lovasz_softmax_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale,
                               bool per_image, bool from_logits, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return backward<decltype(zero)>(grad, logits, weights, scale, from_logits ? Errors::softmax : Errors::probabilities,
                                    per_image, static_cast<Reduction>(reduction));
  });
}

std::tuple<Tensor, Tensor, Tensor> lovasz_hinge_forward(const Tensor& logits, const Tensor& target, bool per_image,
                                                        std::optional<int64_t> ignore_index, int64_t reduction, bool keep,
                                                        bool wide) {
  require(logits.dim() == 3 && logits.size(1) == 1, "logits [N, 1, P]");
  return with_arithmetic_type(logits, [&](auto zero) {
    return forward<decltype(zero)>(
        logits, target,
        {Errors::hinge, per_image, ignore_index, static_cast<Reduction>(reduction), keep, wide, false, nullptr, std::nullopt});
  });
}

Tensor lovasz_hinge_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale,
                             bool per_image, int64_t reduction) {
  return with_arithmetic_type(logits, [&](auto zero) {
    return backward<decltype(zero)>(grad, logits, weights, scale, Errors::hinge, per_image, static_cast<Reduction>(reduction));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(veerloss, CPU, m) {
  m.impl("lovasz_softmax_forward", TORCH_BOX(&lovasz_softmax_forward));
  m.impl("lovasz_softmax_backward", TORCH_BOX(&lovasz_softmax_backward));
  m.impl("lovasz_hinge_forward", TORCH_BOX(&lovasz_hinge_forward));
  m.impl("lovasz_hinge_backward", TORCH_BOX(&lovasz_hinge_backward));
}

}  // namespace veerloss
