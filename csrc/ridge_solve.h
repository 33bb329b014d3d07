// The small constrained least squares of Anderson mixing, in double.
#pragma once

namespace deqdiff {

// alpha = argmin |G alpha|^2 + ridge |alpha|^2 with sum alpha = 1, given the Gram matrix G^T G: n x n, n <=
// kMaxHistory, `stride` doubles from row to row, newest column last. relative: ridge times each column's own squared
// residual. Columns whose squared residual exceeds stale times the newest one's get weight zero. Falls back to the
// newest column alone when its residual is zero or the solution is not finite.
void solve_alpha(const double* gram, int n, int stride, double ridge, bool relative, double stale, double* alpha);

}  // namespace deqdiff
