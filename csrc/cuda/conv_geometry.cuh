// What serves a depthwise convolution of a given shape, how its work is cut, and the pieces the kernels share: words of
// channels, weights in shared memory.
//
// A lane holds one 4-byte word of channels (one float, two bfloat16 or float16), so a warp's access is 128 bytes of one
// pixel. x is read through L1 straight into registers: a 128-byte hit costs the data path what a shared-memory read
// would, and needs no fill, no zeros around the map and no barrier; a hidden neighbour is a branch not taken.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "types.cuh"

namespace cnx {
namespace cuda {

enum class ConvKernel { window, patch, point, taps };

struct ConvPlan {
  ConvKernel kernel;
  int blocks;     // channel blocks (32 words) of a CTA: all of them where LN is fused, else one
  int groups;     // units a CTA works on at once; a CTA has blocks * groups warps
  bool fused;     // the kernel itself normalises
  int shared;     // bytes of dynamic shared memory
  int columns;    // CTAs side by side: channel blocks / blocks
  int64_t units;  // window: strips of 4 x 8 pixels; patch: patches; point: pixels (below 2^31); taps: threads
};

// Host only, no device needed.
ConvPlan conv_forward_plan(const ConvForward& p);
const char* conv_forward_choice(const ConvForward& p);

// Channels of one lane.
template <class T>
constexpr int kWord = 4 / static_cast<int>(sizeof(T));

template <int V>
struct alignas(4 * V) Floats {
  float v[V];
};

// Packed multiply-adds exist from sm_100 on; elsewhere two instructions.
template <int V>
__device__ __forceinline__ void add_product(Floats<V>& sum, const Floats<V>& x, const Floats<V>& w) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (V == 2) {
    const float2 s =
        __ffma2_rn(make_float2(x.v[0], x.v[1]), make_float2(w.v[0], w.v[1]), make_float2(sum.v[0], sum.v[1]));
    sum.v[0] = s.x;
    sum.v[1] = s.y;
  } else {
    sum.v[0] += x.v[0] * w.v[0];
  }
#else
#pragma unroll
  for (int i = 0; i < V; ++i) sum.v[i] += x.v[i] * w.v[i];
#endif
}

// Launch bounds of kernels on pairs of channels. 384 threads leave 168 registers, which is 12 warps on a
// multiprocessor; 256 leave 255 and 8 warps. Packed multiply-adds want aligned pairs of registers, so sm_100 takes the
// latter: it also has fewer instructions to hide. kTightThreads: where 168 would spill on sm_80 alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPairThreads = 256, kTightThreads = 256;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPairThreads = 384, kTightThreads = 256;
#else
constexpr int kPairThreads = 384, kTightThreads = 384;
#endif

// A word of a pixel, through L1 as data that no one writes while the kernel runs.
__device__ __forceinline__ uint32_t read_word(const char* p) {
#if defined(CNX_EMULATION)
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
#else
  return __ldg(reinterpret_cast<const unsigned int*>(p));
#endif
}

template <class T>
__device__ __forceinline__ Floats<kWord<T>> widen(uint32_t word) {
  Floats<kWord<T>> out;
  if constexpr (std::is_same<T, bf16>::value) {  // bfloat16 is the upper half of a float
    const uint32_t bits[2] = {word << 16, word & 0xffff0000u};
    __builtin_memcpy(&out, bits, sizeof out);
  } else {
    Vec<T, kWord<T>> in;
    __builtin_memcpy(&in, &word, sizeof word);
#pragma unroll
    for (int i = 0; i < kWord<T>; ++i) out.v[i] = to_acc(in.v[i]);
  }
  return out;
}

__device__ __forceinline__ const char* pixel_at(const char* base, unsigned stride, unsigned count) {
  return base + static_cast<uint64_t>(stride) * count;
}

// Which channels and which unit of its CTA a warp works on.
template <class T>
struct ConvWarp {
  int lane, block, group, groups;
  int first_channel;  // of the CTA
  int channel;        // of this lane; 0 where idle, so that reads stay inside
  bool active;
  int begin, end;  // units of this CTA

  __device__ __forceinline__ ConvWarp(const ConvForward& p, const ConvPlan& plan) {
    // the shuffle tells the compiler that the warp's number is the same in all lanes
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int parts = gridDim.x / plan.columns, column = blockIdx.x % plan.columns, part = blockIdx.x / plan.columns;
    lane = threadIdx.x % 32;
    block = warp % plan.blocks;
    group = warp / plan.blocks;
    groups = plan.groups;
    first_channel = column * plan.blocks * 32 * kWord<T>;
    channel = first_channel + (block * 32 + lane) * kWord<T>;
    active = channel < p.geometry.channels;
    if (!active) channel = 0;
    // the first `more` parts are one longer
    const int units = static_cast<int>(plan.units), each = units / parts, more = units - each * parts;
    begin = each * part + (part < more ? part : more);
    end = begin + each + (part < more);
  }
};

// Words of padding keep the transposing stores below to two-way bank conflicts.
template <class T>
constexpr int kWeightPitch = 33 * kWord<T>;

// Weights [C, taps] of the 32 words of channels from c0 -> shared [taps][kWeightPitch], zero beyond C, turned for flip.
template <class T>
__device__ __forceinline__ void stage_weights(const ConvForward& p, int64_t c0, int taps, float* to) {
  const float* from = static_cast<const float*>(p.weight) + c0 * taps;
  const int64_t rest = p.geometry.channels - c0;
  const int all = 32 * kWord<T> * taps, count = rest * taps < all ? static_cast<int>(rest * taps) : all;
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    const int c = i / taps, tap = i - c * taps;
    to[(p.flip ? taps - 1 - tap : tap) * kWeightPitch<T> + c] = i < count ? from[i] : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ Floats<kWord<T>> weight_at(const float* staged, int tap) {
  return *reinterpret_cast<const Floats<kWord<T>>*>(staged + tap * kWeightPitch<T>);
}

template <class T>
__device__ __forceinline__ Floats<kWord<T>> first_value(const ConvForward& p, const ConvWarp<T>& warp) {
  Floats<kWord<T>> out;
#pragma unroll
  for (int i = 0; i < kWord<T>; ++i) out.v[i] = p.bias ? static_cast<const float*>(p.bias)[warp.channel + i] : 0.0f;
  return out;
}

}  // namespace cuda
}  // namespace cnx
