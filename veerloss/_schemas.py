"""The schema of every operator; ops.py tells what their arguments have in common."""

from __future__ import annotations

_SIGMOID = (
    "float? alpha, Tensor? class_alpha, float gamma, Tensor? weight, int? ignore_index, int? background_index, int reduction"
)
_SOFTMAX = "float alpha, Tensor? class_alpha, float gamma, float label_smoothing, int? ignore_index, int reduction"
_FOCAL_RESULT = "float factor, Tensor? normalizer, bool upcast_loss) -> (Tensor loss, Tensor scale)"
# A class takes part if `selected`, [C] bool, has it (None: every class) and, with `present`, if it has foreground. `errors` is
# one of _layout.Errors; scale has one value per segment.
_LOVASZ = (
    "Tensor logits, Tensor target, Tensor? selected, bool present, bool per_image, Tensor? class_weight, int? ignore_index, "
    "int? background_index, int errors, int reduction"
)
# Of logits of low resolution on a CPU, reduced. gradient: of the sum of the losses; [0] without `keep_gradient`.
_WITH_GRADIENT = (
    "float factor, Tensor? normalizer, bool upcast_loss, bool keep_gradient, int upsample) "
    "-> (Tensor loss, Tensor scale, Tensor gradient)"
)
SCHEMAS = {
    "sigmoid_focal_forward": f"(Tensor logits, Tensor target, {_SIGMOID}, {_FOCAL_RESULT}",
    "sigmoid_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SIGMOID}, Tensor scale) -> Tensor",
    "softmax_focal_forward": f"(Tensor logits, Tensor target, {_SOFTMAX}, {_FOCAL_RESULT}",
    "softmax_focal_backward": f"(Tensor grad, Tensor logits, Tensor target, {_SOFTMAX}, Tensor scale) -> Tensor",
    "upsampled_sigmoid_focal_forward": f"(Tensor logits, Tensor target, {_SIGMOID}, {_WITH_GRADIENT}",
    "upsampled_softmax_focal_forward": f"(Tensor logits, Tensor target, {_SOFTMAX}, {_WITH_GRADIENT}",
    "upsampled_sigmoid_focal_backward": "(Tensor grad, Tensor logits, Tensor scale, Tensor gradient) -> Tensor",
    "upsampled_softmax_focal_backward": "(Tensor grad, Tensor logits, Tensor scale, Tensor gradient) -> Tensor",
    # valid_pixels: how many pixels are not ignored, where that is known.
    # weights: the signed weights of the errors, [C, N, P], or [0] without `keep_weights`; with valid_pixels, which only kernels
    # of the CPU take, [C, valid_pixels].
    "lovasz_exact_forward": f"({_LOVASZ}, int? valid_pixels, bool keep_weights, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor weights)",
    "lovasz_exact_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor weights, Tensor scale, int errors, "
    "bool per_image, int? ignore_index, int? valid_pixels, int reduction) -> Tensor",
    # The whole method, and its steps: see _histogram.py. What the tensors hold is told in csrc/kernels.h.
    "lovasz_histogram_forward": f"({_LOVASZ}, int? valid_pixels, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor table, Tensor weights, Tensor bounds)",
    "lovasz_histogram_count": "(Tensor(a!) counts, Tensor(b!) largest, Tensor logits, Tensor target, Tensor? table, "
    "Tensor? segment_mask, int errors, bool per_image, int? ignore_index, int? background_index, bool sampled, "
    "bool find_largest) -> ()",
    "lovasz_histogram_place": "(Tensor counts, Tensor? counted_table, int errors, bool sampled, int bins) -> Tensor",
    "lovasz_histogram_weigh": "(Tensor logits, Tensor counts, Tensor? recounted_mask, Tensor? recounts, "
    "Tensor? recounted_table, Tensor largest, Tensor table, Tensor? selected, bool present, Tensor? class_weight, "
    "int errors, bool per_image, int reduction, bool upcast_loss, bool again=False) "
    "-> (Tensor loss, Tensor scale, Tensor weights, Tensor bounds, Tensor needs_rebin, Tensor better_table)",
    "lovasz_histogram_sum": "(Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor units, int errors, "
    "bool per_image, int? ignore_index, int? background_index) -> Tensor",
    "lovasz_histogram_backward": "(Tensor grad, Tensor logits, Tensor target, Tensor table, Tensor weights, Tensor scale, "
    "int errors, bool per_image, int? ignore_index, int? background_index, int reduction) -> Tensor",
}
# How a region loss sums; activation is one of _layout.Activation, form of _layout.Form.
_REGION = "int activation, bool squared, bool per_image, int? ignore_index, int? background_index"
_REGION_INDEX = (
    "Tensor? selected, bool present, bool per_image, Tensor? class_weight, float alpha, float beta, float smooth_numerator, "
    "float smooth_denominator, int form, float exponent, int reduction, bool upcast_loss"
)
SCHEMAS |= {
    # The whole loss, and its steps: sums of integers (csrc/math/region.h), which may be added up over ranks; the loss and the
    # coefficients of the gradient from them.
    "region_forward": f"(Tensor logits, Tensor target, {_REGION}, {_REGION_INDEX.replace('bool per_image, ', '')}) "
    "-> (Tensor loss, Tensor scale, Tensor coefficients)",
    "region_sum": f"(Tensor logits, Tensor target, {_REGION}) -> Tensor",
    "region_weigh": f"(Tensor logits, Tensor sums, {_REGION_INDEX}) -> (Tensor loss, Tensor scale, Tensor coefficients)",
    "region_backward": f"(Tensor grad, Tensor logits, Tensor target, {_REGION}, int reduction, Tensor scale, "
    "Tensor coefficients) -> Tensor",
}
_COMPOUND = "int errors, bool per_image, int? ignore_index"
_FOCAL_TERM = "float? alpha, Tensor? class_alpha, float gamma, float label_smoothing"
SCHEMAS |= {
    # The whole loss (its region loss as region_weigh takes it, with its classes named apart from those of Lovász), and the
    # passes over the pixels that a Lovász loss has too: see _compound.py. Each adds to focal_sums, [3] float64, and to
    # region_sums as region_sum makes them. focal, lovasz and region are the weights of the terms, None: without.
    "compound_forward": "(Tensor logits, Tensor target, float? focal, float? lovasz, float? region, "
    f"{_FOCAL_TERM}, bool weighted_mean, Tensor? selected, bool present, Tensor? region_selected, bool region_present, "
    "float region_alpha, float region_beta, float smooth_numerator, float smooth_denominator, int form, float exponent, "
    f"{_COMPOUND}, bool histogram, int? valid_pixels, bool keep_weights, bool upcast_loss) "
    "-> (Tensor loss, Tensor scale, Tensor focal_scale, Tensor region_weights, Tensor table, Tensor weights, Tensor parts)",
    "compound_count": "(Tensor(a!) counts, Tensor(b!) largest, Tensor(c!)? focal_sums, Tensor(d!)? region_sums, Tensor logits, "
    f"Tensor target, Tensor table, Tensor? segment_mask, {_FOCAL_TERM}, {_COMPOUND}, bool find_largest) -> ()",
    "compound_exact": "(Tensor(a!)? focal_sums, Tensor(b!)? region_sums, Tensor logits, Tensor target, Tensor? selected, "
    f"bool present, {_FOCAL_TERM}, {_COMPOUND}, int? valid_pixels, bool keep_weights) "
    "-> (Tensor loss, Tensor scale, Tensor weights)",
    "compound_sum": "(Tensor(a!)? focal_sums, Tensor(b!)? region_sums, Tensor logits, Tensor target, "
    f"{_FOCAL_TERM}, {_COMPOUND}) -> ()",
    "compound_backward": "(Tensor grad, Tensor logits, Tensor target, float? focal, float? lovasz, float? region, "
    f"{_FOCAL_TERM}, {_COMPOUND}, bool histogram, int? valid_pixels, Tensor scale, Tensor focal_scale, Tensor region_weights, "
    "Tensor table, Tensor weights) -> Tensor",
}
SCHEMAS = {
    name: schema.replace(") ->", ", int? upsample=None) ->")
    if "Tensor target" in schema and "upsample" not in schema
    else schema
    for name, schema in SCHEMAS.items()
}
