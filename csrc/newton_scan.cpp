#include "newton_scan.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cholesky.h"
#include "newton_rows.h"
#include "ops.h"
#include "parallel.h"

namespace deqdiff {
namespace {

// One sample's scan. Rows follow each other, so samples run in parallel and the rows of a sample do not.
class Scan {
 public:
  Scan(const NewtonProblem& problem, std::int64_t b)
      : p_(problem),
        s_(problem.scan),
        b_(b),
        item_(item_size(s_.dtype)),
        wide_(s_.dtype == Dtype::kFloat64 ? 8 : 4),
        kernels_(newton_kernels(s_.dtype)),
        rows_(s_.lags + 1) {
    const std::int64_t count = 2 * rows_ + 1;
    scratch_ = reinterpret_cast<char*>(scratch((count * s_.size * wide_ + 7) / 8));
  }

  void run() {
    for (std::int64_t back = 0; back < s_.lags && back <= s_.lo[b_]; ++back) {
      const std::int64_t i = s_.lo[b_] - back;
      kernels_.widen(state(i), plain(i), s_.size);
      if (i > 0 && back + 1 < s_.lags) kernels_.widen(prediction(i - 1), e_hat(i - 1), s_.size);
    }
    if (p_.rings.z != nullptr && s_.lo[b_] < s_.hi[b_]) copy(state(s_.lo[b_]), ring(p_.rings.z, 0, s_.lo[b_]));
    for (std::int64_t i = s_.lo[b_]; i < s_.hi[b_]; ++i) step(i);
  }

 private:
  char* at(const void* base, std::int64_t row) const {
    return const_cast<char*>(static_cast<const char*>(base)) + (row * s_.batch + b_) * s_.size * item_;
  }
  char* state(std::int64_t i) const { return at(s_.states, i); }
  char* prediction(std::int64_t i) const { return at(s_.predictions, i); }
  char* ring(const void* base, int back, std::int64_t i) const {
    return at(base,
              ((p_.rings.column - back + p_.rings.columns) % p_.rings.columns) * p_.rings.width + i % p_.rings.width);
  }
  char* plain(std::int64_t i) const { return scratch_ + (i % rows_) * s_.size * wide_; }
  char* e_hat(std::int64_t i) const { return scratch_ + (rows_ + i % rows_) * s_.size * wide_; }
  void copy(const char* from, char* to) const { std::copy(from, from + s_.size * item_, to); }

  void step(std::int64_t i) {
    NewtonRow row;
    row.count = p_.rings.z == nullptr ? 0 : secant_weights(i, row.gamma, row.z, row.e);
    row.x = p_.rings.z == nullptr ? nullptr : ring(p_.rings.z, 0, i);
    row.prediction = prediction(i);
    row.slope = static_cast<const char*>(p_.slope.data) + i * (p_.slope.per_element ? s_.size : 1) * wide_;
    row.slope_per_element = p_.slope.per_element;
    row.drift = s_.drift == nullptr ? nullptr : at(s_.drift, i);
    row.lags = static_cast<int>(std::min<std::int64_t>(s_.lags, i + 1));
    for (int lag = 0; lag < row.lags; ++lag) {
      row.state_coef[lag] = s_.state_coef[i * s_.lags + lag];
      row.model_coef[lag] = s_.model_coef[i * s_.lags + lag];
      row.now[lag] = state(i - lag);
      row.plain[lag] = plain(i - lag);
      row.predictions[lag] = prediction(i - lag);
      row.e_hat[lag] = e_hat(i - lag);
    }
    if (s_.lags == 1) row.e_hat[0] = nullptr;
    row.old_next = row.next = state(i + 1);
    row.plain_next = plain(i + 1);
    row.keep_prediction = p_.rings.z == nullptr ? nullptr : ring(p_.rings.e, 0, i);
    row.keep_next = p_.rings.z == nullptr || i + 1 >= s_.hi[b_] ? nullptr : ring(p_.rings.z, 0, i + 1);
    row.size = s_.size;
    kernels_.newton(row);
    s_.sq_diff[i * s_.batch + b_] = row.step > row.residual || std::isnan(row.step) ? row.step : row.residual;
    s_.sq_norm[i * s_.batch + b_] = row.norm;
    if (p_.rings.z != nullptr) {
      std::int32_t& filled = p_.rings.filled[i % p_.rings.width * s_.batch + b_];
      filled = std::clamp<std::int32_t>(filled, 0, p_.rings.columns - 1) + 1;
    }
  }

  // gamma: least squares of dx on the kept steps, on normalised columns. Steps of rounding size are left out.
  int secant_weights(std::int64_t i, double* gamma, const void** z, const void** e) const {
    SecantRow row;
    row.count = std::clamp<int>(p_.rings.filled[i % p_.rings.width * s_.batch + b_], 0, p_.rings.columns - 1);
    if (row.count == 0) return 0;
    for (int j = 0; j < row.count; ++j) {
      row.z[j] = z[j] = ring(p_.rings.z, j + 1, i);
      e[j] = ring(p_.rings.e, j + 1, i);
    }
    row.x = ring(p_.rings.z, 0, i);
    row.now = state(i);
    row.size = s_.size;
    kernels_.secants(row);
    int kept[kMaxSecants], count = 0;
    double scale[kMaxSecants];
    for (int j = 0; j < row.count; ++j) {
      gamma[j] = 0;
      const double norm = std::sqrt(row.gram[j][j]);
      if (norm > p_.floor * std::sqrt(row.norm)) {
        scale[count] = 1 / norm;
        kept[count++] = j;
      }
    }
    double lower[kMaxSecants][kMaxSecants], right[kMaxSecants];
    for (int r = 0; r < count; ++r) {
      for (int c = 0; c <= r; ++c) lower[r][c] = row.gram[kept[r]][kept[c]] * scale[r] * scale[c];
      lower[r][r] += p_.ridge;
      right[r] = row.with_dx[kept[r]] * scale[r];
    }
    if (!cholesky_solve(lower, right, count)) return 0;
    for (int r = 0; r < count; ++r) gamma[kept[r]] = right[r] * scale[r];
    return row.count;
  }

  const NewtonProblem& p_;
  const ScanProblem& s_;
  std::int64_t b_, item_, wide_;
  const NewtonKernels& kernels_;
  std::int64_t rows_;
  char* scratch_;
};

}  // namespace

void newton_scan(const NewtonProblem& problem) {
  const RowIndex index(problem.scan, problem.rings.z == nullptr ? problem.scan.steps : problem.rings.width);
  const int parts = useful_threads(index.rows() * problem.scan.size, problem.scan.threads);
  parallel_for(problem.scan.batch, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) Scan(problem, b).run();
  });
}

void newton_scan_call(Arguments& a) {
  NewtonProblem p;
  p.scan = read_scan(a);
  p.slope = read_table(a, p.scan, "slope");
  p.rings = read_rings(a, p.scan, 0);
  p.ridge = a.number("ridge", true, true);
  p.floor = a.number("floor", false, true);
  a.finish();
  newton_scan(p);
}

}  // namespace deqdiff
