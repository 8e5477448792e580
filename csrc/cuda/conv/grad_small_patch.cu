// Weight gradient with 7x7 taps on whole patches of side 4 and 2.
//
// A warp holds all 49 taps of 32 words of channels and the gradient of one patch in registers, and goes through the
// visible ones of the 3x3 (5x5) patches around it. Reads are one stage ahead of the arithmetic: a stage is one
// neighbour of side 4, or a row of five neighbours of side 2.
#include "grad_words.cuh"

namespace cnx {
namespace cuda {
namespace {

template <int kSide>
struct Around {
  static constexpr int pixels = kSide * kSide;
  static constexpr int reach = (kRadius + kSide - 1) / kSide, across = 2 * reach + 1;
  static constexpr int per_stage = kSide == 4 ? 1 : across, stages = across * across / per_stage;

  // Tap index that joins line `input` of the patch `distance` away with line `output`, in 0..6 if they touch.
  CNX_HOST_DEVICE static constexpr int tap(int distance, int input, int output) {
    return kSide * distance + input - output + kRadius;
  }
  CNX_HOST_DEVICE static constexpr bool touches(int distance, int input) {
    return tap(distance, input, 0) >= 0 && tap(distance, input, kSide - 1) < kTap;
  }
};

template <class T, int kSide, int kStage>
__device__ __forceinline__ void load_stage(const T* x, const int* slots, uint32_t step,
                                           uint32_t (&words)[Around<kSide>::per_stage][kSide * kSide]) {
  using A = Around<kSide>;
#pragma unroll
  for (int j = 0; j < A::per_stage; ++j) {
    const int n = kStage * A::per_stage + j, down = n / A::across - A::reach, right = n % A::across - A::reach;
    const T* const patch = advance(x, slots[n], A::pixels * step);
#pragma unroll
    for (int i = 0; i < A::pixels; ++i)
      if (A::touches(down, i / kSide) && A::touches(right, i % kSide))
        words[j][i] = slots[n] >= 0 ? load_word(patch, i * step) : 0;
  }
}

template <class T, int kSide, int kStage>
__device__ __forceinline__ void multiply_stage(const uint32_t (&words)[Around<kSide>::per_stage][kSide * kSide],
                                               const float (&grad)[kSide * kSide][kPerWord<T>], const int* slots,
                                               float (&sums)[kTaps + 1][kPerWord<T>]) {
  using A = Around<kSide>;
  constexpr int kPer = kPerWord<T>;
#pragma unroll
  for (int j = 0; j < A::per_stage; ++j) {
    const int n = kStage * A::per_stage + j, down = n / A::across - A::reach, right = n % A::across - A::reach;
    if (!__any_sync(0xffffffffu, slots[n] >= 0)) continue;
#pragma unroll
    for (int i = 0; i < A::pixels; ++i) {
      if (!A::touches(down, i / kSide) || !A::touches(right, i % kSide)) continue;
      float in[kPer];
      unpack_word(words[j][i], in, Type<T>{});
#pragma unroll
      for (int o = 0; o < A::pixels; ++o) {
        const int ky = A::tap(down, i / kSide, o / kSide), kx = A::tap(right, i % kSide, o % kSide);
        if (ky < 0 || ky >= kTap || kx < 0 || kx >= kTap) continue;
        multiply_add(sums[ky * kTap + kx], in, grad[o]);
      }
    }
  }
}

// Stage kStage was read into words[kStage % 2] already.
template <class T, int kSide, int kStage>
__device__ __forceinline__ void all_stages(const T* x, const int* slots, uint32_t step,
                                           uint32_t (&words)[2][Around<kSide>::per_stage][kSide * kSide],
                                           const float (&grad)[kSide * kSide][kPerWord<T>],
                                           float (&sums)[kTaps + 1][kPerWord<T>]) {
  if constexpr (kStage < Around<kSide>::stages) {
    if constexpr (kStage + 1 < Around<kSide>::stages)
      load_stage<T, kSide, kStage + 1>(x, slots, step, words[(kStage + 1) % 2]);
    multiply_stage<T, kSide, kStage>(words[kStage % 2], grad, slots, sums);
    all_stages<T, kSide, kStage + 1>(x, slots, step, words, grad, sums);
  }
}

template <class T, int kSide>
__global__ void __launch_bounds__(32 * kGradWarps, 2) conv_weight_grad_small_patch(GradArguments<T> p) {
  using A = Around<kSide>;
  constexpr int kPer = kPerWord<T>, kNeighbours = A::across * A::across;
  const int lane = threadIdx.x % 32;
  const LanePlace place(p.channels, kPer, blockIdx.x, lane);
  const int64_t split = blockIdx.y;
  const int64_t first = split * p.per_split, last = min(first + p.per_split, p.units);
  const uint32_t step = p.step;
  const T* const x = p.x + place.channel;
  float sums[kTaps + 1][kPer] = {};

#pragma unroll 1
  for (int64_t base = first + threadIdx.x / 32 * place.groups; base < last; base += kGradWarps * place.groups) {
    const bool active = base + place.group < last;
    const int64_t patch = active ? base + place.group : base;
    const int64_t next = base + kGradWarps * place.groups;
    if (next < last && lane < 2 * A::pixels)  // the next patch: half of the lanes ask for its gradient, half for x
      prefetch((lane < A::pixels ? p.grad : p.x) + (next * A::pixels + lane % A::pixels) * p.channels + place.first);
    int slots[kNeighbours];
#pragma unroll
    for (int n = 0; n < kNeighbours; ++n) slots[n] = active ? p.neighbours[patch * kNeighbours + n] : -1;
    uint32_t own[A::pixels], words[2][A::per_stage][A::pixels];
    float grad[A::pixels][kPer];
    const T* const source = p.grad + patch * A::pixels * p.channels + place.channel;
#pragma unroll
    for (int i = 0; i < A::pixels; ++i) own[i] = active ? load_word(source, i * step) : 0;
    load_stage<T, kSide, 0>(x, slots, step, words[0]);
#pragma unroll
    for (int i = 0; i < A::pixels; ++i) {
      unpack_word(own[i], grad[i], Type<T>{});
#pragma unroll
      for (int k = 0; k < kPer; ++k) sums[kTaps][k] += grad[i][k];
    }
    all_stages<T, kSide, 0>(x, slots, step, words, grad, sums);
  }
  store_partial<T>(sums, place, split, p.channels, p.partial);
}

}  // namespace

template <class T>
void weight_grad_small_patch(const GradArguments<T>& p, const GradPlan& plan, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
  if (p.height == 4)
    CNX_LAUNCH((conv_weight_grad_small_patch<T, 4>), grid, dim3(32 * kGradWarps), kPartialShared<T>, launch, p);
  else
    CNX_LAUNCH((conv_weight_grad_small_patch<T, 2>), grid, dim3(32 * kGradWarps), kPartialShared<T>, launch, p);
}

template void weight_grad_small_patch(const GradArguments<float>&, const GradPlan&, const Launch&);
template void weight_grad_small_patch(const GradArguments<bf16>&, const GradPlan&, const Launch&);
template void weight_grad_small_patch(const GradArguments<f16>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
