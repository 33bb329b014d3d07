// One Anderson round: scan, residual, new Gram row, ridge solve, mixing.
//   alpha = argmin |G alpha|^2 + ridge |alpha|^2, sum alpha = 1;  X <- sum_j alpha_j (F_j - (1 - damping) G_j)
// Walker and Ni 2011; per timestep in Pokle, Geng, Kolter 2022; triangular in Tang et al. 2024 (ParaTAA).
#pragma once

#include <cstdint>

#include "ddim_update.h"

namespace deqdiff {

enum class Scope : int { kTimestep = 0, kTrajectory = 1, kTriangular = 2 };

struct AndersonProblem {
  ScanProblem scan;
  void* f;               // (M, W, B, D) rings: row i lives in slot i % W
  void* g;               // (M, W, B, D)
  double* gram;          // (W, B, M, M)
  std::int32_t* filled;  // (W, B) valid columns of each row, the most recent ones
  int history;           // M
  std::int64_t width;    // W
  int column;            // ring column that this round writes
  Scope scope;
  double ridge;
  bool relative_ridge;
  double damping;
  double stale;  // see ridge_solve.h
};

// Throws std::invalid_argument when a window does not fit the rings.
void anderson_step(const AndersonProblem& problem);

}  // namespace deqdiff
