// LayerNorm over the last dimension. Per 16-bit element: forward 4 bytes and 12 instructions of the 28 that an H200
// issues meanwhile at its copy bandwidth; backward 6 bytes and 18 of 42, 21 with the parameters' sums.
#include "rows_grad.cuh"

namespace cnx {
namespace cuda {

int64_t layer_norm_forward_workspace(const LayerNormForward&) {
  return 0;
}

void layer_norm_forward(const LayerNormForward& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_forward<T>({.rows = p.rows,
                     .channels = p.channels,
                     .x = static_cast<const T*>(p.x),
                     .weight = static_cast<const A*>(p.weight),
                     .bias = static_cast<const A*>(p.bias),
                     .eps = static_cast<A>(p.eps),
                     .y = static_cast<T*>(p.y),
                     .mean = static_cast<A*>(p.mean),
                     .rstd = static_cast<A*>(p.rstd)},
                    SameRow{}, launch);
  });
}

int64_t layer_norm_backward_workspace(const LayerNormBackward& p) {
  int64_t bytes = 0;
  dispatch(p.dtype, [&](auto type) {
    bytes = norm_backward_bytes<typename decltype(type)::type>(p.rows, p.channels, p.dweight || p.dbias);
  });
  return bytes;
}

void layer_norm_backward(const LayerNormBackward& p, const Launch& launch) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    norm_backward<T>({.rows = p.rows,
                      .channels = p.channels,
                      .grad = static_cast<const T*>(p.grad),
                      .x = static_cast<const T*>(p.x),
                      .mean = static_cast<const A*>(p.mean),
                      .rstd = static_cast<const A*>(p.rstd),
                      .weight = static_cast<const A*>(p.weight),
                      .dx = static_cast<T*>(p.dx),
                      .partial = static_cast<A*>(launch.workspace)},
                     SameRow{}, static_cast<A*>(p.dweight), static_cast<A*>(p.dbias), launch);
  });
}

}  // namespace cuda
}  // namespace cnx
