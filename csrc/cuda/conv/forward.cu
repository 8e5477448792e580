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
    throw std::runtime_error("CONVNEXTV2_KERNELS_CUDA_CONV must be one of fma, tensor, got '" + name + "'");
  return name == "tensor";
}

bool on_tensor_cores(const ConvForward& p) {
  return wants_tensor_cores() && conv_mma_supports(p);
}

// Blocks of 32, 16 and 8 words of channels.
struct WordBlocks {
  int full, half, quarter;

  int count() const { return full + half + quarter; }
  bool narrow() const { return half || quarter; }
};

// The blocks of a row of `words`. Units beside each other compute what any of them sees: with FCMAE's masks a warp of
// two strips takes 1.1 times as long as one of one, of four 1.3 times. Patches of 16 pixels would take 1.3 and 1.6
// times as long, and registers that they have not; smaller ones would gain nothing. So only tile has blocks of 16 and 8
// words in place of the last one of 32.
WordBlocks blocks_of(ConvKernel kernel, int64_t words) {
  const int full = static_cast<int>(words / 32);
  const int64_t rest = words % 32;
  if (kernel != ConvKernel::tile || rest == 0 || rest > 24) return {.full = full + (rest > 0)};
  return {.full = full, .half = rest > 8, .quarter = rest <= 8 || rest > 16};
}

struct CtaShape {
  int units, warps;
  int64_t shared;

  bool fits() const { return warps <= kMostWarps && shared <= kMostShared; }
};

// The CTA of these blocks, with as many units of full blocks as fit the usual number of warps. `staged`: bytes of
// weights of a block.
CtaShape cta_of(ConvKernel kernel, const WordBlocks& blocks, int64_t staged) {
  const int usual = kernel == ConvKernel::pixel ? 8 : 4;
  const auto warps = [&](int units) {
    return units * blocks.full + units / 2 * blocks.half + units / 4 * blocks.quarter;
  };
  int units = blocks.quarter ? 4 : blocks.half ? 2 : 1;
  while (blocks.narrow() ? 2 * warps(units) <= usual : warps(units) + blocks.full <= usual)
    units += blocks.narrow() ? units : 1;
  // weights of all blocks stay in shared memory, but those of small_patch pass through it
  const int64_t weights = staged * (kernel == ConvKernel::small_patch ? 1 : blocks.count());
  return {.units = units, .warps = warps(units), .shared = weights + 4 * finish_scratch(blocks.count(), units)};
}

}  // namespace

ConvPlan conv_forward_plan(const ConvForward& p) {
  const ConvGeometry& g = p.geometry;
  ConvPlan plan{.kernel = kernel_of(p)};
  if (plan.kernel == ConvKernel::generic) {
    plan.all = g.maps * g.height * g.width * g.channels;
    return plan;
  }
  const bool tile = plan.kernel == ConvKernel::tile;
  const int64_t word = 4 / element_bytes(p.dtype), words = ceil_div(g.channels, word);
  const int64_t down = ceil_div(g.height, 4), strips = down * ceil_div(g.width, 8);  // of a map
  plan.all = tile ? g.maps * strips : g.maps;
  plan.strips = Divisor::of(static_cast<uint32_t>(strips));
  plan.strips_down = Divisor::of(static_cast<uint32_t>(down));
  // bytes of weights of a block; those of tile lie by fours
  const int64_t taps = int64_t{g.kernel_size} * g.kernel_size;
  const int64_t staged = (tile ? ceil_div(taps * word, 4) * 4 : taps * word) * 33 * 4;

  const auto arrange = [&](const WordBlocks& cta, const CtaShape& shape, const WordBlocks& columns) {
    plan.wide = cta.full, plan.halves = cta.half, plan.quarters = cta.quarter;
    plan.units = shape.units, plan.warps = shape.warps, plan.shared = static_cast<int>(shape.shared);
    plan.columns[0] = columns.full, plan.columns[1] = columns.half, plan.columns[2] = columns.quarter;
    return plan;
  };
  const WordBlocks blocks = blocks_of(plan.kernel, words), one{.full = 1};
  const WordBlocks whole{.full = static_cast<int>(ceil_div(words, 32))};  // the last one partly idle
  if (p.normalize) {  // a CTA of all channels, where one is possible
    plan.fused = true;
    for (const WordBlocks& all : {blocks, whole}) {
      const CtaShape shape = cta_of(plan.kernel, all, staged);
      if (shape.fits()) return arrange(all, shape, one);
    }
    plan.fused = false;
  }
  return arrange(one, cta_of(plan.kernel, one, staged), blocks);
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
