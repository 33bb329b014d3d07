// The quasi-Newton scan on models whose answer is known: affine ones, for which a right slope makes one scan exact.
#include <random>

#include "chains.h"
#include "check.h"
#include "naive.h"
#include "newton_scan.h"

using namespace deqdiff;
using chains::error;
using chains::tolerance;
using naive::Storage;

namespace {

std::mt19937_64 generator(3);

std::vector<double> normal(std::size_t count, double scale) { return chains::normal(&generator, count, scale); }

// E_i(x) = A x + k_i with one matrix A (diagonal if `mix` is zero) for all timesteps, and the memory of a solve.
struct Affine {
  Affine(Dtype type, std::int64_t t, std::int64_t b, std::int64_t d, int l, int r, bool drifting, double mix)
      : dtype(type), steps(t), batch(b), size(d), lags(l), ring(r), matrix(d * d, 0.0), offset(normal(t, 0.2)) {
    for (std::int64_t row = 0; row < d; ++row) {
      for (std::int64_t column = 0; column < d && mix > 0; ++column) matrix[row * d + column] = normal(1, mix)[0];
      matrix[row * d + row] = -0.5 + 0.4 * std::cos(static_cast<double>(row));
    }
    state_coef.assign(t * l, 0.0);
    model_coef.assign(t * l, 0.0);
    for (std::int64_t i = 0; i < t; ++i) {
      state_coef[i * l] = 0.9;
      for (int lag = 0; lag < l && lag <= i; ++lag) model_coef[i * l + lag] = lag == 0 ? 0.4 : -0.1;
    }
    lo.assign(b, 0);
    hi.assign(b, static_cast<std::int32_t>(t));
    start = normal((t + 1) * b * d, 1.0);
    if (drifting) drift = normal(t * b * d, 0.1);
    filled.assign(t * b, 0);
    sq_diff.assign(t * b, -1.0);
    sq_norm.assign(t * b, -1.0);
  }

  std::vector<double> predict(const std::vector<double>& x) const {
    std::vector<double> e(steps * batch * size);
    for (std::int64_t line = 0; line < steps * batch; ++line) {
      for (std::int64_t row = 0; row < size; ++row) {
        double value = offset[line / batch];
        for (std::int64_t k = 0; k < size; ++k) value += matrix[row * size + k] * x[line * size + k];
        e[line * size + row] = value;
      }
    }
    return e;
  }

  // The serial chain: as many plain rounds as there are steps.
  std::vector<double> serial() const {
    naive::State s{steps, batch, size,  steps,      lags,       1,  Dtype::kFloat64,
                   start, {},    drift, state_coef, model_coef, {}, {},
                   {},    {},    {},    lo,         hi,         {}};
    s.sq_diff = s.sq_norm = sq_diff;
    for (std::int64_t i = 0; i < steps; ++i) {
      s.e = predict(s.x);
      s.x = naive::ddim_update(&s);
    }
    return s.x;
  }

  // Rounds of the scan, with the matrix's diagonal times `share` as slope. Returns the states.
  std::vector<double> solve(int rounds, double share, int threads) {
    Storage x(dtype, start), z(dtype, normal(ring * steps * batch * size, 1.0)), old = z, noise(dtype, drift);
    const Dtype wide = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    std::vector<double> diagonal(steps * size);
    for (std::int64_t k = 0; k < steps * size; ++k) diagonal[k] = share * matrix[k % size * (size + 1)];
    Storage slope(wide, diagonal);
    for (int round = 0; round < rounds; ++round) {
      Storage e(dtype, predict(x.values()));
      NewtonProblem problem{
          {dtype, x.data(), e.data(), state_coef.data(), model_coef.data(), drift.empty() ? nullptr : noise.data(),
           lo.data(), hi.data(), sq_diff.data(), sq_norm.data(), steps, batch, size, lags, threads},
          {slope.data(), true},
          {z.data(), old.data(), filled.data(), ring, steps, round % ring},
          1e-12,
          1e-9};
      newton_scan(problem);
      CHECK(e.intact());
    }
    CHECK(x.intact() && z.intact() && old.intact() && slope.intact() && noise.intact());
    return x.values();
  }

  Dtype dtype;
  std::int64_t steps, batch, size;
  int lags, ring;
  std::vector<double> matrix, offset, state_coef, model_coef, start, drift, sq_diff, sq_norm;
  std::vector<std::int32_t> lo, hi, filled;
};

}  // namespace

TEST(the_right_slope_is_exact_in_one_scan) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16}) {
    for (const std::int64_t size : {1, 15, 33, 130}) {
      for (int lags = 1; lags <= 3; ++lags) {
        Affine model(dtype, 12, 2, size, lags, 1, lags == 2, 0.0);
        CHECK_NEAR(error(model.solve(1, 1.0, 2), model.serial()), 0.0, tolerance(dtype));
      }
    }
  }
}

TEST(without_slope_and_history_it_is_the_plain_scan) {
  Affine model(Dtype::kFloat64, 9, 2, 40, 2, 1, true, 0.0);
  naive::State s{9,
                 2,
                 40,
                 9,
                 2,
                 1,
                 Dtype::kFloat64,
                 model.start,
                 model.predict(model.start),
                 model.drift,
                 model.state_coef,
                 model.model_coef,
                 {},
                 {},
                 {},
                 {},
                 {},
                 model.lo,
                 model.hi,
                 {}};
  s.sq_diff = s.sq_norm = model.sq_diff;
  const std::vector<double> plain = naive::ddim_update(&s);
  CHECK_NEAR(error(model.solve(1, 0.0, 1), plain), 0.0, 1e-13);
  CHECK_NEAR(error(model.sq_diff, s.sq_diff), 0.0, 1e-13);
  CHECK_NEAR(error(model.sq_norm, s.sq_norm), 0.0, 1e-13);
}

TEST(secants_find_a_slope_that_is_not_diagonal) {
  Affine with(Dtype::kFloat64, 30, 1, 3, 1, 5, false, 0.5), without = with;
  without.ring = 1;
  const std::vector<double> serial = with.serial();
  CHECK_NEAR(error(with.solve(8, 0.0, 1), serial), 0.0, 1e-6);
  CHECK(error(without.solve(8, 0.0, 1), serial) > 1e-4);
}

TEST(results_do_not_depend_on_the_number_of_threads) {
  Affine model(Dtype::kFloat32, 40, 5, 500, 1, 4, false, 0.01);  // enough work for three threads
  for (std::int32_t b = 0; b < 5; ++b) model.lo[b] = b, model.hi[b] = 40 - 3 * b;
  generator.seed(5);
  Affine again = model;
  const std::vector<double> alone = model.solve(3, 0.5, 1);
  generator.seed(5);
  CHECK(again.solve(3, 0.5, 4) == alone);
  CHECK(again.sq_diff == model.sq_diff && again.sq_norm == model.sq_norm);
}

int main() { return check::run_all(); }
