#include "ddim_update.h"

#include <algorithm>
#include <string>

#include "newton_rows.h"
#include "ops.h"

namespace deqdiff {
namespace {

constexpr std::int64_t kStripBlocks = 16;  // 16 KB of float32: the row before stays in the first or second-level cache

}  // namespace

RowIndex::RowIndex(const ScanProblem& problem, std::int64_t width) : lo_(problem.lo) {
  require_windows(problem.lo, problem.hi, problem.batch, problem.steps, width);
  first_.reserve(problem.batch + 1);
  first_.push_back(0);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    first_.push_back(first_.back() + problem.hi[b] - problem.lo[b]);
  }
}

BlockRange blocks_of(const Range& range, std::int64_t blocks, std::int64_t b) {
  return {b, std::max(range.begin - b * blocks, std::int64_t{0}), std::min(range.end - b * blocks, blocks)};
}

DdimScan::DdimScan(const ScanProblem& problem, const HistoryView& history, const RowIndex& index, double* partial,
                   int sums)
    : p_(problem),
      h_(history),
      index_(index),
      partial_(partial),
      sums_(sums),
      blocks_(block_count(problem.size)),
      item_(item_size(problem.dtype)),
      kernels_(row_kernels(problem.dtype)) {}

char* DdimScan::at(const void* base, std::int64_t row, std::int64_t b, std::int64_t element) const {
  char* bytes = const_cast<char*>(static_cast<const char*>(base));
  return bytes + ((row * p_.batch + b) * p_.size + element) * item_;
}

char* DdimScan::ring(const void* base, int column, std::int64_t i, std::int64_t b, std::int64_t element) const {
  return at(base, column * h_.width + i % h_.width, b, element);
}

// The value of state i on the scan: known states as they are, later ones as this round computed them.
const char* DdimScan::scanned(std::int64_t i, std::int64_t b, std::int64_t element) const {
  if (h_.f == nullptr || i <= p_.lo[b]) return at(p_.states, i, b, element);
  return ring(h_.f, h_.column, i - 1, b, element);
}

int DdimScan::collect_terms(std::int64_t i, std::int64_t b, std::int64_t element, DdimRow* row) const {
  int count = 0;
  const auto add = [&](double coef, const void* term) {
    row->coef[count] = coef;
    row->terms[count++] = term;
  };
  for (std::int64_t lag = 0; lag < p_.lags && lag <= i; ++lag) {
    const double state = p_.state_coef[i * p_.lags + lag], model = p_.model_coef[i * p_.lags + lag];
    // Lags that this row does not use cost nothing, and may not have been written yet.
    if (lag == 0 || state != 0) add(state, scanned(i - lag, b, element));
    if (lag == 0 || model != 0) add(model, at(p_.predictions, i - lag, b, element));
  }
  if (p_.drift != nullptr) add(1.0, at(p_.drift, i, b, element));
  return count;
}

void DdimScan::run_strip(const BlockRange& strip, std::int64_t from, std::int64_t to) const {
  const std::int64_t b = strip.b, element = strip.begin * kBlock;
  DdimRow row;
  row.size = std::min(p_.size, strip.end * kBlock) - element;
  row.stride = sums_;
  row.g = nullptr;
  row.older_count = 0;
  for (std::int64_t i = from; i < to; ++i) {
    row.term_count = collect_terms(i, b, element, &row);
    row.state = row.f = at(p_.states, i + 1, b, element);
    if (h_.f != nullptr) {
      row.f = ring(h_.f, h_.column, i, b, element);
      row.g = ring(h_.g, h_.column, i, b, element);
      row.older_count = std::clamp<int>(h_.filled[i % h_.width * p_.batch + b], 0, h_.history - 1);
      for (int j = 0; j < row.older_count; ++j) {
        row.older[j] = ring(h_.g, (h_.column - 1 - j + h_.history) % h_.history, i, b, element);
      }
    }
    row.partial = partial_ + (index_.row(b, i) * blocks_ + strip.begin) * sums_;
    kernels_.affine(row);
  }
}

void DdimScan::run(const BlockRange& piece, std::int64_t from, std::int64_t to) const {
  for (std::int64_t begin = piece.begin; begin < piece.end; begin += kStripBlocks) {
    run_strip({piece.b, begin, std::min(piece.end, begin + kStripBlocks)}, from, to);
  }
}

void DdimScan::reduce(std::int64_t b, std::int64_t i, int count, double* total) const {
  std::fill(total, total + count, 0.0);
  const double* group = partial_ + index_.row(b, i) * blocks_ * sums_;
  for (std::int64_t block = 0; block < blocks_; ++block, group += sums_) {
    for (int k = 0; k < count; ++k) total[k] += group[k];
  }
}

double* scratch(std::size_t doubles) {
  static thread_local std::vector<double> memory;
  if (memory.size() < doubles) memory.resize(doubles);
  return memory.data();
}

void ddim_update(const ScanProblem& problem) {
  constexpr int kSums = 2;
  const RowIndex index(problem, problem.steps);
  const std::int64_t blocks = block_count(problem.size);
  const DdimScan scan(problem, HistoryView{}, index, scratch(index.rows() * blocks * kSums), kSums);
  team(useful_threads(index.rows() * problem.size, problem.threads), [&](int part, int parts) {
    const Range range(problem.batch * blocks, part, parts);
    for (std::int64_t b = blocks > 0 ? range.begin / blocks : 0; b * blocks < range.end; ++b) {
      scan.run(blocks_of(range, blocks, b), problem.lo[b], problem.hi[b]);
    }
  });
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    for (std::int64_t i = problem.lo[b]; i < problem.hi[b]; ++i) {
      double total[kSums];
      scan.reduce(b, i, kSums, total);
      problem.sq_diff[i * problem.batch + b] = total[0];
      problem.sq_norm[i * problem.batch + b] = total[1];
    }
  }
}

ScanProblem read_scan(Arguments& a, const char* sq_diff, const char* sq_norm) {
  ScanProblem p;
  p.dtype = static_cast<Dtype>(a.integer("dtype", 0, 2));  // float32, float64, bfloat16
  p.steps = a.integer("T", 0, std::int64_t{1} << 30);
  p.batch = a.integer("B", 0, std::int64_t{1} << 30);
  p.size = a.integer("D", 0, std::int64_t{1} << 40);
  p.threads = static_cast<int>(a.integer("threads", 1, 1 << 20));
  p.lags = static_cast<int>(a.integer("L", 1, kMaxLags));
  require_addressable("T, B, D", {p.steps + 1, p.batch, p.size});
  const bool rows = has_rows(p), data = has_data(p);
  const auto item = static_cast<std::size_t>(item_size(p.dtype));
  p.states = a.address("states", item, data);
  p.predictions = a.address("predictions", item, data);
  p.state_coef = a.table<const double>("state_coef", rows);
  p.model_coef = a.table<const double>("model_coef", rows);
  p.lo = a.table<const std::int32_t>("lo", p.batch > 0);
  p.hi = a.table<const std::int32_t>("hi", p.batch > 0);
  p.sq_diff = a.table<double>(sq_diff, rows);
  p.sq_norm = a.table<double>(sq_norm, rows);
  p.drift = a.address("drift", item, false);
  return p;
}

Rings read_rings(Arguments& a, const ScanProblem& scan, int least) {
  Rings r;
  r.columns = static_cast<int>(a.integer("ring", least, kMaxSecants + 1));
  const bool used = r.columns > 0;
  r.width = a.integer("W", used && scan.steps > 0 ? 1 : 0, std::int64_t{1} << 30);
  require_addressable("ring, W, B, D", {r.columns, r.width, scan.batch, scan.size});
  const auto item = static_cast<std::size_t>(item_size(scan.dtype));
  r.z = a.address("z", item, used && has_data(scan));
  r.e = a.address("e", item, used && has_data(scan));
  r.filled = a.table<std::int32_t>("filled", used && has_rows(scan));
  r.column = static_cast<int>(a.integer("column", 0, std::max(r.columns - 1, 0)));
  return used ? r : Rings{};
}

RowTable read_table(Arguments& a, const ScanProblem& scan, const char* name) {
  const void* data = a.address(name, wide_size(scan.dtype), has_data(scan));
  return {data, a.flag((std::string(name) + "_per_element").c_str())};
}

void ddim_update_call(Arguments& a) {
  const ScanProblem problem = read_scan(a);
  a.finish();
  ddim_update(problem);
}

}  // namespace deqdiff
