// The verdict on a round's steps: which rows are final, by what they have left to go (Aitken's extrapolation).
#pragma once

#include <cstdint>

namespace deqdiff {

// (T, B): squared steps and sizes, and the squared relative steps of the round before, NaN where there is none.
struct JudgeProblem {
  double* sq_diff;
  const double* sq_norm;
  double* previous;
  const double* strict;  // (B,)
  std::int64_t steps, batch;
  double freeze, floor;
};

void judge_steps(const JudgeProblem& problem);

}  // namespace deqdiff
