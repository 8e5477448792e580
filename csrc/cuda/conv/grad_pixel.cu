// Weight gradient on patches of side 1, any K, by words.
#include "grad_words.cuh"

namespace cnx {
namespace cuda {
namespace {

// Side 1: a warp owns one tap and 32 words of channels. 32 patches at a time, it reads who has a visible neighbour
// there and goes through those alone, four at once to have their reads under way together.
template <class T>
__global__ void __launch_bounds__(32 * kMaxKernel) conv_weight_grad_pixel(GradArguments<T> p) {
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

}  // namespace

template <class T>
void weight_grad_pixel(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  CNX_LAUNCH((conv_weight_grad_pixel<T>), tap_rows(plan, p.kernel_size), dim3(32 * p.kernel_size), 0, launch, p);
}

template void weight_grad_pixel(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_pixel(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_pixel(const GradArguments<f16>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
