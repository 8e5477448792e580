// The module _C: loading it registers the operators; it tells how they were built and what this processor runs.
#include <pybind11/pybind11.h>

#include <string>

#include "cnx/cpu.h"

#if defined(CNX_CUDA_VERSION)
#include "cnx/cuda.h"
#endif

#define CNX_STRING_OF(...) #__VA_ARGS__
#define CNX_STRING(...) CNX_STRING_OF(__VA_ARGS__)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of convnextv2_kernels";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = CNX_STRING(CNX_PACKAGE_VERSION);
        info["torch"] = CNX_STRING(CNX_TORCH_VERSION);
        info["torch_target"] = "2.10";
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#else
        info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(__SANITIZE_ADDRESS__)
        info["sanitizer"] = "address";
#else
        info["sanitizer"] = "none";
#endif
#if defined(__x86_64__)
        info["cpu_isas"] = py::make_tuple("avx512", "avx2", "baseline");
#else
        info["cpu_isas"] = py::make_tuple("baseline");
#endif
#if defined(CNX_CUDA_VERSION)
        info["cuda"] = CNX_STRING(CNX_CUDA_VERSION);
        info["cuda_architectures"] = py::str(CNX_STRING(CNX_CUDA_ARCHITECTURES)).attr("split")(",");
#else
        info["cuda"] = py::none();
        info["cuda_architectures"] = py::list();
#endif
        return info;
      },
      "What the extension was built with.");
  m.def(
      "cpu_isa", [] { return py::make_tuple(cnx::kernels().name, cnx::kernels().vector_bytes); },
      "Name and vector width in bytes of the kernels chosen for this processor.");
#if defined(CNX_CUDA_VERSION)
  m.def(
      "cuda_conv_kernel",
      [](const std::string& dtype, int64_t side, int64_t channels, int kernel_size, bool normalize) {
        cnx::ConvForward p{};
        p.dtype = dtype == "float32"    ? cnx::DType::f32
                  : dtype == "float64"  ? cnx::DType::f64
                  : dtype == "bfloat16" ? cnx::DType::bf16
                                        : cnx::DType::f16;
        static const int32_t packed = 0;  // that there is a table is all that matters
        p.geometry = {.maps = 1,
                      .height = side,
                      .width = side,
                      .channels = channels,
                      .kernel_size = kernel_size,
                      .neighbours = &packed};
        p.normalize = normalize;
        const cnx::cuda::ConvChoice choice = cnx::cuda::conv_forward_kernel(p);
        return py::dict(py::arg("kernel") = choice.kernel, py::arg("threads") = choice.threads,
                        py::arg("shared_bytes") = choice.shared_bytes, py::arg("fused_norm") = choice.fused);
      },
      py::arg("dtype"), py::arg("side"), py::arg("channels"), py::arg("kernel_size") = 7, py::arg("normalize") = false,
      "The CUDA kernel that serves the depthwise convolution of packed patches, and its launch.");
#endif
}
