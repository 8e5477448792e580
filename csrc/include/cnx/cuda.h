// Torch-free interface of the CUDA kernels: the structs of cnx/params.h, a stream, and a workspace.
//
// Every function only enqueues work on the stream: no allocation, no device synchronisation, nothing read back, so all
// of them can be captured in a CUDA graph. Where a function X has an X_workspace, the caller passes that many bytes of
// device memory, aligned to 256 bytes and live until the stream has run the work; contents are neither read nor kept.
// A failed launch throws std::runtime_error with the kernel's name. Sizes of zero are valid and launch nothing that
// would fail; sums over no rows are zero.
#pragma once

#include <cstdint>

#include "cnx/params.h"

namespace cnx {

// Operands of the MLP's two products, in T: LN's affine part inside the first, GRN's beta inside the second bias.
//   w1_out = w1 * ln_weight, b1_out = b1 + w1 ln_bias, w2_out = w2, b2_out = b2 + w2 beta
struct MlpParameters {
  DType dtype;  // T
  bool wide;    // w1 and w2 are A; else T
  int64_t inputs, hidden, outputs;
  const void* w1;         // [H, C]
  const void* b1;         // A [H]
  const void* w2;         // [O, H]
  const void* b2;         // A [O], or null: b2_out is not wanted
  const void* beta;       // A [H]
  const void* ln_weight;  // A [C] or null
  const void* ln_bias;    // A [C] or null
  void* w1_out;           // T, or null: not wanted
  void* b1_out;           // T
  void* w2_out;           // T, or null: not wanted
  void* b2_out;           // T
};

// From the gradients of w1 * ln_weight and b1 + w1 ln_bias those of w1, in place, ln_weight and ln_bias.
struct UnfoldLayerNorm {
  DType dtype;  // of w1
  int64_t inputs, hidden;
  const void* w1;         // [H, C]
  const void* ln_weight;  // A [C]
  const void* ln_bias;    // A [C]
  const void* db1;        // A [H]
  void* dw1;              // A [H, C]
  void* dln_weight;       // A [C]
  void* dln_bias;         // A [C]
};

// From one product per image g = d' h: t[n, h] = sum_o g w2, and dw2 = sum_n g scale + outer(d_sum, beta).
struct ImageProducts {
  DType dtype;  // of w2
  int64_t images, outputs, hidden;
  const void* g;      // A [N, O, H]
  const void* w2;     // [O, H], read by products_reduce
  void* t;            // A [N, H], written by products_reduce
  const void* scale;  // A [N, H], the rest: products_weight
  const void* d_sum;  // A [O]
  const void* beta;   // A [H]
  void* dw2;          // A [O, H]
};

// The three tensors of PatchLayout.from_kept in one launch; see layout.py.
struct LayoutFromKept {
  int64_t images, grid_h, grid_w, kept;
  const int64_t* ids;      // [N, K], any order, no repeats
  int32_t* slot_of_patch;  // [N, Gh*Gw]
  int32_t* patch_of_slot;  // [N*K]
  int32_t* image_offsets;  // [N+1]
};

struct NeighbourSlots {
  int64_t images, grid_h, grid_w, slots;
  int radius;
  const int32_t* slot_of_patch;
  const int32_t* patch_of_slot;
  int32_t* neighbours;  // [P, (2r+1)^2]
};

namespace cuda {

struct Launch {
  void* stream;  // cudaStream_t
  void* workspace;
};

// Every function of this backend and its parameters. layer_norm_backward: mean null = x is normalised already; dweight
// and dbias may be null. assert_indices and assert_offsets are for debug builds.
#define CNX_CUDA_KERNELS(K)                         \
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
  K(column_sum, ColumnSum)                          \
  K(mlp_parameters, MlpParameters)                  \
  K(unfold_layer_norm, UnfoldLayerNorm)             \
  K(products_reduce, ImageProducts)                 \
  K(products_weight, ImageProducts)                 \
  K(gather_patches, PatchCopy)                      \
  K(scatter_patches, PatchCopy)                     \
  K(put_patches, PatchCopy)                         \
  K(patch_pixels, PatchPixels)                      \
  K(layout_from_kept, LayoutFromKept)               \
  K(neighbour_slots, NeighbourSlots)                \
  K(assert_indices, IndexTable)                     \
  K(assert_offsets, Segments)

// Which kernel serves a convolution (pointers null: aligned), what a CTA of it is, and whether it normalises itself.
// Asks no device.
struct ConvChoice {
  const char* kernel;
  int threads, shared_bytes;
  bool fused;
};
ConvChoice conv_forward_kernel(const ConvForward&);

#define CNX_CUDA_DECLARE(name, Params)     \
  int64_t name##_workspace(const Params&); \
  void name(const Params&, const Launch&);
CNX_CUDA_KERNELS(CNX_CUDA_DECLARE)
#undef CNX_CUDA_DECLARE

}  // namespace cuda
}  // namespace cnx
