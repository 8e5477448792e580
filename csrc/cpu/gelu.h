// GELU(a) = a * Phi(a) and its derivative Phi(a) + a * phi(a), with Phi, phi the normal distribution and density.
//
// float: Phi(-|a|) = exp(-a^2/2) * t * P(t), t = 1 / (1 + 0.33 |a|); the coefficients come from fit_gelu.py, maximum
// relative error 5.5e-8. The exponential is shared with phi. double: the C library, lane by lane.
#pragma once

#include <cmath>

#include "vec.h"

namespace cnx {
namespace CNX_ISA {

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

struct NormalParts {
  vf cdf, density;
};

CNX_INLINE NormalParts normal_parts(vf a) {
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

CNX_INLINE vf gelu(vf a) {
  return a * normal_parts(a).cdf;
}

CNX_INLINE void gelu_with_derivative(vf a, vf& value, vf& derivative) {
  const NormalParts n = normal_parts(a);
  value = a * n.cdf;
  derivative = n.cdf + a * n.density;
}

CNX_INLINE void gelu_with_derivative(vd a, vd& value, vd& derivative) {
  for (int i = 0; i < static_cast<int>(sizeof(vd) / sizeof(double)); ++i) {
    const double x = a[i];
    const double cdf = 0.5 * std::erfc(-x * 0.70710678118654752440);
    value[i] = x * cdf;
    derivative[i] = cdf + x * 0.39894228040143267794 * std::exp(-0.5 * x * x);
  }
}

CNX_INLINE vd gelu(vd a) {
  vd value, derivative;
  gelu_with_derivative(a, value, derivative);
  return value;
}

}  // namespace CNX_ISA
}  // namespace cnx
