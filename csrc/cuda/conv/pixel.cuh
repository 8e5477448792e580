// Any kernel size on packed patches of one pixel: the table of neighbours is the table of taps. A warp is one pixel of
// 32 words of channels and visits only its visible neighbours (11 of 49 in FCMAE's last stage).
#pragma once

#include "epilogue.cuh"

namespace cnx {
namespace cuda {

template <class T, bool kNormalize>
__global__ void __launch_bounds__(256) conv_pixel(ConvForward p, ConvPlan plan) {
  constexpr int V = kWord<T>, kAhead = 4;  // words asked for before the first is used
  CNX_DYNAMIC_SHARED(shared);
  const int taps = p.geometry.kernel_size * p.geometry.kernel_size;
  float* weights = reinterpret_cast<float*>(shared);
  float* scratch = weights + plan.wide * taps * kWeightPitch<T>;
  const ConvWarp<T> warp(p, plan);
  for (int b = 0; b < plan.wide; ++b)
    stage_weights<T>(p, warp.first_channel + b * 32 * V, taps, weights + b * taps * kWeightPitch<T>);
  __syncthreads();
  const float* staged = weights + warp.block * taps * kWeightPitch<T> + warp.lane * V;

  const unsigned stride = static_cast<unsigned>(p.geometry.channels * sizeof(T));
  const char* x = reinterpret_cast<const char*>(static_cast<const T*>(p.x) + warp.channel);
  const Floats<V> start = first_value<T>(p, warp);
  for (int base = warp.begin; base < warp.end; base += warp.step) {
    const int pixel = base + warp.unit;
    const bool unit = pixel < warp.end;
    Floats<V> sum[1] = {start};
    for (int first = 0; first < taps; first += 32) {
      int32_t slot = -1;
      if (unit && first + warp.lane < taps) slot = p.geometry.neighbours[int64_t{pixel} * taps + first + warp.lane];
      unsigned visible = __ballot_sync(0xffffffffu, slot >= 0);
      while (visible) {
        uint32_t word[kAhead];
        int tap[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          tap[i] = visible ? __ffs(visible) - 1 : -1;
          visible &= visible - 1;  // stays 0 at 0
          const int from = __shfl_sync(0xffffffffu, slot, tap[i] < 0 ? 0 : tap[i]);
          if (tap[i] >= 0) word[i] = read_word(pixel_at(x, stride, static_cast<unsigned>(from)));
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (tap[i] >= 0) add_product(sum[0], widen<T>(word[i]), weight_at<T>(staged, first + tap[i]));
      }
    }
    finish<T, kNormalize, 1>(p, plan, warp, sum, unit, pixel, 0, scratch);
  }
}

}  // namespace cuda
}  // namespace cnx
