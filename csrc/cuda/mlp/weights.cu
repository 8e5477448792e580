// What is as large as the MLP's weights, not as its rows: operands of the products and the gradients behind them, each
// a launch or two where plain tensor operations would take six.
#include "../common/reduce.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {
namespace {

constexpr int kWarps = 8;  // of a block, a row of a weight each

// A row of a weight: out = w * gain, rounded to T; returns the lane's share of the product of the row with shift.
template <class T, class P, class A>
__device__ __forceinline__ A prepare_row(const P* w, int64_t count, const A* gain, const A* shift, T* out) {
  A dot = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % 32; c < count; c += 32) {
    const A value = to_acc(w[c]);
    if (shift) dot += value * shift[c];
    if (out) out[c] = from_acc<T>(gain ? value * gain[c] : value);
  }
  return dot;
}

template <class T, class P>
__global__ void __launch_bounds__(32 * kWarps, 4) mlp_parameters_kernel(MlpParameters p) {
  using A = Acc<T>;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= p.hidden + p.outputs) return;  // whole warps
  const bool first = row < p.hidden;
  const int64_t r = first ? row : row - p.hidden, count = first ? p.inputs : p.hidden;
  const P* w = static_cast<const P*>(first ? p.w1 : p.w2) + r * count;
  T* out = static_cast<T*>(first ? p.w1_out : p.w2_out);
  const A* gain = first ? static_cast<const A*>(p.ln_weight) : nullptr;
  const A* shift = static_cast<const A*>(first ? p.ln_bias : p.b2 ? p.beta : nullptr);
  const A dot = group_sum(prepare_row<T, P, A>(w, count, gain, shift, out ? out + r * count : nullptr), 32);
  if (threadIdx.x % 32 || !(first || p.b2)) return;
  const A bias = static_cast<const A*>(first ? p.b1 : p.b2)[r];
  static_cast<T*>(first ? p.b1_out : p.b2_out)[r] = from_acc<T>(bias + dot);
}

constexpr int kColumns = 32, kLanes = 8, kSplitRows = 64;

// dw1 in place, and the sums of one split of its rows: [2, C], for ln_weight and ln_bias.
template <class A, class P>
__global__ void __launch_bounds__(kColumns* kLanes) unfold_layer_norm_kernel(UnfoldLayerNorm p, A* partial) {
  __shared__ A shared[2][kLanes][kColumns];
  const int x = threadIdx.x % kColumns, y = threadIdx.x / kColumns;
  const int64_t c = int64_t{blockIdx.x} * kColumns + x, begin = int64_t{blockIdx.y} * kSplitRows;
  const int64_t end = begin + kSplitRows < p.hidden ? begin + kSplitRows : p.hidden;
  A dgain = 0, dshift = 0;
  if (c < p.inputs) {
    const A gain = static_cast<const A*>(p.ln_weight)[c], shift = static_cast<const A*>(p.ln_bias)[c];
    const A* db1 = static_cast<const A*>(p.db1);
    A* dw1 = static_cast<A*>(p.dw1);
    for (int64_t j = begin + y; j < end; j += kLanes) {
      const int64_t at = j * p.inputs + c;
      const A w = to_acc(static_cast<const P*>(p.w1)[at]), dw = dw1[at], db = db1[j];
      dgain += w * dw;
      dshift += w * db;
      dw1[at] = dw * gain + db * shift;
    }
  }
  shared[0][y][x] = dgain;
  shared[1][y][x] = dshift;
  __syncthreads();
  if (y > 1 || c >= p.inputs) return;
  A total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += shared[y][lane][x];
  partial[(int64_t{blockIdx.y} * 2 + y) * p.inputs + c] = total;
}

constexpr int kThreads = 256;

// t[n, h] = sum over o of g[n, o, h] * w2[o, h]
template <class A, class T>
__global__ void __launch_bounds__(kThreads) products_reduce_kernel(ImageProducts p) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.images * p.hidden) return;
  const int64_t n = at / p.hidden, h = at - n * p.hidden;
  const A* g = static_cast<const A*>(p.g) + n * p.outputs * p.hidden + h;
  const T* w2 = static_cast<const T*>(p.w2) + h;
  A sum = 0;
#pragma unroll 8
  for (int64_t o = 0; o < p.outputs; ++o) sum += g[o * p.hidden] * to_acc(w2[o * p.hidden]);
  static_cast<A*>(p.t)[at] = sum;
}

// dw2[o, h] = sum over n of g[n, o, h] * scale[n, h], + d_sum[o] * beta[h]
template <class A>
__global__ void __launch_bounds__(kThreads) products_weight_kernel(ImageProducts p) {
  const int64_t size = p.outputs * p.hidden, at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= size) return;
  const int64_t o = at / p.hidden, h = at - o * p.hidden;
  const A* g = static_cast<const A*>(p.g) + at;
  const A* scale = static_cast<const A*>(p.scale) + h;
  A sum = static_cast<const A*>(p.d_sum)[o] * static_cast<const A*>(p.beta)[h];
#pragma unroll 8
  for (int64_t n = 0; n < p.images; ++n) sum += g[n * size] * scale[n * p.hidden];
  static_cast<A*>(p.dw2)[at] = sum;
}

unsigned blocks_of(int64_t count) {
  return static_cast<unsigned>(ceil_div(count, kThreads));
}

}  // namespace

int64_t mlp_parameters_workspace(const MlpParameters&) {
  return 0;
}

void mlp_parameters(const MlpParameters& p, const Launch& launch) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.hidden + p.outputs, kWarps));
  if (blocks == 0) return;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.wide)
      CNX_LAUNCH((mlp_parameters_kernel<T, Acc<T>>), blocks, 32 * kWarps, 0, launch, p);
    else
      CNX_LAUNCH((mlp_parameters_kernel<T, T>), blocks, 32 * kWarps, 0, launch, p);
  });
}

int64_t unfold_layer_norm_workspace(const UnfoldLayerNorm& p) {
  const int64_t each = p.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return ceil_div(p.hidden, kSplitRows) * 2 * p.inputs * each;
}

void unfold_layer_norm(const UnfoldLayerNorm& p, const Launch& launch) {
  const int64_t splits = ceil_div(p.hidden, kSplitRows);
  dispatch(p.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    using A = Acc<P>;
    A* partial = static_cast<A*>(launch.workspace);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.inputs, kColumns)), static_cast<unsigned>(splits));
    if (grid.x && grid.y) CNX_LAUNCH((unfold_layer_norm_kernel<A, P>), grid, kColumns * kLanes, 0, launch, p, partial);
    sum_partials<A>(partial, 1, splits, 2 * p.inputs, p.inputs, static_cast<A*>(p.dln_weight),
                    static_cast<A*>(p.dln_bias), launch);
  });
}

int64_t products_reduce_workspace(const ImageProducts&) {
  return 0;
}

void products_reduce(const ImageProducts& p, const Launch& launch) {
  const unsigned blocks = blocks_of(p.images * p.hidden);
  if (blocks == 0) return;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    CNX_LAUNCH((products_reduce_kernel<Acc<T>, T>), blocks, kThreads, 0, launch, p);
  });
}

int64_t products_weight_workspace(const ImageProducts&) {
  return 0;
}

void products_weight(const ImageProducts& p, const Launch& launch) {
  const unsigned blocks = blocks_of(p.outputs * p.hidden);
  if (blocks == 0) return;
  if (p.dtype == DType::f64)
    CNX_LAUNCH((products_weight_kernel<double>), blocks, kThreads, 0, launch, p);
  else
    CNX_LAUNCH((products_weight_kernel<float>), blocks, kThreads, 0, launch, p);
}

}  // namespace cuda
}  // namespace cnx
