// What runtime.cpp offers: launches, the identity of the running thread, barriers and warp operations.
#pragma once

#include <vector_types.h>

#include <cassert>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace cnx {
namespace emulation {

struct Fiber;

struct Grid {
  uint3 block_index;
  dim3 block_dim, grid_dim;
  unsigned char* dynamic_shared;
};

struct Thread {
  uint3 index;
  unsigned linear;
  const Grid* grid;
  Fiber* fiber;  // null when not started or finished
};

// The running thread; null outside a kernel.
extern __thread Thread* current;

// A grid or block size, kept in 64 bits so that one that does not fit is seen.
struct Extent {
  int64_t x, y, z;
  template <class T, class = std::enable_if_t<std::is_integral<T>::value>>
  Extent(T size) : x(static_cast<int64_t>(size)), y(1), z(1) {}
  Extent(const dim3& size) : x(size.x), y(size.y), z(size.z) {}
};

// `kernel`, if known, must have been allowed its dynamic shared memory past 48 KiB; else any kernel must.
void launch(const char* name, const void* kernel, Extent grid, Extent block, int64_t shared_bytes,
            void (*body)(const void*), const void* context);

template <class Body>
void run(const char* name, Extent grid, Extent block, int64_t shared_bytes, const Body& body) {
  launch(name, nullptr, grid, block, shared_bytes, [](const void* b) { (*static_cast<const Body*>(b))(); }, &body);
}

// The same with the kernel's address.
template <class Kernel, class Body>
void run(const char* name, Kernel* kernel, Extent grid, Extent block, int64_t shared_bytes, const Body& body) {
  launch(
      name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* b) { (*static_cast<const Body*>(b))(); }, &body);
}

inline unsigned char* dynamic_shared() {
  return current->grid->dynamic_shared;
}

// Throws std::runtime_error; inside a kernel with its name, the block and the thread.
[[noreturn]] void fail(const std::string& what, const char* file = nullptr, int line = 0);

constexpr int64_t kDefaultShared = 48 * 1024, kMaximumShared = 227 * 1024;
bool allow_shared(const void* kernel, int64_t bytes);  // false: more than there is

int64_t environment(const char* name, int64_t otherwise);

// Where a barrier or warp operation stands in the source; threads that meet must be at the same place.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

struct Votes {
  unsigned count, threads;
};
Votes block_barrier(const Site& site, bool vote);

// Lets other threads of the block run.
void yield();

// Warp operations: every lane of `mask` leaves 8 bytes and the last one computes what each lane receives.
using Finish = void (*)(const uint64_t* left, const unsigned* source, unsigned mask, uint64_t* received);
uint64_t warp_operation(const Site& site, unsigned mask, uint64_t value, unsigned source, Finish finish);

template <class T>
uint64_t to_bits(const T& value) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a warp operation moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace emulation
}  // namespace cnx
