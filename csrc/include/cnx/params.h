// What every kernel is told: torch-free plain structs of raw pointers and sizes, the same for the CPU and for CUDA.
//
// Features are contiguous rows of type T (float, double, bfloat16, float16). Parameters and statistics are of the
// accumulator type A: double for double, else float. Every kernel is deterministic: work is cut into units by shape
// alone and partial sums are added in a fixed order.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CNX_HOST_DEVICE __host__ __device__ __forceinline__
#else
// always inline: compiled for several instruction sets, and one shared copy could use the widest
#define CNX_HOST_DEVICE __attribute__((always_inline))
#endif

namespace cnx {

// Accumulator of a feature type: double for double, else float.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// What stands in front of GRN: nothing, GELU by the normal distribution, or its tanh form.
enum class Activation : int { identity = 0, gelu = 1, gelu_tanh = 2 };

// Rows that belong together: `count` equal shares of `rows` when offsets is null, else segment i holds rows
// rows_per_slot * (offsets[i] - offsets[0]) up to the next.
struct Segments {
  const int32_t* offsets;
  int64_t rows_per_slot;
  int64_t count;
  int64_t rows;

  CNX_HOST_DEVICE int64_t begin(int64_t i) const {
    if (offsets) return (int64_t{offsets[i]} - offsets[0]) * rows_per_slot;
    return count ? rows / count * i : 0;
  }
};

// A table of indices, each from `low` to `high`.
struct IndexTable {
  const int32_t* entries;
  int64_t count, low, high;
};

// Depthwise convolution. Packed patches x[P, s, s, C]: neighbours [P, (2r+1)^2] with r = ceil((K/2) / s), maps = P,
// height = width = s. Dense maps x[N, H, W, C]: neighbours null, maps = N.
struct ConvGeometry {
  int64_t maps, height, width, channels;
  int kernel_size;
  const int32_t* neighbours;
};

struct ConvForward {
  DType dtype;
  ConvGeometry geometry;
  const void* x;
  const void* weight;    // A [C, K, K]
  const void* bias;      // A [C] or null
  const void* residual;  // T like y or null, added to the result
  bool flip;             // correlate with the weights turned by 180 degrees: the gradient with respect to x
  void* y;
  bool normalize;         // y becomes LN(conv) over the channels of each pixel
  const void* ln_weight;  // A [C], or null: (conv - mean) * rstd without an affine part
  const void* ln_bias;    // A [C] or null
  double eps;
  void* rstd;  // A [rows], with normalize
};

struct ConvWeightGrad {
  DType dtype;
  ConvGeometry geometry;
  const void* x;
  const void* grad;
  void* dweight;  // A [C, K, K]
  void* dbias;    // A [C]
};

struct LayerNormForward {
  DType dtype;
  int64_t rows, channels;
  const void* x;
  const void* weight;  // A [C] or null
  const void* bias;    // A [C] or null
  double eps;
  void* y;
  void* mean;  // A [rows]
  void* rstd;  // A [rows]
};

struct LayerNormBackward {
  DType dtype;
  int64_t rows, channels;
  const void* grad;
  const void* x;
  const void* mean;    // A [rows], or null when x is normalised already
  const void* rstd;    // A [rows]
  const void* weight;  // A [C] or null
  void* dx;
  void* dweight;  // A [C]
  void* dbias;    // A [C]
};

// x[maps, 2h, 2w, C] -> y[maps, h, w, 2, 2, C], LayerNorm of every pixel, and back.
struct SpaceToDepthNorm {
  DType dtype;
  int64_t maps, height, width, channels;  // height and width of x
  const void* x;                          // forward: x; backward: gradient of y
  const void* weight;                     // A [C], or null: normalised without an affine part
  const void* bias;                       // A [C] or null
  double eps;
  const void* z;  // backward: the normalised pixels, laid out as y
  void* out;      // forward: y; backward: gradient of x
  void* rstd;     // A [maps, 2h, 2w], written by forward, read by backward
  void* dweight;  // backward: A [C]
  void* dbias;    // backward: A [C]
};

struct GrnForward {
  DType dtype;
  Segments segments;
  int64_t channels;
  bool gelu;
  const void* x;
  const void* gamma;  // A [C]
  const void* beta;   // A [C]
  double eps;
  void* y;
  void* norm;  // A [count, C]
};

struct GrnBackward {
  DType dtype;
  Segments segments;
  int64_t channels;
  bool gelu;
  const void* grad;
  const void* x;
  const void* gamma;
  const void* norm;
  double eps;
  void* dx;
  void* dgamma;  // A [C]
  void* dbeta;   // A [C]
};

// y = GRN(LN(x)) and back, from x and statistics alone: z = (x - mean) * rstd of each row, y = z * ln_weight + ln_bias.
struct LayerNormGrnForward {
  DType dtype;
  Segments segments;
  int64_t channels;
  const void* x;
  const void* ln_weight;  // A [C]
  const void* ln_bias;    // A [C]
  const void* gamma;      // A [C]
  const void* beta;       // A [C]
  double ln_eps;
  double eps;
  void* y;
  void* mean;  // A [rows]
  void* rstd;  // A [rows]
  void* norm;  // A [count, C], of LN(x)
};

struct LayerNormGrnBackward {
  DType dtype;
  Segments segments;
  int64_t channels;
  const void* grad;
  const void* x;
  const void* mean;       // A [rows]
  const void* rstd;       // A [rows]
  const void* ln_weight;  // A [C]
  const void* ln_bias;    // A [C]
  const void* gamma;      // A [C]
  const void* norm;       // A [count, C]
  double eps;
  void* dx;
  void* dln_weight;  // A [C]
  void* dln_bias;    // A [C]
  void* dgamma;      // A [C]
  void* dbeta;       // A [C]
};

// The four row passes of the MLP, on hidden rows T [rows, H] in segments (images). a is the first GEMM's output,
// h = activation(a), the GRN output is h * scale + beta. Where the second GEMM takes beta into its bias, beta is null.
struct GeluStatistics {
  DType dtype;
  Segments segments;
  int64_t channels;
  Activation activation;
  const void* a;
  void* h;            // T [rows, H], may be a; null: not stored
  const void* gamma;  // A [H]
  double eps;
  void* norm;   // A [count, H]: sqrt of the column sums of h^2 of each segment
  void* scale;  // A [count, H]: 1 + gamma * norm / (mean over H of norm + eps)
};

struct GeluScale {
  DType dtype;
  Segments segments;
  int64_t channels;
  Activation activation;  // identity: a already holds h
  const void* a;
  const void* scale;  // A [count, H]; null: 1
  const void* beta;   // A [H]; null: 0
  void* out;          // T [rows, H] = h * scale + beta, may be a
};

// With t[count, H] = column sums of ds * h of each segment:
//   dgamma = sum over segments of q * t, q = norm / m, m = mean(norm) + eps; dq = gamma * t;
//   kappa = (dq / m - sum_j(dq norm) / (H m^2)) / norm, 0 where norm is 0; scale as GeluStatistics.
struct MlpBackwardStatistics {
  DType dtype;
  Segments segments;
  int64_t channels;
  Activation activation;
  const void* a;      // with ds: t is summed from them; both null: t is given
  const void* ds;     // T [rows, H]
  const void* t;      // A [count, H] or null
  const void* norm;   // A [count, H]
  const void* gamma;  // A [H]
  double eps;
  void* scale;   // A [count, H]
  void* kappa;   // A [count, H]
  void* dgamma;  // A [H]
};

struct MlpBackwardPointwise {
  DType dtype;
  Segments segments;
  int64_t channels;
  Activation activation;
  const void* a;
  const void* ds;
  const void* scale;  // A [count, H]
  const void* kappa;  // A [count, H]
  const void* beta;   // A [H]; null: 0
  void* hs;           // T [rows, H] = h * scale + beta, may be a; null: not wanted
  void* da;           // T [rows, H] = (ds * scale + h * kappa) * activation'(a), may be ds
  void* db;           // A [H]: column sums of da, of the values before they are rounded to T
};

struct ColumnSum {
  DType dtype;
  int64_t rows, channels;
  const void* x;
  void* sums;  // A [C]
};

// Copies between dense maps and packed patches; plain memory moves, the same for every instruction set.
// Dense map [N, Gh*s, Gw*s] of pixels of `pixel_bytes`; patch_of_slot and slot_of_patch as in PatchLayout.
// put_patches is the reverse of gather_patches: it leaves hidden sites as they are.
struct PatchCopy {
  int64_t images, grid_h, grid_w, side, slots, pixel_bytes;
  const int32_t* patch_of_slot;
  const int32_t* slot_of_patch;
  const void* source;
  const void* fill;  // one pixel for hidden sites, or null for zero bytes
  void* target;
};

// LayerNorm of the rows of visible patches, read from a dense map [N, Gh*s, Gw*s, C] and written packed, and its
// gradient, read packed and written to those places; no other place of the map is touched. Slots are those of
// patch_of_slot, which may be a part of a layout's. Each patch at most once in backward.
struct GatherNorm {
  DType dtype;
  int64_t grid_h, grid_w, side, slots, channels;
  const int32_t* patch_of_slot;  // [slots]
  const void* x;                 // forward: the map; backward: gradient of y, packed
  const void* weight;            // A [C], or null: normalised without an affine part
  const void* bias;              // A [C] or null
  double eps;
  const void* z;  // backward: the normalised rows, packed
  void* out;      // forward: y, packed; backward: the gradient of the map
  void* rstd;     // A [slots, s, s], written by forward, read by backward
  void* dweight;  // backward: A [C], or null with dbias: not wanted
  void* dbias;    // backward: A [C] or null

  CNX_HOST_DEVICE int64_t rows() const { return slots * side * side; }
};

// Rows of 4x4 pixels, channel-major as a conv weight: images[N, C, H, W] -> [slots, side, side, C*16], where `side`
// is the patch side divided by 4. patch_of_slot null: every patch in order, which for side 1 is [N, H/4, W/4, C*16].
struct PatchPixels {
  int64_t channels, height, width, grid_h, grid_w, side, slots, element_bytes;
  const int32_t* patch_of_slot;
  const void* images;
  void* rows;
};

}  // namespace cnx
