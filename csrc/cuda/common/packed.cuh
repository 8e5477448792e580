// Elements as the words they are loaded as, up to 16 bytes.
//
// Between a load and its use a vector stays in whole words: taken apart early, its 16-bit elements would cost a
// register each, and stored as elements they would leave one by one.
#pragma once

#include "types.cuh"

namespace cnx {
namespace cuda {

template <int kBytes>
struct WordsOf;
template <>
struct WordsOf<16> {
  using type = uint4;
};
template <>
struct WordsOf<8> {
  using type = uint2;
};
template <>
struct WordsOf<4> {
  using type = uint32_t;
};
template <>
struct WordsOf<2> {
  using type = uint16_t;
};

template <class T, int N>
struct Packed {
  using Words = typename WordsOf<static_cast<int>(sizeof(T)) * N>::type;
  Words words;
};

template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_packed(const T* p) {
  return {*reinterpret_cast<const typename Packed<T, N>::Words*>(p)};
}
// nvcc 13 takes a 16-byte store inside a loop apart into words; the instruction is therefore named.
__device__ __forceinline__ void store_words(uint4* p, uint4 v) {
#if defined(CNX_EMULATION)
  *p = v;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#endif
}
template <class Words>
__device__ __forceinline__ void store_words(Words* p, Words v) {
  *p = v;
}
template <int N, class T>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, N>& value) {
  store_words(reinterpret_cast<typename Packed<T, N>::Words*>(p), value.words);
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Packed<T, N>& in, Acc<T> (&out)[N]) {
  T elements[N];
  __builtin_memcpy(static_cast<void*>(elements), &in, sizeof(in));
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_acc(elements[i]);
}
// A bfloat16 is the upper half of a float: one operation per element.
template <int N>
__device__ __forceinline__ void unpack(const Packed<bf16, N>& in, float (&out)[N]) {
  if constexpr (N == 1) {
    const uint32_t bits = uint32_t{in.words} << 16;
    __builtin_memcpy(&out[0], &bits, 4);
  } else {
    uint32_t words[N / 2];
    __builtin_memcpy(words, &in, sizeof(in));
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t low = words[i] << 16, high = words[i] & 0xffff0000u;
      __builtin_memcpy(&out[2 * i], &low, 4);
      __builtin_memcpy(&out[2 * i + 1], &high, 4);
    }
  }
}

__device__ __forceinline__ __nv_bfloat162 round_pair(float a, float b, Type<bf16>) {
  return __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ __half2 round_pair(float a, float b, Type<f16>) {
  return __floats2half2_rn(a, b);
}

template <class T, int N>
__device__ __forceinline__ Packed<T, N> pack_words(const Acc<T> (&in)[N]) {
  Packed<T, N> out;
  if constexpr (sizeof(T) == 2 && N > 1) {
    decltype(round_pair(0, 0, Type<T>{})) pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = round_pair(in[2 * i], in[2 * i + 1], Type<T>{});
    __builtin_memcpy(&out, pairs, sizeof(out));
  } else {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = from_acc<T>(in[i]);
    __builtin_memcpy(&out, elements, sizeof(out));
  }
  return out;
}

// Parameters of neighbouring columns, aligned to 16 bytes when there is more than one.
template <int N, class A>
__device__ __forceinline__ void load_parameters(const A* p, A (&out)[N]) {
  constexpr int each = N * sizeof(A) < 16 ? N : 16 / static_cast<int>(sizeof(A));
#pragma unroll
  for (int i = 0; i < N; i += each) {
    A values[each];
    unpack(load_packed<each>(p + i), values);
#pragma unroll
    for (int j = 0; j < each; ++j) out[i + j] = values[j];
  }
}

}  // namespace cuda
}  // namespace cnx
