// Operators of LayerNorm, of its form that downsamples, of the stand-alone GRN, and of GRN of LayerNorm.
#include "device_cpu.h"
#include "device_cuda.h"

CNX_SCHEMAS(m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "normalized_backward(Tensor dy, Tensor z, Tensor rstd, Tensor weight)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "space_to_depth_normalize(Tensor x, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor rstd)");
  m.def(
      "space_to_depth_normalize_backward(Tensor dy, Tensor z, Tensor rstd, Tensor weight)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "grn_forward(Tensor x, Tensor gamma, Tensor beta, Tensor? offsets, int rows_per_slot, int segments, bool gelu,"
      " float eps) -> (Tensor y, Tensor norm)");
  m.def(
      "grn_backward(Tensor grad, Tensor x, Tensor gamma, Tensor norm, Tensor? offsets, int rows_per_slot,"
      " int segments, bool gelu, float eps) -> (Tensor dx, Tensor dgamma, Tensor dbeta)");
  m.def(
      "layer_norm_grn_forward(Tensor x, Tensor ln_weight, Tensor ln_bias, Tensor gamma, Tensor beta, Tensor? offsets,"
      " int rows_per_slot, int segments, float ln_eps, float eps)"
      " -> (Tensor y, Tensor mean, Tensor rstd, Tensor norm)");
  m.def(
      "layer_norm_grn_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor ln_weight, Tensor ln_bias,"
      " Tensor gamma, Tensor norm, Tensor? offsets, int rows_per_slot, int segments, float eps)"
      " -> (Tensor dx, Tensor dln_weight, Tensor dln_bias, Tensor dgamma, Tensor dbeta)");
  // CUDA only
  m.def("normalized_backward_input(Tensor dz, Tensor z, Tensor rstd) -> Tensor");
}

namespace cnx {
namespace binding {
namespace {

template <class D>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  const int64_t channels = last_size(x);
  if (weight) check_stat(*weight, x, channels, "weight");
  if (bias) check_stat(*bias, x, channels, "bias");
  Tensor y = new_features(x, sizes(x)), mean = new_stat(x, leading_sizes(x)), rstd = new_stat(x, leading_sizes(x));
  D::layer_norm_forward({.dtype = D::dtype_of(x),
                         .rows = row_count(x),
                         .channels = channels,
                         .x = x.const_data_ptr(),
                         .weight = pointer(weight),
                         .bias = pointer(bias),
                         .eps = eps,
                         .y = y.mutable_data_ptr(),
                         .mean = mean.mutable_data_ptr(),
                         .rstd = rstd.mutable_data_ptr()},
                        x);
  return {y, mean, rstd};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight) {
  check_rows<D>(x, "x");
  check_like(grad, x, "grad");
  const int64_t channels = last_size(x), rows = row_count(x);
  check_stat(mean, x, rows, "mean");
  check_stat(rstd, x, rows, "rstd");
  if (weight) check_stat(*weight, x, channels, "weight");
  Tensor dx = new_features(x, sizes(x)), dweight = new_stat(x, {channels}), dbias = new_stat(x, {channels});
  D::layer_norm_backward(
      {
          .dtype = D::dtype_of(x),
          .rows = rows,
          .channels = channels,
          .grad = grad.const_data_ptr(),
          .x = x.const_data_ptr(),
          .mean = mean.const_data_ptr(),
          .rstd = rstd.const_data_ptr(),
          .weight = pointer(weight),
          .dx = dx.mutable_data_ptr(),
          .dweight = dweight.mutable_data_ptr(),
          .dbias = dbias.mutable_data_ptr(),
      },
      x);
  return {dx, dweight, dbias};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> normalized_backward(const Tensor& dy, const Tensor& z, const Tensor& rstd,
                                                       const Tensor& weight) {
  check_rows<D>(z, "z");
  check_like(dy, z, "dy");
  const int64_t channels = last_size(z);
  check_stat(rstd, z, row_count(z), "rstd");
  check_stat(weight, z, channels, "weight");
  Tensor dx = new_features(z, sizes(z)), dweight = new_stat(z, {channels}), dbias = new_stat(z, {channels});
  D::layer_norm_backward(
      {
          .dtype = D::dtype_of(z),
          .rows = row_count(z),
          .channels = channels,
          .grad = dy.const_data_ptr(),
          .x = z.const_data_ptr(),
          .rstd = rstd.const_data_ptr(),
          .weight = weight.const_data_ptr(),
          .dx = dx.mutable_data_ptr(),
          .dweight = dweight.mutable_data_ptr(),
          .dbias = dbias.mutable_data_ptr(),
      },
      z);
  return {dx, dweight, dbias};
}

template <class D>
std::tuple<Tensor, Tensor> space_to_depth_normalize(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  CNX_CHECK(x.dim() == 4 && x.size(1) % 2 == 0 && x.size(2) % 2 == 0, "x must be [maps, h, w, C] with even h and w");
  const int64_t maps = x.size(0), h = x.size(1), w = x.size(2), channels = x.size(3);
  if (weight) check_stat(*weight, x, channels, "weight");
  if (bias) check_stat(*bias, x, channels, "bias");
  Tensor y = new_features(x, {maps, h / 2, w / 2, 4 * channels}), rstd = new_stat(x, {maps, h, w});
  SpaceToDepthNorm p{};
  p.dtype = D::dtype_of(x);
  p.maps = maps;
  p.height = h;
  p.width = w;
  p.channels = channels;
  p.x = x.const_data_ptr();
  p.weight = pointer(weight);
  p.bias = pointer(bias);
  p.eps = eps;
  p.out = y.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  D::space_to_depth_norm_forward(p, x);
  return {y, rstd};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> space_to_depth_normalize_backward(const Tensor& dy, const Tensor& z,
                                                                     const Tensor& rstd, const Tensor& weight) {
  check_rows<D>(z, "z");
  check_like(dy, z, "dy");
  CNX_CHECK(last_size(z) % 4 == 0, "z must be [maps, h / 2, w / 2, 4 C]");
  CNX_CHECK(rstd.dim() == 3 && rstd.size(1) % 2 == 0 && rstd.size(2) % 2 == 0,
            "rstd must be [maps, h, w] with even h and w");
  const int64_t maps = rstd.size(0), h = rstd.size(1), w = rstd.size(2), channels = last_size(z) / 4;
  check_stat(rstd, z, row_count(z) * 4, "rstd");
  check_stat(weight, z, channels, "weight");
  Tensor dx = new_features(z, {maps, h, w, channels}), dweight = new_stat(z, {channels}),
         dbias = new_stat(z, {channels});
  SpaceToDepthNorm p{};
  p.dtype = D::dtype_of(z);
  p.maps = maps;
  p.height = h;
  p.width = w;
  p.channels = channels;
  p.x = dy.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.z = z.const_data_ptr();
  p.out = dx.mutable_data_ptr();
  p.rstd = const_cast<void*>(rstd.const_data_ptr());
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  D::space_to_depth_norm_backward(p, z);
  return {dx, dweight, dbias};
}

template <class D>
std::tuple<Tensor, Tensor> grn_forward(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                       const OptionalTensor& offsets, int64_t rows_per_slot, int64_t segments,
                                       bool gelu, double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  const Segments rows = segments_of<D>(offsets, x, rows_per_slot, segments);
  const int64_t channels = last_size(x);
  check_stat(gamma, x, channels, "gamma");
  check_stat(beta, x, channels, "beta");
  Tensor y = new_features(x, sizes(x)), norm = new_stat(x, {segments, channels});
  D::grn_forward(
      {
          .dtype = D::dtype_of(x),
          .segments = rows,
          .channels = channels,
          .gelu = gelu,
          .x = x.const_data_ptr(),
          .gamma = gamma.const_data_ptr(),
          .beta = beta.const_data_ptr(),
          .eps = eps,
          .y = y.mutable_data_ptr(),
          .norm = norm.mutable_data_ptr(),
      },
      x);
  return {y, norm};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& norm, const OptionalTensor& offsets,
                                                int64_t rows_per_slot, int64_t segments, bool gelu, double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  check_like(grad, x, "grad");
  const Segments rows = segments_of<D>(offsets, x, rows_per_slot, segments);
  const int64_t channels = last_size(x);
  check_stat(gamma, x, channels, "gamma");
  check_stat(norm, x, product({segments, channels}, "the size of norm"), "norm");
  Tensor dx = new_features(x, sizes(x)), dgamma = new_stat(x, {channels}), dbeta = new_stat(x, {channels});
  D::grn_backward(
      {
          .dtype = D::dtype_of(x),
          .segments = rows,
          .channels = channels,
          .gelu = gelu,
          .grad = grad.const_data_ptr(),
          .x = x.const_data_ptr(),
          .gamma = gamma.const_data_ptr(),
          .norm = norm.const_data_ptr(),
          .eps = eps,
          .dx = dx.mutable_data_ptr(),
          .dgamma = dgamma.mutable_data_ptr(),
          .dbeta = dbeta.mutable_data_ptr(),
      },
      x);
  return {dx, dgamma, dbeta};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_grn_forward(const Tensor& x, const Tensor& ln_weight,
                                                                  const Tensor& ln_bias, const Tensor& gamma,
                                                                  const Tensor& beta, const OptionalTensor& offsets,
                                                                  int64_t rows_per_slot, int64_t segments,
                                                                  double ln_eps, double eps) {
  check_rows<D>(x, "x");
  check_eps(ln_eps, "ln_eps");
  check_eps(eps);
  const Segments rows = segments_of<D>(offsets, x, rows_per_slot, segments);
  const int64_t channels = last_size(x);
  check_stat(ln_weight, x, channels, "ln_weight");
  check_stat(ln_bias, x, channels, "ln_bias");
  check_stat(gamma, x, channels, "gamma");
  check_stat(beta, x, channels, "beta");
  Tensor y = new_features(x, sizes(x)), mean = new_stat(x, leading_sizes(x)), rstd = new_stat(x, leading_sizes(x)),
         norm = new_stat(x, {segments, channels});
  D::layer_norm_grn_forward(
      {
          .dtype = D::dtype_of(x),
          .segments = rows,
          .channels = channels,
          .x = x.const_data_ptr(),
          .ln_weight = ln_weight.const_data_ptr(),
          .ln_bias = ln_bias.const_data_ptr(),
          .gamma = gamma.const_data_ptr(),
          .beta = beta.const_data_ptr(),
          .ln_eps = ln_eps,
          .eps = eps,
          .y = y.mutable_data_ptr(),
          .mean = mean.mutable_data_ptr(),
          .rstd = rstd.mutable_data_ptr(),
          .norm = norm.mutable_data_ptr(),
      },
      x);
  return {y, mean, rstd, norm};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_grn_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& ln_weight,
    const Tensor& ln_bias, const Tensor& gamma, const Tensor& norm, const OptionalTensor& offsets,
    int64_t rows_per_slot, int64_t segments, double eps) {
  check_rows<D>(x, "x");
  check_eps(eps);
  check_like(grad, x, "grad");
  const Segments rows = segments_of<D>(offsets, x, rows_per_slot, segments);
  const int64_t channels = last_size(x);
  check_stat(mean, x, rows.rows, "mean");
  check_stat(rstd, x, rows.rows, "rstd");
  check_stat(ln_weight, x, channels, "ln_weight");
  check_stat(ln_bias, x, channels, "ln_bias");
  check_stat(gamma, x, channels, "gamma");
  check_stat(norm, x, product({segments, channels}, "the size of norm"), "norm");
  Tensor dx = new_features(x, sizes(x)), dln_weight = new_stat(x, {channels}), dln_bias = new_stat(x, {channels}),
         dgamma = new_stat(x, {channels}), dbeta = new_stat(x, {channels});
  D::layer_norm_grn_backward(
      {
          .dtype = D::dtype_of(x),
          .segments = rows,
          .channels = channels,
          .grad = grad.const_data_ptr(),
          .x = x.const_data_ptr(),
          .mean = mean.const_data_ptr(),
          .rstd = rstd.const_data_ptr(),
          .ln_weight = ln_weight.const_data_ptr(),
          .ln_bias = ln_bias.const_data_ptr(),
          .gamma = gamma.const_data_ptr(),
          .norm = norm.const_data_ptr(),
          .eps = eps,
          .dx = dx.mutable_data_ptr(),
          .dln_weight = dln_weight.mutable_data_ptr(),
          .dln_bias = dln_bias.mutable_data_ptr(),
          .dgamma = dgamma.mutable_data_ptr(),
          .dbeta = dbeta.mutable_data_ptr(),
      },
      x);
  return {dx, dln_weight, dln_bias, dgamma, dbeta};
}

template <class D>
Tensor normalized_backward_input(const Tensor& dz, const Tensor& z, const Tensor& rstd) {
  check_rows<D>(z, "z");
  check_like(dz, z, "dz");
  check_stat(rstd, z, row_count(z), "rstd");
  Tensor dx = new_features(z, sizes(z));
  D::layer_norm_backward(
      {
          .dtype = D::dtype_of(z),
          .rows = row_count(z),
          .channels = last_size(z),
          .grad = dz.const_data_ptr(),
          .x = z.const_data_ptr(),
          .rstd = rstd.const_data_ptr(),
          .dx = dx.mutable_data_ptr(),
      },
      z);
  return dx;
}

template <class D>
void implement(Library& m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward<D>));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward<D>));
  m.impl("normalized_backward", TORCH_BOX(&normalized_backward<D>));
  m.impl("space_to_depth_normalize", TORCH_BOX(&space_to_depth_normalize<D>));
  m.impl("space_to_depth_normalize_backward", TORCH_BOX(&space_to_depth_normalize_backward<D>));
  m.impl("grn_forward", TORCH_BOX(&grn_forward<D>));
  m.impl("grn_backward", TORCH_BOX(&grn_backward<D>));
  m.impl("layer_norm_grn_forward", TORCH_BOX(&layer_norm_grn_forward<D>));
  m.impl("layer_norm_grn_backward", TORCH_BOX(&layer_norm_grn_backward<D>));
}

template <class D>
void implement_cuda(Library& m) {
  m.impl("normalized_backward_input", TORCH_BOX(&normalized_backward_input<D>));
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_IMPLEMENT_CPU(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement_cuda)
