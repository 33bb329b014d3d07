#include "ridge_solve.h"

#include <algorithm>
#include <cmath>

#include "rows.h"

namespace deqdiff {
namespace {

// Solves matrix x = right by elimination with partial pivoting, in place. False when a pivot is zero or not a number.
bool eliminate(double (*matrix)[kMaxHistory], double* right, int n) {
  for (int k = 0; k < n; ++k) {
    int pivot = k;
    for (int r = k + 1; r < n; ++r) {
      if (std::fabs(matrix[r][k]) > std::fabs(matrix[pivot][k])) pivot = r;
    }
    if (!(std::fabs(matrix[pivot][k]) > 0)) return false;
    if (pivot != k) {
      std::swap_ranges(matrix[k], matrix[k] + n, matrix[pivot]);
      std::swap(right[k], right[pivot]);
    }
    for (int r = k + 1; r < n; ++r) {
      const double factor = matrix[r][k] / matrix[k][k];
      for (int c = k + 1; c < n; ++c) matrix[r][c] -= factor * matrix[k][c];
      right[r] -= factor * right[k];
    }
  }
  for (int k = n - 1; k >= 0; --k) {
    for (int c = k + 1; c < n; ++c) right[k] -= matrix[k][c] * right[c];
    right[k] /= matrix[k][k];
  }
  return true;
}

// Scales `values` to sum one. False unless all of them are finite then.
bool normalise(double* values, int n) {
  double total = 0;
  for (int k = 0; k < n; ++k) total += values[k];
  bool finite = true;
  for (int k = 0; k < n; ++k) {
    values[k] /= total;
    finite = finite && std::isfinite(values[k]);
  }
  return finite;
}

}  // namespace

void solve_alpha(const double* gram, int n, int stride, double ridge, bool relative, double stale, double* alpha) {
  const double newest = gram[(n - 1) * stride + n - 1];
  int kept[kMaxHistory], count = 0;
  for (int k = 0; k < n; ++k) {
    if (k == n - 1 || gram[k * stride + k] <= stale * newest) kept[count++] = k;
  }
  // Setting sum alpha = 1 aside, the minimiser is parallel to the solution of (G^T G + ridge) x = 1.
  double system[kMaxHistory][kMaxHistory], solution[kMaxHistory];
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < count; ++c) system[r][c] = gram[kept[r] * stride + kept[c]];
    system[r][r] += ridge * (relative ? system[r][r] : 1.0);
    solution[r] = 1.0;
  }
  const bool usable = newest > 0 && eliminate(system, solution, count) && normalise(solution, count);
  std::fill(alpha, alpha + n, 0.0);
  if (!usable) alpha[n - 1] = 1.0;
  for (int r = 0; usable && r < count; ++r) alpha[kept[r]] = solution[r];
}

}  // namespace deqdiff
