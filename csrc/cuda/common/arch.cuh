// What differs between GPU architectures. The list compiled for: csrc/architectures.json.
#pragma once

namespace cnx {
namespace cuda {

// Launch bounds of kernels on pairs of channels. 384 threads leave 168 registers, which is 12 warps on a
// multiprocessor; 256 leave 255 and 8 warps. Packed multiply-adds want aligned pairs of registers, so sm_100 takes the
// latter: it also has fewer instructions to hide. kTightThreads: where 168 would spill on sm_80 alone.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kPairThreads = 256, kTightThreads = 256;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kPairThreads = 384, kTightThreads = 256;
#else
constexpr int kPairThreads = 384, kTightThreads = 384;
#endif

}  // namespace cuda
}  // namespace cnx
