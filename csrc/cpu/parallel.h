// Helpers of the kernels: parallel loops over units fixed by shape, scratch memory, dtype dispatch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cnx/cpu.h"
#include "simd.h"

namespace cnx {
namespace CNX_ISA {

template <class F>
void parallel_for(const Threads& threads, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  threads.run(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Cache-line aligned memory without initialisation.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count > 0 ? count : 1) * sizeof(A) + 63) / 64 * 64;
    data_ = static_cast<A*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

CNX_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
CNX_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
CNX_INLINE int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Rows of a segment are cut into blocks of this many, the unit of partial column sums: fixed, so that sums depend
// neither on the thread count nor on how images are chunked.
constexpr int64_t kRowBlock = 64;

struct RowBlock {
  int64_t segment, begin, end;
};

// The row blocks of all segments, in order.
class RowBlocks {
 public:
  explicit RowBlocks(const Segments& segments) : blocks_(count_blocks(segments)), size_(count_blocks(segments)) {
    int64_t next = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t end = segments.begin(s + 1);
      for (int64_t r = segments.begin(s); r < end; r += kRowBlock)
        blocks_.get()[next++] = {s, r, smaller(r + kRowBlock, end)};
    }
  }
  int64_t size() const { return size_; }
  const RowBlock& operator[](int64_t i) const { return blocks_.get()[i]; }

 private:
  static int64_t count_blocks(const Segments& segments) {
    int64_t total = 0;
    for (int64_t s = 0; s < segments.count; ++s)
      total += ceil_div(segments.begin(s + 1) - segments.begin(s), kRowBlock);
    return total;
  }
  Scratch<RowBlock> blocks_;
  int64_t size_;
};

// sums[segment] = partial[block] added in order; partial [blocks, channels], sums [count, channels], overwritten.
template <class A>
void sum_blocks_by_segment(const RowBlocks& blocks, const A* partial, int64_t count, int64_t channels, A* sums) {
  for (int64_t i = 0; i < count * channels; ++i) sums[i] = 0;
  for (int64_t b = 0; b < blocks.size(); ++b) {
    A* target = sums + blocks[b].segment * channels;
    const A* source = partial + b * channels;
    for (int64_t c = 0; c < channels; ++c) target[c] += source[c];
  }
}

template <class A>
void sum_blocks(int64_t count, const A* partial, int64_t channels, A* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t c = 0; c < channels; ++c) sums[c] += partial[b * channels + c];
}

template <class T>
const T* in(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* out(void* p) {
  return static_cast<T*>(p);
}

// CNX_DISPATCH(dtype, f, args...) calls f<T>(args...) for the element type.
#define CNX_DISPATCH(dtype, f, ...)  \
  switch (dtype) {                   \
    case DType::f32:                 \
      return f<float>(__VA_ARGS__);  \
    case DType::f64:                 \
      return f<double>(__VA_ARGS__); \
    case DType::bf16:                \
      return f<bf16>(__VA_ARGS__);   \
  }

}  // namespace CNX_ISA
}  // namespace cnx
