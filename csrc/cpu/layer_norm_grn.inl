// GRN of LayerNorm in two passes over the rows each way, which leave nothing but statistics. A pass takes a few rows at
// a time, so that a second look at them, for the centred squares or the column sums, finds them in the L1 cache; and
// where there are enough segments for all threads, a segment takes both passes before the next, so that the second
// finds its rows in the L2 cache. The order of every sum is the same with and without.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "grn.inl"

namespace cnx {
namespace CNX_ISA {

// Sum of the lanes, by halves: a chain of log2(lanes) additions.
#if __has_builtin(__builtin_shufflevector)
template <class V, size_t... kLane>
CNX_INLINE auto add_halves(V v, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(v, v, kLane...) + __builtin_shufflevector(v, v, (kLane + sizeof...(kLane))...);
}
template <class V>
CNX_INLINE auto sum_by_halves(V v) {
  constexpr size_t half = sizeof(V) / sizeof(v[0]) / 2;
  if constexpr (half == 1) {
    return v[0] + v[1];
  } else {
    return sum_by_halves(add_halves(v, std::make_index_sequence<half>()));
  }
}
#else  // GCC before 12
template <class V>
CNX_INLINE auto sum_by_halves(V v) {
  for (size_t half = sizeof(V) / sizeof(v[0]) / 2; half; half /= 2)
    for (size_t i = 0; i < half; ++i) v[i] += v[half + i];
  return v[0];
}
#endif

template <int kRows>
using Rows = std::integral_constant<int, kRows>;

// f(Rows<n>{}, row) for n rows at a time: kMost, then the powers of 2 below.
template <int kMost, class F>
CNX_INLINE void each_rows(int64_t begin, int64_t end, const F& f) {
  for (; begin + kMost <= end; begin += kMost) f(Rows<kMost>{}, begin);
  if constexpr (kMost > 1) each_rows<kMost / 2>(begin, end, f);
}

// Rows whose mean and 1/std stay in registers, beside one vector of each sum.
constexpr int kMostRows = CNX_VECTOR_BYTES == 64 ? 8 : 4;

// z = (x - mean) * rstd of a few rows that lie one behind the other.
template <class T, int kRows>
struct NormalizedRows {
  const T* x;
  int64_t channels;
  Acc<T> mean[kRows], rstd[kRows];

  CNX_INLINE NormalizedRows(const T* rows, int64_t width, const void* means, const void* rstds, int64_t first)
      : x(rows + first * width), channels(width) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      mean[i] = in<Acc<T>>(means)[first + i];
      rstd[i] = in<Acc<T>>(rstds)[first + i];
    }
  }
  template <class Lanes>
  CNX_INLINE Vec<T> load(const Lanes& lanes, int i, int64_t c) const {
    return (lanes.load(x + i * channels + c) - mean[i]) * rstd[i];
  }
};

// Mean and 1/std of rows that lie one behind the other.
template <class T, int kRows>
CNX_INLINE void statistics_of_rows(const T* x, int64_t channels, double eps, Acc<T>* means, Acc<T>* rstds) {
  using A = Acc<T>;
  Vec<T> sum[kRows] = {}, square[kRows] = {};
  A mean[kRows];
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i] += lanes.load(x + i * channels + c);
  });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) means[i] = mean[i] = sum_by_halves(sum[i]) / static_cast<A>(channels);
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> d = lanes.keep(lanes.load(x + i * channels + c) - mean[i]);
      square[i] += d * d;
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
    rstds[i] = A(1) / std::sqrt(sum_by_halves(square[i]) / static_cast<A>(channels) + static_cast<A>(eps));
}

// The two passes of forward, by rows, and what a segment's sums become between them.
template <class T>
struct LayerNormGrnForwardPasses {
  using A = Acc<T>;
  static constexpr int64_t kSums = 1, kFactors = 1, kTotals = 0;
  const LayerNormGrnForward& p;

  // The statistics of rows; squares [channels]: their column sums of LN(x)^2.
  void sum(int64_t begin, int64_t end, A* squares) const {
    const int64_t channels = p.channels;
    const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias);
    for (int64_t c = 0; c < channels; ++c) squares[c] = 0;
    each_rows<kMostRows>(begin, end, [&](auto rows, int64_t r) {
      constexpr int kRows = decltype(rows)::value;
      statistics_of_rows<T, kRows>(in<T>(p.x) + r * channels, channels, p.ln_eps, out<A>(p.mean) + r,
                                   out<A>(p.rstd) + r);
      const NormalizedRows<T, kRows> z(in<T>(p.x), channels, p.mean, p.rstd, r);
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
        const Vec<T> w = lanes.load(weight + c), b = lanes.load(bias + c);
        Vec<T> sum = lanes.load(squares + c);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> y = z.load(lanes, i, c) * w + b;
          sum += y * y;
        }
        lanes.store(squares + c, sum);
      });
    });
  }

  // factors [channels]: GRN's scale.
  void finish(int64_t segment, const A* squares, A* factors, A*) const {
    const int64_t channels = p.channels;
    const A* gamma = in<A>(p.gamma);
    A* norm = out<A>(p.norm) + segment * channels;
    for (int64_t c = 0; c < channels; ++c) norm[c] = std::sqrt(squares[c]);
    Vec<T> sum{};
    each_vector<A>(0, channels, [&](auto lanes, int64_t c) { sum += lanes.load(norm + c); });
    const A inverse = static_cast<A>(1.0 / (sum_by_halves(sum) / static_cast<double>(channels) + p.eps));
    for (int64_t c = 0; c < channels; ++c) factors[c] = A(1) + gamma[c] * norm[c] * inverse;
  }

  void write(int64_t begin, int64_t end, const A* factors, A*) const {
    const int64_t channels = p.channels;
    const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias), *beta = in<A>(p.beta);
    each_rows<kMostRows>(begin, end, [&](auto rows, int64_t r) {
      constexpr int kRows = decltype(rows)::value;
      const NormalizedRows<T, kRows> normalized(in<T>(p.x), channels, p.mean, p.rstd, r);
      T* target = out<T>(p.y) + r * channels;
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
        const Vec<T> w = lanes.load(weight + c), b = lanes.load(bias + c);
        const Vec<T> scale = lanes.load(factors + c), shift = lanes.load(beta + c);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> y = normalized.load(lanes, i, c) * w + b;
          lanes.store(target + i * channels + c, y * scale + shift);
        }
      });
    });
  }
};

// The two passes of backward. The gradient of y = LN(x) is dy = grad scale + y kappa, so that LayerNorm's sums of dy
// and dy z follow from the column sums of grad, grad z, y and y z. They are summed from y itself: where w z and b
// cancel, a sum over y loses less than the difference of sums over z.
template <class T>
struct LayerNormGrnBackwardPasses {
  using A = Acc<T>;
  static constexpr int64_t kSums = 5, kFactors = 2, kTotals = 4;
  const LayerNormGrnBackward& p;

  // sums [5, channels]: of grad y, grad, grad z, y and y z.
  void sum(int64_t begin, int64_t end, A* sums) const {
    const int64_t channels = p.channels;
    const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias);
    for (int64_t c = 0; c < kSums * channels; ++c) sums[c] = 0;
    each_rows<kMostRows>(begin, end, [&](auto rows, int64_t r) {
      constexpr int kRows = decltype(rows)::value;
      const NormalizedRows<T, kRows> normalized(in<T>(p.x), channels, p.mean, p.rstd, r);
      const T* grad = in<T>(p.grad) + r * channels;
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
        const Vec<T> w = lanes.load(weight + c), b = lanes.load(bias + c);
        Vec<T> s[kSums];
#pragma GCC unroll 5
        for (int k = 0; k < kSums; ++k) s[k] = lanes.load(sums + k * channels + c);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> g = lanes.load(grad + i * channels + c), z = normalized.load(lanes, i, c), y = z * w + b;
          s[0] += g * y;
          s[1] += g;
          s[2] += g * z;
          s[3] += y;
          s[4] += y * z;
        }
#pragma GCC unroll 5
        for (int k = 0; k < kSums; ++k) lanes.store(sums + k * channels + c, s[k]);
      });
    });
  }

  // factors [2, channels]: dy w = grad * first + y * second. Adds the segment's terms of the gradients of ln_weight,
  // ln_bias, gamma and beta to totals [4, channels].
  void finish(int64_t segment, const A* sums, A* factors, A* totals) const {
    const int64_t channels = p.channels;
    const A *gamma = in<A>(p.gamma), *weight = in<A>(p.ln_weight);
    const A* norm = in<A>(p.norm) + segment * channels;
    Vec<T> sum{}, dot{};
    each_vector<A>(0, channels, [&](auto lanes, int64_t c) {
      const Vec<T> n = lanes.load(norm + c);
      sum += n;
      dot += lanes.load(gamma + c) * lanes.load(sums + c) * n;
    });
    const double width = static_cast<double>(channels), mean = sum_by_halves(sum) / width + p.eps;
    const A inverse = static_cast<A>(1.0 / mean);
    const A pull = static_cast<A>(sum_by_halves(dot) / (width * mean * mean));
    each_vector<A>(0, channels, [&](auto lanes, int64_t c) {
      const auto sum_of = [&](int64_t k) { return lanes.load(sums + k * channels + c); };
      const auto add = [&](int64_t k, Vec<T> term) {
        A* total = totals + k * channels + c;
        lanes.store(total, lanes.load(total) + term);
      };
      const Vec<T> n = lanes.load(norm + c), q = n * inverse, w = lanes.load(weight + c), g = lanes.load(gamma + c);
      const Vec<T> t = sum_of(0), scale = g * q + A(1);
      const auto found = n != 0;  // NaN too
      const Vec<T> kappa = (Vec<T>)((decltype(n != 0))((g * t * inverse - pull) / n) & found);
      add(0, scale * sum_of(2) + kappa * sum_of(4));
      add(1, scale * sum_of(1) + kappa * sum_of(3));
      add(2, q * t);
      add(3, sum_of(1));
      lanes.store(factors + c, w * scale);
      lanes.store(factors + channels + c, w * kappa);
    });
  }

  // dx = rstd (d - mean(d) - z mean(d z)) with d = dy w, which a few rows keep in `kept` [kMostRows, channels].
  void write(int64_t begin, int64_t end, const A* factors, A* kept) const {
    const int64_t channels = p.channels;
    const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias);
    each_rows<4>(begin, end, [&](auto rows, int64_t r) {
      constexpr int kRows = decltype(rows)::value;
      const NormalizedRows<T, kRows> normalized(in<T>(p.x), channels, p.mean, p.rstd, r);
      const T* grad = in<T>(p.grad) + r * channels;
      T* dx = out<T>(p.dx) + r * channels;
      A mean[kRows], slope[kRows];
      Vec<T> sum[kRows] = {}, dot[kRows] = {};
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
        const Vec<T> w = lanes.load(weight + c), b = lanes.load(bias + c);
        const Vec<T> of_grad = lanes.load(factors + c), of_y = lanes.load(factors + channels + c);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> z = normalized.load(lanes, i, c), y = z * w + b;
          const Vec<T> d = lanes.load(grad + i * channels + c) * of_grad + y * of_y;  // 0 in the lanes behind a tail
          lanes.store(kept + i * channels + c, d);
          sum[i] += d;
          dot[i] += d * z;
        }
      });
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        mean[i] = sum_by_halves(sum[i]) / static_cast<A>(channels);
        slope[i] = sum_by_halves(dot[i]) / static_cast<A>(channels);
      }
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const Vec<T> d = lanes.load(kept + i * channels + c), z = normalized.load(lanes, i, c);
          lanes.store(dx + i * channels + c, normalized.rstd[i] * (d - mean[i] - z * slope[i]));
        }
      });
    });
  }
};

template <class A>
CNX_INLINE void add_to(int64_t count, const A* terms, A* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
}

// Segments in groups, whose totals are added up one after the other, then group by group.
constexpr int64_t kSegmentGroups = 32;

// Both passes over all segments. totals [kTotals, channels]: what `finish` sums over the segments.
template <class Passes, class A = typename Passes::A>
void run_passes(const Passes& passes, A* totals, const Threads& threads) {
  constexpr int64_t kFactors = Passes::kFactors, kTotals = Passes::kTotals;
  const Segments& segments = passes.p.segments;
  const int64_t channels = passes.p.channels, each = Passes::kSums * channels;
  const int64_t per_group = ceil_div(segments.count, kSegmentGroups);
  const int64_t groups = per_group ? ceil_div(segments.count, per_group) : 0;
  Scratch<A> group_totals(groups * kTotals * channels);
  const auto totals_of = [&](int64_t segment) {
    A* own = group_totals.get() + segment / per_group * kTotals * channels;
    if (segment % per_group == 0)
      for (int64_t i = 0; i < kTotals * channels; ++i) own[i] = 0;
    return own;
  };
  if (threads.count == 1 || groups >= 4 * threads.count) {
    parallel_for(threads, groups, 1, [&](int64_t first, int64_t last) {
      Scratch<A> sums(each), part(each), factors(kFactors * channels), kept(kMostRows * channels);
      for (int64_t n = first * per_group; n < smaller(last * per_group, segments.count); ++n) {
        const int64_t begin = segments.begin(n), end = segments.begin(n + 1);
        passes.sum(begin, smaller(begin + kRowBlock, end), sums.get());
        for (int64_t r = begin + kRowBlock; r < end; r += kRowBlock) {
          passes.sum(r, smaller(r + kRowBlock, end), part.get());
          add_to(each, part.get(), sums.get());
        }
        passes.finish(n, sums.get(), factors.get(), totals_of(n));
        passes.write(begin, end, factors.get(), kept.get());
      }
    });
  } else {
    const RowBlocks blocks(segments);
    Scratch<A> parts(blocks.size() * each), sums(segments.count * each), factors(segments.count * kFactors * channels);
    parallel_for(threads, blocks.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) passes.sum(blocks[b].begin, blocks[b].end, parts.get() + b * each);
    });
    sum_blocks_by_segment(blocks, parts.get(), segments.count, each, sums.get());
    for (int64_t n = 0; n < segments.count; ++n)
      passes.finish(n, sums.get() + n * each, factors.get() + n * kFactors * channels, totals_of(n));
    parallel_for(threads, blocks.size(), 1, [&](int64_t first, int64_t last) {
      Scratch<A> kept(kMostRows * channels);
      for (int64_t b = first; b < last; ++b)
        passes.write(blocks[b].begin, blocks[b].end, factors.get() + blocks[b].segment * kFactors * channels,
                     kept.get());
    });
  }
  sum_blocks(groups, group_totals.get(), kTotals * channels, totals);
}

template <class T>
void layer_norm_grn_forward_as(const LayerNormGrnForward& p, const Threads& threads) {
  run_passes(LayerNormGrnForwardPasses<T>{p}, static_cast<Acc<T>*>(nullptr), threads);
}

template <class T>
void layer_norm_grn_backward_as(const LayerNormGrnBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  Scratch<A> totals(4 * channels);
  run_passes(LayerNormGrnBackwardPasses<T>{p}, totals.get(), threads);
  void* const targets[] = {p.dln_weight, p.dln_bias, p.dgamma, p.dbeta};
  for (int64_t k = 0; k < 4; ++k)
    for (int64_t c = 0; c < channels; ++c) out<A>(targets[k])[c] = totals.get()[k * channels + c];
}

inline void layer_norm_grn_forward(const LayerNormGrnForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_grn_forward_as, p, t)
}
inline void layer_norm_grn_backward(const LayerNormGrnBackward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_grn_backward_as, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
