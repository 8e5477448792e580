// The depthwise convolution pixel by pixel: list the taps whose pixel is visible, then run over the channels. Serves
// kernel sizes other than 7, packed and dense.
#pragma once

#include "parallel.h"

namespace cnx {
namespace CNX_ISA {

constexpr int kMaxTaps = 11 * 11;

struct TapList {
  int count;
  int32_t tap[kMaxTaps];
  int64_t row[kMaxTaps];  // pixel row of x that the tap reads
};

CNX_INLINE int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// Visible taps of pixel (y, x) of a map.
inline void list_taps(const ConvGeometry& g, int64_t map, int64_t y, int64_t x, TapList& list) {
  const int radius = g.kernel_size / 2;
  list.count = 0;
  if (!g.neighbours) {
    for (int ky = 0; ky < g.kernel_size; ++ky) {
      const int64_t yy = y + ky - radius;
      if (yy < 0 || yy >= g.height) continue;
      for (int kx = 0; kx < g.kernel_size; ++kx) {
        const int64_t xx = x + kx - radius;
        if (xx < 0 || xx >= g.width) continue;
        list.tap[list.count] = ky * g.kernel_size + kx;
        list.row[list.count++] = (map * g.height + yy) * g.width + xx;
      }
    }
    return;
  }
  const int64_t side = g.height, reach = ceil_div(radius, side), window = 2 * reach + 1;
  const int32_t* around = g.neighbours + map * window * window;
  for (int ky = 0; ky < g.kernel_size; ++ky) {
    const int64_t yy = y + ky - radius, dr = floor_div(yy, side);
    for (int kx = 0; kx < g.kernel_size; ++kx) {
      const int64_t xx = x + kx - radius, dc = floor_div(xx, side);
      const int64_t slot = around[(dr + reach) * window + dc + reach];
      if (slot < 0) continue;
      list.tap[list.count] = ky * g.kernel_size + kx;
      list.row[list.count++] = (slot * side + yy - dr * side) * side + xx - dc * side;
    }
  }
}

// result[c] = bias[c] + sum over taps of x * w, for all channels; weights tap-major [K*K, C].
template <class T>
void convolve_pixel(const TapList& list, const T* x, const Acc<T>* w, const Acc<T>* bias, int64_t channels,
                    Acc<T>* result) {
  constexpr int lanes = kLanes<T>, group = 4;
  int64_t c = 0;
  for (; c + group * lanes <= channels; c += group * lanes) {
    Vec<T> sums[group] = {};
    if (bias)
      for (int v = 0; v < group; ++v) sums[v] = Full::load(bias + c + v * lanes);
    for (int i = 0; i < list.count; ++i) {
      const T* pixel = x + list.row[i] * channels + c;
      const Acc<T>* taps = w + list.tap[i] * channels + c;
#pragma GCC unroll 4
      for (int v = 0; v < group; ++v) sums[v] += Full::load(pixel + v * lanes) * Full::load(taps + v * lanes);
    }
    for (int v = 0; v < group; ++v) Full::store(result + c + v * lanes, sums[v]);
  }
  each_vector<T>(c, channels, [&](auto rest, int64_t at) {
    Vec<T> sum{};
    if (bias) sum = rest.load(bias + at);
    for (int i = 0; i < list.count; ++i)
      sum += rest.load(x + list.row[i] * channels + at) * rest.load(w + list.tap[i] * channels + at);
    rest.store(result + at, sum);
  });
}

// dw[tap, c] += grad[c] * x[tap's pixel, c] over channels [c0, c1); dw tap-major, row K*K is the bias gradient.
template <class T>
void accumulate_pixel(const TapList& list, const T* x, const T* grad, int64_t channels, int64_t c0, int64_t c1,
                      int taps, Acc<T>* dw) {
  each_vector<T>(c0, c1, [&](auto lanes, int64_t c) {
    const Vec<T> g = lanes.load(grad + c);
    lanes.store(dw + taps * channels + c, lanes.load(dw + taps * channels + c) + g);
    for (int i = 0; i < list.count; ++i) {
      Acc<T>* at = dw + list.tap[i] * channels + c;
      lanes.store(at, lanes.load(at) + g * lanes.load(x + list.row[i] * channels + c));
    }
  });
}

}  // namespace CNX_ISA
}  // namespace cnx
