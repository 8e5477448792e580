// The CPU as a device of the bindings: the kernel table of this processor, run by PyTorch's thread pool. Not part of
// the emulation build, whose CUDA kernels take its place for CPU tensors.
#pragma once

#include "binding.h"
#include "cnx/cpu.h"

// CNX_IMPLEMENT_CPU(f): f<Cpu>(library) registers implementations for CPU tensors.
#if defined(CNX_EMULATION)
#define CNX_IMPLEMENT_CPU(f)
#else
#define CNX_IMPLEMENT_CPU(f)              \
  CNX_LIBRARY_IMPL(CNX_LIBRARY, CPU, m) { \
    f<cnx::binding::Cpu>(m);              \
  }

namespace cnx {
namespace binding {

// at::parallel_for: the number of threads is what torch.set_num_threads says.
inline Threads torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    torch_parallel_for(begin, end, grain, body, context);
  }};
}

struct Cpu {
  static constexpr const char* kind = "CPU";
  static bool accepts(const Tensor& t) { return t.is_cpu(); }
  static DType dtype_of(const Tensor& t) { return feature_type(t, false); }

#define CNX_CPU_KERNEL(name, Params)                 \
  static void name(const Params& p, const Tensor&) { \
    kernels().name(p, torch_threads());              \
  }
  CNX_CPU_KERNEL(conv_forward, ConvForward)
  CNX_CPU_KERNEL(conv_weight_grad, ConvWeightGrad)
  CNX_CPU_KERNEL(layer_norm_forward, LayerNormForward)
  CNX_CPU_KERNEL(layer_norm_backward, LayerNormBackward)
  CNX_CPU_KERNEL(space_to_depth_norm_forward, SpaceToDepthNorm)
  CNX_CPU_KERNEL(space_to_depth_norm_backward, SpaceToDepthNorm)
  CNX_CPU_KERNEL(grn_forward, GrnForward)
  CNX_CPU_KERNEL(grn_backward, GrnBackward)
#undef CNX_CPU_KERNEL
  static void column_sum(const ColumnSum& p, const Tensor&) {
    MlpRows rows{
        .dtype = p.dtype, .segments = {.rows_per_slot = 1, .count = 1, .rows = p.rows}, .channels = p.channels};
    rows.a = const_cast<void*>(p.x);
    rows.sums = p.sums;
    kernels().column_sum(rows, torch_threads());
  }
  static void gather_patches(const PatchCopy& p, const Tensor&) { cnx::gather_patches(p, torch_threads()); }
  static void scatter_patches(const PatchCopy& p, const Tensor&) { cnx::scatter_patches(p, torch_threads()); }
  static void patch_pixels(const PatchPixels& p, const Tensor&) { cnx::patch_pixels(p, torch_threads()); }
};

}  // namespace binding
}  // namespace cnx

#endif
