// A segment of a draft's sweep: an anchor's correction, and the states that follow it up to the next anchor.
//   N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] E_hat[i-l] + drift[i]
//   E_hat[i] = E[i] + c[i] (N[i] - X[i]) + weights[i,0] correction[n-1] + weights[i,1] correction[n]
//   correction[n] = draft_output - draft_cache[n] + (S - c) (N - X), S = dR^T secant_weights dZ (see draft_secants.h)
#pragma once

#include "ddim_update.h"

namespace deqdiff {

struct DraftProblem {
  ScanProblem scan;          // sq_diff receives max(|N - X|^2, |F - X|^2), F the plain step
  const void* draft_output;  // (B, D), null where no sample is active in row `start`
  void* draft_cache;         // (A, B, D)
  void* correction;          // (2, B, D), that of anchor n in n % 2
  const double* weights;     // (T, 2)
  RowTable slope;
  void* carry;    // (2, L, B, D) in the type of the slope: the plain scan and E_hat, row i in slot i % L
  const void* z;  // (H + 1, A, B, D)
  const void* remainder;
  const double* secant_weights;  // (A, B, H, H)
  std::int64_t anchors, anchor, previous_start, start, stop;
  int ring, column;
  bool rollout;  // E, X, draft_cache and S are zero; before lo the model's prediction is the draft's output
};

void draft_scan(const DraftProblem& problem);

}  // namespace deqdiff
