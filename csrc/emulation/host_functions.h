// The CUDA runtime functions that host code calls, without a CUDA runtime. Declared by the toolkit as extern "C", hence
// macros rather than definitions.
#pragma once

#include <cstdlib>

#include "runtime.h"

namespace cnx {
namespace emulation {

inline const char* error_string(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    default:
      return "emulated CUDA error";
  }
}

// A failed launch throws, so there never is an error to fetch.
inline cudaError_t get_last_error() {
  return cudaSuccess;
}

inline cudaError_t get_device(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t device_get_attribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(environment("CNX_EMULATION_SMS", 4));
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kDefaultShared;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMaximumShared;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kMaximumShared + 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = 65536;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// At most 2 where a GPU would have up to 32, so that persistent kernels loop over small tests.
template <class Kernel>
cudaError_t occupancy(int* blocks, Kernel, int threads, size_t shared) {
  const bool fits = threads > 0 && threads <= 1024 && shared <= size_t{kMaximumShared};
  *blocks = !fits ? 0 : threads > 512 || shared > size_t{kMaximumShared} / 2 ? 1 : 2;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t func_set_attribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return allow_shared(reinterpret_cast<const void*>(kernel), value) ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Kernel>
cudaError_t func_get_attributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = cudaFuncAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = kDefaultShared;
  return cudaSuccess;
}

inline cudaError_t memset_async(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

inline cudaError_t memcpy_async(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                                cudaStream_t = nullptr) {
  if (bytes) std::memmove(target, source, bytes);
  return cudaSuccess;
}

template <class T>
cudaError_t allocate(T** pointer, size_t bytes) {
  *pointer = static_cast<T*>(std::malloc(bytes));
  return *pointer || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}

inline cudaError_t release(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

inline cudaError_t synchronize(cudaStream_t = nullptr) {
  return cudaSuccess;
}

}  // namespace emulation
}  // namespace cnx

#define cudaGetErrorString ::cnx::emulation::error_string
#define cudaGetErrorName ::cnx::emulation::error_string
#define cudaGetLastError ::cnx::emulation::get_last_error
#define cudaPeekAtLastError ::cnx::emulation::get_last_error
#define cudaGetDevice ::cnx::emulation::get_device
#define cudaDeviceGetAttribute ::cnx::emulation::device_get_attribute
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor ::cnx::emulation::occupancy
#define cudaFuncSetAttribute ::cnx::emulation::func_set_attribute
#define cudaFuncGetAttributes ::cnx::emulation::func_get_attributes
#define cudaMemsetAsync ::cnx::emulation::memset_async
#define cudaMemset ::cnx::emulation::memset_async
#define cudaMemcpyAsync ::cnx::emulation::memcpy_async
#define cudaMemcpy ::cnx::emulation::memcpy_async
#define cudaMalloc ::cnx::emulation::allocate
#define cudaFree ::cnx::emulation::release
#define cudaStreamSynchronize ::cnx::emulation::synchronize
#define cudaDeviceSynchronize ::cnx::emulation::synchronize
