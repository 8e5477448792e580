// GELU(a) = a Phi(a) and its slope Phi(a) + a phi(a), Phi and phi the normal distribution and its density.
//
// float, float16 and double: Phi from the library's erf, about 32 issue slots per element, so a kernel that moves few
// bytes per element is limited by instructions. bfloat16: Phi(a) - 1/2 is odd and a polynomial a P(a^2) of nine terms
// follows it; GELU is then 11 slots and no special function. Fitted (linear programme) for the least error of a Phi(a)
// up to |a| = 4.4, free to overshoot beyond because the result saturates to exactly 0 and 1: the error of GELU is below
// 4e-5 for every a, a hundredth of a bfloat16 step at 1, and the tails are exactly 0 and a. The slope adds
// a phi(a) with the hardware's exponential: error below 6e-5.
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
__device__ __forceinline__ Acc<T> gelu(Acc<T> a) {
  return a * normal_cdf<T>(a);
}

template <class T>
__device__ __forceinline__ void gelu_with_slope(Acc<T> a, Acc<T>& value, Acc<T>& slope) {
  const Acc<T> cdf = normal_cdf<T>(a);
  value = a * cdf;
  slope = cdf + a * normal_density<T>(a);
}

}  // namespace cuda
}  // namespace cnx
