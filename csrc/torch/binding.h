// What the thin bindings share: checks, allocation, pointers. Only the stable ABI of libtorch (2.10) is used, so one
// binary serves later versions.
//
// A binding is written once for a device D, a class with `accepts(tensor)`, `dtype_of(tensor)`, `kind` for messages,
// and one function per kernel, `D::layer_norm_forward(params, like)`, that runs it where the tensor `like` lives.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cnx/params.h"

namespace cnx {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType stat_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class D>
void check_device(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && D::accepts(t), "convnextv2_kernels: ", name, " must be a contiguous ", D::kind,
                  " tensor");
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.is_cpu() == like.is_cpu() && t.get_device() == like.get_device(),
                  "convnextv2_kernels: ", name, " must be contiguous and on the device of the features");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_same_device(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.numel() == like.numel(), "convnextv2_kernels: ", name,
                  " must have the dtype and size of the features");
}

inline void check_stat(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_same_device(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == stat_type(like) && t.numel() == numel, "convnextv2_kernels: ", name, " must hold ",
                  numel, " values of the statistics dtype");
}

inline const int32_t* int32_pointer(const OptionalTensor& t, const Tensor& like, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check_same_device(*t, like, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && (numel < 0 || t->numel() == numel),
                  "convnextv2_kernels: ", name, " must be int32 with ", numel, " elements");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline const void* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}

inline std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> result(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) result[i] = t.size(i);
  return result;
}

inline Tensor new_stat(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, std::make_optional(stat_type(like)));
}
inline Tensor new_features(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape);
}

inline int64_t last_size(const Tensor& t) {
  return t.size(t.dim() - 1);
}
inline int64_t row_count(const Tensor& t) {
  return last_size(t) ? t.numel() / last_size(t) : 0;
}

inline Segments segments_of(const OptionalTensor& offsets, const Tensor& rows, int64_t rows_per_slot, int64_t count) {
  return {int32_pointer(offsets, rows, count + 1, "image_offsets"), rows_per_slot, count, row_count(rows)};
}

inline Activation gelu_form(bool tanh) {
  return tanh ? Activation::gelu_tanh : Activation::gelu;
}

// float32, float64 and bfloat16; float16 where the device has kernels for it.
inline DType feature_type(const Tensor& t, bool half) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::Double) return DType::f64;
  if (type == ScalarType::BFloat16) return DType::bf16;
  STD_TORCH_CHECK(half && type == ScalarType::Half, "convnextv2_kernels: expected float32, float64 or bfloat16",
                  half ? " or float16" : "", " features");
  return DType::f16;
}

}  // namespace binding
}  // namespace cnx

// Namespace of the operators; the emulation build has its own. The macros expand it before PyTorch's paste it.
#if !defined(CNX_LIBRARY)
#define CNX_LIBRARY convnextv2_kernels
#endif
#define CNX_LIBRARY_DEF(library, m) STABLE_TORCH_LIBRARY(library, m)
#define CNX_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

// The operators that every compiled backend implements, for STABLE_TORCH_LIBRARY_IMPL.
#define CNX_IMPLEMENT_SHARED(m, D)                                                                             \
  m.impl("depthwise_conv_forward", TORCH_BOX(&cnx::binding::depthwise_conv_forward<D>));                       \
  m.impl("depthwise_conv_normalize", TORCH_BOX(&cnx::binding::depthwise_conv_normalize<D>));                   \
  m.impl("depthwise_conv_backward_weight", TORCH_BOX(&cnx::binding::depthwise_conv_backward_weight<D>));       \
  m.impl("layer_norm_forward", TORCH_BOX(&cnx::binding::layer_norm_forward<D>));                               \
  m.impl("layer_norm_backward", TORCH_BOX(&cnx::binding::layer_norm_backward<D>));                             \
  m.impl("normalized_backward", TORCH_BOX(&cnx::binding::normalized_backward<D>));                             \
  m.impl("space_to_depth_normalize", TORCH_BOX(&cnx::binding::space_to_depth_normalize<D>));                   \
  m.impl("space_to_depth_normalize_backward", TORCH_BOX(&cnx::binding::space_to_depth_normalize_backward<D>)); \
  m.impl("grn_forward", TORCH_BOX(&cnx::binding::grn_forward<D>));                                             \
  m.impl("grn_backward", TORCH_BOX(&cnx::binding::grn_backward<D>));                                           \
  m.impl("gather_patches", TORCH_BOX(&cnx::binding::gather<D>));                                               \
  m.impl("scatter_patches", TORCH_BOX(&cnx::binding::scatter<D>));                                             \
  m.impl("patch_pixels", TORCH_BOX(&cnx::binding::pixel_rows<D>))
