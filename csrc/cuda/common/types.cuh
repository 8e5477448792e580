// Element types, 16-byte and smaller vector accesses, and the switch from DType to a type.
#pragma once

#include "launch.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cnx/params.h"

namespace cnx {
namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_acc(float v) {
  return v;
}
__device__ __forceinline__ double to_acc(double v) {
  return v;
}
__device__ __forceinline__ float to_acc(bf16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_acc(f16 v) {
  return __half2float(v);
}

// Round to nearest even; float16 overflows to infinity, as in PyTorch.
template <class T>
__device__ __forceinline__ T from_acc(Acc<T> v);
template <>
__device__ __forceinline__ float from_acc<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double from_acc<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_acc<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 from_acc<f16>(float v) {
  return __float2half_rn(v);
}

// N elements that load and store as one access of sizeof(T) * N <= 16 bytes; the address must be that aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <class T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(p) = value;
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Vec<T, N>& in, Acc<T> (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_acc(in.v[i]);
}
template <class T, int N>
__device__ __forceinline__ Vec<T, N> pack(const Acc<T> (&in)[N]) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = from_acc<T>(in[i]);
  return out;
}

// Host: the widest N of 16 / sizeof(T), ..., 2, 1 for which rows of `channels` elements starting at all the given
// pointers can be read N at a time.
template <class T>
int vector_width(int64_t channels, std::initializer_list<const void*> pointers) {
  for (int n = 16 / static_cast<int>(sizeof(T)); n > 1; n /= 2) {
    bool fits = channels % n == 0;
    for (const void* p : pointers) fits = fits && reinterpret_cast<uintptr_t>(p) % (n * sizeof(T)) == 0;
    if (fits) return n;
  }
  return 1;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the feature type of a DType.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::f64:
      return f(Type<double>{});
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<f16>{});
  }
}

}  // namespace cuda
}  // namespace cnx
