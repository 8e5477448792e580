// Element-wise parts of the MLP and GRN over rows [rows, H], with column sums per segment.
//
// One pattern throughout: a unit is a block of rows of one segment; inside it, four vectors of channels at a time walk
// down the rows, so that column sums stay in registers and each row is touched in runs of four cache lines.
#include "gelu.h"
#include "parallel.h"

namespace cnx {
namespace CNX_ISA {

constexpr int kGroup = 4;

// f.template step<Lanes>(lanes, row, channel, sums) for every vector of a row block; sums[v] is one accumulator.
// kSums accumulators per vector, written to partial[s * channels + c].
template <class T, int kSums, class F>
CNX_INLINE void walk_block(const RowBlock& block, int64_t channels, Acc<T>* partial, const F& step) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  for (; c + kGroup * lanes <= channels; c += kGroup * lanes) {
    Vec<T> sums[kGroup][kSums > 0 ? kSums : 1] = {};
    for (int64_t r = block.begin; r < block.end; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; ++v) step(Full(lanes), r, c + v * lanes, sums[v]);
    for (int s = 0; s < kSums; ++s)
      for (int v = 0; v < kGroup; ++v) Full::store(partial + s * channels + c + v * lanes, sums[v][s]);
  }
  each_vector<T>(c, channels, [&](auto rest, int64_t at) {
    Vec<T> sums[kSums > 0 ? kSums : 1] = {};
    for (int64_t r = block.begin; r < block.end; ++r) step(rest, r, at, sums);
    for (int s = 0; s < kSums; ++s) rest.store(partial + s * channels + at, sums[s]);
  });
}

template <class T, Activation kAct>
void gelu_square_sum_as(const MlpRows& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * p.channels);
  T* a = out<T>(p.a);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(blocks[b], p.channels, partial.get() + b * p.channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* sums) {
                         T* at = a + r * p.channels + c;
                         const Vec<T> h = gelu<kAct>(lanes.load(at));
                         lanes.store(at, h);
                         sums[0] += h * h;
                       });
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, p.channels, out<A>(p.sums));
}

template <class T>
void scale_rows_as(const MlpRows& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  T* a = out<T>(p.a);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A* scale = in<A>(p.scale) + blocks[b].segment * p.channels;
      walk_block<T, 0>(blocks[b], p.channels, nullptr, [&](auto lanes, int64_t r, int64_t c, Vec<T>*) {
        T* at = a + r * p.channels + c;
        lanes.store(at, lanes.load(at) * lanes.load(scale + c) + lanes.load(in<A>(p.beta) + c));
      });
    }
  });
}

template <class T>
void column_sum_as(const MlpRows& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * p.channels);
  parallel_for(threads, blocks.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(blocks[b], p.channels, partial.get() + b * p.channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* sums) {
                         sums[0] += lanes.load(in<T>(p.a) + r * p.channels + c);
                       });
  });
  sum_blocks(blocks.size(), partial.get(), p.channels, out<A>(p.sums));
}

template <class T, Activation kAct>
void mlp_backward_reduce_as(const MlpRows& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * p.channels);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(blocks[b], p.channels, partial.get() + b * p.channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* sums) {
                         const int64_t at = r * p.channels + c;
                         sums[0] += lanes.load(in<T>(p.ds) + at) * gelu<kAct>(lanes.load(in<T>(p.a) + at));
                       });
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, p.channels, out<A>(p.sums));
}

template <class T, Activation kAct>
void mlp_backward_pointwise_as(const MlpRows& p, const Threads& threads) {
  using A = Acc<T>;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * p.channels);
  T* a = out<T>(p.a);
  T* ds = out<T>(p.ds);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A* scale = in<A>(p.scale) + blocks[b].segment * p.channels;
      const A* kappa = in<A>(p.kappa) + blocks[b].segment * p.channels;
      walk_block<T, 1>(blocks[b], p.channels, partial.get() + b * p.channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* sums) {
                         const int64_t at = r * p.channels + c;
                         Vec<T> h, slope;
                         gelu_with_derivative<kAct>(lanes.load(a + at), h, slope);
                         const Vec<T> s = lanes.load(scale + c);
                         const Vec<T> da = (lanes.load(ds + at) * s + h * lanes.load(kappa + c)) * slope;
                         lanes.store(a + at, h * s + lanes.load(in<A>(p.beta) + c));
                         lanes.store(ds + at, da);
                         sums[0] += da;
                       });
    }
  });
  sum_blocks(blocks.size(), partial.get(), p.channels, out<A>(p.sums));
}

// norm = sqrt(input), scale = 1 + gamma * norm / (mean(norm) + eps)
template <class A>
void grn_scale_as(const GrnStatistics& p) {
  for (int64_t n = 0; n < p.count; ++n) {
    const A* square = in<A>(p.input) + n * p.channels;
    A* norm = out<A>(p.norm) + n * p.channels;
    A* scale = out<A>(p.scale) + n * p.channels;
    double sum = 0;
    for (int64_t c = 0; c < p.channels; ++c) {
      norm[c] = std::sqrt(square[c]);
      sum += norm[c];
    }
    const A inverse = static_cast<A>(1.0 / (sum / static_cast<double>(p.channels) + p.eps));
    for (int64_t c = 0; c < p.channels; ++c) scale[c] = A(1) + in<A>(p.gamma)[c] * norm[c] * inverse;
  }
}

// From t: dq = gamma t; dnorm = dq/m - mean(dq norm)/m^2; kappa = dnorm/norm, 0 at norm 0; dgamma = sum_n norm/m t.
template <class A>
void grn_gradient_as(const GrnStatistics& p) {
  A* dgamma = out<A>(p.dgamma);
  for (int64_t c = 0; c < p.channels; ++c) dgamma[c] = 0;
  const A* gamma = in<A>(p.gamma);
  for (int64_t n = 0; n < p.count; ++n) {
    const A* t = in<A>(p.input) + n * p.channels;
    const A* norm = in<A>(p.norm_in) + n * p.channels;
    A* kappa = out<A>(p.kappa) + n * p.channels;
    double sum = 0, dot = 0;
    for (int64_t c = 0; c < p.channels; ++c) {
      sum += norm[c];
      dot += static_cast<double>(gamma[c]) * t[c] * norm[c];
    }
    const double mean = sum / static_cast<double>(p.channels) + p.eps;
    const A inverse = static_cast<A>(1.0 / mean);
    const A pull = static_cast<A>(dot / (static_cast<double>(p.channels) * mean * mean));
    for (int64_t c = 0; c < p.channels; ++c) {
      dgamma[c] += norm[c] * inverse * t[c];
      kappa[c] = norm[c] > 0 ? (gamma[c] * t[c] * inverse - pull) / norm[c] : A(0);
    }
  }
}

inline void grn_scale(const GrnStatistics& p) {
  if (p.dtype == DType::f64) return grn_scale_as<double>(p);
  grn_scale_as<float>(p);
}
inline void grn_gradient(const GrnStatistics& p) {
  if (p.dtype == DType::f64) return grn_gradient_as<double>(p);
  grn_gradient_as<float>(p);
}

// The stand-alone GRN, optionally of gelu(x): y = f(x) * scale + beta.
template <class T, bool kGelu>
void grn_forward_as(const GrnForward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * channels), sums(p.segments.count * channels), scale(p.segments.count * channels);
  const T* x = in<T>(p.x);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(blocks[b], channels, partial.get() + b * channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* s) {
                         Vec<T> h = lanes.load(x + r * channels + c);
                         if (kGelu) h = gelu(h);
                         s[0] += h * h;
                       });
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, channels, sums.get());
  grn_scale_as<A>({p.dtype, p.segments.count, channels, sums.get(), nullptr, p.gamma, p.eps, p.norm, scale.get(),
                   nullptr, nullptr});
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A* factor = scale.get() + blocks[b].segment * channels;
      walk_block<T, 0>(blocks[b], channels, nullptr, [&](auto lanes, int64_t r, int64_t c, Vec<T>*) {
        Vec<T> h = lanes.load(x + r * channels + c);
        if (kGelu) h = gelu(h);
        lanes.store(out<T>(p.y) + r * channels + c, h * lanes.load(factor + c) + lanes.load(in<A>(p.beta) + c));
      });
    }
  });
}

template <class T, bool kGelu>
void grn_backward_as(const GrnBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels, count = p.segments.count;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * 2 * channels), sums(count * 2 * channels), t(count * channels);
  Scratch<A> kappa(count * channels), scale(count * channels), norm(count * channels), square(count * channels);
  const T* x = in<T>(p.x);
  const T* grad = in<T>(p.grad);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 2>(blocks[b], channels, partial.get() + b * 2 * channels,
                       [&](auto lanes, int64_t r, int64_t c, Vec<T>* s) {
                         Vec<T> h = lanes.load(x + r * channels + c);
                         if (kGelu) h = gelu(h);
                         const Vec<T> g = lanes.load(grad + r * channels + c);
                         s[0] += g * h;
                         s[1] += g;
                       });
  });
  sum_blocks_by_segment(blocks, partial.get(), count, 2 * channels, sums.get());
  A* dbeta = out<A>(p.dbeta);
  for (int64_t c = 0; c < channels; ++c) dbeta[c] = 0;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      t.get()[n * channels + c] = sums.get()[n * 2 * channels + c];
      dbeta[c] += sums.get()[(n * 2 + 1) * channels + c];
      const A g = in<A>(p.norm)[n * channels + c];
      square.get()[n * channels + c] = g * g;
    }
  grn_scale_as<A>(
      {p.dtype, count, channels, square.get(), nullptr, p.gamma, p.eps, norm.get(), scale.get(), nullptr, nullptr});
  grn_gradient_as<A>(
      {p.dtype, count, channels, t.get(), p.norm, p.gamma, p.eps, nullptr, nullptr, kappa.get(), p.dgamma});
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A* factor = scale.get() + blocks[b].segment * channels;
      const A* pull = kappa.get() + blocks[b].segment * channels;
      walk_block<T, 0>(blocks[b], channels, nullptr, [&](auto lanes, int64_t r, int64_t c, Vec<T>*) {
        Vec<T> h = lanes.load(x + r * channels + c), slope = Vec<T>{} + Acc<T>(1);
        if (kGelu) gelu_with_derivative(h, h, slope);
        const Vec<T> dh = lanes.load(grad + r * channels + c) * lanes.load(factor + c) + h * lanes.load(pull + c);
        lanes.store(out<T>(p.dx) + r * channels + c, dh * slope);
      });
    }
  });
}

template <class T>
void grn_forward_of(const GrnForward& p, const Threads& t) {
  p.gelu ? grn_forward_as<T, true>(p, t) : grn_forward_as<T, false>(p, t);
}
template <class T>
void grn_backward_of(const GrnBackward& p, const Threads& t) {
  p.gelu ? grn_backward_as<T, true>(p, t) : grn_backward_as<T, false>(p, t);
}

template <class T>
void gelu_square_sum_of(const MlpRows& p, const Threads& t) {
  p.activation == Activation::gelu_tanh ? gelu_square_sum_as<T, Activation::gelu_tanh>(p, t)
                                        : gelu_square_sum_as<T, Activation::gelu>(p, t);
}
template <class T>
void mlp_backward_reduce_of(const MlpRows& p, const Threads& t) {
  p.activation == Activation::gelu_tanh ? mlp_backward_reduce_as<T, Activation::gelu_tanh>(p, t)
                                        : mlp_backward_reduce_as<T, Activation::gelu>(p, t);
}
template <class T>
void mlp_backward_pointwise_of(const MlpRows& p, const Threads& t) {
  p.activation == Activation::gelu_tanh ? mlp_backward_pointwise_as<T, Activation::gelu_tanh>(p, t)
                                        : mlp_backward_pointwise_as<T, Activation::gelu>(p, t);
}

inline void gelu_square_sum(const MlpRows& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, gelu_square_sum_of, p, t)
}
inline void scale_rows(const MlpRows& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, scale_rows_as, p, t)
}
inline void column_sum(const MlpRows& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, column_sum_as, p, t)
}
inline void mlp_backward_reduce(const MlpRows& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, mlp_backward_reduce_of, p, t)
}
inline void mlp_backward_pointwise(const MlpRows& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, mlp_backward_pointwise_of, p, t)
}
inline void grn_forward(const GrnForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, grn_forward_of, p, t)
}
inline void grn_backward(const GrnBackward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, grn_backward_of, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
