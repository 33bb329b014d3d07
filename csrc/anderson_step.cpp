#include "anderson_step.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "ridge_solve.h"

namespace deqdiff {
namespace {

// A round walks through time in chunks: scan a chunk, solve its weights, mix it while its new F and X are still in the
// second-level cache. Threads own blocks of D; the last thread to finish a chunk of a sample solves for that chunk.
constexpr std::int64_t kChunkBytes = 512 << 10;

class Round {
 public:
  explicit Round(const AndersonProblem& problem)
      : p_(problem),
        s_(problem.scan),
        index_(problem.scan, problem.width),
        blocks_(block_count(problem.scan.size)),
        square_(problem.history * problem.history),
        memory_(reserve()),
        scan_(s_, {p_.f, p_.g, p_.filled, p_.history, p_.width, p_.column}, index_, memory_.partial, 2 + p_.history) {}

  void run();

 private:
  struct Memory {
    double* partial;      // (rows, blocks, 2 + M)
    double* alpha;        // (rows, M) by age: alpha[0] belongs to the newest column
    double* shared_gram;  // (rows, M, M) running sums, unless the scope is the timestep
    double* shared_fill;  // (rows,) columns that all rows up to this one have
  };
  struct Gate {
    std::atomic<int> arrived{0};  // threads that have scanned this chunk of this sample
    std::atomic<bool> solved{false};
  };

  Memory reserve() const;
  std::int64_t chunk_rows(int parts) const;
  void share(int part, int parts);
  void walk(const BlockRange* pieces, int count, int parts);
  void solve_chunk(std::int64_t b, std::int64_t from, std::int64_t to);
  void finish_row(std::int64_t b, std::int64_t i);
  void accumulate(std::int64_t b, std::int64_t i);
  void solve_row(std::int64_t b, std::int64_t i, const double* matrix, int n);
  void mix(const BlockRange& piece, std::int64_t from, std::int64_t to) const;

  std::int64_t slot(std::int64_t b, std::int64_t i) const { return i % p_.width * s_.batch + b; }
  double* gram(std::int64_t b, std::int64_t i) const { return p_.gram + slot(b, i) * square_; }
  std::int32_t& filled(std::int64_t b, std::int64_t i) const { return p_.filled[slot(b, i)]; }
  int column(int age) const { return (p_.column - age + p_.history) % p_.history; }
  std::int64_t chunks(std::int64_t b) const { return (index_.count(b) + chunk_ - 1) / chunk_; }
  std::int64_t start(std::int64_t b, std::int64_t chunk) const {
    return s_.lo[b] + std::min(chunk * chunk_, index_.count(b));
  }
  // Threads that own blocks of sample b. Every part owns at least one block (run() sees to it), so none is skipped.
  int sharers(std::int64_t b, int parts) const {
    const auto owner = [&](std::int64_t unit) { return ((unit + 1) * parts - 1) / (s_.batch * blocks_); };
    return static_cast<int>(owner((b + 1) * blocks_ - 1) - owner(b * blocks_)) + 1;
  }

  const AndersonProblem& p_;
  const ScanProblem& s_;
  RowIndex index_;
  std::int64_t blocks_;
  int square_;
  Memory memory_;
  DdimScan scan_;
  std::int64_t chunk_ = 1;  // rows
  std::vector<std::int64_t> first_gate_;
  std::unique_ptr<Gate[]> gates_;
};

Round::Memory Round::reserve() const {
  const std::int64_t rows = index_.rows(), sums = rows * blocks_ * (2 + p_.history);
  const std::int64_t shared = p_.scope == Scope::kTimestep ? 0 : rows;
  double* partial = scratch(sums + rows * p_.history + shared * (square_ + 1));
  double* alpha = partial + sums;
  double* shared_gram = alpha + rows * p_.history;
  return {partial, alpha, shared_gram, shared_gram + shared * square_};
}

std::int64_t Round::chunk_rows(int parts) const {
  if (p_.scope == Scope::kTrajectory) return std::max<std::int64_t>(index_.rows(), 1);
  const std::int64_t elements = std::min(s_.size, s_.batch * s_.size / parts);
  const std::int64_t row_bytes = (2 * p_.history + 4) * std::max<std::int64_t>(elements, 1) * item_size(s_.dtype);
  return std::max<std::int64_t>(kChunkBytes / row_bytes, 1);
}

void Round::run() {
  if (blocks_ == 0) {
    for (std::int64_t b = 0; b < s_.batch; ++b) solve_chunk(b, s_.lo[b], s_.lo[b] + index_.count(b));
    return;
  }
  const std::int64_t units = s_.batch * blocks_;
  const int parts =
      static_cast<int>(std::min<std::int64_t>(useful_threads(index_.rows() * s_.size, s_.threads), units));
  chunk_ = chunk_rows(std::max(parts, 1));
  first_gate_.assign(1, 0);
  for (std::int64_t b = 0; b < s_.batch; ++b) first_gate_.push_back(first_gate_.back() + chunks(b));
  gates_ = std::make_unique<Gate[]>(first_gate_.back());
  team(parts, [this](int part, int of) { share(part, of); });
}

// One thread's part. Samples shared with other threads come first, in step with them; then its own, one by one.
void Round::share(int part, int parts) {
  const Range range(s_.batch * blocks_, part, parts);
  if (range.begin == range.end) return;
  const std::int64_t first = range.begin / blocks_, last = (range.end - 1) / blocks_;
  BlockRange shared[2];
  int count = 0;
  if (sharers(first, parts) > 1) shared[count++] = blocks_of(range, blocks_, first);
  if (last != first && sharers(last, parts) > 1) shared[count++] = blocks_of(range, blocks_, last);
  walk(shared, count, parts);
  for (std::int64_t b = first; b <= last; ++b) {
    if (sharers(b, parts) > 1) continue;
    const BlockRange own = blocks_of(range, blocks_, b);
    walk(&own, 1, parts);
  }
}

// Scans chunk by chunk and mixes behind. Where other threads are involved the mixing keeps one chunk of distance, so
// that it seldom has to wait for their sums.
void Round::walk(const BlockRange* pieces, int count, int parts) {
  std::int64_t end = 0, lag = 0;
  for (int k = 0; k < count; ++k) {
    end = std::max(end, chunks(pieces[k].b));
    if (sharers(pieces[k].b, parts) > 1) lag = 1;
  }
  for (std::int64_t chunk = 0; chunk < end + lag; ++chunk) {
    for (int k = 0; k < count; ++k) {
      const std::int64_t b = pieces[k].b;
      if (chunk >= chunks(b)) continue;
      scan_.run(pieces[k], start(b, chunk), start(b, chunk + 1));
      Gate& gate = gates_[first_gate_[b] + chunk];
      if (gate.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == sharers(b, parts)) {
        solve_chunk(b, start(b, chunk), start(b, chunk + 1));
        gate.solved.store(true, std::memory_order_release);
      }
    }
    const std::int64_t behind = chunk - lag;
    for (int k = 0; k < count && behind >= 0; ++k) {
      const std::int64_t b = pieces[k].b;
      if (behind >= chunks(b)) continue;
      const Gate& gate = gates_[first_gate_[b] + behind];
      wait_until([&gate] { return gate.solved.load(std::memory_order_acquire); });
      mix(pieces[k], start(b, behind), start(b, behind + 1));
    }
  }
}

// The chunks of a sample are solved in order: whoever solves one has arrived at it after the one before was solved.
void Round::solve_chunk(std::int64_t b, std::int64_t from, std::int64_t to) {
  for (std::int64_t i = from; i < to; ++i) {
    finish_row(b, i);
    if (p_.scope == Scope::kTimestep) {
      solve_row(b, i, gram(b, i), filled(b, i));
      continue;
    }
    accumulate(b, i);
    const std::int64_t row = index_.row(b, i);
    if (p_.scope == Scope::kTriangular || i + 1 == to) {
      solve_row(b, i, memory_.shared_gram + row * square_, static_cast<int>(memory_.shared_fill[row]));
    }
  }
  if (p_.scope != Scope::kTrajectory) return;
  for (std::int64_t i = from; i + 1 < to; ++i) {
    const double* common = memory_.alpha + index_.row(b, to - 1) * p_.history;
    double* alpha = memory_.alpha + index_.row(b, i) * p_.history;
    if (i == s_.lo[b])
      solve_row(b, i, nullptr, 0);
    else
      std::copy(common, common + p_.history, alpha);
  }
}

// Adds the partial sums and writes the residual, the new Gram row and column, and the column count.
void Round::finish_row(std::int64_t b, std::int64_t i) {
  const int older = std::clamp<int>(filled(b, i), 0, p_.history - 1);
  double total[2 + kMaxHistory];
  scan_.reduce(b, i, 3 + older, total);
  s_.sq_diff[i * s_.batch + b] = total[0];
  s_.sq_norm[i * s_.batch + b] = total[1];
  double* matrix = gram(b, i);
  for (int age = 0; age <= older; ++age) {
    matrix[p_.column * p_.history + column(age)] = total[2 + age];
    matrix[column(age) * p_.history + p_.column] = total[2 + age];
  }
  filled(b, i) = older + 1;
}

// Running sums of the Gram matrices from the first active row on, and the columns that all rows so far have.
void Round::accumulate(std::int64_t b, std::int64_t i) {
  const std::int64_t row = index_.row(b, i);
  double *total = memory_.shared_gram + row * square_, *fill = memory_.shared_fill + row;
  const double* own = gram(b, i);
  const bool first = i == s_.lo[b];
  for (int k = 0; k < square_; ++k) total[k] = first ? own[k] : own[k] + total[k - square_];
  *fill = first ? filled(b, i) : std::min<double>(fill[-1], filled(b, i));
}

// The first row's plain step is exact, since it follows the known states: newest column only.
void Round::solve_row(std::int64_t b, std::int64_t i, const double* matrix, int n) {
  double* alpha = memory_.alpha + index_.row(b, i) * p_.history;
  std::fill(alpha, alpha + p_.history, 0.0);
  alpha[0] = 1.0;
  if (i == s_.lo[b] || n <= 1) return;
  double ordered[kMaxHistory][kMaxHistory], solved[kMaxHistory];
  for (int r = 0; r < n; ++r) {
    for (int c = 0; c < n; ++c) ordered[r][c] = matrix[column(n - 1 - r) * p_.history + column(n - 1 - c)];
  }
  solve_alpha(&ordered[0][0], n, kMaxHistory, p_.ridge, p_.relative_ridge, p_.stale, solved);
  for (int age = 0; age < n; ++age) alpha[age] = solved[n - 1 - age];
}

void Round::mix(const BlockRange& piece, std::int64_t from, std::int64_t to) const {
  const std::int64_t b = piece.b, element = piece.begin * kBlock;
  for (std::int64_t i = from; i < to; ++i) {
    const double* alpha = memory_.alpha + index_.row(b, i) * p_.history;
    const double undamped = i == s_.lo[b] ? 0.0 : 1.0 - p_.damping;
    MixRow row;
    row.f_count = row.g_count = 0;
    row.newest = scan_.ring(p_.f, p_.column, i, b, element);
    row.out = scan_.at(s_.states, i + 1, b, element);
    row.size = std::min(s_.size, piece.end * kBlock) - element;
    for (int age = 0; age < p_.history; ++age) {
      if (alpha[age] == 0) continue;
      if (age > 0) {
        row.f[row.f_count] = scan_.ring(p_.f, column(age), i, b, element);
        row.weight[row.f_count++] = alpha[age];
      }
      if (undamped != 0) {
        row.g[row.g_count] = scan_.ring(p_.g, column(age), i, b, element);
        row.g_weight[row.g_count++] = -undamped * alpha[age];
      }
    }
    row_kernels(s_.dtype).mix(row);
  }
}

}  // namespace

void anderson_step(const AndersonProblem& problem) { Round(problem).run(); }

void anderson_step_call(Arguments& a) {
  AndersonProblem p;
  p.scan = read_scan(a);
  p.history = static_cast<int>(a.integer("M", 1, kMaxHistory));
  p.width = a.integer("W", p.scan.steps > 0 ? 1 : 0, std::int64_t{1} << 30);
  require_addressable("M, W, B, D", {p.history, p.width, p.scan.batch, p.scan.size});
  const auto item = static_cast<std::size_t>(item_size(p.scan.dtype));
  p.f = a.address("f", item, has_data(p.scan));
  p.g = a.address("g", item, has_data(p.scan));
  p.gram = a.table<double>("gram", has_rows(p.scan));
  p.filled = a.table<std::int32_t>("filled", has_rows(p.scan));
  p.column = static_cast<int>(a.integer("column", 0, p.history - 1));
  p.scope = static_cast<Scope>(a.integer("scope", 0, 2));  // timestep, trajectory, triangular
  p.ridge = a.number("ridge", false, true);
  p.relative_ridge = a.flag("relative_ridge");
  p.damping = a.finite("damping");
  p.stale = a.number("stale", false, false);
  a.finish();
  anderson_step(p);
}

}  // namespace deqdiff
