// Depthwise convolution, and the gradient with respect to its input: which kernel runs a shape, and the entry.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "epilogue.cuh"
#include "mma_bands.cuh"

namespace cnx {
namespace cuda {

template <class T>
void conv_forward_of(const ConvForward& p, const ConvPlan& plan, const Launch& launch);

namespace {

constexpr int64_t kMostWarps = 8;                   // of a CTA
constexpr int64_t kMostShared = 96 * 1024;          // what every supported GPU can give to a CTA
constexpr int64_t kMostUnits = (1ll << 31) - 4096;  // strips, slots and pixels are counted in 32 bits
constexpr int64_t kMostPitch = (1ll << 31);         // bytes of a row of pixels, too

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
  if (!in_words(p) || g.maps * g.height * g.width > kMostUnits) return ConvKernel::generic;
  if (g.width * g.channels * element_bytes(p.dtype) > kMostPitch) return ConvKernel::generic;
  if (g.neighbours && g.height == 1) return ConvKernel::pixel;
  if (g.kernel_size != 7) return ConvKernel::generic;
  if (!g.neighbours) return ConvKernel::tile;
  if (g.height == 2 || g.height == 4) return ConvKernel::small_patch;
  return g.height % 8 == 0 ? ConvKernel::tile : ConvKernel::generic;
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
  return wants_tensor_cores() && conv_mma_supports(p);
}

// Blocks of 16 and 8 words in place of the last one of 32. Units beside each other compute what any of them sees: with
// FCMAE's masks a warp of two strips takes 1.1 times as long as one of one, of four 1.3 times. Patches of 16 pixels
// would take 1.3 and 1.6 times as long, and registers that they have not; smaller ones would gain nothing.
bool cut_rest(ConvKernel kernel, int64_t words, int& halves, int& quarters) {
  const int64_t rest = words % 32;
  halves = rest > 8;
  quarters = rest <= 8 || rest > 16;
  return kernel == ConvKernel::tile && rest > 0 && rest <= 24;
}

}  // namespace

ConvPlan conv_forward_plan(const ConvForward& p) {
  const ConvGeometry& g = p.geometry;
  ConvPlan plan{};
  plan.kernel = kernel_of(p);
  if (plan.kernel == ConvKernel::generic) {
    plan.all = g.maps * g.height * g.width * g.channels;
    return plan;
  }
  const bool tile = plan.kernel == ConvKernel::tile;
  const int64_t word = 4 / element_bytes(p.dtype), words = ceil_div(g.channels, word);
  // bytes of weights of a block; conv_tile's lie by fours
  const int64_t taps = int64_t{g.kernel_size} * g.kernel_size;
  const int64_t staged = (tile ? ceil_div(taps * word, 4) * 4 : taps * word) * 33 * 4;
  const int64_t down = ceil_div(g.height, 4), strips = down * ceil_div(g.width, 8);  // of a map
  plan.all = tile ? g.maps * strips : g.maps;
  plan.strips = Divisor::of(static_cast<uint32_t>(strips));
  plan.strips_down = Divisor::of(static_cast<uint32_t>(down));

  const int blocks = static_cast<int>(ceil_div(words, 32)), usual = plan.kernel == ConvKernel::pixel ? 8 : 4;
  int halves, quarters;
  const bool cut = cut_rest(plan.kernel, words, halves, quarters);
  const auto arrange = [&](int wide, int half, int quarter) {  // whether a CTA can be these blocks
    plan.wide = wide, plan.halves = half, plan.quarters = quarter;
    const auto count = [&] { return plan.units * wide + plan.units / 2 * half + plan.units / 4 * quarter; };
    plan.units = quarter ? 4 : half ? 2 : 1;
    // of wide blocks as many units as fit the usual number of warps
    while (half || quarter ? 2 * count() <= usual : count() + wide <= usual)
      plan.units += half || quarter ? plan.units : 1;
    plan.warps = count();
    // weights of all blocks stay in shared memory, but those of conv_small_patch pass through it
    const int64_t shared = staged * (plan.kernel == ConvKernel::small_patch ? 1 : plan.blocks()) +
                           4 * finish_scratch(plan.blocks(), plan.units);
    plan.shared = static_cast<int>(shared);
    return plan.warps <= kMostWarps && shared <= kMostShared;
  };
  plan.columns[0] = 1;
  plan.fused = p.normalize &&
               ((cut && arrange(blocks - 1, halves, quarters)) || (blocks <= kMostWarps && arrange(blocks, 0, 0)));
  if (plan.fused) return plan;
  arrange(1, 0, 0);
  plan.columns[0] = cut ? blocks - 1 : blocks;
  plan.columns[1] = cut && halves;
  plan.columns[2] = cut && quarters;
  return plan;
}

const char* conv_forward_choice(const ConvForward& p) {
  if (on_tensor_cores(p)) return "conv_mma";
  switch (conv_forward_plan(p).kernel) {
    case ConvKernel::tile:
      return "conv_tile";
    case ConvKernel::small_patch:
      return "conv_small_patch";
    case ConvKernel::pixel:
      return "conv_pixel";
    case ConvKernel::generic:
      return "conv_generic";
  }
  return "";
}

ConvChoice conv_forward_kernel(const ConvForward& p) {
  const ConvPlan plan = conv_forward_plan(p);
  const int threads = plan.kernel == ConvKernel::generic ? 256 : 32 * plan.warps;
  return {.kernel = conv_forward_choice(p), .threads = threads, .shared_bytes = plan.shared, .fused = plan.fused};
}

// conv_generic reads weights tap by tap; no other kernel needs a workspace.
int64_t conv_forward_workspace(const ConvForward& p) {
  if (kernel_of(p) != ConvKernel::generic) return 0;
  return p.geometry.channels * p.geometry.kernel_size * p.geometry.kernel_size * (p.dtype == DType::f64 ? 8 : 4);
}

void conv_forward(const ConvForward& p, const Launch& launch) {
  const ConvGeometry& g = p.geometry;
  if (g.maps * g.height * g.width * g.channels == 0) return;
  if (on_tensor_cores(p)) return conv_mma_forward(p, launch);
  const ConvPlan plan = conv_forward_plan(p);
  dispatch(p.dtype, [&](auto type) { conv_forward_of<typename decltype(type)::type>(p, plan, launch); });
}

}  // namespace cuda
}  // namespace cnx
