// Statistics of the MLP's GRN: the sums of a pass over the rows, then one block per segment, then a sum over segments.
// Forward: 2 launches, 4 bytes per 16-bit element with h stored. Backward: 3 launches and 4 bytes, 2 and none with t.
#include "../norm/grn_statistics.cuh"
#include "row_passes.h"

namespace cnx {
namespace cuda {
namespace {

template <class T>
struct ForwardScratch {
  Workspace space;
  Partials<Acc<T>> sums;

  ForwardScratch(const GeluStatistics& p, void* base)
      : space(base), sums(space, p.segments.count, column_splits<T>(p.segments, p.channels), p.channels) {}
};

template <class T>
struct BackwardScratch {
  Workspace space;
  Partials<Acc<T>> sums;  // unless t is given
  Acc<T>* terms;          // of dgamma, by segment; those of a single segment are dgamma

  BackwardScratch(const MlpBackwardStatistics& p, void* base)
      : space(base),
        sums(space, p.t ? 0 : p.segments.count, column_splits<T>(p.segments, p.channels), p.channels),
        terms(p.segments.count == 1 ? static_cast<Acc<T>*>(p.dgamma)
                                    : space.take<Acc<T>>(p.segments.count * p.channels)) {}
};

}  // namespace

int64_t gelu_statistics_workspace(const GeluStatistics& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = ForwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void gelu_statistics(const GeluStatistics& p, const Launch& launch) {
  if (p.segments.count == 0) return;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const ForwardScratch<T> scratch(p, launch.workspace);
    square_sums(p, scratch.sums.values, launch);
    const A* squares = scratch.sums.finished(launch);
    CNX_LAUNCH((grn_scale_kernel<A>), static_cast<unsigned>(p.segments.count), kStatisticsThreads, 0, launch, squares,
               scratch.sums.finished_splits(), p.channels, static_cast<const A*>(p.gamma), static_cast<A>(p.eps),
               static_cast<A*>(p.norm), static_cast<A*>(p.scale));
  });
}

int64_t mlp_backward_statistics_workspace(const MlpBackwardStatistics& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = BackwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void mlp_backward_statistics(const MlpBackwardStatistics& p, const Launch& launch) {
  const int64_t count = p.segments.count;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const BackwardScratch<T> scratch(p, launch.workspace);
    if (count > 0) {
      const A* t = static_cast<const A*>(p.t);
      if (!t) {
        gradient_sums(p, false, scratch.sums.values, launch);
        t = scratch.sums.finished(launch);
      }
      CNX_LAUNCH((grn_gradient_kernel<A>), static_cast<unsigned>(count), kStatisticsThreads, 0, launch, t,
                 p.t ? 1 : scratch.sums.finished_splits(), 1, p.channels, static_cast<const A*>(p.norm),
                 static_cast<const A*>(p.gamma), static_cast<A>(p.eps), static_cast<A*>(p.scale),
                 static_cast<A*>(p.kappa), scratch.terms, static_cast<A*>(nullptr), p.channels);
    }
    if (count != 1)
      sum_partials<A>(scratch.terms, 1, count, p.channels, p.channels, static_cast<A*>(p.dgamma), nullptr, launch);
  });
}

}  // namespace cuda
}  // namespace cnx
