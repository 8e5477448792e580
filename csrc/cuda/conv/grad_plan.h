// The weight gradient of the depthwise convolution: which kernel runs a shape, and how its sums are divided.
//
// Stage 1 writes partial sums [splits][K*K + 1][C] (the last row is the bias gradient), stage 2 adds them in order. The
// cut depends on the shape alone, so a result does not depend on the device it was computed on.
#pragma once

#include "../common/types.cuh"
#include "cnx/cuda.h"

namespace cnx {
namespace cuda {

enum class GradKernel {
  tile,         // K = 7, dense maps and patch sides that are multiples of 8: 8x8 tiles
  small_patch,  // K = 7, patch sides 2 and 4: whole patches
  pixel,        // side 1, any K: one warp per tap
  generic,      // everything else
};

// A lane owns one word of 4 bytes: channels per word.
template <class T>
constexpr int kPerWord = sizeof(T) >= 4 ? 1 : 4 / static_cast<int>(sizeof(T));

constexpr int kGradWarps = 4;     // of tile and small_patch: they work on different tiles of the same channels
constexpr int kGenericWarps = 8;  // of the kernel for any shape: lines of pixels of the same channels
constexpr int kTile = 8;
constexpr int kMaxKernel = 11;

// Channel blocks of 32 words; what is left is cut into a block of 16 words and one of 8 where that idles fewer lanes:
// there a warp works on two or four tiles at once.
struct ChannelBlocks {
  int64_t words;

  CNX_HOST_DEVICE int64_t count() const {
    const int64_t rest = words % 32;
    return words / 32 + (rest > 0) + (rest > 16 && rest <= 24);
  }
  CNX_HOST_DEVICE void block(int64_t index, int64_t* first, int* width) const {
    const int64_t full = words / 32, rest = words % 32;
    *first = 32 * (index < full ? index : full);
    *width = index < full || rest > 24 ? 32 : index == full && rest > 8 ? 16 : 8;
    if (index > full) *first += 16;
  }
};

struct GradPlan {
  GradKernel kernel;
  int64_t units;      // what the splits divide: tiles, patches, or lines of pixels
  int64_t blocks;     // of channels
  int64_t per_split;  // units, the last split may have fewer
  int64_t splits;     // 0 without units
};

inline dim3 tap_rows(const GradPlan& plan, int kernel_size) {
  return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(kernel_size),
              static_cast<unsigned>(plan.splits));
}

template <class T>
struct GradArguments {
  const T* x;
  const T* grad;
  const int32_t* neighbours;
  Acc<T>* partial;
  int64_t maps, height, width, channels;
  int64_t units, per_split;
  int kernel_size;
  uint32_t step;  // bytes from one pixel to the next
};

template <class T>
void weight_grad_tile(const GradArguments<T>&, const GradPlan&, const Launch&);
template <class T>
void weight_grad_small_patch(const GradArguments<T>&, const GradPlan&, const Launch&);
template <class T>
void weight_grad_pixel(const GradArguments<T>&, const GradPlan&, const Launch&);
template <class T>
void weight_grad_generic(const GradArguments<T>&, const GradPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
