// Weight gradient with 7x7 taps on 8x8 tiles: dense maps, and patches whose side is a multiple of 8.
//
// A warp holds all 49 taps of 32 words of channels in registers. Each of the 14 input rows around a tile is read once
// and meets the up to 7 gradient rows it touches, which wait in shared memory: there a row is seven times read at
// addresses known to the compiler, and as floats. An input row is three segments (3 left, 8, 3 right), each in another
// patch: what lies in hidden patches is skipped by branches the whole warp agrees on.
#include "grad_words.cuh"

namespace cnx {
namespace cuda {
namespace {

constexpr int kWindow = kTile + 2 * kRadius;
constexpr int kFill = 4;  // rows of a tile under way at once

// Patches of one tile, patches of several, dense maps.
enum class Maps { one_tile, patches, dense };

// Gradient pixels that are read from shared memory at once, 16 bytes.
template <int kPer>
constexpr int kPixels = 4 / kPer;
using Quad = Vec<float, 4>;

// Three segments of the input rows of one band (above, beside, below the tile): where its first row starts, or hidden.
template <class T>
struct Band {
  const T* start[3];
  bool visible[3];
};

// The tile of map `map` whose first pixel is (top, left); `x` is where that map starts for dense maps, else the first
// map.
template <class T, Maps kMaps>
__device__ __forceinline__ Band<T> find_band(const GradArguments<T>& p, const T* x, int64_t map, int top, int left,
                                             int band, bool active) {
  Band<T> result;
  constexpr bool kOne = kMaps == Maps::one_tile;
  const int height = kOne ? kTile : static_cast<int>(p.height), width = kOne ? kTile : static_cast<int>(p.width);
  int row = band == 0 ? top - kRadius : band == 1 ? top : top + kTile;
  const int down = kOne ? band - 1 : row < 0 ? -1 : row >= height ? 1 : 0;
  if (kMaps != Maps::dense) row -= down * height;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    int column = i == 0 ? left - kRadius : i == 1 ? left : left + kTile;
    const int right = column < 0 ? -1 : column >= width ? 1 : 0;
    if (kMaps == Maps::dense) {
      result.visible[i] = active && !down && !right;
      result.start[i] = advance(x, result.visible[i] ? row * width + column : 0, p.step);
    } else {
      column -= right * width;
      const int slot = p.neighbours[map * 9 + (down + 1) * 3 + right + 1];
      result.visible[i] = active && slot >= 0;
      result.start[i] = advance(advance(x, slot, height * width * p.step), row * width + column, p.step);
    }
  }
  return result;
}

// Multiplies the input columns [kFirst, kLast) of a window row with one gradient row.
template <int kFirst, int kLast, int kPer>
__device__ __forceinline__ void multiply(const float (&in)[kWindow][kPer], const Quad (&d)[kTile / kPixels<kPer>],
                                         float (*sums)[kPer]) {
#pragma unroll
  for (int column = kFirst; column < kLast; ++column)
#pragma unroll
    for (int x = 0; x < kTile; ++x) {
      const int kx = column - x;
      if (kx < 0 || kx >= kTap) continue;
      multiply_add(sums[kx], in[column], d[x / kPixels<kPer>].v + x % kPixels<kPer> * kPer);
    }
}

template <class T, Maps kMaps>
__global__ void __launch_bounds__(32 * kGradWarps, 2) conv_weight_grad_tile(GradArguments<T> p) {
  constexpr int kPer = kPerWord<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const LanePlace place(p.channels, kPer, blockIdx.x, lane);
  const int64_t split = blockIdx.y;
  const int64_t first = split * p.per_split, last = min(first + p.per_split, p.units);
  constexpr bool kDense = kMaps == Maps::dense, kOne = kMaps == Maps::one_tile;
  const int height = kOne ? kTile : static_cast<int>(p.height), width = kOne ? kTile : static_cast<int>(p.width);
  const unsigned tiles_x = (width + kTile - 1) / kTile, tiles = (height + kTile - 1) / kTile * tiles_x;
  const int64_t line = p.width * p.channels;
  const uint32_t step = p.step;
  const T* const x = p.x + place.channel;
  CNX_DYNAMIC_SHARED(shared);
  constexpr int kQuads = kTile / kPixels<kPer>;  // of a row
  Quad* const tile_values = reinterpret_cast<Quad*>(shared) + warp * kTile * kQuads * 32 + lane;
  float sums[kTaps + 1][kPer] = {};

#pragma unroll 1
  for (int64_t base = first + warp * place.groups; base < last; base += kGradWarps * place.groups) {
    const bool active = base + place.group < last;
    const int64_t tile = active ? base + place.group : base;
    // the number of 8x8 tiles fits 32 bits wherever the maps fit memory
    const unsigned map = static_cast<unsigned>(tile) / tiles, inside_map = static_cast<unsigned>(tile) % tiles;
    const int top = static_cast<int>(inside_map / tiles_x) * kTile,
              left = static_cast<int>(inside_map % tiles_x) * kTile;
    const int64_t map_start = map * (p.height * line);
    const T* const grad = advance(p.grad + map_start + place.channel, top * width + left, p.step);
    const T* const source = kDense ? x + map_start : x;
    // in a warp with several tiles each lane has its own bounds; rows are visited up to the largest
    const int rows = kDense ? min(height - top, kTile) : kTile;
    const int columns = kDense ? min(width - left, kWindow) : kWindow;

    if (!kDense && base + kGradWarps * place.groups < last) {  // the next tile, where it is a patch or most of one
      const int64_t pixels = p.height * p.width, next = (map + kGradWarps * place.groups / tiles) * pixels;
#pragma unroll
      for (int i = 0; i < kTile * kTile; i += 32) {
        prefetch(p.grad + (next + i + lane) * p.channels + place.first);
        prefetch(p.x + (next + i + lane) * p.channels + place.first);
      }
    }
    // the lane's own column of the tile: no other lane reads it, so there is nothing to wait for
#pragma unroll 1
    for (int y = 0; y < kTile; y += kFill) {
      uint32_t row[kFill][kTile];
#pragma unroll
      for (int j = 0; j < kFill; ++j)
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const bool inside = active && (!kDense || (y + j < rows && i < columns));
          row[j][i] = inside ? load_word(grad + (y + j) * line, i * step) : 0;
        }
#pragma unroll
      for (int i = 0; i < kFill * kQuads; ++i) {
        Quad quad;
#pragma unroll
        for (int j = 0; j < kPixels<kPer>; ++j) {
          float d[kPer];
          unpack_word(row[i / kQuads][i % kQuads * kPixels<kPer> + j], d, Type<T>{});
#pragma unroll
          for (int k = 0; k < kPer; ++k) {
            sums[kTaps][k] += d[k];
            quad.v[j * kPer + k] = d[k];
          }
        }
        tile_values[(y * kQuads + i) * 32] = quad;
      }
    }
#pragma unroll 1
    for (int band = 0; band < 3; ++band) {
      Band<T> at = find_band<T, kMaps>(p, source, map, top, left, band, active);
      const bool any_left = __any_sync(0xffffffffu, at.visible[0]);
      const bool any_centre = __any_sync(0xffffffffu, at.visible[1]);
      const bool any_right = __any_sync(0xffffffffu, at.visible[2]);
      if (!any_left && !any_centre && !any_right) continue;
      const int begin = band == 0 ? -kRadius : band == 1 ? 0 : kTile;
      const int end = band == 0 ? 0 : band == 1 ? kTile : kTile + kRadius;
      uint32_t next[kWindow];  // the input row after the one at work
      const auto load_input = [&](int input) {
        const bool inside = !kDense || top + input < height;
#pragma unroll
        for (int i = 0; i < kWindow; ++i) {
          const int segment = i < kRadius ? 0 : i < kRadius + kTile ? 1 : 2;
          const int column = segment == 0 ? i : segment == 1 ? i - kRadius : i - kRadius - kTile;
          const bool read = at.visible[segment] && inside && (!kDense || i - kRadius < columns);
          next[i] = read ? load_word(advance(at.start[segment], column, step)) : 0;
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) at.start[i] += line;
      };
      load_input(begin);
#pragma unroll 1
      for (int input = begin; input < end; ++input) {
        float in[kWindow][kPer];
#pragma unroll
        for (int i = 0; i < kWindow; ++i) unpack_word(next[i], in[i], Type<T>{});
        if (input + 1 < end) load_input(input + 1);
        Quad d[2][kQuads];  // gradient rows, one ahead; of rows that are not there, any
        const auto load_row = [&](int y, Quad(&row)[kQuads]) {
#pragma unroll
          for (int i = 0; i < kQuads; ++i) row[i] = tile_values[((y & (kTile - 1)) * kQuads + i) * 32];
        };
        load_row(input + kRadius, d[0]);
#pragma unroll
        for (int ky = 0; ky < kTap; ++ky) {
          const int y = input + kRadius - ky;
          if (ky + 1 < kTap) load_row(y - 1, d[(ky + 1) % 2]);
          if (y < 0 || y >= kTile) continue;
          if (any_left) multiply<0, kRadius>(in, d[ky % 2], sums + ky * kTap);
          if (any_centre) multiply<kRadius, kRadius + kTile>(in, d[ky % 2], sums + ky * kTap);
          if (any_right) multiply<kRadius + kTile, kWindow>(in, d[ky % 2], sums + ky * kTap);
        }
      }
    }
  }
  __syncthreads();
  store_partial<T>(sums, place, split, p.channels, p.partial);
}

}  // namespace

template <class T>
void weight_grad_tile(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  constexpr int tiles = kGradWarps * kTile * kTile * 32 * kPerWord<T> * static_cast<int>(sizeof(float));
  constexpr int shared = tiles > kPartialShared<T> ? tiles : kPartialShared<T>;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
  if (!p.neighbours) {
    allow_shared(conv_weight_grad_tile<T, Maps::dense>, shared);
    CNX_LAUNCH((conv_weight_grad_tile<T, Maps::dense>), grid, dim3(32 * kGradWarps), shared, launch, p);
  } else if (p.height == kTile) {
    allow_shared(conv_weight_grad_tile<T, Maps::one_tile>, shared);
    CNX_LAUNCH((conv_weight_grad_tile<T, Maps::one_tile>), grid, dim3(32 * kGradWarps), shared, launch, p);
  } else {
    allow_shared(conv_weight_grad_tile<T, Maps::patches>, shared);
    CNX_LAUNCH((conv_weight_grad_tile<T, Maps::patches>), grid, dim3(32 * kGradWarps), shared, launch, p);
  }
}

template void weight_grad_tile(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_tile(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_tile(const GradArguments<f16>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
