// Words of channels, and the sum over the warps of a CTA, for the weight gradient kernels with 7x7 taps in registers.
#pragma once

#include "grad_plan.h"

namespace cnx {
namespace cuda {

constexpr int kTap = 7, kRadius = 3, kTaps = kTap * kTap;

// The offset is in bytes and unsigned, so that adding it to a pointer takes no 64-bit product. No kernel here writes
// what is read.
template <class T>
__device__ __forceinline__ uint32_t load_word(const T* p, uint32_t offset = 0) {
  return __ldg(reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(p) + offset));
}

// Asks for a line to be in L2 when its turn comes.
__device__ __forceinline__ void prefetch(const void* p) {
#if !defined(CNX_EMULATION)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
#endif
  (void)p;
}

// p advanced by index * bytes, one instruction; of a negative index nothing may be read.
template <class T>
__device__ __forceinline__ const T* advance(const T* p, int index, uint32_t bytes) {
#if defined(CNX_EMULATION)
  return index < 0 ? p : reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + int64_t{index} * bytes);
#else
  const T* result;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(index), "r"(bytes), "l"(p));
  return result;
#endif
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// A bfloat16 is the upper half of a float: one operation per channel. Volatile, or the compiler repeats it beside each
// use in another branch.
__device__ __forceinline__ void unpack_word(uint32_t word, float (&out)[2], Type<bf16>) {
#if defined(CNX_EMULATION)
  out[0] = float_of_bits(word << 16);
  out[1] = float_of_bits(word & 0xffff0000u);
#else
  uint32_t low, high;
  asm volatile("shl.b32 %0, %1, 16;" : "=r"(low) : "r"(word));
  asm volatile("and.b32 %0, %1, 0xffff0000;" : "=r"(high) : "r"(word));
  out[0] = float_of_bits(low);
  out[1] = float_of_bits(high);
#endif
}
__device__ __forceinline__ void unpack_word(uint32_t word, float (&out)[2], Type<f16>) {
  Vec<f16, 2> pair;
  __builtin_memcpy(&pair, &word, 4);
  out[0] = to_acc(pair.v[0]);
  out[1] = to_acc(pair.v[1]);
}
__device__ __forceinline__ void unpack_word(uint32_t word, float (&out)[1], Type<float>) {
  out[0] = float_of_bits(word);
}

__device__ __forceinline__ void multiply_add(float (&sum)[1], const float (&a)[1], const float* b) {
  sum[0] += a[0] * b[0];
}
// One instruction for two channels from sm_100 on.
__device__ __forceinline__ void multiply_add(float (&sum)[2], const float (&a)[2], const float* b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  const float2 s = __ffma2_rn(make_float2(a[0], a[1]), make_float2(b[0], b[1]), make_float2(sum[0], sum[1]));
  sum[0] = s.x;
  sum[1] = s.y;
#else
  sum[0] += a[0] * b[0];
  sum[1] += a[1] * b[1];
#endif
}

// Where a lane works: its word of channels, and which of the warp's tiles.
struct LanePlace {
  int64_t channel, first;  // the lane's, the block's
  int groups, group;       // tiles a warp works on at once, and the lane's
  int width;               // lanes per tile
  bool valid;              // else a copy of the last word that is never stored

  __device__ __forceinline__ LanePlace(int64_t channels, int per_word, int64_t block, int lane) {
    const ChannelBlocks blocks{channels / per_word};
    blocks.block(block, &first, &width);
    groups = 32 / width;
    group = lane / width;
    const int64_t word = first + lane % width;
    first *= per_word;
    valid = word < blocks.words;
    channel = (valid ? word : blocks.words - 1) * per_word;
  }
};

// Adds the sums of all warps and tile groups of a CTA in a fixed order and writes them as one partial.
template <class T>
__device__ __forceinline__ void store_partial(float (&sums)[kTaps + 1][kPerWord<T>], const LanePlace& place,
                                              int64_t split, int64_t channels, float* partial) {
  constexpr int kPer = kPerWord<T>, kSums = (kTaps + 1) * kPer;
  CNX_DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);  // [kGradWarps / 2][kSums][32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int half = kGradWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) scratch[((warp - half) * kSums + i) * 32 + lane] = sums[i / kPer][i % kPer];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i / kPer][i % kPer] += scratch[(warp * kSums + i) * 32 + lane];
    }
    __syncthreads();
  }
  if (warp != 0) return;
  for (int step = place.width; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      sums[i / kPer][i % kPer] += __shfl_xor_sync(0xffffffffu, sums[i / kPer][i % kPer], step);
  }
  if (!place.valid || place.group != 0) return;
  float* target = partial + split * (kTaps + 1) * channels + place.channel;
#pragma unroll
  for (int t = 0; t <= kTaps; ++t) {
    Vec<float, kPer> value;
#pragma unroll
    for (int i = 0; i < kPer; ++i) value.v[i] = sums[t][i];
    store<float, kPer>(target + t * channels, value);
  }
}

template <class T>
constexpr int kPartialShared = kGradWarps / 2 * (kTaps + 1) * kPerWord<T> * 32 * static_cast<int>(sizeof(float));

}  // namespace cuda
}  // namespace cnx
