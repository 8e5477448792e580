// Operators of the depthwise convolution.
#include "device_cpu.h"
#include "device_cuda.h"

CNX_SCHEMAS(m) {
  m.def(
      "depthwise_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? neighbours, bool flip)"
      " -> Tensor");
  m.def(
      "depthwise_conv_normalize(Tensor x, Tensor weight, Tensor? bias, Tensor? neighbours, Tensor? ln_weight,"
      " Tensor? ln_bias, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "depthwise_conv_backward_weight(Tensor grad, Tensor x, Tensor? neighbours, int kernel_size)"
      " -> (Tensor dweight, Tensor dbias)");
}

namespace cnx {
namespace binding {
namespace {

template <class D>
ConvGeometry geometry_of(const Tensor& x, int64_t kernel_size, const OptionalTensor& neighbours) {
  check_device<D>(x, "x");
  CNX_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1,
            "x must be [maps, H, W, C] with H, W and C >= 1");
  CNX_CHECK(kernel_size % 2 == 1 && kernel_size >= 3 && kernel_size <= 11,
            "kernel size must be odd, from 3 to 11, got ", kernel_size);
  ConvGeometry g{.maps = x.size(0),
                 .height = x.size(1),
                 .width = x.size(2),
                 .channels = x.size(3),
                 .kernel_size = static_cast<int>(kernel_size)};
  if (neighbours) {
    CNX_CHECK(g.height == g.width, "packed patches must be square");
    // one more patch away for each side that fits in the radius
    const int64_t radius = kernel_size / 2, reach = radius / g.height + (radius % g.height != 0);
    const int64_t count = product({g.maps, 2 * reach + 1, 2 * reach + 1}, "the number of neighbours");
    g.neighbours = index_pointer<D>(neighbours, x, {.count = count, .low = -1, .high = g.maps - 1}, "neighbours");
  }
  return g;
}

template <class D>
ConvForward forward_params(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& neighbours) {
  ConvForward p{};
  p.dtype = D::dtype_of(x);
  p.geometry = geometry_of<D>(x, last_size(weight), neighbours);
  const int64_t channels = p.geometry.channels, k = p.geometry.kernel_size;
  check_stat(weight, x, product({channels, k, k}, "the size of the weight"), "weight");
  if (bias) check_stat(*bias, x, channels, "bias");
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = pointer(bias);
  return p;
}

template <class D>
Tensor depthwise_conv_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensor& neighbours, bool flip) {
  ConvForward p = forward_params<D>(x, weight, bias, neighbours);
  Tensor y = new_features(x, sizes(x));
  if (residual) check_like(*residual, x, "residual");
  p.residual = pointer(residual);
  p.flip = flip;
  p.y = y.mutable_data_ptr();
  D::conv_forward(p, x);
  return y;
}

template <class D>
std::tuple<Tensor, Tensor> depthwise_conv_normalize(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& neighbours, const OptionalTensor& ln_weight,
                                                    const OptionalTensor& ln_bias, double eps) {
  ConvForward p = forward_params<D>(x, weight, bias, neighbours);
  check_eps(eps);
  if (ln_weight) check_stat(*ln_weight, x, x.size(3), "ln_weight");
  if (ln_bias) check_stat(*ln_bias, x, x.size(3), "ln_bias");
  p.ln_weight = pointer(ln_weight);
  p.ln_bias = pointer(ln_bias);
  Tensor z = new_features(x, sizes(x));
  Tensor rstd = new_stat(x, {x.size(0), x.size(1), x.size(2)});
  p.y = z.mutable_data_ptr();
  p.normalize = true;
  p.eps = eps;
  p.rstd = rstd.mutable_data_ptr();
  D::conv_forward(p, x);
  return {z, rstd};
}

template <class D>
std::tuple<Tensor, Tensor> depthwise_conv_backward_weight(const Tensor& grad, const Tensor& x,
                                                          const OptionalTensor& neighbours, int64_t kernel_size) {
  ConvWeightGrad p{};
  p.dtype = D::dtype_of(x);
  p.geometry = geometry_of<D>(x, kernel_size, neighbours);
  check_like(grad, x, "grad");
  Tensor dweight = new_stat(x, {x.size(3), 1, kernel_size, kernel_size});
  Tensor dbias = new_stat(x, {x.size(3)});
  p.x = x.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  D::conv_weight_grad(p, x);
  return {dweight, dbias};
}

template <class D>
void implement(Library& m) {
  m.impl("depthwise_conv_forward", TORCH_BOX(&depthwise_conv_forward<D>));
  m.impl("depthwise_conv_normalize", TORCH_BOX(&depthwise_conv_normalize<D>));
  m.impl("depthwise_conv_backward_weight", TORCH_BOX(&depthwise_conv_backward_weight<D>));
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_IMPLEMENT_CPU(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement)
