// Scalar maths of method "histogram" of the Lovász losses: coordinates of errors, bins, and the weights of the pixels in them.
// layout.h describes a segment's window, cells and bins.
//
// The weight of a pixel depends only on how many foreground and background pixels have a larger error, so pixels are counted by
// error instead of sorted. Any order of the pixels inside a bin gives a subgradient of the loss of the rounded errors; the
// weights here are the mean of "foreground first" and "background first", and still add up to the bin's increment of J.
#pragma once

#include "jaccard.h"

namespace veerloss {

// The weights of one pixel in a bin.
struct JaccardBin {
  double fg, bg;
};

// A bin of `fg` and `bg` pixels, with fg_before and bg_before pixels in the bins of larger errors: integers. total > 0.
VEERLOSS_HD JaccardBin jaccard_bin(double total, double fg_before, double bg_before, double fg, double bg) {
  const double left = total - fg_before, first = total + bg_before, last = first + bg;
  JaccardBin bin;
  bin.fg = 0.5 * (1.0 / first + 1.0 / last);
  bin.bg = (left - 0.5 * fg) / (first * last);
  return bin;
}

// Upper bounds on the sum over a bin's pixels of |weight of jaccard_bin - exact weight|, whatever their order: over the
// foreground and over the background.
//
// The exact weight of a foreground pixel lies between those of the two ends. That of a background pixel with j others of its
// bin before it lies between left / ((first + j)(first + j + 1)) and the same with left - fg. The former is further from bin.bg
// while (first + j)(first + j + 1) <= first * last, the latter from there on; both sums telescope.
struct JaccardBound {
  double fg, bg;
};

VEERLOSS_HD JaccardBound jaccard_bin_bound(double total, double fg_before, double bg_before, double fg, double bg) {
  const double left = total - fg_before, first = total + bg_before, last = first + bg;
  const double weight = (left - 0.5 * fg) / (first * last);
  using std::sqrt;
  const double root = 0.5 * (sqrt(1.0 + 4.0 * first * last) - 1.0);                   // first - 1/2 < root < last
  const double turn = static_cast<double>(static_cast<int32_t>(root - first + 1.0));  // 0 <= turn <= bg
  JaccardBound bound;
  bound.fg = 0.5 * fg * bg / (first * last);
  bound.bg = turn * (left / (first * (first + turn)) - weight) + (bg - turn) * (weight - (left - fg) / ((first + turn) * last));
  return bound;
}

// The lowest bin of a softmax, where all foreground that is left lies: "foreground first", in which background has weight 0,
// for most of that foreground is just below the window, most of the background far below it.
VEERLOSS_HD JaccardBin jaccard_lowest_bin(double total, double bg_before) {
  return {1.0 / (total + bg_before), 0.0};
}
VEERLOSS_HD JaccardBound jaccard_lowest_bound(double total, double bg_before, double fg, double bg) {
  const double first = total + bg_before, bound = fg * bg / (first * (first + bg));
  return {bound, bound};
}

// Estimated errors of binning, as sums of squares over the pixels of a bin: `gradient` of weight times `slope` (the derivative
// of the error, see slope_of_error), `loss` of weight times error where errors are uniform over the bin's width. `weights` is
// the sum of the squared weights times slope, which makes the former relative.
struct JaccardDeviation {
  double gradient, loss, weights;
};

VEERLOSS_HD JaccardDeviation jaccard_bin_deviation(JaccardBin bin, JaccardBound bound, double fg, double bg, double slope,
                                                   double width) {
  const double square = fg * bin.fg * bin.fg + bg * bin.bg * bin.bg;
  const double f = fg > 0.0 ? fg : 1.0, b = bg > 0.0 ? bg : 1.0;
  JaccardDeviation deviation;
  deviation.gradient = slope * slope * (bound.fg * bound.fg / f + bound.bg * bound.bg / b);
  deviation.loss = square * width * width / 12.0;
  deviation.weights = slope * slope * square;
  return deviation;
}

// ---- coordinates
//
// Of errors in [0, 1] ("folded": softmax, probabilities): 1 + log2(error) up to 1/2, and the negative of that of 1 - error
// above. So foreground has the negative coordinate of background of the same probability; and of the classes of a pixel all but
// the most probable one have p <= 1/2, where 1 + log2 p is the logit times log2 e plus what the classes share. Of a hinge:
// log2(error). Errors of 0 have the coordinate -infinity.

constexpr double log2_e = 1.44269504088896340736;
constexpr double ln_2 = 0.69314718055994530942;

// Below, `Math` supplies log2 of normal T > 0. Of probabilities 1 - error counts as 2^-24 at least, which has the coordinate
// 23: float32 knows no smaller number but 0. They may have errors above 1, up to 256: those begin at past_one.
constexpr double past_one = 24.0;

template <class Math, class T>
VEERLOSS_HD T folded_coordinate(T error) {
  constexpr T least = T(0x1p-24);
  const bool high = error > T(0.5), past = error > T(1);
  const T complement = T(1) - error, part = high ? (complement > least ? complement : least) : error;
  const T value = Math::log2(past ? error : part);
  return past ? T(past_one) + value : high ? -T(1) - value : T(1) + value;
}

// The coordinate of background in a most probable class from excl, the sum of the other exponentials, where the largest is 1,
// and log2_sum = log2(1 + excl).
template <class Math, class T>
VEERLOSS_HD T top_coordinate(T excl, T log2_sum) {
  constexpr T least = T(0x1p-126);
  return excl < T(1) ? log2_sum - Math::log2(excl > least ? excl : least) - T(1) : T(1) - log2_sum;
}

// An error, and its derivatives with respect to the coordinate.
struct ErrorAt {
  double error, first, second;
};

// From exp2 of -|coordinate| - 1 (folded) or of the coordinate.
VEERLOSS_HD ErrorAt error_at(double coordinate, double exp2, bool folded) {
  const bool high = folded && coordinate > 0.0;
  const double first = ln_2 * exp2, second = ln_2 * first;
  return {high ? 1.0 - exp2 : exp2, first, high ? -second : second};
}
VEERLOSS_HD double exponent_of(double coordinate, bool folded) {
  return folded ? -(coordinate < 0.0 ? -coordinate : coordinate) - 1.0 : coordinate;
}

VEERLOSS_HD double error_of_coordinate(double coordinate, bool folded) {
  return error_at(coordinate, std::exp2(exponent_of(coordinate, folded)), folded).error;
}

// d error / d logit up to its sign: p (1 - p) of a softmax, else 1.
VEERLOSS_HD double slope_of_error(double error, bool softmax) {
  return softmax ? error * (1.0 - error) : 1.0;
}

// A float32 as an unsigned integer of the same order, 0 for none; NaN is the largest.
constexpr uint32_t key_of_nan = 0xffffffffu;
VEERLOSS_HD uint32_t key_of_coordinate(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? key_of_nan : (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
VEERLOSS_HD float coordinate_of_key(uint32_t key) {
  return bit_cast<float>(key >= 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Errors are added up as float32; a finite double beyond its range becomes the largest float.
template <class T>
VEERLOSS_HD float narrow_error(T error) {
  constexpr T max_float = static_cast<T>(3.402823466e38);
  return static_cast<float>(error > max_float && error - error == T(0) ? max_float : error);
}

// ---- the bin of a coordinate

VEERLOSS_HD float position_of(float coordinate, BinPair window) {
  return saturate(fma_rn(coordinate, window.scale, window.offset));
}

// The cell of a position as a byte offset in the table of pairs, from the cells' first one.
constexpr float cell_scale = 8.0f * BinLayout::cells - 0.75f;
VEERLOSS_HD uint32_t cell_offset(float position) {
  return bit_cast<uint32_t>(fma_rn(position, cell_scale, BinLayout::magic)) & (8 * BinLayout::cells - 8);
}

// Four times the bin: a byte offset in counts or weights of 4 bytes.
VEERLOSS_HD uint32_t bin_offset(float position, BinPair cell) {
  return bit_cast<uint32_t>(fma_rn(position, cell.scale, cell.offset)) & (4 * BinLayout::max_bins - 4);
}

VEERLOSS_HD int32_t bin_of(float coordinate, const BinPair* table) {
  const float position = position_of(coordinate, table[0]);
  return static_cast<int32_t>(bin_offset(position, table[1 + cell_offset(position) / 8]) >> 2);
}

// Bin 0 holds errors of exactly 0 alone, unless it is the one that a softmax does not count.
VEERLOSS_HD int32_t bin_of_error(int32_t bin, float coordinate, bool zero_bin) {
  return zero_bin ? (coordinate < -3.0e38f ? 0 : bin > 1 ? bin : 1) : bin;
}

// The position at which a cell begins; that of cell + 1 is where it ends.
VEERLOSS_HD double cell_begin(int64_t cell) {
  const double begin = (8.0 * static_cast<double>(cell) - 0.5) / static_cast<double>(cell_scale);
  return begin > 0.0 ? (begin < 1.0 ? begin : 1.0) : 0.0;
}

// A table as the function that it is, for the steps over bins: of bins as real numbers, bin k being [k, k + 1].
struct BinMap {
  const BinPair* table;

  VEERLOSS_HD double coordinate_at(double position) const {
    return (position - static_cast<double>(table[0].offset)) / static_cast<double>(table[0].scale);
  }
  VEERLOSS_HD double position_at(double coordinate) const {
    const double x = coordinate * static_cast<double>(table[0].scale) + static_cast<double>(table[0].offset);
    return x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0;
  }
  VEERLOSS_HD double bin_in_cell(int64_t cell, double position) const {
    const BinPair pair = table[1 + cell];
    return (position * static_cast<double>(pair.scale) + static_cast<double>(pair.offset - BinLayout::magic) + 0.5) * 0.25;
  }
  VEERLOSS_HD double bin_at(double position) const {
    const auto cell = static_cast<int64_t>((position * static_cast<double>(cell_scale) + 0.5) * 0.125);
    return bin_in_cell(cell < BinLayout::cells ? cell : BinLayout::cells - 1, position);
  }
  // The cell in which bin k begins, k >= 1.
  VEERLOSS_HD int64_t cell_of_edge(double k) const {
    int64_t low = 0, high = BinLayout::cells;
    VEERLOSS_NO_UNROLL
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (bin_in_cell(middle, cell_begin(middle)) <= k)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
  // The coordinate at which bin k begins, in the cell of cell_of_edge.
  VEERLOSS_HD double edge_in_cell(int64_t cell, double k) const {
    const BinPair pair = table[1 + cell];
    const double position =
        (4.0 * k - 0.5 - static_cast<double>(pair.offset - BinLayout::magic)) / static_cast<double>(pair.scale);
    return coordinate_at(position);
  }
  // The lower edge of bin k, 1 <= k <= bins; the last one ends with the window.
  VEERLOSS_HD double edge(int64_t k, int64_t bins) const {
    return k >= bins ? coordinate_at(1.0) : edge_in_cell(cell_of_edge(static_cast<double>(k)), static_cast<double>(k));
  }
};

// The pair of cell `cell` in which bin numbers, the middle of bin k being k + 1/2, grow from `begin` to `end`.
VEERLOSS_HD BinPair cell_pair(int64_t cell, double begin, double end) {
  const double from = cell_begin(cell), to = cell_begin(cell + 1);
  const auto scale = static_cast<float>(4.0 * (end - begin) / (to - from));
  const double first = static_cast<double>(BinLayout::magic) + 4.0 * begin + 1.5;
  return {scale, static_cast<float>(first - static_cast<double>(scale) * from)};
}

// The table of the coarse pass.
VEERLOSS_HD BinPair coarse_pair(int64_t i) {
  if (i == 0) return {0.5f / BinLayout::coarse_reach, 0.5f};
  constexpr double last = static_cast<double>(BinLayout::coarse_bins - 1);
  return cell_pair(i - 1, last * cell_begin(i - 1), last * cell_begin(i));
}

// ---- the window of a segment
//
// From counts in any table, those of a sample or of all pixels.

// The bins in which counts, those of bin 0 left out, have their least and their largest foreground (or pixel, where there is no
// foreground, and where no background may be left out), and the tail_pixels-th least foreground. least 0: no pixel.
struct CountedRange {
  int64_t least, tail, largest;
  bool below;  // foreground in bin 0
};

// A sample has not seen the least foreground. Its tail tells how far below it may be.
constexpr int64_t tail_pixels = 8;
constexpr double tail_reach = 2.5, sample_margin = 1.0 / 16.0, margin = 1.0 / 128.0;

VEERLOSS_HD BinPair window_pair(double low, double high) {
  // Of coordinates as float32: 2^7 of them at least.
  const double reach = (low < 0.0 ? -low : low) > (high < 0.0 ? -high : high) ? (low < 0.0 ? -low : low)
                       : high < 0.0                                           ? -high
                                                                              : high;
  const double least = (reach > 1.0 ? reach : 1.0) * 0x1p-17;
  if (high - low < least) {
    low = 0.5 * (low + high) - 0.5 * least;
    high = low + least;
  }
  const auto scale = static_cast<float>(1.0 / (high - low));
  return {scale, static_cast<float>(-low * static_cast<double>(scale))};
}

VEERLOSS_HD BinPair window_of(const CountedRange& range, const BinMap& map, int64_t bins, bool sampled) {
  if (range.least == 0) return window_pair(-1.0, 1.0);
  double low = map.edge(range.least, bins), high = map.edge(range.largest + 1, bins);
  const double width = high - low;
  if (sampled) low -= tail_reach * (map.edge(range.tail, bins) - low);
  if (range.below) low -= 0.125 * width;  // how far below is not known
  low -= (sampled ? 0.5 * sample_margin : margin) * width;
  high += (sampled ? sample_margin : margin) * width;
  return window_pair(low, high);
}

// The table of a segment without foreground, whose whole weight is on its largest error: only pixels that have it are above bin
// 0, in the last bin.
VEERLOSS_HD BinPair largest_pair(int64_t i, float largest, int64_t bins) {
  if (i > 0) return {4.0f * static_cast<float>(bins - 1), BinLayout::magic + 1.5f};
  const float size = largest < 0.0f ? -largest : largest;
  const float step = size * 0x1p-23f > 0x1p-40f ? size * 0x1p-23f : 0x1p-40f;
  return {0x1p44f, -0x1p44f * (largest - step)};
}

// ---- the distribution of bins over cells
//
// s bins divide the square error that a cell makes by s^2, so their sum over the cells is least where s is proportional to its
// cube root. Once a bin has less than a pixel, more bins only make it rarer that two meet, and the square error of the gradient
// falls by s: then s is proportional to the square root of error per pixel (foreground of 10 among 10^4 pixels: 2 to 30 times
// smaller errors). Most of the bins follow the error of the gradient, some that of the loss.
constexpr double loss_share = 0.2;

// What a sample lets expect of a cell and its neighbours, also where it has seen nothing.
VEERLOSS_HD double smooth_count(double below, double here, double above) {
  return 0.25 * (below + 2.0 * here + above) + 0.25;
}

// In float32: a cube root then takes a third of the time.
VEERLOSS_HD double bins_for_loss(double square, double max_square) {
  using std::cbrt;
  return square > 0.0 ? static_cast<double>(cbrt(static_cast<float>(square / max_square))) : 0.0;
}
// Of `pixels`, for worth, which is to become so large that bins add up to what there is: next_worth, four times.
VEERLOSS_HD double bins_for_gradient(double square, double max_square, double pixels, double worth) {
  using std::cbrt;
  using std::sqrt;
  if (!(square > 0.0)) return 0.0;
  const auto x = static_cast<float>(square / max_square * worth), n = static_cast<float>(pixels > 1.0 ? pixels : 1.0);
  const float dense = cbrt(x), sparse = sqrt(x / n);
  return static_cast<double>(dense > sparse ? dense : sparse);
}
constexpr int worth_steps = 4;
VEERLOSS_HD double next_worth(double worth, double sum, double wanted) {
  using std::sqrt;
  const double ratio = wanted / (sum > 0.0 ? sum : wanted);
  return worth * ratio * ratio * sqrt(ratio);
}

// What binning costs the pixels of a cell if it is one bin.
struct CellDeviation {
  double gradient, loss;
};

VEERLOSS_HD CellDeviation cell_deviation(double fg, double bg, double total, double fg_before, double bg_before, double middle,
                                         double width, bool softmax, bool folded) {
  if (fg + bg == 0.0) return {0.0, 0.0};
  const ErrorAt error = error_at(middle, std::exp2(exponent_of(middle, folded)), folded);
  const JaccardDeviation deviation = jaccard_bin_deviation(jaccard_bin(total, fg_before, bg_before, fg, bg),
                                                           jaccard_bin_bound(total, fg_before, bg_before, fg, bg), fg, bg,
                                                           slope_of_error(error.error, softmax), error.first * width);
  return {deviation.gradient > 0.0 ? deviation.gradient : 0.0, deviation.loss};
}

// The share of the bins that a cell gets, from its cube roots and their sums over all cells.
VEERLOSS_HD double share_of_cell(double gradient, double sum_gradient, double loss, double sum_loss) {
  const double of_loss = sum_loss > 0.0 ? loss / sum_loss : 1.0 / BinLayout::cells;
  return sum_gradient > 0.0 ? (1.0 - loss_share) * gradient / sum_gradient + loss_share * of_loss : of_loss;
}

// The bins given out to the cells before cell `cell` from the sum of their shares: one to each, the others by the shares.
VEERLOSS_HD double bins_before(int64_t cell, double shares, int64_t bins) {
  const double before = std::floor(static_cast<double>(cell) + shares * static_cast<double>(bins - 1 - BinLayout::cells) + 0.5);
  return before < static_cast<double>(bins - 1) ? before : static_cast<double>(bins - 1);
}

// ---- the mean error of the pixels in a bin

// The difference of the densities of pixels, per coordinate squared, between the bins below and above.
VEERLOSS_HD double slope_of_density(double below, double below_width, double above, double above_width, double distance) {
  return (above / above_width - below / below_width) / distance;
}

// Times the count, by the expansion of error and density about the middle to second order. Where the error is linear over the
// bins' width instead, the many similar segments of saturated classes all err to one side (19 classes: 1.3e-6 of the loss).
VEERLOSS_HD double sum_of_errors(ErrorAt middle, double width, double count, double slope) {
  double rise = slope * width * width;
  rise = rise < 3.0 * count ? rise : 3.0 * count;
  rise = rise > -3.0 * count ? rise : -3.0 * count;
  return count * (middle.error + width * width / 24.0 * middle.second) + middle.first * rise * width / 12.0;
}

}  // namespace veerloss
