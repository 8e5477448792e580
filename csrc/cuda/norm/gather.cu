// LayerNorm of the visible rows of a dense map, written packed, and its gradient, written to their places. The work of
// a row is LayerNorm's; a few 32-bit divisions a row find its place, so that no copy of the rows is gathered first.
#include "rows_grad.cuh"

namespace cnx {
namespace cuda {

static GatheredRow places(const GatherNorm& p) {
  return {.patch_of_slot = p.patch_of_slot,
          .grid_w = static_cast<uint32_t>(p.grid_w),
          .side = static_cast<uint32_t>(p.side)};
}

int64_t gather_norm_forward_workspace(const GatherNorm&) {
  return 0;
}

void gather_norm_forward(const GatherNorm& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_forward<T>({.rows = p.rows(),
                     .channels = p.channels,
                     .x = static_cast<const T*>(p.x),
                     .weight = static_cast<const A*>(p.weight),
                     .bias = static_cast<const A*>(p.bias),
                     .eps = static_cast<A>(p.eps),
                     .y = static_cast<T*>(p.out),
                     .rstd = static_cast<A*>(p.rstd)},
                    places(p), launch);
  });
}

int64_t gather_norm_backward_workspace(const GatherNorm& p) {
  int64_t bytes = 0;
  dispatch(p.dtype, [&](auto type) {
    bytes = norm_backward_bytes<typename decltype(type)::type>(p.rows(), p.channels, p.dweight || p.dbias);
  });
  return bytes;
}

void gather_norm_backward(const GatherNorm& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_backward<T>({.rows = p.rows(),
                      .channels = p.channels,
                      .grad = static_cast<const T*>(p.x),
                      .x = static_cast<const T*>(p.z),
                      .rstd = static_cast<const A*>(p.rstd),
                      .weight = static_cast<const A*>(p.weight),
                      .dx = static_cast<T*>(p.out),
                      .partial = static_cast<A*>(launch.workspace)},
                     places(p), static_cast<A*>(p.dweight), static_cast<A*>(p.dbias), launch);
  });
}

}  // namespace cuda
}  // namespace cnx
