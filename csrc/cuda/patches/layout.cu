// The index of visible patches, built without leaving the device: PatchLayout.from_kept and neighbour_slots in
// layout.py; and the assertions on index tables of a debug build.
#include <cassert>

#include "../common/launch.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWindow = 32 * kThreads;  // cells marked at once: a word of flags per thread

// Sum over the threads before this one, and over all.
__device__ __forceinline__ int exclusive_sum(int value, int* total) {
  __shared__ int warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += warps[i];
    *total += warps[i];
  }
  return before + sum - value;
}

// One block per image: mark the kept cells of a window, count them, number them.
__global__ void __launch_bounds__(kThreads) layout_from_kept_kernel(LayoutFromKept p) {
  __shared__ unsigned char flags[kWindow];
  __shared__ unsigned words[kThreads];
  __shared__ int ranks[kThreads];
  const int64_t image = blockIdx.x, cells = p.grid_h * p.grid_w, first_slot = image * p.kept;
  const int thread = threadIdx.x;
  if (thread == 0) {
    p.image_offsets[image] = static_cast<int32_t>(first_slot);
    if (image + 1 >= p.images) p.image_offsets[p.images] = static_cast<int32_t>(p.images * p.kept);
  }
  if (image >= p.images) return;  // no images: the offset alone

  int64_t found = 0;
  for (int64_t window = 0; window < cells; window += kWindow) {
    for (int i = thread; i < kWindow; i += kThreads) flags[i] = 0;
    __syncthreads();
    for (int64_t k = thread; k < p.kept; k += kThreads) {
      const int64_t id = p.ids[image * p.kept + k];
      if (id >= window && id < window + kWindow && id < cells) flags[id - window] = 1;
    }
    __syncthreads();
    for (int i = thread; i < kWindow; i += kThreads) {
      const unsigned word = __ballot_sync(0xffffffffu, flags[i]);
      if (thread % 32 == 0) words[i / 32] = word;
    }
    __syncthreads();
    int total;
    ranks[thread] = exclusive_sum(__popc(words[thread]), &total);
    __syncthreads();
    for (int i = thread; i < kWindow && window + i < cells; i += kThreads) {
      const unsigned word = words[i / 32], bit = 1u << (i % 32);
      const int64_t slot = first_slot + found + ranks[i / 32] + __popc(word & (bit - 1)),
                    cell = image * cells + window + i;
      p.slot_of_patch[cell] = word & bit ? static_cast<int32_t>(slot) : -1;
      if (word & bit) p.patch_of_slot[slot] = static_cast<int32_t>(cell);
    }
    found += total;
    __syncthreads();
  }
  // ids out of range or given twice leave slots over: any patch will do, as long as it exists
  for (int64_t k = found + thread; k < p.kept; k += kThreads)
    p.patch_of_slot[first_slot + k] = static_cast<int32_t>(image * cells);
}

__global__ void __launch_bounds__(kThreads) neighbour_slots_kernel(NeighbourSlots p) {
  const int across = 2 * p.radius + 1;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, slot = index / (across * across);
  if (slot >= p.slots) return;
  const int place = static_cast<int>(index - slot * across * across);
  const int64_t patch = p.patch_of_slot[slot], map_row = patch / p.grid_w, image = map_row / p.grid_h;
  const int64_t row = map_row - image * p.grid_h + place / across - p.radius;
  const int64_t column = patch - map_row * p.grid_w + place % across - p.radius;
  const bool inside = row >= 0 && row < p.grid_h && column >= 0 && column < p.grid_w;
  p.neighbours[index] = inside ? p.slot_of_patch[(image * p.grid_h + row) * p.grid_w + column] : -1;
}

// A failed assertion ends the kernel, and everything after it on the device, with an error.
__global__ void __launch_bounds__(kThreads) assert_indices_kernel(IndexTable p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < p.count) assert(p.low <= p.entries[i] && p.entries[i] <= p.high);
}

__global__ void __launch_bounds__(kThreads) assert_offsets_kernel(Segments s) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < s.count) assert(0 <= s.offsets[i] && s.offsets[i] <= s.offsets[i + 1]);
  if (i == s.count) assert(int64_t{s.offsets[i]} - s.offsets[0] == s.rows / s.rows_per_slot);
}

}  // namespace

int64_t layout_from_kept_workspace(const LayoutFromKept&) {
  return 0;
}
int64_t neighbour_slots_workspace(const NeighbourSlots&) {
  return 0;
}
int64_t assert_indices_workspace(const IndexTable&) {
  return 0;
}
int64_t assert_offsets_workspace(const Segments&) {
  return 0;
}

void layout_from_kept(const LayoutFromKept& p, const Launch& launch) {
  const unsigned blocks = p.images > 0 ? static_cast<unsigned>(p.images) : 1;
  CNX_LAUNCH((layout_from_kept_kernel), blocks, kThreads, 0, launch, p);
}

void neighbour_slots(const NeighbourSlots& p, const Launch& launch) {
  const int64_t total = p.slots * (2 * p.radius + 1) * (2 * p.radius + 1);
  if (total == 0) return;
  CNX_LAUNCH((neighbour_slots_kernel), static_cast<unsigned>(ceil_div(total, kThreads)), kThreads, 0, launch, p);
}

void assert_indices(const IndexTable& p, const Launch& launch) {
  if (p.count == 0) return;
  CNX_LAUNCH((assert_indices_kernel), static_cast<unsigned>(ceil_div(p.count, kThreads)), kThreads, 0, launch, p);
}

void assert_offsets(const Segments& s, const Launch& launch) {
  const auto blocks = static_cast<unsigned>(ceil_div(s.count + 1, kThreads));
  CNX_LAUNCH((assert_offsets_kernel), blocks, kThreads, 0, launch, s);
}

}  // namespace cuda
}  // namespace cnx
