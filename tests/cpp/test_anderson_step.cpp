// The two kernels against naive double arithmetic: storage types, lags, drift, windows, rings, scopes, tails, threads.
#include <memory>
#include <random>

#include "check.h"
#include "naive.h"

using namespace deqdiff;
using naive::State;
using naive::Storage;

static std::mt19937_64 generator(1);

static std::vector<double> normal(Dtype dtype, std::size_t count, double scale = 1.0) {
  std::normal_distribution<double> draw(0.0, scale);
  std::vector<double> values(count);
  for (double& value : values) value = naive::round_to(dtype, draw(generator));
  return values;
}

static int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// What a kernel works on, from a naive state; `threads` only changes how.
struct Memory {
  explicit Memory(const State& s)
      : state(s), x(s.dtype, s.x), e(s.dtype, s.e), drift(s.dtype, s.drift), f(s.dtype, s.f), g(s.dtype, s.g) {}

  ScanProblem scan(int threads) {
    return {state.dtype,
            x.data(),
            e.data(),
            state.state_coef.data(),
            state.model_coef.data(),
            state.drift.empty() ? nullptr : drift.data(),
            state.lo.data(),
            state.hi.data(),
            state.sq_diff.data(),
            state.sq_norm.data(),
            state.steps,
            state.batch,
            state.size,
            state.lags,
            threads};
  }
  AndersonProblem anderson(const AndersonProblem& settings, int threads) {
    AndersonProblem problem = settings;
    problem.scan = scan(threads);
    problem.f = f.data();
    problem.g = g.data();
    problem.gram = state.gram.data();
    problem.filled = state.filled.data();
    return problem;
  }
  bool intact() const { return x.intact() && e.intact() && drift.intact() && f.intact() && g.intact(); }
  bool operator==(const Memory& other) const {
    const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
      return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
    };
    return x == other.x && f == other.f && g == other.g && same(state.gram, other.state.gram) &&
           same(state.sq_diff, other.state.sq_diff) && same(state.sq_norm, other.state.sq_norm) &&
           state.filled == other.state.filled;
  }

  State state;
  Storage x, e, drift, f, g;
};

static State make_state(Dtype dtype, std::int64_t steps, std::int64_t batch, std::int64_t size, int lags, int history,
                        std::int64_t width, bool drift) {
  State s{steps, batch, size, width, lags, history, dtype, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  s.x = normal(dtype, (steps + 1) * batch * size);
  s.e = normal(dtype, steps * batch * size);
  if (drift) s.drift = normal(dtype, steps * batch * size, 0.1);
  s.state_coef = normal(Dtype::kFloat64, steps * lags, 0.4);
  s.model_coef = normal(Dtype::kFloat64, steps * lags, 0.4);
  for (std::int64_t i = 0; i < steps; ++i) {
    s.state_coef[i * lags] += 0.5;
    for (int lag = 1; lag < lags; ++lag) {
      if (lag > i || pick(0, 2) == 0) s.state_coef[i * lags + lag] = s.model_coef[i * lags + lag] = 0;
    }
  }
  s.sq_diff.assign(steps * batch, -1.0);
  s.sq_norm.assign(steps * batch, -1.0);
  s.f = normal(dtype, history * width * batch * size);
  s.g = normal(dtype, history * width * batch * size);
  s.gram.assign(width * batch * history * history, 0.0);
  for (std::int64_t slot = 0; slot < width * batch; ++slot) {
    s.filled.push_back(pick(0, history));
    for (int r = 0; r < history; ++r) {
      for (int c = 0; c < history; ++c) {
        double& dot = s.gram[(slot * history + r) * history + c];
        for (std::int64_t d = 0; d < size; ++d) {
          dot += s.g[(r * width * batch + slot) * size + d] * s.g[(c * width * batch + slot) * size + d];
        }
      }
    }
  }
  for (std::int64_t b = 0; b < batch; ++b) {
    s.lo.push_back(b == 0 ? static_cast<int>(steps - std::min(steps, width)) : pick(0, static_cast<int>(steps)));
    s.hi.push_back(
        static_cast<int>(std::min<std::int64_t>(steps, s.lo[b] + (b == 0 ? width : pick(0, static_cast<int>(width))))));
  }
  return s;
}

static double relative_error(const std::vector<double>& got, const std::vector<double>& wanted) {
  double error = 0, norm = 0;
  for (std::size_t k = 0; k < got.size(); ++k) {
    error += (got[k] - wanted[k]) * (got[k] - wanted[k]);
    norm += wanted[k] * wanted[k];
  }
  return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
}

static double tolerance(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 1e-12 : dtype == Dtype::kFloat32 ? 3e-6 : 1e-2;
}

static void compare(const Memory& memory, const State& wanted) {
  const double limit = tolerance(wanted.dtype);
  CHECK(memory.intact());
  CHECK_NEAR(relative_error(memory.x.values(), wanted.x), 0.0, limit);
  CHECK_NEAR(relative_error(memory.state.sq_diff, wanted.sq_diff), 0.0, limit);
  CHECK_NEAR(relative_error(memory.state.sq_norm, wanted.sq_norm), 0.0, limit);
  CHECK_NEAR(relative_error(memory.f.values(), wanted.f), 0.0, limit);
  CHECK_NEAR(relative_error(memory.g.values(), wanted.g), 0.0, limit);
  CHECK_NEAR(relative_error(memory.state.gram, wanted.gram), 0.0, limit);
  CHECK(memory.state.filled == wanted.filled);
}

static const Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16};

TEST(scan_matches_naive) {
  for (const Dtype dtype : kDtypes) {
    for (const std::int64_t steps : {1, 2, 9}) {
      for (const std::int64_t size : {1, 7, 16, 255, 256, 300}) {
        for (int lags = 1; lags <= 4; ++lags) {
          State state = make_state(dtype, steps, 1 + size % 3, size, lags, 1, steps, lags % 2 == 0);
          Memory memory(state);
          ddim_update(memory.scan(2));
          state.x = naive::ddim_update(&state);
          compare(memory, state);
        }
      }
    }
  }
}

static AndersonProblem settings(Scope scope, int history, std::int64_t width, int column, double damping,
                                double stale) {
  AndersonProblem problem{};
  problem.history = history;
  problem.width = width;
  problem.column = column;
  problem.scope = scope;
  problem.ridge = 0.1;
  problem.relative_ridge = column % 2 == 0;
  problem.damping = damping;
  problem.stale = stale;
  return problem;
}

TEST(anderson_round_matches_naive) {
  for (const Dtype dtype : kDtypes) {
    for (const Scope scope : {Scope::kTimestep, Scope::kTrajectory, Scope::kTriangular}) {
      for (int history = 1; history <= kMaxHistory; ++history) {
        for (const std::int64_t size : {1, 33, 600}) {
          const std::int64_t steps = pick(1, 12), width = pick(1, static_cast<int>(steps));
          State state = make_state(dtype, steps, pick(1, 3), size, pick(1, 2), history, width, pick(0, 1) == 1);
          const AndersonProblem how =
              settings(scope, history, width, pick(0, history - 1), pick(0, 1) ? 1.0 : 0.6, pick(0, 1) ? 1e300 : 1.0);
          Memory memory(state);
          anderson_step(memory.anderson(how, 2));
          naive::Anderson(&state, how).run();
          compare(memory, state);
        }
      }
    }
  }
}

TEST(results_do_not_depend_on_the_number_of_threads) {
  for (const Scope scope : {Scope::kTimestep, Scope::kTrajectory, Scope::kTriangular}) {
    for (const std::int64_t batch : {1, 3, 5}) {
      State state = make_state(Dtype::kFloat32, 40, batch, 3333, 2, 4, 40, false);
      const AndersonProblem how = settings(scope, 4, 40, 1, 0.9, 1e300);
      Memory alone(state);
      anderson_step(alone.anderson(how, 1));
      ddim_update(alone.scan(1));
      for (const int threads : {2, 3, 7}) {
        Memory shared(state);
        anderson_step(shared.anderson(how, threads));
        ddim_update(shared.scan(threads));
        CHECK(shared == alone);
        CHECK(shared.intact());
      }
    }
  }
}

TEST(old_columns_that_are_not_filled_are_never_read) {
  State state = make_state(Dtype::kFloat32, 6, 1, 100, 1, 4, 6, false);
  const double nan = std::nan("");
  std::fill(state.filled.begin(), state.filled.end(), 0);
  for (auto* memory : {&state.f, &state.g, &state.gram}) std::fill(memory->begin(), memory->end(), nan);
  Memory memory(state);
  for (int round = 0; round < 6; ++round) {
    anderson_step(memory.anderson(settings(Scope::kTriangular, 4, 6, round % 4, 1.0, 1e300), 1));
  }
  for (const double value : memory.x.values()) CHECK(std::isfinite(value));
}

TEST(nan_in_bfloat16_stays_nan) {
  State state = make_state(Dtype::kBFloat16, 1, 1, 40, 1, 1, 1, false);
  Memory memory(state);
  auto* items = static_cast<std::uint16_t*>(memory.e.data());
  items[3] = 0x7FFF;
  items[20] = 0xFF81;
  ddim_update(memory.scan(1));
  const std::vector<double> out = memory.x.values();
  CHECK(std::isnan(out[40 + 3]) && std::isnan(out[40 + 20]));
  CHECK(std::isfinite(out[40 + 4]));
  CHECK(std::isnan(memory.state.sq_norm[0]));
}

TEST(windows_outside_the_chain_are_refused) {
  State state = make_state(Dtype::kFloat32, 6, 1, 10, 1, 2, 3, false);
  const AndersonProblem how = settings(Scope::kTimestep, 2, 3, 0, 1.0, 1e300);
  for (const auto& [lo, hi] : {std::pair<int, int>{-1, 2}, {4, 7}, {0, 4}, {4, 2}, {7, 0}}) {
    Memory memory(state);
    memory.state.lo[0] = lo;
    memory.state.hi[0] = hi;
    CHECK_THROWS(anderson_step(memory.anderson(how, 1)), std::invalid_argument);
    CHECK(memory.x == Memory(state).x);
  }
}

TEST(nothing_to_do_is_fine) {
  State state = make_state(Dtype::kFloat32, 4, 2, 10, 1, 2, 4, false);
  state.lo = {3, 4};
  state.hi = {3, 4};
  Memory memory(state), before(state);
  anderson_step(memory.anderson(settings(Scope::kTrajectory, 2, 4, 0, 1.0, 1e300), 2));
  ddim_update(memory.scan(2));
  CHECK(memory == before);
}

int main() {
  std::printf("instruction set: %s\n", isa_table().name);
  return check::run_all();
}
