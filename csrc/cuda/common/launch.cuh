// Launching, and the seam between nvcc and the emulation that runs the same files on a CPU (csrc/emulation).
#pragma once

#if defined(CNX_EMULATION)
#include "../../emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace cnx {
namespace cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the runtime keeps it, and a later launch that is well would report it
  throw std::runtime_error(std::string("convnextv2_kernels: ") + what + ": " + cudaGetErrorString(status));
}

// What the driver says about a device or a kernel does not change, but each question takes microseconds of a launch:
// answers are kept, per `Key` and per place in the program (the type of `ask`). From any thread.
template <class Key, class F>
int ask_once(const Key& key, const F& ask) {
  static std::mutex mutex;
  static std::map<Key, int> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(key);
  if (known != answers.end()) return known->second;
  const int answer = ask();  // may throw, which leaves nothing behind
  answers.emplace(key, answer);
  return answer;
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  const int device = current_device();
  const auto ask = [&] {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    return count;
  };
#if defined(CNX_EMULATION)
  return ask();  // the environment may change it
#else
  return ask_once(device, ask);
#endif
}

// CTAs of a kernel that fit the whole device at once; the grid of a persistent kernel.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, size_t shared) {
  const std::tuple<const void*, int, int, size_t> key(reinterpret_cast<const void*>(kernel), current_device(), threads,
                                                      shared);
  const int each = ask_once(key, [&] {
    int count = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared), "occupancy");
    return count > 0 ? count : 1;
  });
  return each * multiprocessors();
}

// Past 48 KiB of dynamic shared memory a kernel must be told so. It is told the most that was asked for: a limit that
// another launch lowers would fail this one.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const void* function = reinterpret_cast<const void*>(kernel);
  const std::pair<const void*, int> key(function, current_device());
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = allowed.find(key);
  if (known != allowed.end() && known->second >= bytes) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "shared memory limit");
  allowed[key] = bytes;
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
