// What GRN makes of column sums: one block per segment, for each needs a mean over its channels.
#pragma once

#include "../common/columns.cuh"

namespace cnx {
namespace cuda {

constexpr int kStatisticsThreads = 512;

// Sum c of a segment's splits [splits, columns].
template <class A>
__device__ __forceinline__ A split_sum(const A* partial, int64_t splits, int64_t columns, int64_t c) {
  A sum = 0;
#pragma unroll 8
  for (int64_t k = 0; k < splits; ++k) sum += partial[k * columns + c];
  return sum;
}

// norm = sqrt(square sums), scale = 1 + gamma norm / (mean(norm) + eps)
template <class A>
__global__ void __launch_bounds__(kStatisticsThreads)
    grn_scale_kernel(const A* partial, int64_t splits, int64_t channels, const A* gamma, A eps, A* norm, A* scale) {
  __shared__ A shared[32];
  const int64_t segment = blockIdx.x;
  partial += segment * splits * channels;
  norm += segment * channels;
  scale += segment * channels;
  A sum = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) {
    const A value = sqrt(split_sum(partial, splits, channels, c));
    norm[c] = value;
    sum += value;
  }
  const A inverse = A(1) / (block_sum(sum, shared) / static_cast<A>(channels) + eps);
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) scale[c] = A(1) + gamma[c] * norm[c] * inverse;
}

// From t (and the sums of the gradient behind it, when there are 2 sums): scale, kappa and the segment's terms of
// dgamma and dbeta, `stride` apart. kappa keeps t until the mean is known.
template <class A>
__global__ void __launch_bounds__(kStatisticsThreads, 1)
    grn_gradient_kernel(const A* partial, int64_t splits, int sums, int64_t channels, const A* norm, const A* gamma,
                        A eps, A* scale, A* kappa, A* dgamma, A* dbeta, int64_t stride) {
  __shared__ A shared[32];
  const int64_t segment = blockIdx.x;
  partial += segment * splits * sums * channels;
  norm += segment * channels;
  scale += segment * channels;
  kappa += segment * channels;
  A sum = 0, dot = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) {
    const A t = split_sum(partial, splits, sums * channels, c);
    kappa[c] = t;
    sum += norm[c];
    dot += gamma[c] * t * norm[c];
    if (sums == 2) dbeta[segment * stride + c] = split_sum(partial + channels, splits, 2 * channels, c);
  }
  const A mean = block_sum(sum, shared) / static_cast<A>(channels) + eps;
  const A inverse = A(1) / mean, pull = block_sum(dot, shared) / static_cast<A>(channels) * inverse * inverse;
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) {
    const A t = kappa[c], value = norm[c], response = value * inverse;
    dgamma[segment * stride + c] = response * t;
    scale[c] = A(1) + gamma[c] * response;
    kappa[c] = value != A(0) ? (gamma[c] * t * inverse - pull) / value : A(0);
  }
}

}  // namespace cuda
}  // namespace cnx
