// Operators of the MLP's parts between its GEMMs. The composite operators of the MLP and the block
// (convnextv2_kernels/ops/_operators.py) are built from these; contracts: the structs of csrc/include/cnx and
// convnextv2_kernels/backends/reference/mlp.py.
//
// `tanh` chooses GELU's form, without `gelu` the rows are activated already; a name would leak, as the stable ABI of
// PyTorch 2.13 frees no string argument. Arguments marked (a!) are results written in place of what they held; they may
// be the inputs themselves.
#include "device_cpu.h"
#include "device_cuda.h"

CNX_SCHEMAS(m) {
  m.def(
      "gelu_statistics(Tensor a, Tensor(a!)? h, Tensor gamma, float eps, bool tanh, Tensor? offsets,"
      " int rows_per_slot, int segments) -> (Tensor norm, Tensor scale)");
  m.def(
      "gelu_scale(Tensor a, Tensor(a!) out, Tensor? scale, bool tanh, Tensor? offsets, int rows_per_slot,"
      " int segments, Tensor? beta=None, bool gelu=True) -> ()");
  m.def(
      "mlp_backward_statistics(Tensor? a, Tensor? ds, Tensor? t, Tensor norm, Tensor gamma, float eps, bool tanh,"
      " Tensor? offsets, int rows_per_slot, int segments) -> (Tensor scale, Tensor kappa, Tensor dgamma)");
  m.def(
      "mlp_backward_pointwise(Tensor a, Tensor ds, Tensor scale, Tensor kappa, Tensor(a!)? hs, Tensor(b!) da,"
      " bool tanh, Tensor? offsets, int rows_per_slot, int segments, Tensor? beta=None) -> Tensor");
  m.def("column_sum(Tensor x) -> Tensor");
  // CPU only
  m.def("transpose_rows(Tensor x) -> Tensor");
  // CUDA only
  m.def(
      "mlp_parameters(Tensor w1, Tensor b1, Tensor w2, Tensor? b2, Tensor beta, Tensor? ln_weight, Tensor? ln_bias,"
      " Tensor like) -> (Tensor w1, Tensor b1, Tensor w2, Tensor b2)");
  m.def(
      "unfold_layer_norm(Tensor w1, Tensor ln_weight, Tensor ln_bias, Tensor db1, Tensor(a!) dw1)"
      " -> (Tensor dln_weight, Tensor dln_bias)");
  m.def("products_reduce(Tensor g, Tensor w2) -> Tensor");
  m.def("products_weight(Tensor g, Tensor scale, Tensor d_sum, Tensor beta) -> Tensor");
}

namespace cnx {
namespace binding {
namespace {

template <class D>
Tensor column_sum(const Tensor& x) {
  check_rows<D>(x, "x");
  Tensor sums = new_stat(x, {last_size(x)});
  D::column_sum({.dtype = D::dtype_of(x),
                 .rows = row_count(x),
                 .channels = last_size(x),
                 .x = x.const_data_ptr(),
                 .sums = sums.mutable_data_ptr()},
                x);
  return sums;
}

template <class D>
std::tuple<Tensor, Tensor> gelu_statistics(const Tensor& a, std::optional<Tensor> h, const Tensor& gamma, double eps,
                                           bool tanh, const OptionalTensor& offsets, int64_t rows_per_slot,
                                           int64_t segments) {
  check_rows<D>(a, "a");
  check_eps(eps);
  const Segments rows = segments_of<D>(offsets, a, rows_per_slot, segments);
  const int64_t channels = last_size(a);
  check_stat(gamma, a, channels, "gamma");
  if (h) {
    check_like(*h, a, "h");
    check_written(*h, a, true, "h");
    check_written(*h, gamma, false, "h");
  }
  Tensor norm = new_stat(a, {segments, channels}), scale = new_stat(a, {segments, channels});
  D::gelu_statistics(
      {
          .dtype = D::dtype_of(a),
          .segments = rows,
          .channels = channels,
          .activation = gelu_form(tanh),
          .a = a.const_data_ptr(),
          .h = mutable_pointer(h),
          .gamma = gamma.const_data_ptr(),
          .eps = eps,
          .norm = norm.mutable_data_ptr(),
          .scale = scale.mutable_data_ptr(),
      },
      a);
  return {norm, scale};
}

template <class D>
void gelu_scale(const Tensor& a, Tensor out, const OptionalTensor& scale, bool tanh, const OptionalTensor& offsets,
                int64_t rows_per_slot, int64_t segments, const OptionalTensor& beta, bool gelu) {
  check_rows<D>(a, "a");
  check_like(out, a, "out");
  const Segments rows = segments_of<D>(offsets, a, rows_per_slot, segments);
  const int64_t channels = last_size(a);
  check_written(out, a, true, "out");
  if (scale) {
    check_stat(*scale, a, product({segments, channels}, "the size of scale"), "scale");
    check_written(out, *scale, false, "out");
  }
  if (beta) {
    check_stat(*beta, a, channels, "beta");
    check_written(out, *beta, false, "out");
  }
  D::gelu_scale(
      {
          .dtype = D::dtype_of(a),
          .segments = rows,
          .channels = channels,
          .activation = gelu ? gelu_form(tanh) : Activation::identity,
          .a = a.const_data_ptr(),
          .scale = pointer(scale),
          .beta = pointer(beta),
          .out = out.mutable_data_ptr(),
      },
      a);
}

template <class D>
std::tuple<Tensor, Tensor, Tensor> mlp_backward_statistics(const OptionalTensor& a, const OptionalTensor& ds,
                                                           const OptionalTensor& t, const Tensor& norm,
                                                           const Tensor& gamma, double eps, bool tanh,
                                                           const OptionalTensor& offsets, int64_t rows_per_slot,
                                                           int64_t segments) {
  check_rows<D>(norm, "norm");
  check_eps(eps);
  CNX_CHECK(bool(a) == bool(ds) && bool(a) != bool(t), "either a and ds or their sums t must be given");
  check_segment_count(segments);
  const int64_t channels = last_size(norm), size = product({segments, channels}, "the size of norm");
  const Tensor& like = a ? *a : norm;
  check_stat(norm, like, size, "norm");
  check_stat(gamma, like, channels, "gamma");
  Segments rows{.rows_per_slot = 1, .count = segments};
  if (a) {
    check_rows<D>(*a, "a");
    CNX_CHECK(last_size(*a) == channels, "a must have the ", channels, " columns of norm");
    check_like(*ds, *a, "ds");
    rows = segments_of<D>(offsets, *a, rows_per_slot, segments);
  } else {
    check_from(rows_per_slot, 1, INT32_MAX, "rows_per_slot");
    check_stat(*t, like, size, "t");
  }
  Tensor scale = new_stat(norm, {segments, channels}), kappa = new_stat(norm, {segments, channels}),
         dgamma = new_stat(norm, {channels});
  D::mlp_backward_statistics(
      {
          .dtype = D::dtype_of(like),
          .segments = rows,
          .channels = channels,
          .activation = gelu_form(tanh),
          .a = pointer(a),
          .ds = pointer(ds),
          .t = pointer(t),
          .norm = norm.const_data_ptr(),
          .gamma = gamma.const_data_ptr(),
          .eps = eps,
          .scale = scale.mutable_data_ptr(),
          .kappa = kappa.mutable_data_ptr(),
          .dgamma = dgamma.mutable_data_ptr(),
      },
      norm);
  return {scale, kappa, dgamma};
}

template <class D>
Tensor mlp_backward_pointwise(const Tensor& a, const Tensor& ds, const Tensor& scale, const Tensor& kappa,
                              std::optional<Tensor> hs, Tensor da, bool tanh, const OptionalTensor& offsets,
                              int64_t rows_per_slot, int64_t segments, const OptionalTensor& beta) {
  check_rows<D>(a, "a");
  const Segments rows = segments_of<D>(offsets, a, rows_per_slot, segments);
  const int64_t channels = last_size(a), size = product({segments, channels}, "the size of scale");
  check_like(ds, a, "ds");
  check_like(da, a, "da");
  check_stat(scale, a, size, "scale");
  check_stat(kappa, a, size, "kappa");
  if (beta) check_stat(*beta, a, channels, "beta");
  const auto check_result = [&](const Tensor& written, bool over_a, bool over_ds, const char* name) {
    check_written(written, a, over_a, name);
    check_written(written, ds, over_ds, name);
    check_written(written, scale, false, name);
    check_written(written, kappa, false, name);
    if (beta) check_written(written, *beta, false, name);
  };
  check_result(da, false, true, "da");
  if (hs) {
    check_like(*hs, a, "hs");
    check_result(*hs, true, false, "hs");
    check_written(*hs, da, false, "hs");
  }
  Tensor db = new_stat(a, {channels});
  D::mlp_backward_pointwise(
      {
          .dtype = D::dtype_of(a),
          .segments = rows,
          .channels = channels,
          .activation = gelu_form(tanh),
          .a = a.const_data_ptr(),
          .ds = ds.const_data_ptr(),
          .scale = scale.const_data_ptr(),
          .kappa = kappa.const_data_ptr(),
          .beta = pointer(beta),
          .hs = mutable_pointer(hs),
          .da = da.mutable_data_ptr(),
          .db = db.mutable_data_ptr(),
      },
      a);
  return db;
}

// A weight already in the dtype of the operands, with nothing to fold in, is not copied: its place is an empty tensor.
template <class D>
std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_parameters(const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                                          const OptionalTensor& b2, const Tensor& beta,
                                                          const OptionalTensor& ln_weight,
                                                          const OptionalTensor& ln_bias, const Tensor& like) {
  check_device<D>(w1, "w1");
  check_device<D>(like, "like");
  check_matrix(w1, "w1");
  check_matrix(w2, "w2");
  check_same_device(w1, like, "w1");
  check_same_device(w2, like, "w2");
  const int64_t hidden = w1.size(0), inputs = w1.size(1), outputs = w2.size(0);
  const bool same = w1.scalar_type() == like.scalar_type();
  CNX_CHECK(w2.size(1) == hidden, "w2 must be [O, H] with the ", hidden, " rows of w1 [H, C]");
  CNX_CHECK(w2.scalar_type() == w1.scalar_type() && (same || w1.scalar_type() == stat_type(like)),
            "w1 and w2 must both have the dtype of the rows or of the statistics");
  CNX_CHECK(bool(ln_weight) == bool(ln_bias), "ln_weight and ln_bias must both be given, or neither");
  check_stat(b1, like, hidden, "b1");
  if (b2) check_stat(*b2, like, outputs, "b2");
  check_stat(beta, like, hidden, "beta");
  if (ln_weight) check_stat(*ln_weight, like, inputs, "ln_weight");
  if (ln_bias) check_stat(*ln_bias, like, inputs, "ln_bias");
  const bool copy1 = !same || ln_weight;
  Tensor w1_out = new_features(like, {copy1 ? hidden : 0, inputs}), b1_out = new_features(like, {hidden});
  Tensor w2_out = new_features(like, {same ? 0 : outputs, hidden}), b2_out = new_features(like, {b2 ? outputs : 0});
  D::mlp_parameters(
      {
          .dtype = D::dtype_of(like),
          .wide = w1.scalar_type() == stat_type(like),
          .inputs = inputs,
          .hidden = hidden,
          .outputs = outputs,
          .w1 = w1.const_data_ptr(),
          .b1 = b1.const_data_ptr(),
          .w2 = w2.const_data_ptr(),
          .b2 = pointer(b2),
          .beta = beta.const_data_ptr(),
          .ln_weight = pointer(ln_weight),
          .ln_bias = pointer(ln_bias),
          .w1_out = copy1 ? w1_out.mutable_data_ptr() : nullptr,
          .b1_out = b1_out.mutable_data_ptr(),
          .w2_out = same ? nullptr : w2_out.mutable_data_ptr(),
          .b2_out = b2_out.mutable_data_ptr(),
      },
      like);
  return {w1_out, b1_out, w2_out, b2_out};
}

template <class D>
std::tuple<Tensor, Tensor> unfold_layer_norm(const Tensor& w1, const Tensor& ln_weight, const Tensor& ln_bias,
                                             const Tensor& db1, Tensor dw1) {
  check_device<D>(w1, "w1");
  check_matrix(w1, "w1");
  const int64_t hidden = w1.size(0), inputs = w1.size(1);
  check_stat(ln_weight, w1, inputs, "ln_weight");
  check_stat(ln_bias, w1, inputs, "ln_bias");
  check_stat(db1, w1, hidden, "db1");
  check_stat(dw1, w1, hidden * inputs, "dw1");
  for (const Tensor& input : {w1, ln_weight, ln_bias, db1}) check_written(dw1, input, false, "dw1");
  Tensor dweight = new_stat(w1, {inputs}), dbias = new_stat(w1, {inputs});
  D::unfold_layer_norm(
      {
          .dtype = D::dtype_of(w1),
          .inputs = inputs,
          .hidden = hidden,
          .w1 = w1.const_data_ptr(),
          .ln_weight = ln_weight.const_data_ptr(),
          .ln_bias = ln_bias.const_data_ptr(),
          .db1 = db1.const_data_ptr(),
          .dw1 = dw1.mutable_data_ptr(),
          .dln_weight = dweight.mutable_data_ptr(),
          .dln_bias = dbias.mutable_data_ptr(),
      },
      w1);
  return {dweight, dbias};
}

template <class D>
void check_products(const Tensor& g) {
  check_rows<D>(g, "g");
  CNX_CHECK(g.dim() == 3 && g.scalar_type() == stat_type(g), "g must be [N, O, H] of the statistics dtype");
}

template <class D>
Tensor products_reduce(const Tensor& g, const Tensor& w2) {
  check_products<D>(g);
  const int64_t images = g.size(0), outputs = g.size(1), hidden = g.size(2);
  check_stat(g, w2, g.numel(), "g");
  check_same_device(w2, g, "w2");
  CNX_CHECK(w2.numel() == outputs * hidden, "w2 must be [O, H]");
  Tensor t = new_stat(g, {images, hidden});
  D::products_reduce(
      {
          .dtype = D::dtype_of(w2),
          .images = images,
          .outputs = outputs,
          .hidden = hidden,
          .g = g.const_data_ptr(),
          .w2 = w2.const_data_ptr(),
          .t = t.mutable_data_ptr(),
      },
      g);
  return t;
}

template <class D>
Tensor products_weight(const Tensor& g, const Tensor& scale, const Tensor& d_sum, const Tensor& beta) {
  check_products<D>(g);
  const int64_t images = g.size(0), outputs = g.size(1), hidden = g.size(2);
  check_stat(scale, g, images * hidden, "scale");
  check_stat(d_sum, g, outputs, "d_sum");
  check_stat(beta, g, hidden, "beta");
  Tensor dw2 = new_stat(g, {outputs, hidden});
  D::products_weight(
      {
          .dtype = D::dtype_of(g),
          .images = images,
          .outputs = outputs,
          .hidden = hidden,
          .g = g.const_data_ptr(),
          .scale = scale.const_data_ptr(),
          .d_sum = d_sum.const_data_ptr(),
          .beta = beta.const_data_ptr(),
          .dw2 = dw2.mutable_data_ptr(),
      },
      g);
  return dw2;
}

template <class D>
Tensor transpose_rows(const Tensor& x) {
  check_device<D>(x, "x");
  CNX_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "x must be a float32 matrix");
  Tensor y = new_features(x, {x.size(1), x.size(0)});
  D::transpose_rows(static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1),
                    static_cast<float*>(y.mutable_data_ptr()));
  return y;
}

template <class D>
void implement(Library& m) {
  m.impl("gelu_statistics", TORCH_BOX(&gelu_statistics<D>));
  m.impl("gelu_scale", TORCH_BOX(&gelu_scale<D>));
  m.impl("mlp_backward_statistics", TORCH_BOX(&mlp_backward_statistics<D>));
  m.impl("mlp_backward_pointwise", TORCH_BOX(&mlp_backward_pointwise<D>));
  m.impl("column_sum", TORCH_BOX(&column_sum<D>));
}

template <class D>
void implement_cpu(Library& m) {
  m.impl("transpose_rows", TORCH_BOX(&transpose_rows<D>));
}

template <class D>
void implement_cuda(Library& m) {
  m.impl("mlp_parameters", TORCH_BOX(&mlp_parameters<D>));
  m.impl("unfold_layer_norm", TORCH_BOX(&unfold_layer_norm<D>));
  m.impl("products_reduce", TORCH_BOX(&products_reduce<D>));
  m.impl("products_weight", TORCH_BOX(&products_weight<D>));
}

}  // namespace
}  // namespace binding
}  // namespace cnx

CNX_IMPLEMENT_CPU(cnx::binding::implement)
CNX_IMPLEMENT_CPU(cnx::binding::implement_cpu)
CNX_IMPLEMENT_CUDA(cnx::binding::implement)
CNX_IMPLEMENT_CUDA(cnx::binding::implement_cuda)
