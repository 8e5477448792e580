// Torch-free interface of the CPU kernels: the structs of cnx/params.h and a caller-supplied thread runner. Results
// do not depend on the number of threads.
#pragma once

#include "cnx/params.h"

namespace cnx {

// Runs body(begin, end, context) over a partition of [begin, end), ranges of at least `grain`, on about `count`
// threads.
struct Threads {
  int count;
  void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
};

// Every kernel that is compiled for each instruction set, and its parameters.
#define CNX_CPU_KERNELS(K)                          \
  K(conv_forward, ConvForward)                      \
  K(conv_weight_grad, ConvWeightGrad)               \
  K(layer_norm_forward, LayerNormForward)           \
  K(layer_norm_backward, LayerNormBackward)         \
  K(space_to_depth_norm_forward, SpaceToDepthNorm)  \
  K(space_to_depth_norm_backward, SpaceToDepthNorm) \
  K(gather_norm_forward, GatherNorm)                \
  K(gather_norm_backward, GatherNorm)               \
  K(grn_forward, GrnForward)                        \
  K(grn_backward, GrnBackward)                      \
  K(layer_norm_grn_forward, LayerNormGrnForward)    \
  K(layer_norm_grn_backward, LayerNormGrnBackward)  \
  K(gelu_statistics, GeluStatistics)                \
  K(gelu_scale, GeluScale)                          \
  K(mlp_backward_statistics, MlpBackwardStatistics) \
  K(mlp_backward_pointwise, MlpBackwardPointwise)   \
  K(column_sum, ColumnSum)

struct KernelTable {
  const char* name;
  int vector_bytes;
#define CNX_CPU_MEMBER(name, Params) void (*name)(const Params&, const Threads&);
  CNX_CPU_KERNELS(CNX_CPU_MEMBER)
#undef CNX_CPU_MEMBER
};

// The table of the widest instruction set this processor has; CONVNEXTV2_KERNELS_CPU_ISA lowers the choice.
const KernelTable& kernels();

// The table of "avx512", "avx2" or "baseline", or null where this processor cannot run it.
const KernelTable* find_kernels(const char* isa);

// Plain memory moves, the same for every instruction set.
void gather_patches(const PatchCopy&, const Threads&);
void scatter_patches(const PatchCopy&, const Threads&);
void put_patches(const PatchCopy&, const Threads&);
void patch_pixels(const PatchPixels&, const Threads&);

// out[cols, rows] = x[rows, cols]' of float32, in tiles that stay in cache.
void transpose_f32(const float* x, int64_t rows, int64_t cols, float* out, const Threads&);

}  // namespace cnx
