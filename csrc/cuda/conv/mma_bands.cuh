// 7x7 on tiles of 8 x 8 pixels with tensor cores, for bfloat16 and float16: what the kernel shares with its launcher,
// its shared memory, and the weights.
//
// For one channel, a row of the tile's window (14 pixels) times a banded matrix of seven taps gives the eight outputs
// that this tap row adds to. Rows of eight tiles make the 16 rows of a product: with tile q, row group t and window row
// i, row (q, t) of fragment i is window row 4 t + i of tile q, and output row 4 t + j takes fragment i times tap row
// i - j. So ten fragments serve 28 products, 512 outputs of a channel.
//
// A depth of 16 covers columns -4 to 11 of the tile, so pixels stay in the pairs they are stored in; column x weighs
// output o by tap x - o + 3. Columns -4 and 11 are zero.
//
// Hidden pixels are never read; zeros stand for them. Zeros of the band do multiply visible pixels, so where x or a
// weight is not finite, more outputs of its tile row become NaN than a direct sum would have.
//
// A channel is a plane of its own in shared memory: unit (h, q, r) of 16 bytes holds columns 8 h - 4 .. 8 h + 3 of
// window row r of tile q. The pitches are such that both the stores that fill it (words of two pixels) and ldmatrix
// touch every bank once.
#pragma once

#include "../common/packed.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {

constexpr int kMmaTiles = 8, kMmaChannels = 16, kMmaThreads = 128;
constexpr int kTilePitch = 15;                                         // units of a tile; 14 are used
constexpr int kHalfPitch = (kMmaTiles * kTilePitch + 2) * 16;          // bytes, from here on
constexpr int kPlane = kHalfPitch + kMmaTiles * kTilePitch * 16;       //
constexpr int kOctet = 8 * kPlane + 64;                                // eight channels
constexpr int kMmaWeights = 2 * kOctet, kChannelWeights = 4 * 8 * 16;  // see stage_bands
constexpr int kMmaStart = kMmaWeights + kMmaChannels * kChannelWeights;
constexpr int kMmaOrigins = kMmaStart + 2 * kMmaChannels * 4;
constexpr int kMmaShared = kMmaOrigins + kMmaTiles * 4;

struct MmaPlan {
  int tiles;         // of all maps
  int down, across;  // tiles of a map
  int columns;       // CTAs side by side: blocks of 16 channels
};

// First pixels of the tiles above, beside and below that are dx (-1, 0 or 1) tiles to the right of `tile`, or -1 where
// nothing is visible.
__device__ __forceinline__ void tile_origins(const ConvGeometry& g, const MmaPlan& plan, int tile, int dx,
                                             int (&origin)[3]) {
  const int32_t* neighbours = g.neighbours ? g.neighbours + dx + 1 : nullptr;
  if (tile >= plan.tiles) {
    origin[0] = origin[1] = origin[2] = -1;
  } else if (neighbours && plan.down == 1) {  // patches of side 8, which are tiles
    neighbours += int64_t{tile} * 9;
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) origin[dy] = neighbours[dy * 3];
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) origin[dy] = origin[dy] < 0 ? -1 : origin[dy] * 64;
  } else {
    const int map = tile / (plan.down * plan.across), place = tile - map * plan.down * plan.across;
    const int row = place / plan.across, x = place - row * plan.across + dx;
    const int px = x < 0 ? -1 : x >= plan.across;
    const int height = static_cast<int>(g.height), width = static_cast<int>(g.width);
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) {
      const int y = row + dy - 1, py = y < 0 ? -1 : y >= plan.down;
      int at = map;
      if (py != 0 || px != 0) at = neighbours ? neighbours[int64_t{map} * 9 + (py + 1) * 3 + px - dx] : -1;
      origin[dy] = at < 0 ? -1 : (at * height + (y - py * plan.down) * 8) * width + (x - px * plan.across) * 8;
    }
  }
}

// Of float16 the weights of a channel are scaled by a power of two that brings the largest to [1, 2): what the upper
// half of a weight leaves would else fall below the smallest float16. bfloat16 has the exponents of float.
__device__ __forceinline__ float power_below(float largest) {
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  // further down nothing that float16 could hold is left
  bits = static_cast<uint32_t>(min(max(exponent, -40), 100) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return power;
}

template <class T>
__device__ __forceinline__ uint32_t pair_word(T low, T high) {
  const T both[2] = {low, high};
  uint32_t word;
  __builtin_memcpy(&word, both, 4);
  return word;
}

// A weight is the sum of its rounding and the rounding of what is left of it.
template <class T>
__device__ __forceinline__ void split_pair(float a, float b, uint32_t& upper, uint32_t& lower) {
  const T high_a = from_acc<T>(a), high_b = from_acc<T>(b);
  const float left_a = a - to_acc(high_a), left_b = b - to_acc(high_b);
  upper = pair_word(high_a, high_b);
  // what is left of an infinite weight is not a number
  lower = pair_word(from_acc<T>(left_a == left_a ? left_a : 0.0f), from_acc<T>(left_b == left_b ? left_b : 0.0f));
}

// The banded matrix of a tap row: row k (column k - 4 of the tile), column o (output) is tap k - o - 1. A lane needs
// rows 2t, 2t + 1 and 8 further of column g, and only one of the two pairs lies in the band: taps i - 1 and i with
// i = (2t - g) mod 8. So all lanes need eight words of a tap row, (tap i - 1, tap i); they lie in shared memory as
// [channel][upper rows 0-3, upper rows 4-6, lower ...][i][tap row]. Thread (channel, i) writes its words.
template <class T>
__device__ __forceinline__ void stage_bands(const ConvForward& p, int first_channel, unsigned char* shared) {
  const int c = threadIdx.x / 8, i = threadIdx.x % 8;
  const bool exists = first_channel + c < p.geometry.channels;
  const float* weight = static_cast<const float*>(p.weight) + (exists ? int64_t{first_channel + c} * 49 : 0);
  float taps[7][2], largest = 0.0f;
#pragma unroll
  for (int row = 0; row < 7; ++row)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int tap = row * 7 + i - 1 + e;
      const bool inside = exists && i - 1 + e >= 0 && i - 1 + e < 7;
      taps[row][e] = inside ? weight[p.flip ? 48 - tap : tap] : 0.0f;
      largest = fmaxf(largest, fabsf(taps[row][e]));
    }
  float power = 1.0f, inverse = 1.0f;
  if constexpr (std::is_same<T, f16>::value) {
#pragma unroll
    for (int other = 1; other < 8; other *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    power = power_below(largest);
    inverse = 1.0f / power;
  }
  uint32_t words[4][4] = {};
#pragma unroll
  for (int row = 0; row < 7; ++row)
    split_pair<T>(taps[row][0] * inverse, taps[row][1] * inverse, words[row / 4][row % 4], words[2 + row / 4][row % 4]);
#pragma unroll
  for (int quad = 0; quad < 4; ++quad)
    *reinterpret_cast<uint4*>(shared + kMmaWeights + c * kChannelWeights + quad * 128 + i * 16) =
        make_uint4(words[quad][0], words[quad][1], words[quad][2], words[quad][3]);
  float* start = reinterpret_cast<float*>(shared + kMmaStart);
  if (i == 0) {
    start[c] = exists && p.bias ? static_cast<const float*>(p.bias)[first_channel + c] * inverse : 0.0f;
    start[kMmaChannels + c] = power;
  }
}

bool conv_mma_supports(const ConvForward& p);
void conv_mma_forward(const ConvForward& p, const Launch& launch);

}  // namespace cuda
}  // namespace cnx
