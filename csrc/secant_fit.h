// The fit of secants at many nodes: how much of each secant a step is taken to be.
//   fit = Z (Z gram Z + diag(ridge))^-1 Z, Z the inverse lengths of the columns that are kept and 0 for the others
// Fang and Saad 2009, multisecant weights on normalised columns.
#pragma once

#include <cstdint>

namespace deqdiff {

// Addresses are borrowed for the call; see kernels/secant_fit/__init__.py.
struct SecantFitProblem {
  double* fit;                // (R, H, H), is written
  const double* gram;         // (R, H, H)
  const double* size;         // (R,)
  const std::int32_t* count;  // (R,) answers: one more than there are secants
  const double* ridges;       // (H, R)
  const double* guess_error;  // (R,), or null
  std::int64_t rows;
  int columns;
  double floor, guessed, nonlinear;
};

void secant_fit(const SecantFitProblem& problem);

}  // namespace deqdiff
