// Gather and scatter of patches, and the stem's pixel rows. A thread moves single accesses of 16 bytes, or of as many
// as alignment allows, in the order of the packed side: neighbouring threads touch neighbouring bytes of whole runs.
#include <cstdint>

#include "../common/types.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {
namespace {

constexpr int kThreads = 256, kEach = 4, kChunk = kThreads * kEach;

// An index split by an extent; 64 bits once per thread, then 32 bits for the accesses after it.
struct Place {
  int64_t outer;
  uint32_t inner;

  __device__ __forceinline__ Place(int64_t index, uint32_t extent)
      : outer(index / extent), inner(static_cast<uint32_t>(index % extent)) {}
  __device__ __forceinline__ void advance(uint32_t step, uint32_t extent) {
    inner += step;
    if (inner >= extent) {
      outer += inner / extent;
      inner %= extent;
    }
  }
};

struct CopyShape {
  int64_t total;        // accesses in all
  uint32_t patch, run;  // accesses per patch, per line of a patch
  uint32_t pixel;       // accesses per pixel
  int64_t grid_h, grid_w;
  int side;

  // Access number in the dense map.
  __device__ __forceinline__ int64_t dense(int64_t index, uint32_t inner) const {
    const int64_t map_row = index / grid_w, column = index - map_row * grid_w;  // images are stacked rows of patches
    const uint32_t y = inner / run, x = inner - y * run;
    return ((map_row * side + y) * grid_w + column) * run + x;
  }
};

template <class V>
__global__ void __launch_bounds__(kThreads)
    gather_patches_kernel(CopyShape s, const int32_t* patch_of_slot, const V* source, V* target) {
  const int64_t begin = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (begin >= s.total) return;
  Place at(begin, s.patch);
  V values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (begin + i * kThreads < s.total) values[i] = source[s.dense(patch_of_slot[at.outer], at.inner)];
    at.advance(kThreads, s.patch);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (begin + i * kThreads < s.total) target[begin + i * kThreads] = values[i];
}

// The reverse of the above: hidden sites stay as they are.
template <class V>
__global__ void __launch_bounds__(kThreads)
    put_patches_kernel(CopyShape s, const int32_t* patch_of_slot, const V* source, V* target) {
  const int64_t begin = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (begin >= s.total) return;
  Place at(begin, s.patch);
  V values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (begin + i * kThreads < s.total) values[i] = source[begin + i * kThreads];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (begin + i * kThreads < s.total) target[s.dense(patch_of_slot[at.outer], at.inner)] = values[i];
    at.advance(kThreads, s.patch);
  }
}

template <class V>
__global__ void __launch_bounds__(kThreads)
    scatter_patches_kernel(CopyShape s, const int32_t* slot_of_patch, const V* source, const V* fill, V* target) {
  const int64_t begin = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (begin >= s.total) return;
  Place at(begin, s.patch);
  const Place start = at;
  V values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (begin + i * kThreads < s.total) {
      const int64_t slot = slot_of_patch[at.outer];
      if (slot >= 0)
        values[i] = source[slot * s.patch + at.inner];
      else if (fill)
        values[i] = fill[at.inner % s.pixel];
      else
        values[i] = V{};
    }
    at.advance(kThreads, s.patch);
  }
  at = start;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (begin + i * kThreads < s.total) target[s.dense(at.outer, at.inner)] = values[i];
    at.advance(kThreads, s.patch);
  }
}

struct PixelShape {
  int64_t total;
  uint32_t pixel;      // accesses per pixel of 4x4: channels * 4 runs
  uint32_t run;        // accesses per run of 4 image pixels
  int64_t image_line;  // accesses per image row
  int64_t channels, height, grid_h, grid_w;
  int side;
};

// In the order of the rows written, lines of a pixel first: what a warp leaves of the image lines it touches, the next
// one finds in L1.
template <class V>
__global__ void __launch_bounds__(kThreads)
    patch_pixels_kernel(PixelShape s, const int32_t* patch_of_slot, const V* images, V* rows) {
  const int64_t begin = int64_t{blockIdx.x} * kChunk + threadIdx.x;
  if (begin >= s.total) return;
  Place at(begin, s.pixel);
  const uint32_t per_patch = static_cast<uint32_t>(s.side) * s.side;
  V values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (begin + i * kThreads < s.total) {
      const int64_t slot = at.outer / per_patch;
      const uint32_t pixel = static_cast<uint32_t>(at.outer - slot * per_patch), y = pixel / s.side, x = pixel % s.side;
      const int64_t patch = patch_of_slot ? patch_of_slot[slot] : slot;
      const int64_t map_row = patch / s.grid_w, column = patch - map_row * s.grid_w;
      const int64_t image = map_row / s.grid_h, row = map_row - image * s.grid_h;
      const uint32_t line = at.inner / s.run, part = at.inner - line * s.run, c = line / 4, dy = line % 4;
      const int64_t image_row = (image * s.channels + c) * s.height + (row * s.side + y) * 4 + dy;
      values[i] = images[image_row * s.image_line + (column * s.side + x) * s.run + part];
    }
    at.advance(kThreads, s.pixel);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (begin + i * kThreads < s.total) rows[begin + i * kThreads] = values[i];
}

// The widest access that divides `bytes` and the addresses.
int access_bytes(int64_t bytes, std::initializer_list<const void*> pointers) {
  int width = 16;
  const auto fits = [&] {
    bool all = bytes % width == 0;
    for (const void* p : pointers) all = all && reinterpret_cast<uintptr_t>(p) % width == 0;
    return all;
  };
  while (width > 1 && !fits()) width /= 2;
  return width;
}

// Calls f with an unsigned type of that many bytes.
template <class F>
void with_access(int bytes, const F& f) {
  switch (bytes) {
    case 16:
      return f(Type<uint4>{});
    case 8:
      return f(Type<uint2>{});
    case 4:
      return f(Type<uint32_t>{});
    case 2:
      return f(Type<uint16_t>{});
    default:
      return f(Type<uint8_t>{});
  }
}

CopyShape copy_shape(const PatchCopy& p, int64_t patches, int access) {
  CopyShape s{};
  s.pixel = static_cast<uint32_t>(p.pixel_bytes / access);
  s.run = static_cast<uint32_t>(p.side * p.pixel_bytes / access);
  s.patch = static_cast<uint32_t>(p.side * p.side * p.pixel_bytes / access);
  s.total = patches * s.patch;
  s.grid_h = p.grid_h;
  s.grid_w = p.grid_w;
  s.side = static_cast<int>(p.side);
  return s;
}

unsigned chunks(int64_t total) {
  return static_cast<unsigned>(ceil_div(total, kChunk));
}

}  // namespace

int64_t gather_patches_workspace(const PatchCopy&) {
  return 0;
}
int64_t scatter_patches_workspace(const PatchCopy&) {
  return 0;
}
int64_t put_patches_workspace(const PatchCopy&) {
  return 0;
}
int64_t patch_pixels_workspace(const PatchPixels&) {
  return 0;
}

void gather_patches(const PatchCopy& p, const Launch& launch) {
  const int access = access_bytes(p.side * p.pixel_bytes, {p.source, p.target});
  with_access(access, [&](auto type) {
    using V = typename decltype(type)::type;
    const CopyShape s = copy_shape(p, p.slots, access);
    if (s.total == 0) return;
    CNX_LAUNCH((gather_patches_kernel<V>), chunks(s.total), kThreads, 0, launch, s, p.patch_of_slot,
               static_cast<const V*>(p.source), static_cast<V*>(p.target));
  });
}

void put_patches(const PatchCopy& p, const Launch& launch) {
  const int access = access_bytes(p.side * p.pixel_bytes, {p.source, p.target});
  with_access(access, [&](auto type) {
    using V = typename decltype(type)::type;
    const CopyShape s = copy_shape(p, p.slots, access);
    if (s.total == 0) return;
    CNX_LAUNCH((put_patches_kernel<V>), chunks(s.total), kThreads, 0, launch, s, p.patch_of_slot,
               static_cast<const V*>(p.source), static_cast<V*>(p.target));
  });
}

void scatter_patches(const PatchCopy& p, const Launch& launch) {
  // a null fill is aligned to everything; a fill must be cut at pixels
  const int access = access_bytes(p.fill ? p.pixel_bytes : p.side * p.pixel_bytes, {p.source, p.fill, p.target});
  with_access(access, [&](auto type) {
    using V = typename decltype(type)::type;
    const CopyShape s = copy_shape(p, p.images * p.grid_h * p.grid_w, access);
    if (s.total == 0) return;
    CNX_LAUNCH((scatter_patches_kernel<V>), chunks(s.total), kThreads, 0, launch, s, p.slot_of_patch,
               static_cast<const V*>(p.source), static_cast<const V*>(p.fill), static_cast<V*>(p.target));
  });
}

void patch_pixels(const PatchPixels& p, const Launch& launch) {
  const int64_t run = 4 * p.element_bytes;
  const int access = access_bytes(run, {p.images, p.rows});
  with_access(access, [&](auto type) {
    using V = typename decltype(type)::type;
    PixelShape s{};
    s.run = static_cast<uint32_t>(run / access);
    s.pixel = static_cast<uint32_t>(p.channels * 4 * s.run);
    s.image_line = p.width * p.element_bytes / access;
    s.channels = p.channels;
    s.height = p.height;
    s.grid_h = p.grid_h;
    s.grid_w = p.grid_w;
    s.side = static_cast<int>(p.side);
    s.total = p.slots * p.side * p.side * s.pixel;
    if (s.total == 0) return;
    CNX_LAUNCH((patch_pixels_kernel<V>), chunks(s.total), kThreads, 0, launch, s, p.patch_of_slot,
               static_cast<const V*>(p.images), static_cast<V*>(p.rows));
  });
}

}  // namespace cuda
}  // namespace cnx
