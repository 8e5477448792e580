// Launching, and the seam between nvcc and the emulation that runs the same files on a CPU (csrc/emulation).
#pragma once

#if defined(CNX_EMULATION)
#include "../emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cnx {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("convnextv2_kernels: ") + what + ": " + cudaGetErrorString(status));
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

// CTAs of a kernel that fit the whole device at once; the grid of a persistent kernel.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, size_t shared) {
  int each = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared), "occupancy");
  return (each > 0 ? each : 1) * multiprocessors();
}

// Past 48 KiB of dynamic shared memory a kernel must be told so.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          "shared memory limit");
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace cuda
}  // namespace cnx

// CNX_LAUNCH((kernel<A, B>), grid, block, shared bytes, Launch, arguments...): enqueue and check.
// CNX_DYNAMIC_SHARED(name): `unsigned char* name`, the block's dynamic shared memory, aligned to 16 bytes.
#if defined(CNX_EMULATION)
#define CNX_LAUNCH(kernel, grid, block, shared, launch, ...) \
  ((void)(launch),                                           \
   ::cnx::emulation::run(#kernel, kernel, grid, block, shared, [&] { CNX_PARENTHESISED kernel(__VA_ARGS__); }))
#define CNX_PARENTHESISED(...) __VA_ARGS__
#define CNX_DYNAMIC_SHARED(name) unsigned char* name = ::cnx::emulation::dynamic_shared()
#else
#define CNX_LAUNCH(kernel, grid, block, shared, launch, ...)                                                    \
  do {                                                                                                          \
    CNX_PARENTHESISED kernel<<<grid, block, shared, static_cast<cudaStream_t>((launch).stream)>>>(__VA_ARGS__); \
    ::cnx::cuda::check(cudaGetLastError(), #kernel);                                                            \
  } while (0)
#define CNX_PARENTHESISED(...) __VA_ARGS__
#define CNX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
