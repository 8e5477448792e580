// Sums in a fixed order: over lanes, over a block, and over the partial sums that blocks left behind.
#pragma once

#include "cnx/cuda.h"
#include "types.cuh"

namespace cnx {
namespace cuda {

// Every lane of an aligned group of `lanes` (a power of two) receives the group's sum. All 32 lanes must call.
template <class A>
__device__ __forceinline__ A group_sum(A value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Every thread receives the block's sum; shared: 32 values.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
  value = group_sum(value, 32);
  __syncthreads();  // the values of an earlier sum may still be in use
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  A total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += shared[w];
  return total;
}

// Cuts a workspace into arrays; with a null base it only counts bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class A>
  A* take(int64_t count) {
    const uintptr_t at = base_ + static_cast<uintptr_t>(bytes_);
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(A)), 256) * 256;
    return reinterpret_cast<A*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

constexpr int kPartialColumns = 32, kPartialLanes = 16;

// Group g of `count` of the `total` rows [total, columns], the last one perhaps smaller: its column sums go to first[g,
// width], and columns past `width` to second.
template <class A>
__global__ void __launch_bounds__(kPartialColumns* kPartialLanes)
    sum_partials_kernel(const A* partial, int64_t count, int64_t total, int64_t columns, int64_t width, A* first,
                        A* second) {
  __shared__ A shared[kPartialLanes][kPartialColumns + 1];
  const int x = threadIdx.x % kPartialColumns, y = threadIdx.x / kPartialColumns;
  const unsigned tiles = static_cast<unsigned>((columns + kPartialColumns - 1) / kPartialColumns);
  const int64_t group = blockIdx.x / tiles, c = int64_t{blockIdx.x % tiles} * kPartialColumns + x;
  const int64_t rest = total - group * count, rows = rest < count ? rest : count;
  A sum = 0;
  if (c < columns) {
    const A* at = partial + (group * count + y) * columns + c;
#pragma unroll 8
    for (int64_t i = y; i < rows; i += kPartialLanes, at += kPartialLanes * columns) sum += *at;
  }
  shared[y][x] = sum;
  __syncthreads();
  if (y > 0 || c >= columns) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kPartialLanes; ++i) sum += shared[i][x];
  if (c < width) {
    if (first) first[group * width + c] = sum;
  } else if (second) {
    second[group * (columns - width) + c - width] = sum;
  }
}

template <class A>
void sum_partials(const A* partial, int64_t groups, int64_t count, int64_t columns, int64_t width, A* first, A* second,
                  const Launch& launch) {
  const int64_t blocks = groups * ceil_div(columns, kPartialColumns);
  if (blocks > 0)
    CNX_LAUNCH((sum_partials_kernel<A>), static_cast<unsigned>(blocks), kPartialColumns * kPartialLanes, 0, launch,
               partial, count, groups * count, columns, width, first, second);
}

// One sum over very many rows would be the work of a few blocks: groups of rows first, then the groups.
struct SumTree {
  static constexpr int64_t kGroups = 64;
  int64_t rows, each, groups;

  explicit SumTree(int64_t rows) : rows(rows), each(ceil_div(rows, kGroups)), groups(rows ? ceil_div(rows, each) : 0) {}
  // rows of workspace besides the partial sums themselves
  int64_t spare() const { return rows > 4 * kGroups ? groups : 0; }

  template <class A>
  void run(const A* partial, int64_t columns, A* out, A* merged, const Launch& launch) const {
    if (spare() == 0) return sum_partials<A>(partial, 1, rows, columns, columns, out, nullptr, launch);
    const int64_t blocks = groups * ceil_div(columns, kPartialColumns);
    CNX_LAUNCH((sum_partials_kernel<A>), static_cast<unsigned>(blocks), kPartialColumns * kPartialLanes, 0, launch,
               partial, each, rows, columns, columns, merged, static_cast<A*>(nullptr));
    sum_partials<A>(merged, 1, groups, columns, columns, out, nullptr, launch);
  }
};

}  // namespace cuda
}  // namespace cnx
