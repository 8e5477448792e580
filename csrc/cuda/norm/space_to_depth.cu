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
    norm_forward<T>({p.maps * p.height * p.width, p.channels, static_cast<const T*>(p.x),
                     static_cast<const A*>(p.weight), static_cast<const A*>(p.bias), static_cast<A>(p.eps),
                     static_cast<T*>(p.out), nullptr, static_cast<A*>(p.rstd)},
                    BlockedRow{p.width}, launch);
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
    norm_backward<T>({p.maps * p.height * p.width, p.channels, static_cast<const T*>(p.x), static_cast<const T*>(p.z),
                      nullptr, static_cast<const A*>(p.rstd), static_cast<const A*>(p.weight), static_cast<T*>(p.out),
                      static_cast<A*>(launch.workspace)},
                     BlockedRow{p.width}, static_cast<A*>(p.dweight), static_cast<A*>(p.dbias), launch);
  });
}

}  // namespace cuda
}  // namespace cnx
