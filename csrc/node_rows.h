// The innermost loop of the scan over nodes: one step, a span of elements, several samples. Compiled once per
// instruction set, like rows.h.
#pragma once

#include <cstdint>

#include "rows.h"

namespace deqdiff {

constexpr int kMaxStencil = 8;

// y_l <- sum_m state_coef[l,m,k] y_m + sum_s remainder_coef[l,s,k] remainder[s] + drift[l], and state <- y_0, with k
// the class of an element, whose coefficients are looked up once for all samples.
struct NodeRow {
  const void* state_coef;       // (L, L, K), wide type
  const void* remainder_coef;   // (L, S, K), wide type
  const std::int32_t* classes;  // null: K is 1
  std::int64_t kinds;           // K
  void* carried;                // y of the first sample, (L, carried_stride), wide type
  std::int64_t carried_stride;  // elements from one lag to the next
  const void* remainder;        // the first sample's
  const void* drift;            // the first sample's, or null
  void* state;                  // the first sample's
  std::int64_t row_stride;      // elements from one row of the stencil, or lag of the drift, to the next
  std::int64_t sample_stride;   // elements from one sample to the next, of remainder, drift and state
  std::int64_t samples, size;
  int lags, stencil;
};

struct NodeKernels {
  void (*step)(const NodeRow&);
};

struct NodeTable {
  const char* name;
  NodeKernels kernels[3];  // indexed by Dtype
};

const NodeTable& node_table();
inline const NodeKernels& node_kernels(Dtype dtype) { return node_table().kernels[static_cast<int>(dtype)]; }

}  // namespace deqdiff
