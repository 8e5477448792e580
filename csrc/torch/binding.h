// Checks, allocation and pointers for the bindings. Only the stable ABI of libtorch (2.10) is used, so that one binary
// runs with later versions.
//
// A file a family: its schemas, one function an operator, and the devices that implement it. A function is written once
// for a device D (device_cpu.h, device_cuda.h): a class with `accepts(tensor)`, `dtype_of(tensor)`, `kind` for
// messages, and one function per kernel, `D::layer_norm_forward(params, like)`, that runs it on the device of the
// tensor `like`.
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
using Library = torch::stable::detail::StableLibrary;
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
inline void* mutable_pointer(OptionalTensor& t) {
  return t ? t->mutable_data_ptr() : nullptr;
}

inline std::vector<int64_t> sizes(const Tensor& t) {
  std::vector<int64_t> result(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) result[i] = t.size(i);
  return result;
}
inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> shape = sizes(x);
  shape.pop_back();
  return shape;
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
  return {.offsets = int32_pointer(offsets, rows, count + 1, "image_offsets"),
          .rows_per_slot = rows_per_slot,
          .count = count,
          .rows = row_count(rows)};
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
#define CNX_LIBRARY_FRAGMENT(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define CNX_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

// CNX_SCHEMAS(m) { m.def(...); }: the schemas of a family.
#define CNX_SCHEMAS(m) CNX_LIBRARY_FRAGMENT(CNX_LIBRARY, m)
