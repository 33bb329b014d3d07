#include "draft_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "draft_rows.h"
#include "newton_rows.h"
#include "ops.h"
#include "parallel.h"

namespace deqdiff {
namespace {

constexpr std::int64_t kStrip = 4096;  // elements that one thread takes through the rows of a segment

// Elements [from, from + size) of one sample.
class Strip {
 public:
  Strip(const DraftProblem& problem, std::int64_t b, std::int64_t strip)
      : p_(problem),
        s_(problem.scan),
        b_(b),
        from_(strip * kStrip),
        size_(std::min(kStrip, s_.size - strip * kStrip)),
        item_(item_size(s_.dtype)),
        wide_(s_.dtype == Dtype::kFloat64 ? 8 : 4),
        low_(s_.lo[b]),
        first_(std::max<std::int64_t>(p_.start, s_.lo[b])),
        last_(std::min<std::int64_t>(p_.stop, s_.hi[b])),
        active_(s_.lo[b] <= p_.start && p_.start < s_.hi[b]) {}

  // found[j] = (z[j] - z[column]).(N - X), zero for columns that have no weight.
  void dots(double* found) const {
    const int secants = p_.ring - 1;
    SecantRow row;
    int used[kMaxSecants];
    row.count = 0;
    for (int j = 0; j < secants && !p_.rollout && active_ && p_.start > low_; ++j) {
      if (secant_weights()[j * secants + j] == 0) continue;
      used[row.count] = j;
      row.z[row.count++] = ring(p_.z, j + 1);
    }
    std::fill(found, found + secants, 0.0);
    if (row.count == 0) return;
    row.x = ring(p_.z, 0);
    row.now = at(s_.states, p_.start);
    row.size = size_;
    newton_kernels(s_.dtype).secants(row);
    for (int k = 0; k < row.count; ++k) found[used[k]] = row.with_dx[k];
  }

  // dots: the sums over all strips. sums: three for every row of the segment.
  void run(const double* dots, double* sums) const {
    anchor(dots);
    const bool before = p_.previous_start >= (p_.rollout ? 0 : low_);
    widen();
    const char* x = p_.rollout ? nullptr : p_.start > low_ ? ring(p_.z, 0) : at(s_.states, first_);
    for (std::int64_t i = first_; i < last_; ++i, sums += 3) {
      NewtonRow row;
      row.x = x;
      row.prediction = p_.rollout ? nullptr : at(s_.predictions, i);
      row.slope = slope(i);
      row.slope_per_element = p_.slope.per_element;
      row.count = 0;
      for (int k = before ? 0 : 1; k < 2; ++k) {
        row.correction[row.corrections] = at(p_.correction, (p_.anchor + 1 + k) % 2);
        row.share[row.corrections++] = p_.weights[2 * i + k];
      }
      row.drift = s_.drift == nullptr ? nullptr : at(s_.drift, i);
      row.lags = static_cast<int>(std::min<std::int64_t>(s_.lags, i + 1));
      for (int lag = 0; lag < row.lags; ++lag) {
        row.state_coef[lag] = s_.state_coef[i * s_.lags + lag];
        row.model_coef[lag] = s_.model_coef[i * s_.lags + lag];
        row.now[lag] = at(s_.states, i - lag);
        row.plain[lag] = carried(0, i - lag);
        row.predictions[lag] = at(s_.predictions, i - lag);
        row.e_hat[lag] = carried(1, i - lag);
      }
      if (s_.lags == 1) row.e_hat[0] = nullptr;
      row.old_next = row.next = at(s_.states, i + 1);
      row.plain_next = carried(0, i + 1);
      row.keep_prediction = nullptr;
      row.keep_next = p_.rollout ? nullptr : old_ + (i + 1) % 2 * size_ * item_;
      row.size = size_;
      newton_kernels(s_.dtype).newton(row);
      sums[0] = row.step;
      sums[1] = row.residual;
      sums[2] = row.norm;
      x = static_cast<const char*>(row.keep_next);
    }
  }

  // Two rows of `size` elements: the states that this scan has replaced.
  void use(double* memory) { old_ = reinterpret_cast<char*>(memory); }

 private:
  char* at(const void* base, std::int64_t row) const {
    return const_cast<char*>(static_cast<const char*>(base)) + ((row * s_.batch + b_) * s_.size + from_) * item_;
  }
  char* ring(const void* base, int back) const {
    return at(base, (p_.column - back + p_.ring) % p_.ring * p_.anchors + p_.anchor);
  }
  char* carried(int which, std::int64_t i) const {
    const std::int64_t row = which * s_.lags + i % s_.lags;
    return static_cast<char*>(p_.carry) + ((row * s_.batch + b_) * s_.size + from_) * wide_;
  }
  const char* slope(std::int64_t i) const {
    return static_cast<const char*>(p_.slope.data) + (p_.slope.per_element ? i * s_.size + from_ : i) * wide_;
  }
  const double* secant_weights() const {
    const int secants = p_.ring - 1;
    return p_.secant_weights + (p_.anchor * s_.batch + b_) * secants * secants;
  }

  void anchor(const double* dots) const {
    char* correction = at(p_.correction, p_.anchor % 2);
    if (!active_) {
      if (p_.rollout && p_.start < low_) {
        draft_kernels(s_.dtype).subtract(at(s_.predictions, p_.start), at(s_.states, p_.start), slope(p_.start),
                                         p_.slope.per_element, correction, size_);
      } else {
        std::memset(correction, 0, size_ * item_);
      }
      return;
    }
    CorrectionRow row;
    row.draft_output = at(p_.draft_output, 0);
    row.now = at(s_.states, p_.start);
    row.x = p_.rollout ? nullptr : ring(p_.z, 0);
    row.draft_cache = at(p_.draft_cache, p_.anchor);
    row.own_remainder = ring(p_.remainder, 0);
    row.slope = slope(p_.start);
    row.slope_per_element = p_.slope.per_element;
    row.correction = correction;
    row.size = size_;
    row.count = 0;
    const int secants = p_.ring - 1;
    for (int j = 0; j < secants && dots != nullptr; ++j) {
      if (secant_weights()[j * secants + j] == 0) continue;
      double gamma = 0;
      for (int k = 0; k < secants; ++k) gamma += secant_weights()[j * secants + k] * dots[k];
      if (!std::isfinite(gamma)) continue;
      row.gamma[row.count] = gamma;
      row.remainder[row.count++] = ring(p_.remainder, j + 1);
    }
    draft_kernels(s_.dtype).correct(row);
    if (!p_.rollout && p_.start == low_)
      std::memset(correction, 0, size_ * item_);  // the model's own prediction stands
  }

  // What earlier rows left as it was, to where the recursion looks for it.
  void widen() const {
    for (std::int64_t i = first_; i >= 0 && i > first_ - s_.lags && first_ < last_; --i) {
      if (i <= low_) newton_kernels(s_.dtype).widen(at(s_.states, i), carried(0, i), size_);
      if (i < low_) newton_kernels(s_.dtype).widen(at(s_.predictions, i), carried(1, i), size_);
    }
  }

  const DraftProblem& p_;
  const ScanProblem& s_;
  std::int64_t b_, from_, size_, item_, wide_, low_, first_, last_;
  bool active_;
  char* old_ = nullptr;
};

}  // namespace

void draft_scan(const DraftProblem& p) {
  const ScanProblem& s = p.scan;
  const RowIndex index(s, s.steps);  // checks the windows
  for (std::int64_t b = 0; b < s.batch && p.draft_output == nullptr; ++b) {
    if (s.lo[b] <= p.start && p.start < s.hi[b]) {
      throw std::invalid_argument("draft_output: expected the draft's output, for sample " + std::to_string(b) +
                                  " is active in row " + std::to_string(p.start));
    }
  }
  const std::int64_t strips = (s.size + kStrip - 1) / kStrip, jobs = s.batch * strips, rows = p.stop - p.start;
  const int secants = p.ring - 1, parts = useful_threads(rows * s.batch * s.size, s.threads);
  double* dots = scratch(jobs * (secants + 3 * rows + 2 * kStrip) + s.batch * secants);
  double* sums = dots + jobs * secants;
  double* old = sums + jobs * 3 * rows;
  double* total = old + jobs * 2 * kStrip;
  bool fitted = false;
  if (secants > 0 && !p.rollout) {
    parallel_for(jobs, parts, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) Strip(p, k / strips, k % strips).dots(dots + k * secants);
    });
    fitted = true;
    std::fill(total, total + s.batch * secants, 0.0);
    for (std::int64_t k = 0; k < jobs * secants; ++k) total[k / secants / strips * secants + k % secants] += dots[k];
  }
  parallel_for(jobs, parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      Strip strip(p, k / strips, k % strips);
      strip.use(old + k * 2 * kStrip);
      strip.run(fitted ? total + k / strips * secants : nullptr, sums + k * 3 * rows);
    }
  });
  for (std::int64_t b = 0; b < s.batch && !p.rollout; ++b) {
    const std::int64_t first = std::max<std::int64_t>(p.start, s.lo[b]);
    for (std::int64_t i = first; i < std::min<std::int64_t>(p.stop, s.hi[b]); ++i) {
      double found[3] = {0, 0, 0};
      for (std::int64_t k = 0; k < strips; ++k) {
        for (int n = 0; n < 3; ++n) found[n] += sums[(b * strips + k) * 3 * rows + (i - first) * 3 + n];
      }
      s.sq_diff[i * s.batch + b] = found[0] > found[1] || std::isnan(found[0]) ? found[0] : found[1];
      s.sq_norm[i * s.batch + b] = found[2];
    }
  }
}

void draft_scan_call(Arguments& a) {
  DraftProblem p;
  p.scan = read_scan(a);
  const std::int64_t steps = p.scan.steps;
  p.slope = read_table(a, p.scan, "slope");
  p.anchors = a.integer("A", 1, std::max<std::int64_t>(steps, 1));
  p.ring = static_cast<int>(a.integer("ring", 1, kMaxSecants + 1));
  require_addressable("ring, A, B, D", {p.ring, p.anchors, p.scan.batch, p.scan.size});
  const bool data = has_data(p.scan);
  const auto item = static_cast<std::size_t>(item_size(p.scan.dtype));
  p.draft_output = a.address("draft_output", item, false);
  p.draft_cache = a.address("draft_cache", item, data);
  p.correction = a.address("correction", item, data);
  p.weights = a.table<const double>("weights", has_rows(p.scan));
  p.carry = a.address("carry", wide_size(p.scan.dtype), data);
  p.z = a.address("z", item, data);
  p.remainder = a.address("remainder", item, data);
  p.secant_weights = a.table<const double>("secant_weights", has_rows(p.scan) && p.ring > 1);
  p.column = static_cast<int>(a.integer("column", 0, p.ring - 1));
  p.anchor = a.integer("anchor", 0, p.anchors - 1);
  p.start = a.integer("start", 0, std::max<std::int64_t>(steps - 1, 0));
  p.stop = a.integer("stop", p.start + 1, steps);
  p.previous_start = a.integer("previous_start", -1, p.start - 1);
  p.rollout = a.flag("rollout");
  a.ignore("last");
  a.finish();
  draft_scan(p);
}

}  // namespace deqdiff
