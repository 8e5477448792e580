// GELU(a) = a * gate(a) and its derivative gate(a) + a * gate'(a).
//
// Exact: the gate is the normal distribution Phi, its slope the density. float: Phi(-|a|) = exp(-a^2/2) * t * P(t),
// t = 1 / (1 + 0.33 |a|); the coefficients come from tools/fit_gelu.py, maximum relative error 5.5e-8. The exponential
// is shared with the density. double: the C library, lane by lane.
//
// Tanh form: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), 2u = sqrt(8/pi) (a + 0.044715 a^3). From e = exp(-|2u|), which
// cannot overflow: with r = 1 / (1 + e) the gate is r or e r, its slope e r^2 d(2u)/da; neither cancels.
#pragma once

#include <cmath>
#include <type_traits>

#include "cnx/params.h"
#include "simd.h"

namespace cnx {
namespace CNX_ISA {

template <class V>
struct Gate {
  V value, slope;
};

// exp(x) for x <= 0, exactly 0 below -80, so that products with it never become denormal. Cody-Waite reduction by ln 2
// and the degree-5 polynomial of Cephes' expf (S. Moshier).
CNX_INLINE vf exp_nonpositive(vf x) {
  const vi underflow = x < -80.0f;
  x = underflow ? vf{} : x;
  const vf magic = vf{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf shifted = x * 1.44269504089f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = vf{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  return underflow ? vf{} : p * (vf)exponent;
}

CNX_INLINE vd exp_nonpositive(vd x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

CNX_INLINE Gate<vf> normal_gate(vf a) {
  const vf magnitude = a < 0.0f ? -a : a;
  const vf e = exp_nonpositive(-0.5f * a * a);
  const vf t = 1.0f / (1.0f + 0.33f * magnitude);
  vf q = vf{} - 2.080727563e-02f;
  q = q * t + 1.230785321e-01f;
  q = q * t - 2.671836193e-01f;
  q = q * t + 2.246280741e-01f;
  q = q * t - 5.652528737e-02f;
  q = q * t + 1.218187036e-01f;
  q = q * t + 1.110659697e-01f;
  q = q * t + 1.323027709e-01f;
  q = q * t + 1.316221593e-01f;
  const vf tail = e * t * q;
  return {a < 0.0f ? tail : 1.0f - tail, e * 0.398942280401f};
}

CNX_INLINE Gate<vd> normal_gate(vd a) {
  Gate<vd> gate;
  for (int i = 0; i < kLanes<double>; ++i) {
    gate.value[i] = 0.5 * std::erfc(-a[i] * 0.70710678118654752440);
    gate.slope[i] = 0.39894228040143267794 * std::exp(-0.5 * a[i] * a[i]);
  }
  return gate;
}

template <class V>
CNX_INLINE Gate<V> tanh_gate(V a) {
  using A = std::decay_t<decltype(a[0])>;
  constexpr A linear = 1.5957691216057307118, cubic = 0.071354816272600248776;
  // past 32 the gate is 0 or 1; the limit keeps its slope 0 where the square would be infinite
  const V limit = V{} + A(1024);
  V square = a * a;
  square = square > limit ? limit : square;
  const V twice = a * (linear + cubic * square);
  const V e = exp_nonpositive(a < A(0) ? twice : -twice);
  const V r = A(1) / (A(1) + e);
  const V tail = e * r;
  return {a < A(0) ? tail : r, tail * r * (linear + 3 * cubic * square)};
}

template <Activation kAct, class V>
CNX_INLINE Gate<V> gate_of(V a) {
  if constexpr (kAct == Activation::gelu_tanh)
    return tanh_gate(a);
  else
    return normal_gate(a);
}

template <Activation kAct, class V>
CNX_INLINE V activate(V a) {
  if constexpr (kAct == Activation::identity)
    return a;
  else
    return a * gate_of<kAct>(a).value;
}

template <Activation kAct, class V>
CNX_INLINE void activate_with_slope(V a, V& value, V& slope) {
  if constexpr (kAct == Activation::identity) {
    value = a;
    slope = V{} + 1;
  } else {
    const Gate<V> gate = gate_of<kAct>(a);
    value = a * gate.value;
    slope = gate.value + a * gate.slope;
  }
}

}  // namespace CNX_ISA
}  // namespace cnx
