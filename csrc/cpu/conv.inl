// Depthwise convolution: forward (also the gradient with respect to x, with flipped taps), fused LayerNorm, and the
// gradients of weight and bias.
#include "conv_generic.h"
#include "conv_small_patch.h"
#include "conv_tile.h"
#include "norm.inl"

namespace cnx {
namespace CNX_ISA {

// [C, K, K] -> vectors [channel block][tap][lane], zero beyond C, optionally turned by 180 degrees.
template <class T>
void pack_by_block(const Acc<T>* weight, int64_t channels, int taps, bool flip, Acc<T>* packed) {
  constexpr int lanes = kLanes<T>;
  for (int64_t block = 0; block * lanes < channels; ++block)
    for (int tap = 0; tap < taps; ++tap)
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t c = block * lanes + lane;
        packed[(block * taps + tap) * lanes + lane] =
            c < channels ? weight[c * taps + (flip ? taps - 1 - tap : tap)] : Acc<T>(0);
      }
}

// [C, K, K] -> [tap][C], optionally turned by 180 degrees.
template <class T>
void pack_by_tap(const Acc<T>* weight, int64_t channels, int taps, bool flip, Acc<T>* packed) {
  for (int tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c)
      packed[tap * channels + c] = weight[c * taps + (flip ? taps - 1 - tap : tap)];
}

// Writes one finished pixel row of all channels: plus residual, or normalised.
template <class T>
CNX_INLINE void finish_pixel(const ConvForward& p, int64_t row, const Acc<T>* value) {
  using A = Acc<T>;
  const int64_t channels = p.geometry.channels;
  T* y = out<T>(p.y) + row * channels;
  if (p.normalize) {
    A mean, rstd;
    row_statistics(value, channels, p.eps, mean, rstd);
    normalize_row<T>(value, channels, mean, rstd, in<A>(p.ln_weight), in<A>(p.ln_bias), y);
    out<A>(p.rstd)[row] = rstd;
    return;
  }
  const T* residual = p.residual ? in<T>(p.residual) + row * channels : nullptr;
  each_vector<T>(0, channels, [&](auto lanes, int64_t c) {
    Vec<T> v = lanes.load(value + c);
    if (residual) v += lanes.load(residual + c);
    lanes.store(y + c, v);
  });
}

template <class T, class Lanes>
CNX_INLINE void convolve_block(const ConvForward& p, int64_t map, int64_t y, int64_t c, const Lanes& lanes,
                               const Acc<T>* packed, Acc<T>* line) {
  const ConvGeometry& g = p.geometry;
  const Vec<T>* w = reinterpret_cast<const Vec<T>*>(packed);
  const Tiling tiling(g.width);
  Vec<T> start{};
  if (p.bias) start = lanes.load(in<Acc<T>>(p.bias) + c);
  for (int64_t tile = 0; tile < tiling.count; ++tile) {
    const int64_t x0 = tiling.start(tile);
    with_tile(tiling.size(tile), [&](auto constant) {
      constexpr int size = decltype(constant)::value;
      Vec<T> sums[size];
      for (int o = 0; o < size; ++o) sums[o] = start;
      for (int ky = 0; ky < kTap; ++ky)
        each_pair_of_runs<T, size>(input_runs(g, in<T>(p.x) + c, map, y + ky - kRadius, x0, size), g.channels, lanes,
                                   [&](Vec<T> v, int o, int tap)
                                       __attribute__((always_inline)) { sums[o] += v * w[ky * kTap + tap]; });
      if (line) {
        for (int o = 0; o < size; ++o) lanes.store(line + (x0 + o) * g.channels + c, sums[o]);
        return;
      }
      const int64_t row = (map * g.height + y) * g.width + x0;
      T* target = out<T>(p.y) + row * g.channels + c;
      const T* residual = p.residual ? in<T>(p.residual) + row * g.channels + c : nullptr;
      for (int o = 0; o < size; ++o) {
        if (residual) sums[o] += lanes.load(residual + o * g.channels);
        lanes.store(target + o * g.channels, sums[o]);
      }
    });
  }
}

// Row loops: a unit is a packed patch, or one line of a dense map.
template <class T>
void conv_forward_tile(const ConvForward& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  constexpr int lanes = kLanes<T>, taps = kTap * kTap;
  const int64_t lines = g.neighbours ? g.height : 1;
  Scratch<A> packed(ceil_div(g.channels, lanes) * taps * lanes);
  pack_by_block<T>(in<A>(p.weight), g.channels, taps, p.flip, packed.get());
  parallel_for(threads, g.maps * g.height / lines, g.neighbours ? 1 : 4, [&](int64_t begin, int64_t end) {
    const int64_t line_size = g.width * g.channels;
    Scratch<A> buffer(p.normalize ? lines * line_size : 1);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * lines, map = first / g.height, y0 = first % g.height;
      int64_t c = 0;
      for (; c < g.channels; c += lanes) {
        const A* w = packed.get() + c * taps;
        for (int64_t i = 0; i < lines; ++i) {
          A* line = p.normalize ? buffer.get() + i * line_size : nullptr;
          if (c + lanes <= g.channels)
            convolve_block<T>(p, map, y0 + i, c, Full(lanes), w, line);
          else
            convolve_block<T>(p, map, y0 + i, c, Tail(static_cast<int>(g.channels - c)), w, line);
        }
      }
      if (p.normalize)
        for (int64_t pixel = 0; pixel < lines * g.width; ++pixel)
          finish_pixel<T>(p, first * g.width + pixel, buffer.get() + pixel * g.channels);
    }
  });
}

// One patch of side 1 or 2 at a time, several vectors of channels together to hide the multiply-adds' latency.
template <class T, int kSide>
void conv_forward_small_patch(const ConvForward& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  constexpr int lanes = kLanes<T>, taps = kTap * kTap, pixels = kSide * kSide, group = kSide == 1 ? 4 : 2;
  Scratch<A> packed(ceil_div(g.channels, lanes) * taps * lanes);
  pack_by_block<T>(in<A>(p.weight), g.channels, taps, p.flip, packed.get());
  const Vec<T>* w = reinterpret_cast<const Vec<T>*>(packed.get());
  parallel_for(threads, g.maps, 4, [&](int64_t begin, int64_t end) {
    Scratch<A> value(pixels * g.channels);
    for (int64_t patch = begin; patch < end; ++patch) {
      int64_t c = 0;
      for (; c + group * lanes <= g.channels; c += group * lanes) {
        Vec<T> sums[pixels][group];
        for (int v = 0; v < group; ++v) {
          const Vec<T> start = p.bias ? Full::load(in<A>(p.bias) + c + v * lanes) : Vec<T>{};
          for (int o = 0; o < pixels; ++o) sums[o][v] = start;
        }
        convolve_small_patch<T, kSide, group>(g, in<T>(p.x) + c, patch, Full(lanes), w + c / lanes * taps, sums);
        for (int o = 0; o < pixels; ++o)
          for (int v = 0; v < group; ++v) Full::store(value.get() + o * g.channels + c + v * lanes, sums[o][v]);
      }
      each_vector<T>(c, g.channels, [&](auto rest, int64_t at) {
        const Vec<T> start = p.bias ? rest.load(in<A>(p.bias) + at) : Vec<T>{};
        Vec<T> sums[pixels][1];
        for (int o = 0; o < pixels; ++o) sums[o][0] = start;
        convolve_small_patch<T, kSide, 1>(g, in<T>(p.x) + at, patch, rest, w + at / lanes * taps, sums);
        for (int o = 0; o < pixels; ++o) rest.store(value.get() + o * g.channels + at, sums[o][0]);
      });
      for (int o = 0; o < pixels; ++o) finish_pixel<T>(p, patch * pixels + o, value.get() + o * g.channels);
    }
  });
}

template <class T>
void conv_forward_generic(const ConvForward& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  const int taps = g.kernel_size * g.kernel_size;
  Scratch<A> packed(taps * g.channels);
  pack_by_tap<T>(in<A>(p.weight), g.channels, taps, p.flip, packed.get());
  parallel_for(threads, g.maps * g.height, 4, [&](int64_t begin, int64_t end) {
    Scratch<A> value(g.channels);
    TapList list;
    for (int64_t line = begin; line < end; ++line)
      for (int64_t x = 0; x < g.width; ++x) {
        list_taps(g, line / g.height, line % g.height, x, list);
        convolve_pixel<T>(list, in<T>(p.x), packed.get(), in<A>(p.bias), g.channels, value.get());
        finish_pixel<T>(p, line * g.width + x, value.get());
      }
  });
}

template <class T, class Lanes>
CNX_INLINE void weight_grad_block(const ConvWeightGrad& p, int64_t first_line, int64_t last_line, int64_t c,
                                  const Lanes& lanes, Acc<T>* partial) {
  const ConvGeometry& g = p.geometry;
  const Tiling tiling(g.width);
  constexpr int taps = kTap * kTap;
  Vec<T> dw[taps] = {};
  Vec<T> db{};
  // lines of one patch (or of a stretch of a dense map) under one row of taps before the next: the seven sums of
  // that row stay in registers
  const int64_t stretch = g.neighbours ? g.height : 4;
  for (int64_t line0 = first_line; line0 < last_line; line0 += stretch) {
    const int64_t line1 = smaller(line0 + stretch, last_line);
    for (int64_t tile = 0; tile < tiling.count; ++tile) {
      const int64_t x0 = tiling.start(tile);
      with_tile(tiling.size(tile), [&](auto constant) {
        constexpr int size = decltype(constant)::value;
        for (int ky = 0; ky < kTap; ++ky) {
          Vec<T> sums[kTap];
          for (int t = 0; t < kTap; ++t) sums[t] = dw[ky * kTap + t];
          for (int64_t line = line0; line < line1; ++line) {
            const int64_t map = line / g.height, y = line % g.height;
            const Runs<T> runs = input_runs(g, in<T>(p.x) + c, map, y + ky - kRadius, x0, size);
            const T* grad = in<T>(p.grad) + (line * g.width + x0) * g.channels + c;
            Vec<T> d[size];
            for (int o = 0; o < size; ++o) d[o] = lanes.load(grad + o * g.channels);
            each_pair_of_runs<T, size>(runs, g.channels, lanes,
                                       [&](Vec<T> v, int o, int tap)
                                           __attribute__((always_inline)) { sums[tap] += v * d[o]; });
            if (ky == kRadius)
              for (int o = 0; o < size; ++o) db += d[o];
          }
          for (int t = 0; t < kTap; ++t) dw[ky * kTap + t] = sums[t];
        }
      });
    }
  }
  for (int t = 0; t < taps; ++t) lanes.store(partial + t * g.channels + c, dw[t]);
  lanes.store(partial + taps * g.channels + c, db);
}

// partial [parts][K*K + 1][C] summed in order into dweight [C, K*K] and dbias [C].
template <class A>
void reduce_weight_grad(const ConvWeightGrad& p, const A* partial, int64_t parts, int taps, const Threads& threads) {
  const int64_t channels = p.geometry.channels, size = (taps + 1) * channels;
  parallel_for(threads, channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int t = 0; t <= taps; ++t) {
        A sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partial[part * size + t * channels + c];
        if (t < taps)
          out<A>(p.dweight)[c * taps + t] = sum;
        else
          out<A>(p.dbias)[c] = sum;
      }
  });
}

template <class T>
void conv_weight_grad_tile(const ConvWeightGrad& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  constexpr int lanes = kLanes<T>, taps = kTap * kTap;
  const int64_t blocks = ceil_div(g.channels, lanes), maps = g.maps;
  // at least 16 units of work, more parts where channels are few; fixed by shape
  const int64_t parts = larger(1, smaller(maps, ceil_div(32, blocks)));
  Scratch<A> partial(parts * (taps + 1) * g.channels);
  parallel_for(threads, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / blocks, c = unit % blocks * lanes;
      const int64_t first = maps * part / parts * g.height, last = maps * (part + 1) / parts * g.height;
      A* target = partial.get() + part * (taps + 1) * g.channels;
      if (c + lanes <= g.channels)
        weight_grad_block<T>(p, first, last, c, Full(lanes), target);
      else
        weight_grad_block<T>(p, first, last, c, Tail(static_cast<int>(g.channels - c)), target);
    }
  });
  reduce_weight_grad(p, partial.get(), parts, taps, threads);
}

template <class T, int kSide>
void conv_weight_grad_small_patch(const ConvWeightGrad& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  constexpr int lanes = kLanes<T>, taps = kTap * kTap, pixels = kSide * kSide;
  const int64_t blocks = ceil_div(g.channels, lanes);
  const int64_t parts = larger(1, smaller(g.maps, ceil_div(16, blocks)));
  Scratch<A> partial(parts * (taps + 1) * g.channels);
  parallel_for(threads, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / blocks, c = unit % blocks * lanes;
      const int64_t first = g.maps * part / parts, last = g.maps * (part + 1) / parts;
      A* target = partial.get() + part * (taps + 1) * g.channels + c;
      each_vector<T>(c, smaller(c + lanes, g.channels), [&](auto some, int64_t) {
        Vec<T> dw[taps] = {};
        Vec<T> db{};
        accumulate_small_patch<T, kSide>(g, in<T>(p.x) + c, in<T>(p.grad) + c, first, last, some, dw);
        for (int64_t row = first * pixels; row < last * pixels; ++row)
          db += some.load(in<T>(p.grad) + row * g.channels + c);
        for (int t = 0; t < taps; ++t) some.store(target + t * g.channels, dw[t]);
        some.store(target + taps * g.channels, db);
      });
    }
  });
  reduce_weight_grad(p, partial.get(), parts, taps, threads);
}

template <class T>
void conv_weight_grad_generic(const ConvWeightGrad& p, const Threads& threads) {
  using A = Acc<T>;
  const ConvGeometry& g = p.geometry;
  const int taps = g.kernel_size * g.kernel_size;
  constexpr int64_t span = 128;
  const int64_t lines = g.maps * g.height, spans = ceil_div(g.channels, span);
  const int64_t parts = larger(1, smaller(ceil_div(lines, 32), ceil_div(16, spans)));
  const int64_t size = (taps + 1) * g.channels;
  Scratch<A> partial(parts * size);
  parallel_for(threads, parts * spans, 1, [&](int64_t begin, int64_t end) {
    TapList list;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t part = unit / spans, c0 = unit % spans * span, c1 = smaller(c0 + span, g.channels);
      A* dw = partial.get() + part * size;
      for (int t = 0; t <= taps; ++t)
        for (int64_t c = c0; c < c1; ++c) dw[t * g.channels + c] = 0;
      for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
        for (int64_t x = 0; x < g.width; ++x) {
          list_taps(g, line / g.height, line % g.height, x, list);
          const T* grad = in<T>(p.grad) + (line * g.width + x) * g.channels;
          accumulate_pixel<T>(list, in<T>(p.x), grad, g.channels, c0, c1, taps, dw);
        }
    }
  });
  reduce_weight_grad(p, partial.get(), parts, taps, threads);
}

enum class ConvKernel { tile, small_patch, generic };

CNX_INLINE ConvKernel kernel_of(const ConvGeometry& g) {
  if (g.kernel_size != kTap) return ConvKernel::generic;
  return !g.neighbours || g.height >= kRadius ? ConvKernel::tile : ConvKernel::small_patch;
}

template <class T>
void conv_forward_of(const ConvForward& p, const Threads& t) {
  switch (kernel_of(p.geometry)) {
    case ConvKernel::tile:
      return conv_forward_tile<T>(p, t);
    case ConvKernel::small_patch:
      return p.geometry.height == 1 ? conv_forward_small_patch<T, 1>(p, t) : conv_forward_small_patch<T, 2>(p, t);
    case ConvKernel::generic:
      return conv_forward_generic<T>(p, t);
  }
}
template <class T>
void conv_weight_grad_of(const ConvWeightGrad& p, const Threads& t) {
  switch (kernel_of(p.geometry)) {
    case ConvKernel::tile:
      return conv_weight_grad_tile<T>(p, t);
    case ConvKernel::small_patch:
      return p.geometry.height == 1 ? conv_weight_grad_small_patch<T, 1>(p, t)
                                    : conv_weight_grad_small_patch<T, 2>(p, t);
    case ConvKernel::generic:
      return conv_weight_grad_generic<T>(p, t);
  }
}

inline void conv_forward(const ConvForward& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, conv_forward_of, p, t)
}
inline void conv_weight_grad(const ConvWeightGrad& p, const Threads& t) {
  CNX_DISPATCH(p.dtype, conv_weight_grad_of, p, t)
}

}  // namespace CNX_ISA
}  // namespace cnx
