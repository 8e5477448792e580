// Picks the widest instruction set of the processor once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

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

static const KernelTable& choose() {
  const char* wish = std::getenv("CONVNEXTV2_KERNELS_CPU_ISA");
  const auto allowed = [wish](const char* name) { return !wish || !*wish || !std::strcmp(wish, name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allowed("avx512")) return avx512::table;
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return avx2::table;
#endif
  return baseline::table;
}

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace cnx
