#include <cstdlib>
#include <cstring>

#include "inverse_rows.h"
#include "newton_rows.h"
#include "node_rows.h"
#include "rows.h"

namespace deqdiff {

namespace baseline {
extern const IsaTable table;
extern const NewtonTable newton_table;
extern const InverseTable inverse_table;
extern const NodeTable node_table;
}  // namespace baseline
#ifdef DEQDIFF_X86
namespace avx2 {
extern const IsaTable table;
extern const NewtonTable newton_table;
extern const InverseTable inverse_table;
extern const NodeTable node_table;
}  // namespace avx2
namespace avx512 {
extern const IsaTable table;
extern const NewtonTable newton_table;
extern const InverseTable inverse_table;
extern const NodeTable node_table;
}  // namespace avx512
#endif

namespace {

struct Chosen {
  const IsaTable& rows;
  const NewtonTable& newton;
  const InverseTable& inverse;
  const NodeTable& node;
};

Chosen choose() {
#ifdef DEQDIFF_X86
  const char* wanted = std::getenv("DEQDIFF_FAST_ISA");
  const auto allowed = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allowed("avx512"))
    return {avx512::table, avx512::newton_table, avx512::inverse_table, avx512::node_table};
  if (has_avx2 && (allowed("avx2") || allowed("avx512")))
    return {avx2::table, avx2::newton_table, avx2::inverse_table, avx2::node_table};
#endif
  return {baseline::table, baseline::newton_table, baseline::inverse_table, baseline::node_table};
}

const Chosen& chosen() {
  static const Chosen tables = choose();
  return tables;
}

}  // namespace

const IsaTable& isa_table() { return chosen().rows; }
const NewtonTable& newton_table() { return chosen().newton; }
const InverseTable& inverse_table() { return chosen().inverse; }
const NodeTable& node_table() { return chosen().node; }

}  // namespace deqdiff
