// Lovász losses on a GPU, method "histogram": counts to the table of each segment, with one block for each.

#include "histogram_place.cuh"

namespace veerloss {
namespace {

template <class Count>
__global__ void __launch_bounds__(BinsPolicy::threads, 1) lovasz_place_kernel(LovaszHistogramPlace args) {
  __shared__ BinPair table[BinLayout::table];
  __shared__ PlaceScratch scratch;
  const int64_t segment = blockIdx.x;
  const auto bins = static_cast<int>(args.counted_bins);
  load_table(args.counted_table ? args.counted_table + segment * BinLayout::table : nullptr, table);
  const Count* bg = static_cast<const Count*>(args.counts.data) + segment * 2 * bins;
  place_segment(bg, bg + bins, BinMap{table}, bins, args.errors, args.sampled, static_cast<int>(args.bins),
                args.table + segment * BinLayout::table, scratch);
}

}  // namespace

void kernels::lovasz_histogram_place(const LovaszHistogramPlace& args) {
  with_count_type(args.counts, [&](auto zero) {
    launch(lovasz_place_kernel<decltype(zero)>,
           {.blocks = args.segments, .threads = BinsPolicy::threads, .stream = args.stream}, args);
  });
}

}  // namespace veerloss
