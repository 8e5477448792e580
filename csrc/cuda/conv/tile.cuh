// 7x7 on strips of 4 x 8 pixels: packed patches whose side is a multiple of 8, and dense maps. A warp is a strip of 32
// words of channels: 10 rows of 14 words are read, widened once, and multiplied into 32 accumulators.
//
// The strip's window falls into nine segments: rows above, at and below the strip, by 3, 8 and 3 columns. A segment is
// visible or hidden as a whole: on packed patches it lies inside one, on dense maps strips are placed so that none
// straddles a border, which narrow maps do not allow: there (kNarrow) every row and column is tested. A segment is
// straight code: its words are asked for together, and each tap is read once for all of its rows.
#pragma once

#include "epilogue.cuh"

namespace cnx {
namespace cuda {

constexpr int kStripRows = 4, kStripCols = 8;

// Whether strip_start cannot keep segments from straddling a border.
inline bool narrow(int64_t height, int64_t width) {
  return (height < 7 && height != 4) || height == 9 || (width < 11 && width != 8);
}

// First row (column) of strip t of kSize rows (columns). Strips follow each other, but the last one ends at the border
// and the one before it leaves either none or all three pixels of the next segment; so strips may overlap, and each
// owns what the one before does not reach.
template <int kSize>
__device__ __forceinline__ int strip_start(int t, int extent) {
  if (extent < kSize) return 0;
  const int rest = extent - t * kSize;  // from the regular start on
  if (rest < kSize) return extent - kSize;
  return rest > kSize && rest < kSize + 3 && extent >= kSize + 3 ? extent - kSize - 3 : t * kSize;
}

// Taps lie in shared memory by fours of words, [quad][lane]: one read is two taps of two channels, or four of one.
template <class T>
constexpr int kQuadTaps = 4 / kWord<T>;
template <class T>
constexpr int kQuads = (49 + kQuadTaps<T> - 1) / kQuadTaps<T>;
constexpr int kQuadPitch = 33 * 4;  // words of padding keep the stores below to few bank conflicts

// Weights [C, 49] of the 32 words of channels from c0, zero beyond C, turned for flip.
template <class T>
__device__ __forceinline__ void stage_quads(const ConvForward& p, int64_t c0, float* to) {
  constexpr int V = kWord<T>, kAll = 32 * V * 49;
  const float* from = static_cast<const float*>(p.weight) + c0 * 49;
  const int64_t rest = (p.geometry.channels - c0) * 49;
  for (int i = threadIdx.x; i < kAll; i += blockDim.x) {
    const int c = i / 49, at = i - c * 49, tap = p.flip ? 48 - at : at;
    to[tap / kQuadTaps<T> * kQuadPitch + c / V * 4 + tap % kQuadTaps<T> * V + c % V] = i < rest ? from[i] : 0.0f;
  }
}

struct alignas(16) Quad {
  float v[4];
};

// Volatile, or the compiler would keep the taps of one segment for the next, in registers it has not.
__device__ __forceinline__ Quad read_quad(const float* staged) {
#if defined(CNX_EMULATION)
  return *reinterpret_cast<const Quad*>(staged);
#else
  Quad q;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(q.v[0]), "=f"(q.v[1]), "=f"(q.v[2]), "=f"(q.v[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(staged))));
  return q;
#endif
}

// Taps [kFirst, kFirst + N) of the 49; staged: the lane's place in the first quad.
template <class T, int kFirst, int N>
__device__ __forceinline__ void read_taps(const float* staged, Floats<kWord<T>> (&w)[N]) {
  constexpr int V = kWord<T>, kPer = kQuadTaps<T>, kFrom = kFirst / kPer, kTo = (kFirst + N - 1) / kPer;
#pragma unroll
  for (int q = kFrom; q <= kTo; ++q) {
    const Quad quad = read_quad(staged + q * kQuadPitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tap = q * kPer + i / V - kFirst;
      if (tap >= 0 && tap < N) w[tap].v[i % V] = quad.v[i];
    }
  }
}

// Columns [kColumn, kColumn + N) of the 14 of a window row times one tap row, of which w is taps [kTap, kTap + kTaps),
// added to output row j.
template <class T, int kColumn, int N, int kTap, int kTaps>
__device__ __forceinline__ void add_columns(Floats<kWord<T>> (&sum)[32], int j, const Floats<kWord<T>> (&x)[N],
                                            const Floats<kWord<T>> (&w)[kTaps]) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int o = kColumn + k - kTap - tap;
      if (o >= 0 && o < kStripCols) add_product(sum[j * kStripCols + o], x[k], w[tap]);
    }
}

// The taps of row kTapRow and of those after it that meet a segment.
template <class T, int kRow, int kRows, int kColumn, int kColumns, int kTapRow>
__device__ __forceinline__ void add_tap_rows(Floats<kWord<T>> (&sum)[32], const Floats<kWord<T>> (&x)[kRows][kColumns],
                                             const float* staged) {
  if constexpr (kTapRow < 7 && kTapRow < kRow + kRows) {
    constexpr int kTap = kColumn < 8 ? 0 : kColumn - 7, kEnd = kColumn + kColumns < 7 ? kColumn + kColumns : 7;
    Floats<kWord<T>> w[kEnd - kTap];
    read_taps<T, kTapRow * 7 + kTap>(staged, w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int j = kRow + r - kTapRow;
      if (j >= 0 && j < kStripRows) add_columns<T, kColumn, kColumns, kTap>(sum, j, x[r], w);
    }
    add_tap_rows<T, kRow, kRows, kColumn, kColumns, kTapRow + 1>(sum, x, staged);
  }
}

// Where a unit's pixels are: the lane's words of a pixel, of the next one and of the next row.
struct Source {
  const char* from;
  unsigned step, pitch;
};

// Rows [kRow, kRow + kRows) and columns [kColumn, kColumn + kColumns) of the 10 x 14 window.
template <class T, int kRow, int kRows, int kColumn, int kColumns>
__device__ __forceinline__ void add_segment(Floats<kWord<T>> (&sum)[32], Source source, const float* staged) {
  uint32_t word[kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) word[r][k] = read_word(pixel_at(source.from, source.step, k));
    source.from += source.pitch;
  }
  Floats<kWord<T>> x[kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int k = 0; k < kColumns; ++k) x[r][k] = widen<T>(word[r][k]);
  add_tap_rows<T, kRow, kRows, kColumn, kColumns, (kRow < 4 ? 0 : kRow - 3)>(sum, x, staged);
}

// Rows of the window one by one, columns from x0 - 3 on where bit k of `columns` is set.
template <class T, int kRow = 0>
__device__ __forceinline__ void add_rows(Floats<kWord<T>> (&sum)[32], Source source, unsigned rows, unsigned columns,
                                         const float* staged) {
  if constexpr (kRow < 10) {
    const bool inside = rows >> kRow & 1;
    if (__any_sync(0xffffffffu, inside)) {
      Floats<kWord<T>> in[1][14];
#pragma unroll
      for (int k = 0; k < 14; ++k) {
        uint32_t word = 0;  // is zero in every type
        if (inside && (columns >> k & 1)) word = read_word(pixel_at(source.from, source.step, k));
        in[0][k] = widen<T>(word);
      }
      add_tap_rows<T, kRow, 1, 0, 14, (kRow < 4 ? 0 : kRow - 3)>(sum, in, staged);
    }
    source.from += source.pitch;
    add_rows<T, kRow + 1>(sum, source, rows, columns, staged);
  }
}

// Bits [from, to) of `count`, from and to clamped.
__device__ __forceinline__ unsigned bits_between(int from, int to, int count) {
  const int low = min(max(from, 0), count), high = min(max(to, 0), count);
  return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

template <class T, bool kNarrow, bool kNormalize>
__global__ void __launch_bounds__(kWord<T> == 2 ? kPairThreads : 256, kWord<T> == 2 ? 1 : 2)
    conv_tile(ConvForward p, ConvPlan plan) {
  constexpr int V = kWord<T>;
  CNX_DYNAMIC_SHARED(shared);
  float* weights = reinterpret_cast<float*>(shared);
  float* scratch = weights + plan.blocks() * kQuads<T> * kQuadPitch;
  const ConvWarp<T> warp(p, plan);
  for (int b = 0; b < plan.blocks(); ++b)
    stage_quads<T>(p, warp.first_channel + plan.before(b) * V, weights + b * kQuads<T> * kQuadPitch);
  __syncthreads();
  const float* staged = weights + warp.block * kQuads<T> * kQuadPitch + warp.word() * 4;

  const int height = static_cast<int>(p.geometry.height), width = static_cast<int>(p.geometry.width);
  const int32_t* neighbours = p.geometry.neighbours;
  const unsigned stride = static_cast<unsigned>(p.geometry.channels * sizeof(T));
  const unsigned pitch = width * stride;
  const char* x = reinterpret_cast<const char*>(static_cast<const T*>(p.x) + warp.channel);
  for (int base = warp.begin; base < warp.end; base += warp.step) {
    // where the last units are fewer than lanes for them, the others repeat one
    const bool unit = base + warp.unit < warp.end;
    if (!kNormalize && !__any_sync(0xffffffffu, unit)) break;  // LN of the others needs all warps
    const int strip = unit ? base + warp.unit : base;
    // strips run down a map first: two that share most of their window are neighbours in a CTA
    const int map = plan.strips(strip), place = strip - map * static_cast<int>(plan.strips.divisor);
    const int tx = plan.strips_down(place), ty = place - tx * static_cast<int>(plan.strips_down.divisor);
    const int x0 = strip_start<kStripCols>(tx, width), y0 = strip_start<kStripRows>(ty, height);
    const int first = (map * height + y0) * width + x0;  // pixels are fewer than 2^31
    Floats<V> sum[32];
    const Floats<V> start = first_value<T>(p, warp);
#pragma unroll
    for (int o = 0; o < 32; ++o) sum[o] = start;

    if constexpr (kNarrow) {
      const Source corner{x + (int64_t{first} - 3 * width - 3) * stride, stride, pitch};
      add_rows<T>(sum, corner, bits_between(3 - y0, height + 3 - y0, 10), bits_between(3 - x0, width + 3 - x0, 14),
                  staged);
    } else {
      // the unit's first eight lanes find where the segments around the strip begin
      const int around = warp.lane & 7, at = around + (around >= 4), dy = at / 3, dx = at % 3;
      const int yy = y0 + (dy == 0 ? -3 : dy == 1 ? 0 : kStripRows);
      const int xx = x0 + (dx == 0 ? -3 : dx == 1 ? 0 : kStripCols);
      const int py = yy < 0 ? -1 : yy >= height, px = xx < 0 ? -1 : xx >= width;
      int other = py || px ? -1 : map;
      if (neighbours) other = neighbours[int64_t{map} * 9 + (py + 1) * 3 + px + 1];
      const int pixel = other < 0 ? -1 : ((other - py) * height + yy) * width + xx - px * width;
      const unsigned visible = warp.any(__ballot_sync(0xffffffffu, other >= 0));
      const auto segment = [&](int index) {
        const int begin = warp.of_unit(pixel, index);
        const unsigned step = begin < 0 ? 0 : stride;
        const char* from = begin < 0 ? reinterpret_cast<const char*>(&kZeros) : x;
        return Source{pixel_at(from, step, begin), step, width * step};
      };
      // the strip itself is always visible
      add_segment<T, 3, 4, 3, 8>(sum, {pixel_at(x, stride, first), stride, pitch}, staged);
      if (visible & 1) add_segment<T, 0, 3, 0, 3>(sum, segment(0), staged);
      if (visible & 2) add_segment<T, 0, 3, 3, 8>(sum, segment(1), staged);
      if (visible & 4) add_segment<T, 0, 3, 11, 3>(sum, segment(2), staged);
      if (visible & 8) add_segment<T, 3, 4, 0, 3>(sum, segment(3), staged);
      if (visible & 16) add_segment<T, 3, 4, 11, 3>(sum, segment(4), staged);
      if (visible & 32) add_segment<T, 7, 3, 0, 3>(sum, segment(5), staged);
      if (visible & 64) add_segment<T, 7, 3, 3, 8>(sum, segment(6), staged);
      if (visible & 128) add_segment<T, 7, 3, 11, 3>(sum, segment(7), staged);
    }
    // pixels that exist and that the strip before does not own
    const int owned_x = tx == 0 ? 0 : strip_start<kStripCols>(tx - 1, width) + kStripCols - x0;
    const int owned_y = ty == 0 ? 0 : strip_start<kStripRows>(ty - 1, height) + kStripRows - y0;
    const unsigned columns = bits_between(owned_x, width - x0, kStripCols);
    unsigned pixels = 0;
#pragma unroll
    for (int r = 0; r < kStripRows; ++r)
      if (unit && r >= owned_y && y0 + r < height) pixels |= columns << (r * kStripCols);
    finish<T, kNormalize, kStripCols>(p, plan, warp, sum, pixels, first, width, scratch);
  }
}

}  // namespace cuda
}  // namespace cnx
