// CPU bindings: the element-wise parts of the chunked MLP, the small statistics of GRN, and a transpose.
#include "cpu.h"

namespace cnx {
namespace binding {
namespace {

MlpRows rows_of(const Tensor& a, const OptionalTensor& offsets, int64_t rows_per_slot, int64_t segments) {
  check_device<Cpu>(a, "a");
  MlpRows p{};
  p.dtype = Cpu::dtype_of(a);
  p.segments = segments_of(offsets, a, rows_per_slot, segments);
  p.channels = last_size(a);
  p.a = const_cast<void*>(a.const_data_ptr());
  return p;
}

Tensor gelu_square_sum_(Tensor a, bool tanh, const OptionalTensor& offsets, int64_t rows_per_slot, int64_t segments) {
  MlpRows p = rows_of(a, offsets, rows_per_slot, segments);
  p.activation = gelu_form(tanh);
  Tensor sums = new_stat(a, {segments, p.channels});
  p.sums = sums.mutable_data_ptr();
  kernels().gelu_square_sum(p, torch_threads());
  return sums;
}

void scale_rows_(Tensor h, const Tensor& scale, const Tensor& beta, const OptionalTensor& offsets,
                 int64_t rows_per_slot, int64_t segments) {
  MlpRows p = rows_of(h, offsets, rows_per_slot, segments);
  check_stat(scale, h, segments * p.channels, "scale");
  check_stat(beta, h, p.channels, "beta");
  p.beta = beta.const_data_ptr();
  p.scale = scale.const_data_ptr();
  kernels().scale_rows(p, torch_threads());
}

Tensor mlp_backward_reduce(const Tensor& a, const Tensor& ds, bool tanh, const OptionalTensor& offsets,
                           int64_t rows_per_slot, int64_t segments) {
  MlpRows p = rows_of(a, offsets, rows_per_slot, segments);
  p.activation = gelu_form(tanh);
  check_like(ds, a, "ds");
  Tensor sums = new_stat(a, {segments, p.channels});
  p.ds = const_cast<void*>(ds.const_data_ptr());
  p.sums = sums.mutable_data_ptr();
  kernels().mlp_backward_reduce(p, torch_threads());
  return sums;
}

Tensor mlp_backward_pointwise_(Tensor a, Tensor ds, const Tensor& scale, const Tensor& kappa, const Tensor& beta,
                               bool tanh, const OptionalTensor& offsets, int64_t rows_per_slot, int64_t segments) {
  MlpRows p = rows_of(a, offsets, rows_per_slot, segments);
  p.activation = gelu_form(tanh);
  check_like(ds, a, "ds");
  check_stat(scale, a, segments * p.channels, "scale");
  check_stat(kappa, a, segments * p.channels, "kappa");
  check_stat(beta, a, p.channels, "beta");
  p.beta = beta.const_data_ptr();
  Tensor sums = new_stat(a, {p.channels});
  p.ds = ds.mutable_data_ptr();
  p.scale = scale.const_data_ptr();
  p.kappa = kappa.const_data_ptr();
  p.sums = sums.mutable_data_ptr();
  kernels().mlp_backward_pointwise(p, torch_threads());
  return sums;
}

Tensor column_sum(const Tensor& x) {
  MlpRows p = rows_of(x, std::nullopt, 1, 1);
  Tensor sums = new_stat(x, {p.channels});
  p.sums = sums.mutable_data_ptr();
  kernels().column_sum(p, torch_threads());
  return sums;
}

GrnStatistics statistics_of(const Tensor& input, const Tensor& gamma, double eps) {
  check_stat(input, input, input.numel(), "input");
  check_stat(gamma, input, last_size(input), "gamma");
  GrnStatistics p{};
  p.dtype = Cpu::dtype_of(input);
  p.count = row_count(input);
  p.channels = last_size(input);
  p.input = input.const_data_ptr();
  p.gamma = gamma.const_data_ptr();
  p.eps = eps;
  return p;
}

std::tuple<Tensor, Tensor> grn_scale(const Tensor& square_sum, const Tensor& gamma, double eps) {
  GrnStatistics p = statistics_of(square_sum, gamma, eps);
  Tensor norm = new_stat(square_sum, sizes(square_sum)), scale = new_stat(square_sum, sizes(square_sum));
  p.norm = norm.mutable_data_ptr();
  p.scale = scale.mutable_data_ptr();
  kernels().grn_scale(p);
  return {norm, scale};
}

std::tuple<Tensor, Tensor> grn_gradient(const Tensor& t, const Tensor& norm, const Tensor& gamma, double eps) {
  GrnStatistics p = statistics_of(t, gamma, eps);
  check_stat(norm, t, t.numel(), "norm");
  Tensor kappa = new_stat(t, sizes(t)), dgamma = new_stat(t, {p.channels});
  p.norm_in = norm.const_data_ptr();
  p.kappa = kappa.mutable_data_ptr();
  p.dgamma = dgamma.mutable_data_ptr();
  kernels().grn_gradient(p);
  return {kappa, dgamma};
}

Tensor transpose_rows(const Tensor& x) {
  check_device<Cpu>(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float,
                  "convnextv2_kernels: x must be a float32 matrix");
  Tensor y = new_features(x, {x.size(1), x.size(0)});
  transpose_f32(static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1),
                static_cast<float*>(y.mutable_data_ptr()), torch_threads());
  return y;
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_LIBRARY_IMPL(CNX_LIBRARY, CPU, m) {
  m.impl("gelu_square_sum_", TORCH_BOX(&cnx::binding::gelu_square_sum_));
  m.impl("scale_rows_", TORCH_BOX(&cnx::binding::scale_rows_));
  m.impl("mlp_backward_reduce", TORCH_BOX(&cnx::binding::mlp_backward_reduce));
  m.impl("mlp_backward_pointwise_", TORCH_BOX(&cnx::binding::mlp_backward_pointwise_));
  m.impl("column_sum", TORCH_BOX(&cnx::binding::column_sum));
  m.impl("grn_scale", TORCH_BOX(&cnx::binding::grn_scale));
  m.impl("grn_gradient", TORCH_BOX(&cnx::binding::grn_gradient));
  m.impl("transpose_rows", TORCH_BOX(&cnx::binding::transpose_rows));
}
