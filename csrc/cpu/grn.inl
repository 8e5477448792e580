// GRN: what it makes of column sums, and the stand-alone operator, optionally of gelu(x): y = f(x) * scale + beta.
#pragma once

#include "rows.inl"

namespace cnx {
namespace CNX_ISA {

// norm = sqrt(squares), scale = 1 + gamma * norm / (mean(norm) + eps), for each segment.
template <class A>
void grn_scale(const GeluStatistics& p, const A* squares) {
  const int64_t channels = p.channels;
  const A* gamma = in<A>(p.gamma);
  for (int64_t n = 0; n < p.segments.count; ++n) {
    const A* square = squares + n * channels;
    A* norm = out<A>(p.norm) + n * channels;
    A* scale = out<A>(p.scale) + n * channels;
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      norm[c] = std::sqrt(square[c]);
      sum += norm[c];
    }
    const A inverse = static_cast<A>(1.0 / (sum / static_cast<double>(channels) + p.eps));
    for (int64_t c = 0; c < channels; ++c) scale[c] = A(1) + gamma[c] * norm[c] * inverse;
  }
}

// From t, whose segments lie `stride` apart: dq = gamma t; dnorm = dq/m - mean(dq norm)/m^2; kappa = dnorm/norm, 0 at
// norm 0; dgamma = sum_n norm/m t; scale as above.
template <class A>
void grn_gradient(const MlpBackwardStatistics& p, const A* sums, int64_t stride) {
  const int64_t channels = p.channels;
  const A* gamma = in<A>(p.gamma);
  A* dgamma = out<A>(p.dgamma);
  for (int64_t c = 0; c < channels; ++c) dgamma[c] = 0;
  for (int64_t n = 0; n < p.segments.count; ++n) {
    const A* t = sums + n * stride;
    const A* norm = in<A>(p.norm) + n * channels;
    A* scale = out<A>(p.scale) + n * channels;
    A* kappa = out<A>(p.kappa) + n * channels;
    double sum = 0, dot = 0;
    for (int64_t c = 0; c < channels; ++c) {
      sum += norm[c];
      dot += static_cast<double>(gamma[c]) * t[c] * norm[c];
    }
    const double mean = sum / static_cast<double>(channels) + p.eps;
    const A inverse = static_cast<A>(1.0 / mean);
    const A pull = static_cast<A>(dot / (static_cast<double>(channels) * mean * mean));
    for (int64_t c = 0; c < channels; ++c) scale[c] = A(1) + gamma[c] * norm[c] * inverse;
    for (int64_t c = 0; c < channels; ++c) {
      dgamma[c] += norm[c] * inverse * t[c];
      kappa[c] = norm[c] != 0 ? (gamma[c] * t[c] * inverse - pull) / norm[c] : A(0);
    }
  }
}

template <class T, Activation kAct>
void grn_forward_as(const GrnForward& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  Scratch<A> squares(p.segments.count * p.channels), scale(p.segments.count * p.channels);
  const GeluStatistics statistics{.segments = p.segments,
                                  .channels = p.channels,
                                  .a = p.x,
                                  .gamma = p.gamma,
                                  .eps = p.eps,
                                  .norm = p.norm,
                                  .scale = scale.get()};
  square_sums<T, kAct, false>(statistics, blocks, squares.get(), threads);
  grn_scale(statistics, squares.get());
  scale_rows<T, kAct>({.channels = p.channels, .a = p.x, .scale = scale.get(), .beta = p.beta, .out = p.y}, blocks,
                      threads);
}

template <class T, Activation kAct>
void grn_backward_as(const GrnBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels, count = p.segments.count;
  const RowBlocks blocks(p.segments);
  Scratch<A> sums(count * 2 * channels), scale(count * channels), kappa(count * channels);
  const MlpBackwardStatistics statistics{.segments = p.segments,
                                         .channels = channels,
                                         .a = p.x,
                                         .ds = p.grad,
                                         .norm = p.norm,
                                         .gamma = p.gamma,
                                         .eps = p.eps,
                                         .scale = scale.get(),
                                         .kappa = kappa.get(),
                                         .dgamma = p.dgamma};
  gradient_sums<T, kAct, 2>(statistics, blocks, sums.get(), threads);
  grn_gradient(statistics, sums.get(), 2 * channels);
  A* dbeta = out<A>(p.dbeta);
  for (int64_t c = 0; c < channels; ++c) dbeta[c] = 0;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < channels; ++c) dbeta[c] += sums.get()[(n * 2 + 1) * channels + c];
  gradient_rows<T, kAct, false, false>(
      {.channels = channels, .a = p.x, .ds = p.grad, .scale = scale.get(), .kappa = kappa.get(), .da = p.dx}, blocks,
      threads);
}

template <class T>
void grn_forward_of(const GrnForward& p, const Threads& t) {
  p.gelu ? grn_forward_as<T, Activation::gelu>(p, t) : grn_forward_as<T, Activation::identity>(p, t);
}
template <class T>
void grn_backward_of(const GrnBackward& p, const Threads& t) {
  p.gelu ? grn_backward_as<T, Activation::gelu>(p, t) : grn_backward_as<T, Activation::identity>(p, t);
}

inline void grn_forward(const GrnForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, grn_forward_of, p, t)
}
inline void grn_backward(const GrnBackward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, grn_backward_of, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
