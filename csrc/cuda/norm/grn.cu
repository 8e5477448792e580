// Global response normalisation, alone or after GELU. Forward: square sums (2 bytes per 16-bit element), statistics,
// scaling (4 bytes). Backward: gradient sums (4 bytes), statistics, gradient (6 bytes).
#include "../mlp/row_passes.h"
#include "grn_statistics.cuh"

namespace cnx {
namespace cuda {
namespace {

template <class Params>
Activation activation_of(const Params& p) {
  return p.gelu ? Activation::gelu : Activation::identity;
}

template <class T>
struct ForwardScratch {
  Workspace space;
  Partials<Acc<T>> squares;
  Acc<T>* scale;

  ForwardScratch(const GrnForward& p, void* base)
      : space(base),
        squares(space, p.segments.count, column_splits<T>(p.segments, p.channels), p.channels),
        scale(space.take<Acc<T>>(p.segments.count * p.channels)) {}
};

template <class T>
struct BackwardScratch {
  Workspace space;
  Partials<Acc<T>> sums;  // t and the sums of the gradient
  Acc<T>*scale, *kappa, *terms;

  BackwardScratch(const GrnBackward& p, void* base)
      : space(base),
        sums(space, p.segments.count, column_splits<T>(p.segments, p.channels), 2 * p.channels),
        scale(space.take<Acc<T>>(p.segments.count * p.channels)),
        kappa(space.take<Acc<T>>(p.segments.count * p.channels)),
        terms(space.take<Acc<T>>(p.segments.count * 2 * p.channels)) {}
};

}  // namespace

int64_t grn_forward_workspace(const GrnForward& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = ForwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void grn_forward(const GrnForward& p, const Launch& launch) {
  if (p.segments.count == 0) return;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const ForwardScratch<T> scratch(p, launch.workspace);
    square_sums(
        {.dtype = p.dtype, .segments = p.segments, .channels = p.channels, .activation = activation_of(p), .a = p.x},
        scratch.squares.values, launch);
    const A* squares = scratch.squares.finished(launch);
    CNX_LAUNCH((grn_scale_kernel<A>), static_cast<unsigned>(p.segments.count), kStatisticsThreads, 0, launch, squares,
               scratch.squares.finished_splits(), p.channels, static_cast<const A*>(p.gamma), static_cast<A>(p.eps),
               static_cast<A*>(p.norm), scratch.scale);
    scale_rows({.dtype = p.dtype,
                .segments = p.segments,
                .channels = p.channels,
                .activation = activation_of(p),
                .a = p.x,
                .scale = scratch.scale,
                .beta = p.beta,
                .out = p.y},
               launch);
  });
}

int64_t grn_backward_workspace(const GrnBackward& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = BackwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void grn_backward(const GrnBackward& p, const Launch& launch) {
  const int64_t count = p.segments.count;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const BackwardScratch<T> scratch(p, launch.workspace);
    A *dgamma = static_cast<A*>(p.dgamma), *dbeta = static_cast<A*>(p.dbeta);
    const bool one = count == 1;  // then its terms are the sums
    if (count > 0) {
      gradient_sums({.dtype = p.dtype,
                     .segments = p.segments,
                     .channels = p.channels,
                     .activation = activation_of(p),
                     .a = p.x,
                     .ds = p.grad},
                    true, scratch.sums.values, launch);
      const A* sums = scratch.sums.finished(launch);
      CNX_LAUNCH((grn_gradient_kernel<A>), static_cast<unsigned>(count), kStatisticsThreads, 0, launch, sums,
                 scratch.sums.finished_splits(), 2, p.channels, static_cast<const A*>(p.norm),
                 static_cast<const A*>(p.gamma), static_cast<A>(p.eps), scratch.scale, scratch.kappa,
                 one ? dgamma : scratch.terms, one ? dbeta : scratch.terms + p.channels, 2 * p.channels);
      gradient_rows({.dtype = p.dtype,
                     .segments = p.segments,
                     .channels = p.channels,
                     .activation = activation_of(p),
                     .a = p.x,
                     .ds = p.grad,
                     .scale = scratch.scale,
                     .kappa = scratch.kappa,
                     .da = p.dx},
                    nullptr, launch);
    }
    if (!one) sum_partials<A>(scratch.terms, 1, count, 2 * p.channels, p.channels, dgamma, dbeta, launch);
  });
}

}  // namespace cuda
}  // namespace cnx
