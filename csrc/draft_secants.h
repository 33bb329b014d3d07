// What a round with a draft remembers: states, what the model said there beyond the draft, and the least squares fit.
//   weights = Z (Z dZ^T dZ Z + ridge)^-1 Z, Z the inverse lengths of the columns worth keeping, dZ the steps from the
//   states of earlier rounds to this one's (Fang, Saad 2009, on normalised columns).
#pragma once

#include <cstdint>

#include "newton_rows.h"

namespace deqdiff {

// N anchors: row at[n] of the chain, for the samples b with lo[b] <= at[n] < hi[b].
struct DraftSecantsProblem {
  Dtype dtype;
  const void* states;       // (T + 1, B, D)
  const void* predictions;  // (T, B, D)
  const void* made;         // (N, B, D)
  const std::int64_t* at;   // (N,)
  const std::int32_t* lo;   // (B,)
  const std::int32_t* hi;
  void* z;  // (H + 1, N, B, D)
  void* rest;
  std::int32_t* filled;  // (N, B)
  double* weights;       // (N, B, H, H)
  std::int64_t steps, anchors, batch, size;
  int ring, column;
  double ridge, floor;
  int threads;
};

// Throws std::invalid_argument for a row outside of the chain.
void draft_secants(const DraftSecantsProblem& problem);

}  // namespace deqdiff
