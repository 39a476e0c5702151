// Operator `layout_constants`: the values of layout.h, for tests/test_layout.py to compare with those of veerloss/_layout.py.

#include <algorithm>
#include <vector>

#include "../math/bins.h"
#include "../math/region.h"
#include "device.h"

namespace veerloss {
namespace {

// float64, in the order of `CONSTANTS` in veerloss/_layout.py.
Tensor layout_constants(const Tensor& like) {
  std::vector<double> values = {double(Errors::softmax),
                                double(Errors::probabilities),
                                double(Errors::hinge),
                                double(Activation::softmax),
                                double(Activation::sigmoid),
                                double(Activation::none),
                                double(Form::linear),
                                double(Form::log),
                                double(Form::log_cosh),
                                double(Reduction::none),
                                double(Reduction::mean),
                                double(Reduction::sum),
                                BinLayout::cells,
                                BinLayout::table,
                                BinLayout::coarse_bins,
                                BinLayout::coarse_reach,
                                past_one,
                                BinLayout::magic};
  for (int64_t classes = 1; classes < 25; ++classes) values.push_back(static_cast<double>(BinLayout::bins(classes)));
  values.insert(values.end(), {sample_run, sample_step, gradient_tolerance, loss_tolerance, RegionLayout::words, least_index});
  Tensor result = empty(like, {static_cast<int64_t>(values.size())}, ScalarType::Double);
  std::copy(std::begin(values), std::end(values), static_cast<double*>(result.data_ptr()));
  return result;
}

}  // namespace

VEERLOSS_OPERATORS(m) {
  m.impl("layout_constants", TORCH_BOX(&layout_constants));
}

}  // namespace veerloss
