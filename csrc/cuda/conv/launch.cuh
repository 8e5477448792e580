// Launching the convolution kernels of one feature type; instantiated in instances/, a file for each type so
// that they compile beside each other.
#pragma once

#include <algorithm>

#include "generic.cuh"
#include "pixel.cuh"
#include "small_patch.cuh"
#include "tile.cuh"

namespace cnx {
namespace cuda {

template <class T>
void conv_forward_of(const ConvForward& p, const ConvPlan& plan, const Launch& launch);

constexpr int64_t kMostBlocks = 1 << 20;  // of kernels that loop over what is left

template <class T, int N>
void launch_generic(const ConvForward& p, const ConvPlan& plan, const Launch& launch) {
  using A = Acc<T>;
  const int taps = p.geometry.kernel_size * p.geometry.kernel_size;
  const int64_t channels = p.geometry.channels, work = plan.all / N;
  A* weight = static_cast<A*>(launch.workspace);
  const dim3 turn(static_cast<unsigned>(std::min<int64_t>(ceil_div(channels * taps, 256), 1024)));
  CNX_LAUNCH((conv_turn_weights<A>), turn, dim3(256), 0, launch, static_cast<const A*>(p.weight), channels, taps,
             p.flip, weight);
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(work, 256), kMostBlocks)));
  CNX_LAUNCH((conv_generic<T, N>), grid, dim3(256), 0, launch, p, weight);
}

template <class T, int N>
void launch_normalize(const ConvForward& p, const Launch& launch) {
  const int64_t rows = p.geometry.maps * p.geometry.height * p.geometry.width;
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(rows, 8), kMostBlocks)));
  CNX_LAUNCH((conv_normalize<T, N>), grid, dim3(256), 0, launch, p, rows);
}

// As many CTAs as the device holds, so that each loads its weights once; columns get theirs by the time they take (see
// cut_rest). No result depends on how many there are.
template <class Kernel>
unsigned share_blocks(Kernel kernel, ConvPlan& plan, int threads) {
  allow_shared(kernel, plan.shared);
  const int64_t resident = resident_blocks(kernel, threads, plan.shared);
  constexpr int kTime[3] = {20, 11, 6};
  int64_t all = 0;
  for (int kind = 0; kind < 3; ++kind) all += kTime[kind] * plan.columns[kind];
  int64_t blocks = 0;
  for (int kind = 0; kind < 3; ++kind) {
    const int64_t most = ceil_div(plan.all, int64_t{plan.units} << kind);
    plan.parts[kind] = static_cast<int>(std::max<int64_t>(1, std::min(resident * kTime[kind] / all, most)));
    blocks += int64_t{plan.columns[kind]} * plan.parts[kind];
  }
  return static_cast<unsigned>(blocks);
}

#define CNX_LAUNCH_CONV(kernel)                                                                         \
  do {                                                                                                  \
    const int threads = 32 * plan.warps;                                                                \
    const unsigned blocks = share_blocks(CNX_PARENTHESISED kernel, plan, threads);                      \
    CNX_LAUNCH(kernel, dim3(blocks), dim3(threads), static_cast<size_t>(plan.shared), launch, p, plan); \
  } while (0)

template <class T, bool kNormalize>
void launch_words(const ConvForward& p, ConvPlan plan, const Launch& launch) {
  if (plan.kernel == ConvKernel::pixel)
    CNX_LAUNCH_CONV((conv_pixel<T, kNormalize>));
  else if (plan.kernel == ConvKernel::small_patch && p.geometry.height == 4)
    CNX_LAUNCH_CONV((conv_small_patch<T, 4, kNormalize>));
  else if (plan.kernel == ConvKernel::small_patch)
    CNX_LAUNCH_CONV((conv_small_patch<T, 2, kNormalize>));
  else if (narrow(p.geometry.height, p.geometry.width))
    CNX_LAUNCH_CONV((conv_tile<T, true, kNormalize>));
  else
    CNX_LAUNCH_CONV((conv_tile<T, false, kNormalize>));
}

template <class T>
void conv_forward_of(const ConvForward& given, const ConvPlan& plan, const Launch& launch) {
  ConvForward p = given;
  if (!plan.fused) p.normalize = false;
  if (given.normalize) p.residual = nullptr;
  constexpr int wide = 16 / sizeof(T);
  if (plan.kernel == ConvKernel::generic) {
    if (vector_width<T>(p.geometry.channels, {p.x, p.y, p.residual}) == wide)
      launch_generic<T, wide>(p, plan, launch);
    else
      launch_generic<T, 1>(p, plan, launch);
  } else if constexpr (sizeof(T) <= 4) {
    if (p.normalize)
      launch_words<T, true>(p, plan, launch);
    else
      launch_words<T, false>(p, plan, launch);
  }
  if (!given.normalize || plan.fused) return;
  if (vector_width<T>(p.geometry.channels, {p.y}) == wide)
    launch_normalize<T, wide>(given, launch);
  else
    launch_normalize<T, 1>(given, launch);
}

#undef CNX_LAUNCH_CONV

}  // namespace cuda
}  // namespace cnx
