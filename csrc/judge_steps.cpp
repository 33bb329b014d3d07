#include "judge_steps.h"

#include <algorithm>
#include <cmath>

namespace deqdiff {
namespace {

constexpr double kTiny = 1e-30;  // keeps 0 / 0 a zero residual; Inf / Inf and NaN stay NaN
constexpr double kFastest = 0.1, kSlowest = 0.9, kFirst = 0.5;

double at_least(double value, double low) { return value < low ? low : value; }
double at_most(double value, double high) { return value > high ? high : value; }

}  // namespace

void judge_steps(const JudgeProblem& p) {
  for (std::int64_t k = 0; k < p.steps * p.batch; ++k) {
    const double norm = at_least(p.sq_norm[k], kTiny), step = p.sq_diff[k] / norm, ratio = step / p.previous[k];
    const double square =
        std::isnan(ratio) ? kFirst * kFirst : std::clamp(ratio, kFastest * kFastest, kSlowest * kSlowest);
    const double rho = std::sqrt(square), share = rho / (1 - rho), held = p.freeze * p.strict[k % p.batch];
    const bool final = step * share * share <= held * held || step <= p.floor * p.floor;
    const double judged = final ? at_most(step, p.freeze * p.freeze) : at_least(step, 4 * p.freeze * p.freeze);
    p.previous[k] = step;
    p.sq_diff[k] = judged * norm;
  }
}

}  // namespace deqdiff
