// Operator `layout_constants`: the values of layout.h, for tests/test_layout.py to compare with those of veerloss/_layout.py.

#include <algorithm>

#include "device.h"

namespace veerloss {
namespace {

// float64, in the order of `CONSTANTS` in veerloss/_layout.py.
Tensor layout_constants(const Tensor& like) {
  using Cells = ErrorCells;
  constexpr BinLayout softmax(Errors::softmax), hinge(Errors::hinge);
  // clang-format off
  constexpr double values[] = {
      double(Errors::softmax), double(Errors::probabilities), double(Errors::hinge),
      double(Reduction::none), double(Reduction::mean), double(Reduction::sum),
      Cells::offset, Cells::origin, Cells::cell_bits, Cells::position_bits, Cells::position_shift, Cells::narrow_end,
      Cells::narrow_cells, Cells::wide_shift, Cells::half, Cells::bounded, Cells::unbounded,
      BinLayout::budget, softmax.bins, hinge.bins, entry_shift, entry_mask, sample_run, sample_step,
      gradient_tolerance, loss_tolerance};
  // clang-format on
  Tensor result = empty(like, {std::size(values)}, ScalarType::Double);
  std::copy(std::begin(values), std::end(values), static_cast<double*>(result.data_ptr()));
  return result;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("layout_constants", TORCH_BOX(&layout_constants));
}

}  // namespace veerloss
