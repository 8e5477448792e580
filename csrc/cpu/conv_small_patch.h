// The depthwise convolution for K = 7 on patches of side 1 and 2, where a patch reaches several patches away. The loop
// runs over the neighbour patches: which pixel of which neighbour meets which tap is known at compile time, a hidden
// neighbour costs one comparison, and a visible one feeds up to 16 multiply-adds from 4 loads.
#pragma once

#include <utility>

#include "conv_tile.h"

namespace cnx {
namespace CNX_ISA {

template <int kSide>
struct SmallPatch {
  static constexpr int reach = (kRadius + kSide - 1) / kSide;
  static constexpr int window = 2 * reach + 1;
  static constexpr int neighbours = window * window;
  static constexpr int pixels = kSide * kSide;

  // Tap with which output pixel `o` of a patch reads pixel `i` of neighbour n, or -1.
  static constexpr int tap(int n, int o, int i) {
    const int dy = (n / window - reach) * kSide + i / kSide - o / kSide + kRadius;
    const int dx = (n % window - reach) * kSide + i % kSide - o % kSide + kRadius;
    return dy >= 0 && dy < kTap && dx >= 0 && dx < kTap ? dy * kTap + dx : -1;
  }
  // The lowest tap of neighbour n: its taps lie within `span` of it in each direction.
  static constexpr int span = 2 * kSide - 1;
  static constexpr int slot_of_tap(int n, int o, int i) {
    return (i / kSide - o / kSide + kSide - 1) * span + i % kSide - o % kSide + kSide - 1;
  }
};

template <class F, int... n>
CNX_INLINE void unroll(const F& f, std::integer_sequence<int, n...>) {
  (f(Constant<n>{}), ...);
}

// Sums of all pixels of one patch over `kGroup` vectors of channels; weights as vectors [block][tap].
template <class T, int kSide, int kGroup, class Lanes>
CNX_INLINE void convolve_small_patch(const ConvGeometry& g, const T* x, int64_t patch, const Lanes& lanes,
                                     const Vec<T>* w, Vec<T> (*sums)[kGroup]) {
  using S = SmallPatch<kSide>;
  const int32_t* around = g.neighbours + patch * S::neighbours;
  const int64_t stride = g.channels;
  unroll(
      [&](auto constant) __attribute__((always_inline)) {
        constexpr int n = decltype(constant)::value;
        const int64_t slot = around[n];
        if (slot < 0) return;
        const T* source = x + slot * S::pixels * stride;
#pragma GCC unroll 4
        for (int i = 0; i < S::pixels; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kGroup; ++v) {
            const Vec<T> value = lanes.load(source + i * stride + v * kLanes<T>);
#pragma GCC unroll 4
            for (int o = 0; o < S::pixels; ++o) {
              const int tap = S::tap(n, o, i);
              if (tap >= 0) sums[o][v] += value * w[v * kTap * kTap + tap];
            }
          }
      },
      std::make_integer_sequence<int, S::neighbours>{});
}

// dw[tap] += over patches [first, last): neighbour by neighbour, so that its few sums stay in registers.
template <class T, int kSide, class Lanes>
CNX_INLINE void accumulate_small_patch(const ConvGeometry& g, const T* x, const T* grad, int64_t first, int64_t last,
                                       const Lanes& lanes, Vec<T>* dw) {
  using S = SmallPatch<kSide>;
  const int64_t stride = g.channels;
  unroll(
      [&](auto constant) __attribute__((always_inline)) {
        constexpr int n = decltype(constant)::value;
        Vec<T> sums[S::span * S::span] = {};
        for (int64_t patch = first; patch < last; ++patch) {
          const int64_t slot = g.neighbours[patch * S::neighbours + n];
          if (slot < 0) continue;
          const T* source = x + slot * S::pixels * stride;
          const T* target = grad + patch * S::pixels * stride;
          Vec<T> d[S::pixels];
          for (int o = 0; o < S::pixels; ++o) d[o] = lanes.load(target + o * stride);
#pragma GCC unroll 4
          for (int i = 0; i < S::pixels; ++i) {
            const Vec<T> value = lanes.load(source + i * stride);
#pragma GCC unroll 4
            for (int o = 0; o < S::pixels; ++o)
              if (S::tap(n, o, i) >= 0) sums[S::slot_of_tap(n, o, i)] += value * d[o];
          }
        }
        // several (output, input) pairs share a tap and its sum: write each once
        bool written[S::span * S::span] = {};
        for (int i = 0; i < S::pixels; ++i)
          for (int o = 0; o < S::pixels; ++o) {
            const int tap = S::tap(n, o, i), at = S::slot_of_tap(n, o, i);
            if (tap < 0 || written[at]) continue;
            written[at] = true;
            dw[tap] += sums[at];
          }
      },
      std::make_integer_sequence<int, S::neighbours>{});
}

}  // namespace CNX_ISA
}  // namespace cnx
