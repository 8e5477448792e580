// Tensor core instructions of a warp, sm_80 and later. All 32 lanes call them together. Which lane holds what is said
// in csrc/emulation/tensor_cores.h, which is also what they do there.
#pragma once

#include <type_traits>

#include "types.cuh"

#if defined(CNX_EMULATION)
#include "../../emulation/tensor_cores.h"
#endif

namespace cnx {
namespace cuda {

#if !defined(CNX_EMULATION)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Four matrices of 8 rows of 8 elements; lane l gives the address of row l % 8 of matrix l / 8, aligned to 16 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#if defined(CNX_EMULATION)
  emulation::load_matrix<4, false>(to, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
#if defined(CNX_EMULATION)
  emulation::load_matrix<4, true>(to, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// d += a b; a is 16 x 16, b 16 x 8. Products of bfloat16 or float16 are exact, sums are float.
#if defined(CNX_EMULATION)
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add<T, 4>(d, a, b);
}
// The same with half the depth: a is 16 x 8, b 8 x 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  emulation::multiply_add<T, 2>(d, a, b);
}
#else
#define CNX_MULTIPLY_ADD_16(type)                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define CNX_MULTIPLY_ADD_8(type)                                                                                       \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                 \
      : "r"(a[0]), "r"(a[1]), "r"(b[0]))
// What older GPUs do not have must not stop a build for them; there conv_mma_supports says no.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T, int kWords>
__device__ __forceinline__ void multiply_add(float (&)[4], const uint32_t (&)[kWords], const uint32_t (&)[kWords / 2]) {
  __trap();
}
#else
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same<T, bf16>::value)
    CNX_MULTIPLY_ADD_16("bf16");
  else
    CNX_MULTIPLY_ADD_16("f16");
}
// The same with half the depth: a is 16 x 8, b 8 x 8.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  if constexpr (std::is_same<T, bf16>::value)
    CNX_MULTIPLY_ADD_8("bf16");
  else
    CNX_MULTIPLY_ADD_8("f16");
}
#endif
#undef CNX_MULTIPLY_ADD_16
#undef CNX_MULTIPLY_ADD_8
#endif

}  // namespace cuda
}  // namespace cnx
