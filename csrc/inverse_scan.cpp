#include "inverse_scan.h"

#include <algorithm>
#include <cmath>

#include "cholesky.h"
#include "inverse_rows.h"
#include "ops.h"
#include "parallel.h"

namespace deqdiff {
namespace {

// One sample's scan. Rows follow each other, so samples run in parallel and the rows of a sample do not.
class Scan {
 public:
  Scan(const InverseProblem& problem, std::int64_t b)
      : p_(problem),
        s_(problem.scan),
        b_(b),
        item_(item_size(s_.dtype)),
        wide_(s_.dtype == Dtype::kFloat64 ? 8 : 4),
        kernels_(inverse_kernels(s_.dtype)),
        rho_(scratch((s_.size * wide_ + 7) / 8)) {}

  void run() {
    for (std::int64_t i = s_.hi[b_] - 1; i >= s_.lo[b_]; --i) step(i);
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
  const void* entry(const RowTable& table, std::int64_t i) const {
    return static_cast<const char*>(table.data) + i * (table.per_element ? s_.size : 1) * wide_;
  }

  void step(std::int64_t i) {
    InverseRow row;
    describe(i, row);
    kernels_.measure(row);
    weights(row);
    row.damping = p_.damping;
    kernels_.step(row);
    const double limit = p_.reach * std::sqrt(std::max(row.x_norm, row.next_norm)), length = std::sqrt(row.step);
    if (!std::isfinite(length)) {
      std::copy_n(static_cast<const char*>(row.keep_state), s_.size * item_, static_cast<char*>(row.out));
    } else if (length > limit) {
      kernels_.shorten(row, limit / length);
    }
    s_.sq_diff[i * s_.batch + b_] = row.miss;
    std::int32_t& filled = p_.rings.filled[i % p_.rings.width * s_.batch + b_];
    filled = std::clamp<std::int32_t>(filled, 0, p_.rings.columns - 1) + 1;
  }

  void describe(std::int64_t i, InverseRow& row) const {
    row.lags = static_cast<int>(std::min<std::int64_t>(s_.lags, i + 1));
    for (int lag = 0; lag < row.lags; ++lag) {
      row.state_coef[lag] = s_.state_coef[i * s_.lags + lag];
      row.model_coef[lag] = s_.model_coef[i * s_.lags + lag];
      row.states[lag] = state(i - lag);
      row.predictions[lag] = prediction(i - lag);
    }
    row.drift = s_.drift == nullptr ? nullptr : at(s_.drift, i);
    row.next = state(i + 1);
    row.old_next = i + 1 < s_.hi[b_] ? ring(p_.rings.z, 0, i + 1) : row.next;
    row.slope = entry(p_.slope, i);
    row.weight = entry(p_.weight, i);
    row.slope_per_element = p_.slope.per_element;
    row.weight_per_element = p_.weight.per_element;
    row.count = std::clamp<int>(p_.rings.filled[i % p_.rings.width * s_.batch + b_], 0, p_.rings.columns - 1);
    for (int j = 0; j < row.count; ++j) {
      row.z[j] = ring(p_.rings.z, j + 1, i);
      row.e[j] = ring(p_.rings.e, j + 1, i);
    }
    row.rho = rho_;
    row.out = state(i);
    row.keep_state = ring(p_.rings.z, 0, i);
    row.keep_prediction = ring(p_.rings.e, 0, i);
    row.size = s_.size;
  }

  // gamma: least squares of rho on the kept columns, normalised. Left out: rounding, and slopes from far away.
  void weights(InverseRow& row) const {
    int kept[kMaxSecants], count = 0;
    double scale[kMaxSecants], lower[kMaxSecants][kMaxSecants], right[kMaxSecants];
    const double least = p_.floor * std::sqrt(row.reached_norm), most = p_.stale * std::sqrt(row.rho_norm);
    for (int j = 0; j < row.count; ++j) {
      row.gamma[j] = 0;
      const double norm = std::sqrt(row.gram[j][j]);
      if (norm > least && norm <= most) {
        scale[count] = 1 / norm;
        kept[count++] = j;
      }
    }
    for (int r = 0; r < count; ++r) {
      for (int c = 0; c <= r; ++c) lower[r][c] = row.gram[kept[r]][kept[c]] * scale[r] * scale[c];
      lower[r][r] += p_.ridge;
      right[r] = row.with_rho[kept[r]] * scale[r];
    }
    if (!cholesky_solve(lower, right, count)) return;
    for (int r = 0; r < count; ++r) row.gamma[kept[r]] = right[r] * scale[r];
  }

  const InverseProblem& p_;
  const ScanProblem& s_;
  std::int64_t b_, item_, wide_;
  const InverseKernels& kernels_;
  double* rho_;
};

}  // namespace

void inverse_scan(const InverseProblem& problem) {
  const RowIndex index(problem.scan, problem.rings.width);
  const int parts = useful_threads(index.rows() * problem.scan.size, problem.scan.threads);
  parallel_for(problem.scan.batch, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) Scan(problem, b).run();
  });
}

void inverse_scan_call(Arguments& a) {
  InverseProblem p;
  p.scan = read_scan(a, "sq_miss", "sq_miss");
  p.slope = read_table(a, p.scan, "slope");
  p.weight = read_table(a, p.scan, "weight");
  p.rings = read_rings(a, p.scan, 1);
  p.damping = a.number("damping", true, true);
  p.ridge = a.number("ridge", true, true);
  p.stale = a.number("stale", true, true);
  p.floor = a.number("floor", false, true);
  p.reach = a.number("reach", true, true);
  a.finish();
  inverse_scan(p);
}

}  // namespace deqdiff
