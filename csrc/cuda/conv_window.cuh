// 7x7 on strips of 4 x 8 pixels: packed patches whose side is a multiple of 8, and dense maps. A warp is a strip of 32
// words of channels: 10 rows of 14 words are read, widened once, and multiplied into 32 accumulators.
//
// The strip's window falls into nine segments: rows above, at and below the strip, by 3, 8 and 3 columns. On packed
// patches a segment lies inside one patch, visible or hidden as a whole, and a hidden one costs a branch. On dense maps
// strips are placed so that the columns of a segment are all inside or all outside, which narrow maps do not allow:
// there (kNarrow) every column is tested.
#pragma once

#include "conv_finish.cuh"

namespace cnx {
namespace cuda {

constexpr int kStripRows = 4, kStripCols = 8;

// Whether strips can be placed so that no segment straddles the left or right border.
inline bool narrow(int64_t width) {
  return width < 11 && width != 8;
}

// First column of strip t. Strips follow each other, but the last one ends at the border and the one before it leaves
// either none or all three columns on its right; so strips may overlap, and each owns what the one before does not
// reach.
__device__ __forceinline__ int strip_start(int t, int width) {
  if (width < kStripCols) return 0;
  const int rest = width - t * kStripCols;  // columns from the regular start on
  if (rest < kStripCols) return width - kStripCols;
  return rest == 9 || rest == 10 ? (width < 11 ? t * kStripCols : width - 11) : t * kStripCols;
}

// Adds columns [kFirst, kFirst + N) of the 14 of a window row to output row j, under the seven taps w of one tap row.
template <class T, int kFirst, int N>
__device__ __forceinline__ void add_columns(Floats<kWord<T>> (&sum)[32], int j, const Floats<kWord<T>> (&x)[N],
                                            const Floats<kWord<T>> (&w)[7]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int tap = 0; tap < 7; ++tap) {
      const int o = kFirst + k - tap;
      if (o >= 0 && o < kStripCols) add_product(sum[j * kStripCols + o], x[k], w[tap]);
    }
}

template <class T, int N>
__device__ __forceinline__ void read_columns(const char* row, unsigned stride, Floats<kWord<T>> (&x)[N]) {
  uint32_t word[N];
#pragma unroll
  for (int k = 0; k < N; ++k) word[k] = read_word(pixel_at(row, stride, k));
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = widen<T>(word[k]);
}

template <class T>
__device__ __forceinline__ void read_weights(const float* staged, int tap_row, Floats<kWord<T>> (&w)[7]) {
#pragma unroll
  for (int tap = 0; tap < 7; ++tap) w[tap] = weight_at<T>(staged, tap_row * 7 + tap);
}

// Rows [kFirst, kFirst + kCount) of the window, from three segments beside each other that begin at the lanes' offsets.
template <class T, int kFirst, int kCount>
__device__ __forceinline__ void add_segments(Floats<kWord<T>> (&sum)[32], const char* x, int64_t offset,
                                             unsigned visible, unsigned rows, int64_t pitch, unsigned stride,
                                             const float* staged) {
  constexpr int kSegment = kFirst == 0 ? 0 : kFirst == 3 ? 3 : 6;
  const bool has_left = visible >> kSegment & 1, has_centre = visible >> kSegment & 2,
             has_right = visible >> kSegment & 4;
  if (!(visible >> kSegment & 7)) return;
  const char* left = x + __shfl_sync(0xffffffffu, offset, kSegment);
  const char* centre = x + __shfl_sync(0xffffffffu, offset, kSegment + 1);
  const char* right = x + __shfl_sync(0xffffffffu, offset, kSegment + 2);
#pragma unroll
  for (int i = kFirst; i < kFirst + kCount; ++i) {
    if (rows >> i & 1) {
      Floats<kWord<T>> l[3], c[8], r[3], w[7];
      if (has_left) read_columns<T>(left, stride, l);
      if (has_centre) read_columns<T>(centre, stride, c);
      if (has_right) read_columns<T>(right, stride, r);
#pragma unroll
      for (int j = 0; j < kStripRows; ++j) {
        if (i - j < 0 || i - j >= 7) continue;
        read_weights<T>(staged, i - j, w);
        if (has_left) add_columns<T, 0>(sum, j, l, w);
        if (has_centre) add_columns<T, 3>(sum, j, c, w);
        if (has_right) add_columns<T, 11>(sum, j, r, w);
      }
    }
    left += pitch;
    centre += pitch;
    right += pitch;
  }
}

// Rows of the window one by one, columns from x0 - 3 on where bit k of `columns` is set.
template <class T>
__device__ __forceinline__ void add_rows(Floats<kWord<T>> (&sum)[32], const char* x, int64_t offset, unsigned rows,
                                         unsigned columns, int64_t pitch, unsigned stride, const float* staged) {
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    if (rows >> i & 1) {
      Floats<kWord<T>> in[14], w[7];
#pragma unroll
      for (int k = 0; k < 14; ++k) {
        uint32_t word = 0;  // is zero in every type
        if (columns >> k & 1) word = read_word(pixel_at(x + offset, stride, k));
        in[k] = widen<T>(word);
      }
#pragma unroll
      for (int j = 0; j < kStripRows; ++j) {
        if (i - j < 0 || i - j >= 7) continue;
        read_weights<T>(staged, i - j, w);
        add_columns<T, 0>(sum, j, in, w);
      }
    }
    offset += pitch;
  }
}

// Bits [from, to) of `count`, from and to clamped.
__device__ __forceinline__ unsigned bits_between(int from, int to, int count) {
  const int low = min(max(from, 0), count), high = min(max(to, 0), count);
  return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

template <class T, bool kNarrow, bool kNormalize>
__global__ void __launch_bounds__(kWord<T> == 2 ? kPairThreads : 256, kWord<T> == 2 ? 1 : 2)
    conv_window(ConvForward p, ConvPlan plan) {
  constexpr int V = kWord<T>;
  CNX_DYNAMIC_SHARED(shared);
  float* weights = reinterpret_cast<float*>(shared);
  float* scratch = weights + plan.blocks * 49 * kWeightPitch<T>;
  const ConvWarp<T> warp(p, plan);
  for (int b = 0; b < plan.blocks; ++b)
    stage_weights<T>(p, warp.first_channel + b * 32 * V, 49, weights + b * 49 * kWeightPitch<T>);
  __syncthreads();
  const float* staged = weights + warp.block * 49 * kWeightPitch<T> + warp.lane * V;

  const int height = static_cast<int>(p.geometry.height), width = static_cast<int>(p.geometry.width);
  const int32_t* neighbours = p.geometry.neighbours;
  const unsigned stride = static_cast<unsigned>(p.geometry.channels * sizeof(T));
  const int64_t pitch = int64_t{width} * stride;
  const int across = (width + kStripCols - 1) / kStripCols, down = (height + kStripRows - 1) / kStripRows;
  const char* x = reinterpret_cast<const char*>(static_cast<const T*>(p.x) + warp.channel);
  for (int base = warp.begin; base < warp.end; base += warp.groups) {
    const int strip = base + warp.group, map = strip / (across * down), place = strip - map * across * down;
    const bool unit = strip < warp.end;
    // strips run down a map first: two that share most of their window are neighbours in a CTA
    const int t = place / down, y0 = place % down * kStripRows, x0 = strip_start(t, width);
    // rows of the window inside the map; those of packed patches lie in one patch or another
    const unsigned rows = !unit ? 0 : neighbours ? 0x3ffu : bits_between(3 - y0, height + 3 - y0, 10);
    Floats<V> sum[32];
    const Floats<V> start = first_value<T>(p, warp);
#pragma unroll
    for (int o = 0; o < 32; ++o) sum[o] = start;

    if constexpr (kNarrow) {
      const int64_t corner = ((int64_t{map} * height + y0 - 3) * width + x0 - 3) * stride;
      add_rows<T>(sum, x, corner, rows, bits_between(3 - x0, width + 3 - x0, 14), pitch, stride, staged);
    } else {
      // lane l < 9 finds where segment l begins
      int64_t offset = 0;
      bool visible = unit && warp.lane < 9;
      if (visible) {
        const int dy = warp.lane / 3, dx = warp.lane % 3;
        const int yy = y0 + (dy == 0 ? -3 : dy == 1 ? 0 : kStripRows);
        const int xx = x0 + (dx == 0 ? -3 : dx == 1 ? 0 : kStripCols);
        int64_t first = int64_t{map} * height + yy, column = xx;
        if (neighbours) {
          const int py = yy < 0 ? -1 : yy >= height, px = xx < 0 ? -1 : xx >= width;
          const int64_t slot = neighbours[int64_t{map} * 9 + (py + 1) * 3 + px + 1];
          visible = slot >= 0;
          first = (slot - py) * height + yy;
          column -= px * width;
        } else {
          visible = xx >= 0 && xx < width;
        }
        offset = (first * width + column) * stride;
      }
      const unsigned mask = __ballot_sync(0xffffffffu, visible);
      add_segments<T, 0, 3>(sum, x, offset, mask, rows, pitch, stride, staged);
      add_segments<T, 3, 4>(sum, x, offset, mask, rows, pitch, stride, staged);
      add_segments<T, 7, 3>(sum, x, offset, mask, rows, pitch, stride, staged);
    }

    // pixels that exist and that the strip before does not own
    const int owned = t == 0 ? 0 : strip_start(t - 1, width) + kStripCols - x0;
    const unsigned columns = bits_between(owned, width - x0, kStripCols);
    unsigned pixels = 0;
#pragma unroll
    for (int r = 0; r < kStripRows; ++r)
      if (unit && y0 + r < height) pixels |= columns << (r * kStripCols);
    finish<T, kNormalize, kStripCols>(p, plan, warp, sum, pixels, (int64_t{map} * height + y0) * width + x0, width,
                                      scratch);
  }
}

}  // namespace cuda
}  // namespace cnx
