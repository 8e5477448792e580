// The kernel of mma_bands.cuh: fill the planes, multiply, store.
#pragma once

#include <algorithm>

#include "../common/mma.cuh"
#include "mma_bands.cuh"

namespace cnx {
namespace cuda {

struct Words4 {
  uint32_t v[4];
};

// The channels of a pixel that begin at `at` and of which there are `rest` (even), at most eight; else zero.
template <bool kAligned>
__device__ __forceinline__ Words4 read_octet(const char* at, int rest, bool wanted) {
  Words4 out = {};
  if constexpr (kAligned) {
    if (wanted) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
      out = {v.x, v.y, v.z, v.w};
    }
  } else {
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (wanted && 2 * m < rest) out.v[m] = __ldg(reinterpret_cast<const unsigned int*>(at) + m);
  }
  return out;
}

template <bool kAligned>
__device__ __forceinline__ void write_octet(char* at, int rest, const Words4& words) {
  if constexpr (kAligned) {
    store_words(reinterpret_cast<uint4*>(at), make_uint4(words.v[0], words.v[1], words.v[2], words.v[3]));
  } else {
#pragma unroll
    for (int m = 0; m < 4; ++m)
      if (2 * m < rest) reinterpret_cast<uint32_t*>(at)[m] = words.v[m];
  }
}

// Lower and upper halves of two words.
__device__ __forceinline__ uint32_t lower_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t upper_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// Where a thread fills: a pair of columns of every window row of one tile, eight channels.
struct FillPlace {
  int tile, dx, rest;
  bool first, second;  // pixels of the pair that are read at all
  int64_t offset;      // bytes from a tile's first pixel to the pair
  unsigned char* to;   // of window row 0 and the first channel
};

// Window rows [kFirst, kFirst + kCount), which are rows from kSource on of the tile at `origin`.
template <bool kAligned, int kFirst, int kCount, int kSource>
__device__ __forceinline__ void fill_rows(const char* x, int origin, const FillPlace& place, int64_t stride,
                                          int64_t pitch) {
  const bool visible = origin >= 0;
  const char* at = x + (visible ? origin * stride : 0) + place.offset + kSource * pitch;
  Words4 a[kCount], b[kCount];
#pragma unroll
  for (int r = 0; r < kCount; ++r, at += pitch) {
    a[r] = read_octet<kAligned>(at, place.rest, visible && place.first);
    b[r] = read_octet<kAligned>(at + stride, place.rest, visible && place.second);
  }
#pragma unroll
  for (int r = 0; r < kCount; ++r)
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint32_t low = a[r].v[c / 2], high = b[r].v[c / 2];
      *reinterpret_cast<uint32_t*>(place.to + c * kPlane + (kFirst + r) * 16) =
          c % 2 ? upper_halves(low, high) : lower_halves(low, high);
    }
}

// The tap rows of a channel as fragments of the banded matrix: words of the lane's place, one of a pair in the band.
template <int kParts>
struct Bands {
  uint32_t words[kParts][7];

  __device__ __forceinline__ void read(const unsigned char* staged) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4 a = *reinterpret_cast<const uint4*>(staged + part * 256);
      const uint4 b = *reinterpret_cast<const uint4*>(staged + part * 256 + 128);
      const uint32_t all[7] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z};
#pragma unroll
      for (int row = 0; row < 7; ++row) words[part][row] = all[row];
    }
  }
};

// All outputs of eight tiles of one channel; `rows` is the lane's row of fragment 0.
template <class T, int kParts>
__device__ __forceinline__ void multiply_channel(float (&sum)[4][4], const unsigned char* rows,
                                                 const Bands<kParts>& bands, bool first_pair) {
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    uint32_t a[4];
    load_matrices(a, rows + i * 16);
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i - j < 0 || i - j >= 7) continue;
        const uint32_t word = bands.words[part][i - j];
        const uint32_t b[2] = {first_pair ? word : 0, first_pair ? 0 : word};
        multiply_add<T>(sum[j], a, b);
      }
  }
}

// From the planes to y: a thread takes eight channels of a pair of pixels. Lane l of staged part (j, half) of a plane
// has what it had of the product: row group l / 4 % 2 of tile l / 8 + 4 half, so pixels 2 (l % 4) and the next of row
// 4 (l / 4 % 2) + j.
template <class T, bool kResidual, bool kAligned>
__device__ __forceinline__ void store_tiles(const ConvForward& p, const unsigned char* shared, const int* origins,
                                            int first_channel, int lane, int warp, int64_t stride, int64_t pitch) {
  using Stage = std::conditional_t<kResidual, float2, uint32_t>;
  const int octet = lane % 2, rest = static_cast<int>(p.geometry.channels) - first_channel - octet * 8;
  const int64_t channel_bytes = (first_channel + octet * 8) * static_cast<int64_t>(sizeof(T));
  const int t = lane / 2 % 4;
#pragma unroll
  for (int item = 0; item < 4; ++item) {
    const int place = warp * 4 + item, g = place % 2 * 4 + lane / 8, j = place / 4, half = place / 2 % 2;
    const int origin = origins[g / 2 + 4 * half];
    if (origin < 0 || rest <= 0) continue;
    const Stage* staged = reinterpret_cast<const Stage*>(shared + octet * kOctet) + (2 * j + half) * 32 + g * 4 + t;
    Stage v[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) v[c] = staged[c * (kPlane / static_cast<int>(sizeof(Stage)))];
    const int64_t at = origin * stride + (4 * (g % 2) + j) * pitch + 2 * t * stride + channel_bytes;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Words4 out;
      if constexpr (kResidual) {
        const Words4 words = read_octet<kAligned>(static_cast<const char*>(p.residual) + at + e * stride, rest, true);
        Packed<T, 8> residual = {make_uint4(words.v[0], words.v[1], words.v[2], words.v[3])};
        float sum[8];
        unpack(residual, sum);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] += e ? v[c].y : v[c].x;
        residual = pack_words<T, 8>(sum);
        out = {residual.words.x, residual.words.y, residual.words.z, residual.words.w};
      } else {
#pragma unroll
        for (int m = 0; m < 4; ++m)
          out.v[m] = e ? upper_halves(v[2 * m], v[2 * m + 1]) : lower_halves(v[2 * m], v[2 * m + 1]);
      }
      write_octet<kAligned>(static_cast<char*>(p.y) + at + e * stride, rest, out);
    }
  }
}

// kExact: weights as the sum of two T, else rounded to T.
template <class T, bool kExact, bool kResidual, bool kAligned>
__global__ void __launch_bounds__(kMmaThreads, kAligned ? 3 : 2) conv_mma(ConvForward p, MmaPlan plan) {
  constexpr int kParts = kExact ? 2 : 1;
  using Stage = std::conditional_t<kResidual, float2, uint32_t>;  // a residual is added before rounding
  CNX_DYNAMIC_SHARED(shared);
  const float* start = reinterpret_cast<const float*>(shared + kMmaStart);
  int* origins = reinterpret_cast<int*>(shared + kMmaOrigins);
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int parts = gridDim.x / plan.columns, column = blockIdx.x % plan.columns, part = blockIdx.x / plan.columns;
  const int channels = static_cast<int>(p.geometry.channels), first_channel = column * kMmaChannels;
  const int64_t stride = channels * static_cast<int64_t>(sizeof(T)), pitch = p.geometry.width * stride;

  // groups of eight tiles; the first `more` parts are one longer
  const int groups = (plan.tiles + kMmaTiles - 1) / kMmaTiles, each = groups / parts, more = groups - each * parts;
  const int begin = each * part + min(part, more), end = begin + each + (part < more);

  // lanes that fill together lie in 16 channels of 8 neighbouring pairs of pixels, of two tiles
  const int octet = lane % 2, pair = lane / 2 % 8, q = warp * 2 + lane / 16;
  FillPlace place;
  place.dx = pair < 2 ? -1 : pair < 6 ? 0 : 1;
  place.rest = channels - first_channel - octet * 8;
  place.first = pair != 0 && place.rest > 0;
  place.second = pair != 7 && place.rest > 0;
  place.offset = ((2 * pair + 4) % 8) * stride +
                 (first_channel + (place.rest > 0 ? octet * 8 : 0)) * static_cast<int64_t>(sizeof(T));
  place.to = shared + octet * kOctet + pair / 4 * kHalfPitch + q * (kTilePitch * 16) + pair % 4 * 4;
  const char* x = static_cast<const char*>(p.x);

  // row lane % 16 of a fragment is tile (lane % 16) / 2, row group lane % 2; lanes from 16 on have columns 4 to 11
  const int fragment_row = (lane / 16) * kHalfPitch + (lane % 16 / 2) * (kTilePitch * 16) + (lane % 2) * 64;
  const int g = lane / 4, t = lane % 4;
  const bool first_pair = 2 * t >= g;
  const unsigned char* bands_at = shared + kMmaWeights + ((2 * t - g) & 7) * 16;

  stage_bands<T>(p, first_channel, shared);
  int origin[3];
  tile_origins(p.geometry, plan, begin < end ? begin * kMmaTiles + q : plan.tiles, place.dx, origin);

  for (int group = begin; group < end; ++group) {
    fill_rows<kAligned, 3, 8, 0>(x, origin[1], place, stride, pitch);
    fill_rows<kAligned, 0, 3, 5>(x, origin[0], place, stride, pitch);
    fill_rows<kAligned, 11, 3, 0>(x, origin[2], place, stride, pitch);
    if (octet == 0 && pair == 2) origins[q] = origin[1];
    if (group + 1 < end) tile_origins(p.geometry, plan, (group + 1) * kMmaTiles + q, place.dx, origin);
    __syncthreads();

#pragma unroll 1
    for (int c = warp * 4; c < warp * 4 + 4; ++c) {
      if (first_channel + c >= channels) break;
      unsigned char* plane = shared + c / 8 * kOctet + c % 8 * kPlane;
      Bands<kParts> bands;
      bands.read(bands_at + c * kChannelWeights);
      float sum[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] = start[c];
      multiply_channel<T, kParts>(sum, plane + fragment_row, bands, first_pair);
      // the finished outputs take the place of the plane, a pair of pixels for each lane
      __syncwarp();
      const float power = std::is_same<T, f16>::value ? start[kMmaChannels + c] : 1.0f;
      Stage* staged = reinterpret_cast<Stage*>(plane) + lane;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = sum[j][2 * half] * power, b = sum[j][2 * half + 1] * power;
          if constexpr (kResidual) {
            staged[(2 * j + half) * 32] = make_float2(a, b);
          } else {
            const auto both = round_pair(a, b, Type<T>{});
            __builtin_memcpy(&staged[(2 * j + half) * 32], &both, 4);
          }
        }
    }
    __syncthreads();
    store_tiles<T, kResidual, kAligned>(p, shared, origins, first_channel, lane, warp, stride, pitch);
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace cnx
