// Gradient of LayerNorm: dx = rstd (g - mean(g) - z mean(g z)), g = grad * weight, z = (x - mean) rstd;
// dweight = sum over rows of grad z, dbias = sum of grad.
//
// A group of lanes keeps its columns from row to row, so that the parameters' sums stay in registers and grad and x
// are read once; each block leaves one partial sum. Rows are cut into blocks by shape alone.
#pragma once

#include "rows.cuh"

namespace cnx {
namespace cuda {

template <class T>
struct NormBackward {
  int64_t rows, channels;
  const T *grad, *x;
  const Acc<T>*mean, *rstd, *weight;  // mean null: x is normalised; weight null: 1
  T* dx;
  Acc<T>* partial;  // [blocks, 2, channels]
};

// Steps of each block, one row per group and step, about two blocks for each of 132 multiprocessors.
struct NormPartition {
  static constexpr int64_t kMostBlocks = 264;
  int lanes;
  int64_t steps, blocks;

  NormPartition(int64_t rows, int lanes) : lanes(lanes) {
    const int64_t total = ceil_div(rows, kRowThreads / lanes);
    steps = total ? ceil_div(total, kMostBlocks) : 1;
    blocks = ceil_div(total, steps);
  }
};

// dx row map.input(r) from rows map.output(r) of grad and x. kSums: the parameters' sums are wanted.
template <class T, int N, class Map, bool kSums>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 2 && N > 1 ? 2 : 1)
    norm_backward_kernel(NormBackward<T> p, int lanes, int64_t steps, Map map) {
  using A = Acc<T>;
  constexpr int kVectors = kHeldVectors<T, N, kSums>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), groups = kRowThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  A dweight[kVectors][N] = {}, dbias[kVectors][N] = {};
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t row = (blockIdx.x * steps + step) * groups + group;
    const int64_t held = row < p.rows ? p.channels : 0;
    const int64_t source = held ? map.output(row) * p.channels : 0;
    Packed<T, N> loaded_grad[kVectors], loaded_x[kVectors];
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = (lane + m * lanes) * N;
      if (c < held) {
        loaded_grad[m] = load_packed<N>(p.grad + source + c);
        loaded_x[m] = load_packed<N>(p.x + source + c);
      }
    }
    const A rstd = held ? p.rstd[row] : A(0);
    const A mean = held && p.mean ? p.mean[row] : A(0), spread = p.mean ? rstd : A(1);
    A sum = 0, dot = 0;
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = (lane + m * lanes) * N;
      if (c < held) {
        A g[N], z[N];
        unpack(loaded_grad[m], g);
        unpack(loaded_x[m], z);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          z[i] = (z[i] - mean) * spread;
          if (kSums) {
            dweight[m][i] += g[i] * z[i];
            dbias[m][i] += g[i];
          }
        }
        affine<A, N>(g, p.weight, nullptr, c);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum += g[i];
          dot += g[i] * z[i];
        }
      }
    }
    sum = group_sum(sum, lanes) / static_cast<A>(p.channels);
    dot = group_sum(dot, lanes) / static_cast<A>(p.channels);
    T* dx = p.dx + map.input(row, held) * p.channels;
#pragma unroll
    for (int m = 0; m < kVectors; ++m) {
      const int c = (lane + m * lanes) * N;
      if (c < held) {
        A g[N], z[N];
        unpack(loaded_grad[m], g);
        unpack(loaded_x[m], z);
        affine<A, N>(g, p.weight, nullptr, c);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = rstd * (g[i] - sum - (z[i] - mean) * spread * dot);
        store_packed(dx + c, pack_words<T, N>(g));
      }
    }
  }
  if constexpr (kSums) {
    __shared__ A shared[2][kHeldChannels<T, N, kSums>];  // warp after warp adds to it: a fixed order
    for (int warp = 0; warp < kRowThreads / 32; ++warp) {
      if (static_cast<int>(threadIdx.x) / 32 == warp) {
#pragma unroll
        for (int m = 0; m < kVectors; ++m) {
          const int c = (lane + m * lanes) * N;
#pragma unroll
          for (int i = 0; i < N; ++i) {
            A w = dweight[m][i], b = dbias[m][i];
            for (int offset = lanes; offset < 32; offset *= 2) {  // the warp's groups hold the same columns
              w += __shfl_xor_sync(0xffffffffu, w, offset);
              b += __shfl_xor_sync(0xffffffffu, b, offset);
            }
            if (static_cast<int>(threadIdx.x) % 32 < lanes && c < p.channels) {
              shared[0][c + i] = (warp ? shared[0][c + i] : A(0)) + w;
              shared[1][c + i] = (warp ? shared[1][c + i] : A(0)) + b;
            }
          }
        }
      }
      __syncthreads();
    }
    A* partial = p.partial + blockIdx.x * 2 * p.channels;
    for (int c = threadIdx.x; c < p.channels; c += kRowThreads) {
      partial[c] = shared[0][c];
      partial[p.channels + c] = shared[1][c];
    }
  }
}

template <class T, int N, class Map>
__global__ void __launch_bounds__(kRowThreads, 1) norm_backward_wide_kernel(NormBackward<T> p, Map map) {
  using A = Acc<T>;
  __shared__ A shared[32];
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = kRowThreads * N;
  const T *grad = p.grad + map.output(row) * p.channels, *x = p.x + map.output(row) * p.channels;
  T* dx = p.dx + map.input(row, true) * p.channels;
  const A rstd = p.rstd[row], mean = p.mean ? p.mean[row] : A(0), spread = p.mean ? rstd : A(1);
  A sum = 0, dot = 0, g[N], z[N];
#pragma unroll 2
  for (int64_t c = first; c < p.channels; c += step) {
    unpack(load_packed<N>(grad + c), g);
    unpack(load_packed<N>(x + c), z);
    affine<A, N>(g, p.weight, nullptr, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum += g[i];
      dot += g[i] * ((z[i] - mean) * spread);
    }
  }
  sum = block_sum(sum, shared) / static_cast<A>(p.channels);
  dot = block_sum(dot, shared) / static_cast<A>(p.channels);
  for (int64_t c = first; c < p.channels; c += step) {
    unpack(load_packed<N>(grad + c), g);
    unpack(load_packed<N>(x + c), z);
    affine<A, N>(g, p.weight, nullptr, c);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = rstd * (g[i] - sum - (z[i] - mean) * spread * dot);
    store_packed(dx + c, pack_words<T, N>(g));
  }
}

// The parameters' sums of wide rows, [splits, 2, channels]: down the columns of the rows as they lie.
template <class T, int N>
__global__ void __launch_bounds__(kColumnThreads) norm_parameter_sums_kernel(ColumnGrid grid, NormBackward<T> p) {
  using A = Acc<T>;
  __shared__ A shared[kColumnThreads * N];
  const ColumnSpan span = column_span<N>(grid);
  A dweight[N] = {}, dbias[N] = {};
  if (span.active) {
#pragma unroll 2
    for (int i = span.lane; i < span.rows; i += grid.lanes) {
      const int64_t row = span.begin + i, at = row * p.channels + span.column;
      const A mean = p.mean ? p.mean[row] : A(0), spread = p.mean ? p.rstd[row] : A(1);
      A g[N], z[N];
      unpack(load_packed<N>(p.grad + at), g);
      unpack(load_packed<N>(p.x + at), z);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        dweight[k] += g[k] * ((z[k] - mean) * spread);
        dbias[k] += g[k];
      }
    }
  }
  A* partial = p.partial + int64_t{span.part} * 2 * p.channels;
  add_lanes(grid, dweight, shared, partial);
  add_lanes(grid, dbias, shared, partial + p.channels);
}

// Enough for either kernel: the alignment of the pointers, which chooses, is not known yet.
template <class T>
int64_t norm_backward_bytes(int64_t rows, int64_t channels, bool sums) {
  if (!sums) return 0;
  const int64_t splits = column_splits<T>({.rows_per_slot = 1, .count = 1, .rows = rows}, channels),
                most = NormPartition::kMostBlocks;
  return (splits > most ? splits : most) * 2 * channels * static_cast<int64_t>(sizeof(Acc<T>));
}

// Launches for one access width; returns how many partial sums it left.
template <class T, int N, bool kSums, class Map>
int64_t launch_norm_backward(const NormBackward<T>& p, const Map& map, const Launch& launch) {
  if (p.rows == 0) return 0;
  if (p.channels <= kHeldChannels<T, N, kSums>) {
    const NormPartition partition(p.rows, row_lanes<T, N, kSums>(p.channels));
    CNX_LAUNCH((norm_backward_kernel<T, N, Map, kSums>), static_cast<unsigned>(partition.blocks), kRowThreads, 0,
               launch, p, partition.lanes, partition.steps, map);
    return partition.blocks;
  }
  CNX_LAUNCH((norm_backward_wide_kernel<T, N, Map>), static_cast<unsigned>(p.rows), kRowThreads, 0, launch, p, map);
  if constexpr (kSums) {
    const ColumnGrid grid = column_grid<T>({.rows_per_slot = 1, .count = 1, .rows = p.rows}, p.channels, N);
    CNX_LAUNCH((norm_parameter_sums_kernel<T, N>), grid.blocks(), kColumnThreads, 0, launch, grid, p);
    return grid.splits;
  }
  return 0;
}

// dweight and dbias may be null; p.partial is the workspace. A mean only with SameRow: the sums of wide rows read the
// statistics in the order of grad.
template <class T, class Map>
void norm_backward(const NormBackward<T>& p, const Map& map, Acc<T>* dweight, Acc<T>* dbias, const Launch& launch) {
  with_width<T>(wide_columns<T>(p.channels, {p.grad, p.x, p.dx}, {p.weight}), [&](auto width) {
    constexpr int N = decltype(width)::value;
    if (!dweight && !dbias) {
      launch_norm_backward<T, N, false>(p, map, launch);
      return;
    }
    const int64_t parts = launch_norm_backward<T, N, true>(p, map, launch);
    sum_partials<Acc<T>>(p.partial, 1, parts, 2 * p.channels, p.channels, dweight, dbias, launch);
  });
}

}  // namespace cuda
}  // namespace cnx
