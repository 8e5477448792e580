// Addressing of the depthwise convolution, and its two inner loops for K = 7.
//
// An output row is cut into tiles of 4..8 pixels (fewer when the row itself is shorter). For one row of taps a tile
// reads three runs of input pixels: R to the left, its own columns, R to the right; each run lies in one patch, so it
// is present as a whole or hidden as a whole, and hidden runs cost nothing. Tiles of at least 4 > R pixels keep every
// run inside one patch.
#pragma once

#include "parallel.h"

namespace cnx {
namespace CNX_ISA {

constexpr int kTap = 7;
constexpr int kRadius = kTap / 2;
constexpr int kMaxTile = 8;

// First channel of each run's first pixel, or null where the run is hidden or outside.
template <class T>
struct Runs {
  const T* left;
  const T* own;
  const T* right;
};

struct Tiling {
  int64_t count, base, longer;  // `longer` tiles of base + 1 pixels, then tiles of base pixels

  explicit CNX_INLINE Tiling(int64_t width)
      : count(ceil_div(width, kMaxTile)), base(width / count), longer(width % count) {}
  CNX_INLINE int64_t start(int64_t i) const { return i * base + smaller(i, longer); }
  CNX_INLINE int size(int64_t i) const { return static_cast<int>(base + (i < longer ? 1 : 0)); }
};

// The row `y + dy` around tile [x0, x0 + size) of a map (a patch, or a whole dense image).
template <class T>
CNX_INLINE Runs<T> input_runs(const ConvGeometry& g, const T* x, int64_t map, int64_t y, int64_t x0, int size) {
  const int64_t c = g.channels, line = g.width * c;
  Runs<T> runs{nullptr, nullptr, nullptr};
  if (!g.neighbours) {
    if (y < 0 || y >= g.height) return runs;
    const T* row = x + (map * g.height + y) * line + x0 * c;
    runs.own = row;
    if (x0 > 0) runs.left = row - kRadius * c;
    if (x0 + size < g.width) runs.right = row + size * c;
    return runs;
  }
  // s >= R, so the row is at most one patch away
  const int64_t side = g.height, up = y < 0 ? 0 : (y >= side ? 2 : 1);
  const int64_t row = y - (up - 1) * side;
  const int32_t* around = g.neighbours + map * 9 + up * 3;
  const int64_t patch = side * line;
  const T* own = around[1] < 0 ? nullptr : x + around[1] * patch + row * line;
  if (own) runs.own = own + x0 * c;
  if (x0 > 0) {
    if (own) runs.left = own + (x0 - kRadius) * c;
  } else if (around[0] >= 0) {
    runs.left = x + around[0] * patch + row * line + (side - kRadius) * c;
  }
  if (x0 + size < side) {
    if (own) runs.right = own + (x0 + size) * c;
  } else if (around[2] >= 0) {
    runs.right = x + around[2] * patch + row * line;
  }
  return runs;
}

// Visits the pairs of one run: f(input pixel value, output o, tap), all three known at compile time once unrolled.
// `kPixels` input pixels, the first at column `kFirst` of the tile (-R for the left run, kTile for the right one).
template <class T, int kPixels, int kFirst, int kTile, class Lanes, class F>
CNX_INLINE void each_pair(const T* run, int64_t stride, const Lanes& lanes, const F& f) {
  if (!run) return;
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) {
    const Vec<T> v = lanes.load(run + i * stride);
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) {
      const int tap = kFirst + i - o + kRadius;
      if (tap >= 0 && tap < kTap) f(v, o, tap);
    }
  }
}

template <class T, int kTile, class Lanes, class F>
CNX_INLINE void each_pair_of_runs(const Runs<T>& runs, int64_t stride, const Lanes& lanes, const F& f) {
  each_pair<T, kRadius, -kRadius, kTile>(runs.left, stride, lanes, f);
  each_pair<T, kTile, 0, kTile>(runs.own, stride, lanes, f);
  each_pair<T, kRadius, kTile, kTile>(runs.right, stride, lanes, f);
}

// Calls f(Constant<tile>) for a tile size known at run time.
template <int k>
struct Constant {
  static constexpr int value = k;
};
template <class F>
CNX_INLINE void with_tile(int size, const F& f) {
  switch (size) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
    case 4:
      return f(Constant<4>{});
    case 5:
      return f(Constant<5>{});
    case 6:
      return f(Constant<6>{});
    case 7:
      return f(Constant<7>{});
    default:
      return f(Constant<8>{});
  }
}

}  // namespace CNX_ISA
}  // namespace cnx
