// LayerNorm forward and backward, and its form that writes 2x2 blocks for the downsampling GEMM.
#pragma once

#include <cmath>

#include "parallel.h"

namespace cnx {
namespace CNX_ISA {

// Mean and 1/std of a row, two passes over the row in cache (biased variance, as the definition has it).
template <class T>
CNX_INLINE void row_statistics(const T* x, int64_t channels, double eps, Acc<T>& mean, Acc<T>& rstd) {
  Vec<T> sum{};
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) { sum += lanes.load(x + c); });
  mean = horizontal_sum(sum) / static_cast<Acc<T>>(channels);
  Vec<T> square{};
  const int64_t whole = channels / kLanes<T> * kLanes<T>;
  for (int64_t c = 0; c < whole; c += kLanes<T>) {
    const Vec<T> d = Full::load(x + c) - mean;
    square += d * d;
  }
  Acc<T> rest = 0;
  if (whole < channels) {
    const Vec<T> d = Tail(static_cast<int>(channels - whole)).load(x + whole) - mean;
    for (int i = 0; i < static_cast<int>(channels - whole); ++i) rest += d[i] * d[i];
  }
  const Acc<T> variance = (horizontal_sum(square) + rest) / static_cast<Acc<T>>(channels);
  rstd = static_cast<Acc<T>>(1) / std::sqrt(variance + static_cast<Acc<T>>(eps));
}

// y = (x - mean) * rstd [* weight + bias]
template <class T, class X>
CNX_INLINE void normalize_row(const X* x, int64_t channels, Acc<T> mean, Acc<T> rstd, const Acc<T>* weight,
                              const Acc<T>* bias, T* y) {
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
    Vec<T> v = (lanes.load(x + c) - mean) * rstd;
    if (weight) v = v * lanes.load(weight + c);
    if (bias) v = v + lanes.load(bias + c);
    lanes.store(y + c, v);
  });
}

template <class T>
void layer_norm_forward_as(const LayerNormForward& p, const Threads& threads) {
  using A = Acc<T>;
  parallel_for(threads, p.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = in<T>(p.x) + r * p.channels;
      A mean, rstd;
      row_statistics(x, p.channels, p.eps, mean, rstd);
      normalize_row(x, p.channels, mean, rstd, in<A>(p.weight), in<A>(p.bias), out<T>(p.y) + r * p.channels);
      out<A>(p.mean)[r] = mean;
      out<A>(p.rstd)[r] = rstd;
    }
  });
}

// dx = rstd * (g - mean(g) - z * mean(g z)) with g = grad * weight, z = (x - mean) * rstd.
template <class T>
CNX_INLINE void layer_norm_backward_row(const T* grad, const T* x, Acc<T> mean, Acc<T> scale, Acc<T> rstd,
                                        const Acc<T>* weight, int64_t channels, T* dx) {
  Vec<T> sum{}, dot{};
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
    Vec<T> g = lanes.load(grad + c);
    if (weight) g = g * lanes.load(weight + c);
    sum += g;
    dot += g * ((lanes.load(x + c) - mean) * scale);  // tail lanes: g is zero there
  });
  const Acc<T> g_mean = horizontal_sum(sum) / static_cast<Acc<T>>(channels);
  const Acc<T> gz_mean = horizontal_sum(dot) / static_cast<Acc<T>>(channels);
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
    Vec<T> g = lanes.load(grad + c);
    if (weight) g = g * lanes.load(weight + c);
    const Vec<T> z = (lanes.load(x + c) - mean) * scale;
    lanes.store(dx + c, rstd * (g - g_mean - z * gz_mean));
  });
}

// dweight = sum over rows of grad * z, dbias = sum of grad.
template <class T>
void layer_norm_parameter_sums(const LayerNormBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels, blocks = ceil_div(p.rows, kRowBlock);
  Scratch<A> partial(blocks * 2 * channels);
  parallel_for(threads, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t r0 = b * kRowBlock, r1 = smaller(r0 + kRowBlock, p.rows);
      A* dweight = partial.get() + b * 2 * channels;
      A* dbias = dweight + channels;
      each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
        Vec<T> w{}, s{};
        for (int64_t r = r0; r < r1; ++r) {
          const A rstd = p.mean ? in<A>(p.rstd)[r] : A(1);
          const A mean = p.mean ? in<A>(p.mean)[r] : A(0);
          const Vec<T> g = lanes.load(in<T>(p.grad) + r * channels + c);
          w += g * ((lanes.load(in<T>(p.x) + r * channels + c) - mean) * rstd);
          s += g;
        }
        lanes.store(dweight + c, w);
        lanes.store(dbias + c, s);
      });
    }
  });
  Scratch<A> sums(2 * channels);
  sum_blocks(blocks, partial.get(), 2 * channels, sums.get());
  for (int64_t c = 0; c < channels; ++c) {
    out<A>(p.dweight)[c] = sums.get()[c];
    out<A>(p.dbias)[c] = sums.get()[channels + c];
  }
}

template <class T>
void layer_norm_backward_as(const LayerNormBackward& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  parallel_for(threads, p.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const A rstd = in<A>(p.rstd)[r];
      const A mean = p.mean ? in<A>(p.mean)[r] : A(0);
      layer_norm_backward_row(in<T>(p.grad) + r * channels, in<T>(p.x) + r * channels, mean, p.mean ? rstd : A(1), rstd,
                              in<A>(p.weight), channels, out<T>(p.dx) + r * channels);
    }
  });
  layer_norm_parameter_sums<T>(p, threads);
}

// Row of z, [maps, h/2, w/2, 2, 2], that holds pixel (y, x) of a map.
CNX_INLINE int64_t blocked_row(int64_t map, int64_t y, int64_t x, int64_t height, int64_t width) {
  return ((map * (height / 2) + y / 2) * (width / 2) + x / 2) * 4 + (y % 2) * 2 + x % 2;
}

template <class T>
void space_to_depth_norm_forward_as(const SpaceToDepthNorm& p, const Threads& threads) {
  using A = Acc<T>;
  parallel_for(threads, p.maps * p.height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      for (int64_t col = 0; col < p.width; ++col) {
        const int64_t r = line * p.width + col;
        const T* x = in<T>(p.x) + r * p.channels;
        const int64_t target = blocked_row(line / p.height, line % p.height, col, p.height, p.width);
        A mean, rstd;
        row_statistics(x, p.channels, p.eps, mean, rstd);
        normalize_row<T>(x, p.channels, mean, rstd, in<A>(p.weight), in<A>(p.bias),
                         out<T>(p.out) + target * p.channels);
        out<A>(p.rstd)[r] = rstd;
      }
    }
  });
}

// The parameters' gradients do not care for the order of pixels: they are sums over the rows as they lie.
template <class T>
void space_to_depth_norm_backward_as(const SpaceToDepthNorm& p, const Threads& threads) {
  using A = Acc<T>;
  const int64_t rows = p.maps * p.height * p.width;
  parallel_for(threads, p.maps * p.height, 8, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      for (int64_t col = 0; col < p.width; ++col) {
        const int64_t r = line * p.width + col;
        const int64_t source = blocked_row(line / p.height, line % p.height, col, p.height, p.width) * p.channels;
        layer_norm_backward_row<T>(in<T>(p.x) + source, in<T>(p.z) + source, A(0), A(1), in<A>(p.rstd)[r],
                                   in<A>(p.weight), p.channels, out<T>(p.out) + r * p.channels);
      }
    }
  });
  layer_norm_parameter_sums<T>(
      {p.dtype, rows, p.channels, p.x, p.z, nullptr, p.rstd, nullptr, nullptr, p.dweight, p.dbias}, threads);
}

inline void layer_norm_forward(const LayerNormForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_forward_as, p, t)
}
inline void layer_norm_backward(const LayerNormBackward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, layer_norm_backward_as, p, t)
}
inline void space_to_depth_norm_forward(const SpaceToDepthNorm& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, space_to_depth_norm_forward_as, p, t)
}
inline void space_to_depth_norm_backward(const SpaceToDepthNorm& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, space_to_depth_norm_backward_as, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
