// What the kernel tests share: checks that report, random data, an exact thread runner.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "cnx/cpu.h"

namespace test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool ok, const char* what, double value = 0) {
  if (ok) return;
  ++failures();
  std::printf("FAILED %s (%g)\n", what, value);
}

// What main returns.
inline int exit_code() {
  return failures() ? 1 : 0;
}

// f(kernels) for every instruction set that this processor has; the exit code.
template <class F>
int on_every_isa(const F& f) {
  for (const char* isa : {"avx512", "avx2", "baseline"}) {
    if (const cnx::KernelTable* kernels = cnx::find_kernels(isa)) f(*kernels);
    std::printf("%s: %s\n", isa, cnx::find_kernels(isa) ? "done" : "this processor lacks it, skipped");
  }
  return exit_code();
}

// Largest difference relative to the largest expected magnitude.
template <class A, class B>
double relative_error(const std::vector<A>& got, const std::vector<B>& expected) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::fmax(error, std::fabs(double(got[i]) - double(expected[i])));
    size = std::fmax(size, std::fabs(double(expected[i])));
    if (std::isnan(double(got[i]))) return INFINITY;
  }
  return error / size;
}

// GELU and its derivative, in the forms the kernels have.
inline double gelu_gate(cnx::Activation act, double a) {
  if (act == cnx::Activation::gelu) return 0.5 * std::erfc(-a / std::sqrt(2.0));
  return 1 / (1 + std::exp(-std::sqrt(8 / M_PI) * (a + 0.044715 * a * a * a)));
}
inline double gelu(cnx::Activation act, double a) {
  return a * gelu_gate(act, a);
}
inline double gelu_slope(cnx::Activation act, double a) {
  const double gate = gelu_gate(act, a);
  if (act == cnx::Activation::gelu) return gate + a * std::exp(-0.5 * a * a) / std::sqrt(2 * M_PI);
  // of 1 - gate its own formula, which does not cancel
  return gate + a * gate * gelu_gate(act, -a) * std::sqrt(8 / M_PI) * (1 + 3 * 0.044715 * a * a);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252ull) {}
  double uniform() {  // [-1, 1)
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return double(state_ >> 11) / double(1ull << 52) - 1.0;
  }
  template <class A>
  std::vector<A> vector(int64_t n) {
    std::vector<A> v(n);
    for (auto& x : v) x = A(uniform());
    return v;
  }

 private:
  uint64_t state_;
};

// Cuts the range over two std::threads, so that a sanitizer sees real concurrency.
inline cnx::Threads two_threads() {
  const auto run = [](int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    const int64_t middle = begin + (end - begin) / 2;
    std::thread first([=] {
      if (begin < middle) body(begin, middle, context);
    });
    body(middle, end, context);
    first.join();
  };
  return {2, run};
}

inline cnx::Threads one_thread() {
  const auto run = [](int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    body(begin, end, context);
  };
  return {1, run};
}

template <class A>
cnx::DType dtype_of();
template <>
inline cnx::DType dtype_of<float>() {
  return cnx::DType::f32;
}
template <>
inline cnx::DType dtype_of<double>() {
  return cnx::DType::f64;
}

}  // namespace test
