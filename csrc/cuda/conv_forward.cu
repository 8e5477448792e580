// Depthwise convolution, and the gradient with respect to its input: which kernel serves a shape, and the entry.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "conv_finish.cuh"
#include "conv_tensor.cuh"

namespace cnx {
namespace cuda {

template <class T>
void conv_forward_of(const ConvForward& p, const ConvPlan& plan, const Launch& launch);

namespace {

constexpr int64_t kMostWarps = 8;                   // of a CTA
constexpr int64_t kMostShared = 96 * 1024;          // what every supported GPU can give to a CTA
constexpr int64_t kMostUnits = (1ll << 31) - 4096;  // strips and slots are counted in 32 bits

int64_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Whether rows of channels are whole 4-byte words.
bool in_words(const ConvForward& p) {
  if (p.dtype == DType::f64 || p.geometry.channels * element_bytes(p.dtype) % 4) return false;
  for (const void* pointer : {p.x, p.residual, static_cast<const void*>(p.y)})
    if (reinterpret_cast<uintptr_t>(pointer) % 4) return false;
  return true;
}

ConvKernel kernel_of(const ConvForward& p) {
  const ConvGeometry& g = p.geometry;
  if (!in_words(p) || g.maps * g.height * g.width > kMostUnits) return ConvKernel::taps;
  if (g.neighbours && g.height == 1) return ConvKernel::point;
  if (g.kernel_size != 7) return ConvKernel::taps;
  if (!g.neighbours) return ConvKernel::window;
  if (g.height == 2 || g.height == 4) return ConvKernel::patch;
  return g.height % 8 == 0 ? ConvKernel::window : ConvKernel::taps;
}

// CONVNEXTV2_KERNELS_CUDA_CONV: read at every launch, so that one process can compare the two.
bool wants_tensor_cores() {
  const char* choice = std::getenv("CONVNEXTV2_KERNELS_CUDA_CONV");
  const std::string name = choice && *choice ? choice : "fma";
  if (name != "fma" && name != "tensor")
    throw std::runtime_error("CONVNEXTV2_KERNELS_CUDA_CONV must be fma or tensor, got '" + name + "'");
  return name == "tensor";
}

bool on_tensor_cores(const ConvForward& p) {
  return wants_tensor_cores() && conv_tensor_serves(p);
}

}  // namespace

ConvPlan conv_forward_plan(const ConvForward& p) {
  const ConvGeometry& g = p.geometry;
  ConvPlan plan{};
  plan.kernel = kernel_of(p);
  if (plan.kernel == ConvKernel::taps) {
    plan.units = g.maps * g.height * g.width * g.channels;
    return plan;
  }
  const int64_t word = 4 / element_bytes(p.dtype), blocks = ceil_div(g.channels, 32 * word);
  const int64_t staged = int64_t{g.kernel_size} * g.kernel_size * 33 * word * 4;  // bytes of weights of a block
  plan.units = plan.kernel == ConvKernel::window ? g.maps * ceil_div(g.height, 4) * ceil_div(g.width, 8) : g.maps;
  // weights of all blocks stay in shared memory, but those of conv_patch pass through it
  const auto shared = [&](int64_t of, int64_t groups) {
    return staged * (plan.kernel == ConvKernel::patch ? 1 : of) + 4 * finish_scratch(of, groups);
  };
  plan.fused = p.normalize && blocks <= kMostWarps && shared(blocks, 1) <= kMostShared;
  plan.blocks = plan.fused ? static_cast<int>(blocks) : 1;
  const int warps = plan.kernel == ConvKernel::point ? 8 : 4;
  plan.groups = std::max(1, warps / plan.blocks);
  plan.columns = static_cast<int>(blocks / plan.blocks);
  plan.shared = static_cast<int>(shared(plan.blocks, plan.groups));
  return plan;
}

const char* conv_forward_choice(const ConvForward& p) {
  if (on_tensor_cores(p)) return "conv_tensor";
  switch (conv_forward_plan(p).kernel) {
    case ConvKernel::window:
      return "conv_window";
    case ConvKernel::patch:
      return "conv_patch";
    case ConvKernel::point:
      return "conv_point";
    case ConvKernel::taps:
      return "conv_taps";
  }
  return "";
}

// conv_taps reads weights tap by tap; no other kernel needs a workspace.
int64_t conv_forward_workspace(const ConvForward& p) {
  if (kernel_of(p) != ConvKernel::taps) return 0;
  return p.geometry.channels * p.geometry.kernel_size * p.geometry.kernel_size * (p.dtype == DType::f64 ? 8 : 4);
}

void conv_forward(const ConvForward& p, const Launch& launch) {
  const ConvGeometry& g = p.geometry;
  if (g.maps * g.height * g.width * g.channels == 0) return;
  if (on_tensor_cores(p)) return conv_tensor_forward(p, launch);
  const ConvPlan plan = conv_forward_plan(p);
  dispatch(p.dtype, [&](auto type) { conv_forward_of<typename decltype(type)::type>(p, plan, launch); });
}

}  // namespace cuda
}  // namespace cnx
