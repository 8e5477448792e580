// Picks the widest instruction set of the processor once.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cnx/cpu.h"

namespace cnx {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

const KernelTable* find_kernels(const char* isa) {
  if (!std::strcmp(isa, "baseline")) return &baseline::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!std::strcmp(isa, "avx2")) return has_avx2 ? &avx2::table : nullptr;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512")) return has_avx512 ? &avx512::table : nullptr;
#endif
  return nullptr;
}

static const KernelTable& choose() {
  const char* requested = std::getenv("CONVNEXTV2_KERNELS_CPU_ISA");
  bool allowed = !requested || !*requested;
  for (const char* isa : {"avx512", "avx2", "baseline"}) {
    allowed = allowed || !std::strcmp(requested, isa);
    const KernelTable* table = find_kernels(isa);
    if (allowed && table) return *table;
  }
  return baseline::table;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace cnx
