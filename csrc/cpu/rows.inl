// The passes over rows [rows, channels] that the MLP and GRN are made of, with column sums per segment. They take the
// structs of the four operators (cnx/params.h), of which GRN fills in its own.
//
// One pattern throughout: a unit is a block of rows of one segment; inside it, four vectors of channels at a time walk
// down the rows, so that column sums stay in registers and each row is touched in runs of four cache lines.
#pragma once

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

// f(T{}, Act<activation>{}) for the element type and the activation; bfloat16 is the widest type that the CPU has.
template <Activation kActivation>
struct Act {
  static constexpr Activation value = kActivation;
};
template <class T, class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::identity:
      return f(T{}, Act<Activation::identity>{});
    case Activation::gelu:
      return f(T{}, Act<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(T{}, Act<Activation::gelu_tanh>{});
  }
}
template <class F>
void with_types(DType dtype, Activation activation, const F& f) {
  CNX_DISPATCH(dtype, with_activation, activation, f)
}

// Column sums [count, channels] of h^2, h = act(a); h is stored when kStore, and may be a.
template <class T, Activation kAct, bool kStore>
void square_sums(const GeluStatistics& p, const RowBlocks& blocks, Acc<T>* sums, const Threads& threads) {
  const int64_t channels = p.channels;
  Scratch<Acc<T>> partial(blocks.size() * channels);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const T* a = in<T>(p.a);
    T* stored = out<T>(p.h);
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, 1>(blocks[b], channels, partial.get() + b * channels,
                       [=](auto lanes, int64_t r, int64_t c, Vec<T>* s) {
                         const int64_t at = r * channels + c;
                         const Vec<T> h = activate<kAct>(lanes.load(a + at));
                         if constexpr (kStore) lanes.store(stored + at, h);
                         s[0] += h * h;
                       });
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, channels, sums);
}

// out = act(a) * scale + beta, which are all given.
template <class T, Activation kAct>
void scale_rows(const GeluScale& p, const RowBlocks& blocks, const Threads& threads) {
  const int64_t channels = p.channels;
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const T* a = in<T>(p.a);
    T* target = out<T>(p.out);
    const Acc<T>* beta = in<Acc<T>>(p.beta);
    for (int64_t b = begin; b < end; ++b) {
      const Acc<T>* scale = in<Acc<T>>(p.scale) + blocks[b].segment * channels;
      walk_block<T, 0>(blocks[b], channels, nullptr, [=](auto lanes, int64_t r, int64_t c, Vec<T>*) {
        const int64_t at = r * channels + c;
        lanes.store(target + at, activate<kAct>(lanes.load(a + at)) * lanes.load(scale + c) + lanes.load(beta + c));
      });
    }
  });
}

// Column sums [count, kSums, channels] of ds * h, and of ds behind them when kSums is 2.
template <class T, Activation kAct, int kSums>
void gradient_sums(const MlpBackwardStatistics& p, const RowBlocks& blocks, Acc<T>* sums, const Threads& threads) {
  const int64_t channels = p.channels;
  Scratch<Acc<T>> partial(blocks.size() * kSums * channels);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const T* a = in<T>(p.a);
    const T* ds = in<T>(p.ds);
    for (int64_t b = begin; b < end; ++b)
      walk_block<T, kSums>(blocks[b], channels, partial.get() + b * kSums * channels,
                           [=](auto lanes, int64_t r, int64_t c, Vec<T>* s) {
                             const int64_t at = r * channels + c;
                             const Vec<T> h = activate<kAct>(lanes.load(a + at)), d = lanes.load(ds + at);
                             s[0] += d * h;
                             if constexpr (kSums == 2) s[1] += d;
                           });
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, kSums * channels, sums);
}

// da = (ds * scale + h * kappa) * act'(a); hs = h * scale + beta when kScaled; column sums of da when kSum.
template <class T, Activation kAct, bool kScaled, bool kSum>
void gradient_rows(const MlpBackwardPointwise& p, const RowBlocks& blocks, const Threads& threads) {
  const int64_t channels = p.channels;
  Scratch<Acc<T>> partial(kSum ? blocks.size() * channels : 1);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    const T* a = in<T>(p.a);
    const T* ds = in<T>(p.ds);
    T* hs = out<T>(p.hs);
    T* da = out<T>(p.da);
    const Acc<T>* beta = in<Acc<T>>(p.beta);
    for (int64_t b = begin; b < end; ++b) {
      const Acc<T>* scale = in<Acc<T>>(p.scale) + blocks[b].segment * channels;
      const Acc<T>* kappa = in<Acc<T>>(p.kappa) + blocks[b].segment * channels;
      walk_block<T, kSum>(blocks[b], channels, partial.get() + (kSum ? b * channels : 0),
                          [=](auto lanes, int64_t r, int64_t c, Vec<T>* sums) {
                            const int64_t at = r * channels + c;
                            Vec<T> h, slope;
                            activate_with_slope<kAct>(lanes.load(a + at), h, slope);
                            const Vec<T> s = lanes.load(scale + c);
                            const Vec<T> d = (lanes.load(ds + at) * s + h * lanes.load(kappa + c)) * slope;
                            if constexpr (kScaled) lanes.store(hs + at, h * s + lanes.load(beta + c));
                            lanes.store(da + at, d);
                            if constexpr (kSum) sums[0] += d;
                          });
    }
  });
  if constexpr (kSum) sum_blocks(blocks.size(), partial.get(), channels, out<Acc<T>>(p.db));
}

}  // namespace CNX_ISA
}  // namespace cnx
