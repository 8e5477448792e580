// Scaling of rows by factors per segment and column, and its gradient. Instructions per bfloat16 element with GELU:
// scaling 16 (4 bytes moved; an H200 issues 28 per 4 bytes at its copy bandwidth), gradient 28 (8 bytes, or 6 without
// hs). With the library's erf: 40 and 55, so float16 is bound by instructions.
#include "../common/columns.cuh"
#include "../common/gelu.cuh"
#include "row_passes.h"

namespace cnx {
namespace cuda {
namespace {

template <class T, int N, Activation kAct>
__global__ void __launch_bounds__(kColumnThreads)
    scale_rows_kernel(ColumnGrid grid, const T* x, const Acc<T>* scale, const Acc<T>* beta, T* y) {
  const ColumnSpan span = column_span<N>(grid);
  if (!span.active) return;
  Acc<T> factor[N], shift[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) factor[i] = 1;
  if (scale) load_parameters(scale + span.segment * grid.channels + span.column, factor);
  if (beta) load_parameters(beta + span.column, shift);
  const T* const inputs[1] = {x};
  walk<N, 4>(grid, span, inputs, [&](int64_t at, Acc<T>(&values)[1][N]) {
    Acc<T>(&v)[N] = values[0];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activate<kAct, T>(v[i]) * factor[i] + shift[i];
    store_packed(y + at, pack_words<T, N>(v));
  });
}

template <class T, int N, Activation kAct>
__global__ void __launch_bounds__(kColumnThreads)
    gradient_rows_kernel(ColumnGrid grid, const T* x, const T* grad, const Acc<T>* scale, const Acc<T>* kappa, T* hs,
                         T* dx, Acc<T>* partial) {
  __shared__ Acc<T> shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  Acc<T> factor[N] = {}, pull[N] = {}, sums[N] = {};
  if (span.active) {
    load_parameters(scale + span.segment * grid.channels + span.column, factor);
    load_parameters(kappa + span.segment * grid.channels + span.column, pull);
  }
  const T* const inputs[2] = {x, grad};
  walk<N, 2>(grid, span, inputs, [&](int64_t at, Acc<T>(&values)[2][N]) {
    Acc<T> scaled[N], gradient[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      Acc<T> h, slope;
      activate_with_slope<kAct, T>(values[0][i], h, slope);
      scaled[i] = h * factor[i];
      gradient[i] = (values[1][i] * factor[i] + h * pull[i]) * slope;
      sums[i] += gradient[i];
    }
    if (hs) store_packed(hs + at, pack_words<T, N>(scaled));
    store_packed(dx + at, pack_words<T, N>(gradient));
  });
  if (partial) add_lanes(grid, sums, shared, partial + span.part * grid.channels);
}

}  // namespace

void scale_rows(const GeluScale& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(wide_columns<T>(p.channels, {p.a, p.out}, {p.scale, p.beta}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
      const T* in = static_cast<const T*>(p.a);
      const auto* factor = static_cast<const Acc<T>*>(p.scale);
      const auto* shift = static_cast<const Acc<T>*>(p.beta);
      T* out = static_cast<T*>(p.out);
      if (grid.blocks() == 0) return;
      with_activation(p.activation, [&](auto act) {
        constexpr Activation kAct = decltype(act)::value;
        CNX_LAUNCH((scale_rows_kernel<T, N, kAct>), grid.blocks(), kColumnThreads, 0, launch, grid, in, factor, shift,
                   out);
      });
    });
  });
}

void gradient_rows(const MlpBackwardPointwise& p, void* partial, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(wide_columns<T>(p.channels, {p.a, p.ds, p.hs, p.da}, {p.scale, p.kappa}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
      const T *in = static_cast<const T*>(p.a), *g = static_cast<const T*>(p.ds);
      const auto *factor = static_cast<const Acc<T>*>(p.scale), *pull = static_cast<const Acc<T>*>(p.kappa);
      T *scaled = static_cast<T*>(p.hs), *out = static_cast<T*>(p.da);
      auto* sums = static_cast<Acc<T>*>(partial);
      if (grid.blocks() == 0) return;
      with_activation(p.activation, [&](auto act) {
        constexpr Activation kAct = decltype(act)::value;
        CNX_LAUNCH((gradient_rows_kernel<T, N, kAct>), grid.blocks(), kColumnThreads, 0, launch, grid, in, g, factor,
                   pull, scaled, out, sums);
      });
    });
  });
}

}  // namespace cuda
}  // namespace cnx
