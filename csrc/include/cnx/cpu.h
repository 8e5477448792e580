// Torch-free interface of the CPU kernels: the structs of cnx/params.h and a caller-supplied thread runner. Results
// do not depend on the number of threads.
#pragma once

#include "cnx/params.h"

namespace cnx {

// Runs body(begin, end, context) over a partition of [begin, end), ranges of at least `grain`.
struct Threads {
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

struct KernelTable {
  const char* name;
  int vector_bytes;
  void (*conv_forward)(const ConvForward&, const Threads&);
  void (*conv_weight_grad)(const ConvWeightGrad&, const Threads&);
  void (*layer_norm_forward)(const LayerNormForward&, const Threads&);
  void (*layer_norm_backward)(const LayerNormBackward&, const Threads&);
  void (*space_to_depth_norm_forward)(const SpaceToDepthNorm&, const Threads&);
  void (*space_to_depth_norm_backward)(const SpaceToDepthNorm&, const Threads&);
  void (*grn_forward)(const GrnForward&, const Threads&);
  void (*grn_backward)(const GrnBackward&, const Threads&);
  void (*gelu_square_sum)(const MlpRows&, const Threads&);      // a -> gelu(a); sums [count, H] of its square
  void (*scale_rows)(const MlpRows&, const Threads&);           // a = a * scale + beta
  void (*mlp_backward_reduce)(const MlpRows&, const Threads&);  // sums [count, H] of ds * gelu(a)
  void (*mlp_backward_pointwise)(const MlpRows&,
                                 const Threads&);  // a -> gelu(a)*scale + beta, ds -> da; sums [H] of da
  void (*grn_scale)(const GrnStatistics&);
  void (*grn_gradient)(const GrnStatistics&);
  void (*column_sum)(const MlpRows&, const Threads&);  // sums [H] of a
};

// The table of the widest instruction set this processor has; CONVNEXTV2_KERNELS_CPU_ISA lowers the choice.
const KernelTable& kernels();

// The table of "avx512", "avx2" or "baseline", or null where this processor cannot run it.
const KernelTable* find_kernels(const char* isa);

// Plain memory moves, the same for every instruction set.
void gather_patches(const PatchCopy&, const Threads&);
void scatter_patches(const PatchCopy&, const Threads&);
void patch_pixels(const PatchPixels&, const Threads&);

// out[cols, rows] = x[rows, cols]' of float32, in tiles that stay in cache.
void transpose_f32(const float* x, int64_t rows, int64_t cols, float* out, const Threads&);

}  // namespace cnx
