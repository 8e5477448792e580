// LayerNorm of every pixel, written by 2x2 blocks for the downsampling product, and its gradient. The work of a row is
// LayerNorm's; only the place of a row differs.
#include "rows_grad.cuh"

namespace cnx {
namespace cuda {

int64_t space_to_depth_norm_forward_workspace(const SpaceToDepthNorm&) {
  return 0;
}

void space_to_depth_norm_forward(const SpaceToDepthNorm& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_forward<T>({.rows = p.maps * p.height * p.width,
                     .channels = p.channels,
                     .x = static_cast<const T*>(p.x),
                     .weight = static_cast<const A*>(p.weight),
                     .bias = static_cast<const A*>(p.bias),
                     .eps = static_cast<A>(p.eps),
                     .y = static_cast<T*>(p.out),
                     .rstd = static_cast<A*>(p.rstd)},
                    BlockedRow{.width = p.width}, launch);
  });
}

int64_t space_to_depth_norm_backward_workspace(const SpaceToDepthNorm& p) {
  int64_t bytes = 0;
  dispatch(p.dtype, [&](auto type) {
    bytes = norm_backward_bytes<typename decltype(type)::type>(p.maps * p.height * p.width, p.channels,
                                                               p.dweight || p.dbias);
  });
  return bytes;
}

void space_to_depth_norm_backward(const SpaceToDepthNorm& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_backward<T>({.rows = p.maps * p.height * p.width,
                      .channels = p.channels,
                      .grad = static_cast<const T*>(p.x),
                      .x = static_cast<const T*>(p.z),
                      .rstd = static_cast<const A*>(p.rstd),
                      .weight = static_cast<const A*>(p.weight),
                      .dx = static_cast<T*>(p.out),
                      .partial = static_cast<A*>(launch.workspace)},
                     BlockedRow{.width = p.width}, static_cast<A*>(p.dweight), static_cast<A*>(p.dbias), launch);
  });
}

}  // namespace cuda
}  // namespace cnx
