// Lovász losses on a GPU, method "exact": kernels::lovasz_exact_forward and _backward of kernels.h.
//
//   keys      the error of every pixel in every class as an integer of the same order, [C, N, P]; foreground is counted
//   count     the digits of the keys of a group of segments
//   sort      by one digit after another, from the lowest on, each key with the index of its pixel (sort.cuh)
//   weigh     the last digit, after which no pair is moved any more: where it would go is its rank. With the foreground before
//             it this is the weight in closed form, which is written to the pixel, over the keys
//   finish    the losses of the segments, and of the batch (segments.cuh)
//   backward  gradient.cuh, with stored weights
//
// Background whose error is below the least of its segment's foreground has weight 0: only the first digit's pass sees it.
//
// Bytes of memory for each element in float32, S of them being sorted: keys 8, count 4, sort 4 + 8 S + 2 * 16 S, weigh 12 S,
// backward 12. 80 in all if S = 1, where a radix sort of as many pairs by itself is 4 + 4 * 16 = 68; 28 as S nears 0. One sort
// by CUB with the segment above the key has a fifth digit, which makes 124; a sort for each segment 100, and hundreds of
// launches. Instructions on sm_90: count 28, sort 115 + 2 * 91, weigh 170; of a radix sort by itself, CUB's, some 415.
//
// Besides the keys, which become the weights, there is memory to sort one group. Every sum has a fixed order and sorts are
// stable: the results are the same bits in every run.

#include "../gradient.cuh"
#include "exact_sort.cuh"
#include "segments.cuh"

namespace veerloss {
namespace {

// One block for each segment; `group`: all of them.
template <class T>
__global__ void __launch_bounds__(Tuning::ExactSegment::threads)
    lovasz_segment_kernel(SortGroup<T> group, SegmentResult* results) {
  constexpr int threads = Tuning::ExactSegment::threads;
  __shared__ double scratch[threads];
  const int64_t k = blockIdx.x, segment = group.segment(k);
  const int64_t tiles = ceil_div(group.sorted[k], SortTile<KeyWord<T>>::size);
  double loss = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += threads) loss += group.tile_losses[k * group.tiles + tile];
  loss = block_sum<threads>(loss, scratch);
  if (threadIdx.x != 0) return;
  results[segment] = {.loss = group.totals.unranked[segment] ? not_a_number : loss,
                      .takes_part = group.totals.takes_part(segment)};
}

// ---- backward

// The weights of a forward pass.
template <class T>
struct StoredWeights : FactorTerm<T> {
  static constexpr bool reads_label = false;  // the weights already depend on it
  static constexpr bool at_full_size = true;
  using Exp = LogitExp;

  explicit StoredWeights(const LovaszExactBackward& args) : weights(static_cast<const T*>(args.weights)) {}

  __device__ auto of_pixel(const SegmentBatch& b, int64_t image, int64_t pixel, int first, int32_t, const Softmax<T>&) const {
    const int64_t plane = b.geometry.images * b.geometry.pixels;
    return [at = weights + first * plane + image * b.geometry.pixels + pixel, plane](int k, T, T factor) {
      return at[k * plane] * factor;
    };
  }
  template <Errors errors>
  __device__ auto of_segment(const SegmentBatch& b, int64_t, int64_t c) const {
    const T* const plane = weights + c * b.geometry.images * b.geometry.pixels;
    return [plane](int64_t index, bool, T) { return plane[index]; };
  }

  const T* weights;  // [C, N, P]
};

template <class T>
using StoredWeightsWithTerms = WithTerms<StoredWeights<T>>;

// ---- forward

template <class T>
struct ExactScratch {
  ExactScratch(const LovaszExactForward& args, void* memory) : ExactScratch(args.batch, args.selection, memory) {}

  ExactScratch(const SegmentBatch& b, const SegmentSelection& selection, void* memory) {
    using Word = KeyWord<T>;
    ScratchArrays arrays(memory);
    SegmentTotals<T>& totals = group.totals;
    totals.classes = b.classes();
    totals.selection = selection;
    totals.foreground = arrays.take<int32_t>(b.segments());
    totals.reach = arrays.take<Word>(b.segments());
    totals.unranked = arrays.take<int32_t>(b.segments());
    totals.rows = arrays.take<RowCounts>(b.rows());
    group.sorted = arrays.take<uint32_t>(b.segments());
    zeroed_bytes = arrays.bytes();
    results = arrays.take<SegmentResult>(b.segments());

    constexpr int64_t states_of_tile = digits * ((SortWord<Word>::passes - 1) * sizeof(Place) + sizeof(RankedPlace));
    constexpr int64_t bytes_of_pair = 2 * sizeof(Pair<Word>) + ceil_div(states_of_tile, SortTile<Word>::size);
    const int64_t gradient = b.segments() * b.length() * size_of(b.logits.dtype);
    const int64_t buffers = gradient < SortPolicy::min_bytes   ? SortPolicy::min_bytes
                            : gradient > SortPolicy::max_bytes ? SortPolicy::max_bytes
                                                               : gradient;
    group.length = b.length();
    group.tiles = ceil_div(b.length(), SortTile<Word>::size);
    group.rows = b.rows();
    group.tile_losses = arrays.take<double>(b.segments() * group.tiles);
    const int64_t fit = buffers / (bytes_of_pair * (b.length() > 0 ? b.length() : 1));
    const int64_t segments = group.segments = fit < 1 ? 1 : fit < b.segments() ? fit : b.segments();
    const int64_t pairs = segments * b.length(), states = segments * group.tiles * digits;
    for (Pair<Word>*& buffer : group.buffers) buffer = arrays.take<Pair<Word>>(pairs);
    const int64_t before = arrays.bytes();
    group.tickets = arrays.take<uint32_t>(SortWord<Word>::passes);
    group.counts = arrays.take<uint32_t>(segments * SortGroup<T>::counted * digits);
    group.states = arrays.take<Place>((SortWord<Word>::passes - 1) * states);
    group.ranked = arrays.take<RankedPlace>(states);
    bytes = arrays.bytes();
    group_zeroed_bytes = bytes - before;
  }

  SortGroup<T> group;
  SegmentResult* results;
  int64_t zeroed_bytes, group_zeroed_bytes, bytes;
};

template <class In, Errors errors>
void launch_keys(const SegmentBatch& b, KeyWord<opmath_t<In>>* keys, const SegmentTotals<opmath_t<In>>& totals, Stream stream) {
  using Policy = Tuning::ExactKeys;
  // A block counts foreground for one row.
  const PixelGrid grid = pixel_grid<Policy::threads>(b.geometry.images, b.geometry.pixels, !b.per_image);
  const bool count_in_shared = b.classes() <= Policy::max_shared_classes;
  const int64_t shared_bytes = count_in_shared ? b.classes() * ClassTotals<opmath_t<In>>::bytes_of_class : 0;
  const auto run = [&](auto range) {
    launch(lovasz_keys_kernel<In, errors, decltype(range)>,
           {.blocks = grid.blocks, .threads = Policy::threads, .stream = stream, .shared_bytes = shared_bytes}, b, keys, totals,
           grid, count_in_shared);
  };
  if constexpr (errors == Errors::softmax)
    with_class_range<In>(b.classes(), run);
  else
    run(ManyClasses{});
}

template <class In, Errors errors>
void forward(const LovaszExactForward& args) {
  using T = opmath_t<In>;
  constexpr int threads = SortPolicy::threads, passes = SortWord<KeyWord<T>>::passes;
  const SegmentBatch& b = args.batch;
  const ExactScratch<T> s(args, args.scratch);
  zero_memory(args.scratch, s.zeroed_bytes, args.stream);
  auto* const keys = static_cast<KeyWord<T>*>(args.keys);
  launch_keys<In, errors>(b, keys, s.group.totals, args.stream);
  for (int64_t first = 0; first < b.segments(); first += s.group.segments) {
    const int64_t segments = first + s.group.segments < b.segments() ? s.group.segments : b.segments() - first;
    SortGroup<T> group = s.group;
    group.first = first;
    group.sorted += first;
    group.tile_losses += first * group.tiles;
    group.keys = keys + first * b.length();
    group.weights = args.keep_weights ? static_cast<T*>(args.keys) + first * b.length() : nullptr;
    const Launch tiles{.blocks = segments * group.tiles, .threads = threads, .stream = args.stream};
    zero_memory(group.tickets, s.group_zeroed_bytes, args.stream);
    const int64_t chunks = ceil_div(b.length(), SortPolicy::chunk);
    launch(lovasz_digits_kernel<T>, {.blocks = segments * chunks, .threads = threads, .stream = args.stream}, group, chunks);
    launch(lovasz_sort_kernel<T, true>, tiles, group, 0);
    for (int pass = 1; pass < passes - 1; ++pass) launch(lovasz_sort_kernel<T, false>, tiles, group, pass);
    launch(lovasz_weigh_kernel<T, errors == Errors::softmax>, tiles, group);
  }
  launch(lovasz_segment_kernel<T>, {.blocks = b.segments(), .threads = Tuning::ExactSegment::threads, .stream = args.stream},
         s.group, s.results);
  launch_finish<T>(b, SegmentResults{s.results}, args.out, args.stream);
}

}  // namespace

namespace kernels {

int64_t lovasz_exact_scratch_bytes(const SegmentBatch& batch) {
  return with_opmath_type(batch.logits.dtype,
                          [&](auto zero) { return ExactScratch<decltype(zero)>(batch, {}, nullptr).bytes; });
}

void lovasz_exact_forward(const LovaszExactForward& args) {
  if (args.batch.upsample) throw std::runtime_error("veerloss: on a GPU upsample of a Lovasz loss is for method 'histogram'");
  with_element_type(args.batch.logits.dtype, [&](auto zero) {
    with_errors(args.batch.errors, [&](auto errors) { forward<decltype(zero), decltype(errors)::value>(args); });
  });
  if (!args.terms.any()) return;
  check_terms(args.batch, args.terms.focal);
  sum_focal_term(args.batch, args.terms, args.scratch, args.stream);  // which is free again, and large
  sum_region_term(args.batch, args.terms, args.stream);
}

void lovasz_exact_backward(const LovaszExactBackward& args) {
  if (args.batch.upsample) throw std::runtime_error("veerloss: on a GPU upsample of a Lovasz loss is for method 'histogram'");
  if (!args.terms.any()) return launch_gradient<StoredWeights>(args);
  launch_gradient_with_terms<StoredWeightsWithTerms>(args);
}

}  // namespace kernels
}  // namespace veerloss
