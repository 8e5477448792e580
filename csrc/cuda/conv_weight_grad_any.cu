// Weight gradient of what the register kernels do not serve: pixels (side 1, any K) by words, and any shape at all.
#include "conv_grad_words.cuh"

namespace cnx {
namespace cuda {
namespace {

// Side 1: a warp owns one tap and 32 words of channels. 32 patches at a time, it reads who has a visible neighbour
// there and goes through those alone, four at once to have their reads under way together.
template <class T>
__global__ void __launch_bounds__(32 * kMaxKernel) conv_weight_grad_points(GradArguments<T> p) {
  constexpr int kPer = kPerWord<T>, kAtOnce = 4;
  const int lane = threadIdx.x % 32, taps = p.kernel_size * p.kernel_size;
  const int tap = blockIdx.y * p.kernel_size + threadIdx.x / 32;
  const int64_t words = p.channels / kPer, word = int64_t{blockIdx.x} * 32 + lane;
  const bool valid = word < words;
  const int64_t channel = (valid ? word : words - 1) * kPer;
  const int64_t first = blockIdx.z * p.per_split, last = min(first + p.per_split, p.units);
  const T* const x = p.x + channel;
  const T* const grad = p.grad + channel;
  float sums[kPer] = {}, own[kPer] = {};

  const auto neighbour = [&](int64_t patch) { return patch < last ? p.neighbours[patch * taps + tap] : -1; };
  int next = neighbour(first + lane);
#pragma unroll 1
  for (int64_t base = first; base < last; base += 32) {
    const int slot = next;
    next = neighbour(base + 32 + lane);
    unsigned visible = __ballot_sync(0xffffffffu, slot >= 0);
#pragma unroll 1
    while (visible) {
      uint32_t in[kAtOnce], d[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const bool some = visible != 0;
        const int from = some ? __ffs(static_cast<int>(visible)) - 1 : 0;
        visible &= visible - 1;
        const int64_t source = __shfl_sync(0xffffffffu, slot, from);
        in[j] = some ? load_word(x + source * p.channels) : 0;
        d[j] = some ? load_word(grad + (base + from) * p.channels) : 0;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        float a[kPer], b[kPer];
        unpack_word(in[j], a, Type<T>{});
        unpack_word(d[j], b, Type<T>{});
#pragma unroll
        for (int k = 0; k < kPer; ++k) own[k] += b[k];
        multiply_add(sums, a, b);
      }
    }
  }
  if (!valid) return;
  float* target = p.partial + (int64_t{blockIdx.z} * (taps + 1) + tap) * p.channels + channel;
#pragma unroll
  for (int k = 0; k < kPer; ++k) {
    target[k] = sums[k];
    // every patch is its own neighbour at the centre, so there the gradients seen are all of them
    if (tap == taps / 2) target[(taps - tap) * p.channels + k] = own[k];
  }
}

// Any shape: a lane owns a channel, a block one row of taps; its warps take lines of pixels in turn.
template <class T>
__global__ void __launch_bounds__(32 * kAnyWarps, 2) conv_weight_grad_any(GradArguments<T> p) {
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
  for (int64_t line = first + warp; line < last; line += kAnyWarps) {
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
  A* scratch = reinterpret_cast<A*>(shared);  // [kAnyWarps][kMaxKernel + 1][32]
#pragma unroll
  for (int i = 0; i <= kMaxKernel; ++i) scratch[(warp * (kMaxKernel + 1) + i) * 32 + lane] = sums[i];
  __syncthreads();
  if (block_channel >= p.channels) return;
  A* target = p.partial + int64_t{blockIdx.z} * (size * size + 1) * p.channels + channel;
  for (int i = warp; i <= kMaxKernel; i += kAnyWarps) {
    const bool bias = i == kMaxKernel;
    if (bias ? ky != radius : i >= size) continue;
    A sum = 0;
    for (int w = 0; w < kAnyWarps; ++w) sum += scratch[(w * (kMaxKernel + 1) + i) * 32 + lane];
    target[(bias ? size * size : ky * size + i) * p.channels] = sum;
  }
}

dim3 tap_rows(const GradPlan& plan, int kernel_size) {
  return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(kernel_size),
              static_cast<unsigned>(plan.splits));
}

}  // namespace

template <class T>
void weight_grad_pixels(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  CNX_LAUNCH((conv_weight_grad_points<T>), tap_rows(plan, p.kernel_size), dim3(32 * p.kernel_size), 0, launch, p);
}

template <class T>
void weight_grad_any(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  constexpr int shared = kAnyWarps * (kMaxKernel + 1) * 32 * static_cast<int>(sizeof(Acc<T>));
  CNX_LAUNCH((conv_weight_grad_any<T>), tap_rows(plan, p.kernel_size), dim3(32 * kAnyWarps), shared, launch, p);
}

template void weight_grad_pixels(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_pixels(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_pixels(const GradArguments<f16>&, const GradPlan&, const Launch&);
template void weight_grad_any(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_any(const GradArguments<double>&, const GradPlan&, const Launch&);
template void weight_grad_any(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_any(const GradArguments<f16>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
