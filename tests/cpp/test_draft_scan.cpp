// Sweeps of a draft along a chain whose answer is known, on sizes around the strips that a thread takes.
#include <algorithm>
#include <random>

#include "chains.h"
#include "check.h"
#include "draft_scan.h"
#include "draft_secants.h"
#include "naive.h"

using namespace deqdiff;
using chains::error;
using chains::tolerance;
using naive::Storage;

namespace {

std::mt19937_64 generator(7);

std::vector<double> normal(std::size_t count, double scale) { return chains::normal(&generator, count, scale); }

// E_i(x) = tanh(x + i / 10), elementwise, and a draft of it that is wrong by off cos(3 x).
struct Curved {
  Curved(Dtype type, std::int64_t t, std::int64_t b, std::int64_t d, int l, std::int64_t stride, bool drifting)
      : dtype(type), steps(t), batch(b), size(d), lags(l) {
    state_coef.assign(t * l, 0.0);
    model_coef.assign(t * l, 0.0);
    for (std::int64_t i = 0; i < t; ++i) {
      state_coef[i * l] = 0.9;
      for (int lag = 0; lag < l && lag <= i; ++lag) model_coef[i * l + lag] = lag == 0 ? 0.2 : -0.05;
    }
    for (std::int64_t i = 0; i < t; i += stride) at.push_back(i);
    start = normal((t + 1) * b * d, 1.0);
    drift = normal(drifting ? t * b * d : 0, 0.1);
    lo.assign(b, 0);
    hi.assign(b, static_cast<std::int32_t>(t));
    sq_diff.assign(t * b, -1.0);
    sq_norm.assign(t * b, -1.0);
  }

  static double model(double x, std::int64_t i) { return std::tanh(x + 0.1 * static_cast<double>(i)); }

  std::vector<double> predict(const std::vector<double>& x) const {
    std::vector<double> e(steps * batch * size);
    for (std::size_t k = 0; k < e.size(); ++k) e[k] = model(x[k], static_cast<std::int64_t>(k) / (batch * size));
    return e;
  }

  std::vector<double> serial() const {
    std::vector<double> x = start;
    const std::int64_t row = batch * size;
    for (std::int64_t i = 0; i < steps; ++i) {
      for (std::int64_t k = 0; k < row; ++k) {
        double next = drift.empty() ? 0.0 : drift[i * row + k];
        for (int lag = 0; lag < lags && lag <= i; ++lag) {
          const double before = x[(i - lag) * row + k];
          next += state_coef[i * lags + lag] * before + model_coef[i * lags + lag] * model(before, i - lag);
        }
        x[(i + 1) * row + k] = next;
      }
    }
    return x;
  }

  // What the draft says of one row, (B, D).
  std::vector<double> draft_output(const std::vector<double>& x, std::int64_t i, double off) const {
    std::vector<double> found(batch * size);
    for (std::size_t k = 0; k < found.size(); ++k) {
      const double now = x[i * batch * size + static_cast<std::int64_t>(k)];
      found[k] = model(now, i) + off * std::cos(3 * now);
    }
    return found;
  }

  std::vector<double> solve(int rounds, double off, int ring, int threads) {
    const auto count = static_cast<std::int64_t>(at.size());
    const std::int64_t anchors = count * batch * size;
    const Dtype wide = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    Storage x(dtype, start), noise(dtype, drift), draft_cache(dtype, std::vector<double>(anchors)),
        correction(dtype, std::vector<double>(2 * batch * size, NAN)),
        z(dtype, std::vector<double>(ring * anchors, NAN)), remainder(dtype, std::vector<double>(ring * anchors, NAN)),
        slope(wide, std::vector<double>(steps, 0.3)), carry(wide, std::vector<double>(2 * lags * batch * size, NAN));
    std::vector<double> secant_weights(count * batch * (ring - 1) * (ring - 1), NAN), weights;
    for (std::int64_t i = 0; i < steps; ++i) weights.insert(weights.end(), {0.0, 1.0});
    std::vector<std::int32_t> filled(count * batch, 0);
    for (int round = 0; round < rounds; ++round) {
      Storage e(dtype, predict(x.values()));
      std::vector<double> first;
      for (const std::int64_t i : at) {
        const std::vector<double> one = draft_output(x.values(), i, off);
        first.insert(first.end(), one.begin(), one.end());
      }
      if (round == 0) draft_cache = Storage(dtype, first);
      draft_secants({dtype,
                     x.data(),
                     e.data(),
                     draft_cache.data(),
                     at.data(),
                     lo.data(),
                     hi.data(),
                     z.data(),
                     remainder.data(),
                     filled.data(),
                     secant_weights.data(),
                     steps,
                     count,
                     batch,
                     size,
                     ring,
                     round % ring,
                     1e-9,
                     1e-6,
                     threads});
      for (std::int64_t n = 0; n < count; ++n) {
        Storage output(dtype, draft_output(x.values(), at[n], off));
        draft_scan(
            {{dtype, x.data(), e.data(), state_coef.data(), model_coef.data(), drift.empty() ? nullptr : noise.data(),
              lo.data(), hi.data(), sq_diff.data(), sq_norm.data(), steps, batch, size, lags, threads},
             output.data(),
             draft_cache.data(),
             correction.data(),
             weights.data(),
             {slope.data(), false},
             carry.data(),
             z.data(),
             remainder.data(),
             secant_weights.data(),
             count,
             n,
             n > 0 ? at[n - 1] : -1,
             at[n],
             n + 1 < count ? at[n + 1] : steps,
             ring,
             round % ring,
             false});
        CHECK(output.intact());
      }
      CHECK(e.intact());
    }
    CHECK(x.intact() && noise.intact() && draft_cache.intact() && correction.intact() && z.intact() &&
          remainder.intact());
    CHECK(slope.intact() && carry.intact());
    return x.values();
  }

  Dtype dtype;
  std::int64_t steps, batch, size;
  int lags;
  std::vector<std::int64_t> at;
  std::vector<double> state_coef, model_coef, start, drift, sq_diff, sq_norm;
  std::vector<std::int32_t> lo, hi;
};

}  // namespace

TEST(a_draft_that_is_the_model_is_exact_in_one_pass) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16}) {
    for (const std::int64_t size : {1, 33, 4096, 4103}) {
      for (int lags = 1; lags <= 3; lags += 2) {
        Curved chain(dtype, 6, 2, size, lags, 1, lags == 3);
        CHECK_NEAR(error(chain.solve(1, 0.0, 1, 2), chain.serial()), 0.0, tolerance(dtype));
      }
    }
  }
}

TEST(one_row_more_is_exact_after_every_pass_whatever_the_draft) {
  Curved chain(Dtype::kFloat64, 5, 2, 130, 1, 1, true);
  CHECK_NEAR(error(chain.solve(5, 3.0, 3, 1), chain.serial()), 0.0, 1e-12);
}

TEST(passes_converge_between_anchors) {
  Curved chain(Dtype::kFloat64, 40, 1, 50, 2, 4, false);
  const std::vector<double> serial = chain.serial();
  const double after_two = error(chain.solve(2, 0.05, 1, 1), serial);
  CHECK(after_two < 0.1);
  CHECK(error(chain.solve(5, 0.05, 1, 1), serial) < 1e-2 * after_two);
}

TEST(secants_make_up_for_a_poor_draft) {
  Curved chain(Dtype::kFloat64, 30, 1, 3, 1, 1, false);
  const std::vector<double> serial = chain.serial();
  CHECK(error(chain.solve(7, 0.4, 5, 1), serial) < 0.5 * error(chain.solve(7, 0.4, 1, 1), serial));
}

TEST(results_do_not_depend_on_the_number_of_threads) {
  Curved chain(Dtype::kFloat32, 12, 3, 9001, 1, 3, true);  // enough work for three threads
  for (std::int32_t b = 0; b < 3; ++b) chain.lo[b] = b, chain.hi[b] = 12 - 2 * b;
  const std::vector<double> alone = chain.solve(3, 0.3, 4, 1), norms = chain.sq_diff;
  CHECK(chain.solve(3, 0.3, 4, 4) == alone);
  CHECK(chain.sq_diff == norms);
}

TEST(a_missing_output_is_asked_for) {
  Curved chain(Dtype::kFloat64, 3, 1, 2, 1, 1, false);
  chain.at = {0, 3};
  bool refused = false;
  try {
    chain.solve(1, 0.0, 1, 1);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused);
}

int main() { return check::run_all(); }
