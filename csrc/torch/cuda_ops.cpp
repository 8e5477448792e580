// CUDA bindings of what only this backend has: the parts of the MLP with their statistics finalised on the device, sums
// of columns, LayerNorm's gradient without its parameters, and the index tensors of a layout.
#include "cuda.h"

namespace cnx {
namespace binding {
namespace {

void* mutable_pointer(std::optional<Tensor>& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> gelu_statistics(const Tensor& a, std::optional<Tensor> h, const Tensor& gamma, double eps,
                                           bool tanh, const OptionalTensor& offsets, int64_t rows_per_slot,
                                           int64_t segments) {
  check_device<Cuda>(a, "a");
  const int64_t channels = last_size(a);
  if (h) check_like(*h, a, "h");
  check_stat(gamma, a, channels, "gamma");
  Tensor norm = new_stat(a, {segments, channels}), scale = new_stat(a, {segments, channels});
  Cuda::gelu_statistics({Cuda::dtype_of(a), segments_of(offsets, a, rows_per_slot, segments), channels, gelu_form(tanh),
                         a.const_data_ptr(), mutable_pointer(h), gamma.const_data_ptr(), eps, norm.mutable_data_ptr(),
                         scale.mutable_data_ptr()},
                        a);
  return {norm, scale};
}

void gelu_scale(const Tensor& a, Tensor out, const OptionalTensor& scale, bool tanh, const OptionalTensor& offsets,
                int64_t rows_per_slot, int64_t segments) {
  check_device<Cuda>(a, "a");
  check_like(out, a, "out");
  const int64_t channels = last_size(a);
  if (scale) check_stat(*scale, a, segments * channels, "scale");
  Cuda::gelu_scale({Cuda::dtype_of(a), segments_of(offsets, a, rows_per_slot, segments), channels, gelu_form(tanh),
                    a.const_data_ptr(), pointer(scale), out.mutable_data_ptr()},
                   a);
}

std::tuple<Tensor, Tensor, Tensor> mlp_backward_statistics(const OptionalTensor& a, const OptionalTensor& ds,
                                                           const OptionalTensor& t, const Tensor& norm,
                                                           const Tensor& gamma, double eps, bool tanh,
                                                           const OptionalTensor& offsets, int64_t rows_per_slot,
                                                           int64_t segments) {
  check_device<Cuda>(norm, "norm");
  STD_TORCH_CHECK(bool(a) == bool(ds) && bool(a) != bool(t),
                  "convnextv2_kernels: either a and ds or their sums t must be given");
  const int64_t channels = last_size(norm);
  const Tensor& like = a ? *a : norm;
  check_stat(norm, like, segments * channels, "norm");
  check_stat(gamma, like, channels, "gamma");
  if (ds) check_like(*ds, *a, "ds");
  if (t) check_stat(*t, like, segments * channels, "t");
  Tensor scale = new_stat(norm, {segments, channels}), kappa = new_stat(norm, {segments, channels}),
         dgamma = new_stat(norm, {channels});
  Segments rows{nullptr, 1, segments, 0};
  if (a) rows = segments_of(offsets, *a, rows_per_slot, segments);
  Cuda::mlp_backward_statistics({Cuda::dtype_of(like), rows, channels, gelu_form(tanh), pointer(a), pointer(ds),
                                 pointer(t), norm.const_data_ptr(), gamma.const_data_ptr(), eps,
                                 scale.mutable_data_ptr(), kappa.mutable_data_ptr(), dgamma.mutable_data_ptr()},
                                norm);
  return {scale, kappa, dgamma};
}

Tensor mlp_backward_pointwise(const Tensor& a, const Tensor& ds, const Tensor& scale, const Tensor& kappa,
                              std::optional<Tensor> hs, Tensor da, bool tanh, const OptionalTensor& offsets,
                              int64_t rows_per_slot, int64_t segments) {
  check_device<Cuda>(a, "a");
  const int64_t channels = last_size(a);
  check_like(ds, a, "ds");
  check_like(da, a, "da");
  if (hs) check_like(*hs, a, "hs");
  check_stat(scale, a, segments * channels, "scale");
  check_stat(kappa, a, segments * channels, "kappa");
  Tensor db = new_stat(a, {channels});
  Cuda::mlp_backward_pointwise(
      {Cuda::dtype_of(a), segments_of(offsets, a, rows_per_slot, segments), channels, gelu_form(tanh),
       a.const_data_ptr(), ds.const_data_ptr(), scale.const_data_ptr(), kappa.const_data_ptr(), mutable_pointer(hs),
       da.mutable_data_ptr(), db.mutable_data_ptr()},
      a);
  return db;
}

Tensor column_sum(const Tensor& x) {
  check_device<Cuda>(x, "x");
  Tensor sums = new_stat(x, {last_size(x)});
  Cuda::column_sum({Cuda::dtype_of(x), row_count(x), last_size(x), x.const_data_ptr(), sums.mutable_data_ptr()}, x);
  return sums;
}

// A weight already in the dtype of the operands, with nothing to fold in, is not copied: its place is an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_parameters(const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, const Tensor& beta,
                                                          const OptionalTensor& ln_weight,
                                                          const OptionalTensor& ln_bias, const Tensor& like) {
  check_device<Cuda>(w1, "w1");
  check_same_device(w2, w1, "w2");
  const int64_t hidden = w1.size(0), inputs = w1.size(1), outputs = w2.size(0);
  const bool same = w1.scalar_type() == like.scalar_type();
  STD_TORCH_CHECK(
      w2.scalar_type() == w1.scalar_type() && w2.size(1) == hidden && (same || w1.scalar_type() == stat_type(like)),
      "convnextv2_kernels: w1 and w2 must both have the dtype of the rows or of the statistics");
  check_stat(b1, like, hidden, "b1");
  if (b2) check_stat(*b2, like, outputs, "b2");
  check_stat(beta, like, hidden, "beta");
  if (ln_weight) check_stat(*ln_weight, like, inputs, "ln_weight");
  if (ln_bias) check_stat(*ln_bias, like, inputs, "ln_bias");
  const bool copy1 = !same || ln_weight;
  Tensor w1_out = new_features(like, {copy1 ? hidden : 0, inputs}), b1_out = new_features(like, {hidden});
  Tensor w2_out = new_features(like, {same ? 0 : outputs, hidden}), b2_out = new_features(like, {b2 ? outputs : 0});
  MlpParameters p{};
  p.dtype = Cuda::dtype_of(like);
  p.wide = w1.scalar_type() == stat_type(like);
  p.inputs = inputs;
  p.hidden = hidden;
  p.outputs = outputs;
  p.w1 = w1.const_data_ptr();
  p.b1 = b1.const_data_ptr();
  p.w2 = w2.const_data_ptr();
  p.b2 = pointer(b2);
  p.beta = beta.const_data_ptr();
  p.ln_weight = pointer(ln_weight);
  p.ln_bias = pointer(ln_bias);
  p.w1_out = copy1 ? w1_out.mutable_data_ptr() : nullptr;
  p.b1_out = b1_out.mutable_data_ptr();
  p.w2_out = same ? nullptr : w2_out.mutable_data_ptr();
  p.b2_out = b2_out.mutable_data_ptr();
  Cuda::mlp_parameters(p, like);
  return {w1_out, b1_out, w2_out, b2_out};
}

std::tuple<Tensor, Tensor> unfold_layer_norm(const Tensor& w1, const Tensor& ln_weight, const Tensor& ln_bias,
                                             const Tensor& db1, Tensor dw1) {
  check_device<Cuda>(w1, "w1");
  const int64_t hidden = w1.size(0), inputs = w1.size(1);
  check_stat(ln_weight, w1, inputs, "ln_weight");
  check_stat(ln_bias, w1, inputs, "ln_bias");
  check_stat(db1, w1, hidden, "db1");
  check_stat(dw1, w1, hidden * inputs, "dw1");
  Tensor dweight = new_stat(w1, {inputs}), dbias = new_stat(w1, {inputs});
  Cuda::unfold_layer_norm(
      {Cuda::dtype_of(w1), inputs, hidden, w1.const_data_ptr(), ln_weight.const_data_ptr(), ln_bias.const_data_ptr(),
       db1.const_data_ptr(), dw1.mutable_data_ptr(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
      w1);
  return {dweight, dbias};
}

Tensor products_reduce(const Tensor& g, const Tensor& w2) {
  check_device<Cuda>(g, "g");
  STD_TORCH_CHECK(g.dim() == 3, "convnextv2_kernels: g must be [N, O, H]");
  const int64_t images = g.size(0), outputs = g.size(1), hidden = g.size(2);
  check_stat(g, w2, g.numel(), "g");
  check_same_device(w2, g, "w2");
  STD_TORCH_CHECK(w2.numel() == outputs * hidden, "convnextv2_kernels: w2 must be [O, H]");
  Tensor t = new_stat(g, {images, hidden});
  ImageProducts p{};
  p.dtype = Cuda::dtype_of(w2);
  p.images = images;
  p.outputs = outputs;
  p.hidden = hidden;
  p.g = g.const_data_ptr();
  p.w2 = w2.const_data_ptr();
  p.t = t.mutable_data_ptr();
  Cuda::products_reduce(p, g);
  return t;
}

Tensor products_weight(const Tensor& g, const Tensor& scale, const Tensor& d_sum, const Tensor& beta) {
  check_device<Cuda>(g, "g");
  STD_TORCH_CHECK(g.dim() == 3, "convnextv2_kernels: g must be [N, O, H]");
  const int64_t images = g.size(0), outputs = g.size(1), hidden = g.size(2);
  check_stat(scale, g, images * hidden, "scale");
  check_stat(d_sum, g, outputs, "d_sum");
  check_stat(beta, g, hidden, "beta");
  Tensor dw2 = new_stat(g, {outputs, hidden});
  ImageProducts p{};
  p.dtype = Cuda::dtype_of(g);
  p.images = images;
  p.outputs = outputs;
  p.hidden = hidden;
  p.g = g.const_data_ptr();
  p.scale = scale.const_data_ptr();
  p.d_sum = d_sum.const_data_ptr();
  p.beta = beta.const_data_ptr();
  p.dw2 = dw2.mutable_data_ptr();
  Cuda::products_weight(p, g);
  return dw2;
}

Tensor normalized_backward_input(const Tensor& dz, const Tensor& z, const Tensor& rstd) {
  check_device<Cuda>(z, "z");
  check_like(dz, z, "dz");
  check_stat(rstd, z, row_count(z), "rstd");
  Tensor dx = new_features(z, sizes(z));
  Cuda::layer_norm_backward({Cuda::dtype_of(z), row_count(z), last_size(z), dz.const_data_ptr(), z.const_data_ptr(),
                             nullptr, rstd.const_data_ptr(), nullptr, dx.mutable_data_ptr(), nullptr, nullptr},
                            z);
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> layout_from_kept(const Tensor& ids, int64_t grid_h, int64_t grid_w) {
  check_device<Cuda>(ids, "ids");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long,
                  "convnextv2_kernels: ids must be int64 [N, K]");
  const int64_t images = ids.size(0), kept = ids.size(1);
  const auto int32 = std::make_optional(ScalarType::Int);
  Tensor slot_of_patch = torch::stable::new_empty(ids, {images, grid_h * grid_w}, int32);
  Tensor patch_of_slot = torch::stable::new_empty(ids, {images * kept}, int32);
  Tensor offsets = torch::stable::new_empty(ids, {images + 1}, int32);
  Cuda::layout_from_kept(
      {images, grid_h, grid_w, kept, static_cast<const int64_t*>(ids.const_data_ptr()),
       static_cast<int32_t*>(slot_of_patch.mutable_data_ptr()), static_cast<int32_t*>(patch_of_slot.mutable_data_ptr()),
       static_cast<int32_t*>(offsets.mutable_data_ptr())},
      ids);
  return {slot_of_patch, patch_of_slot, offsets};
}

Tensor neighbour_slots(const Tensor& slot_of_patch, const Tensor& patch_of_slot, int64_t grid_h, int64_t grid_w,
                       int64_t radius) {
  check_device<Cuda>(slot_of_patch, "slot_of_patch");
  const int64_t images = slot_of_patch.size(0), slots = patch_of_slot.numel(), width = 2 * radius + 1;
  Tensor table = torch::stable::new_empty(slot_of_patch, {slots, width * width});
  Cuda::neighbour_slots({images, grid_h, grid_w, slots, static_cast<int>(radius),
                         int32_pointer(slot_of_patch, patch_of_slot, images * grid_h * grid_w, "slot_of_patch"),
                         int32_pointer(patch_of_slot, slot_of_patch, slots, "patch_of_slot"),
                         static_cast<int32_t*>(table.mutable_data_ptr())},
                        slot_of_patch);
  return table;
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_LIBRARY_IMPL(CNX_LIBRARY, CNX_CUDA_KEY, m) {
  m.impl("gelu_statistics", TORCH_BOX(&cnx::binding::gelu_statistics));
  m.impl("gelu_scale", TORCH_BOX(&cnx::binding::gelu_scale));
  m.impl("mlp_backward_statistics", TORCH_BOX(&cnx::binding::mlp_backward_statistics));
  m.impl("mlp_backward_pointwise", TORCH_BOX(&cnx::binding::mlp_backward_pointwise));
  m.impl("column_sum", TORCH_BOX(&cnx::binding::column_sum));
  m.impl("normalized_backward_input", TORCH_BOX(&cnx::binding::normalized_backward_input));
  m.impl("mlp_parameters", TORCH_BOX(&cnx::binding::mlp_parameters));
  m.impl("unfold_layer_norm", TORCH_BOX(&cnx::binding::unfold_layer_norm));
  m.impl("products_reduce", TORCH_BOX(&cnx::binding::products_reduce));
  m.impl("products_weight", TORCH_BOX(&cnx::binding::products_weight));
  m.impl("layout_from_kept", TORCH_BOX(&cnx::binding::layout_from_kept));
  m.impl("neighbour_slots", TORCH_BOX(&cnx::binding::neighbour_slots));
}
