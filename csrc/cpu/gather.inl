// LayerNorm of rows that are read from the visible patches of a dense map, and its gradient, written back to them.
#pragma once

#include "norm.inl"

namespace cnx {
namespace CNX_ISA {

// Calls f(packed row, dense row) for every row of every slot.
template <class F>
void each_gathered_row(const GatherNorm& p, const Threads& threads, const F& f) {
  parallel_for(threads, p.slots, 4, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t patch = p.patch_of_slot[slot], line = p.grid_w * p.side;
      const int64_t first = patch / p.grid_w * p.side * line + patch % p.grid_w * p.side;
      for (int64_t y = 0; y < p.side; ++y)
        for (int64_t x = 0; x < p.side; ++x) f((slot * p.side + y) * p.side + x, first + y * line + x);
    }
  });
}

template <class T>
void gather_norm_forward_as(const GatherNorm& p, const Threads& threads) {
  using A = Acc<T>;
  each_gathered_row(p, threads, [&](int64_t packed, int64_t dense) {
    const T* x = in<T>(p.x) + dense * p.channels;
    A mean, rstd;
    row_statistics(x, p.channels, p.eps, mean, rstd);
    normalize_row<T>(x, p.channels, mean, rstd, in<A>(p.weight), in<A>(p.bias), out<T>(p.out) + packed * p.channels);
    out<A>(p.rstd)[packed] = rstd;
  });
}

template <class T>
void gather_norm_backward_as(const GatherNorm& p, const Threads& threads) {
  using A = Acc<T>;
  each_gathered_row(p, threads, [&](int64_t packed, int64_t dense) {
    const int64_t source = packed * p.channels;
    layer_norm_backward_row<T>(in<T>(p.x) + source, in<T>(p.z) + source, A(0), A(1), in<A>(p.rstd)[packed],
                               in<A>(p.weight), p.channels, out<T>(p.out) + dense * p.channels);
  });
  if (p.dweight)
    layer_norm_parameter_sums<T>({.dtype = p.dtype,
                                  .rows = p.rows(),
                                  .channels = p.channels,
                                  .grad = p.x,
                                  .x = p.z,
                                  .rstd = p.rstd,
                                  .dweight = p.dweight,
                                  .dbias = p.dbias},
                                 threads);
}

inline void gather_norm_forward(const GatherNorm& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, gather_norm_forward_as, p, t)
}
inline void gather_norm_backward(const GatherNorm& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, gather_norm_backward_as, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
