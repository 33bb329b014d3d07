// The inverse scan: every step of a chain solved for its own state, from the last one.
//   N[i] = X[i] + dX gamma + damping (rho - dG gamma) / d,   rho = N[i+1] - G[i],   gamma = argmin |rho - dG gamma|
//   G[i] = sum_l a[i,l] X[i-l] + b[i,l] E[i-l] + drift[i],   d = a[i,0] + b[i,0] slope[i]
// Fang, Saad 2009 (multisecant steps of the second kind), carried exactly through the chain.
#pragma once

#include "ddim_update.h"

namespace deqdiff {

struct InverseProblem {
  ScanProblem scan;  // sq_diff receives |weight (X[i+1] - G)|^2; sq_norm is not used
  RowTable slope, weight;
  Rings rings;
  double damping, ridge, stale, floor, reach;
};

void inverse_scan(const InverseProblem& problem);

}  // namespace deqdiff
