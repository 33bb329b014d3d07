// The innermost loops of a draft's chain, on a part of one row. Compiled once per instruction set, like rows.h.
#pragma once

#include <cstdint>

#include "newton_rows.h"

namespace deqdiff {

constexpr double kWild = 1e6;  // what a draft says beyond this, or NaN, is not believed

// heard = said where |said| < kWild, else slope now
// turn = heard - made + sum_j gamma[j] (rest[j] - own_rest) - slope (now - x);  made = heard
struct TurnRow {
  const void* said;
  const void* now;
  const void* x;  // null: x, made and the secants count as zero
  void* made;
  const void* rest[kMaxSecants];
  const void* own_rest;
  double gamma[kMaxSecants];
  int count;
  const void* slope;  // wide type, one value or `size` of them
  bool slope_per_element;
  void* turn;
  std::int64_t size;
};

struct DraftKernels {
  void (*turn)(const TurnRow&);
  // out = a - slope b, or a - b without a slope
  void (*rest)(const void* a, const void* b, const void* slope, bool slope_per_element, void* out, std::int64_t size);
};

struct DraftTable {
  const char* name;
  DraftKernels kernels[3];  // indexed by Dtype
};

const DraftTable& draft_table();
inline const DraftKernels& draft_kernels(Dtype dtype) { return draft_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
