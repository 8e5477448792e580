// The schemas of the kernels, once for every backend that implements them as operators. The composite operators of the
// MLP and the block (convnextv2_kernels/ops/_operators.py) are built from these. Contracts, tensor by tensor: the
// structs of csrc/include/cnx/params.h and csrc/include/cnx/cuda.h, and for the MLP's parts
// convnextv2_kernels/backends/reference/mlp.py.
//
// `tanh` chooses GELU's form; a name would leak, as the stable ABI of PyTorch 2.13 frees no string argument.
#include <string>

#include "binding.h"

CNX_LIBRARY_DEF(CNX_LIBRARY, m) {
  m.def(
      "depthwise_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? neighbours, bool flip)"
      " -> Tensor");
  m.def(
      "depthwise_conv_normalize(Tensor x, Tensor weight, Tensor? bias, Tensor? neighbours, Tensor? ln_weight,"
      " Tensor? ln_bias, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "depthwise_conv_backward_weight(Tensor grad, Tensor x, Tensor? neighbours, int kernel_size)"
      " -> (Tensor dweight, Tensor dbias)");
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
  m.def("gelu_square_sum_(Tensor(a!) a, bool tanh, Tensor? offsets, int rows_per_slot, int segments) -> Tensor");
  m.def(
      "scale_rows_(Tensor(a!) h, Tensor scale, Tensor beta, Tensor? offsets, int rows_per_slot, int segments)"
      " -> ()");
  m.def(
      "mlp_backward_reduce(Tensor a, Tensor ds, bool tanh, Tensor? offsets, int rows_per_slot, int segments)"
      " -> Tensor");
  m.def(
      "mlp_backward_pointwise_(Tensor(a!) a, Tensor(b!) ds, Tensor scale, Tensor kappa, Tensor beta,"
      " bool tanh, Tensor? offsets, int rows_per_slot, int segments) -> Tensor");
  m.def("grn_scale(Tensor square_sum, Tensor gamma, float eps) -> (Tensor norm, Tensor scale)");
  m.def("grn_gradient(Tensor t, Tensor norm, Tensor gamma, float eps) -> (Tensor kappa, Tensor dgamma)");
  m.def("column_sum(Tensor x) -> Tensor");
  m.def("transpose_rows(Tensor x) -> Tensor");
  m.def("gather_patches(Tensor x, Tensor patch_of_slot, int grid_h, int grid_w) -> Tensor");
  m.def("scatter_patches(Tensor x, Tensor slot_of_patch, int grid_h, int grid_w, Tensor? fill) -> Tensor");
  m.def("patch_pixels(Tensor images, Tensor? patch_of_slot, int grid_h, int grid_w) -> Tensor");

  // CUDA only. Arguments marked (a!) are results written in place of what they held; they may be the inputs themselves.
  const char* segments = "Tensor? offsets, int rows_per_slot, int segments";
  const auto def = [&](const char* head, const char* tail) { m.def((std::string(head) + segments + tail).c_str()); };
  def("gelu_statistics(Tensor a, Tensor(a!)? h, Tensor gamma, float eps, bool tanh, ",
      ") -> (Tensor norm, Tensor scale)");
  def("gelu_scale(Tensor a, Tensor(a!) out, Tensor? scale, bool tanh, ", ") -> ()");
  def("mlp_backward_statistics(Tensor? a, Tensor? ds, Tensor? t, Tensor norm, Tensor gamma, float eps, bool tanh, ",
      ") -> (Tensor scale, Tensor kappa, Tensor dgamma)");
  def("mlp_backward_pointwise(Tensor a, Tensor ds, Tensor scale, Tensor kappa, Tensor(a!)? hs, Tensor(b!) da,"
      " bool tanh, ",
      ") -> Tensor");
  m.def(
      "mlp_parameters(Tensor w1, Tensor b1, Tensor w2, Tensor? b2, Tensor beta, Tensor? ln_weight, Tensor? ln_bias,"
      " Tensor like) -> (Tensor w1, Tensor b1, Tensor w2, Tensor b2)");
  m.def(
      "unfold_layer_norm(Tensor w1, Tensor ln_weight, Tensor ln_bias, Tensor db1, Tensor(a!) dw1)"
      " -> (Tensor dln_weight, Tensor dln_bias)");
  m.def("products_reduce(Tensor g, Tensor w2) -> Tensor");
  m.def("products_weight(Tensor g, Tensor scale, Tensor d_sum, Tensor beta) -> Tensor");
  m.def("normalized_backward_input(Tensor dz, Tensor z, Tensor rstd) -> Tensor");
  m.def(
      "layout_from_kept(Tensor ids, int grid_h, int grid_w)"
      " -> (Tensor slot_of_patch, Tensor patch_of_slot, Tensor image_offsets)");
  m.def("neighbour_slots(Tensor slot_of_patch, Tensor patch_of_slot, int grid_h, int grid_w, int radius) -> Tensor");
}
