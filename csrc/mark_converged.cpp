#include "mark_converged.h"

#include <algorithm>
#include <cmath>

#include "ops.h"

namespace deqdiff {
namespace {

double at_least(double value, double low) { return value < low ? low : value; }
double at_most(double value, double high) { return value > high ? high : value; }

}  // namespace

void mark_converged(const MarkConvergedProblem& p) {
  for (std::int64_t k = 0; k < p.steps * p.batch; ++k) {
    const double norm = at_least(p.sq_norm[k], kTiny), step = p.sq_diff[k] / norm, ratio = step / p.previous[k];
    const double square =
        std::isnan(ratio) ? kFirstRate * kFirstRate : std::clamp(ratio, kMinRate * kMinRate, kMaxRate * kMaxRate);
    const double rho = std::sqrt(square), share = rho / (1 - rho), held = p.freeze * p.strict[k % p.batch];
    const bool converged = step * share * share <= held * held || step <= p.floor * p.floor;
    const double marked = converged ? at_most(step, p.freeze * p.freeze) : at_least(step, 4 * p.freeze * p.freeze);
    p.previous[k] = step;
    p.sq_diff[k] = marked * norm;
  }
}

void mark_converged_call(Arguments& a) {
  MarkConvergedProblem p;
  p.steps = a.integer("T", 0, std::int64_t{1} << 30);
  p.batch = a.integer("B", 0, std::int64_t{1} << 30);
  const bool rows = p.steps > 0 && p.batch > 0;
  p.sq_diff = a.table<double>("sq_diff", rows);
  p.sq_norm = a.table<const double>("sq_norm", rows);
  p.previous = a.table<double>("previous", rows);
  p.strict = a.table<const double>("strict", rows);
  p.freeze = a.number("freeze", false, false);
  p.floor = a.number("floor", false, false);
  a.finish();
  mark_converged(p);
}

}  // namespace deqdiff
