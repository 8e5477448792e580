// The element-wise passes of the MLP that carry no statistics, and plain column sums.
#include "../common/columns.cuh"
#include "row_passes.h"

namespace cnx {
namespace cuda {
namespace {

template <class F>
void with_accumulator(DType dtype, const F& f) {
  dtype == DType::f64 ? f(Type<double>{}) : f(Type<float>{});
}

// Partial sums [parts, channels] that are added to one row; a single part needs no workspace.
int64_t part_count(DType dtype, const Segments& segments, int64_t channels) {
  int64_t splits = 1;
  dispatch(dtype, [&](auto type) { splits = column_splits<typename decltype(type)::type>(segments, channels); });
  return segments.count * splits;
}

int64_t parts_bytes(DType dtype, const Segments& segments, int64_t channels) {
  const int64_t parts = part_count(dtype, segments, channels);
  const int64_t each = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return parts == 1 ? 0 : (parts + SumTree(parts).spare()) * channels * each;
}

void add_parts(DType dtype, int64_t parts, int64_t channels, void* sums, const Launch& launch) {
  if (parts == 1) return;
  with_accumulator(dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    A* partial = static_cast<A*>(launch.workspace);
    SumTree(parts).template run<A>(partial, channels, static_cast<A*>(sums), partial + parts * channels, launch);
  });
}

}  // namespace

int64_t gelu_scale_workspace(const GeluScale&) {
  return 0;
}

void gelu_scale(const GeluScale& p, const Launch& launch) {
  scale_rows(p, launch);
}

int64_t mlp_backward_pointwise_workspace(const MlpBackwardPointwise& p) {
  return parts_bytes(p.dtype, p.segments, p.channels);
}

void mlp_backward_pointwise(const MlpBackwardPointwise& p, const Launch& launch) {
  const int64_t parts = part_count(p.dtype, p.segments, p.channels);
  MlpBackwardPointwise pass = p;
  if (p.beta) pass.hs = nullptr;
  gradient_rows(pass, parts == 1 ? p.db : launch.workspace, launch);
  add_parts(p.dtype, parts, p.channels, p.db, launch);
  // the kernel adds no beta, as no schedule of a GPU asks for it: a pass of its own, after a has been read
  if (p.beta && p.hs)
    scale_rows({.dtype = p.dtype,
                .segments = p.segments,
                .channels = p.channels,
                .activation = p.activation,
                .a = p.a,
                .scale = p.scale,
                .beta = p.beta,
                .out = p.hs},
               launch);
}

int64_t column_sum_workspace(const ColumnSum& p) {
  return parts_bytes(p.dtype, {.rows_per_slot = 1, .count = 1, .rows = p.rows}, p.channels);
}

void column_sum(const ColumnSum& p, const Launch& launch) {
  const int64_t parts = part_count(p.dtype, {.rows_per_slot = 1, .count = 1, .rows = p.rows}, p.channels);
  column_sums(p, parts == 1 ? p.sums : launch.workspace, launch);
  add_parts(p.dtype, parts, p.channels, p.sums, launch);
}

}  // namespace cuda
}  // namespace cnx
