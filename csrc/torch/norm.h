// Bindings of LayerNorm, its downsampling form, and the stand-alone GRN for a device D (cpu.cpp, cuda.cpp).
#pragma once

#include "binding.h"

namespace cnx {
namespace binding {

inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> shape = sizes(x);
  shape.pop_back();
  return shape;
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, double eps) {
  check_device<D>(x, "x");
  const int64_t channels = last_size(x);
  if (weight) check_stat(*weight, x, channels, "weight");
  if (bias) check_stat(*bias, x, channels, "bias");
  Tensor y = new_features(x, sizes(x)), mean = new_stat(x, leading_sizes(x)), rstd = new_stat(x, leading_sizes(x));
  D::layer_norm_forward({D::dtype_of(x), row_count(x), channels, x.const_data_ptr(), pointer(weight), pointer(bias),
                         eps, y.mutable_data_ptr(), mean.mutable_data_ptr(), rstd.mutable_data_ptr()},
                        x);
  return {y, mean, rstd};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                       const Tensor& rstd, const OptionalTensor& weight) {
  check_device<D>(x, "x");
  check_like(grad, x, "grad");
  const int64_t channels = last_size(x), rows = row_count(x);
  check_stat(mean, x, rows, "mean");
  check_stat(rstd, x, rows, "rstd");
  if (weight) check_stat(*weight, x, channels, "weight");
  Tensor dx = new_features(x, sizes(x)), dweight = new_stat(x, {channels}), dbias = new_stat(x, {channels});
  D::layer_norm_backward({D::dtype_of(x), rows, channels, grad.const_data_ptr(), x.const_data_ptr(),
                          mean.const_data_ptr(), rstd.const_data_ptr(), pointer(weight), dx.mutable_data_ptr(),
                          dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
                         x);
  return {dx, dweight, dbias};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> normalized_backward(const Tensor& dy, const Tensor& z, const Tensor& rstd,
                                                       const Tensor& weight) {
  check_device<D>(z, "z");
  check_like(dy, z, "dy");
  const int64_t channels = last_size(z);
  check_stat(rstd, z, row_count(z), "rstd");
  check_stat(weight, z, channels, "weight");
  Tensor dx = new_features(z, sizes(z)), dweight = new_stat(z, {channels}), dbias = new_stat(z, {channels});
  D::layer_norm_backward(
      {D::dtype_of(z), row_count(z), channels, dy.const_data_ptr(), z.const_data_ptr(), nullptr, rstd.const_data_ptr(),
       weight.const_data_ptr(), dx.mutable_data_ptr(), dweight.mutable_data_ptr(), dbias.mutable_data_ptr()},
      z);
  return {dx, dweight, dbias};
}

template <class D>
std::tuple<Tensor, Tensor> space_to_depth_normalize(const Tensor& x, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, double eps) {
  check_device<D>(x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % 2 == 0 && x.size(2) % 2 == 0,
                  "convnextv2_kernels: x must be [maps, h, w, C] with even h and w");
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
  check_device<D>(z, "z");
  check_like(dy, z, "dy");
  STD_TORCH_CHECK(rstd.dim() == 3, "convnextv2_kernels: rstd must be [maps, h, w]");
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
  check_device<D>(x, "x");
  const int64_t channels = last_size(x);
  check_stat(gamma, x, channels, "gamma");
  check_stat(beta, x, channels, "beta");
  Tensor y = new_features(x, sizes(x)), norm = new_stat(x, {segments, channels});
  D::grn_forward({D::dtype_of(x), segments_of(offsets, x, rows_per_slot, segments), channels, gelu, x.const_data_ptr(),
                  gamma.const_data_ptr(), beta.const_data_ptr(), eps, y.mutable_data_ptr(), norm.mutable_data_ptr()},
                 x);
  return {y, norm};
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> grn_backward(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                const Tensor& norm, const OptionalTensor& offsets,
                                                int64_t rows_per_slot, int64_t segments, bool gelu, double eps) {
  check_device<D>(x, "x");
  check_like(grad, x, "grad");
  const int64_t channels = last_size(x);
  check_stat(gamma, x, channels, "gamma");
  check_stat(norm, x, segments * channels, "norm");
  Tensor dx = new_features(x, sizes(x)), dgamma = new_stat(x, {channels}), dbeta = new_stat(x, {channels});
  D::grn_backward({D::dtype_of(x), segments_of(offsets, x, rows_per_slot, segments), channels, gelu,
                   grad.const_data_ptr(), x.const_data_ptr(), gamma.const_data_ptr(), norm.const_data_ptr(), eps,
                   dx.mutable_data_ptr(), dgamma.mutable_data_ptr(), dbeta.mutable_data_ptr()},
                  x);
  return {dx, dgamma, dbeta};
}

}  // namespace binding
}  // namespace cnx
