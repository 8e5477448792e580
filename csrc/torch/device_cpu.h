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
  const auto run = [](int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    torch_parallel_for(begin, end, grain, body, context);
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

struct Cpu {
  static constexpr const char* kind = "CPU";
  static bool accepts(const Tensor& t) { return t.is_cpu(); }
  static DType dtype_of(const Tensor& t) { return feature_type(t, false); }

  // No branch for each entry: the loop is vectorised, two instructions an entry.
  static void check_indices(const IndexTable& p, const Tensor&, const char* name) {
    const auto low = static_cast<uint32_t>(p.low),
               high = static_cast<uint32_t>(p.high < INT32_MAX ? p.high : INT32_MAX);
    const auto outside = [=](int32_t entry) { return uint32_t{static_cast<uint32_t>(entry) - low > high - low}; };
    uint32_t found = p.high < p.low;
    for (int64_t i = 0; i < p.count; ++i) found |= outside(p.entries[i]);
    if (!found) return;
    int64_t first = 0;
    while (p.high >= p.low && !outside(p.entries[first])) ++first;
    CNX_CHECK(false, name, " holds ", p.entries[first], " at ", first, ", expected indices from ", p.low, " to ",
              p.high);
  }
  static void check_offsets(const Segments& s, const Tensor&) {
    for (int64_t i = 0; i < s.count; ++i)
      CNX_CHECK(s.offsets[i] >= 0 && s.offsets[i] <= s.offsets[i + 1], "offsets must rise from 0 or more, got ",
                s.offsets[i], " before ", s.offsets[i + 1]);
    const int64_t slots = int64_t{s.offsets[s.count]} - s.offsets[0];
    CNX_CHECK(slots == s.rows / s.rows_per_slot, "offsets must span the ", s.rows / s.rows_per_slot,
              " slots of the rows, got ", slots);
  }

#define CNX_CPU_KERNEL(name, Params)                 \
  static void name(const Params& p, const Tensor&) { \
    kernels().name(p, torch_threads());              \
  }
  CNX_CPU_KERNELS(CNX_CPU_KERNEL)
#undef CNX_CPU_KERNEL
  static void transpose_rows(const float* x, int64_t rows, int64_t cols, float* y) {
    transpose_f32(x, rows, cols, y, torch_threads());
  }
  static void gather_patches(const PatchCopy& p, const Tensor&) { cnx::gather_patches(p, torch_threads()); }
  static void scatter_patches(const PatchCopy& p, const Tensor&) { cnx::scatter_patches(p, torch_threads()); }
  static void put_patches(const PatchCopy& p, const Tensor&) { cnx::put_patches(p, torch_threads()); }
  static void patch_pixels(const PatchPixels& p, const Tensor&) { cnx::patch_pixels(p, torch_threads()); }
};

}  // namespace binding
}  // namespace cnx

#endif
