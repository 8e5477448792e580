// Launching conv_mma for one feature type; instantiated in instances/.
#pragma once

#include "generic.cuh"
#include "mma_tiles.cuh"

namespace cnx {
namespace cuda {

template <class T>
void conv_mma_of(const ConvForward& p, const Launch& launch);

constexpr bool kExactWeights = true;

template <class T, bool kResidual, bool kAligned>
void launch_mma(const ConvForward& p, const MmaPlan& plan, const Launch& launch) {
  const auto kernel = conv_mma<T, kExactWeights, kResidual, kAligned>;
  allow_shared(kernel, kMmaShared);
  // as many CTAs as the device holds, so that each stages its weights once; no result depends on how many there are
  const int64_t parts = resident_blocks(kernel, kMmaThreads, kMmaShared) / plan.columns;
  const int64_t groups = ceil_div(plan.tiles, kMmaTiles);
  const dim3 grid(static_cast<unsigned>(plan.columns * std::max<int64_t>(1, std::min(parts, groups))));
  CNX_LAUNCH((conv_mma<T, kExactWeights, kResidual, kAligned>), grid, dim3(kMmaThreads),
             static_cast<size_t>(kMmaShared), launch, p, plan);
}

template <class T, int N>
void launch_mma_normalize(const ConvForward& p, const Launch& launch) {
  const int64_t rows = p.geometry.maps * p.geometry.height * p.geometry.width;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(rows, 8), 1 << 20)));
  CNX_LAUNCH((conv_normalize<T, N>), grid, dim3(256), 0, launch, p, rows);
}

template <class T>
void conv_mma_of(const ConvForward& given, const Launch& launch) {
  ConvForward p = given;
  if (p.normalize) p.residual = nullptr;
  const ConvGeometry& g = p.geometry;
  MmaPlan plan;
  plan.down = static_cast<int>(g.height / 8);
  plan.across = static_cast<int>(g.width / 8);
  plan.tiles = static_cast<int>(g.maps * plan.down * plan.across);
  plan.columns = static_cast<int>(ceil_div(g.channels, kMmaChannels));
  const bool aligned = vector_width<T>(g.channels, {p.x, p.y, p.residual}) == 8;
  if (p.residual && aligned)
    launch_mma<T, true, true>(p, plan, launch);
  else if (p.residual)
    launch_mma<T, true, false>(p, plan, launch);
  else if (aligned)
    launch_mma<T, false, true>(p, plan, launch);
  else
    launch_mma<T, false, false>(p, plan, launch);
  if (!p.normalize) return;
  if (vector_width<T>(g.channels, {p.y}) == 8)
    launch_mma_normalize<T, 8>(p, launch);
  else
    launch_mma_normalize<T, 1>(p, launch);
}

}  // namespace cuda
}  // namespace cnx
