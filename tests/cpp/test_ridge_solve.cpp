#include <limits>
#include <random>

#include "check.h"
#include "ridge_solve.h"

using namespace deqdiff;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

static std::vector<double> random_gram(int n, int vectors, std::uint64_t seed) {
  std::mt19937_64 draw(seed);
  std::normal_distribution<double> normal;
  std::vector<double> columns(n * vectors), gram(n * n, 0.0);
  for (double& value : columns) value = normal(draw);
  for (int r = 0; r < n; ++r) {
    for (int c = 0; c < n; ++c) {
      for (int k = 0; k < vectors; ++k) gram[r * n + c] += columns[r * vectors + k] * columns[c * vectors + k];
    }
  }
  return gram;
}

static std::vector<double> solve(const std::vector<double>& gram, int n, double ridge, bool relative, double stale) {
  std::vector<double> alpha(n, kNan);
  solve_alpha(gram.data(), n, n, ridge, relative, stale, alpha.data());
  return alpha;
}

static double sum(const std::vector<double>& values) {
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

// At the constrained minimum the gradient (G^T G + ridge) alpha is the same for every weight in use.
TEST(weights_are_the_constrained_minimum) {
  for (int n = 1; n <= 8; ++n) {
    for (const bool relative : {false, true}) {
      const std::vector<double> gram = random_gram(n, 20, n);
      const std::vector<double> alpha = solve(gram, n, 1e-2, relative, kInf);
      CHECK_NEAR(sum(alpha), 1.0, 1e-12);
      std::vector<double> gradient(n, 0.0);
      for (int r = 0; r < n; ++r) {
        for (int c = 0; c < n; ++c) gradient[r] += gram[r * n + c] * alpha[c];
        gradient[r] += 1e-2 * (relative ? gram[r * n + r] : 1.0) * alpha[r];
      }
      for (int r = 1; r < n; ++r) CHECK_NEAR(gradient[r], gradient[0], 1e-9 * std::fabs(gradient[0]));
    }
  }
}

TEST(stale_columns_get_no_weight) {
  std::vector<double> gram = random_gram(3, 10, 7);
  for (int k = 0; k < 3; ++k) gram[0 * 3 + k] *= 1e4, gram[k * 3 + 0] *= 1e4;
  const std::vector<double> alpha = solve(gram, 3, 1e-3, true, 1e3);
  CHECK(alpha[0] == 0);
  const std::vector<double> pair = solve({gram[4], gram[5], gram[7], gram[8]}, 2, 1e-3, true, kInf);
  CHECK_NEAR(alpha[1], pair[0], 1e-14);
  CHECK_NEAR(alpha[2], pair[1], 1e-14);
}

TEST(nan_columns_count_as_stale) {
  std::vector<double> gram = random_gram(3, 10, 8);
  for (int k = 0; k < 3; ++k) gram[1 * 3 + k] = gram[k * 3 + 1] = kNan;
  const std::vector<double> alpha = solve(gram, 3, 1e-3, false, kInf);
  CHECK(alpha[1] == 0);
  CHECK_NEAR(sum(alpha), 1.0, 1e-12);
}

TEST(hopeless_systems_fall_back_to_the_newest_column) {
  const std::vector<double> newest = {0, 0, 1};
  CHECK(solve(std::vector<double>(9, 0.0), 3, 1e-3, true, kInf) == newest);   // residual zero
  CHECK(solve(std::vector<double>(9, 1.0), 3, 0.0, false, kInf) == newest);   // singular
  CHECK(solve(std::vector<double>(9, kNan), 3, 1e-3, true, kInf) == newest);  // not a number
  CHECK(solve(std::vector<double>(9, kInf), 3, 1e-3, true, kInf) == newest);
}

int main() { return check::run_all(); }
