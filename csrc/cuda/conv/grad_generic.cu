// Weight gradient of any shape at all.
#include "grad_words.cuh"

namespace cnx {
namespace cuda {
namespace {

// Any shape: a lane owns a channel, a block one row of taps; its warps take lines of pixels in turn.
template <class T>
__global__ void __launch_bounds__(32 * kGenericWarps, 2) conv_weight_grad_generic(GradArguments<T> p) {
  using A = Acc<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = p.kernel_size, radius = size / 2;
  const int ky = blockIdx.y;
  const int64_t block_channel = int64_t{blockIdx.x} * 32 + lane;
  const int64_t channel = block_channel < p.channels ? block_channel : p.channels - 1;
  const int64_t first = blockIdx.z * p.per_split, last = min(first + p.per_split, p.units);
  const int64_t width = p.width, height = p.height;
  const int reach = p.neighbours ? static_cast<int>((radius + height - 1) / height) : 0, across = 2 * reach + 1;
  A sums[kMaxKernel + 1] = {};  // the last: the bias gradient

#pragma unroll 1
  for (int64_t line = first + warp; line < last; line += kGenericWarps) {
    const int64_t map = line / height;
    int64_t row = line % height + ky - radius;
    int down = 0;
    if (p.neighbours) {
      down = static_cast<int>((row + reach * height) / height) - reach;
      row -= down * height;
    } else if (row < 0 || row >= height) {
      continue;
    }
    const T* const grad = p.grad + line * width * p.channels + channel;
#pragma unroll 1
    for (int right = -reach; right <= reach; ++right) {
      int64_t slot = map;
      if (down || right) slot = p.neighbours[(map * across + down + reach) * across + right + reach];
      if (slot < 0) continue;
      const T* const source = p.x + (slot * height + row) * width * p.channels + channel;
      const int64_t from = right < 0 ? max(int64_t{0}, -radius - right * width) : 0;
      const int64_t to = right > 0 ? min(width, radius - (right - 1) * width) : width;
#pragma unroll 1
      for (int64_t column = from; column < to; ++column) {
        const A in = to_acc(source[column * p.channels]);
        const int64_t touched = column + right * width + radius;  // by tap 0, then to the left
#pragma unroll
        for (int kx = 0; kx < kMaxKernel; ++kx)
          if (kx < size && touched - kx >= 0 && touched - kx < width)
            sums[kx] += in * to_acc(grad[(touched - kx) * p.channels]);
        if (ky == radius && right == 0) sums[kMaxKernel] += to_acc(grad[column * p.channels]);
      }
    }
  }

  CNX_DYNAMIC_SHARED(shared);
  A* scratch = reinterpret_cast<A*>(shared);  // [kGenericWarps][kMaxKernel + 1][32]
#pragma unroll
  for (int i = 0; i <= kMaxKernel; ++i) scratch[(warp * (kMaxKernel + 1) + i) * 32 + lane] = sums[i];
  __syncthreads();
  if (block_channel >= p.channels) return;
  A* target = p.partial + int64_t{blockIdx.z} * (size * size + 1) * p.channels + channel;
  for (int i = warp; i <= kMaxKernel; i += kGenericWarps) {
    const bool bias = i == kMaxKernel;
    if (bias ? ky != radius : i >= size) continue;
    A sum = 0;
    for (int w = 0; w < kGenericWarps; ++w) sum += scratch[(w * (kMaxKernel + 1) + i) * 32 + lane];
    target[(bias ? size * size : ky * size + i) * p.channels] = sum;
  }
}

}  // namespace

template <class T>
void weight_grad_generic(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  constexpr int shared = kGenericWarps * (kMaxKernel + 1) * 32 * static_cast<int>(sizeof(Acc<T>));
  CNX_LAUNCH((conv_weight_grad_generic<T>), tap_rows(plan, p.kernel_size), dim3(32 * kGenericWarps), shared, launch, p);
}

template void weight_grad_generic(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_generic(const GradArguments<double>&, const GradPlan&, const Launch&);
template void weight_grad_generic(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_generic(const GradArguments<f16>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
