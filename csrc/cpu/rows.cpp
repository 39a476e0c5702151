#include "rows.h"

#include "simd/vecmath.h"

#define VEERLOSS_TILES "row_tiles.h"
#include "simd/dispatch_isa.h"

namespace veerloss {

void load_row(float* out, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::load(out, v, g, channel, run));
}

void load_row(double* out, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::load(out, v, g, channel, run));
}

void store_row(const float* in, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::store(in, v, g, channel, run));
}

void store_row(const double* in, const View& v, const Geometry& g, int64_t channel, Run run) {
  VEERLOSS_DISPATCH(RowTiles::store(in, v, g, channel, run));
}

bool load_labels(int32_t* out, const View& v, const Geometry& g, const TargetRule& rule, Run run) {
  return VEERLOSS_DISPATCH(RowTiles::load_labels(out, v, g, rule, run));
}

}  // namespace veerloss
