// The small positive definite systems of the secant fits, in double.
#pragma once

#include <cmath>

#include "newton_rows.h"

namespace deqdiff {

// Solves a x = right in place, the lower triangle of a given. False when the matrix is not safely positive definite or
// the result is not finite.
inline bool cholesky_solve(double (*a)[kMaxSecants], double* x, int n) {
  for (int r = 0; r < n; ++r) {
    for (int c = 0; c <= r; ++c) {
      double value = a[r][c];
      for (int k = 0; k < c; ++k) value -= a[r][k] * a[c][k];
      if (c < r) {
        a[r][c] = value / a[c][c];
      } else {
        if (!(value > 0)) return false;
        a[r][r] = std::sqrt(value);
      }
    }
    for (int k = 0; k < r; ++k) x[r] -= a[r][k] * x[k];
    x[r] /= a[r][r];
  }
  for (int r = n - 1; r >= 0; --r) {
    for (int k = r + 1; k < n; ++k) x[r] -= a[k][r] * x[k];
    x[r] /= a[r][r];
    if (!std::isfinite(x[r])) return false;
  }
  return true;
}

}  // namespace deqdiff
