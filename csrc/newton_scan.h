// The quasi-Newton scan: predictions linearised at the old iterate and carried exactly through the chain.
//   N[i+1] = sum_l a[i,l] N[i-l] + b[i,l] E_hat[i-l] + drift[i],   E_hat[i] = E[i] + J[i] (N[i] - X[i])
//   J[i] = c[i] + (dE - c dX) (dX^T dX + ridge)^-1 dX^T
// Lim et al. 2024 and Gonzalez et al. 2024 (DEER, quasi-DEER) for the scan; Fang, Saad 2009 for the secants.
#pragma once

#include "ddim_update.h"

namespace deqdiff {

struct NewtonProblem {
  ScanProblem scan;  // sq_diff receives max(|N - X|^2, |F - X|^2), F the plain step
  RowTable slope;
  Rings rings;  // without them X counts as zero
  double ridge, floor;
};

void newton_scan(const NewtonProblem& problem);

}  // namespace deqdiff
