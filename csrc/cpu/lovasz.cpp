// Lovász losses on the CPU, method "exact", registered for the schemas in veerloss/ops.py.
//
// Forward: a pass over tiles turns logits into error keys [C, N, P]; each segment is sorted and scanned (segment.h), which
// overwrites its keys with the signed weights dL/dp. Backward: a pass over tiles takes weights and logits to the gradient.

#include <atomic>
#include <mutex>
#include <tuple>
#include <vector>

#include "lovasz_segments.h"
#include "segment.h"
#include "vecmath.h"

#define VEERLOSS_TILES "softmax_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "exact_tiles.h"
#include "for_each_target.h"
#define VEERLOSS_TILES "lovasz_tiles.h"
#include "for_each_target.h"

namespace veerloss {
namespace {

template <class T>
struct Buffers : TileRows<T> {
  Buffers(int64_t classes, int64_t tile, int64_t segments) : TileRows<T>(classes, tile, false), counts(segments) {}
  std::vector<SegmentCounts<T>> counts;  // [rows, classes]
};

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
          VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(b.x, tile, b.x, g.channels, tile, n, b.maximum, b.rest, b.inverse_sum));
        }
        for (int64_t c = 0; c < g.channels; ++c) {
          const T* in = b.x + c * tile;
          auto* out = keys + c * flat + run.first;
          SegmentCounts<T>* count = &b.counts[row * s.classes + c];
          const auto cls = static_cast<int32_t>(c);
          if (errors == Errors::softmax)
            VEERLOSS_DISPATCH(ExactTiles::softmax_keys(in, n, label, cls, b.rest, b.inverse_sum, out, count));
          else if (errors == Errors::probabilities)
            VEERLOSS_DISPATCH(ExactTiles::probability_keys(in, n, label, cls, out, count));
          else
            VEERLOSS_DISPATCH(ExactTiles::hinge_keys(in, n, label, out, count));
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

// (loss, scale, weights): scale[row, class] is d loss / d (loss of the segment).
template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const Options& o) {
  using Word = typename ErrorKey<T>::Word;
  require(logits.dim() == 3, "logits [N, C, P]");
  const Geometry g = segment_geometry(logits, o.per_image);
  const Segments s(g, o.per_image);
  Tensor keys =
      with_huge_pages(torch::stable::new_empty(logits, {logits.size(1), logits.size(0), logits.size(2)}, scalar_type_of<T>()));
  auto* words = static_cast<Word*>(keys.data_ptr());
  const auto counts = write_keys<T>(logits, target, g, s, o.errors, o.ignore_index, words);
  std::vector<char> takes_part(s.count());
  for (int64_t i = 0; i < s.count(); ++i)
    takes_part[i] = o.take_part(i % s.classes, counts[i].valid > 0, counts[i].foreground > 0);
  const std::vector<double> losses = segment_losses<T>(words, s, o.errors, counts, takes_part, o.keep);
  const auto [loss, scale] = reduce_segments<T>(logits, s, o, losses, takes_part);
  return {loss, scale, o.keep ? keys : torch::stable::new_empty(logits, {0}, scalar_type_of<T>())};
}

// The gradient of the logits or probabilities from the signed weights.
template <class T>
Tensor backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& scale, Errors errors,
                bool per_image, Reduction reduction) {
  const Geometry g = segment_geometry(logits, per_image);
  const Segments s(g, per_image);
  const int64_t flat = g.images * g.pixels, tile = tile_length(2 * g.channels, sizeof(T), s.length);
  const std::vector<T> factor = segment_factors<T>(grad, scale, s, reduction);
  Tensor grad_logits = with_huge_pages(torch::stable::empty_like(logits));
  const View x = view_of(logits), out = view_of(grad_logits);
  const T* weight = arithmetic_data<T>(weights, flat * g.channels, "the weights of a forward pass with keep=True");
  for_each_tile(
      s, tile, [&] { return TileRows<T>(g.channels, tile, true); },
      [&](int64_t row, Run run, TileRows<T>& b) {
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
          VEERLOSS_DISPATCH(SoftmaxTiles::exponentials(b.x, tile, b.x, g.channels, tile, n, b.maximum, b.rest, b.inverse_sum));
          VEERLOSS_DISPATCH(LovaszTiles::begin_gradient(n, b.pivot, b.others, b.weighted.data()));
          for (int64_t c = 0; c < g.channels; ++c)
            VEERLOSS_DISPATCH(
                LovaszTiles::accumulate_gradient(b.x + c * tile, b.g + c * tile, n, b.pivot, b.others, b.weighted.data()));
          VEERLOSS_DISPATCH(LovaszTiles::end_gradient(n, b.rest, b.inverse_sum, b.pivot, b.others));
        }
        for (int64_t c = 0; c < g.channels; ++c) {
          T *x_row = b.x + c * tile, *g_row = b.g + c * tile;
          T* const in_place = errors == Errors::softmax ? row_in_place<T>(out, g, c, run) : nullptr;
          if (errors == Errors::softmax)
            VEERLOSS_DISPATCH(LovaszTiles::softmax_gradient(x_row, g_row, n, b.inverse_sum, b.pivot, b.others,
                                                            b.weighted.data(), in_place ? in_place : g_row));
          if (!in_place) store_row(g_row, out, g, c, run);
        }
      },
      [](const TileRows<T>&) {});
  return grad_logits;
}

std::tuple<Tensor, Tensor, Tensor> lovasz_softmax_forward(const Tensor& logits, const Tensor& target,
                                                          std::optional<Tensor> selected, bool present, bool per_image,
                                                          std::optional<Tensor> class_weight,
                                                          std::optional<int64_t> ignore_index, bool from_logits,
                                                          int64_t reduction, bool keep, bool wide) {
  return with_arithmetic_type(logits, [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(logits, target,
                      {from_logits ? Errors::softmax : Errors::probabilities, per_image, ignore_index,
                       static_cast<Reduction>(reduction), keep, wide, present, class_flags(selected, logits), class_weight});
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
