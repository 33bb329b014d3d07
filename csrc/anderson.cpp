#include "anderson.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace deqdiff {
namespace {

// Solves matrix x = right by elimination with partial pivoting, in place. False when a pivot is zero or not a number.
bool eliminate(double (*matrix)[kMaxHistory], double* right, int n) {
  for (int k = 0; k < n; ++k) {
    int pivot = k;
    for (int r = k + 1; r < n; ++r) {
      if (std::fabs(matrix[r][k]) > std::fabs(matrix[pivot][k])) pivot = r;
    }
    if (!(std::fabs(matrix[pivot][k]) > 0)) return false;
    if (pivot != k) {
      std::swap_ranges(matrix[k], matrix[k] + n, matrix[pivot]);
      std::swap(right[k], right[pivot]);
    }
    for (int r = k + 1; r < n; ++r) {
      const double factor = matrix[r][k] / matrix[k][k];
      for (int c = k + 1; c < n; ++c) matrix[r][c] -= factor * matrix[k][c];
      right[r] -= factor * right[k];
    }
  }
  for (int k = n - 1; k >= 0; --k) {
    for (int c = k + 1; c < n; ++c) right[k] -= matrix[k][c] * right[c];
    right[k] /= matrix[k][k];
  }
  return true;
}

class Round {
 public:
  explicit Round(const AndersonProblem& problem)
      : p_(problem),
        s_(problem.scan),
        index_(problem.scan, problem.width),
        blocks_(block_count(problem.scan.size)),
        sums_(2 + problem.history),
        square_(problem.history * problem.history) {
    const std::int64_t rows = index_.rows();
    const bool shared = p_.scope != Scope::kTimestep;
    double* memory = scratch(rows * (blocks_ * sums_ + p_.history + (shared ? square_ + 1 : 0)));
    partial_ = memory;
    alpha_ = partial_ + rows * blocks_ * sums_;
    shared_gram_ = alpha_ + rows * p_.history;
    shared_count_ = shared_gram_ + rows * square_;
  }

  void run() {
    HistoryView view{p_.f, p_.g, p_.filled, p_.history, p_.width, p_.column};
    scan_rows(s_, view, index_, partial_, sums_);
    const int parts = useful_threads(index_.rows() * 1024, s_.threads);
    for_rows(parts, [this](std::int64_t row, std::int64_t b, std::int64_t i) {
      finish_row(row, b, i);
      if (p_.scope == Scope::kTimestep) solve_row(row, b, i, gram(i, b), filled(i, b));
    });
    if (p_.scope != Scope::kTimestep) {
      for (std::int64_t b = 0; b < s_.batch; ++b) accumulate(b);
      for_rows(parts, [this](std::int64_t row, std::int64_t b, std::int64_t i) {
        const std::int64_t from = p_.scope == Scope::kTrajectory ? index_.row(b, s_.hi[b] - 1) : row;
        solve_row(row, b, i, shared_gram_ + from * square_, static_cast<int>(shared_count_[from]));
      });
    }
    mix();
  }

 private:
  std::int64_t slot(std::int64_t i, std::int64_t b) const { return i % p_.width * s_.batch + b; }
  double* gram(std::int64_t i, std::int64_t b) const { return p_.gram + slot(i, b) * square_; }
  std::int32_t& filled(std::int64_t i, std::int64_t b) const { return p_.filled[slot(i, b)]; }
  int column(int back) const { return (p_.column - back + p_.history) % p_.history; }

  template <class F>
  void for_rows(int parts, const F& visit) {
    parallel_for(index_.rows(), parts, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t b = index_.sample(row);
        visit(row, b, index_.step(row, b));
      }
    });
  }

  // Adds the partial sums in block order and writes the residual, the new Gram row and column, and the column count.
  void finish_row(std::int64_t row, std::int64_t b, std::int64_t i) {
    double total[2 + kMaxHistory] = {};
    const int older = std::clamp<int>(filled(i, b), 0, p_.history - 1), used = 3 + older;
    const double* group = partial_ + row * blocks_ * sums_;
    for (std::int64_t block = 0; block < blocks_; ++block, group += sums_) {
      for (int k = 0; k < used; ++k) total[k] += group[k];
    }
    s_.sq_diff[i * s_.batch + b] = total[0];
    s_.sq_norm[i * s_.batch + b] = total[1];
    double* matrix = gram(i, b);
    for (int back = 0; back <= older; ++back) {
      matrix[p_.column * p_.history + column(back)] = total[2 + back];
      matrix[column(back) * p_.history + p_.column] = total[2 + back];
    }
    filled(i, b) = older + 1;
  }

  // Running sums of the Gram blocks from the first active row on, and the columns that all rows so far have.
  void accumulate(std::int64_t b) {
    for (std::int64_t i = s_.lo[b]; i < s_.hi[b]; ++i) {
      const std::int64_t row = index_.row(b, i);
      double* total = shared_gram_ + row * square_;
      const double* own = gram(i, b);
      const bool first = i == s_.lo[b];
      for (int k = 0; k < square_; ++k) total[k] = own[k] + (first ? 0.0 : total[k - square_]);
      shared_count_[row] = first ? filled(i, b) : std::min<double>(shared_count_[row - 1], filled(i, b));
    }
  }

  void solve_row(std::int64_t row, std::int64_t b, std::int64_t i, const double* matrix, int n) {
    double* alpha = alpha_ + row * p_.history;  // indexed by age: alpha[0] is the newest column
    std::fill(alpha, alpha + p_.history, 0.0);
    alpha[0] = 1.0;
    if (i == s_.lo[b] || n <= 1) return;  // the first row's plain step is exact: it follows the known states
    double ordered[kMaxHistory][kMaxHistory], solved[kMaxHistory];
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c < n; ++c) ordered[r][c] = matrix[column(n - 1 - r) * p_.history + column(n - 1 - c)];
    }
    solve_alpha(&ordered[0][0], n, kMaxHistory, p_.ridge, p_.relative_ridge, p_.stale, solved);
    for (int k = 0; k < n; ++k) alpha[k] = solved[n - 1 - k];
  }

  void mix() {
    const int parts = useful_threads(index_.rows() * s_.size, s_.threads);
    parallel_for(index_.rows() * blocks_, parts, [this](std::int64_t begin, std::int64_t end) {
      while (begin < end) {
        const std::int64_t row = begin / blocks_, block = begin % blocks_;
        const std::int64_t count = std::min(end - begin, blocks_ - block);
        mix_strip(row, block * kBlock, std::min(s_.size, (block + count) * kBlock));
        begin += count;
      }
    });
  }

  void mix_strip(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    const std::int64_t b = index_.sample(row), i = index_.step(row, b), item = item_size(s_.dtype);
    const double* alpha = alpha_ + row * p_.history;
    const double undamped = i == s_.lo[b] ? 0.0 : 1.0 - p_.damping;
    const auto ring = [&](const void* base, int back) {
      const std::int64_t line = (column(back) * p_.width + i % p_.width) * s_.batch + b;
      return static_cast<const char*>(base) + (line * s_.size + begin) * item;
    };
    MixRow mix;
    mix.f_count = mix.g_count = 0;
    mix.newest = ring(p_.f, 0);
    mix.out = static_cast<char*>(s_.states) + (((i + 1) * s_.batch + b) * s_.size + begin) * item;
    mix.size = end - begin;
    for (int back = 0; back < p_.history; ++back) {
      if (alpha[back] == 0) continue;
      if (back > 0) {
        mix.f[mix.f_count] = ring(p_.f, back);
        mix.weight[mix.f_count++] = alpha[back];
      }
      if (undamped != 0) {
        mix.g[mix.g_count] = ring(p_.g, back);
        mix.g_weight[mix.g_count++] = -undamped * alpha[back];
      }
    }
    row_kernels(s_.dtype).mix(mix);
  }

  const AndersonProblem& p_;
  const ScanProblem& s_;
  RowIndex index_;
  std::int64_t blocks_;
  int sums_;
  int square_;
  double* partial_;
  double* alpha_;
  double* shared_gram_;
  double* shared_count_;
};

}  // namespace

void solve_alpha(const double* gram, int n, int stride, double ridge, bool relative, double stale, double* alpha) {
  const double newest = gram[(n - 1) * stride + n - 1];
  const auto fall_back = [&] {
    std::fill(alpha, alpha + n, 0.0);
    alpha[n - 1] = 1.0;
  };
  int kept[kMaxHistory], count = 0;
  for (int k = 0; k < n; ++k) {
    if (k == n - 1 || gram[k * stride + k] <= stale * newest) kept[count++] = k;
  }
  if (!(newest > 0)) return fall_back();
  double system[kMaxHistory][kMaxHistory], solution[kMaxHistory];
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < count; ++c) system[r][c] = gram[kept[r] * stride + kept[c]];
    system[r][r] += ridge * (relative ? system[r][r] : 1.0);
    solution[r] = 1.0;
  }
  if (!eliminate(system, solution, count)) return fall_back();
  double total = 0;
  bool finite = true;
  for (int r = 0; r < count; ++r) total += solution[r];
  for (int r = 0; r < count; ++r) {
    solution[r] /= total;
    finite = finite && std::isfinite(solution[r]);
  }
  if (!finite) return fall_back();
  std::fill(alpha, alpha + n, 0.0);
  for (int r = 0; r < count; ++r) alpha[kept[r]] = solution[r];
}

void anderson_step(const AndersonProblem& problem) { Round(problem).run(); }

}  // namespace deqdiff
