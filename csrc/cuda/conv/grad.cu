// Weight gradient of the depthwise convolution: the choice of a kernel and of the cut, and stage 2, the sum of
// partials.
#include <algorithm>
#include <type_traits>

#include "grad_plan.h"

namespace cnx {
namespace cuda {
namespace {

constexpr int kSumRows = 16;

// A block sums one tap of 32 channels: each warp every 16th split, then the warps in order.
template <class A>
__global__ void __launch_bounds__(32 * kSumRows)
    conv_weight_grad_sum(const A* partial, int64_t splits, int taps, int64_t channels, A* dweight, A* dbias) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tap = blockIdx.y;
  const int64_t channel = int64_t{blockIdx.x} * 32 + lane;
  __shared__ A scratch[kSumRows][32];
  A sum = 0;
  if (channel < channels) {
    const A* source = partial + tap * channels + channel;
#pragma unroll 8
    for (int64_t split = warp; split < splits; split += kSumRows) sum += source[split * (taps + 1) * channels];
  }
  scratch[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  sum = 0;
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) sum += scratch[i][lane];
  if (tap < taps)
    dweight[channel * taps + tap] = sum;
  else
    dbias[channel] = sum;
}

// About two waves of blocks on a large device. A constant: sums must not depend on the device at hand.
constexpr int64_t kBlocks = 528, kMaxSplits = 264;

template <class T>
GradPlan make_plan(const ConvGeometry& g, bool aligned) {
  GradPlan plan{};
  const int64_t taps = int64_t{g.kernel_size} * g.kernel_size;
  if (g.maps * g.height * g.width * g.channels == 0)
    return GradPlan{.kernel = GradKernel::generic, .units = 0, .blocks = 0, .per_split = 1, .splits = 0};
  const bool square = g.height == g.width, seven = g.kernel_size == 7;
  // the register kernels keep offsets within a map in 32 bits
  const int64_t map_pixels = g.height * g.width, map_bytes = map_pixels * g.channels * static_cast<int64_t>(sizeof(T));
  const bool small =
      g.neighbours ? map_bytes <= INT32_MAX : map_pixels <= INT32_MAX && map_bytes / map_pixels <= INT32_MAX / 8;
  if (!aligned || !small || g.channels % kPerWord<T> != 0 || std::is_same<T, double>::value)
    plan.kernel = GradKernel::generic;
  else if (g.neighbours && square && g.height == 1)
    plan.kernel = GradKernel::pixel;
  else if (seven && (!g.neighbours || (square && g.height % kTile == 0)))
    plan.kernel = GradKernel::tile;
  else if (seven && square && (g.height == 2 || g.height == 4))
    plan.kernel = GradKernel::small_patch;
  else
    plan.kernel = GradKernel::generic;

  const int64_t word_count = g.channels / kPerWord<T>;
  int64_t quantum = 1, wanted = 1;  // units that keep all warps of a block busy; splits worth having
  switch (plan.kernel) {
    case GradKernel::tile:
    case GradKernel::small_patch:
      plan.units =
          g.maps * (plan.kernel == GradKernel::small_patch ? 1 : ceil_div(g.height, kTile) * ceil_div(g.width, kTile));
      plan.blocks = ChannelBlocks{word_count}.count();
      quantum = kGradWarps;
      wanted = ceil_div(kBlocks, plan.blocks);
      break;
    case GradKernel::pixel:
      plan.units = g.maps;
      plan.blocks = ceil_div(word_count, 32);
      quantum = 64;
      wanted = ceil_div(8 * kBlocks, plan.blocks * g.kernel_size);
      break;
    case GradKernel::generic:
      plan.units = g.maps * g.height;
      plan.blocks = ceil_div(g.channels, 32);
      quantum = 2 * kGenericWarps;
      wanted = ceil_div(2 * kBlocks, plan.blocks * g.kernel_size);
      break;
  }
  // partials stay small beside the two maps read, or beside any cache
  const int64_t maps = 2 * g.maps * g.height * g.width * g.channels * static_cast<int64_t>(sizeof(T));
  const int64_t partial = (taps + 1) * g.channels * static_cast<int64_t>(sizeof(Acc<T>));
  const int64_t affordable = std::max<int64_t>(1, std::max<int64_t>(maps / 4, 4 << 20) / partial);
  const int64_t splits = std::min({wanted, affordable, kMaxSplits});
  plan.per_split = std::max(quantum, ceil_div(ceil_div(plan.units, splits), quantum) * quantum);
  plan.splits = ceil_div(plan.units, plan.per_split);
  return plan;
}

template <class T>
int64_t partial_bytes(const ConvGeometry& g, const GradPlan& plan) {
  return plan.splits * (int64_t{g.kernel_size} * g.kernel_size + 1) * g.channels * static_cast<int64_t>(sizeof(Acc<T>));
}

template <class T>
void weight_grad_of(const ConvWeightGrad& p, const Launch& launch) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  if (g.channels == 0) return;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 4 == 0; };
  const GradPlan plan = make_plan<T>(g, aligned(p.x) && aligned(p.grad));
  GradArguments<T> a{};
  a.x = static_cast<const T*>(p.x);
  a.grad = static_cast<const T*>(p.grad);
  a.neighbours = g.neighbours;
  a.partial = static_cast<A*>(launch.workspace);
  a.maps = g.maps;
  a.height = g.height;
  a.width = g.width;
  a.channels = g.channels;
  a.units = plan.units;
  a.per_split = plan.per_split;
  a.kernel_size = g.kernel_size;
  a.step = static_cast<uint32_t>(g.channels * sizeof(T));
  if (plan.splits > 0) {
    if constexpr (!std::is_same<T, double>::value) {
      if (plan.kernel == GradKernel::tile) weight_grad_tile(a, plan, launch);
      if (plan.kernel == GradKernel::small_patch) weight_grad_small_patch(a, plan, launch);
      if (plan.kernel == GradKernel::pixel) weight_grad_pixel(a, plan, launch);
    }
    if (plan.kernel == GradKernel::generic) weight_grad_generic(a, plan, launch);
  }
  const int taps = g.kernel_size * g.kernel_size;
  const dim3 grid(static_cast<unsigned>(ceil_div(g.channels, 32)), static_cast<unsigned>(p.dbias ? taps + 1 : taps));
  CNX_LAUNCH((conv_weight_grad_sum<A>), grid, dim3(32 * kSumRows), 0, launch, static_cast<const A*>(launch.workspace),
             plan.splits, taps, g.channels, static_cast<A*>(p.dweight), static_cast<A*>(p.dbias));
}

}  // namespace

// Enough for pointers of any alignment: the caller may ask before there are any.
int64_t conv_weight_grad_workspace(const ConvWeightGrad& p) {
  int64_t bytes = 0;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.geometry.channels == 0) return;
    for (bool aligned : {false, true})
      bytes = std::max(bytes, partial_bytes<T>(p.geometry, make_plan<T>(p.geometry, aligned)));
  });
  return bytes;
}

void conv_weight_grad(const ConvWeightGrad& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) { weight_grad_of<typename decltype(type)::type>(p, launch); });
}

}  // namespace cuda
}  // namespace cnx
