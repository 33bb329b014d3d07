// The innermost loops of a draft's sweep, on a part of one row. Compiled once per instruction set, like rows.h.
#pragma once

#include <cstdint>

#include "newton_rows.h"

namespace deqdiff {

constexpr double kMaxOutput = 1e6;  // a draft's output beyond this, or NaN, is replaced

// sanitized = draft_output where |draft_output| < kMaxOutput, else slope now
// correction = sanitized - draft_cache + sum_j gamma[j] (remainder[j] - own_remainder) - slope (now - x)
// draft_cache = sanitized
struct CorrectionRow {
  const void* draft_output;
  const void* now;
  const void* x;  // null: x, draft_cache and the secants count as zero
  void* draft_cache;
  const void* remainder[kMaxSecants];
  const void* own_remainder;
  double gamma[kMaxSecants];
  int count;
  const void* slope;  // wide type, one value or `size` of them
  bool slope_per_element;
  void* correction;
  std::int64_t size;
};

struct DraftKernels {
  void (*correct)(const CorrectionRow&);
  // out = a - slope b, or a - b without a slope
  void (*subtract)(const void* a, const void* b, const void* slope, bool slope_per_element, void* out,
                   std::int64_t size);
};

struct DraftTable {
  const char* name;
  DraftKernels kernels[3];  // indexed by Dtype
};

const DraftTable& draft_table();
inline const DraftKernels& draft_kernels(Dtype dtype) { return draft_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
