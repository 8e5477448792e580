// The end of a convolution kernel: what a warp does with N finished pixels of its channels. Adds the residual, or
// normalises over the channels of each pixel, and stores.
#pragma once

#include "warp.cuh"

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

// Sums of N values over a unit's lanes are held by its first kEach ones, lane l has those of values h * kEach + l. In
// warps of several units these are eight, though 16 may be there: then the others hold the same.
template <int N, bool kNarrow>
struct Held {
  static constexpr int kEach = kNarrow ? 8 : N, kCount = N / kEach;
};

// f(kNarrow) by whether the warp has several units, which then have 32 pixels.
template <int N, class F>
__device__ __forceinline__ void by_width(int kind, const F& f) {
  if (N < 32 || kind == 0)
    f(std::false_type{});
  else
    f(std::true_type{});
}

// Shared floats for two sums over blocks: a buffer for each, so that one barrier a sum is enough.
inline int finish_scratch(int blocks, int units) {
  return blocks == 1 ? 0 : 2 * units * blocks * 32;
}

// Means of N values of a unit over its channels: sums over the lanes, then over the blocks in their order.
template <class T, int N>
__device__ __forceinline__ void mean_of_unit(const ConvPlan& plan, const ConvWarp<T>& warp, float scale,
                                             const float (&v)[N], float* scratch, float (&held)[4]) {
  const int blocks = plan.blocks();
  // lanes that hold the same write the same
  float* unit = scratch + warp.unit * blocks * 32 + (N < 32 || warp.kind == 0 ? warp.lane : warp.lane & 7);
  by_width<N>(warp.kind, [&](auto narrow) {
    using H = Held<N, decltype(narrow)::value>;
#pragma unroll
    for (int h = 0; h < H::kCount; ++h) {
      float part[H::kEach];
#pragma unroll
      for (int i = 0; i < H::kEach; ++i) part[i] = v[h * H::kEach + i];
      float total = part[0];
      if constexpr (H::kEach > 1) total = transpose_sum<H::kEach>(part, warp.lane);
      if constexpr (decltype(narrow)::value) {
        const float other = __shfl_xor_sync(0xffffffffu, total, 8);
        if (warp.kind == 1) total += other;
      } else {
#pragma unroll
        for (int other = H::kEach; other < 32; other *= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
      }
      held[h] = total * scale;
      if (blocks > 1) unit[warp.block * 32 + h * H::kEach] = total;
    }
  });
  if (blocks == 1) return;
  __syncthreads();
  by_width<N>(warp.kind, [&](auto narrow) {
    using H = Held<N, decltype(narrow)::value>;
#pragma unroll
    for (int h = 0; h < H::kCount; ++h) {
      float total = 0;
#pragma unroll 1
      for (int b = 0; b < blocks; ++b) total += unit[b * 32 + h * H::kEach];
      held[h] = total * scale;
    }
  });
}

// f(o, value o) for N values of a unit that its lanes hold.
template <class T, int N, class F>
__device__ __forceinline__ void each_held(const ConvWarp<T>& warp, const float (&held)[4], const F& f) {
  by_width<N>(warp.kind, [&](auto narrow) {
    constexpr int kEach = Held<N, decltype(narrow)::value>::kEach;
    const int first = decltype(narrow)::value ? warp.first_lane() : 0;
#pragma unroll
    for (int o = 0; o < N; ++o) f(o, __shfl_sync(0xffffffffu, held[o / kEach], first + o % kEach));
  });
}

// f(o, address) for each pixel o that is in `pixels`, of N in rows of kCols from `at` on; of a single row it has all or
// none.
template <int kCols, int N, class F>
__device__ __forceinline__ void each_pixel(const char* at, unsigned stride, int64_t pitch, unsigned pixels,
                                           const F& f) {
  const bool all = kCols == N ? pixels : __all_sync(0xffffffffu, pixels == ~0u >> (32 - N));
  if (all) {  // no tests
#pragma unroll
    for (int o = 0; o < N; ++o) f(o, at + o / kCols * pitch + o % kCols * uint64_t{stride});
  } else if constexpr (kCols < N) {
#pragma unroll
    for (int o = 0; o < N; ++o)
      if (pixels >> o & 1) f(o, at + o / kCols * pitch + o % kCols * uint64_t{stride});
  }
}

// sum: the lane's channels of N pixels, rows of kCols; the first pixel is row0 of y, the next row of pixels `width`
// further. Bit o of `pixels` tells whether pixel o is stored at all. Called by all warps of the CTA together; `pixels`
// is 0 in a warp without a unit.
template <class T, bool kNormalize, int kCols, int N>
__device__ __forceinline__ void finish(const ConvForward& p, const ConvPlan& plan, const ConvWarp<T>& warp,
                                       Floats<kWord<T>> (&sum)[N], unsigned pixels, int row0, int width,
                                       float* scratch) {
  constexpr int V = kWord<T>;
  const int64_t channels = p.geometry.channels;
  const unsigned stride = static_cast<unsigned>(channels * sizeof(T));
  if constexpr (kNormalize) {
    const float scale = 1.0f / channels;
    float part[N], held[4];
#pragma unroll
    for (int o = 0; o < N; ++o) {
      part[o] = sum[o].v[0];
      if constexpr (V == 2) part[o] += sum[o].v[1];
      if (!warp.active) part[o] = 0.0f;
    }
    mean_of_unit<T, N>(plan, warp, scale, part, scratch, held);
    each_held<T, N>(warp, held, [&](int o, float mean) {
      part[o] = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[o].v[i] -= mean;
        part[o] += sum[o].v[i] * sum[o].v[i];
      }
      if (!warp.active) part[o] = 0.0f;
    });
    mean_of_unit<T, N>(plan, warp, scale, part, scratch + plan.units * plan.blocks() * 32, held);
    by_width<N>(warp.kind, [&](auto narrow) {
      using H = Held<N, decltype(narrow)::value>;
#pragma unroll
      for (int h = 0; h < H::kCount; ++h) {
        held[h] = 1.0f / sqrtf(held[h] + static_cast<float>(p.eps));
        const int lane = N < 32 ? warp.lane : warp.word(), o = h * H::kEach + lane;
        if (warp.block == 0 && lane < H::kEach && (pixels >> o & 1))
          static_cast<float*>(p.rstd)[int64_t{row0} + o / kCols * width + o % kCols] = held[h];
      }
    });
    Floats<V> weight, bias;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      weight.v[i] = p.ln_weight ? static_cast<const float*>(p.ln_weight)[warp.channel + i] : 1.0f;
      bias.v[i] = p.ln_bias ? static_cast<const float*>(p.ln_bias)[warp.channel + i] : 0.0f;
    }
    each_held<T, N>(warp, held, [&](int o, float rstd) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[o].v[i] = sum[o].v[i] * rstd * weight.v[i] + bias.v[i];
    });
  }
  if (!warp.active) pixels = 0;
  const int64_t base = (row0 * channels + warp.channel) * static_cast<int64_t>(sizeof(T));
  const int64_t pitch = static_cast<int64_t>(width) * stride;
  if (!kNormalize && p.residual) {
    each_pixel<kCols, N>(static_cast<const char*>(p.residual) + base, stride, pitch, pixels,
                         [&](int o, const char* at) {
                           const Floats<V> value = widen<T>(read_word(at));
#pragma unroll
                           for (int i = 0; i < V; ++i) sum[o].v[i] += value.v[i];
                         });
  }
  each_pixel<kCols, N>(static_cast<const char*>(p.y) + base, stride, pitch, pixels, [&](int o, const char* at) {
    Vec<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = from_acc<T>(sum[o].v[i]);
    store<T, V>(reinterpret_cast<T*>(const_cast<char*>(at)), out);
  });
}

}  // namespace cuda
}  // namespace cnx
