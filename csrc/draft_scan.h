// A piece of a draft's chain: what an anchor says, and the states that follow it up to the next one.
//   N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] E_hat[i-l] + drift[i]
//   E_hat[i] = E[i] + c[i] (N[i] - X[i]) + shares[i,0] turn[n-1] + shares[i,1] turn[n]
//   turn[n] = said - made[n] + (S - c) (N - X), S = dR^T weights dZ (see draft_secants.h)
#pragma once

#include "affine_scan.h"

namespace deqdiff {

struct DraftProblem {
  ScanProblem scan;      // sq_diff receives max(|N - X|^2, |F - X|^2), F the plain step
  const void* said;      // (B, D), null where no sample is active in row `start`
  void* made;            // (A, B, D)
  void* turn;            // (2, B, D), that of anchor n in n % 2
  const double* shares;  // (T, 2)
  const void* slope;     // (T, 1) or (T, D) in float32, or float64 where the states are
  bool slope_per_element;
  void* carry;    // (2, L, B, D) in the type of the slope: the plain scan and E_hat, row i in slot i % L
  const void* z;  // (H + 1, A, B, D)
  const void* rest;
  const double* weights;  // (A, B, H, H)
  std::int64_t anchors, number, previous, start, stop;
  int ring, column;
  bool charting;  // E, X, made and S are zero; before lo the model's prediction is what was said
};

void draft_scan(const DraftProblem& problem);

}  // namespace deqdiff
