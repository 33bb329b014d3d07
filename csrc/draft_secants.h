// The history of a solve with a draft: states, remainders (the model's output minus the draft's), and their fit.
//   secant_weights = Z (Z dZ^T dZ Z + ridge)^-1 Z, Z the inverse lengths of the columns worth keeping, dZ the steps
//   from the states of earlier rounds to this one's (Fang, Saad 2009, on normalised columns).
#pragma once

#include <cstdint>

#include "newton_rows.h"

namespace deqdiff {

// A anchors: row anchor_rows[n] of the chain, for the samples b with lo[b] <= anchor_rows[n] < hi[b].
struct DraftSecantsProblem {
  Dtype dtype;
  const void* states;               // (T + 1, B, D)
  const void* predictions;          // (T, B, D)
  const void* draft_cache;          // (A, B, D)
  const std::int64_t* anchor_rows;  // (A,)
  const std::int32_t* lo;           // (B,)
  const std::int32_t* hi;
  void* z;  // (H + 1, A, B, D)
  void* remainder;
  std::int32_t* filled;    // (A, B)
  double* secant_weights;  // (A, B, H, H)
  std::int64_t steps, anchors, batch, size;
  int ring, column;
  double ridge, floor;
  int threads;
};

// Throws std::invalid_argument for a row or a window outside of the chain.
void draft_secants(const DraftSecantsProblem& problem);

}  // namespace deqdiff
