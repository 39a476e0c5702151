// The segments of the Lovász losses, and the options of a call, on any device.
#pragma once

#include <vector>

#include "jaccard.h"
#include "tensor.h"

namespace veerloss {

constexpr int64_t max_segment = int64_t{1} << 31;  // "exact" keeps a pixel's index in 31 bits, "histogram" a count

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
inline Geometry segment_geometry(const Tensor& logits, bool per_image) {
  return per_image ? Geometry{logits.size(0), logits.size(1), logits.size(2)} : geometry_of(logits);
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

  bool take_part(int64_t c, bool has_valid, bool has_foreground) const {
    return has_valid && (!selected || selected[c]) && (!present || has_foreground);
  }

  // One value per segment.
  std::vector<int64_t> scale_shape(const Segments& s) const {
    if (errors == Errors::hinge) return per_image ? std::vector<int64_t>{s.rows} : std::vector<int64_t>{};
    return per_image ? std::vector<int64_t>{s.rows, s.classes} : std::vector<int64_t>{s.classes};
  }
  std::vector<int64_t> loss_shape(const Segments& s) const {
    return reduction == Reduction::none ? scale_shape(s) : std::vector<int64_t>{};
  }
};

inline const char* class_flags(const std::optional<Tensor>& selected, const Tensor& logits) {
  require(!selected || (on_device(*selected) && selected->is_contiguous() && selected->numel() == logits.size(1) &&
                        dtype_of(*selected) == DType::u8),
          "selected with one bool per class, contiguous");
  return selected ? static_cast<const char*>(selected->data_ptr()) : nullptr;
}

}  // namespace veerloss
