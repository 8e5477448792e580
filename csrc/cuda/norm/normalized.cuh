// Passes over rows [rows, channels] in segments that know or find the mean and 1/std of each row: z = (x - mean) rstd.
//
// Where a pass needs sums along a row, a group of lanes holds it in registers as in rows.cuh, and keeps its columns
// from row to row; wider rows are held by a whole block. Where it does not, a thread walks down its columns as in
// columns.cuh. Either way a block works on a part of one segment, and x is read once. Rows of more than kMostHeld
// channels, which no network has, go through LayerNorm's own kernels.
#pragma once

#include "rows_grad.cuh"

namespace cnx {
namespace cuda {

// What a block can hold of a row, whatever its type and alignment.
constexpr int64_t kMostHeld = 3072;

// Vectors of a row that a lane holds at most; kBlock: a block holds the row.
template <class T, int N, bool kBlock>
constexpr int kRowVectors = !kBlock          ? kHeldVectors<T, N>
                            : N == 1         ? 12
                            : sizeof(T) == 2 ? 2
                            : sizeof(T) == 4 ? 3
                                             : 6;
template <class T, int N, bool kBlock>
constexpr int kRowChannels = (kBlock ? kRowThreads : 32) * N * kRowVectors<T, N, kBlock>;
static_assert(kRowChannels<bf16, 8, true> >= kMostHeld && kRowChannels<float, 4, true> >= kMostHeld &&
              kRowChannels<double, 2, true> >= kMostHeld && kRowChannels<double, 1, true> >= kMostHeld);

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Rows that a block holds at once, of aligned memory: parts follow from shapes alone.
template <class T>
int row_groups(int64_t channels) {
  const auto groups = [&](auto width) {
    constexpr int N = decltype(width)::value;
    return channels > kRowChannels<T, N, false> ? 1 : kRowThreads / row_lanes<T, N>(channels);
  };
  return channels % kWide<T> ? groups(Width<1>{}) : groups(Width<kWide<T>>{});
}

// Parts of a segment for a pass that leaves sums of its columns: 4 to 16 rows per group, and 16 or more per part.
template <class T>
int64_t row_splits(const Segments& segments, int64_t channels) {
  const int64_t groups = row_groups<T>(channels), rows = mean_rows(segments);
  const int64_t each = groups * (rows > 1024 * groups ? 16 : rows > 128 * groups ? 8 : 4);
  return split_count(segments, each < 16 ? 16 : each);
}

// f(Flag<kBlock>{}, grid): a group of lanes holds a row, or a block.
template <class T, int N, class F>
void with_held_rows(const Segments& segments, int64_t channels, int64_t splits, const F& f) {
  if (channels <= kRowChannels<T, N, false>) {
    const int lanes = row_lanes<T, N>(channels);
    f(Flag<false>{}, split_grid(segments, channels, splits, {lanes, kRowThreads / lanes, 1}));
  } else {
    f(Flag<true>{}, split_grid(segments, channels, splits, {kRowThreads, 1, 1}));
  }
}

// Sums of K values over the group that holds a row; all threads of a block must call. One barrier each: of the two
// arrays, the one that a sum wrote is free once the next sum has passed its barrier.
template <class A, int K, bool kBlock>
struct RowSums {
  static constexpr int kWarps = kRowThreads / 32;
  using Shared = A[2][kWarps][K];

  __device__ __forceinline__ void operator()(A (&values)[K], int lanes, Shared& shared) {
    for (int offset = (kBlock ? 32 : lanes) / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
    }
    if constexpr (kBlock) {
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) shared[turn][threadIdx.x / 32][k] = values[k];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k) values[k] = shared[turn][0][k];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
#pragma unroll
        for (int k = 0; k < K; ++k) values[k] += shared[turn][w][k];
      }
      turn ^= 1;
    }
  }
  int turn = 0;
};

// Rows that a group of lanes takes at a time when it sums squares: their parameters are loaded once, and a block's
// barriers serve them all.
template <class T, int N, bool kBlock>
constexpr int kRowsAtOnce = N == 1                     ? 1
                            : kBlock && sizeof(T) == 2 ? 4
                                                       : 2;

// Mean and 1/std of every row, and the sums of squares of y = z weight + bias down the columns of each part.
template <class T, int N, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 2 && N > 1 ? 2 : 1)
    normalized_squares_kernel(ColumnGrid grid, NormForward<T> p, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int kVectors = kRowVectors<T, N, kBlock>, kRows = kRowsAtOnce<T, N, kBlock>;
  alignas(16) __shared__ typename RowSums<A, kRows, kBlock>::Shared row_shared;
  RowSums<A, kRows, kBlock> row_sums;
  const ColumnSpan span = column_span<N>(grid);
  const int channels = static_cast<int>(grid.channels), first = static_cast<int>(span.column), step = grid.tile * N;
  A sums[kVectors][N] = {};
  // the rows from `start`; kFull: every group has all of its rows
  const auto take = [&](int start, auto full) {
    constexpr bool kFull = decltype(full)::value;
    const auto held = [&](int r, int m) {  // lanes past the rows hold nothing, but take part in sums
      return first + m * step < channels && (kFull || start + r * grid.lanes + span.lane < span.rows);
    };
    Packed<T, N> loaded[kRows][kVectors];
    A v[N], mean[kRows] = {}, rstd[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T* x = p.x + (span.begin + start + r * grid.lanes + span.lane) * grid.channels + first;
#pragma unroll
      for (int m = 0; m < kVectors; ++m)
        if (held(r, m)) loaded[r][m] = load_packed<N>(x + m * step);
    }
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (held(r, m)) {
          unpack(loaded[r][m], v);
#pragma unroll
          for (int i = 0; i < N; ++i) mean[r] += v[i];
        }
      }
    }
    row_sums(mean, grid.tile, row_shared);
#pragma unroll
    for (int r = 0; r < kRows; ++r) mean[r] /= static_cast<A>(channels);
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (held(r, m)) {
          unpack(loaded[r][m], v);
#pragma unroll
          for (int i = 0; i < N; ++i) rstd[r] += (v[i] - mean[r]) * (v[i] - mean[r]);
        }
      }
    }
    row_sums(rstd, grid.tile, row_shared);
    A shift[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rstd[r] = rsqrt(rstd[r] / static_cast<A>(channels) + p.eps);
      shift[r] = -mean[r] * rstd[r];
      if (first == 0 && held(r, 0)) {
        const int64_t row = span.begin + start + r * grid.lanes + span.lane;
        p.mean[row] = mean[r];
        p.rstd[row] = rstd[r];
      }
    }
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = first + m * step;
      if (held(0, m)) {  // the later rows are held only where the first is
        A weight[N], bias[N];
        load_parameters(p.weight + c, weight);
        load_parameters(p.bias + c, bias);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r == 0 || held(r, m)) {
            unpack(loaded[r][m], v);
#pragma unroll
            for (int i = 0; i < N; ++i) {
              // one operation less, which 16 bits of x allow: no mean is far above a deviation that they hold
              const A z = sizeof(T) == 2 ? v[i] * rstd[r] + shift[r] : (v[i] - mean[r]) * rstd[r];
              const A y = z * weight[i] + bias[i];
              sums[m][i] += y * y;
            }
          }
        }
      }
    }
  };
  int start = 0;
  for (; start + kRows * grid.lanes <= span.rows; start += kRows * grid.lanes) take(start, Flag<true>{});
  if (start < span.rows) take(start, Flag<false>{});
  partial += int64_t{span.part} * grid.channels;
  if constexpr (kBlock) {
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (first + m * step < channels) partial[first + m * step + i] = sums[m][i];
    }
  } else {
    __shared__ A shared[kRowThreads * N * kVectors];  // [groups, channels]
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      if (first + m * step < channels) {
#pragma unroll
        for (int i = 0; i < N; ++i) shared[span.lane * channels + first + m * step + i] = sums[m][i];
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += kRowThreads) {
      A total = 0;
#pragma unroll 4
      for (int group = 0; group < grid.lanes; ++group) total += shared[group * channels + c];
      partial[c] = total;
    }
  }
}

// f(offset, values) for each vector of the span, values[0] being z, and values[k] from inputs[k]; as walk().
template <int N, int kUnroll, class T, int K, class F>
__device__ __forceinline__ void walk_normalized(const ColumnGrid& grid, const ColumnSpan& span,
                                                const T* const (&inputs)[K], const Acc<T>* mean, const Acc<T>* rstd,
                                                const F& f) {
  if (!span.active) return;
  const int lanes = grid.lanes;
  mean += span.begin;
  rstd += span.begin;
  for (int row = span.lane; row < span.rows; row += kUnroll * lanes) {
    const int64_t at = (span.begin + row) * grid.channels + span.column, step = lanes * grid.channels;
    Packed<T, N> loaded[kUnroll][K];
    Acc<T> mu[kUnroll], r[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * lanes < span.rows) {
#pragma unroll
        for (int k = 0; k < K; ++k) loaded[u][k] = load_packed<N>(inputs[k] + at + u * step);
        mu[u] = mean[row + u * lanes];
        r[u] = rstd[row + u * lanes];
      }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * lanes < span.rows) {
        Acc<T> values[K][N];
#pragma unroll
        for (int k = 0; k < K; ++k) unpack(loaded[u][k], values[k]);
#pragma unroll
        for (int i = 0; i < N; ++i) values[0][i] = (values[0][i] - mu[u]) * r[u];
        f(at + u * step, values);
      }
  }
}

// y = (z weight + bias) scale + beta, scale of the segment.
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads)
    normalized_scale_kernel(ColumnGrid grid, NormForward<T> p, const Acc<T>* scale, const Acc<T>* beta) {
  using A = Acc<T>;
  const ColumnSpan span = column_span<N>(grid);
  if (!span.active) return;
  A factor[N], shift[N], own[N];
  load_parameters(scale + span.segment * grid.channels + span.column, own);
  load_parameters(p.weight + span.column, factor);
  load_parameters(p.bias + span.column, shift);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    factor[i] *= own[i];
    shift[i] *= own[i];
  }
  load_parameters(beta + span.column, own);
#pragma unroll
  for (int i = 0; i < N; ++i) shift[i] += own[i];
  const T* const inputs[1] = {p.x};
  walk_normalized<N, 4>(grid, span, inputs, p.mean, p.rstd, [&](int64_t at, A(&values)[1][N]) {
    A(&v)[N] = values[0];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * factor[i] + shift[i];
    store_packed(p.y + at, pack_words<T, N>(v));
  });
}

// Column sums of grad z, grad, z z and z of each part: [count, splits, 4, channels].
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads)
    normalized_gradient_sums_kernel(ColumnGrid grid, const T* x, const T* grad, const Acc<T>* mean, const Acc<T>* rstd,
                                    Acc<T>* partial) {
  using A = Acc<T>;
  __shared__ A shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  A sums[4][N] = {};
  const T* const inputs[2] = {x, grad};
  walk_normalized<N, 2>(grid, span, inputs, mean, rstd, [&](int64_t, A(&values)[2][N]) {
    const A(&z)[N] = values[0], (&g)[N] = values[1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0][i] += g[i] * z[i];
      sums[1][i] += g[i];
      sums[2][i] += z[i] * z[i];
      sums[3][i] += z[i];
    }
  });
  partial += int64_t{span.part} * 4 * grid.channels;
#pragma unroll
  for (int k = 0; k < 4; ++k) add_lanes(grid, sums[k], shared, partial + k * grid.channels);
}

// The gradient of z, g = grad slope + z pull + shift, with coefficients [count, 3, channels] in this order.
template <class A, int N>
__device__ __forceinline__ void pulled(A (&g)[N], const A (&z)[N], const A* coefficients, int64_t channels) {
  A at[N];
  load_parameters(coefficients, at);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] *= at[i];
  load_parameters(coefficients + channels, at);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] += z[i] * at[i];
  load_parameters(coefficients + 2 * channels, at);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] += at[i];
}

// dx = rstd (g - mean(g) - z mean(g z)), g as pulled() makes it.
template <class T, int N, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) < 8 && N > 1 ? 2 : 1)
    normalized_gradient_kernel(ColumnGrid grid, NormBackward<T> p, const Acc<T>* coefficients) {
  using A = Acc<T>;
  constexpr int kVectors = kRowVectors<T, N, kBlock>;
  alignas(16) __shared__ typename RowSums<A, 2, kBlock>::Shared row_shared;
  RowSums<A, 2, kBlock> row_sums;
  const ColumnSpan span = column_span<N>(grid);
  const int channels = static_cast<int>(grid.channels), first = static_cast<int>(span.column), step = grid.tile * N;
  coefficients += span.segment * 3 * grid.channels;
  for (int start = 0; start < span.rows; start += grid.lanes) {
    const int held = start + span.lane < span.rows ? channels : 0;
    const int64_t row = span.begin + start + span.lane, source = row * grid.channels;
    Packed<T, N> loaded_grad[kVectors], loaded_x[kVectors];
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = first + m * step;
      if (c < held) {
        loaded_grad[m] = load_packed<N>(p.grad + source + c);
        loaded_x[m] = load_packed<N>(p.x + source + c);
      }
    }
    const A mean = held ? p.mean[row] : A(0), rstd = held ? p.rstd[row] : A(0);
    A g[kVectors][N], z[N], totals[2] = {};
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = first + m * step;
      if (c < held) {
        unpack(loaded_grad[m], g[m]);
        unpack(loaded_x[m], z);
#pragma unroll
        for (int i = 0; i < N; ++i) z[i] = (z[i] - mean) * rstd;
        pulled(g[m], z, coefficients + c, grid.channels);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          totals[0] += g[m][i];
          totals[1] += g[m][i] * z[i];
        }
      }
    }
    row_sums(totals, grid.tile, row_shared);
    totals[0] /= static_cast<A>(channels);
    totals[1] /= static_cast<A>(channels);
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = first + m * step;
      if (c < held) {
        unpack(loaded_x[m], z);
#pragma unroll
        for (int i = 0; i < N; ++i) g[m][i] = rstd * (g[m][i] - totals[0] - (z[i] - mean) * rstd * totals[1]);
        store_packed(p.dx + source + c, pack_words<T, N>(g[m]));
      }
    }
  }
}

// g itself, for rows that nothing holds; LayerNorm's gradient makes dx of it.
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads)
    normalized_pull_kernel(ColumnGrid grid, NormBackward<T> p, const Acc<T>* coefficients) {
  const ColumnSpan span = column_span<N>(grid);
  coefficients += span.segment * 3 * grid.channels + span.column;
  const T* const inputs[2] = {p.x, p.grad};
  walk_normalized<N, 1>(grid, span, inputs, p.mean, p.rstd, [&](int64_t at, Acc<T>(&values)[2][N]) {
    pulled(values[1], values[0], coefficients, grid.channels);
    store_packed(p.dx + at, pack_words<T, N>(values[1]));
  });
}

}  // namespace cuda
}  // namespace cnx
