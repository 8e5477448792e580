// Vectors of accumulator lanes over rows of T, by GCC/Clang vector extensions: the same source for AVX-512, AVX2, SSE2
// and NEON. The including file defines CNX_VECTOR_BYTES and the namespace (CNX_ISA).
#pragma once

#include <cstdint>

#include "cnx/params.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define CNX_MASKED 1
#else
#define CNX_MASKED 0
#endif

#define CNX_INLINE inline __attribute__((always_inline))

namespace cnx {

struct bf16 {
  uint16_t bits;
};

namespace CNX_ISA {

typedef float vf __attribute__((vector_size(CNX_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(CNX_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(CNX_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(CNX_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(CNX_VECTOR_BYTES / 2)));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vf;
};
template <>
struct VectorOf<double> {
  using type = vd;
};
template <class T>
using Vec = typename VectorOf<Acc<T>>::type;
template <class T>
constexpr int kLanes = CNX_VECTOR_BYTES / static_cast<int>(sizeof(Acc<T>));

CNX_INLINE vf widen(vh h) {
  const vu u = __builtin_convertvector(h, vu) << 16;
  return (vf)u;
}

// Round to nearest, ties to even; NaN stays NaN.
CNX_INLINE vh narrow(vf v) {
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  const vi nan = v != v;
  const vu mask = (vu)nan;
  return __builtin_convertvector((rounded & ~mask) | (quiet & mask), vh);
}

template <class V, class P>
CNX_INLINE V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// A full vector of channels.
struct Full {
  explicit constexpr Full(int) {}
  static CNX_INLINE vf load(const float* p) { return load_raw<vf>(p); }
  static CNX_INLINE vd load(const double* p) { return load_raw<vd>(p); }
  static CNX_INLINE vf load(const bf16* p) { return widen(load_raw<vh>(p)); }
  static CNX_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
  static CNX_INLINE void store(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }
  static CNX_INLINE void store(bf16* p, vf v) {
    const vh h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
  }
  template <class V>
  static CNX_INLINE V keep(V v) {
    return v;
  }
};

// The first n lanes; the others read as zero and are not written. keep(v): v with zeros in the others.
struct Tail {
  int n;
#if CNX_MASKED && CNX_VECTOR_BYTES == 64
  uint32_t mask;
  explicit CNX_INLINE Tail(int lanes) : n(lanes), mask((1u << lanes) - 1u) {}
  CNX_INLINE vf load(const float* p) const { return (vf)_mm512_maskz_loadu_ps((__mmask16)mask, p); }
  CNX_INLINE vd load(const double* p) const { return (vd)_mm512_maskz_loadu_pd((__mmask8)mask, p); }
  CNX_INLINE vf load(const bf16* p) const { return widen((vh)_mm256_maskz_loadu_epi16((__mmask16)mask, p)); }
  CNX_INLINE void store(float* p, vf v) const { _mm512_mask_storeu_ps(p, (__mmask16)mask, (__m512)v); }
  CNX_INLINE void store(double* p, vd v) const { _mm512_mask_storeu_pd(p, (__mmask8)mask, (__m512d)v); }
  CNX_INLINE void store(bf16* p, vf v) const { _mm256_mask_storeu_epi16(p, (__mmask16)mask, (__m256i)narrow(v)); }
  CNX_INLINE vf keep(vf v) const { return (vf)_mm512_maskz_mov_ps((__mmask16)mask, (__m512)v); }
  CNX_INLINE vd keep(vd v) const { return (vd)_mm512_maskz_mov_pd((__mmask8)mask, (__m512d)v); }
#else
  explicit CNX_INLINE Tail(int lanes) : n(lanes) {}
  template <class V, class P>
  CNX_INLINE V load_lanes(const P* p) const {
    V v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  CNX_INLINE vf load(const float* p) const { return load_lanes<vf>(p); }
  CNX_INLINE vd load(const double* p) const { return load_lanes<vd>(p); }
  CNX_INLINE vf load(const bf16* p) const { return widen(load_lanes<vh>(reinterpret_cast<const uint16_t*>(p))); }
  CNX_INLINE void store(float* p, vf v) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  CNX_INLINE void store(double* p, vd v) const {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  CNX_INLINE void store(bf16* p, vf v) const {
    const vh h = narrow(v);
    for (int i = 0; i < n; ++i) p[i].bits = h[i];
  }
  template <class V>
  CNX_INLINE V keep(V v) const {
    V kept{};
    for (int i = 0; i < n; ++i) kept[i] = v[i];
    return kept;
  }
#endif
};

// Calls f(lanes, channel) for each vector of channels, the last one possibly a Tail.
template <class T, class F>
CNX_INLINE void each_vector(int64_t begin, int64_t end, F&& f) {
  int64_t c = begin;
  for (; c + kLanes<T> <= end; c += kLanes<T>) f(Full(kLanes<T>), c);
  if (c < end) f(Tail(static_cast<int>(end - c)), c);
}

template <class V>
CNX_INLINE auto horizontal_sum(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto sum = v[0];
  for (int i = 1; i < lanes; ++i) sum += v[i];
  return sum;
}

}  // namespace CNX_ISA
}  // namespace cnx
