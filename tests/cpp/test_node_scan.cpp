// The scan over nodes against plain double arithmetic, and the starts and classes that it refuses.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "chains.h"
#include "check.h"
#include "naive.h"
#include "node_scan.h"

using namespace deqdiff;
using chains::error;
using chains::tolerance;
using naive::Storage;

namespace {

std::mt19937_64 generator(11);

std::vector<double> normal(std::size_t count, double scale) { return chains::normal(&generator, count, scale); }

struct Nodes {
  Nodes(Dtype type, std::int64_t t, std::int64_t b, std::int64_t d, int l, int s, std::int64_t k, bool drifting,
        std::int64_t sources = 0)
      : dtype(type), steps(t), nodes(sources > 0 ? sources : t), batch(b), size(d), kinds(k), lags(l), stencil(s) {
    for (const double value : normal(t * l * l * k, 0.6 / l)) state_coef.push_back(round_to_wide(value));
    for (const double value : normal(t * l * s * k, 0.5)) remainder_coef.push_back(round_to_wide(value));
    for (std::int64_t j = 0; j < t; ++j) start.push_back(static_cast<std::int32_t>(generator() % (nodes - s + 1)));
    for (std::int64_t e = 0; e < d; ++e) classes.push_back(static_cast<std::int32_t>(generator() % k));
    remainder = normal(nodes * b * d, 1.0);
    if (drifting) drift = normal(t * l * b * d, 0.3);
    states = normal(b * d, 1.0);
    states.resize((t + 1) * b * d, NAN);
    for (std::vector<double>* values : {&remainder, &drift, &states}) {
      for (double& value : *values) value = naive::round_to(type, value);
    }
  }

  Dtype wide() const { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }
  double round_to_wide(double value) const { return naive::round_to(wide(), value); }

  std::vector<double> expected() const {
    std::vector<double> found = states;
    const std::int64_t line = batch * size;
    for (std::int64_t at = 0; at < line; ++at) {
      const std::int64_t kind = classes[at % size];
      std::vector<double> y(lags, 0.0);
      y[0] = states[at];
      for (std::int64_t j = 0; j < steps; ++j) {
        std::vector<double> next(lags, 0.0);
        for (int l = 0; l < lags; ++l) {
          for (int m = 0; m < lags; ++m) next[l] += state_coef[((j * lags + l) * lags + m) * kinds + kind] * y[m];
          for (int s = 0; s < stencil; ++s) {
            next[l] +=
                remainder_coef[((j * lags + l) * stencil + s) * kinds + kind] * remainder[(start[j] + s) * line + at];
          }
          if (!drift.empty()) next[l] += drift[(j * lags + l) * line + at];
        }
        y = next;
        found[(j + 1) * line + at] = y[0];
      }
    }
    return found;
  }

  Storage run(int threads) const {
    Storage x(dtype, states), r(dtype, remainder), noise(dtype, drift), a(wide(), state_coef),
        c(wide(), remainder_coef);
    node_scan({dtype, x.data(), r.data(), a.data(), c.data(), start.data(), kinds > 1 ? classes.data() : nullptr,
               drift.empty() ? nullptr : noise.data(), steps, nodes, batch, size, kinds, lags, stencil, threads});
    CHECK(x.intact() && r.intact() && noise.intact() && a.intact() && c.intact());
    return x;
  }

  Dtype dtype;
  std::int64_t steps, nodes, batch, size, kinds;
  int lags, stencil;
  std::vector<double> states, remainder, drift, state_coef, remainder_coef;
  std::vector<std::int32_t> start, classes;
};

}  // namespace

TEST(every_dtype_lag_stencil_and_class_is_the_recursion) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16}) {
    for (const std::int64_t size : {1, 7, 16, 33, 513}) {
      for (const int lags : {1, 2, 3, 4, 16}) {
        for (const int stencil : {1, 3, 4, 8}) {
          for (const std::int64_t kinds : {1, 5}) {
            const Nodes nodes(dtype, 9, 2, size, lags, stencil, kinds, lags % 2 == 0);
            CHECK_NEAR(error(nodes.run(1).values(), nodes.expected()), 0.0, tolerance(dtype));
          }
        }
      }
    }
  }
}

TEST(one_node_is_one_step) {
  const Nodes nodes(Dtype::kFloat64, 1, 3, 70, 2, 1, 4, true);
  CHECK_NEAR(error(nodes.run(1).values(), nodes.expected()), 0.0, 1e-14);
}

TEST(remainders_of_other_nodes) {
  for (const std::int64_t sources : {3, 4, 20}) {
    Nodes nodes(Dtype::kFloat64, 9, 2, 70, 2, 3, 4, true, sources);
    nodes.start[0] = 0;
    nodes.start[8] = static_cast<std::int32_t>(sources) - 3;
    CHECK_NEAR(error(nodes.run(1).values(), nodes.expected()), 0.0, 1e-13);
    nodes.start[8] += 1;
    CHECK_THROWS(nodes.run(1), std::invalid_argument);
  }
}

TEST(results_do_not_depend_on_the_number_of_threads) {
  const Nodes nodes(Dtype::kFloat32, 20, 11, 3073, 2, 4, 9, true);  // enough work for five threads
  const Storage alone = nodes.run(1);
  CHECK_NEAR(error(alone.values(), nodes.expected()), 0.0, tolerance(Dtype::kFloat32));
  for (const int threads : {2, 3, 5}) CHECK(nodes.run(threads) == alone);
}

TEST(starts_and_classes_out_of_range_are_refused_before_anything_is_written) {
  for (const int bad : {-1, 6, 2147483647, -2147483647 - 1}) {
    Nodes nodes(Dtype::kFloat64, 8, 1, 40, 1, 3, 6, false);
    nodes.start[7] = bad;
    CHECK_THROWS(nodes.run(1), std::invalid_argument);
    nodes.start[7] = 5;
    nodes.classes[39] = bad;
    CHECK_THROWS(nodes.run(1), std::invalid_argument);
    nodes.classes[39] = 5;
    CHECK_NEAR(error(nodes.run(1).values(), nodes.expected()), 0.0, 1e-13);
  }
}

int main() { return check::run_all(); }
