// Depthwise 7x7 convolution with tensor cores: the shapes it supports, and the entry.
#include "mma_bands.cuh"

namespace cnx {
namespace cuda {

template <class T>
void conv_mma_of(const ConvForward& p, const Launch& launch);

namespace {

bool has_tensor_cores() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  return major >= 8;  // mma of bfloat16
}

}  // namespace

bool conv_mma_supports(const ConvForward& p) {
  const ConvGeometry& g = p.geometry;
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return false;
  if (g.kernel_size != 7 || g.height % 8 || g.width % 8 || g.channels % 2) return false;
  // pixels are counted in 32 bits
  if (g.maps * g.height * g.width > (1ll << 31) - 4096 || g.channels > 1 << 24) return false;
  for (const void* pointer : {p.x, p.residual, static_cast<const void*>(p.y)})
    if (reinterpret_cast<uintptr_t>(pointer) % 4) return false;
  return has_tensor_cores();
}

void conv_mma_forward(const ConvForward& p, const Launch& launch) {
  if (p.geometry.maps * p.geometry.height * p.geometry.width * p.geometry.channels == 0) return;
  if (p.dtype == DType::bf16)
    conv_mma_of<bf16>(p, launch);
  else
    conv_mma_of<f16>(p, launch);
}

}  // namespace cuda
}  // namespace cnx
