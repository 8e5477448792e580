// What the tests of the CUDA row kernels share: exact buffers full of NaN, comparison, and launches with exactly the
// workspace a kernel asks for.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../cuda/common/types.cuh"
#include "cnx/cuda.h"
#include "harness.h"

namespace test {

using namespace cnx;
using namespace cnx::cuda;

template <class T>
constexpr DType kDType = std::is_same<T, float>::value    ? DType::f32
                         : std::is_same<T, double>::value ? DType::f64
                         : std::is_same<T, bf16>::value   ? DType::bf16
                                                          : DType::f16;

// Bounds relative to the largest value: half a step of a rounded result; and of sums, which bfloat16's polynomial
// limits.
template <class T>
constexpr double kRounding = sizeof(T) == 8             ? 1e-13
                             : sizeof(T) == 4           ? 3e-6
                             : kDType<T> == DType::bf16 ? 4e-3
                                                        : 6e-4;
template <class T>
constexpr double kSummed = sizeof(T) == 8             ? 1e-13
                           : kDType<T> == DType::bf16 ? 2e-4
                                                      : 4e-6;

inline double value(double v) {
  return v;
}
inline double value(float v) {
  return v;
}
inline double value(bf16 v) {
  return __bfloat162float(v);
}
inline double value(f16 v) {
  return __half2float(v);
}

// `size` elements, aligned to 16 bytes or misaligned by one element, NaN until written; what lies before must stay.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, bool misaligned = false) : offset_(16 / sizeof(T) + misaligned), storage_(offset_ + size) {
    if (!storage_.empty()) std::memset(static_cast<void*>(storage_.data()), 0xff, storage_.size() * sizeof(T));
  }
  ~Buffer() {
    const std::vector<unsigned char> untouched(offset_ * sizeof(T), 0xff);
    check(std::memcmp(storage_.data(), untouched.data(), untouched.size()) == 0, "written before the start");
  }
  Buffer& random(Random& source, double size = 1) {
    for (int64_t i = 0; i < count(); ++i) data()[i] = from_acc<T>(static_cast<Acc<T>>(source.uniform() * size));
    return *this;
  }
  T* data() { return storage_.data() + offset_; }
  int64_t count() const { return static_cast<int64_t>(storage_.size() - offset_); }
  double operator[](int64_t i) const { return value(storage_[offset_ + i]); }

 private:
  size_t offset_;
  std::vector<T> storage_;
};

template <class T>
void compare(const Buffer<T>& got, const std::vector<double>& expected, double bound, const char* what) {
  double error = 0, size = 1e-3;
  for (size_t i = 0; i < expected.size(); ++i) {
    size = std::fmax(size, std::fabs(expected[i]));
    error = std::isnan(got[i]) ? INFINITY : std::fmax(error, std::fabs(got[i] - expected[i]));
    if (std::isinf(error)) break;
  }
  check(got.count() == static_cast<int64_t>(expected.size()) && error <= bound * size, what, error / size);
}

// Runs `name` with exactly the workspace it asks for, full of NaN.
template <class P>
void run(void (*kernel)(const P&, const Launch&), int64_t (*workspace)(const P&), const P& p) {
  void* memory = nullptr;
  const int64_t bytes = workspace(p);
  if (bytes > 0 && posix_memalign(&memory, 256, bytes) != 0) std::abort();
  if (memory) std::memset(memory, 0xff, bytes);
  kernel(p, {.workspace = memory});
  std::free(memory);
}
#define RUN(name, p) run(name, name##_workspace, p)

// f(a value of the type, its name) for every feature type; the exit code.
template <class F>
int on_every_type(const F& f) {
  f(float{}, "float32");
  f(double{}, "float64");
  f(bf16{}, "bfloat16");
  f(f16{}, "float16");
  return exit_code();
}

}  // namespace test
