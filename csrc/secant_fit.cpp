#include "secant_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cholesky.h"
#include "ops.h"

namespace deqdiff {
namespace {

// The columns of one row that are kept, with their ridges; returns how many.
int keep(const SecantFitProblem& p, std::int64_t r, const double* gram, int* kept, double* lengths, double* ridges) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  int found = 0;
  for (int k = 0; k < p.columns && k + 1 < p.count[r]; ++k) {
    const double length = lengths[k] = std::sqrt(gram[k * p.columns + k]);
    if (!(length > p.floor * p.size[r] && length < kInfinity)) continue;
    double ridge = p.ridges[k * p.rows + r];
    if (p.guess_error != nullptr && ridge > p.guessed) {
      const double error = p.guess_error[r] / std::max(p.nonlinear * length, 1e-300), more = error * error;
      if (!(more <= ridge)) ridge = more;  // NaN too: then there is no fit
    }
    ridges[found] = ridge;
    kept[found++] = k;
  }
  return found;
}

void fit_row(const SecantFitProblem& p, std::int64_t r) {
  const std::int64_t area = static_cast<std::int64_t>(p.columns) * p.columns;
  const double* gram = p.gram + r * area;
  double* fit = p.fit + r * area;
  std::fill(fit, fit + area, 0.0);
  int kept[kMaxSecants];
  double lengths[kMaxSecants], ridges[kMaxSecants], inverse[kMaxSecants][kMaxSecants];
  const int count = keep(p, r, gram, kept, lengths, ridges);
  for (int column = 0; column < count; ++column) {
    double lower[kMaxSecants][kMaxSecants];
    for (int k = 0; k < count; ++k) {
      for (int m = 0; m <= k; ++m) {
        const double product = gram[kept[k] * p.columns + kept[m]];
        lower[k][m] = std::isfinite(product) ? product / lengths[kept[k]] / lengths[kept[m]] : 0.0;
      }
      lower[k][k] += ridges[k];
      inverse[column][k] = k == column;
    }
    if (!cholesky_solve(lower, inverse[column], count)) return;
  }
  for (int k = 0; k < count; ++k) {
    for (int m = 0; m < count; ++m) {
      fit[kept[k] * p.columns + kept[m]] = inverse[k][m] / lengths[kept[k]] / lengths[kept[m]];
    }
  }
}

}  // namespace

void secant_fit(const SecantFitProblem& p) {
  for (std::int64_t r = 0; r < p.rows; ++r) fit_row(p, r);
}

void secant_fit_call(Arguments& a) {
  SecantFitProblem p;
  p.rows = a.integer("R", 0, std::int64_t{1} << 40);
  p.columns = static_cast<int>(a.integer("H", 1, kMaxSecants));
  require_addressable("R, H, H", {p.rows, p.columns, p.columns});
  const bool data = p.rows > 0;
  p.fit = a.table<double>("fit", data);
  p.gram = a.table<const double>("gram", data);
  p.size = a.table<const double>("size", data);
  p.count = a.table<const std::int32_t>("count", data);
  p.ridges = a.table<const double>("ridges", data);
  p.guess_error = a.table<const double>("guess_error", false);
  p.floor = a.number("floor", false, false);
  p.guessed = a.number("guessed", false, false);
  p.nonlinear = a.number("nonlinear", false, false);
  a.finish();
  secant_fit(p);
}

}  // namespace deqdiff
