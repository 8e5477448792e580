// Device functions that concern one thread: memory access, atomics, integer and float intrinsics.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime.h"

// Fibers change at barriers only, so memory is always in order.

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {
  ::cnx::emulation::yield();
}
inline void __trap() {
  ::cnx::emulation::fail("__trap");
}

#define CNX_LOAD(name)       \
  template <class T>         \
  T name(const T* pointer) { \
    return *pointer;         \
  }
CNX_LOAD(__ldg)
CNX_LOAD(__ldca)
CNX_LOAD(__ldcg)
CNX_LOAD(__ldcs)
CNX_LOAD(__ldlu)
CNX_LOAD(__ldcv)
#undef CNX_LOAD

#define CNX_STORE(name)                                                        \
  template <class T>                                                           \
  void name(T* pointer, std::enable_if_t<std::is_object<T>::value, T> value) { \
    *pointer = value;                                                          \
  }
CNX_STORE(__stwb)
CNX_STORE(__stcg)
CNX_STORE(__stcs)
CNX_STORE(__stwt)
#undef CNX_STORE

// Integers only: the order of float atomics is not fixed. Host threads may launch on the same memory, hence atomic.
#define CNX_ATOMIC(name, expression)                                                                        \
  template <class T>                                                                                        \
  T name(T* address, std::enable_if_t<std::is_integral<T>::value, T> value) {                               \
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);                                                     \
    while (!__atomic_compare_exchange_n(address, &old, static_cast<T>(expression), false, __ATOMIC_RELAXED, \
                                        __ATOMIC_RELAXED)) {                                                \
    }                                                                                                       \
    return old;                                                                                             \
  }
CNX_ATOMIC(atomicAdd, static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value))
CNX_ATOMIC(atomicSub, static_cast<std::make_unsigned_t<T>>(old) - static_cast<std::make_unsigned_t<T>>(value))
CNX_ATOMIC(atomicMin, old < value ? old : value)
CNX_ATOMIC(atomicMax, old < value ? value : old)
CNX_ATOMIC(atomicAnd, old& value)
CNX_ATOMIC(atomicOr, old | value)
CNX_ATOMIC(atomicXor, old ^ value)
CNX_ATOMIC(atomicExch, value)
CNX_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef CNX_ATOMIC

template <class T>
T atomicCAS(T* address, T compare, std::enable_if_t<std::is_integral<T>::value, T> value) {
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}

// Integers.

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __ffs(unsigned x) {
  return __builtin_ffs(static_cast<int>(x));
}
inline int __ffsll(unsigned long long x) {
  return __builtin_ffsll(static_cast<long long>(x));
}
inline int __clz(unsigned x) {
  return x ? __builtin_clz(x) : 32;
}
inline int __clzll(unsigned long long x) {
  return x ? __builtin_clzll(x) : 64;
}
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long y = 0;
  for (int i = 0; i < 64; ++i) y |= (x >> i & 1) << (63 - i);
  return y;
}
inline unsigned __brev(unsigned x) {
  return static_cast<unsigned>(__brevll(x) >> 32);
}
inline int __mulhi(int a, int b) {
  return static_cast<int>((int64_t{a} * b) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (choice & 7))) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, in all bits
    result |= byte << (8 * i);
  }
  return result;
}

// Of mixed arithmetic types, as CUDA has them; a NaN operand is ignored.
template <class A, class B>
std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value, std::common_type_t<A, B>> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point<T>::value) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// Floats. Templates where newer C libraries declare a function of the same name, macros where they declare it but do
// not define it.

template <class T>
std::enable_if_t<std::is_arithmetic<T>::value, float> rsqrtf(T x) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(x)));
}
template <class T>
std::enable_if_t<std::is_arithmetic<T>::value, std::conditional_t<std::is_same<T, float>::value, float, double>> rsqrt(
    T x) {
  if constexpr (std::is_same<T, float>::value) return rsqrtf(x);
  return 1 / std::sqrt(static_cast<double>(x));
}

namespace cnx {
namespace emulation {
inline float fast_exp(float x) {
  return std::exp(x);
}
inline float fast_exp10(float x) {
  return std::pow(10.0f, x);
}
inline float fast_log(float x) {
  return std::log(x);
}
inline float fast_log2(float x) {
  return std::log2(x);
}
inline float fast_pow(float x, float y) {
  return std::pow(x, y);
}
inline float fast_sin(float x) {
  return std::sin(x);
}
inline float fast_cos(float x) {
  return std::cos(x);
}
inline float fast_tanh(float x) {
  return std::tanh(x);
}
}  // namespace emulation
}  // namespace cnx
#define __expf ::cnx::emulation::fast_exp
#define __exp10f ::cnx::emulation::fast_exp10
#define __logf ::cnx::emulation::fast_log
#define __log2f ::cnx::emulation::fast_log2
#define __powf ::cnx::emulation::fast_pow
#define __sinf ::cnx::emulation::fast_sin
#define __cosf ::cnx::emulation::fast_cos
#define __tanhf ::cnx::emulation::fast_tanh

inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __saturatef(float x) {
  return x > 0 ? x < 1 ? x : 1 : 0;
}
inline float normcdff(float x) {
  return static_cast<float>(0.5 * std::erfc(-static_cast<double>(x) * 0.70710678118654752440));
}

// Rounded once each, never contracted: the results pass through volatile.
#define CNX_ROUNDED(name, T, parameters, expression) \
  inline T name parameters {                         \
    volatile T result = expression;                  \
    return result;                                   \
  }
CNX_ROUNDED(__fadd_rn, float, (float a, float b), a + b)
CNX_ROUNDED(__fsub_rn, float, (float a, float b), a - b)
CNX_ROUNDED(__fmul_rn, float, (float a, float b), a* b)
CNX_ROUNDED(__fdiv_rn, float, (float a, float b), a / b)
CNX_ROUNDED(__frcp_rn, float, (float a), 1 / a)
CNX_ROUNDED(__fsqrt_rn, float, (float a), std::sqrt(a))
CNX_ROUNDED(__frsqrt_rn, float, (float a), rsqrtf(a))
CNX_ROUNDED(__fmaf_rn, float, (float a, float b, float c), std::fma(a, b, c))
CNX_ROUNDED(__dadd_rn, double, (double a, double b), a + b)
CNX_ROUNDED(__dsub_rn, double, (double a, double b), a - b)
CNX_ROUNDED(__dmul_rn, double, (double a, double b), a* b)
CNX_ROUNDED(__ddiv_rn, double, (double a, double b), a / b)
CNX_ROUNDED(__drcp_rn, double, (double a), 1 / a)
CNX_ROUNDED(__dsqrt_rn, double, (double a), std::sqrt(a))
CNX_ROUNDED(__fma_rn, double, (double a, double b, double c), std::fma(a, b, c))
#undef CNX_ROUNDED

#define CNX_BIT_CAST(name, From, To)               \
  inline To name(From x) {                         \
    static_assert(sizeof(From) == sizeof(To), ""); \
    To y;                                          \
    std::memcpy(&y, &x, sizeof(y));                \
    return y;                                      \
  }
CNX_BIT_CAST(__int_as_float, int, float)
CNX_BIT_CAST(__uint_as_float, unsigned, float)
CNX_BIT_CAST(__float_as_int, float, int)
CNX_BIT_CAST(__float_as_uint, float, unsigned)
CNX_BIT_CAST(__longlong_as_double, long long, double)
CNX_BIT_CAST(__double_as_longlong, double, long long)
#undef CNX_BIT_CAST

// Conversions from float to 32-bit integers saturate, and NaN becomes 0, as on the GPU.
namespace cnx {
namespace emulation {
template <class To>
To saturate(double x) {
  static_assert(sizeof(To) == 4, "its limits must be exact in double");
  constexpr double low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  if (x != x) return 0;
  if (x <= low) return std::numeric_limits<To>::min();
  if (x >= high) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}
}  // namespace emulation
}  // namespace cnx
inline int __float2int_rn(float x) {
  return ::cnx::emulation::saturate<int>(std::nearbyint(static_cast<double>(x)));
}
inline int __float2int_rz(float x) {
  return ::cnx::emulation::saturate<int>(std::trunc(static_cast<double>(x)));
}
inline int __float2int_rd(float x) {
  return ::cnx::emulation::saturate<int>(std::floor(static_cast<double>(x)));
}
inline int __float2int_ru(float x) {
  return ::cnx::emulation::saturate<int>(std::ceil(static_cast<double>(x)));
}
inline unsigned __float2uint_rn(float x) {
  return ::cnx::emulation::saturate<unsigned>(std::nearbyint(static_cast<double>(x)));
}
inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
inline float __ll2float_rn(long long x) {
  return static_cast<float>(x);
}
inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}
inline double __int2double_rn(int x) {
  return x;
}
