// 7x7 on packed patches of side 4 and 2: a warp is one patch of 32 words of channels. The weights stay in registers (49
// words for all the patches of a CTA), the window is read from the visible ones of the 3x3 or 5x5 neighbouring patches,
// and every word is multiplied into the outputs it reaches: exactly the taps that touch a visible pixel.
#pragma once

#include "epilogue.cuh"

namespace cnx {
namespace cuda {

// One axis of neighbour d (patches away): pixels [first, last) of it are within reach of the patch.
template <int kSide>
struct Reach {
  static constexpr int kPatches = (3 + kSide - 1) / kSide;
  __device__ static constexpr int first(int d) { return -3 - d * kSide > 0 ? -3 - d * kSide : 0; }
  __device__ static constexpr int last(int d) { return kSide + 3 - d * kSide < kSide ? kSide + 3 - d * kSide : kSide; }
};

// Pixel rows y0 and y0 + 1 of a neighbour.
template <class T, int kSide>
__device__ __forceinline__ void read_patch(const char* patch, int dy, int dx, int y0, unsigned stride,
                                           uint32_t (&words)[2 * kSide]) {
  using R = Reach<kSide>;
#pragma unroll
  for (int y = y0; y < y0 + 2; ++y)
#pragma unroll
    for (int x = 0; x < kSide; ++x)
      if (y >= R::first(dy) && y < R::last(dy) && x >= R::first(dx) && x < R::last(dx))
        words[(y - y0) * kSide + x] = read_word(pixel_at(patch, stride, y * kSide + x));
}

template <class T, int kSide>
__device__ __forceinline__ void add_patch(Floats<kWord<T>> (&sum)[kSide * kSide], const uint32_t (&words)[2 * kSide],
                                          int dy, int dx, int y0, const Floats<kWord<T>> (&w)[49]) {
  using R = Reach<kSide>;
#pragma unroll
  for (int y = y0; y < y0 + 2; ++y)
#pragma unroll
    for (int x = 0; x < kSide; ++x) {
      if (y < R::first(dy) || y >= R::last(dy) || x < R::first(dx) || x >= R::last(dx)) continue;
      const Floats<kWord<T>> in = widen<T>(words[(y - y0) * kSide + x]);
#pragma unroll
      for (int oy = 0; oy < kSide; ++oy)
#pragma unroll
        for (int ox = 0; ox < kSide; ++ox) {
          const int ty = dy * kSide + y - oy + 3, tx = dx * kSide + x - ox + 3;
          if (ty >= 0 && ty < 7 && tx >= 0 && tx < 7) add_product(sum[oy * kSide + ox], in, w[ty * 7 + tx]);
        }
    }
}

template <class T, int kSide, bool kNormalize>
__global__ void __launch_bounds__(kSide == 4 && kNormalize ? kTightThreads : kPairThreads, 1)
    conv_small_patch(ConvForward p, ConvPlan plan) {
  constexpr int V = kWord<T>, kPixels = kSide * kSide, kReach = Reach<kSide>::kPatches, kWindow = 2 * kReach + 1;
  // two pixel rows of so many neighbours are asked for before the first is used; more would not fit in registers
  constexpr int kAhead = kSide == 2 ? kWindow : 1;
  CNX_DYNAMIC_SHARED(shared);
  float* weights = reinterpret_cast<float*>(shared);
  float* scratch = weights + 49 * kWeightPitch<T>;
  const ConvWarp<T> warp(p, plan);
  Floats<V> w[49] = {};
  for (int b = 0; b < plan.wide; ++b) {  // one block after the other through the same shared memory
    if (b) __syncthreads();
    stage_weights<T>(p, warp.first_channel + b * 32 * V, 49, weights);
    __syncthreads();
    if (b != warp.block) continue;
#pragma unroll
    for (int tap = 0; tap < 49; ++tap) w[tap] = weight_at<T>(weights + warp.word() * V, tap);
  }

  const unsigned stride = static_cast<unsigned>(p.geometry.channels * sizeof(T));
  const char* x = reinterpret_cast<const char*>(static_cast<const T*>(p.x) + warp.channel);
  for (int base = warp.begin; base < warp.end; base += warp.step) {
    const int patch = base + warp.unit;
    const bool unit = patch < warp.end;
    int32_t slot = -1;
    if (unit && warp.lane < kWindow * kWindow)
      slot = p.geometry.neighbours[int64_t{patch} * (kWindow * kWindow) + warp.lane];
    const unsigned visible = __ballot_sync(0xffffffffu, slot >= 0);
    Floats<V> sum[kPixels];
    const Floats<V> start = first_value<T>(p, warp);
#pragma unroll
    for (int o = 0; o < kPixels; ++o) sum[o] = start;
#pragma unroll
    for (int first = 0; first < kWindow * kWindow; first += kAhead) {
#pragma unroll
      for (int y0 = 0; y0 < kSide; y0 += 2) {
        uint32_t words[kAhead][2 * kSide];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int neighbour = first + i, dy = neighbour / kWindow - kReach, dx = neighbour % kWindow - kReach;
          const int from = __shfl_sync(0xffffffffu, slot, neighbour);
          if (visible >> neighbour & 1)
            read_patch<T, kSide>(x + int64_t{from} * kPixels * stride, dy, dx, y0, stride, words[i]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int neighbour = first + i, dy = neighbour / kWindow - kReach, dx = neighbour % kWindow - kReach;
          if (visible >> neighbour & 1) add_patch<T, kSide>(sum, words[i], dy, dx, y0, w);
        }
      }
    }
    finish<T, kNormalize, kPixels>(p, plan, warp, sum, unit ? (1u << kPixels) - 1 : 0, patch * kPixels, 0, scratch);
  }
}

}  // namespace cuda
}  // namespace cnx
