#include <cstdlib>
#include <cstring>

#include "rows.h"

namespace deqdiff {

namespace baseline {
extern const IsaTable table;
}
#ifdef DEQDIFF_X86
namespace avx2 {
extern const IsaTable table;
}
namespace avx512 {
extern const IsaTable table;
}
#endif

namespace {

const IsaTable& choose() {
#ifdef DEQDIFF_X86
  const char* wanted = std::getenv("DEQDIFF_FAST_ISA");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allowed("avx512")) return avx512::table;
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return avx2::table;
#endif
  return baseline::table;
}

}  // namespace

const IsaTable& isa_table() {
  static const IsaTable& chosen = choose();
  return chosen;
}

}  // namespace deqdiff
