// Which rows have converged, by what they have left to go (Aitken's extrapolation). The constants are those of
// kernels/stopping.py.
#pragma once

#include <cstdint>

namespace deqdiff {

constexpr double kTiny = 1e-280;  // keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN
constexpr double kMinRate = 0.1, kMaxRate = 0.9, kFirstRate = 0.5;

// (T, B): squared steps and sizes, and the squared relative steps of the round before, NaN where there is none.
struct MarkConvergedProblem {
  double* sq_diff;
  const double* sq_norm;
  double* previous;
  const double* strict;  // (B,)
  std::int64_t steps, batch;
  double freeze, floor;
};

void mark_converged(const MarkConvergedProblem& problem);

}  // namespace deqdiff
