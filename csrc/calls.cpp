#include "calls.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "affine_scan.h"
#include "anderson.h"
#include "draft_scan.h"
#include "draft_secants.h"
#include "inverse_scan.h"
#include "judge_steps.h"
#include "newton_rows.h"
#include "newton_scan.h"

namespace deqdiff {
namespace {

void require(bool good, const std::string& name, const std::string& wanted) {
  if (!good) throw std::invalid_argument(name + ": expected " + wanted);
}

void require_range(const char* name, Index value, Index low, Index high) {
  require(value >= low && value <= high, name,
          std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(value));
}

void* storage(const char* name, Address address, std::size_t alignment, bool needed) {
  require(address != 0 || !needed, name, "an address, got 0");
  require(address % alignment == 0, name, "an address aligned to " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<void*>(address);
}

template <class T>
T* table(const char* name, Address address, bool needed) {
  return static_cast<T*>(storage(name, address, alignof(T), needed));
}

ScanProblem scan_problem(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                         Address drift, Address lo, Address hi, Address sq_diff, Address sq_norm, Index T, Index B,
                         Index D, int L, int threads) {
  require_range("dtype (0 float32, 1 float64, 2 bfloat16)", dtype, 0, 2);
  require_range("T", T, 0, Index{1} << 30);
  require_range("B", B, 0, Index{1} << 30);
  require_range("D", D, 0, Index{1} << 40);
  require_range("L", L, 1, kMaxLags);
  require_range("threads", threads, 1, 1 << 20);
  const Index lines = (T + 1) * std::max<Index>(B, 1);
  require(D <= std::numeric_limits<Index>::max() / 16 / lines, "T, B, D", "a size within the address space");
  const bool rows = T > 0 && B > 0, data = rows && D > 0;
  const std::size_t item = static_cast<std::size_t>(item_size(static_cast<Dtype>(dtype)));
  ScanProblem problem;
  problem.dtype = static_cast<Dtype>(dtype);
  problem.states = storage("states_ptr", states, item, data);
  problem.predictions = storage("predictions_ptr", predictions, item, data);
  problem.drift = storage("drift_ptr", drift, item, false);
  problem.state_coef = table<const double>("state_coef_ptr", state_coef, rows);
  problem.model_coef = table<const double>("model_coef_ptr", model_coef, rows);
  problem.lo = table<const std::int32_t>("lo_ptr", lo, B > 0);
  problem.hi = table<const std::int32_t>("hi_ptr", hi, B > 0);
  problem.sq_diff = table<double>("sq_diff_ptr", sq_diff, rows);
  problem.sq_norm = table<double>("sq_norm_ptr", sq_norm, rows);
  problem.steps = T;
  problem.batch = B;
  problem.size = D;
  problem.lags = L;
  problem.threads = threads;
  return problem;
}

}  // namespace

void ddim_update_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                      Address drift, Address lo, Address hi, Address sq_diff, Address sq_norm, Index T, Index B,
                      Index D, int L, int threads) {
  const ScanProblem problem = scan_problem(dtype, states, predictions, state_coef, model_coef, drift, lo, hi, sq_diff,
                                           sq_norm, T, B, D, L, threads);
  ddim_update(problem);
}

void anderson_step_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                        Address drift, Address lo, Address hi, Address sq_diff, Address sq_norm, Address f, Address g,
                        Address gram, Address filled, Index T, Index B, Index D, int L, int M, Index W, int column,
                        int scope, double ridge, bool relative_ridge, double damping, double stale, int threads) {
  AndersonProblem problem;
  problem.scan = scan_problem(dtype, states, predictions, state_coef, model_coef, drift, lo, hi, sq_diff, sq_norm, T, B,
                              D, L, threads);
  require_range("M", M, 1, kMaxHistory);
  require_range("W", W, T > 0 ? 1 : 0, Index{1} << 30);
  require_range("column", column, 0, M - 1);
  require_range("scope (0 timestep, 1 trajectory, 2 triangular)", scope, 0, 2);
  require(std::isfinite(ridge) && ridge >= 0, "ridge", "a finite number >= 0, got " + std::to_string(ridge));
  require(std::isfinite(damping), "damping", "a finite number, got " + std::to_string(damping));
  require(stale >= 0, "stale", "a number >= 0, got " + std::to_string(stale));
  const Index lines = M * std::max<Index>(W, 1) * std::max<Index>(B, 1);
  require(lines <= (Index{1} << 59) && D <= std::numeric_limits<Index>::max() / 16 / lines, "M, W, B, D",
          "a size within the address space");
  const bool rows = T > 0 && B > 0;
  const std::size_t item = static_cast<std::size_t>(item_size(problem.scan.dtype));
  problem.f = storage("f_ptr", f, item, rows && D > 0);
  problem.g = storage("g_ptr", g, item, rows && D > 0);
  problem.gram = table<double>("gram_ptr", gram, rows);
  problem.filled = table<std::int32_t>("filled_ptr", filled, rows);
  problem.history = M;
  problem.width = W;
  problem.column = column;
  problem.scope = static_cast<Scope>(scope);
  problem.ridge = ridge;
  problem.relative_ridge = relative_ridge;
  problem.damping = damping;
  problem.stale = stale;
  anderson_step(problem);
}

void newton_scan_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                      Address drift, Address slope, bool slope_per_element, Address lo, Address hi, Address sq_diff,
                      Address sq_norm, Address z, Address e, Address filled, Index T, Index B, Index D, int L, int ring,
                      Index W, int column, double ridge, double floor, int threads) {
  NewtonProblem problem;
  problem.scan = scan_problem(dtype, states, predictions, state_coef, model_coef, drift, lo, hi, sq_diff, sq_norm, T, B,
                              D, L, threads);
  const bool rows = T > 0 && B > 0, data = rows && D > 0, remembers = ring > 0;
  require_range("ring", ring, 0, kMaxSecants + 1);
  require_range("W", W, remembers && T > 0 ? 1 : 0, Index{1} << 30);
  require_range("column", column, 0, std::max(ring - 1, 0));
  require(std::isfinite(ridge) && ridge > 0, "ridge", "a finite number > 0, got " + std::to_string(ridge));
  require(std::isfinite(floor) && floor >= 0, "floor", "a finite number >= 0, got " + std::to_string(floor));
  const Index lines = std::max(ring, 1) * std::max<Index>(W, 1) * std::max<Index>(B, 1);
  require(lines <= (Index{1} << 59) && D <= std::numeric_limits<Index>::max() / 16 / lines, "ring, W, B, D",
          "a size within the address space");
  const std::size_t item = static_cast<std::size_t>(item_size(problem.scan.dtype));
  problem.slope = storage("slope_ptr", slope, problem.scan.dtype == Dtype::kFloat64 ? 8 : 4, data);
  problem.slope_per_element = slope_per_element;
  problem.z = remembers ? storage("z_ptr", z, item, data) : nullptr;
  problem.e = remembers ? storage("e_ptr", e, item, data) : nullptr;
  problem.filled = remembers ? table<std::int32_t>("filled_ptr", filled, rows) : nullptr;
  problem.ring = ring;
  problem.width = W;
  problem.column = column;
  problem.ridge = ridge;
  problem.floor = floor;
  newton_scan(problem);
}

void inverse_scan_call(int dtype, Address states, Address predictions, Address state_coef, Address model_coef,
                       Address drift, Address slope, bool slope_per_element, Address weight, bool weight_per_element,
                       Address lo, Address hi, Address sq_miss, Address z, Address e, Address filled, Index T, Index B,
                       Index D, int L, int ring, Index W, int column, double damping, double ridge, double stale,
                       double floor, double reach, int threads) {
  InverseProblem problem;
  problem.scan = scan_problem(dtype, states, predictions, state_coef, model_coef, drift, lo, hi, sq_miss, sq_miss, T, B,
                              D, L, threads);
  const bool rows = T > 0 && B > 0, data = rows && D > 0;
  require_range("ring", ring, 1, kMaxSecants + 1);
  require_range("W", W, T > 0 ? 1 : 0, Index{1} << 30);
  require_range("column", column, 0, ring - 1);
  const std::pair<const char*, double> settings[] = {
      {"damping", damping}, {"ridge", ridge}, {"stale", stale}, {"reach", reach}};
  for (const auto& [name, value] : settings) {
    require(std::isfinite(value) && value > 0, name, "a finite number > 0, got " + std::to_string(value));
  }
  require(std::isfinite(floor) && floor >= 0, "floor", "a finite number >= 0, got " + std::to_string(floor));
  const Index lines = ring * std::max<Index>(W, 1) * std::max<Index>(B, 1);
  require(lines <= (Index{1} << 59) && D <= std::numeric_limits<Index>::max() / 16 / lines, "ring, W, B, D",
          "a size within the address space");
  const std::size_t item = static_cast<std::size_t>(item_size(problem.scan.dtype));
  const std::size_t wide = problem.scan.dtype == Dtype::kFloat64 ? 8 : 4;
  problem.slope = storage("slope_ptr", slope, wide, data);
  problem.weight = storage("weight_ptr", weight, wide, data);
  problem.slope_per_element = slope_per_element;
  problem.weight_per_element = weight_per_element;
  problem.z = storage("z_ptr", z, item, data);
  problem.e = storage("e_ptr", e, item, data);
  problem.filled = table<std::int32_t>("filled_ptr", filled, rows);
  problem.ring = ring;
  problem.width = W;
  problem.column = column;
  problem.damping = damping;
  problem.ridge = ridge;
  problem.stale = stale;
  problem.floor = floor;
  problem.reach = reach;
  inverse_scan(problem);
}

void draft_secants_call(int dtype, Address states, Address predictions, Address made, Address at, Address lo,
                        Address hi, Address z, Address rest, Address filled, Address weights, Index T, Index A, Index B,
                        Index D, int ring, int column, double ridge, double floor, int threads) {
  require_range("dtype (0 float32, 1 float64, 2 bfloat16)", dtype, 0, 2);
  require_range("T", T, 0, Index{1} << 30);
  require_range("A", A, 0, T);
  require_range("B", B, 0, Index{1} << 30);
  require_range("D", D, 0, Index{1} << 40);
  require_range("ring", ring, 1, kMaxSecants + 1);
  require_range("column", column, 0, ring - 1);
  require_range("threads", threads, 1, 1 << 20);
  require(std::isfinite(ridge) && ridge > 0, "ridge", "a finite number > 0, got " + std::to_string(ridge));
  require(std::isfinite(floor) && floor >= 0, "floor", "a finite number >= 0, got " + std::to_string(floor));
  const Index lines = (T + 1) * ring * std::max<Index>(B, 1);
  require(lines <= (Index{1} << 59) && D <= std::numeric_limits<Index>::max() / 16 / lines, "T, ring, B, D",
          "a size within the address space");
  const bool rows = A > 0 && B > 0, data = rows && D > 0;
  const std::size_t item = static_cast<std::size_t>(item_size(static_cast<Dtype>(dtype)));
  DraftSecantsProblem problem;
  problem.dtype = static_cast<Dtype>(dtype);
  problem.states = storage("states_ptr", states, item, data);
  problem.predictions = storage("predictions_ptr", predictions, item, data);
  problem.made = storage("made_ptr", made, item, data);
  problem.at = table<const std::int64_t>("at_ptr", at, A > 0);
  problem.lo = table<const std::int32_t>("lo_ptr", lo, B > 0);
  problem.hi = table<const std::int32_t>("hi_ptr", hi, B > 0);
  problem.z = storage("z_ptr", z, item, data);
  problem.rest = storage("rest_ptr", rest, item, data);
  problem.filled = table<std::int32_t>("filled_ptr", filled, rows);
  problem.weights = table<double>("weights_ptr", weights, rows && ring > 1);
  problem.steps = T;
  problem.anchors = A;
  problem.batch = B;
  problem.size = D;
  problem.ring = ring;
  problem.column = column;
  problem.ridge = ridge;
  problem.floor = floor;
  problem.threads = threads;
  draft_secants(problem);
}

void draft_scan_call(int dtype, Address states, Address predictions, Address said, Address made, Address turn,
                     Address shares, Address state_coef, Address model_coef, Address drift, Address slope,
                     bool slope_per_element, Address lo, Address hi, Address sq_diff, Address sq_norm, Address carry,
                     Address z, Address rest, Address weights, Index T, Index A, Index B, Index D, int L, int ring,
                     int column, Index number, Index previous, Index start, Index stop, bool charting, int threads) {
  DraftProblem problem;
  problem.scan = scan_problem(dtype, states, predictions, state_coef, model_coef, drift, lo, hi, sq_diff, sq_norm, T, B,
                              D, L, threads);
  require_range("ring", ring, 1, kMaxSecants + 1);
  require_range("column", column, 0, ring - 1);
  require_range("A", A, 1, std::max<Index>(T, 1));
  require_range("number", number, 0, A - 1);
  require_range("start", start, 0, std::max<Index>(T - 1, 0));
  require_range("stop", stop, start, T);
  require_range("previous", previous, -1, start);
  const Index lines = ring * A * std::max<Index>(B, 1);
  require(lines <= (Index{1} << 59) && D <= std::numeric_limits<Index>::max() / 16 / lines, "ring, A, B, D",
          "a size within the address space");
  const bool rows = T > 0 && B > 0, data = rows && D > 0;
  const std::size_t item = static_cast<std::size_t>(item_size(problem.scan.dtype));
  const std::size_t wide = problem.scan.dtype == Dtype::kFloat64 ? 8 : 4;
  problem.said = storage("said_ptr", said, item, false);
  problem.made = storage("made_ptr", made, item, data);
  problem.turn = storage("turn_ptr", turn, item, data);
  problem.shares = table<const double>("shares_ptr", shares, rows);
  problem.slope = storage("slope_ptr", slope, wide, data);
  problem.slope_per_element = slope_per_element;
  problem.carry = storage("carry_ptr", carry, wide, data);
  problem.z = storage("z_ptr", z, item, data);
  problem.rest = storage("rest_ptr", rest, item, data);
  problem.weights = table<const double>("weights_ptr", weights, rows && ring > 1);
  problem.anchors = A;
  problem.number = number;
  problem.previous = previous;
  problem.start = start;
  problem.stop = stop;
  problem.ring = ring;
  problem.column = column;
  problem.charting = charting;
  draft_scan(problem);
}

void judge_steps_call(Address sq_diff, Address sq_norm, Address previous, Address strict, Index T, Index B,
                      double freeze, double floor) {
  require_range("T", T, 0, Index{1} << 30);
  require_range("B", B, 0, Index{1} << 30);
  require(freeze >= 0, "freeze", "a number >= 0, got " + std::to_string(freeze));
  require(floor >= 0, "floor", "a number >= 0, got " + std::to_string(floor));
  const bool rows = T > 0 && B > 0;
  judge_steps({table<double>("sq_diff_ptr", sq_diff, rows), table<const double>("sq_norm_ptr", sq_norm, rows),
               table<double>("previous_ptr", previous, rows), table<const double>("strict_ptr", strict, rows), T, B,
               freeze, floor});
}

}  // namespace deqdiff
