// GELU(a) = a gate(a) and its slope gate(a) + a gate'(a).
//
// Exact: the gate is the normal distribution Phi, its slope the density phi. float, float16 and double: Phi from the
// library's erf, about 32 issue slots per element, so a kernel that moves few bytes per element is limited by
// instructions. bfloat16: Phi(a) - 1/2 is odd and a polynomial a P(a^2) of nine terms follows it; GELU is then 11 slots
// and no special function. Fitted (linear programme) for the least error of a Phi(a) up to |a| = 4.4, free to overshoot
// beyond because the result saturates to exactly 0 and 1: the error of GELU is below 4e-5 for every a, a hundredth of a
// bfloat16 step at 1, and the tails are exactly 0 and a. The slope adds a phi(a) with the hardware's exponential: error
// below 6e-5.
//
// Tanh form: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), 2u = sqrt(8/pi) (a + 0.044715 a^3). From e = exp(-|2u|), which
// cannot overflow: with r = 1 / (1 + e) the gate is r or e r, its slope e r^2 d(2u)/da; neither cancels. In 16 bits the
// hardware's exponential and reciprocal, in error by 1e-6.
#pragma once

#include "types.cuh"

namespace cnx {
namespace cuda {

template <class T>
__device__ __forceinline__ float normal_cdf(float a) {
  return fmaf(erff(a * 0.70710678118654752f), 0.5f, 0.5f);
}
template <>
__device__ __forceinline__ float normal_cdf<bf16>(float a) {
  const float u = a * a;
  float p = 3.58239029e-11f;
  p = fmaf(p, u, -3.76448339e-09f);
  p = fmaf(p, u, 1.7443223e-07f);
  p = fmaf(p, u, -4.73105501e-06f);
  p = fmaf(p, u, 8.4356514e-05f);
  p = fmaf(p, u, -0.00105536974f);
  p = fmaf(p, u, 0.00964426063f);
  p = fmaf(p, u, -0.0660783723f);
  p = fmaf(p, u, 0.398762643f);
  return __saturatef(fmaf(a, p, 0.5f));
}
template <class T>
__device__ __forceinline__ double normal_cdf(double a) {
  return fma(erf(a * 0.70710678118654752440), 0.5, 0.5);
}

template <class T>
__device__ __forceinline__ float normal_density(float a) {
  return 0.39894228040143268f * expf(-0.5f * a * a);
}
template <>
__device__ __forceinline__ float normal_density<bf16>(float a) {
  return 0.39894228040143268f * __expf(-0.5f * a * a);
}
template <class T>
__device__ __forceinline__ double normal_density(double a) {
  return 0.39894228040143267794 * exp(-0.5 * a * a);
}

template <class T>
__device__ __forceinline__ void gelu_with_slope(Acc<T> a, Acc<T>& value, Acc<T>& slope) {
  const Acc<T> cdf = normal_cdf<T>(a);
  value = a * cdf;
  slope = cdf + a * normal_density<T>(a);
}

template <class T>
__device__ __forceinline__ void gelu_tanh_with_slope(Acc<T> a, Acc<T>& value, Acc<T>& slope) {
  constexpr Acc<T> linear = 1.5957691216057307118, cubic = 0.071354816272600248776;
  Acc<T> square = a * a;
  // past 32 the gate is 0 or 1; the limit keeps its slope 0 where the square would be infinite
  square = square > 1024 ? Acc<T>(1024) : square;
  const Acc<T> twice = a * (linear + cubic * square);
  const Acc<T> negative = a < 0 ? twice : -twice;
  Acc<T> e, r;
  if constexpr (sizeof(T) == 2) {
    e = __expf(negative);
    r = __fdividef(1, 1 + e);
  } else {
    e = exp(negative);
    r = 1 / (1 + e);
  }
  const Acc<T> tail = e * r, gate = a < 0 ? tail : r;
  value = a * gate;
  slope = gate + a * (tail * r * (linear + 3 * cubic * square));
}

template <Activation kAct, class T>
__device__ __forceinline__ void activate_with_slope(Acc<T> a, Acc<T>& value, Acc<T>& slope) {
  if constexpr (kAct == Activation::gelu) {
    gelu_with_slope<T>(a, value, slope);
  } else if constexpr (kAct == Activation::gelu_tanh) {
    gelu_tanh_with_slope<T>(a, value, slope);
  } else {
    value = a;
    slope = 1;
  }
}

template <Activation kAct, class T>
__device__ __forceinline__ Acc<T> activate(Acc<T> a) {
  Acc<T> value, slope;
  activate_with_slope<kAct, T>(a, value, slope);
  return value;
}

template <Activation kAct>
struct ActivationType {
  static constexpr Activation value = kAct;
};

// f(ActivationType<...>{}) with the activation as a constant.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::identity:
      return f(ActivationType<Activation::identity>{});
    case Activation::gelu:
      return f(ActivationType<Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(ActivationType<Activation::gelu_tanh>{});
  }
}

}  // namespace cuda
}  // namespace cnx
