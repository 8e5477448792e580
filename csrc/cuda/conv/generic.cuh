// Every other convolution: any kernel size, any patch side, dense or packed, float64, and rows that are not whole
// words. One thread computes N channels of one pixel and finds each tap's pixel on the way.
#pragma once

#include "warp.cuh"

namespace cnx {
namespace cuda {

// [C, taps] -> [taps, C], turned for flip, so that the lanes of a warp read weights side by side.
template <class A>
__global__ void __launch_bounds__(256)
    conv_turn_weights(const A* weight, int64_t channels, int taps, bool flip, A* out) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < channels * taps;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t tap = i / channels, c = i - tap * channels;
    out[i] = weight[c * taps + (flip ? taps - 1 - tap : tap)];
  }
}

template <class T, int N>
__device__ __forceinline__ void add_tap(Acc<T> (&sum)[N], const T* x, const Acc<T>* w) {
  Acc<T> in[N];
  unpack<T, N>(load<T, N>(x), in);
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] += in[i] * w[i];
}

// weight: [taps, C].
template <class T, int N>
__global__ void __launch_bounds__(256) conv_generic(ConvForward p, const Acc<T>* weight) {
  const ConvGeometry& g = p.geometry;
  const int64_t channels = g.channels, height = g.height, width = g.width;
  const int size = g.kernel_size, radius = size / 2;
  const int64_t vectors = channels / N, count = g.maps * height * width * vectors;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t pixel = i / vectors, c = (i - pixel * vectors) * N;
    const int64_t line = pixel / width, x0 = pixel - line * width, map = line / height, y0 = line - map * height;
    const T* x = static_cast<const T*>(p.x) + c;
    Acc<T> sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = p.bias ? static_cast<const Acc<T>*>(p.bias)[c + k] : Acc<T>(0);
    const Acc<T>* w = weight + c;
    if (g.neighbours) {
      const int64_t reach = (radius + height - 1) / height, window = 2 * reach + 1;
      const int32_t* around = g.neighbours + map * window * window;
      // patch and row (column) inside it of the window's first row (column); both counted from the window's corner
      const int64_t corner_y = y0 - radius + reach * height, corner_x = x0 - radius + reach * width;
      int64_t py = corner_y / height, yy = corner_y - py * height;
      const int64_t px0 = corner_x / width, xx0 = corner_x - px0 * width;
      for (int ky = 0; ky < size; ++ky) {
        int64_t px = px0, xx = xx0;
        for (int kx = 0; kx < size; ++kx, w += channels) {
          const int64_t slot = around[py * window + px];
          if (slot >= 0) add_tap<T, N>(sum, x + ((slot * height + yy) * width + xx) * channels, w);
          if (++xx == width) {
            xx = 0;
            ++px;
          }
        }
        if (++yy == height) {
          yy = 0;
          ++py;
        }
      }
    } else {
      for (int ky = 0; ky < size; ++ky) {
        const int64_t yy = y0 + ky - radius;
        for (int kx = 0; kx < size; ++kx, w += channels) {
          const int64_t xx = x0 + kx - radius;
          if (yy >= 0 && yy < height && xx >= 0 && xx < width)
            add_tap<T, N>(sum, x + ((map * height + yy) * width + xx) * channels, w);
        }
      }
    }
    const int64_t at = pixel * channels + c;
    if (p.residual) {
      Acc<T> r[N];
      unpack<T, N>(load<T, N>(static_cast<const T*>(p.residual) + at), r);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += r[k];
    }
    store<T, N>(static_cast<T*>(p.y) + at, pack<T, N>(sum));
  }
}

// LN over the channels of each row of y, in place, one warp a row: for the convolutions that do not normalise
// themselves. The convolution's result has been rounded to T here, as it is in PyTorch.
template <class T, int N>
__global__ void __launch_bounds__(256) conv_normalize(ConvForward p, int64_t rows) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const int64_t channels = p.geometry.channels, warps = int64_t{gridDim.x} * (blockDim.x / 32);
  for (int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; row < rows; row += warps) {
    T* y = static_cast<T*>(p.y) + row * channels;
    A total = 0, squares = 0, v[N];
    for (int64_t c = lane * N; c < channels; c += 32 * N) {
      unpack<T, N>(load<T, N>(y + c), v);
#pragma unroll
      for (int i = 0; i < N; ++i) total += v[i];
    }
#pragma unroll
    for (int other = 16; other; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
    const A mean = total / A(channels);
    for (int64_t c = lane * N; c < channels; c += 32 * N) {
      unpack<T, N>(load<T, N>(y + c), v);
#pragma unroll
      for (int i = 0; i < N; ++i) squares += (v[i] - mean) * (v[i] - mean);
    }
#pragma unroll
    for (int other = 16; other; other /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, other);
    const A rstd = A(1) / sqrt(squares / A(channels) + A(p.eps));
    const A* weight = static_cast<const A*>(p.ln_weight);
    const A* bias = static_cast<const A*>(p.ln_bias);
    for (int64_t c = lane * N; c < channels; c += 32 * N) {
      unpack<T, N>(load<T, N>(y + c), v);
#pragma unroll
      for (int i = 0; i < N; ++i)
        v[i] = (v[i] - mean) * rstd * (weight ? weight[c + i] : A(1)) + (bias ? bias[c + i] : A(0));
      store<T, N>(y + c, pack<T, N>(v));
    }
    if (lane == 0) static_cast<A*>(p.rstd)[row] = rstd;
  }
}

}  // namespace cuda
}  // namespace cnx
