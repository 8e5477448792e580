// CUDA as a device of the bindings: the tensor's device, its current stream, and a workspace from PyTorch's caching
// allocator. Part of the build with CNX_WITH_CUDA, and with CNX_EMULATION, where the same operators are registered for
// CPU tensors under another namespace (csrc/emulation).
#pragma once

#include "binding.h"
#include "cnx/cuda.h"

// CNX_IMPLEMENT_CUDA(f): f<Cuda>(library) registers implementations for CUDA tensors.
#if !defined(CNX_WITH_CUDA) && !defined(CNX_EMULATION)
#define CNX_IMPLEMENT_CUDA(f)
#else
#define CNX_IMPLEMENT_CUDA(f)                      \
  CNX_LIBRARY_IMPL(CNX_LIBRARY, CNX_CUDA_KEY, m) { \
    f<cnx::binding::Cuda>(m);                      \
  }

#if defined(CNX_EMULATION)
#define CNX_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define CNX_CUDA_KEY CUDA

// Declared in PyTorch's shim only where its own CUDA headers are on the path. Weak, so that the module also loads with
// a PyTorch without CUDA, whose tensors never get here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace cnx {
namespace binding {

struct Cuda {
#if defined(CNX_EMULATION)
  static constexpr const char* kind = "CPU (emulated CUDA)";
  static bool accepts(const Tensor& t) { return t.is_cpu(); }
#else
  static constexpr const char* kind = "CUDA";
  static bool accepts(const Tensor& t) { return t.is_cuda(); }
#endif
  static DType dtype_of(const Tensor& t) { return feature_type(t, true); }

  // The workspace may be freed on return: the allocator hands it out again only to later work of the same stream.
  template <class Params>
  static void run(void (*kernel)(const Params&, const cuda::Launch&), int64_t (*workspace_bytes)(const Params&),
                  const Params& p, const Tensor& like) {
#if defined(CNX_EMULATION)
    void* stream = nullptr;
#else
    const int32_t device = like.get_device_index();
    torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    CNX_CHECK(
        aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
        "PyTorch has no current stream on CUDA device ", device);
#endif
    const int64_t bytes = workspace_bytes(p);
    if (!bytes) return kernel(p, {.stream = stream, .workspace = nullptr});
    Tensor workspace = torch::stable::new_empty(like, {bytes}, std::make_optional(ScalarType::Byte));
    kernel(p, {.stream = stream, .workspace = workspace.mutable_data_ptr()});
  }

#define CNX_CUDA_DEVICE(name, Params)                     \
  static void name(const Params& p, const Tensor& like) { \
    run(&cuda::name, &cuda::name##_workspace, p, like);   \
  }
  CNX_CUDA_KERNELS(CNX_CUDA_DEVICE)
#undef CNX_CUDA_DEVICE

  // Reading a table would wait for the device: only a debug build asserts what is in it, on the device.
  static void check_indices(const IndexTable& p, const Tensor& like, const char*) {
    if (kAssertsTables) assert_indices(p, like);
  }
  static void check_offsets(const Segments& s, const Tensor& like) {
    if (kAssertsTables) assert_offsets(s, like);
  }
  static constexpr bool kAssertsTables =
#if defined(CNX_EMULATION) || defined(CNX_DEBUG)
      true;
#else
      false;
#endif
};

}  // namespace binding
}  // namespace cnx

#endif
