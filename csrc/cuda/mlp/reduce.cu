// Column sums over the rows of each segment. Instructions per bfloat16 element, GELU by polynomial: squares 16 with h
// stored (4 bytes moved) or 14 (2 bytes), gradient sums 17 (4 bytes), plain sums 4 (2 bytes). At its copy bandwidth an
// H200 issues 28 per 4 bytes: only squares alone, 14 for 2 bytes, are bound by instructions, at about 80 % of copy.
// With the library's erf squares take 40: float32 (8 bytes) still runs at bandwidth, float16 at about 60 %.
#include "../common/columns.cuh"
#include "../common/gelu.cuh"
#include "row_passes.h"

namespace cnx {
namespace cuda {
namespace {

template <class T, int N, Activation kAct>
__global__ void __launch_bounds__(kColumnThreads)
    square_sums_kernel(ColumnGrid grid, const T* x, T* h, Acc<T>* partial) {
  __shared__ Acc<T> shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  Acc<T> sums[N] = {};
  const T* const inputs[1] = {x};
  walk<N, 4>(grid, span, inputs, [&](int64_t at, Acc<T>(&values)[1][N]) {
    Acc<T>(&v)[N] = values[0];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = activate<kAct, T>(v[i]);
      sums[i] += v[i] * v[i];
    }
    if (h) store_packed(h + at, pack_words<T, N>(v));
  });
  add_lanes(grid, sums, shared, partial + span.part * grid.channels);
}

template <class T, int N, Activation kAct>
__global__ void __launch_bounds__(kColumnThreads)
    gradient_sums_kernel(ColumnGrid grid, const T* x, const T* grad, bool with_grad, Acc<T>* partial) {
  __shared__ Acc<T> shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  Acc<T> products[N] = {}, sums[N] = {};
  const T* const inputs[2] = {x, grad};
  walk<N, 2>(grid, span, inputs, [&](int64_t, Acc<T>(&values)[2][N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      products[i] += values[1][i] * activate<kAct, T>(values[0][i]);
      sums[i] += values[1][i];
    }
  });
  partial += int64_t{span.part} * (with_grad ? 2 : 1) * grid.channels;
  add_lanes(grid, products, shared, partial);
  if (with_grad) add_lanes(grid, sums, shared, partial + grid.channels);
}

template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) column_sums_kernel(ColumnGrid grid, const T* x, Acc<T>* partial) {
  __shared__ Acc<T> shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  Acc<T> sums[N] = {};
  const T* const inputs[1] = {x};
  walk<N, 8>(grid, span, inputs, [&](int64_t, Acc<T>(&values)[1][N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += values[0][i];
  });
  add_lanes(grid, sums, shared, partial + span.part * grid.channels);
}

}  // namespace

void square_sums(const GeluStatistics& p, void* partial, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(wide_columns<T>(p.channels, {p.a, p.h}, {}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
      const T* in = static_cast<const T*>(p.a);
      T* out = static_cast<T*>(p.h);
      auto* sums = static_cast<Acc<T>*>(partial);
      if (grid.blocks() == 0) return;
      with_activation(p.activation, [&](auto act) {
        constexpr Activation kAct = decltype(act)::value;
        CNX_LAUNCH((square_sums_kernel<T, N, kAct>), grid.blocks(), kColumnThreads, 0, launch, grid, in, out, sums);
      });
    });
  });
}

void gradient_sums(const MlpBackwardStatistics& p, bool with_ds, void* partial, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(wide_columns<T>(p.channels, {p.a, p.ds}, {}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
      const T* in = static_cast<const T*>(p.a);
      const T* g = static_cast<const T*>(p.ds);
      auto* sums = static_cast<Acc<T>*>(partial);
      if (grid.blocks() == 0) return;
      with_activation(p.activation, [&](auto act) {
        constexpr Activation kAct = decltype(act)::value;
        CNX_LAUNCH((gradient_sums_kernel<T, N, kAct>), grid.blocks(), kColumnThreads, 0, launch, grid, in, g, with_ds,
                   sums);
      });
    });
  });
}

void column_sums(const ColumnSum& p, void* partial, const Launch& launch) {
  const Segments all{.rows_per_slot = 1, .count = 1, .rows = p.rows};
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_width<T>(wide_columns<T>(p.channels, {p.x}, {}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      const ColumnGrid grid = column_grid<T>(all, p.channels, N);
      if (grid.blocks() == 0) return;
      CNX_LAUNCH((column_sums_kernel<T, N>), grid.blocks(), kColumnThreads, 0, launch, grid, static_cast<const T*>(p.x),
                 static_cast<Acc<T>*>(partial));
    });
  });
}

}  // namespace cuda
}  // namespace cnx
