// The end of a convolution kernel: what a warp does with N finished pixels of its channels. Adds the residual, or
// normalises over the channels of each pixel, and stores.
#pragma once

#include "conv_geometry.cuh"

namespace cnx {
namespace cuda {

// Sums of each of N values over the lanes: afterwards lane l holds the total of value l % N. Halving what a lane keeps
// at each step takes N - 1 shuffles rather than 5 N.
template <int N>
__device__ __forceinline__ float transpose_sum(const float (&v)[N], int lane) {
  constexpr int kHalf = N / 2;
  const bool upper = lane & kHalf;
  float kept[kHalf];
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const float send = upper ? v[k] : v[k + kHalf], keep = upper ? v[k + kHalf] : v[k];
    kept[k] = keep + __shfl_xor_sync(0xffffffffu, send, kHalf);
  }
  float total;
  if constexpr (kHalf > 1)
    total = transpose_sum<kHalf>(kept, lane);
  else
    total = kept[0];
  return total;
}

// The lanes that hold the same value after transpose_sum hold shares of it.
template <int N>
__device__ __forceinline__ float sum_lanes(const float (&v)[N], int lane) {
  float total = v[0];
  if constexpr (N > 1) total = transpose_sum<N>(v, lane);
#pragma unroll
  for (int other = N; other < 32; other *= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
  return total;
}

// Totals over the warps that share a unit, in block order.
__device__ __forceinline__ float sum_blocks(float value, float* scratch, int blocks, int block, int group, int lane) {
  if (blocks == 1) return value;
  float* mine = scratch + group * blocks * 32 + lane;
  mine[block * 32] = value;
  __syncthreads();
  float total = 0;
  for (int b = 0; b < blocks; ++b) total += mine[b * 32];
  return total;
}

// Shared floats for sum_blocks: two buffers, one for each of the two sums, so that one barrier a sum is enough.
inline int finish_scratch(int blocks, int groups) {
  return blocks == 1 ? 0 : 2 * groups * blocks * 32;
}

// sum: this warp's channels of N pixels, rows of kCols; the first pixel is row0 of y, the next row of pixels `width`
// further. Bit o of `pixels` tells whether pixel o is stored at all. Called by all warps of the CTA together; `pixels`
// is 0 in a warp without a unit.
template <class T, bool kNormalize, int kCols, int N>
__device__ __forceinline__ void finish(const ConvForward& p, const ConvPlan& plan, const ConvWarp<T>& warp,
                                       Floats<kWord<T>> (&sum)[N], unsigned pixels, int64_t row0, int width,
                                       float* scratch) {
  constexpr int V = kWord<T>;
  const int64_t channels = p.geometry.channels;
  const unsigned stride = static_cast<unsigned>(channels * sizeof(T));
  if constexpr (kNormalize) {
    const float scale = 1.0f / channels;
    float part[N];
#pragma unroll
    for (int o = 0; o < N; ++o) {
      part[o] = sum[o].v[0];
      if constexpr (V == 2) part[o] += sum[o].v[1];
      if (!warp.active) part[o] = 0.0f;
    }
    const float mean =
        scale * sum_blocks(sum_lanes(part, warp.lane), scratch, plan.blocks, warp.block, warp.group, warp.lane);
#pragma unroll
    for (int o = 0; o < N; ++o) {
      const float m = __shfl_sync(0xffffffffu, mean, o);
      part[o] = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[o].v[i] -= m;
        part[o] += sum[o].v[i] * sum[o].v[i];
      }
      if (!warp.active) part[o] = 0.0f;
    }
    const float variance = scale * sum_blocks(sum_lanes(part, warp.lane), scratch + plan.groups * plan.blocks * 32,
                                              plan.blocks, warp.block, warp.group, warp.lane);
    const float rstd = 1.0f / sqrtf(variance + static_cast<float>(p.eps));
    if (warp.block == 0 && warp.lane < N && (pixels >> warp.lane & 1))
      static_cast<float*>(p.rstd)[row0 + warp.lane / kCols * width + warp.lane % kCols] = rstd;
    Floats<V> weight, bias;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      weight.v[i] = p.ln_weight ? static_cast<const float*>(p.ln_weight)[warp.channel + i] : 1.0f;
      bias.v[i] = p.ln_bias ? static_cast<const float*>(p.ln_bias)[warp.channel + i] : 0.0f;
    }
#pragma unroll
    for (int o = 0; o < N; ++o) {
      const float r = __shfl_sync(0xffffffffu, rstd, o);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[o].v[i] = sum[o].v[i] * r * weight.v[i] + bias.v[i];
    }
  }
  if (!warp.active) return;
  const int64_t base = (row0 * channels + warp.channel) * static_cast<int64_t>(sizeof(T));
  const int64_t pitch = static_cast<int64_t>(width) * stride;
  if (!kNormalize && p.residual) {
#pragma unroll
    for (int r = 0; r < N / kCols; ++r) {
      const char* residual = static_cast<const char*>(p.residual) + base + r * pitch;
#pragma unroll
      for (int o = r * kCols; o < (r + 1) * kCols; ++o, residual += stride) {
        uint32_t word = 0;
        if (pixels >> o & 1) word = read_word(residual);
        const Floats<V> value = widen<T>(word);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[o].v[i] += value.v[i];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < N / kCols; ++r) {
    char* y = static_cast<char*>(p.y) + base + r * pitch;
#pragma unroll
    for (int o = r * kCols; o < (r + 1) * kCols; ++o, y += stride) {
      Vec<T, V> out;
#pragma unroll
      for (int i = 0; i < V; ++i) out.v[i] = from_acc<T>(sum[o].v[i]);
      if (pixels >> o & 1) store<T, V>(reinterpret_cast<T*>(y), out);
    }
  }
}

}  // namespace cuda
}  // namespace cnx
