// Which kernel runs a depthwise convolution of a given shape, and how its work is divided.
#pragma once

#include "../common/launch.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {

enum class ConvKernel { tile, small_patch, pixel, generic };

// n / divisor for 0 <= n < 2^31, by a multiplication (Granlund and Montgomery).
struct Divisor {
  uint32_t divisor, multiplier;
  int shift;

  static Divisor of(uint32_t divisor) {
    int shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    return {divisor, static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / divisor + 1), shift};
  }
  __device__ __forceinline__ int operator()(int n) const {
    return static_cast<int>((static_cast<uint64_t>(2u * static_cast<uint32_t>(n)) * multiplier >> 32) >> shift);
  }
};

// Lanes hold words of channels, 32 in a block. What is left of a pixel's words is, where that idles fewer lanes, cut
// into a block of 16 words and one of 8, of which a warp holds two and four units side by side; a neighbour that is
// hidden from one of them and not from all is read as zeros.
//
// A CTA works on one block, or on all of them where LN is fused: then on `units` at once.
struct ConvPlan {
  ConvKernel kernel;
  bool fused;                  // the kernel itself normalises
  int units;                   // that a CTA has at work at once, of blocks of 32 words
  int wide, halves, quarters;  // blocks of 32, 16 and 8 words of a CTA
  int warps;                   // of a CTA
  int shared;                  // bytes of dynamic shared memory
  int columns[3];              // blocks of 32, 16 and 8 words that have CTAs of their own
  int parts[3];                // CTAs that share the units of such a column; known at launch
  int64_t all;  // tile: strips of 4 x 8 pixels; small_patch: patches; pixel: pixels (below 2^31); generic: threads
  Divisor strips, strips_down;  // tile: strips of a map, and in its height

  CNX_HOST_DEVICE int blocks() const { return wide + halves + quarters; }
  // Words before a block.
  CNX_HOST_DEVICE int before(int block) const { return block <= wide ? 32 * block : 32 * wide + 16; }
};

// Host only, no device needed.
ConvPlan conv_forward_plan(const ConvForward& p);
const char* conv_forward_choice(const ConvForward& p);

}  // namespace cuda
}  // namespace cnx
