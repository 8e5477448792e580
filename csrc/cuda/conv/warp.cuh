// The pieces that the convolution kernels share: words of channels, the place of a warp, weights in shared memory.
//
// A lane holds one 4-byte word of channels (one float, two bfloat16 or float16), so a warp's access is 128 bytes of one
// pixel. x is read through L1 straight into registers: a 128-byte hit costs the data path what a shared-memory read
// would, and needs no fill, no zeros around the map and no barrier; a hidden neighbour is a branch not taken.
#pragma once

#include <type_traits>

#include "../common/arch.cuh"
#include "../common/types.cuh"
#include "plan.h"

namespace cnx {
namespace cuda {

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

// One instruction, which the compiler would not choose: it adds pixel by pixel, two instructions each.
__device__ __forceinline__ const char* pixel_at(const char* base, unsigned stride, unsigned count) {
#if defined(CNX_EMULATION)
  return base + static_cast<uint64_t>(stride) * count;
#else
  const char* pixel;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(pixel) : "r"(stride), "r"(count), "l"(base));
  return pixel;
#endif
}

// Which channels and which units of its CTA a warp works on.
template <class T>
struct ConvWarp {
  int lane, block;
  int kind;           // log2 of the units in the warp, of 32 >> kind words each
  int unit;           // the lane's, counted from the first of those that the CTA has at work
  int first_channel;  // of the CTA
  int channel;        // of this lane; 0 where idle, so that reads stay inside
  bool active;
  int begin, end, step;  // units of this CTA, of which a warp takes every step-th

  __device__ __forceinline__ ConvWarp(const ConvForward& p, const ConvPlan& plan) {
    // no index into the plan that is not a constant: it would be copied to local memory
    const int wide = plan.columns[0] * plan.parts[0], half = plan.columns[1] * plan.parts[1];
    const int cta = blockIdx.x;
    kind = cta < wide ? 0 : cta < wide + half ? 1 : 2;
    const int column = kind == 0 ? cta % plan.columns[0] : plan.columns[0];
    const int part = kind == 0 ? cta / plan.columns[0] : kind == 1 ? cta - wide : cta - wide - half;
    const int parts = kind == 0 ? plan.parts[0] : kind == 1 ? plan.parts[1] : plan.parts[2];
    first_channel = (column * 32 + (kind == 2 ? plan.columns[1] * 16 : 0)) * kWord<T>;
    step = plan.units << kind;
    // the first `more` parts are one longer
    const int all = static_cast<int>(plan.all), each = all / parts, more = all - each * parts;
    begin = each * part + (part < more ? part : more);
    end = begin + each + (part < more);

    // the shuffle tells the compiler that the warp's number is the same in all lanes
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int narrow = warp - plan.wide * plan.units, quarter = narrow - plan.halves * plan.units / 2;
    if (narrow >= 0) kind = quarter < 0 ? 1 : 2;
    block = narrow < 0 ? warp % plan.wide : quarter < 0 ? plan.wide : plan.wide + plan.halves;
    const int group = narrow < 0 ? warp / plan.wide : quarter < 0 ? narrow : quarter;
    lane = threadIdx.x % 32;
    unit = (group << kind) + (lane >> (5 - kind));
    channel = first_channel + (plan.before(block) + word()) * kWord<T>;
    active = channel < p.geometry.channels;
    if (!active) channel = 0;
  }
  __device__ __forceinline__ int first_lane() const { return lane & -(32 >> kind); }  // of the lane's unit
  __device__ __forceinline__ int word() const { return lane & (31 >> kind); }         // of the block's, this lane's
  // A ballot's bits of the first eight lanes of a unit, of any of the units.
  __device__ __forceinline__ unsigned any(unsigned ballot) const {
    if (kind >= 1) ballot |= ballot >> 16;
    if (kind >= 2) ballot |= ballot >> 8;
    return ballot;
  }
  // What a lane of the unit has.
  __device__ __forceinline__ int of_unit(int value, int from) const {
    return __shfl_sync(0xffffffffu, value, first_lane() + from);
  }
};

// Words of padding keep the transposing stores below to two-way bank conflicts.
template <class T>
constexpr int kWeightPitch = 33 * kWord<T>;

// A word of zeros, read with step 0 in place of a neighbour that is hidden from some units of a warp only.
__device__ const uint32_t kZeros = 0;

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
