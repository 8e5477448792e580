// GRN of LayerNorm in two passes over the rows each way, which leave nothing but statistics. Every pass takes a few
// rows at a time, so that a second look at them, for the centred squares or the column sums, finds them in the L1
// cache.
#pragma once

#include <type_traits>

#include "grn.inl"

namespace cnx {
namespace CNX_ISA {

// Sum of the lanes, by halves: a chain of log2(lanes) additions.
template <class V>
CNX_INLINE auto sum_by_halves(V v) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(v[0])>>;
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    return v[0] + v[1];
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_by_halves(static_cast<Half>(low + high));
  }
}

template <int kRows>
using Rows = std::integral_constant<int, kRows>;

// f(Rows<n>{}, row) for n = 4, then 2, then 1 rows at a time.
template <class F>
CNX_INLINE void each_rows(int64_t begin, int64_t end, const F& f) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) f(Rows<4>{}, r);
  if (r + 2 <= end) {
    f(Rows<2>{}, r);
    r += 2;
  }
  if (r < end) f(Rows<1>{}, r);
}

// Mean and 1/std of rows of x, which lie one behind the other.
template <class T, int kRows>
CNX_INLINE void statistics_of_rows(const T* x, int64_t channels, double eps, Acc<T>* mean, Acc<T>* rstd) {
  using A = Acc<T>;
  Vec<T> sum[kRows] = {}, square[kRows] = {};
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sum[i] += lanes.load(x + i * channels + c);
  });
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) mean[i] = sum_by_halves(sum[i]) / static_cast<A>(channels);
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> d = lanes.keep(lanes.load(x + i * channels + c) - mean[i]);
      square[i] += d * d;
    }
  });
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
    rstd[i] = A(1) / std::sqrt(sum_by_halves(square[i]) / static_cast<A>(channels) + static_cast<A>(eps));
}

// Statistics of the rows of a block, and the column sums of squares of LN(x).
template <class T>
void layer_norm_squares(const LayerNormGrnForward& p, const RowBlock& block, Acc<T>* squares) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias);
  for (int64_t c = 0; c < channels; ++c) squares[c] = 0;
  each_rows(block.begin, block.end, [&](auto rows, int64_t r) {
    constexpr int kRows = decltype(rows)::value;
    const T* x = in<T>(p.x) + r * channels;
    A mean[kRows], rstd[kRows];
    statistics_of_rows<T, kRows>(x, channels, p.ln_eps, mean, rstd);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      out<A>(p.mean)[r + i] = mean[i];
      out<A>(p.rstd)[r + i] = rstd[i];
    }
    each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
      const Vec<T> w = lanes.load(weight + c), b = lanes.load(bias + c);
      Vec<T> sum = lanes.load(squares + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> y = (lanes.load(x + i * channels + c) - mean[i]) * rstd[i] * w + b;
        sum += y * y;
      }
      lanes.store(squares + c, sum);
    });
  });
}

// y = z * slope + offset, with both of the block's segment.
template <class T>
void scale_normalized(const LayerNormGrnForward& p, const RowBlock& block, const Acc<T>* slope, const Acc<T>* offset) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  each_rows(block.begin, block.end, [&](auto rows, int64_t r) {
    constexpr int kRows = decltype(rows)::value;
    const T* x = in<T>(p.x) + r * channels;
    T* y = out<T>(p.y) + r * channels;
    A mean[kRows], rstd[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      mean[i] = out<A>(p.mean)[r + i];
      rstd[i] = out<A>(p.rstd)[r + i];
    }
    each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
      const Vec<T> s = lanes.load(slope + c), o = lanes.load(offset + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> z = (lanes.load(x + i * channels + c) - mean[i]) * rstd[i];
        lanes.store(y + i * channels + c, z * s + o);
      }
    });
  });
}

template <class T>
void layer_norm_grn_forward_as(const LayerNormGrnForward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels, size = p.segments.count * channels;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * channels), squares(size), slope(size), offset(size);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) layer_norm_squares<T>(p, blocks[b], partial.get() + b * channels);
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, channels, squares.get());
  grn_scale({.segments = p.segments,
             .channels = channels,
             .gamma = p.gamma,
             .eps = p.eps,
             .norm = p.norm,
             .scale = slope.get()},
            squares.get());
  const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias), *beta = in<A>(p.beta);
  for (int64_t n = 0; n < size; n += channels) {
    A *s = slope.get() + n, *o = offset.get() + n;
    for (int64_t c = 0; c < channels; ++c) {
      o[c] = bias[c] * s[c] + beta[c];
      s[c] = weight[c] * s[c];
    }
  }
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = blocks[b].segment * channels;
      scale_normalized<T>(p, blocks[b], slope.get() + at, offset.get() + at);
    }
  });
}

// What a column of a block, and of a segment, is summed to.
enum NormalizedSums { kGradNormalized, kGrad, kSquare, kNormalized, kNormalizedSums };

// sums [kNormalizedSums, channels]: over the rows of grad z, grad, z^2 and z.
template <class T>
void normalized_sums(const LayerNormGrnBackward& p, const RowBlock& block, Acc<T>* sums) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  for (int64_t c = 0; c < kNormalizedSums * channels; ++c) sums[c] = 0;
  each_rows(block.begin, block.end, [&](auto rows, int64_t r) {
    constexpr int kRows = decltype(rows)::value;
    const T *grad = in<T>(p.grad) + r * channels, *x = in<T>(p.x) + r * channels;
    A mean[kRows], rstd[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      mean[i] = in<A>(p.mean)[r + i];
      rstd[i] = in<A>(p.rstd)[r + i];
    }
    each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
      Vec<T> s[kNormalizedSums];
#pragma GCC unroll 4
      for (int k = 0; k < kNormalizedSums; ++k) s[k] = lanes.load(sums + k * channels + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> g = lanes.load(grad + i * channels + c);
        const Vec<T> z = (lanes.load(x + i * channels + c) - mean[i]) * rstd[i];
        s[kGradNormalized] += g * z;
        s[kGrad] += g;
        s[kSquare] += z * z;
        s[kNormalized] += z;
      }
#pragma GCC unroll 4
      for (int k = 0; k < kNormalizedSums; ++k) lanes.store(sums + k * channels + c, s[k]);
    });
  });
}

// The gradient of LN(x), times its weight, is grad * of_grad + z * of_normalized + constant in a segment.
template <class A>
struct NormalizedGradient {
  A *of_grad, *of_normalized, *constant;  // [count, channels]
};

// dx = rstd (d - mean(d) - z mean(d z)), d as above.
template <class T>
void gradient_through_norm(const LayerNormGrnBackward& p, const RowBlock& block, const NormalizedGradient<Acc<T>>& d) {
  using A = Acc<T>;
  const int64_t channels = p.channels, at = block.segment * channels;
  const A *of_grad = d.of_grad + at, *of_normalized = d.of_normalized + at, *constant = d.constant + at;
  each_rows(block.begin, block.end, [&](auto rows, int64_t r) {
    constexpr int kRows = decltype(rows)::value;
    const T *grad = in<T>(p.grad) + r * channels, *x = in<T>(p.x) + r * channels;
    T* dx = out<T>(p.dx) + r * channels;
    A mean[kRows], rstd[kRows], d_mean[kRows], dz_mean[kRows];
    Vec<T> sum[kRows] = {}, dot[kRows] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      mean[i] = in<A>(p.mean)[r + i];
      rstd[i] = in<A>(p.rstd)[r + i];
    }
    each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
      const Vec<T> f = lanes.load(of_grad + c), k = lanes.load(of_normalized + c), o = lanes.load(constant + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> z = (lanes.load(x + i * channels + c) - mean[i]) * rstd[i];
        const Vec<T> v = lanes.load(grad + i * channels + c) * f + (z * k + o);  // 0 in the lanes behind a tail
        sum[i] += v;
        dot[i] += v * z;
      }
    });
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      d_mean[i] = sum_by_halves(sum[i]) / static_cast<A>(channels);
      dz_mean[i] = sum_by_halves(dot[i]) / static_cast<A>(channels);
    }
    each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
      const Vec<T> f = lanes.load(of_grad + c), k = lanes.load(of_normalized + c), o = lanes.load(constant + c);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> z = (lanes.load(x + i * channels + c) - mean[i]) * rstd[i];
        const Vec<T> v = lanes.load(grad + i * channels + c) * f + (z * k + o);
        lanes.store(dx + i * channels + c, rstd[i] * (v - d_mean[i] - z * dz_mean[i]));
      }
    });
  });
}

// From the column sums of each segment: the parameters' gradients, and what gradient_through_norm needs. With
// y = z w + b, GRN's t = sum grad y = w sum(grad z) + b sum(grad), and LN's own sums of dy = grad scale + y kappa.
template <class T>
void layer_norm_grn_gradients(const LayerNormGrnBackward& p, const Acc<T>* sums, const NormalizedGradient<Acc<T>>& d) {
  using A = Acc<T>;
  const int64_t channels = p.channels, count = p.segments.count;
  const A *weight = in<A>(p.ln_weight), *bias = in<A>(p.ln_bias);
  A *dweight = out<A>(p.dln_weight), *dbias = out<A>(p.dln_bias), *dbeta = out<A>(p.dbeta);
  for (int64_t n = 0; n < count; ++n) {
    const A *grad_z = sums + (n * kNormalizedSums + kGradNormalized) * channels, *grad = grad_z + channels;
    A* t = d.constant + n * channels;
    for (int64_t c = 0; c < channels; ++c) t[c] = weight[c] * grad_z[c] + bias[c] * grad[c];
  }
  A *scale = d.of_grad, *kappa = d.of_normalized;
  grn_gradient({.segments = p.segments,
                .channels = channels,
                .norm = p.norm,
                .gamma = p.gamma,
                .eps = p.eps,
                .scale = scale,
                .kappa = kappa,
                .dgamma = p.dgamma},
               d.constant, channels);
  for (int64_t c = 0; c < channels; ++c) dweight[c] = dbias[c] = dbeta[c] = 0;
  for (int64_t n = 0; n < count; ++n) {
    const A rows = static_cast<A>(p.segments.begin(n + 1) - p.segments.begin(n));
    const A* s = sums + n * kNormalizedSums * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = n * channels + c;
      const A w = weight[c], b = bias[c], z = s[kNormalized * channels + c], g = s[kGrad * channels + c];
      dweight[c] += scale[at] * s[kGradNormalized * channels + c] + kappa[at] * (w * s[kSquare * channels + c] + b * z);
      dbias[c] += scale[at] * g + kappa[at] * (w * z + b * rows);
      dbeta[c] += g;
      d.constant[at] = b * w * kappa[at];
      kappa[at] = w * w * kappa[at];
      scale[at] = w * scale[at];
    }
  }
}

template <class T>
void layer_norm_grn_backward_as(const LayerNormGrnBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t each = kNormalizedSums * p.channels, size = p.segments.count * p.channels;
  const RowBlocks blocks(p.segments);
  Scratch<A> partial(blocks.size() * each), sums(p.segments.count * each), of_grad(size), of_normalized(size),
      constant(size);
  const NormalizedGradient<A> d{of_grad.get(), of_normalized.get(), constant.get()};
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) normalized_sums<T>(p, blocks[b], partial.get() + b * each);
  });
  sum_blocks_by_segment(blocks, partial.get(), p.segments.count, each, sums.get());
  layer_norm_grn_gradients<T>(p, sums.get(), d);
  parallel_for(threads, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) gradient_through_norm<T>(p, blocks[b], d);
  });
}

inline void layer_norm_grn_forward(const LayerNormGrnForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_grn_forward_as, p, t)
}
inline void layer_norm_grn_backward(const LayerNormGrnBackward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_grn_backward_as, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
