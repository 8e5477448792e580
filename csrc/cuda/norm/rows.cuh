// LayerNorm over rows [rows, channels] and its gradient, for rows that are read in one order and written in another.
//
// A row of up to 1024 channels is held in registers by a group of 1 to 32 lanes, each with several vectors of it, so
// that narrow rows fill a warp too; beyond, a block works on a row and reads it again from its cache. The mean comes
// first and then the centred squares: no cancellation. Every tensor is read once.
#pragma once

#include "../common/columns.cuh"

namespace cnx {
namespace cuda {

constexpr int kRowThreads = 256;

// Vectors of a row that a lane holds at most, and the channels that a warp then holds: 1024 in 16 bits, 768 in float32.
// With sums of its columns beside them (kSums) a lane has registers for three vectors of 16-bit elements: 768 channels.
template <class T, int N, bool kSums = false>
constexpr int kHeldVectors = N * sizeof(T) < 16 ? 8
                             : sizeof(T) > 2    ? 6
                             : kSums            ? 3
                                                : 4;
template <class T, int N, bool kSums = false>
constexpr int kHeldChannels = 32 * N * kHeldVectors<T, N, kSums>;

// Where row `row` lies on both sides: `input` in what is normalised (x, dx), `output` in what is written from it (y,
// grad, z). The statistics lie as the rows are counted. Lanes past the last row ask too, with `exists` false.
struct SameRow {
  __device__ __forceinline__ int64_t input(int64_t row, bool) const { return row; }
  __device__ __forceinline__ int64_t output(int64_t row) const { return row; }
};

// Pixels of maps [h, w] by 2x2 blocks: [h/2, w/2, 2, 2]. h is even, so lines pair up across maps too.
struct BlockedRow {
  int64_t width;
  __device__ __forceinline__ int64_t input(int64_t row, bool) const { return row; }
  __device__ __forceinline__ int64_t output(int64_t row) const {
    int64_t line;
    if (row >> 32 == 0 && width >> 32 == 0)
      line = static_cast<uint32_t>(row) / static_cast<uint32_t>(width);  // a fifth of a 64-bit division
    else
      line = row / width;
    const int64_t column = row - line * width;
    return (line / 2 * (width / 2) + column / 2) * 4 + line % 2 * 2 + column % 2;
  }
};

// Packed rows [slots, s, s] of the visible patches of maps [N, Gh*s, Gw*s].
struct GatheredRow {
  const int32_t* patch_of_slot;
  uint32_t grid_w, side;
  __device__ __forceinline__ int64_t input(int64_t row, bool exists) const {
    if (!exists) return 0;
    const uint32_t area = side * side;
    int64_t slot;
    if (row >> 32 == 0)
      slot = static_cast<uint32_t>(row) / area;
    else
      slot = row / area;
    const uint32_t within = static_cast<uint32_t>(row - slot * area), y = within / side, x = within - y * side;
    const uint32_t patch = static_cast<uint32_t>(patch_of_slot[slot]), map_row = patch / grid_w;
    return ((int64_t{map_row} * side + y) * grid_w + (patch - map_row * grid_w)) * side + x;
  }
  __device__ __forceinline__ int64_t output(int64_t row) const { return row; }
};

// Lanes that hold a row; a power of two. Single elements are spread wide to keep accesses together.
template <class T, int N, bool kSums = false>
int row_lanes(int64_t channels) {
  int lanes = N == 1 ? 32 : 1;
  while (int64_t{lanes} * N * kHeldVectors<T, N, kSums> < channels) lanes *= 2;
  return lanes;
}

template <class T>
struct NormForward {
  int64_t rows, channels;
  const T* x;
  const Acc<T>*weight, *bias;  // may be null
  Acc<T> eps;
  T* y;
  Acc<T>*mean, *rstd;  // mean may be null
};

template <class A, int N>
__device__ __forceinline__ void affine(A (&v)[N], const A* weight, const A* bias, int64_t c) {
  A parameters[N];
  if (weight) {
    load_parameters(weight + c, parameters);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= parameters[i];
  }
  if (bias) {
    load_parameters(bias + c, parameters);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += parameters[i];
  }
}

// y row map.output(r) = LN(x row map.input(r)).
template <class T, int N, class Map>
__global__ void __launch_bounds__(kRowThreads, sizeof(T) == 2 && N > 1 ? 4 : 1)
    norm_forward_kernel(NormForward<T> p, int lanes, Map map) {
  using A = Acc<T>;
  constexpr int kVectors = kHeldVectors<T, N>;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t row = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / lanes;
  const int64_t held = row < p.rows ? p.channels : 0;  // lanes past the rows hold nothing, but take part in sums
  const T* x = p.x + map.input(row, held) * p.channels;
  Packed<T, N> loaded[kVectors];
#pragma unroll
  for (int m = 0; m < kVectors; ++m) {
    const int c = (lane + m * lanes) * N;
    if (c < held) loaded[m] = load_packed<N>(x + c);
  }
  A v[N], sum = 0, square = 0;
#pragma unroll
  for (int m = 0; m < kVectors; ++m) {
    if ((lane + m * lanes) * N < held) {
      unpack(loaded[m], v);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += v[i];
    }
  }
  const A mean = group_sum(sum, lanes) / static_cast<A>(p.channels);
#pragma unroll
  for (int m = 0; m < kVectors; ++m) {
    if ((lane + m * lanes) * N < held) {
      unpack(loaded[m], v);
#pragma unroll
      for (int i = 0; i < N; ++i) square += (v[i] - mean) * (v[i] - mean);
    }
  }
  const A rstd = rsqrt(group_sum(square, lanes) / static_cast<A>(p.channels) + p.eps);
  if (held == 0) return;
  T* y = p.y + map.output(row) * p.channels;
#pragma unroll
  for (int m = 0; m < kVectors; ++m) {
    const int c = (lane + m * lanes) * N;
    if (c < held) {
      unpack(loaded[m], v);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = (v[i] - mean) * rstd;
      affine(v, p.weight, p.bias, c);
      store_packed(y + c, pack_words<T, N>(v));
    }
  }
  if (lane == 0) {
    if (p.mean) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

template <class T, int N, class Map>
__global__ void __launch_bounds__(kRowThreads, 1) norm_forward_wide_kernel(NormForward<T> p, Map map) {
  using A = Acc<T>;
  __shared__ A shared[32];
  const int64_t row = blockIdx.x, first = int64_t{threadIdx.x} * N, step = kRowThreads * N;
  const T* x = p.x + map.input(row, true) * p.channels;
  T* y = p.y + map.output(row) * p.channels;
  A sum = 0, square = 0, v[N];
#pragma unroll 4
  for (int64_t c = first; c < p.channels; c += step) {
    unpack(load_packed<N>(x + c), v);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i];
  }
  const A mean = block_sum(sum, shared) / static_cast<A>(p.channels);
#pragma unroll 4
  for (int64_t c = first; c < p.channels; c += step) {
    unpack(load_packed<N>(x + c), v);
#pragma unroll
    for (int i = 0; i < N; ++i) square += (v[i] - mean) * (v[i] - mean);
  }
  const A rstd = rsqrt(block_sum(square, shared) / static_cast<A>(p.channels) + p.eps);
  for (int64_t c = first; c < p.channels; c += step) {
    unpack(load_packed<N>(x + c), v);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = (v[i] - mean) * rstd;
    affine(v, p.weight, p.bias, c);
    store_packed(y + c, pack_words<T, N>(v));
  }
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

// y and x may overlap only as the same rows; mean null: not wanted.
template <class T, class Map>
void norm_forward(const NormForward<T>& p, const Map& map, const Launch& launch) {
  if (p.rows == 0) return;
  with_width<T>(wide_columns<T>(p.channels, {p.x, p.y}, {p.weight, p.bias}), [&](auto width) {
    constexpr int N = decltype(width)::value;
    if (p.channels > kHeldChannels<T, N>) {
      CNX_LAUNCH((norm_forward_wide_kernel<T, N, Map>), static_cast<unsigned>(p.rows), kRowThreads, 0, launch, p, map);
    } else {
      const int lanes = row_lanes<T, N>(p.channels);
      CNX_LAUNCH((norm_forward_kernel<T, N, Map>), static_cast<unsigned>(ceil_div(p.rows, kRowThreads / lanes)),
                 kRowThreads, 0, launch, p, lanes, map);
    }
  });
}

}  // namespace cuda
}  // namespace cnx
