// Checks, allocation and pointers for the bindings. Only the stable ABI of libtorch (2.10) is used, so that one binary
// runs with later versions.
//
// A file a family: its schemas, one function an operator, and the devices that implement it. A function is written once
// for a device D (device_cpu.h, device_cuda.h): a class with `accepts(tensor)`, `dtype_of(tensor)`, `kind` for
// messages, `check_indices` and `check_offsets` of index tables, and one function per kernel,
// `D::layer_norm_forward(params, like)`, that runs it on the device of the tensor `like`.
//
// Operators can be called by anyone: everything they are given is checked before a kernel sees it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cnx/params.h"

// One sentence without the place in the source, which STD_TORCH_CHECK puts in front.
#define CNX_CHECK(condition, ...) ((condition) ? void() : ::cnx::binding::refuse(__VA_ARGS__))

namespace cnx {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Library = torch::stable::detail::StableLibrary;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "convnextv2_kernels: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline ScalarType stat_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A storage that was freed (as sharded training frees parameters) leaves sizes without data.
inline bool is_dense(const Tensor& t) {
  return t.is_contiguous() && (t.numel() == 0 || t.const_data_ptr() != nullptr);
}

template <class D>
void check_device(const Tensor& t, const char* name) {
  CNX_CHECK(is_dense(t) && D::accepts(t), name, " must be a contiguous ", D::kind, " tensor");
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* name) {
  CNX_CHECK(is_dense(t) && t.is_cpu() == like.is_cpu() && t.get_device() == like.get_device(), name,
            " must be contiguous and on the device of the features");
}

inline int64_t last_size(const Tensor& t) {
  return t.dim() ? t.size(t.dim() - 1) : 0;
}
inline int64_t row_count(const Tensor& t) {
  return last_size(t) ? t.numel() / last_size(t) : 0;
}

// Rows [..., C] on the device, C >= 1.
template <class D>
void check_rows(const Tensor& t, const char* name) {
  check_device<D>(t, name);
  CNX_CHECK(last_size(t) >= 1, name, " must be [..., C] with C >= 1");
}

inline void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_same_device(t, like, name);
  CNX_CHECK(t.scalar_type() == like.scalar_type() && t.numel() == like.numel(), name,
            " must have the dtype and size of the features");
}

inline void check_stat(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_same_device(t, like, name);
  CNX_CHECK(t.scalar_type() == stat_type(like) && t.numel() == numel, name, " must hold ", numel,
            " values of the statistics dtype");
}

inline void check_matrix(const Tensor& t, const char* name) {
  CNX_CHECK(t.dim() == 2 && t.size(1) >= 1, name, " must be a matrix of at least one column");
}

// NaN fails too.
inline void check_eps(double eps, const char* name = "eps") {
  CNX_CHECK(eps >= 0 && std::isfinite(eps), name, " must be a finite number >= 0, got ", eps);
}

inline void check_from(int64_t value, int64_t least, int64_t most, const char* name) {
  CNX_CHECK(value >= least && value <= most, name, " must be from ", least, " to ", most, ", got ", value);
}

// A product of sizes, each at least 0.
inline int64_t product(std::initializer_list<int64_t> sizes, const char* name) {
  int64_t result = 1;
  for (const int64_t size : sizes)
    CNX_CHECK(size >= 0 && !__builtin_mul_overflow(result, size, &result), name, " exceeds the range of int64");
  return result;
}

// Patches of `images` images; their indices are int32.
inline int64_t patch_count(int64_t images, int64_t grid_h, int64_t grid_w) {
  check_from(grid_h, 1, INT32_MAX, "grid_h");
  check_from(grid_w, 1, INT32_MAX, "grid_w");
  const int64_t count = product({images, grid_h, grid_w}, "the number of patches");
  check_from(count, 0, INT32_MAX, "the number of patches");
  return count;
}

// What a kernel writes may be `same` as one of its inputs, but not begin inside of it: threads would read the results
// of others.
inline void check_written(const Tensor& written, const Tensor& input, bool same, const char* name) {
  const auto* w = static_cast<const char*>(written.const_data_ptr());
  const auto* i = static_cast<const char*>(input.const_data_ptr());
  const int64_t w_bytes = written.numel() * static_cast<int64_t>(written.element_size());
  const int64_t i_bytes = input.numel() * static_cast<int64_t>(input.element_size());
  const bool apart = !w_bytes || !i_bytes || w + w_bytes <= i || i + i_bytes <= w;
  CNX_CHECK(apart || (same && w == i && w_bytes == i_bytes), name, " must not overlap the memory of another argument");
}

inline const int32_t* int32_pointer(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_same_device(t, like, name);
  CNX_CHECK(t.scalar_type() == ScalarType::Int && t.numel() == numel, name, " must be int32 with ", numel, " elements");
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Indices from `low` to `high`.
template <class D>
const int32_t* index_pointer(const Tensor& t, const Tensor& like, const IndexTable& expected, const char* name) {
  IndexTable table = expected;
  table.entries = int32_pointer(t, like, table.count, name);
  if (table.count) D::check_indices(table, like, name);
  return table.entries;
}

template <class D>
const int32_t* index_pointer(const OptionalTensor& t, const Tensor& like, const IndexTable& expected,
                             const char* name) {
  return t ? index_pointer<D>(*t, like, expected, name) : nullptr;
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

inline void check_segment_count(int64_t count) {
  check_from(count, 0, INT32_MAX - 1, "segments");
}

// The segments of `rows [..., C]`: they hold all rows.
template <class D>
Segments segments_of(const OptionalTensor& offsets, const Tensor& rows, int64_t rows_per_slot, int64_t count) {
  check_segment_count(count);
  Segments s{.rows_per_slot = rows_per_slot, .count = count, .rows = row_count(rows)};
  CNX_CHECK(rows_per_slot >= 1 && (!offsets || s.rows % rows_per_slot == 0), "rows_per_slot must divide the ", s.rows,
            " rows, got ", rows_per_slot);
  if (offsets) {
    s.offsets = int32_pointer(*offsets, rows, count + 1, "offsets");
    D::check_offsets(s, rows);
  } else {
    CNX_CHECK(count ? s.rows % count == 0 : s.rows == 0, "segments must divide the ", s.rows, " rows, got ", count);
  }
  return s;
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
  CNX_CHECK(half && type == ScalarType::Half, "expected float32, float64 or bfloat16", half ? " or float16" : "",
            " features");
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
