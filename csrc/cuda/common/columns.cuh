// Walking down the columns of rows [rows, channels] in segments: the frame of every kernel with a parameter or a sum
// per column.
//
// A block of 256 threads is laid over `lanes` rows of `tile` vectors, so that a narrow width still fills warps and
// neighbouring threads touch neighbouring memory; a thread stays in its columns and steps down the rows of its split
// of one segment. Scale factors and sums live in registers and each row is touched once. Splits depend on the rows per
// segment and the width only, neither on the number of segments nor on the device: sums of equal segments are the same
// bits for any chunk of them.
#pragma once

#include "cnx/cuda.h"
#include "packed.cuh"
#include "reduce.cuh"

namespace cnx {
namespace cuda {

constexpr int kColumnThreads = 256;

struct ColumnTile {
  int tile, lanes;
  int64_t tiles;
};

// The tile of 32 to 64 vectors (512 bytes or more of a row) that leaves the fewest threads idle.
inline ColumnTile column_tile(int64_t vectors) {
  ColumnTile best{0, 0, 1};
  const int64_t from = vectors < 32 ? vectors : 32, to = vectors < 64 ? vectors : 64;
  for (int64_t tile = from; tile <= to; ++tile) {
    const ColumnTile next{static_cast<int>(tile), static_cast<int>(kColumnThreads / tile), ceil_div(vectors, tile)};
    if (next.lanes * best.tiles > best.lanes * next.tiles) best = next;
  }
  return best;
}

template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

inline int64_t mean_rows(const Segments& segments) {
  return segments.count ? ceil_div(segments.rows, segments.count) : 0;
}

// Parts of about `each` rows that a segment is cut into.
inline int64_t split_count(const Segments& segments, int64_t each) {
  const int64_t rows = mean_rows(segments), splits = rows ? ceil_div(rows, each) : 1;
  if (!segments.offsets) return splits;
  int64_t power = 1;  // ragged segments are cut on the device, by a shift
  while (power < splits) power *= 2;
  return power;
}

// Parts of a segment, each the work of one block per tile: 8 to 32 rows per thread.
template <class T>
int64_t column_splits(const Segments& segments, int64_t channels) {
  const int lanes = column_tile(channels % kWide<T> ? channels : channels / kWide<T>).lanes;
  const int64_t rows = mean_rows(segments);
  return split_count(segments, lanes * (rows > 4096 * int64_t{lanes} ? 32 : rows > 128 * int64_t{lanes} ? 16 : 8));
}

struct ColumnGrid {
  Segments segments;
  int64_t channels, segment_rows, split_rows;  // rows of the equal segments and their splits
  unsigned splits, tiles;
  int split_shift, tile, lanes;

  unsigned blocks() const { return static_cast<unsigned>(segments.count) * splits * tiles; }
};

inline ColumnGrid split_grid(const Segments& segments, int64_t channels, int64_t splits, const ColumnTile& shape) {
  const int64_t rows = segments.count ? segments.rows / segments.count : 0;
  int shift = 0;
  while (int64_t{1} << shift < splits) ++shift;
  return {segments,
          channels,
          rows,
          ceil_div(rows, splits),
          static_cast<unsigned>(splits),
          static_cast<unsigned>(shape.tiles),
          shift,
          shape.tile,
          shape.lanes};
}

template <class T>
ColumnGrid column_grid(const Segments& segments, int64_t channels, int vector) {
  return split_grid(segments, channels, column_splits<T>(segments, channels), column_tile(channels / vector));
}

// Whether 16 bytes' worth of features, and of parameters, can be read at a time.
template <class T>
bool wide_columns(int64_t channels, std::initializer_list<const void*> features,
                  std::initializer_list<const void*> parameters) {
  bool wide = vector_width<T>(channels, features) == kWide<T>;
  for (const void* p : parameters) wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return wide;
}

template <int N>
struct Width {
  static constexpr int value = N;
};

// f(Width<N>{}) with N elements per access: 16 bytes' worth, or 1.
template <class T, class F>
void with_width(bool wide, const F& f) {
  wide ? f(Width<kWide<T>>{}) : f(Width<1>{});
}

// What one thread walks: rows first, first + lanes, ... of `rows` rows from row `begin`, at its column.
struct ColumnSpan {
  int64_t segment, begin, column;
  int rows, lane;
  unsigned part;  // segment * splits + split
  bool active;
};

template <int N>
__device__ __forceinline__ ColumnSpan column_span(const ColumnGrid& grid) {
  ColumnSpan span;
  const unsigned tile = blockIdx.x % grid.tiles;
  span.part = blockIdx.x / grid.tiles;
  const unsigned segment = span.part / grid.splits, split = span.part % grid.splits;
  span.segment = segment;
  int64_t first, rows = grid.segment_rows, each = grid.split_rows;
  if (grid.segments.offsets) {
    first = grid.segments.begin(segment);
    rows = grid.segments.begin(segment + 1) - first;
    each = (rows + grid.splits - 1) >> grid.split_shift;
  } else {
    first = rows * segment;
  }
  const int64_t skipped = each * split;
  span.begin = first + skipped;
  span.rows = static_cast<int>(skipped >= rows ? 0 : rows - skipped < each ? rows - skipped : each);
  span.lane = static_cast<int>(threadIdx.x) / grid.tile;
  span.column = (int64_t{tile} * grid.tile + static_cast<int>(threadIdx.x) % grid.tile) * N;
  span.active = span.lane < grid.lanes && span.column < grid.channels;
  return span;
}

// f(offset, values) for each vector of the span; values[k] comes from inputs[k]. kUnroll rows are loaded ahead.
template <int N, int kUnroll, class T, int K, class F>
__device__ __forceinline__ void walk(const ColumnGrid& grid, const ColumnSpan& span, const T* const (&inputs)[K],
                                     const F& f) {
  if (!span.active) return;
  const int lanes = grid.lanes;
  const int64_t step = lanes * grid.channels;
  int64_t at = (span.begin + span.lane) * grid.channels + span.column;
  for (int row = span.lane; row < span.rows; row += kUnroll * lanes, at += kUnroll * step) {
    Packed<T, N> loaded[kUnroll][K];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * lanes < span.rows) {
#pragma unroll
        for (int k = 0; k < K; ++k) loaded[u][k] = load_packed<N>(inputs[k] + at + u * step);
      }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (row + u * lanes < span.rows) {
        Acc<T> values[K][N];
#pragma unroll
        for (int k = 0; k < K; ++k) unpack(loaded[u][k], values[k]);
        f(at + u * step, values);
      }
  }
}

// Adds the threads' sums over the lanes of a block and writes them to out [channels]; all threads must call.
// shared: kColumnThreads * N values.
template <int N, class A>
__device__ __forceinline__ void add_lanes(const ColumnGrid& grid, const A (&sums)[N], A* shared, A* out) {
  __syncthreads();  // an earlier sum may still be read
#pragma unroll
  for (int i = 0; i < N; ++i) shared[threadIdx.x * N + i] = sums[i];
  __syncthreads();
  const int width = grid.tile * N;
  const int64_t start = int64_t{blockIdx.x % grid.tiles} * width;
  for (int c = threadIdx.x; c < width && start + c < grid.channels; c += kColumnThreads) {
    A total = 0;
    for (int lane = 0; lane < grid.lanes; ++lane) total += shared[lane * width + c];
    out[start + c] = total;
  }
}

// Sums [count, splits, columns] that blocks leave for a finishing kernel. Past `kFew` splits they are first added by a
// launch of their own, for a finisher is one block per segment.
template <class A>
struct Partials {
  static constexpr int64_t kFew = 32;
  int64_t count, splits, columns;
  A* values;
  A* merged;

  Partials(Workspace& space, int64_t count, int64_t splits, int64_t columns)
      : count(count),
        splits(splits),
        columns(columns),
        values(space.take<A>(count * splits * columns)),
        merged(splits > kFew ? space.take<A>(count * columns) : nullptr) {}

  int64_t finished_splits() const { return merged ? 1 : splits; }
  const A* finished(const Launch& launch) const {
    if (!merged) return values;
    sum_partials<A>(values, count, splits, columns, columns, merged, nullptr, launch);
    return merged;
  }
};

}  // namespace cuda
}  // namespace cnx
