// What the thin bindings share: checks, allocation, pointers, and PyTorch's thread pool as the kernels' runner.
// Only the stable ABI of libtorch (2.10) is used, so one binary serves later versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

namespace cnx {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "convnextv2_kernels: expected float32, float64 or bfloat16 features");
  }
}

inline ScalarType stat_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_features(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.is_cpu(), "convnextv2_kernels: ", name, " must be a contiguous CPU tensor");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_features(t, name);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() && t.numel() == like.numel(), "convnextv2_kernels: ", name,
                  " must have the dtype and size of the features");
}

inline void check_stat(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_features(t, name);
  STD_TORCH_CHECK(t.scalar_type() == stat_type(like) && t.numel() == numel, "convnextv2_kernels: ", name, " must hold ",
                  numel, " values of the statistics dtype");
}

inline const int32_t* int32_pointer(const OptionalTensor& t, int64_t numel, const char* name) {
  if (!t) return nullptr;
  check_features(*t, name);
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

// at::parallel_for: the number of threads is what torch.set_num_threads says.
inline Threads torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    torch_parallel_for(begin, end, grain, body, context);
  }};
}

inline Segments segments_of(const OptionalTensor& offsets, int64_t rows_per_slot, int64_t count, int64_t rows) {
  return {int32_pointer(offsets, count + 1, "image_offsets"), rows_per_slot, count, rows};
}

}  // namespace binding
}  // namespace cnx
